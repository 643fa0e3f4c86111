"""The distance between activations at the inputs of matrix products: a task's and the base's, or those of neighbouring frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from taps.core.delta import is_linear_in_parameters
from taps.core.modules import evaluating, first_input
from taps.core.network import Network
from taps.core.unit import GatedUnit
from taps.settings.task_names import NEIGHBOUR


def is_product(unit: GatedUnit) -> bool:
    """Return whether the unit multiplies its input by a matrix with one row per output: a linear layer or a convolution."""
    transposed = isinstance(unit.base, nn.modules.conv._ConvTransposeNd)
    return is_linear_in_parameters(unit.base) and not transposed


def sizes(unit: GatedUnit, x: Tensor) -> Tensor:
    """Return the Euclidean norm over channels of a matrix product's input at every position: (B, …), without channels."""
    return x.norm(dim=-1 if isinstance(unit.base, nn.Linear) else 1)


class Gap:
    """The weighted distance of the activations since a comparison was entered; see :meth:`value`."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.parts: list[Tensor] = []

    def value(self) -> Tensor:
        """Return the mean over matrix products of Σ ‖x_task − x_base‖ / Σ ‖x_base‖ over the positions of their inputs.

        The norm over channels is not squared, so that single positions can become equal, which are then not recomputed
        (:mod:`taps.reuse.from_base`). The paper (§3) sums the absolute differences of the products' outputs, so that the weight
        depends on batch size, resolution and width.
        """
        return self.weight * torch.stack(self.parts).mean() if self.parts else torch.zeros(())


def distance_to_base(
    model: Network, x: Tensor, labels: Mapping[str, Tensor], weight: float = 1.0
) -> AbstractContextManager[Gap]:
    """Compare the activations of the ``with`` block, which must run on the same ``x``, with the base's."""
    return _compared(model, weight, lambda: model.features(x))


def distance_to_neighbour(
    model: Network, x: Tensor, labels: Mapping[str, Tensor], weight: float = 1.0
) -> AbstractContextManager[Gap]:
    """Compare the activations of the ``with`` block with those of the frames beside its images (ICCV 2023, §3), which are among
    the labels; the network has one task."""
    return _compared(model, weight, lambda: model.features(labels[NEIGHBOUR], model.tasks[0]))


@contextmanager
def _compared(model: Network, weight: float, reference: Callable[[], object]) -> Iterator[Gap]:
    """Compare the activations of the ``with`` block with those of a call without gradients."""
    units = [unit for unit in model.units if is_product(unit)]
    seen: dict[str, list[Tensor]] = {unit.name: [] for unit in units}
    gap, recording = Gap(weight), True

    def look(unit: GatedUnit, args: tuple, kwargs: dict) -> None:
        own = first_input(args, kwargs)
        if recording:
            seen[unit.name].append(own)
        elif seen[unit.name]:
            base = seen[unit.name].pop(0)  # in the order of the calls
            gap.parts.append(sizes(unit, own - base).sum() / sizes(unit, base).sum().clamp(min=1e-12))

    hooks = [unit.register_forward_pre_hook(look, with_kwargs=True) for unit in units]
    try:
        with evaluating(model.backbone), torch.no_grad():
            reference()
        recording = False
        yield gap
    finally:
        for hook in hooks:
            hook.remove()
