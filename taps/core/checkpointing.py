"""Activation checkpointing: parts of a call that run again during its backward pass.

``torch.utils.checkpoint`` reruns a part of the network after the call has returned. Therefore every node of the autograd graph
that was created in such a call stores what the call ran.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves

from taps.core.modules import first_input
from taps.errors import UserError


class NeedsInputGradient(Exception):  # noqa: N818 (a signal, not an error)
    """Signal that ``use_reentrant=True`` checkpointing gives no gradients unless an input of the checkpointed part has one."""


def running_backward() -> int:
    """Return the number of the backward pass that this thread is in, -1 outside any and in compiled programs."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def is_checkpointed() -> bool:
    """Return whether this point of a training call lies in a part that will run again in the backward pass."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled():
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return _is_in_function()


def _is_in_function() -> bool:
    """Return whether gradients are off because an autograd function is running, such as that of ``use_reentrant=True``, and not
    because the network wants none for one of its parts."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = code.co_varnames[0] if code.co_name == "forward" and code.co_argcount else None
        if first is not None and isinstance(frame.f_locals.get(first), FunctionCtx):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def remember(outputs, key: int, execution: object) -> None:
    """Store ``execution`` under ``key`` in every autograd node that led to the outputs."""
    nodes = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is not None and key not in _metadata(node):
            _metadata(node)[key] = execution
            nodes.extend(following for following, _ in node.next_functions)


def recalled(key: int) -> Any:
    """Return what :func:`remember` stored in the autograd node whose gradient is being computed.

    Raises:
        UserError: if nothing was stored.
    """
    node = torch._C._current_autograd_node()
    execution = None if node is None else _metadata(node).get(key)
    if execution is None:
        raise UserError(
            "a layer is recomputed in the backward pass of a call made outside the model: checkpoint parts of the network, each "
            "by itself and not inside of one another, or whole calls model(x, task=…)"
        )
    return execution


def _metadata(node: torch.autograd.graph.Node) -> dict:
    return node.metadata  # type: ignore[return-value]  # an attribute, unlike in the stub


@contextmanager
def without_reentrant_warning() -> Iterator[None]:
    """Suppress torch's warning about checkpoints whose inputs need no gradient, for trial calls and calls that need none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        yield


def with_learning_input(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return a call's inputs with the first one requiring a gradient.

    Raises:
        UserError: if the first input is not of floating point.
    """
    x = first_input(args, kwargs)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UserError("checkpointing with use_reentrant=True needs a floating-point input; use use_reentrant=False")
    x = x if x.requires_grad else x.detach().requires_grad_()
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})
