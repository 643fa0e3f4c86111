"""Certificates against drift: a fingerprint of every tensor of the base, and every task's outputs for a known input.

A task's outputs are recorded when its training has ended and are stored in its ``task.json`` (``probe``); the base's fingerprints
are in the results folder's ``fingerprints.json``. The checks compute all of them again and compare them bit for bit, on one CPU
thread, since the number of threads changes the order of sums. Processors round differently, too, which counts as the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taps.core.modules import evaluating
from taps.core.network import Network, fingerprint
from taps.errors import UserError, first_line
from taps.storage.state_dict import without_counters

#: largest difference of outputs, relative to the largest of them, that counts as rounding
_ROUNDING = 1e-5
_SHOWN = 16  # number of output values that are stored as such, to measure the deviation on another machine


def fingerprints(model: Network) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the base by name, without batch counters."""
    return {name: fingerprint({name: tensor}) for name, tensor in without_counters(model.base_state()).items()}


@contextmanager
def _one_thread(model: Network) -> Iterator[None]:
    threads, device = torch.get_num_threads(), next(model.parameters()).device
    torch.set_num_threads(1)
    model.to("cpu", memory_format=torch.contiguous_format)  # the memory format also changes the order of sums
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        model.to(device)
        torch.set_num_threads(threads)


def probe(model: Network, task: str, shape: tuple[int, ...]) -> dict:
    """Record a task's outputs for normally distributed input.

    Args:
        model: a model with the task.
        task: its name.
        shape: input shape, (B, …).

    Returns:
        ``shape``, ``input`` and ``output`` (SHA-256), ``values`` (the first values of the output, as hexadecimal float32).
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with _one_thread(model):
        outputs = [
            leaf.detach().float().contiguous()
            for leaf in tree_leaves(type(model).forward(model, x, task))  # accelerate may have put autocast around it
            if isinstance(leaf, Tensor)
        ]
    digest = hashlib.sha256(b"".join(output.numpy().tobytes() for output in outputs)).hexdigest()
    first = torch.cat([output.flatten() for output in outputs])[:_SHOWN].tolist()
    return {
        "shape": list(shape),
        "input": fingerprint({"x": x}),
        "output": digest,
        "values": [struct.pack(">f", value).hex() for value in first],
    }


def check_base(net: nn.Module, stored: Mapping[str, str]) -> list[str]:
    """Return the names of a plain base's tensors that differ from the certificate, including missing and additional ones."""
    now = {name: fingerprint({name: tensor}) for name, tensor in without_counters(net.state_dict()).items()}
    return sorted(name for name in {*now, *stored} if now.get(name) != stored.get(name))


def check_task(model: Network, task: str, stored: Mapping) -> tuple[bool, str]:
    """Return whether a task's outputs are those of the certificate, up to rounding, and a text that says so.

    Raises:
        UserError: if the task's certificate is damaged.
    """
    try:
        now = probe(model, task, tuple(stored["shape"]))
        same_input, same = now["input"] == stored["input"], now["output"] == stored["output"]
        before = [struct.unpack(">f", bytes.fromhex(value))[0] for value in stored["values"]]
        if len(before) != len(now["values"]) or not before:
            raise ValueError(f"{len(before)} values instead of {len(now['values'])}")
    except (KeyError, TypeError, ValueError, struct.error, RuntimeError) as error:
        raise UserError(f"task {task}: its certificate is damaged ({first_line(error)})") from None
    if same:
        return True, "answers bit for bit as after its training"
    if not same_input:
        reason = "the random numbers of this torch are not those of the certificate's; use the version in settings.json"
        return False, reason
    after = [struct.unpack(">f", bytes.fromhex(value))[0] for value in now["values"]]
    apart = max(abs(a - b) for a, b in zip(before, after, strict=True))
    if 0 < apart <= _ROUNDING * max(1.0, *map(abs, before)):
        return True, f"answers as after its training, to {apart:.2g}: another processor or torch rounds differently"
    return False, f"its answers differ, by {apart:.3g} in the first {len(before)} numbers"
