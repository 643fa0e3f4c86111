"""Backbones for series, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from taps.errors import UserError, unknown
from taps.networks.resnet_nd import RESNETS, ResNet
from taps.networks.tcn import TCN


def create_series_backbone(
    name: str,
    in_channels: int,
    channels: Sequence[int] | None = None,
    causal: bool = True,
    output_stride: int = 8,
    dynamic_kernels: int = 0,
) -> nn.Module:
    """Create a network from series (B, in_channels, T) to features (B, ``.num_features``, T / ``.output_stride``).

    Args:
        name: a name in :data:`RESNETS`, or ``"tcn"``.
        in_channels: channels of the input.
        channels: channels of the stages; ``None``: 64 to 512.
        causal: make outputs independent of later hours, as those of a TCN always are.
        output_stride: stride of a ResNet.
        dynamic_kernels: kernels of a ResNet's dynamic convolutions, see :class:`taps.networks.resnet_nd.ResNet`.

    Raises:
        UserError: for an unknown name, or a TCN with ``causal=False`` or dynamic convolutions.
    """
    widths = tuple(channels) if channels else (64, 128, 256, 512)
    options = {
        "in_channels": in_channels, "channels": list(widths), "causal": causal, "output_stride": output_stride,
        "dynamic_kernels": dynamic_kernels,
    }  # fmt: skip
    if name != "tcn" and name not in RESNETS:
        raise unknown("network for series", name, [*RESNETS, "tcn"])
    if name == "tcn" and not causal:
        raise UserError("a tcn never looks ahead; leave --no-causal out, or take a resnet")
    if name == "tcn" and dynamic_kernels:
        raise UserError("a tcn has no dynamic convolutions; leave --dynamic_kernels out, or take a resnet")
    net = (
        TCN(in_channels, widths)
        if name == "tcn"
        else ResNet(name, 1, in_channels, widths, output_stride, causal=causal, dynamic_kernels=dynamic_kernels)
    )
    net.taps_origin = {"model": name, "kind": "series", "weights": "random", "options": options}  # type: ignore[assignment]
    return net
