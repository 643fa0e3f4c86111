"""Gradients of closed gates without running their deltas in the forward pass.

A closed unit's output is the base's, so that tasks can share it, but each gate's specific · δ is still part of the graph:
dL/dspecific = ⟨dL/dy, ∂y/∂specific⟩ with ∂y/∂specific = f(x_task; δ_task), since f is linear in its parameters. This takes one
additional run of the layer on the task's rows, in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taps.core.delta import is_linear_in_parameters
from taps.core.gate import Decision
from taps.core.modules import with_tensors
from taps.core.unit import GatedUnit


def is_closed(unit: GatedUnit, decision: Decision) -> bool:
    """Return whether a relaxed decision computes the base's output, so that only the gate learns from it."""
    run, specific = decision.run, decision.specific
    scalar = isinstance(specific, Tensor) and specific.dim() == 0 and not isinstance(run, Tensor) and run == 1.0
    linear = scalar and decision.delta_gradient is None and is_linear_in_parameters(unit.base)
    return linear and bool(specific.detach() == 0)  # type: ignore[union-attr]


def closed_gate_gradient(
    unit: GatedUnit, y: Tensor, x: Tensor, rows: Mapping[str, slice], decisions: Mapping[str, Decision]
) -> Tensor:
    """Return ``y`` = f(x; W) unchanged, with the gradients of closed gates added.

    Args:
        unit: a unit whose base is linear in its parameters.
        y: the output for several tasks.
        x: the input.
        rows: rows of each task in ``x`` and in ``y``.
        decisions: decisions of the tasks whose gates are closed and learn.
    """
    learning = [
        task
        for task, decision in decisions.items()
        if task in unit.deltas and isinstance(decision.specific, Tensor) and decision.specific.requires_grad
    ]
    if not learning:
        return y
    deltas = [unit.deltas[task][name] for task in learning for name in unit.parameter_names]
    specifics = [decisions[task].specific for task in learning]
    return _ClosedGates.apply(y, x.detach(), unit, [rows[task] for task in learning], *specifics, *deltas)


def any_nonzero(tensor: Tensor) -> bool:
    """Return whether any value is nonzero; for a trained tensor the first few elements usually decide."""
    return bool(tensor[:1].any()) or bool(tensor.any())


class _ClosedGates(torch.autograd.Function):
    """The identity of y, with gradients of closed gates and zero gradients of their deltas, so that an optimiser's momentum keeps
    moving these."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, unit: GatedUnit, rows: list[slice], *learning: Tensor) -> Tensor:
        ctx.save_for_backward(x, *learning[len(rows) :])
        ctx.unit, ctx.rows = unit, rows
        return y.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, *deltas = ctx.saved_tensors
        names = ctx.unit.parameter_names
        of_specific = []
        for index, place in enumerate(ctx.rows):
            values = deltas[index * len(names) : (index + 1) * len(names)]
            zero = gradient.new_zeros((), dtype=values[0].dtype)
            if any(map(any_nonzero, values)):
                tensors = {name: value.to(x.dtype) for name, value in zip(names, values, strict=True)}
                slope = with_tensors(ctx.unit.base, tensors)(x[place])
                wide = torch.promote_types(slope.dtype, torch.float32)  # half precision overflows
                zero = torch.sum(gradient[place].to(wide) * slope.to(wide)).to(zero.dtype)
            of_specific.append(zero)
        needed = ctx.needs_input_grad[4 + len(ctx.rows) :]
        of_deltas = [torch.zeros_like(delta) if needs else None for delta, needs in zip(deltas, needed, strict=True)]
        return gradient, None, None, None, *of_specific, *of_deltas
