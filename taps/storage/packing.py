"""Tensors in one array of bytes whose header is deflated, for files so small that a plain header would be much of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from taps.storage.files import plain_bytes

_LONGEST = 1 << 24  # of a header, in bytes


def pack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return tensors as bytes, uint8: those of a safetensors file with its header deflated."""
    plain = plain_bytes(tensors)
    (length,) = struct.unpack("<Q", plain[:8])
    header = zlib.compress(plain[8 : 8 + length], 9)
    packed = struct.pack("<I", len(header)) + header + plain[8 + length :]
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Tensor]:
    """Return the tensors that :func:`pack` has packed.

    Raises:
        ValueError: if the bytes hold no tensors.
    """
    stored = packed.numpy().tobytes()
    if len(stored) < 4:
        raise ValueError("too few bytes for packed tensors")
    (length,) = struct.unpack("<I", stored[:4])
    reader = zlib.decompressobj()
    try:
        header = reader.decompress(stored[4 : 4 + length], _LONGEST)
        if not reader.eof or reader.unused_data:
            raise ValueError("the header of packed tensors is cut short or too long")
        return load(struct.pack("<Q", len(header)) + header + stored[4 + length :])
    except (zlib.error, SafetensorError, KeyError) as error:  # KeyError: a type that torch does not have
        raise ValueError(f"the bytes are not packed tensors: {str(error)[:120]}") from None
