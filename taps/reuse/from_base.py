r"""Reuse: a sub-task computes only where it differs from its base task (efficient computation sharing, ICCV 2023, §3).

At the input of every matrix product the task's x is compared with the base's, position by position
(:mod:`taps.reuse.matmul`). All other operations (norms, softmax, activations, the products inside attention) are always
computed, which lets the two paths converge again. The published program thresholds elements of the products' *outputs* after
computing all of them; on ordinary hardware positions can be left out of a product as whole rows, single elements cannot.

The base runs first and its products are recorded. Operations that a sub-task shares with it up to the first difference, norms
and attention included, are not computed again (:mod:`taps.multitask.shared_pass`).

Video uses the same arithmetic with earlier frames instead of the base: :mod:`taps.reuse.video`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from taps.core.execution import Place
from taps.core.gate import Decision
from taps.core.modules import evaluating, first_input
from taps.core.unit import GatedUnit
from taps.errors import UserError
from taps.methods.activation_gap import is_product, sizes
from taps.metrics.cost import seconds
from taps.multitask.macs import macs
from taps.multitask.shared_pass import OneOfSeveral, SharedPass, SharedView, tracked, versions
from taps.multitask.trees import run_head
from taps.reuse.matmul import Product
from taps.task_model import TaskModel


@dataclass
class Counts:
    """Numbers of multiplications in matrix products: those executed and those of the merged network."""

    done: float = 0.0
    dense: float = 0.0


@dataclass
class Setting:
    """The way in which one task runs one product.

    Attributes:
        threshold: θ, relative to the root mean square of ‖x_b‖ over positions.
        dense: whether to run the merged layer because reuse was measured to be slower.
    """

    threshold: float = 0.0
    dense: bool = False


@dataclass
class Recorded:
    """The recorded inputs and outputs of a product, call by call."""

    calls: list[tuple[tuple[Tensor, Tensor], list[int]]] = field(default_factory=list)
    at: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Record a call."""
        self.calls.append(((x, y), versions((x, y))))

    def next(self) -> tuple[Tensor, Tensor] | None:
        """Return the next call; ``None`` after the last, or if the network has changed its tensors in place since."""
        self.at += 1
        if self.at > len(self.calls):
            return None
        call, known = self.calls[self.at - 1]
        return call if versions(call) == known else None


class BesideBase(OneOfSeveral):
    """The execution of one task whose matrix products are computed by ``product`` from the results of other tasks.

    Operations that are the same for the task and for an earlier task of the pass are not run again.
    """

    def __init__(self, task: str, shared: SharedPass, product: Callable, skipped: Callable[[GatedUnit], None]) -> None:
        super().__init__(task, shared)
        self.product, self.skipped = product, skipped

    def run(self, place: Place, args: tuple, kwargs: dict):
        if isinstance(place, GatedUnit) and is_product(place):
            x = first_input(args, kwargs)
            return self.product(place, place.decision_for(self.task, None), x)
        return super().run(place, args, kwargs)

    def reused(self, module: nn.Module) -> None:
        for unit in module.modules():
            if isinstance(unit, GatedUnit) and is_product(unit):
                self.skipped(unit)


class Reuse:
    """A model's tasks on one input: the base task is computed in full, the others from its results.

    Args:
        model: a model whose base is the base task's network; in evaluation mode it equals each task's merged network.
        base_task: a task without deltas.
        tasks: the other tasks; ``None`` for all.

    Raises:
        UserError: if the base task has weights of its own, or a task is unknown.

    Example:
        >>> reuse = Reuse(model, "semseg")                                  # doctest: +SKIP
        >>> reuse.calibrate(images, error=0.05)                             # doctest: +SKIP
        >>> outputs = reuse(x)                                              # doctest: +SKIP
    """

    def __init__(self, model: TaskModel, base_task: str, tasks: Sequence[str] | None = None) -> None:
        names = [tasks] if isinstance(tasks, str) else list(model.tasks if tasks is None else tasks)
        names = [task for task in names if tasks is not None or task != base_task]
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
        #: merged networks of the tasks for which reuse as a whole was measured to be slower
        self.merged: dict[str, nn.Module] = {}
        self._products: dict[tuple[str | None, str], tuple[tuple, Product]] = {}
        self._dense: dict[str, float] = {}
        self._view = SharedView(model.backbone, model.state)

    # -- running -------------------------------------------------------------------------------------------------

    @tracked
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return every task's output on a batch, (B, …); :attr:`counts` then holds each task's multiplications."""
        with evaluating(self.model):
            features = self._features(x, [task for task in self.tasks if task not in self.merged])
            outputs = {task: run_head(self.model.heads[task], own) for task, own in features.items()}
            return {
                task: self.merged[task](x) if task in self.merged else outputs[task]
                for task in (self.base_task, *self.tasks)
            }

    def _features(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return the backbone's features for the base task and the given tasks."""
        names = (self.base_task, *tasks)
        self.counts = {}
        shared = SharedPass(names)
        records: dict[str, Recorded] = defaultdict(Recorded)
        features = {self.base_task: self.run(self.base_task, x, record_into(records), shared)}
        for task in tasks:
            for recorded in records.values():
                recorded.at = 0
            features[task] = self.run(task, x, self._from_base(task, records), shared, records)
        return features

    def beside_base(
        self, task: str, product: Product, unit: GatedUnit, x: Tensor, before: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, float]:
        """Compute a sub-task's product from the base's input and output according to its setting; returns the output and the
        share of multiplications."""
        setting = self.settings[task][unit.name]
        same = x is before[0] and not product.differs
        if before[0].shape != x.shape or (setting.dense and not same):
            return product.full(x), 1.0
        return product.reuse(x, *before, setting.threshold)

    def run(
        self,
        task: str,
        x: Tensor,
        product: Callable,
        shared: SharedPass | None = None,
        records: Mapping[str, Recorded] | None = None,
    ):
        """Return the backbone's features for one task.

        Args:
            task: name of the task.
            x: a batch.
            product: maps a :class:`Product`, its unit and an input to the output and the share of multiplications it took.
            shared: results of earlier tasks in this pass.
            records: records of the base's calls, which advance past modules that are not called.
        """
        counts = self.counts[task] = Counts()

        def call(unit: GatedUnit, decision: Decision, x: Tensor) -> Tensor:
            y, share = product(self.product(task, unit, decision), unit, x)
            y = _after_hooks(unit.base, x, y)
            dense = unit.base.weight.numel() * (y.numel() // _channels(unit, y))
            self._dense[unit.name] = dense
            counts.done += share * dense
            counts.dense += dense
            return y

        def skipped(unit: GatedUnit) -> None:
            counts.dense += self._dense[unit.name]
            if records is not None:
                records[unit.name].next()

        execution = BesideBase(task, SharedPass((task,)) if shared is None else shared, call, skipped)
        return self._view.run(execution, (x,), {})

    def product(self, task: str, unit: GatedUnit, decision: Decision) -> Product:
        """Return a task's product, prepared again if its weights have changed."""
        deltas = unit.deltas[task].parameters() if task in unit.deltas else ()
        specific = decision.specific if isinstance(decision.specific, float) else id(decision.specific)
        version: tuple = (decision.run, specific)
        version += tuple((tensor.data_ptr(), tensor._version) for tensor in (*unit.base.parameters(), *deltas))
        known = self._products.get((task, unit.name))
        if known is None or known[0] != version:
            known = self._products[task, unit.name] = (version, Product(unit, task, decision))
        return known[1]

    def _from_base(self, task: str, records: Mapping[str, Recorded]) -> Callable:
        def compute(product: Product, unit: GatedUnit, x: Tensor) -> tuple[Tensor, float]:
            before = records[unit.name].next()
            return (product.full(x), 1.0) if before is None else self.beside_base(task, product, unit, x, before)

        return compute

    # -- thresholds ----------------------------------------------------------------------------------------------

    @tracked
    def calibrate(
        self, inputs: Tensor | Iterable[Tensor], error: float, rounds: int = 3, by_time: bool = False
    ) -> None:
        """Choose every product's threshold and, with ``by_time``, the products for which the merged layer is faster.

        The threshold is the largest one for which the positions left out change the input by at most ``error``:
        √(Σ ‖x − x_b‖² over those) ≤ error · √(Σ ‖x_b‖²). With ``by_time`` a product is computed in full where that is faster,
        and a task that still takes longer than its merged network is run as that network, :attr:`merged`, a copy of the current
        weights. Times are medians over ``rounds`` on these inputs, so the choice may differ from run to run.

        Args:
            inputs: batches of held-out data, or one batch; at least two images.
            error: ε ≥ 0; 0 leaves out only positions that are exactly equal.
            rounds: measurements per product.
            by_time: whether measured times decide.

        Raises:
            UserError: for fewer than two images, inputs that are not batches of images, or ``error`` or ``rounds`` out of range.
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
        self.merged = {}
        for task in self.tasks:
            seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            calls: dict[str, tuple[Product, tuple[Tensor, Tensor, Tensor]]] = {}

            def look(product: Product, unit: GatedUnit, x: Tensor, kept, seen=seen, calls=calls):
                before = kept[unit.name].next()
                if before is not None and before[0].shape == x.shape:
                    base = sizes(unit, before[0]).cpu().double()
                    rms = base.square().mean().sqrt()
                    seen[unit.name].append(
                        (sizes(unit, x - before[0]).cpu().double().flatten() / rms, (base / rms).flatten())
                    )
                    calls[unit.name] = (product, (x, *before))
                return product.full(x), 1.0

            with evaluating(self.model):
                for x in batches:
                    kept: dict[str, Recorded] = defaultdict(Recorded)
                    self.run(self.base_task, x, record_into(kept))
                    self.run(task, x, lambda product, unit, own, kept=kept: look(product, unit, own, kept))
                for name, pairs in seen.items():
                    distance, base = (torch.cat(column) for column in zip(*pairs, strict=True))
                    setting = self.settings[task][name]
                    setting.threshold = _threshold(distance, base, error)
                    product, inputs_of = calls[name]
                    setting.dense = by_time and _slower(product, inputs_of, setting.threshold, rounds)
        if not by_time:
            return
        slower = [task for task, own in self.beside_dense(batches[0], rounds).items() if own["time"] > 1.0]
        self.merged = {task: self.model.merge(task) for task in slower}

    @tracked
    def beside_dense(self, x: Tensor, rounds: int = 5) -> dict[str, dict[str, float]]:
        """Return the cost that a sub-task adds to its base task, divided by the cost of its merged network.

        Returns:
            By task ``macs``, with the multiplications of attention counted as if it were always computed, and ``time``: that of
            both tasks together minus that of the base's merged network, as medians over ``rounds`` in which all are run in turn
            on ``x``. Both include heads. 1.0 for a task that is run as its merged network.
        """
        found = {}
        with evaluating(self.model):
            alone = self.model.merge(self.base_task)
            for task in self.tasks:
                if task in self.merged:
                    found[task] = {"macs": 1.0, "time": 1.0}
                    continue
                merged = self.model.merge(task)

                def both(task=task) -> None:
                    for name, features in self._features(x, (task,)).items():
                        run_head(self.model.heads[name], features)

                both()  # prepares the products
                count, whole = self.counts[task], macs(merged, x)
                works = (both, partial(alone, x), partial(merged, x))
                times = [[seconds(work, x.device) for work in works] for _ in range(rounds)]
                together, base, dense = (statistics.median(column) for column in zip(*times, strict=True))
                found[task] = {
                    "macs": (whole - (count.dense - count.done)) / whole,
                    "time": max(together - base, 0.0) / dense,
                }
        return found


def record_into(kept: Mapping[str, Recorded]) -> Callable:
    """Return a ``product`` function that computes products in full and records them in ``kept``."""

    def compute(product: Product, unit: GatedUnit, x: Tensor) -> tuple[Tensor, float]:
        y = product.full(x)
        kept[unit.name].add(x, y)
        return y, 1.0

    return compute


def _channels(unit: GatedUnit, y: Tensor) -> int:
    return y.shape[-1] if isinstance(unit.base, nn.Linear) else y.shape[1]


def _threshold(distance: Tensor, base: Tensor, error: float) -> float:
    """Return the largest θ with √(Σ distance² up to θ) ≤ error · √(Σ base²)."""
    order = distance.sort().values
    allowed = (error**2) * base.square().sum()
    count = int((order.square().cumsum(0) <= allowed).sum())
    return float(order[count - 1]) * (1 + 1e-6) if count else 0.0


def _slower(product: Product, inputs: tuple[Tensor, Tensor, Tensor], threshold: float, rounds: int) -> bool:
    """Return whether reuse takes longer than the merged layer, in medians."""
    x = inputs[0]
    whole = statistics.median(seconds(lambda: product.full(x), x.device) for _ in range(rounds))
    reused = statistics.median(seconds(lambda: product.reuse(*inputs, threshold), x.device) for _ in range(rounds))
    return reused > whole


def _after_hooks(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return an output after the module's forward hooks, which a product does not call."""
    for key, hook in module._forward_hooks.items():
        given = (module, (x,), {}, y) if key in module._forward_hooks_with_kwargs else (module, (x,), y)
        found = hook(*given)
        y = y if found is None else found
    return y
