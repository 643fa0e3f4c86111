"""Video: frames in order, computed only where they differ from earlier frames (efficient computation sharing, §3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import Tensor

from taps.core.modules import evaluating
from taps.core.unit import GatedUnit
from taps.errors import UserError
from taps.methods.activation_gap import is_product
from taps.multitask.shared_pass import tracked
from taps.multitask.trees import run_head
from taps.reuse.from_base import Recorded, Reuse
from taps.reuse.matmul import Product


class VideoReuse:
    """Reuse between the frames of a video: key frames are computed in full, other frames from the results of earlier ones.

    In other frames the base task is compared with its own last frame. A sub-task is compared with the base, in the same frame,
    for the first ``split`` products, and with its own last frame for the rest.

    Args:
        reuse: the tasks, with thresholds for comparisons with the base.
        threshold: θ of comparisons with the last frame, ≥ 0.
        key_every: number of frames from one key frame to the next, > 0.
        split: number of products, in network order, in which sub-tasks are compared with the base; ``None`` for all.

    Raises:
        UserError: for a value out of range.
    """

    def __init__(self, reuse: Reuse, threshold: float = 0.0, key_every: int = 8, split: int | None = None) -> None:
        names = [unit.name for unit in reuse.model.units if is_product(unit)]
        wrong = not (isinstance(threshold, (int, float)) and threshold >= 0) or key_every != int(key_every)
        if wrong or key_every < 1 or not 0 <= (len(names) if split is None else split) <= len(names):
            raise UserError(
                f"video reuse needs a threshold of at least 0, key frames every 1 or more, and a split in 0..{len(names)}, "
                f"not {threshold!r}, {key_every!r}, {split!r}"
            )
        self.reuse, self.threshold, self.key_every = reuse, threshold, key_every
        self.before = set(names if split is None else names[:split])
        self.reset()

    def reset(self) -> None:
        """Forget all frames; the next one is a key frame."""
        self.frame: int | None = None
        self._since_key = 0
        self._past: dict[str, dict[str, Recorded]] = {}

    @tracked
    def __call__(self, x: Tensor, frame: int | None = None) -> dict[str, Tensor]:
        """Return every task's output on the next frame, (1, …), or on the next frames of several videos, (B, …).

        Args:
            x: the frame.
            frame: number of the frame, which must follow the last one's; ``None``: assume that it does.

        Raises:
            UserError: for a frame out of order, or of another shape.
        """
        if frame is not None and self.frame is not None and frame != self.frame + 1:
            raise UserError(
                f"frame {frame} came after frame {self.frame}: give frames in order, or call reset() where a video begins"
            )
        if self.frame is not None and x.shape != self._shape:
            raise UserError(
                f"a frame of shape {tuple(x.shape)} came after those of {tuple(self._shape)}: call reset() where a video begins"
            )
        self._shape = x.shape
        x = x.clone()  # the caller may write the next frame into the same memory
        number = frame if frame is not None else (0 if self.frame is None else self.frame + 1)
        key = self.frame is None or self._since_key + 1 >= self.key_every
        reuse, model = self.reuse, self.reuse.model
        past = {} if key else self._past
        now: dict[str, dict[str, Recorded]] = {}
        outputs = {}
        with evaluating(model):
            for task in (reuse.base_task, *reuse.tasks):
                now[task] = defaultdict(Recorded)
                features = reuse.run(task, x, self._step(task, past.get(task), now))
                outputs[task] = run_head(model.heads[task], features)
        self._past, self.frame, self._since_key = now, number, 0 if key else self._since_key + 1
        return outputs

    def _step(self, task: str, past: Mapping[str, Recorded] | None, now: dict[str, dict[str, Recorded]]) -> Callable:
        reuse = self.reuse
        base = now[reuse.base_task] if task != reuse.base_task else None
        for kept in [*(past or {}).values(), *(base or {}).values()]:
            kept.at = 0

        def compute(product: Product, unit: GatedUnit, x: Tensor) -> tuple[Tensor, float]:
            beside = base[unit.name].next() if base is not None else None
            own = past[unit.name].next() if past is not None and unit.name in past else None
            if beside is not None and (unit.name in self.before or own is None):
                y, share = reuse.beside_base(task, product, unit, x, beside)
                x_kept = x
            elif own is not None and own[0].shape == x.shape:
                y, share, x_kept = product.since(x, *own, self.threshold)
            else:
                y, share, x_kept = product.full(x), 1.0, x
            now[task][unit.name].add(x_kept, y)
            return y, share

        return compute
