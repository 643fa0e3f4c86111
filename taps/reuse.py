r"""Reuse: a sub-task computes only where it differs from its base task (efficient computation sharing, ICCV 2023, §3).

At the input of every matrix product the task's x is compared with the base's, position by position (:mod:`taps.products`). What is
not a matrix product (norms, softmax, activations, attention's own products) is always computed, which brings both paths together
again. The published program thresholds elements of the products' *outputs* after computing all of them. Positions can be left out
of a product as whole rows, single elements cannot on ordinary hardware.

The base and its sub-tasks go through the network side by side, so that what is still the same for all is computed once, norms
and attention included, and no activation is kept. Where a task changes more than products (a position embedding), or the network's
code cannot be followed (:mod:`taps.together`), the base goes first and its products are remembered.

Video uses the same arithmetic with a frame's own past in the place of the base: :mod:`taps.video`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from taps import cost
from taps.activations import is_product, sizes
from taps.branches import Changes, join, select
from taps.errors import Inseparable, UserError
from taps.gates import Decision, State, first_input
from taps.layer import GatedUnit, TaskModule, evaluating, run_head
from taps.model import TaskModel
from taps.products import Product
from taps.together import Together


@dataclass
class Counts:
    """Multiplications of matrix products, those done and those of the merged network."""

    done: float = 0.0
    dense: float = 0.0


@dataclass
class Setting:
    """How one task runs one product.

    Attributes:
        threshold: θ, relative to the root mean square of ‖x_b‖ over positions.
        dense: run the merged layer, since reuse was measured to be slower.
    """

    threshold: float = 0.0
    dense: bool = False


@dataclass
class Kept:
    """What a product was given and what it answered, call by call."""

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    at: int = 0

    def next(self) -> tuple[Tensor, Tensor] | None:
        self.at += 1
        return self.calls[self.at - 1] if self.at <= len(self.calls) else None


class _Pass:
    """One task's pass through the network, in the place of its name in :attr:`taps.gates.State.task`."""

    def __init__(self, state: State, task: str | None, product: Callable) -> None:
        self.state, self.task, self.product = state, task, product

    def run(self, module: TaskModule, args: tuple, kwargs: dict):
        if isinstance(module, GatedUnit) and is_product(module):
            with self.state.running(self.task):
                return self.product(module, module.ask(self.task, None), first_input(args, kwargs))
        with self.state.running(self.task):
            answer = module.ask(self.task, first_input(args, kwargs))
        return module.carry_out(self.task, answer, args, kwargs)

    def read(self, value: Callable[[str | None], object]):
        with self.state.running(self.task):
            return value(self.task)


class _Beside(Together):
    """The base task and sub-tasks on the same samples, whose matrix products are done from the base's."""

    def __init__(self, reuse: Reuse, tasks: Sequence[str]) -> None:
        super().__init__(reuse.model.state, tasks)
        self.reuse = reuse

    def among(self, tasks: Sequence[str]) -> Together:
        return _Beside(self.reuse, tasks)

    def run(self, module: TaskModule, args: tuple, kwargs: dict):
        base = self.reuse.base_task
        if not isinstance(module, GatedUnit) or not is_product(module) or base not in self.tasks:
            return super().run(module, args, kwargs)
        Changes.check((args, kwargs), self.tasks)
        x = first_input(args, kwargs)
        x_base = select(x, (base,))
        y_base = self.reuse.done(base, module, x_base, None)
        same, results = [base], []
        for task in self.tasks:
            own = select(x, (task,))
            if task != base:
                y = self.reuse.done(task, module, own, (x_base, y_base))
                if y is y_base:
                    same.append(task)
                else:
                    results.append(((task,), y))
        return join([(tuple(same), y_base), *results])


class Reuse:
    """A model's tasks on one input: the base task is computed, the others from what it computed.

    Args:
        model: its base is the base task's network; in evaluation mode it computes what each task's merged network does.
        base_task: a task without deltas.
        tasks: the others; ``None`` for all.

    Raises:
        UserError: if the base task has weights of its own, or a task is unknown.

    Example:
        >>> reuse = Reuse(model, "semseg")                                  # doctest: +SKIP
        >>> reuse.calibrate(images, error=0.05)                             # doctest: +SKIP
        >>> outputs = reuse(x)                                              # doctest: +SKIP
    """

    def __init__(self, model: TaskModel, base_task: str, tasks: Sequence[str] | None = None) -> None:
        names = [task for task in model.tasks if task != base_task] if tasks is None else list(tasks)
        for task in (base_task, *names):
            model.check_task(task)
        if any(row["specific"] for row in model.report(base_task)):
            raise UserError(f"task {base_task!r} has weights of its own; the base of reuse is a task that has none")
        skipped = [
            (task, row["name"]) for task in (base_task, *names) for row in model.report(task) if row["run"] != 1.0
        ]
        if skipped:
            raise UserError(f"task {skipped[0][0]!r} skips {skipped[0][1]!r}; tasks of reuse run every layer")
        self.model, self.base_task, self.tasks = model, base_task, names
        self.settings: dict[str, dict[str, Setting]] = {task: defaultdict(Setting) for task in names}
        self.counts: dict[str, Counts] = {}
        #: merged networks of the tasks of which reuse as a whole was measured to be slower
        self.whole: dict[str, nn.Module] = {}
        self._products: dict[tuple[str | None, str], tuple[tuple, Product]] = {}
        own = [unit for unit in model.units for task in names if unit.gates[task].decide().uses_delta]
        self.side_by_side = all(is_product(unit) for unit in own)

    # -- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Every task's output on a batch, (B, …). :attr:`counts` then holds what each task took."""
        with evaluating(self.model):
            features = self._features(x, [task for task in self.tasks if task not in self.whole])
            outputs = {task: run_head(self.model.heads[task], own) for task, own in features.items()}
            return {
                task: self.whole[task](x) if task in self.whole else outputs[task]
                for task in (self.base_task, *self.tasks)
            }

    def _features(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The backbone's features of the base task and of some others."""
        names = (self.base_task, *tasks)
        self.counts = {task: Counts() for task in names}
        if self.side_by_side:
            try:
                with Changes(self.model.state), self.model.state.running(_Beside(self, names)):
                    features = self.model.backbone(x)
                    Changes.check(features, names)
                return {task: select(features, (task,)) for task in names}
            except Inseparable:
                self.side_by_side = False
        kept: dict[str, Kept] = defaultdict(Kept)
        features = {self.base_task: self.run(self.base_task, x, record_into(kept))}
        for task in tasks:
            for one in kept.values():
                one.at = 0
            features[task] = self.run(task, x, self._from_base(task, kept))
        return features

    def done(self, task: str, unit: GatedUnit, x: Tensor, beside: tuple[Tensor, Tensor] | None) -> Tensor:
        """A task's output of a product, from the base's input and output if given; counted."""
        with self.model.state.running(task):
            product = self.product(task, unit, unit.ask(task, None))
            y, share = (product.full(x), 1.0) if beside is None else self.beside_base(task, product, unit, x, beside)
        self._count(task, unit, y, share)
        return y

    def beside_base(
        self, task: str, product: Product, unit: GatedUnit, x: Tensor, before: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, float]:
        """A sub-task's output of a product from the base's input and output, as its setting says, and the share of
        multiplications."""
        setting = self.settings[task][unit.name]
        same = x is before[0] and not product.differs
        if before[0].shape != x.shape or (setting.dense and not same):
            return product.full(x), 1.0
        return product.reuse(x, *before, setting.threshold)

    def _count(self, task: str, unit: GatedUnit, y: Tensor, share: float) -> None:
        dense = unit.base.weight.numel() * (y.numel() // _channels(unit, y))
        self.counts[task].done += share * dense
        self.counts[task].dense += dense

    def run(self, task: str, x: Tensor, product: Callable):
        """The backbone's features of one task alone. ``product`` maps a :class:`Product`, its unit and an input to the output
        and the share of multiplications that it took."""
        self.counts[task] = Counts()

        def call(unit: GatedUnit, decision: Decision, own: Tensor) -> Tensor:
            y, share = product(self.product(task, unit, decision), unit, own)
            self._count(task, unit, y, share)
            return y

        with self.model.state.running(_Pass(self.model.state, task, call)):
            return self.model.backbone(x)

    def product(self, task: str, unit: GatedUnit, decision: Decision) -> Product:
        """A task's product, prepared again where its weights have changed."""
        deltas = unit.deltas[task].parameters() if task in unit.deltas else ()
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in (*unit.base.parameters(), *deltas))
        known = self._products.get((task, unit.name))
        if known is None or known[0] != version:
            known = self._products[task, unit.name] = (version, Product(unit, task, decision))
        return known[1]

    def _from_base(self, task: str, kept: Mapping[str, Kept]) -> Callable:
        def compute(product: Product, unit: GatedUnit, x: Tensor) -> tuple[Tensor, float]:
            before = kept[unit.name].next()
            return (product.full(x), 1.0) if before is None else self.beside_base(task, product, unit, x, before)

        return compute

    # -- thresholds ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, inputs: Tensor | Iterable[Tensor], error: float, rounds: int = 3) -> None:
        """Choose every product's threshold, and where reuse is slower than the merged layer.

        The threshold is the largest with which positions that are left out change the input by no more than ``error``:
        √(Σ ‖x − x_b‖² over those) ≤ error · √(Σ ‖x_b‖²). Times are medians over ``rounds`` on these inputs. A task that takes
        longer than its merged network all the same is run as that one, :attr:`whole`, a copy of the weights as they are now.

        Args:
            inputs: batches of held-out data, or one batch; two images at least.
            error: ε ≥ 0; 0 leaves out what is exactly equal.
            rounds: measurements of each product.

        Raises:
            UserError: for fewer than two images, what is no batch of images, or an error or number of rounds out of range.
        """
        batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        for batch in batches:
            if not isinstance(batch, Tensor) or not batch.isfinite().all():
                raise UserError(
                    f"thresholds are calibrated on batches of finite images, not on a {type(batch).__name__}"
                )
        batches = [batch for batch in batches if len(batch)]
        images = sum(map(len, batches))
        if images < 2:
            raise UserError(f"thresholds cannot be calibrated on {images} images: give two or more held-out ones")
        if not (isinstance(error, (int, float)) and 0 <= error < math.inf):
            raise UserError(f"the error that thresholds may cause has to be at least 0, not {error!r}")
        if rounds < 1:
            raise UserError(f"products have to be measured in 1 round or more, not {rounds!r}")
        self.whole = {}
        for task in self.tasks:
            seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            calls: dict[str, tuple[Product, tuple[Tensor, Tensor, Tensor]]] = {}

            def look(product: Product, unit: GatedUnit, x: Tensor, kept, seen=seen, calls=calls):
                before = kept[unit.name].next()
                if before is not None and before[0].shape == x.shape:
                    base = sizes(unit, before[0]).double()
                    rms = base.square().mean().sqrt()
                    seen[unit.name].append(
                        (sizes(unit, x - before[0]).double().flatten() / rms, (base / rms).flatten())
                    )
                    calls[unit.name] = (product, (x, *before))
                return product.full(x), 1.0

            with evaluating(self.model):
                for x in batches:
                    kept: dict[str, Kept] = defaultdict(Kept)
                    self.run(self.base_task, x, record_into(kept))
                    self.run(task, x, lambda product, unit, own, kept=kept: look(product, unit, own, kept))
                for name, pairs in seen.items():
                    distance, base = (torch.cat(column) for column in zip(*pairs, strict=True))
                    setting = self.settings[task][name]
                    setting.threshold = _threshold(distance, base, error)
                    product, inputs_of = calls[name]
                    setting.dense = _slower(product, inputs_of, setting.threshold, rounds)
        slower = [task for task, own in self.beside_dense(batches[0], rounds).items() if own["time"] > 1.0]
        self.whole = {task: self.model.merge(task) for task in slower}

    @torch.no_grad()
    def beside_dense(self, x: Tensor, rounds: int = 5) -> dict[str, dict[str, float]]:
        """What a sub-task adds to its base task, divided by what its merged network takes.

        Returns:
            By task ``macs``, with the multiplications of attention counted as if it was always computed, and ``time``: of both
            tasks together less that of the base's merged network, medians over ``rounds`` in which all are run in turn on
            ``x``; heads are part of either. 1.0 for a task that is run as its merged network.
        """
        found = {}
        with evaluating(self.model):
            alone = self.model.merge(self.base_task)
            for task in self.tasks:
                if task in self.whole:
                    found[task] = {"macs": 1.0, "time": 1.0}
                    continue
                merged = self.model.merge(task)

                def both(task=task) -> None:
                    for name, features in self._features(x, (task,)).items():
                        run_head(self.model.heads[name], features)

                both()  # which prepares the products
                count, whole = self.counts[task], cost.macs(merged, x)
                works = (both, partial(alone, x), partial(merged, x))
                times = [[_seconds(work, x) for work in works] for _ in range(rounds)]
                together, base, dense = (statistics.median(column) for column in zip(*times, strict=True))
                found[task] = {
                    "macs": (whole - (count.dense - count.done)) / whole,
                    "time": max(together - base, 0.0) / dense,
                }
        return found


def record_into(kept: Mapping[str, Kept]) -> Callable:
    """Products that are computed whole and remembered."""

    def compute(product: Product, unit: GatedUnit, x: Tensor) -> tuple[Tensor, float]:
        y = product.full(x)
        kept[unit.name].calls.append((x, y))
        return y, 1.0

    return compute


def _channels(unit: GatedUnit, y: Tensor) -> int:
    return y.shape[-1] if isinstance(unit.base, nn.Linear) else y.shape[1]


def _threshold(distance: Tensor, base: Tensor, error: float) -> float:
    """The largest θ with √(Σ distance² up to θ) ≤ error · √(Σ base²)."""
    order = distance.sort().values
    allowed = (error**2) * base.square().sum()
    count = int((order.square().cumsum(0) <= allowed).sum())
    return float(order[count - 1]) * (1 + 1e-6) if count else 0.0


def _slower(product: Product, inputs: tuple[Tensor, Tensor, Tensor], threshold: float, rounds: int) -> bool:
    """Whether reuse takes longer than the merged layer, in medians."""
    whole = statistics.median(_seconds(lambda: product.full(inputs[0]), inputs[0]) for _ in range(rounds))
    return (
        statistics.median(_seconds(lambda: product.reuse(*inputs, threshold), inputs[0]) for _ in range(rounds)) > whole
    )


def _seconds(function: Callable, x: Tensor) -> float:
    started = time.perf_counter()
    function()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
