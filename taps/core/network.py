"""A network with gated units and norms and one head per task. Files and multi-task passes are added by ``TaskModel``."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taps.core.delta import Encoded
from taps.core.execution import Execution, Place, State, plain_state
from taps.core.find import choose, declared_features, measured_features
from taps.core.gate import Decision, Gate, propagate_skips
from taps.core.method import Method
from taps.core.modules import TaskDict, evaluating
from taps.core.norm import TaskNorm
from taps.core.unit import GatedUnit
from taps.core.wrap import wrap
from taps.errors import UserError, unknown

_SHAPELESS = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
_TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Origin(NamedTuple):
    """The method that a task was trained with, if it is not the model's: its settings, and the units it has gates on."""

    method: str
    options: Mapping[str, object]
    norm: str
    layers: str | None
    units: tuple[str, ...]


#: default of the first argument of calls, for networks that take named inputs only
NO_INPUT: Any = object()


class Network(nn.Module):
    """A base network whose units and norms may differ between tasks.

    Args:
        net: maps a batch to features; wrapped in place.
        method: the method.
        norm: norm policy, one that the method supports.
        layers: a regular expression searched in the units' names; the others stay shared. ``None``: all units.
        options: values of all options of the method.
        train_base: whether the base is trained with the tasks.

    Attributes:
        backbone: the wrapped network.
        heads: head of each task.
        units, task_norms: the wrapped units and norms, in network order.
        descriptions: description of each unit, from which gates are made.
        unskippable: for each unit that cannot be skipped, the reason.
        policies: for each task under a policy, (run, specific) of each unit.
        origins: the method of each task that was trained with another method than the model's.
        encoded: for each task in whose file norms and head are encoded, these encodings by key of the file.
    """

    def __init__(
        self, net: nn.Module, method: Method, norm: str, layers: str | None, options: dict, train_base: bool
    ) -> None:
        super().__init__()
        lazy = [name for name, tensor in _tensors(net) if isinstance(tensor, _SHAPELESS)]
        if lazy:
            raise UserError(
                f"{lazy[0]!r} has no shape yet, since its module is lazy: run one batch through the network before adapting it"
            )
        found = choose(method.find_units(net, options), layers)
        self.method, self.norm, self.layers, self.options, self.train_base = method, norm, layers, options, train_base
        self.state = State()
        self._num_features = declared_features(net)
        self.base_name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture") or type(net).__name__
        self.base_parameters = sum(parameter.numel() for parameter in net.parameters())
        self.descriptions = [one.describe(index, found) for index, one in enumerate(found)]
        self.unskippable = {one.name: one.unskippable for one in found if one.unskippable}
        for unit in options and self.descriptions[:1]:  # reject a wrong value here, not at the first task
            gate = method.gate(unit, **options)
            method.penalty({"": [gate]}, "", **options)
            if method.policy_gate is not None:
                method.policy_gate(unit, Decision(), **options)
        backbone, units, norms = wrap(net, found, self.state, norm, not train_base, method.learns_policy)
        if not train_base:
            backbone.requires_grad_(False)
        self.backbone = backbone
        self.heads = TaskDict()
        self._units, self._norms = tuple(units), tuple(norms)
        with_buffers = () if train_base else tuple(_with_buffers(backbone))
        #: modules of a frozen base that are kept in evaluation mode, since they may update their buffers
        self._still = tuple(module for module in with_buffers if not module._modules)
        #: modules whose mode also concerns their parts; the first call in training shows whether they update their buffers
        self._watched = tuple(module for module in with_buffers if module._modules)
        self.policies: dict[str, tuple[tuple[float, float], ...]] = {}
        self.origins: dict[str, Origin] = {}
        self.encoded: dict[str, dict[str, Encoded]] = {}
        self._fingerprint: tuple[tuple, str] | None = None
        #: the fingerprint of a base in another precision, and that of the base it was converted from
        self._converted: tuple[str, str] | None = None
        self._is_rounded = False
        self.register_load_state_dict_post_hook(_after_loading)

    # -- tasks ---------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order they were added."""
        return list(self.heads)

    @property
    def num_features(self) -> int | None:
        """Width of the base's features: what the network declares, else what it returns for a small batch."""
        if self._num_features is None:
            self._num_features = self._measured()[0]
        return self._num_features

    def _measured(self) -> tuple[int | None, torch.dtype | None]:
        with evaluating(self):
            return measured_features(self.backbone, lambda x: self.run(None, (x,), {}))

    def head_type(self, is_own: bool) -> torch.dtype | None:
        """Return the dtype that a head gets: the base's. If the base mixes dtypes, that of its features for a new head, and
        ``None`` (unchanged) for a head of the user's own."""
        types = {parameter.dtype for parameter in self.backbone.parameters() if parameter.is_floating_point()}
        if len(types) == 1:
            return types.pop()
        return self._measured()[1] if types and not is_own else None

    @property
    def units(self) -> tuple[GatedUnit, ...]:
        """The gated units in network order."""
        return self._units

    @property
    def task_norms(self) -> tuple[TaskNorm, ...]:
        """The wrapped norms in network order."""
        return self._norms

    @property
    def parents(self) -> tuple[int | None, ...]:
        """For each unit the index of the enclosing unit, or ``None``."""
        return tuple(unit.parent for unit in self.descriptions)

    def check_task(self, task: str) -> None:
        """Raise a ``UserError`` unless the model has ``task``."""
        if task not in self.heads:
            raise unknown("task", task, self.tasks, "" if self.tasks else "add it with add_task or load_task")

    def check_new_task(self, task: str) -> None:
        """Raise a ``UserError`` unless a task may be added under this name."""
        if not isinstance(task, str) or not _TASK_NAME.fullmatch(task) or len(task) > 255:
            shown = repr(task) if len(str(task)) <= 255 else f"of {len(task)} characters"
            raise UserError(f"task name {shown} is not allowed: use at most 255 letters, digits, '_' and '-'")
        if task in self.heads:
            raise UserError(f"the model already has a task {task!r}; remove_task it first or choose another name")

    def add_task(self, task: str, num_classes: int | None = None, head: nn.Module | None = None) -> None:
        """Add a task with zero deltas, new gates, norms copied from the base, and a head.

        Args:
            task: letters, digits, ``_`` and ``-``.
            num_classes: number of outputs of a new linear head, > 0.
            head: instead of ``num_classes``, any module from the base's features to the task's output.

        Raises:
            UserError: if the name is taken or not allowed, or the head is not defined.
        """
        self.check_new_task(task)
        if (num_classes is None) == (head is None):
            raise UserError(f"task {task!r}: give either num_classes or head")
        if head is not None and not isinstance(head, nn.Module):
            raise UserError(f"task {task!r}: head must be an nn.Module, not {type(head).__name__}")
        dtype = self.head_type(is_own=head is not None)
        if head is None:
            number = _whole_number(num_classes)
            if number is None or number < 1:
                raise UserError(f"task {task!r}: num_classes must be a whole number above 0, not {num_classes!r}")
            if self.num_features is None:
                raise UserError(
                    f"task {task!r}: the network returns no features of shape (B, width) for a small batch; wrap it so that it "
                    "does, or give head= instead of num_classes"
                )
            with torch.inference_mode(False):
                head = nn.Linear(self.num_features, number)
        like = next(self.backbone.parameters(), None)
        try:
            with torch.inference_mode(False):  # inference tensors cannot be trained
                for unit, gate in zip(self._units, self.make_gates(), strict=True):
                    unit.add_task(task, gate)
                for norm in self._norms:
                    norm.add_task(task)
                self.heads[task] = head.to(like.device, dtype) if like is not None else head
                head.train(self.training)
        except BaseException:
            self.forget(task)
            raise

    def make_gates(self, policy: Sequence[float | Sequence[float]] | None = None) -> list[Gate]:
        """Make one task's gates in network order; with a policy, gates that follow it.

        Args:
            policy: for each unit (run, specific), each 1.0 or 0.0, or ``run`` alone if no task has its own weights;
                only for methods that learn policies.

        Raises:
            UserError: if the method learns no policies, or the policy has the wrong number of units.
        """
        if policy is None:
            return [self.method.gate(description, **self.options) for description in self.descriptions]
        if self.method.policy_gate is None:
            raise UserError(f"method {self.method.name!r} learns no policies")
        if len(policy) != len(self._units):
            raise UserError(f"a policy of {len(policy)} units was given, the network has {len(self._units)}")
        decisions = self.apply_skips(map(_decision, policy))
        for unit, decision in zip(self.descriptions, decisions, strict=True):
            held = unit.parent is not None and decisions[unit.parent].run == 0.0
            if decision.run == 0.0 and unit.stand_in_size is None and not held:
                raise UserError(f"a policy skips {unit.name!r}, for which nothing can stand in")
        return [
            self.method.policy_gate(unit, decision, **self.options)
            for unit, decision in zip(self.descriptions, decisions, strict=True)
        ]

    def apply_skips(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Return the decisions as applied: skips reach nested units, and ``specific`` is 0.0 for units without weights."""
        return [
            decision if unit.size else decision._replace(specific=0.0)
            for unit, decision in zip(self.descriptions, propagate_skips(decisions, self.parents), strict=True)
        ]

    def follow(self, policies: Mapping[str, Sequence[float | Sequence[float]]]) -> None:
        """Replace the gates of tasks by gates that follow policies: which units each task shares, owns or skips.

        Deltas are kept where a task uses its own weights; a task without deltas there starts from the shared weights. With
        ``norm="follow"``, tasks get their own copies of the base's norms after the first unit at which their decisions differ;
        tasks that took the same route share a copy.

        Args:
            policies: policy of each task, as in :meth:`make_gates`.

        Raises:
            UserError: for an unknown task, or a policy that does not fit; no task is changed then.
        """
        for task in policies:
            self.check_task(task)
        gates = {task: self.make_gates(policy) for task, policy in policies.items()}  # all before any change
        for task, policy in policies.items():
            for unit, gate in zip(self._units, gates[task], strict=True):
                unit.change_gate(task, gate)
            self.policies[task] = tuple(decision[:2] for decision in self.apply_skips(map(_decision, policy)))  # type: ignore[misc]
        for norm in self._norms if self.norm == "follow" and self.method.learns_policy else ():
            routes: dict[tuple, list[str]] = {}
            for task, policy in self.policies.items():
                if norm.parent is not None and policy[norm.parent][0] == 0.0:  # the task never reaches this norm
                    norm.remove_task(task)
                    continue
                decided = zip(policy[: norm.position], self._units, strict=False)
                # After a gate that chooses for each sample, tasks differ even under one policy.
                route = tuple(
                    (run, (specific or unit.gates[task].uses_input) and task) for (run, specific), unit in decided
                )
                routes.setdefault(route, []).append(task)
            norm.share(list(routes.values()))

    def remove_task(self, task: str) -> None:
        """Remove a task and everything that belongs to it; files are not changed."""
        self.check_task(task)
        self.forget(task)

    def forget(self, task: str) -> None:
        """Remove everything that belongs to ``task``, even if it was only partly added."""
        if task in self.heads:  # first, so that no call begins that finds only parts of the task
            del self.heads[task]
        self.policies.pop(task, None)
        self.origins.pop(task, None)
        self.encoded.pop(task, None)
        for module in (*self._units, *self._norms):
            module.remove_task(task)

    def settle(self, task: str) -> None:
        """Prepare for a task that is no longer trained, on a base that is no longer trained: hold W + δ instead of δ."""
        for place in (*self._units, *self._norms):
            place.settle(task)

    # -- running -------------------------------------------------------------------------------------------------

    def features(self, x=NO_INPUT, task: str | Execution | None = None, **inputs):
        """Return the backbone's output for ``task`` (``None``: the base alone); further inputs are passed to the network."""
        return self.run(task, () if x is NO_INPUT else (x,), inputs)

    def run(self, task: str | Execution | None, args: tuple, kwargs: dict):
        """Call the backbone with ``task``: a task's name, ``None`` or an :class:`taps.core.execution.Execution`."""
        if not (self._watched and self.training) or torch.compiler.is_compiling():
            return self.state.run(task, self.backbone, args, kwargs)
        # The first training call shows which modules move their buffers; it works on copies of them.
        before = [(module, dict(module._buffers)) for module in self._watched]
        copies = {id(own): own.clone() for _, held in before for own in held.values() if own is not None}
        versions = {key: copied._version for key, copied in copies.items()}
        for module, held in before:
            module._buffers.update({name: copies[id(own)] for name, own in held.items() if own is not None})
        try:
            return self.state.run(task, self.backbone, args, kwargs)
        finally:
            moved = []
            for module, held in before:
                for name, own in held.items():
                    now, wanted = module._buffers.get(name), None if own is None else copies[id(own)]
                    if now is not wanted or (now is not None and now._version != versions[id(own)]):
                        moved.append(module)
                module._buffers.update(held)
            self._hold(moved)

    def hold_buffers(self) -> None:
        """Keep modules of a frozen base that could move their buffers in evaluation mode, for calls that are not watched."""
        self._hold(self._watched)

    def _hold(self, modules: Iterable[nn.Module]) -> None:
        self._still = (*self._still, *dict.fromkeys(modules))
        self._watched = ()
        for module in self._still:
            module.training = False

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Make the network recompute activations in the backward pass instead of storing them.

        Raises:
            UserError: if the network does not support this.
        """
        switch = getattr(self.backbone, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(f"{self.base_name} has no set_grad_checkpointing: it cannot checkpoint activations")
        try:
            switch(enable)
        except (AssertionError, NotImplementedError) as error:
            raise UserError(f"{self.base_name} cannot checkpoint activations: {error}") from None
        self.hold_buffers()
        self.state.forget_checkpoints()

    def train(self, mode: bool = True):
        super().train(mode)
        self.state.forget_checkpoints()
        for module in self._still:  # a frozen base does not update its statistics
            module.training = False
        return self

    def _in_training(self) -> bool:
        """Return whether the model, its network or one of its units or norms is in training mode."""
        parts = (self, self.backbone, *self._units, *self._norms)
        return any(part.training for part in parts)

    def _prepare_again(self) -> None:
        """Take into account that tensors of loaded tasks have changed."""
        for place in (*self._units, *self._norms):
            for task in [task for task in place.ready if task is not None]:
                place.prepare(task)

    def _apply(self, fn, *args, **kwargs):
        like = next((p for p in self.backbone.parameters() if p.is_floating_point()), torch.empty(0))
        new = fn(torch.empty(0, dtype=like.dtype, device=like.device))
        changes, widened = new.dtype != like.dtype and not self.train_base, new.itemsize > like.itemsize
        known = self.fingerprint() if changes else ""
        gates = [unit.gates[task] for unit in self._units for task in unit.gates]
        scores = [(gate, name, own.data) for gate in gates for name, own in gate.named_parameters(recurse=False)]
        super()._apply(fn, *args, **kwargs)
        for gate, name, before in scores:  # a score that is rounded could pass its threshold
            own = getattr(gate, name)
            if own.dtype.itemsize < 4:
                own.data = before.to(own.device, torch.float32)
                own.grad = None if own.grad is None else own.grad.to(torch.float32)
        if (
            changes
        ):  # in another precision it is still the base that tasks were made for, unless rounded and widened again
            self._fingerprint = None  # new tensors may lie where the old ones did
            self._converted = None if widened and self._is_rounded else (fingerprint(self._weights()), known)
            self._is_rounded = self._is_rounded or not widened
        self._prepare_again()
        return self

    # -- what a task has learned ---------------------------------------------------------------------------------

    def gates(self, task: str) -> list[Gate]:
        """Return the task's gates in network order."""
        self.check_task(task)
        for unit in self._units:
            unit.ready.pop(task, None)  # which no longer holds if a gate is changed
        return [unit.gates[task] for unit in self._units]

    def penalty(self, task: str) -> Tensor:
        """Return the method's penalty as a scalar; for TAPS the mean of |s| over the units."""
        self.check_task(task)
        held = {name: [unit.gates.get(name) for unit in self._units] for name in self.heads}
        gates = {name: own for name, own in held.items() if None not in own}  # another thread may be removing a task
        if task in self.origins and self.origins[task].method != self.method.name:
            raise UserError(
                f"task {task!r} was trained with method {self.origins[task].method!r}, the model is for {self.method.name!r}: it "
                "can be run, not trained"
            )
        value = self.method.penalty(gates, task, **self.options)
        return value.to(next(self.heads[task].parameters(), value).device)

    def report(self, task: str) -> list[dict]:
        """Return one row per unit, in network order.

        Keys: ``name``, ``kind`` (class of the module), ``parameters`` (of the base unit), ``score`` (``None`` if the
        gate has no single score), ``run`` and ``specific``: the hard decision, 0.0 or 1.0 (a mean where it varies). Units
        inside a skipped unit have ``run`` 0.0.
        """
        self.check_task(task)
        rows, gates = [], [unit.gates[task] for unit in self._units]
        decisions = self.apply_skips(gate.decide() for gate in gates)
        for unit, gate, decision in zip(self._units, gates, decisions, strict=True):
            score = getattr(gate, "score", None)
            rows.append(
                {
                    "name": unit.name,
                    "kind": type(unit.base).__name__,
                    "parameters": unit.size,
                    "score": float(score.detach()) if isinstance(score, Tensor) and score.numel() == 1 else None,
                    "run": _mean(decision.run),
                    "specific": _mean(decision.specific),
                }
            )
        return rows

    def roles(self, *tasks: str) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that training ``tasks`` may change, by role and dotted name.

        Roles are those of :data:`taps.core.method.ROLES`; ``"base"`` is empty while the base is frozen.
        """
        role_of: dict[int, str] = {}
        for task in tasks:
            self.check_task(task)
            for unit in self._units:
                for role, modules in (("gate", unit.gates), ("delta", unit.deltas)):
                    if task in modules:
                        role_of.update((id(parameter), role) for parameter in modules[task].parameters())
            for norm in self._norms:
                if task in norm.norms:
                    role_of.update((id(parameter), "norm") for parameter in norm.norms[task].parameters())
            role_of.update((id(parameter), "head") for parameter in self.heads[task].parameters())
        if self.train_base:
            others = {id(p) for module in self.task_modules() for p in module.parameters()}
            role_of.update((id(p), "base") for p in self.backbone.parameters() if id(p) not in others)
        roles: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if id(parameter) in role_of and parameter.requires_grad:
                roles.setdefault(role_of[id(parameter)], {})[name] = parameter
        return roles

    def parameters_of(self, *tasks: str) -> list[nn.Parameter]:
        """Return the parameters of some tasks that training may change, for an optimiser of their own: all but the base's."""
        return [p for role, own in self.roles(*tasks).items() if role != "base" for p in own.values()]

    def task_modules(self, task: str | None = None) -> list[nn.Module]:
        """Return the modules that belong to ``task`` (``None``: to any task), including heads."""
        dicts = [modules for unit in self._units for modules in (unit.gates, unit.deltas)]
        dicts += [norm.norms for norm in self._norms] + [self.heads]
        return [modules[name] for modules in dicts for name in modules if task in (None, name)]

    def task_state(self, task: str) -> dict[str, Tensor]:
        """Return every tensor of the task by dotted name, deltas of closed units and buffers included, to continue training."""
        self.check_task(task)
        of_task = {
            id(tensor) for module in self.task_modules(task) for tensor in (*module.parameters(), *module.buffers())
        }
        return {
            name: tensor
            for named in (self.named_parameters(), self.named_buffers())
            for name, tensor in named
            if id(tensor) in of_task
        }

    # -- the base ------------------------------------------------------------------------------------------------

    def base_state(self) -> dict[str, Tensor]:
        """Return the base network's tensors under their names from before wrapping."""
        return plain_state(self.backbone)

    @torch.no_grad()
    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Load the :meth:`base_state` of another model of the same network into the base.

        Raises:
            UserError: if names or shapes differ; the base is then unchanged.
        """
        held = self.base_state()
        wrong = [name for name in held if name not in state or state[name].shape != held[name].shape]
        wrong += [name for name in state if name not in held]
        if wrong:
            raise UserError(f"these weights belong to another network: {len(wrong)} tensors differ, e.g. {wrong[0]}")
        for name, tensor in held.items():
            tensor.copy_(state[name])
        for unit in self._units:
            for task in [task for task in unit.ready if task is not None]:
                unit.settle(task)

    def fingerprint(self) -> str:
        """Return the SHA-256 over name, type, shape and bytes of every tensor of the base, without batch counters.

        A base that was converted to another precision keeps the fingerprint from before.
        """
        weights = self._weights()
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in weights.values())
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, fingerprint(weights))
        found = self._fingerprint[1]
        return self._converted[1] if self._converted is not None and found == self._converted[0] else found

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.base_state().items() if not name.endswith("num_batches_tracked")}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over name, type, shape and bytes of each tensor, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _after_loading(model: Network, incompatible: object) -> None:
    model._prepare_again()


def inner_first(modules: Iterable[GatedUnit | TaskNorm]) -> list[GatedUnit | TaskNorm]:
    """Return the modules ordered so that nested ones precede those that contain them; the network itself comes last."""
    return sorted(modules, key=lambda module: -len(module.name.split(".")) * bool(module.name))


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _with_buffers(backbone: nn.Module) -> Iterable[nn.Module]:
    """Yield modules of the base with buffers that training could change, except norms, which handle their own.

    Tables of whole numbers and what is not saved, such as relative positions and attention masks, are not among these.
    """
    if isinstance(backbone, Place):
        backbone = backbone.base
    for child in backbone.children():
        yield from () if isinstance(child, TaskNorm) else _with_buffers(child)
    saved = (own for name, own in backbone._buffers.items() if name not in backbone._non_persistent_buffers_set)
    if any(own is not None and (own.is_floating_point() or not own.dim()) for own in saved):
        yield backbone


def _whole_number(value: Any) -> int | None:
    """A whole number of Python, NumPy or torch, or ``None`` for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _decision(entry: float | Sequence[float]) -> Decision:
    """Return the decision for an entry of a policy: (run, specific), or ``run`` alone."""
    values = tuple(entry) if isinstance(entry, Sequence) else (entry,)
    if any(value not in (0, 1) for value in values) or not 1 <= len(values) <= 2:
        raise UserError(f"a policy has the entry {entry!r}; give 1 or 0, or a pair (run, specific) of them")
    return Decision(*map(float, values))


def _mean(value) -> float:
    if isinstance(value, dict):
        return float(torch.cat([tensor.flatten() for tensor in value.values()]).float().mean())
    return float(value.float().mean()) if isinstance(value, Tensor) else float(value)
