"""A batch whose samples belong to different tasks, in one forward pass.

One tensor holds the samples of all tasks, task after task. While it is run, :attr:`taps.gates.State.task` is a
:class:`Mixed`, and every unit and norm hands its call to it: what tasks share runs once on all rows, the rest on the
rows of each task. Everything else in the network runs on the whole batch as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from taps.errors import Inseparable, UserError
from taps.gates import Decision, State, first_input
from taps.layer import evaluating, run_head

if TYPE_CHECKING:
    from taps.model import TaskModel


class Mixed:
    """A batch that holds the samples of several tasks, task after task.

    Args:
        state: of the model.
        sizes: number of samples of each task, > 0, in the order they lie in the batch.
    """

    def __init__(self, state: State, sizes: dict[str, int]) -> None:
        self.state = state
        self.sizes = sizes
        self.samples = sum(sizes.values())

    def rows(self, size: int) -> dict[str, slice]:
        """Where each task's rows lie in a tensor of ``size`` rows: a sample has one row or as many as every other."""
        each, rest = divmod(size, self.samples)
        if rest:
            raise Inseparable(f"a layer's input has {size} rows for {self.samples} samples")
        places, start = {}, 0
        for task, count in self.sizes.items():
            places[task] = slice(start, start + each * count)
            start += each * count
        return places

    def run(self, module, args: tuple, kwargs: dict):
        """Run a unit or norm: once on the rows of all tasks that share it, and for each other task on its own rows."""
        x = first_input(args, kwargs)
        places = self.rows(len(x))
        answers, groups, closed = {}, {}, {}
        for task, place in places.items():
            with self.state.running(task):
                answers[task] = module.ask(task, x[place])
            if module.is_closed(answers[task]):
                closed[task], answers[task] = answers[task], Decision()
            shared = None if module.looks_at_batch() else module.shared(answers[task])
            groups.setdefault(shared or (task,), []).append(task)
        pieces: dict[str, object] = {}
        own: dict[str, tuple] = {}
        for tasks in groups.values():
            everyone = len(tasks) == len(places)
            group = self if everyone else Mixed(self.state, {task: self.sizes[task] for task in tasks})
            if everyone:
                inputs = args, kwargs
            else:
                own = own or dict(zip(places, split((args, kwargs), self._lengths(places)), strict=True))
                inputs = _cat([own[task] for task in tasks])
            with self.state.running(tasks[0] if len(tasks) == 1 else group):
                y = module.carry_out(tasks[0], answers[tasks[0]], *inputs)
            its = group.rows(len(first_input(*inputs)))
            learning = {task: closed[task] for task in tasks if task in closed}
            if learning:
                y = module.teach_gates(y, first_input(*inputs), its, learning)
            if everyone:
                return y
            pieces.update(zip(tasks, split(y, self._lengths(its)), strict=True))
        return _cat([pieces[task] for task in places])

    @staticmethod
    def _lengths(places: dict[str, slice]) -> list[int]:
        return [place.stop - place.start for place in places.values()]

    def read(self, value: Callable[[str], object]):
        raise Inseparable("the network reads a layer's weights instead of calling it")


def split(tree, sizes: list[int]) -> list:
    """A tree of tensors as one tree a task, cut along the rows, of which a sample may have several."""
    if len(sizes) == 1:
        return [tree]
    leaves, spec = tree_flatten(tree)
    cut = []
    for leaf in leaves:
        each = len(leaf) // sum(sizes) if isinstance(leaf, Tensor) and leaf.dim() else 0
        cut.append(leaf.split([each * size for size in sizes]) if each else None)
    return [
        tree_unflatten([leaf if part is None else part[index] for leaf, part in zip(leaves, cut, strict=True)], spec)
        for index in range(len(sizes))
    ]


def _cat(trees: list):
    if len(trees) == 1:
        return trees[0]
    flat = [tree_flatten(tree) for tree in trees]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns], flat[0][1])


@torch.no_grad()
def why_not_mixed(backbone: nn.Module, modules: Sequence[nn.Module], state: State, x: Tensor) -> str | None:
    """Why the samples of a batch cannot be told apart by rows in this network; ``None`` if they can.

    The base network runs twice on two samples of which only the second one is changed. In the input of every unit and
    norm, and in the output, the first half of the rows has to stay as it was, and the second half has to change: then a
    row belongs to one sample, and samples lie one after another. Sequence-first transformers, for example, fail this.
    """
    noise = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0))  # the run's own draws stay as they are
    other = noise.to(x) if x.is_floating_point() else x[1:2].flip(-1)
    pairs = (torch.cat([x[:1], x[1:2]]), torch.cat([x[:1], other]))
    runs: list[list[Tensor]] = [[], []]
    hooks = []
    try:
        for seen, pair in zip(runs, pairs, strict=True):
            hooks = [
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, seen=seen: seen.extend(
                        leaf.clone() for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)
                    ),
                    with_kwargs=True,
                )
                for module in modules
            ]
            with evaluating(backbone), state.running(_Reading()):
                seen.extend(leaf for leaf in tree_flatten(backbone(pair))[0] if isinstance(leaf, Tensor))
            for hook in hooks:
                hook.remove()
    except Inseparable as reason:
        return str(reason)
    finally:
        for hook in hooks:
            hook.remove()
    for before, after in zip(*runs, strict=True):
        half = len(before) // 2 if before.dim() else 0
        kept = half and len(before) % 2 == 0 and torch.equal(before[:half], after[:half])
        if not kept or torch.equal(before[half:], after[half:]):
            return "the rows of some layer's input are not the samples, one after another"
    return None


class _Reading:
    """Runs the base alone and refuses networks that read weights."""

    def run(self, module, args: tuple, kwargs: dict):
        return module.base(*args, **kwargs)

    read = Mixed.read


def run_mixed(model: TaskModel, x: Tensor, names: list[str]):
    """The outputs of a batch with a task's name for each sample; see :meth:`taps.model.TaskModel.forward`."""
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        rows.setdefault(name, []).append(index)
    order = [index for indices in rows.values() for index in indices]
    in_order = order == sorted(order)
    if not in_order:
        x = x[order]
    sizes = {name: len(indices) for name, indices in rows.items()}
    if x.shape[1:] not in model.mixable:
        modules = (*model.units, *model.task_norms)
        model.mixable[x.shape[1:]] = why_not_mixed(model.backbone, modules, model.state, x)
    if model.mixable[x.shape[1:]] is None:
        with model.state.running(Mixed(model.state, sizes)):
            features = split(model.backbone(x), list(sizes.values()))
        outputs = [run_head(model.heads[name], part) for name, part in zip(sizes, features, strict=True)]
    else:
        outputs = []
        for name, part in zip(sizes, x.split(list(sizes.values())), strict=True):
            with model.state.running(name):
                outputs.append(model.heads[name](model.backbone(part)))
    for output, size in zip(outputs, sizes.values(), strict=True):
        if any(isinstance(leaf, Tensor) and leaf.shape[:1] != (size,) for leaf in tree_flatten(output)[0]):
            raise UserError("a batch of several tasks needs heads with one output a sample; run the tasks one by one")
    if all(isinstance(output, Tensor) for output in outputs) and len({output.shape[1:] for output in outputs}) == 1:
        y = torch.cat(outputs)
        return y if in_order else y[torch.tensor(order, device=y.device).argsort()]
    each = [
        tree_map(lambda leaf, row=row: leaf[row], output)
        for output, size in zip(outputs, sizes.values(), strict=True)
        for row in range(size)
    ]
    return [row for _, row in sorted(zip(order, each, strict=True), key=lambda pair: pair[0])]
