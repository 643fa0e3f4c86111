"""The model: one base network, many tasks."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from taps import cost, mixed, taskfile, together
from taps.adapt import choose, out_features, wrap
from taps.backbones import attach_head
from taps.errors import UserError, unknown
from taps.gates import Decision, Gate, State, reached
from taps.layer import GatedUnit, TaskDict, TaskNorm, evaluating, inner_first, plain_state
from taps.library import Library, Shelf
from taps.methods import METHODS, Method

_TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


def adapt(
    net: nn.Module,
    method: str = "taps",
    norm: str | None = None,
    layers: str | None = None,
    train_base: bool | None = None,
    **options,
) -> TaskModel:
    """Make ``net`` the shared base of many tasks.

    The network is wrapped in place. It is frozen unless the method trains it, and what it computes never changes:
    a task whose deltas are zero gives bit-identical outputs.

    Args:
        net: any module that maps a batch to features; without its classifier, since each task brings its own head.
        method: a name in ``taps.METHODS``.
        norm: ``"task"`` each task has its own norms everywhere (the paper); ``"follow"`` only where the layer before
            the norm is tuned, so that what is shared is shared exactly; ``"frozen"`` the base's. For BatchNorm,
            LayerNorm, GroupNorm and their relatives alike. ``None``: the method's own default, ``"task"`` for TAPS. A
            method for which only one policy makes sense uses that.
        layers: a regular expression searched in the layers' names; the others stay shared. ``None``: all layers.
        train_base: whether the base learns along with the tasks, as in joint training; ``None``: as the method says.
        **options: the method's own, e.g. for ``"taps"``: ``threshold=0.1`` (τ), ``score_init=0.15``, ``ste="code"``.

    Raises:
        UserError: (a ``ValueError``) for an unknown method, norm policy or option, or a pattern without a match.

    Example:
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)))
        >>> model.add_task("sketch", num_classes=3)
        >>> model(torch.zeros(2, 4), task="sketch").shape
        torch.Size([2, 3])
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    row = METHODS[method]
    for name in options:
        if name not in row.options:
            raise unknown(f"option of method {method!r}", name, row.options)
    norm = row.norms[0] if norm is None else norm
    if norm not in ("task", "follow", "frozen"):
        raise unknown("norm policy", norm, ("task", "follow", "frozen"))
    if norm not in row.norms:
        if norm != "task":
            raise UserError(f"method {method!r} works with norm={row.norms[0]!r}, not {norm!r}")
        norm = row.norms[0]
    trains = row.trains_base if train_base is None else train_base
    return TaskModel(net, method, row, norm, layers, {**row.options, **options}, trains)


class TaskModel(nn.Module):
    """A base network with gated units and norms, a head for each task, and the task's name as the only switch.

    Made by :func:`adapt`. ``model(x, task="sketch")`` runs one task; every method below takes the task's name.
    """

    def __init__(
        self,
        net: nn.Module,
        method: str,
        row: Method,
        norm: str,
        layers: str | None,
        options: dict,
        train_base: bool,
    ) -> None:
        super().__init__()
        found = choose(row.select(net, **{name: options[name] for name in row.select_options}), layers)
        self.method = method
        self.row = row
        self.norm = norm
        self.layers = layers
        self.options = options
        self.train_base = train_base
        self.state = State()
        self.num_features = out_features(net)
        self.base_name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture") or type(net).__name__
        self.base_parameters = sum(parameter.numel() for parameter in net.parameters())
        backbone, units, norms = wrap(net, found, self.state, norm, not train_base, row.learns_policy)
        if not train_base:
            backbone.requires_grad_(False)
        self.backbone = backbone
        self.heads = TaskDict()
        self._units, self._norms = tuple(units), tuple(norms)
        self._shelf: Shelf | None = None
        self.mixable: dict[torch.Size, str | None] = {}
        self._fingerprint: tuple[tuple, str] | None = None
        self._descriptions = [one.describe(index, found) for index, one in enumerate(found)]
        #: units that always have to be run, and why
        self.kept = {one.name: one.kept for one in found if one.kept}
        self.policies: dict[str, tuple[tuple[float, float], ...]] = {}
        for one in options and self._descriptions[:1]:  # a wrong value is refused here, not at the first task
            gate = row.gate(one, **options)
            row.penalty({"": [gate]}, "", **options)
            if row.fixed is not None:
                row.fixed(one, Decision(), **options)

    # -- tasks ---------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order they were added; those of a library come last, loaded or not."""
        offered = self._shelf.library.folders if self._shelf else {}
        return [task for task in self.heads if task not in offered] + list(offered)

    @property
    def units(self) -> tuple[GatedUnit, ...]:
        """The gated units in network order."""
        return self._units

    @property
    def task_norms(self) -> tuple[TaskNorm, ...]:
        """The wrapped norms in network order."""
        return self._norms

    def check_task(self, task: str) -> None:
        """Raise a ``UserError`` unless the model has ``task``; a task of the library is loaded."""
        self._fetch([task])

    def _fetch(self, tasks: Sequence[str]) -> None:
        """Have all of ``tasks`` in the model at once."""
        for task in tasks:
            if task not in self.heads and not (self._shelf and task in self._shelf):
                raise unknown("task", task, self.tasks, "" if self.tasks else "add it with add_task or load_task")
        if self._shelf:
            self._shelf.fetch([task for task in tasks if task in self._shelf])

    def add_task(self, task: str, num_classes: int | None = None, head: nn.Module | None = None) -> None:
        """Add a task: zero deltas, fresh gates, norms copied from the base, and a head.

        Args:
            task: letters, digits, ``_`` and ``-``.
            num_classes: makes a linear head of so many outputs, > 0.
            head: instead of ``num_classes``, any module from the base's features to the task's output.

        Raises:
            UserError: if the name is taken or not allowed, or the head is not defined.
        """
        self._check_free(task)
        if (num_classes is None) == (head is None):
            raise UserError(f"task {task!r}: give either num_classes or head")
        if head is None:
            if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
                raise UserError(f"task {task!r}: num_classes must be a whole number above 0, not {num_classes!r}")
            if self.num_features is None:
                raise UserError(f"task {task!r}: the network does not say how many features it has; give head= instead")
            head = nn.Linear(self.num_features, num_classes)
        self._add(task, head)

    def _check_new(self, task: str) -> None:
        if not isinstance(task, str) or not _TASK_NAME.fullmatch(task):
            raise UserError(f"task name {task!r} is not allowed: use letters, digits, '_' and '-'")
        if task in self.heads:
            raise UserError(f"the model already has a task {task!r}; remove_task it first or choose another name")

    def _check_free(self, task: str) -> None:
        self._check_new(task)
        if self._shelf and task in self._shelf:
            raise UserError(
                f"the model's library already has a task {task!r}; remove_task it first or choose another name"
            )

    def _add(self, task: str, head: nn.Module) -> None:
        like = next(self.backbone.parameters(), None)
        for unit, gate in zip(self._units, self.make_gates(), strict=True):
            unit.add_task(task, gate)
        for norm in self._norms:
            norm.add_task(task)
        self.heads[task] = head.to(like.device, like.dtype) if like is not None else head
        head.train(self.training)

    def make_gates(self, policy: Sequence[float | Sequence[float]] | None = None) -> list[Gate]:
        """Fresh gates for one task in network order; under a given policy those that follow it.

        Args:
            policy: for each unit (run, specific), each 1.0 or 0.0, or ``run`` alone where no task has weights of its own;
                only for methods that learn policies.

        Raises:
            UserError: if the method learns no policies, or the policy has another number of units.
        """
        if policy is None:
            return [self.row.gate(description, **self.options) for description in self._descriptions]
        if self.row.fixed is None:
            raise UserError(f"method {self.method!r} learns no policies")
        if len(policy) != len(self._units):
            raise UserError(f"a policy of {len(policy)} units was given, the network has {len(self._units)}")
        decisions = self._reached(map(_decision, policy))
        for unit, decision in zip(self._descriptions, decisions, strict=True):
            held = unit.inside is not None and decisions[unit.inside].run == 0.0
            if decision.run == 0.0 and unit.skip is None and not held:
                raise UserError(f"a policy skips {unit.name!r}, for which nothing can stand in")
        return [
            self.row.fixed(unit, decision, **self.options)
            for unit, decision in zip(self._descriptions, decisions, strict=True)
        ]

    def _reached(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Decisions by unit, carried out; a unit without weights has nothing that could be the task's own."""
        return [
            decision if unit.size else decision._replace(specific=0.0)
            for unit, decision in zip(self._descriptions, reached(decisions, self.inside), strict=True)
        ]

    @property
    def inside(self) -> tuple[int | None, ...]:
        """For each unit the index of the one that holds it, ``None`` where none does."""
        return tuple(unit.inside for unit in self._descriptions)

    def follow(self, policies: Mapping[str, Sequence[float | Sequence[float]]]) -> None:
        """From now on tasks run and skip units, and use weights of their own, as policies say; their gates are replaced.

        Deltas stay where a task uses its own weights; where it had none it starts from the shared ones. With
        ``norm="follow"`` tasks get norms of their own, copies of the base's, from where they first do different things;
        tasks that have come the same way have them in common.

        Args:
            policies: by task, as in :meth:`make_gates`.

        Raises:
            UserError: for an unknown task, or a policy that does not fit; no task has changed then.
        """
        for task in policies:
            self.check_task(task)
        gates = {task: self.make_gates(policy) for task, policy in policies.items()}  # all, before anything changes
        for task, policy in policies.items():
            for unit, gate in zip(self._units, gates[task], strict=True):
                unit.change_gate(task, gate)
            self.policies[task] = tuple(decision[:2] for decision in self._reached(map(_decision, policy)))
        for norm in self._norms if self.norm == "follow" and self.row.learns_policy else ():
            ways: dict[tuple, list[str]] = {}
            for task, policy in self.policies.items():
                if norm.inside is not None and policy[norm.inside][0] == 0.0:  # it never comes here
                    norm.remove_task(task)
                    continue
                way = tuple((run, specific and task) for run, specific in policy[: norm.position])
                ways.setdefault(way, []).append(task)
            norm.share(list(ways.values()))

    def remove_task(self, task: str) -> None:
        """Forget a task and everything it holds; files stay as they are."""
        self.check_task(task)
        if self._shelf:
            self._shelf.forget(task)
        self.forget(task)

    def forget(self, task: str) -> None:
        """Drop whatever there is of ``task``, a task that was only half added included."""
        self.policies.pop(task, None)
        for module in (*self._units, *self._norms):
            module.remove_task(task)
        if task in self.heads:
            del self.heads[task]

    # -- running -------------------------------------------------------------------------------------------------

    def using(self, task: str | None):
        """Run the backbone as ``task`` sees it inside a ``with`` block; ``None`` is the base alone."""
        if task is not None:
            self.check_task(task)
        return self.state.running(task)

    def features(self, x: Tensor, task: str | None = None):
        """The backbone's output as ``task`` sees it; ``None`` is the base alone."""
        with self.using(task):
            return self.backbone(x)

    def forward(self, x: Tensor, task: str | Sequence[str] | None = None, tasks: Sequence[str] | None = None):
        """Run one task, a batch whose samples belong to different tasks, or several tasks on the same samples.

        Args:
            x: a batch, (B, ...) as the backbone takes it.
            task: the task's name, or B names, one a sample. What the tasks share is then computed once for the whole
                batch; the result is that of running each task on its samples, batch statistics included.
            tasks: instead of ``task``, names of tasks that all see all samples; what they share is computed once, as in
                :meth:`predict`, but in the mode the model is in and with gradients. A norm that several tasks share
                takes its statistics once from each of its different inputs.

        Returns:
            What the task's head returns, (B, num_classes) for a linear head. For one name a sample the outputs in the
            order of the batch: a tensor if their shapes agree, else a list of B outputs. With ``tasks=`` a dict.

        Raises:
            UserError: for an unknown task, or a number of names that is not B.
        """
        if tasks is not None:
            return together.outputs(self, x, self._names(tasks))
        if task is None:
            raise UserError("say which task to run: task= with its name, or tasks= with several")
        if isinstance(task, str):
            features = self.features(x, task)
            return self.heads[task](features)
        names = list(task)
        if len(names) != len(x):
            raise UserError(f"task= has {len(names)} names for a batch of {len(x)} samples; give one a sample")
        self._fetch(list(dict.fromkeys(names)))
        return self(x, names[0]) if len(set(names)) == 1 else mixed.run_mixed(self, x, names)

    def predict(self, x: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every task's output on the same batch, in evaluation mode and without gradients.

        What tasks share up to their first difference is computed once, along the network's own data flow. With
        ``norm="task"`` tasks differ from their first norm on; ``norm="follow"`` shares everything before the first
        tuned layer. A network whose code cannot be followed is run task by task, with a warning that says why.

        Args:
            x: a batch, (B, ...).
            tasks: names; ``None`` for all tasks.

        Returns:
            ``{task: output}`` in the order asked for.
        """
        names = self.tasks if tasks is None else list(dict.fromkeys(tasks))
        at_once = max(self._shelf.keep if self._shelf else len(names), 1)  # of a library no more than it may hold
        outputs = {}
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone() if x.is_inference() else x
            for start in range(0, len(names), at_once):
                some = names[start : start + at_once]
                self._fetch(some)
                with evaluating(self):
                    outputs.update(together.outputs(self, x, some))
        return outputs

    def predict_cost(self, x: Tensor, tasks: Sequence[str] | None = None) -> dict[str, int]:
        """Multiply-accumulate operations (MACs) of :meth:`predict` on ``x``; convolutions, matrix products, attention.

        Returns:
            ``macs``, what the network computes for all tasks in one pass; ``macs_separate``, what as many separate
            passes would compute; ``macs_heads``, what the heads add to either.
        """
        tasks = self._names(tasks)
        with evaluating(self), torch.no_grad():
            heads = separate = 0
            for task in tasks:
                with self.state.running(task):
                    separate += cost.macs(self.backbone, x)
                    heads += cost.macs(self.heads[task], self.backbone(x))
            one_pass = cost.macs(together.outputs, self, x, tasks)
        return {"macs": one_pass - heads, "macs_separate": separate, "macs_heads": heads}

    def predictor(self, tasks: Sequence[str] | None = None) -> nn.Module:
        """An ordinary module from a batch to ``{task: output}`` that computes what :meth:`predict` computes.

        The tasks' decisions are carried out, so it holds one plain module for each different behaviour of a layer. It
        is in evaluation mode; ``torch.export.export(predictor, (x,))`` makes one program with an output for each task.

        Raises:
            ValueError: where a decision depends on the input, so no fixed network equals it.
        """
        tasks = self._names(tasks)
        with evaluating(self):
            return together.predictor(self, tasks)

    def _names(self, tasks: Sequence[str] | None) -> list[str]:
        names = self.tasks if tasks is None else list(dict.fromkeys(tasks))
        self._fetch(names)
        return names

    # -- what a task has learned ---------------------------------------------------------------------------------

    def gates(self, task: str) -> list[Gate]:
        """The task's gates in network order."""
        self.check_task(task)
        return [unit.gates[task] for unit in self._units]

    def penalty(self, task: str) -> Tensor:
        """The method's penalty as a scalar; for TAPS the mean of |s| over the units."""
        self.check_task(task)
        gates = {name: [unit.gates[name] for unit in self._units] for name in self.heads}
        value = self.row.penalty(gates, task, **self.options)
        return value.to(next(self.heads[task].parameters(), value).device)

    def report(self, task: str) -> list[dict]:
        """One row a unit, in network order.

        Keys: ``name``, ``kind`` (class of the module), ``parameters`` (of the base unit), ``score`` (``None`` where the
        gate has no single one), ``run`` and ``specific``: the hard decision, 0.0 or 1.0 (a mean where it varies). What is
        inside a unit that is not run has ``run`` 0.0.
        """
        rows = []
        gates = self.gates(task)
        decisions = self._reached(gate.decide() for gate in gates)
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
        """The parameters that training ``tasks`` may move, by role and dotted name.

        Roles are those of :data:`taps.methods.ROLES`; ``"base"`` is empty while the base is frozen.
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
            others = {id(p) for module in self._task_modules() for p in module.parameters()}
            role_of.update((id(p), "base") for p in self.backbone.parameters() if id(p) not in others)
        roles: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if id(parameter) in role_of and parameter.requires_grad:
                roles.setdefault(role_of[id(parameter)], {})[name] = parameter
        return roles

    def _task_modules(self, task: str | None = None) -> list[nn.Module]:
        """The modules that belong to ``task`` (``None``: to any task), heads included."""
        dicts = [modules for unit in self._units for modules in (unit.gates, unit.deltas)]
        dicts += [norm.norms for norm in self._norms] + [self.heads]
        return [modules[name] for modules in dicts for name in modules if task in (None, name)]

    def task_state(self, task: str) -> dict[str, Tensor]:
        """Every tensor of the task (deltas of closed units and buffers too) by dotted name: what training continues from."""
        self.check_task(task)
        own = {
            id(tensor) for module in self._task_modules(task) for tensor in (*module.parameters(), *module.buffers())
        }
        return {
            name: tensor
            for named in (self.named_parameters(), self.named_buffers())
            for name, tensor in named
            if id(tensor) in own
        }

    # -- files and plain networks --------------------------------------------------------------------------------

    def base_state(self) -> dict[str, Tensor]:
        """The base network's tensors under the names they had before it was wrapped."""
        return plain_state(self.backbone)

    @torch.no_grad()
    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Give the base the tensors of :meth:`base_state` of another model of the same network.

        Raises:
            UserError: if names or shapes differ; the base is then unchanged.
        """
        own = self.base_state()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        wrong += [name for name in state if name not in own]
        if wrong:
            raise UserError(f"these weights belong to another network: {len(wrong)} tensors differ, e.g. {wrong[0]}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def fingerprint(self) -> str:
        """SHA-256 of every tensor of the base: its name, type, shape and bytes. Counters of batches are left out."""
        state = {name: tensor for name, tensor in self.base_state().items() if not name.endswith("num_batches_tracked")}
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in state.values())
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, taskfile.fingerprint(state))
        return self._fingerprint[1]

    def save_task(
        self,
        task: str,
        folder: str | Path,
        about: dict | None = None,
        max_error: float | None = None,
        compact: bool = False,
    ) -> Path:
        """Write ``folder/task.safetensors`` and ``folder/task.json``: all that has to be shipped to use the task.

        Only what the task uses is stored: deltas of open units, norms in use, gate scores and the head.

        Args:
            task: the task's name.
            folder: made if it does not exist; files of an earlier save are replaced.
            about: further entries for ``task.json``, such as class names.
            max_error: store each delta in as few bytes as keep ‖δ̂ − δ‖ / ‖δ‖ within this, 0..1
                (:mod:`taps.encoding`); what no encoding does is stored exactly, with a warning. ``None``: everything exactly.
            compact: store norms and head in float16 and fold batch statistics into weights and biases (rounded to a
                thousandth or so); what a budget asks for.

        Returns:
            The folder.

        Raises:
            UserError: if a value is not finite, or ``max_error`` is out of range.
        """
        self.check_task(task)
        return taskfile.save(self, task, Path(folder), about or {}, max_error, compact)

    def load_task(
        self, folder: str | Path, name: str | None = None, head: nn.Module | None = None, trainable: bool = False
    ) -> str:
        """Add the task stored in ``folder``.

        Args:
            folder: holds ``task.json`` and ``task.safetensors``.
            name: a name for the task in this model; ``None`` keeps the stored one.
            head: receives the stored head; needed only where that is not a linear layer.
            trainable: whether the task may be trained further. By default it is frozen and holds only what it uses.

        Returns:
            The task's name.

        Raises:
            UserError: if a file is missing, damaged, of another format version, or was made for another base, method
                or norm policy. The model is then unchanged.
        """
        task = taskfile.read_description(Path(folder))["task"] if name is None else name
        self._check_free(task)
        return taskfile.load(self, Path(folder), task, head, trainable)

    def load_library(self, *roots: str | Path, keep: int = 16) -> list[str]:
        """Offer every task stored in some folders; each is loaded when it is first used.

        Args:
            roots: folders of tasks, or folders that hold such folders, e.g. ``"results/demo"``.
            keep: at most so many of them are in memory at a time, the most recently used ones; > 0. One call that
                needs more, a mixed batch or :meth:`predictor`, holds those it needs.

        Returns:
            Names of the tasks that are now offered.

        Raises:
            UserError: if a root holds no task, or a name is taken. Damaged tasks, and those made for another base or
                method, are left out with a warning that names them.
        """
        library = Library(roots)
        for name, folder in [*library.folders.items()]:
            try:
                self._check_free(name)
                taskfile.check_fits(self, library.descriptions[name], folder / "task.json")
            except UserError as error:
                library.refused[folder] = str(error)
                del library.folders[name], library.descriptions[name]
        if not library.folders:
            library.check()
        library.warn()
        if self._shelf:
            self._shelf.add(library, keep)
        else:
            self._shelf = Shelf(library, keep, self._load_from_library, self.forget)
        return list(library.folders)

    def _load_from_library(self, folder: Path, task: str) -> None:
        if task not in self.heads:
            with torch.inference_mode(False), torch.no_grad():  # whose tensors could not be used outside of it
                taskfile.load(self, folder, task, None, False)

    def merge(self, task: str) -> nn.Module:
        """An ordinary network, with no class of this library inside, that computes what ``model(x, task)`` computes.

        For a timm backbone with a linear head it is the timm model itself with the head as its classifier, so its
        state dict loads into ``timm.create_model(name, num_classes=…)``. Otherwise it is
        ``nn.Sequential(backbone=…, head=…)``. It is in evaluation mode and can be exported, compiled or trained.
        """
        self.check_task(task)
        memo: dict[int, object] = {}
        for module in inner_first((*self._units, *self._norms)):
            memo[id(module)] = module.merged(task, memo)
        plain = copy.deepcopy(self.backbone, memo)
        return attach_head(plain, copy.deepcopy(self.heads[task])).requires_grad_(True).eval()

    def extra_repr(self) -> str:
        return f"method={self.method!r}, norm={self.norm!r}, units={len(self._units)}, tasks={self.tasks}"


def _decision(entry: float | Sequence[float]) -> Decision:
    """An entry of a policy: (run, specific), or ``run`` alone."""
    values = tuple(entry) if isinstance(entry, Sequence) else (entry,)
    if any(value not in (0, 1) for value in values) or not 1 <= len(values) <= 2:
        raise UserError(f"a policy has the entry {entry!r}; give 1 or 0, or a pair (run, specific) of them")
    return Decision(*map(float, values))


def _mean(value) -> float:
    if isinstance(value, dict):
        return float(torch.cat([tensor.flatten() for tensor in value.values()]).float().mean())
    return float(value.float().mean()) if isinstance(value, Tensor) else float(value)
