"""How far a task's activations are from the base's, at the inputs of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taps.gates import first_input
from taps.layer import GatedUnit, evaluating
from taps.model import TaskModel


def is_product(unit: GatedUnit) -> bool:
    """Whether the unit multiplies its input with a matrix that has a row for each output: a linear layer or a convolution."""
    transposed = isinstance(unit.base, nn.modules.conv._ConvTransposeNd)
    return isinstance(unit.base, (nn.Linear, nn.modules.conv._ConvNd)) and not transposed


def sizes(unit: GatedUnit, x: Tensor) -> Tensor:
    """Euclidean norm of the input of a matrix product at every position: (B, …), without its channels."""
    return x.norm(dim=-1 if isinstance(unit.base, nn.Linear) else 1)


class Gap:
    """The distance of what has run since :func:`beside_base` was entered: see :meth:`value`."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def value(self) -> Tensor:
        """Mean over matrix products of Σ ‖x_task − x_base‖ / Σ ‖x_base‖ over the positions of their inputs.

        The norm over channels, not squared, lets single positions become equal: those are not computed again
        (:mod:`taps.reuse`). Published (§3): the sum of absolute differences of the products' outputs, whose weight
        depends on batch, resolution and width.
        """
        return torch.stack(self.parts).mean() if self.parts else torch.zeros(())


@contextmanager
def beside_base(model: TaskModel, x: Tensor) -> Iterator[Gap]:
    """Compare what runs in the ``with`` block, on the same ``x``, with the base."""
    units = [unit for unit in model.units if is_product(unit)]
    seen: dict[str, list[Tensor]] = {unit.name: [] for unit in units}
    gap, recording = Gap(), True

    def look(unit: GatedUnit, args: tuple, kwargs: dict) -> None:
        own = first_input(args, kwargs)
        if recording:
            seen[unit.name].append(own)
        elif seen[unit.name]:
            base = seen[unit.name].pop(0)  # in the order of its calls
            gap.parts.append(sizes(unit, own - base).sum() / sizes(unit, base).sum().clamp(min=1e-12))

    hooks = [unit.register_forward_pre_hook(look, with_kwargs=True) for unit in units]
    try:
        with evaluating(model.backbone), torch.no_grad(), model.state.running(None):
            model.backbone(x)
        recording = False
        yield gap
    finally:
        for hook in hooks:
            hook.remove()
