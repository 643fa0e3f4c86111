"""A batch whose samples belong to different tasks, in one forward pass.

One tensor holds the samples of all tasks, task after task. Every unit and norm delegates its call to the execution, a
:class:`MixedBatch`: shared computation runs once on all rows, the rest on the rows of each task. All other modules of the network
run on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter

import torch
from torch import Tensor, nn

from taps.core.checkpointing import without_reentrant_warning
from taps.core.execution import Place, State
from taps.core.gate import Decision
from taps.core.modules import evaluating, first_input, is_square, keeps_state
from taps.core.network import Network
from taps.core.unit import GatedUnit
from taps.errors import Inseparable, UserError
from taps.multitask.closed_gates import closed_gate_gradient, is_closed
from taps.multitask.trees import flatten, map_tensors, run_head, tensors


class MixedBatch:
    """The execution of a batch that holds the samples of several tasks, task after task.

    Args:
        state: state of the model.
        sizes: number of samples of each task, > 0, in batch order.
    """

    def __init__(self, state: State, sizes: dict[str, int]) -> None:
        self.state, self.sizes, self.samples = state, sizes, sum(sizes.values())

    def rows(self, size: int) -> dict[str, slice]:
        """Return each task's rows in a tensor of ``size`` rows, in which every sample has the same number of rows."""
        each, rest = divmod(size, self.samples)
        if rest:
            raise Inseparable(f"a layer's input has {size} rows for {self.samples} samples")
        places, start = {}, 0
        for task, count in self.sizes.items():
            places[task] = slice(start, start + each * count)
            start += each * count
        return places

    def run(self, place: Place, args: tuple, kwargs: dict):
        """Run a unit or norm once on the rows of all tasks that share it, and separately on the rows of each other task."""
        x = first_input(args, kwargs)
        if not isinstance(x, Tensor):
            raise Inseparable("the input of a layer is not a tensor")
        rows = self.rows(len(x))
        base = place.base
        decisions, closed = {}, {}
        ready: dict[str, nn.Module] = {}  # of tasks that are no longer trained
        groups: dict[Hashable, list[str]] = {}
        for task, where in rows.items():
            module = place.ready_for(task)
            if module is not None:
                ready[task] = module
                groups.setdefault("base" if module is base else (task,), []).append(task)
                continue
            decisions[task] = place.decision_for(task, x[where])
            if isinstance(place, GatedUnit) and is_closed(place, decisions[task]):
                closed[task], decisions[task] = decisions[task], Decision()
            key = None if place.uses_batch_statistics(decisions[task]) else place.sharing_key(decisions[task])
            groups.setdefault(key or (task,), []).append(task)
        pieces: dict[str, object] = {}
        parts: dict[str, tuple] = {}
        for tasks in groups.values():
            first, everyone = tasks[0], len(tasks) == len(rows)
            group = self if everyone else MixedBatch(self.state, {task: self.sizes[task] for task in tasks})
            if everyone:
                inputs = args, kwargs
            else:
                parts = parts or dict(zip(rows, split((args, kwargs), self._lengths(rows), True), strict=True))
                inputs = _concatenated([parts[task] for task in tasks])
            with self.state.running(first if len(tasks) == 1 else group):
                y = (
                    ready[first](*inputs[0], **inputs[1])
                    if first in ready
                    else place.compute(first, decisions[first], *inputs)
                )
            learning = {task: closed[task] for task in tasks if task in closed} if closed else {}
            if learning and isinstance(place, GatedUnit):
                seen = first_input(*inputs)
                y = closed_gate_gradient(place, y, seen, group.rows(len(seen)), learning)
            if everyone:
                return y
            if len(tasks) == 1:
                pieces[first] = y
            else:
                places = group.rows(len(first_input(*inputs)))
                pieces.update(zip(tasks, split(y, self._lengths(places)), strict=True))
        return _concatenated([pieces[task] for task in rows])

    @staticmethod
    def _lengths(places: dict[str, slice]) -> list[int]:
        return [place.stop - place.start for place in places.values()]

    def read(self, value: Callable[[str | None], object]):
        raise Inseparable("the network reads a layer's weights instead of calling it")


def split(tree, sizes: list[int], are_inputs: bool = False) -> list:
    """Split a tree of tensors along the rows, of which a sample may have several, into one tree per task; ``are_inputs``: of a
    call, whose first one has the samples."""
    if len(sizes) == 1:
        return [tree]
    if are_inputs and not tree[1] and len(tree[0]) == 1 and _rows_per_sample(tree[0][0], sum(sizes), False) == 1:
        return [((part,), {}) for part in tree[0][0].split(sizes)]  # as below, in a fraction of the time
    leaves, build = flatten(tree)
    cut = []
    for index, leaf in enumerate(leaves):
        each = _rows_per_sample(leaf, sum(sizes), are_inputs and index > 0)
        cut.append(leaf.split([each * size for size in sizes]) if each else None)
    return [
        build([leaf if part is None else part[index] for leaf, part in zip(leaves, cut, strict=True)])
        for index in range(len(sizes))
    ]


def _rows_per_sample(leaf: object, count: int, may_be_mask: bool) -> int:
    """Return how many rows of a tensor belong to each of ``count`` samples; 0 for what belongs to all of them, such as a mask of
    positions."""
    if not isinstance(leaf, Tensor) or not leaf.dim() or (may_be_mask and is_square(leaf)):
        return 0
    each, rest = divmod(len(leaf), count)
    return 0 if rest else each


def _concatenated(trees: list):
    if len(trees) == 1:
        return trees[0]
    flat = [flatten(tree) for tree in trees]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    # What belongs to all samples was not cut, and is the same tensor in every tree.
    return flat[0][1]([torch.cat(c) if isinstance(c[0], Tensor) and c[0] is not c[1] else c[0] for c in columns])


class Mixable:
    """A test, made once per sample shape, of whether a network keeps the samples of a batch in separate rows."""

    def __init__(self) -> None:
        self.reasons: dict[tuple, str | None] = {}

    def why_not(self, model: Network, args: tuple, kwargs: dict) -> str | None:
        """Return why a network does not keep samples in separate rows, or ``None`` if it does.

        The base network runs twice on two samples, and only the second sample differs between the runs. In the input of every
        unit and norm, and in the output, the first half of the rows must stay the same and the second half must change: then
        every row belongs to one sample, and samples are in order. Sequence-first transformers, for example, fail this test.
        """
        leaves, _ = flatten((args, kwargs))
        key = (len(args), *kwargs, *map(_kind, leaves))
        if key not in self.reasons:
            if len(self.reasons) >= 256:  # an argument that differs from call to call
                self.reasons.clear()
            self.reasons[key] = self._find_out(model, args, kwargs)
        return self.reasons[key]

    @torch.no_grad()
    def _find_out(self, model: Network, args: tuple, kwargs: dict) -> str | None:
        x = next(iter(tensors((args, kwargs))))
        noise = torch.randn(
            x[:1].shape, generator=torch.Generator().manual_seed(0)
        )  # leaves the run's own random state unchanged
        other = noise.to(x) if x.is_floating_point() else x[1:2].flip(-1)
        count, seen = len(x), []

        def two(changed: Tensor) -> tuple[tuple, dict]:
            def rows(tensor: Tensor) -> Tensor:
                if tensor is x:
                    return torch.cat([x[:1], changed])
                return tensor[:2] if tensor.dim() and len(tensor) == count else tensor

            return map_tensors(rows, (args, kwargs))  # type: ignore[return-value]

        places = (*model.units, *model.task_norms)
        held = [(place.base, dict(vars(place.base))) for place in places if keeps_state(place.base)]
        try:
            with evaluating(model.backbone), without_reentrant_warning():
                for changed in (x[1:2], other):
                    reading = _Reading()
                    outputs = model.run(reading, *two(changed))
                    seen.append([*reading.inputs, *tensors(outputs)])
                    if any(_is_opaque(leaf) for leaf in flatten(outputs)[0]):
                        return "the network returns objects that cannot be cut into rows"
        except Inseparable as reason:
            return str(reason)
        if any(before.get(name, before) is not value for base, before in held for name, value in vars(base).items()):
            return "a layer keeps something from its calls"
        for before, after in zip(*seen, strict=True):
            half = len(before) // 2 if before.dim() else 0
            kept = half and len(before) % 2 == 0 and torch.equal(before[:half], after[:half])
            if not kept or torch.equal(before[half:], after[half:]):
                return "the rows of some layer's input are not the samples, one after another"
        return None


def _kind(leaf: object) -> object:
    """Return what a network may depend on besides the values of a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape[1:], leaf.dtype
    return leaf if isinstance(leaf, Hashable) else type(leaf)


def _is_opaque(leaf: object) -> bool:
    return not isinstance(leaf, (Tensor, int, float, complex, str, bytes, type(None)))


class _Reading:
    """The execution that runs the base alone, records the inputs of places, and rejects networks that read weights."""

    tasks = (None,)

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def run(self, place: Place, args: tuple, kwargs: dict):
        self.inputs.extend(tensor.clone() for tensor in tensors((args, kwargs)))
        return place.base(*args, **kwargs)

    read = MixedBatch.read


def run_mixed(model: Network, mixable: Mixable, args: tuple, kwargs: dict, names: Sequence[str]):
    """Return the outputs of a batch with one task name per sample; see :meth:`taps.task_model.TaskModel.forward`."""
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name, []).append(index)
    order = [index for indices in rows.values() for index in indices]
    in_order = order == sorted(order)
    if not in_order:
        args, kwargs = map_tensors(  # type: ignore[assignment]
            lambda tensor: tensor[order] if tensor.dim() and len(tensor) == len(names) else tensor, (args, kwargs)
        )
    sizes = {name: len(indices) for name, indices in rows.items()}
    if mixable.why_not(model, args, kwargs) is None:
        features = split(model.run(MixedBatch(model.state, sizes), args, kwargs), list(sizes.values()))
        outputs = [run_head(model.heads[name], part) for name, part in zip(sizes, features, strict=True)]
    else:
        parts = split((args, kwargs), list(sizes.values()), True)
        outputs = [model.heads[name](model.run(name, *part)) for name, part in zip(sizes, parts, strict=True)]
    for output, size in zip(outputs, sizes.values(), strict=True):
        if any(leaf.shape[:1] != (size,) for leaf in tensors(output)):
            raise UserError("a batch of several tasks needs heads with one output per sample; run the tasks one by one")
    if all(isinstance(output, Tensor) for output in outputs) and len({output.shape[1:] for output in outputs}) == 1:
        y = torch.cat(outputs)
        return y if in_order else y[torch.tensor(order, device=y.device).argsort()]
    each = [
        map_tensors(itemgetter(row), output)
        for output, size in zip(outputs, sizes.values(), strict=True)
        for row in range(size)
    ]
    return [row for _, row in sorted(zip(order, each, strict=True), key=lambda pair: pair[0])]
