"""Heads of multi-task networks: ASPP for maps and series, and its use for the hours of a series."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from taps.errors import UserError, first_line
from taps.networks.layers_nd import CONVOLUTIONS, CausalConv1d


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with summation (DeepLab-LargeFOV, arXiv 1606.00915), the head of AdaShare.

    The output is the sum of one branch per rate: dilated convolution → ReLU → dropout → 1×1 convolution → ReLU → dropout →
    1×1 convolution. Defaults are the published values.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the output.
        width: channels of the branches.
        rates: dilations.
        dropout: probability of dropout.
        dimensions: 1, 2 or 3.
        causal: with one dimension, make outputs independent of later positions.

    Shape:
        (B, in_channels, *positions) to (B, out_channels, *positions).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 1024,
        rates: Sequence[int] = (6, 12, 18, 24),
        dropout: float = 0.5,
        dimensions: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.taps_arguments = {
            "in_channels": in_channels, "out_channels": out_channels, "width": width, "rates": list(rates),
            "dropout": dropout, "dimensions": dimensions, "causal": causal,
        }  # fmt: skip
        convolution = CONVOLUTIONS[dimensions]

        def dilated(rate: int) -> nn.Module:
            if causal:
                return CausalConv1d(in_channels, width, 3, dilation=rate)
            return convolution(in_channels, width, 3, padding=rate, dilation=rate)

        self.branches = nn.ModuleList(
            nn.Sequential(
                dilated(rate),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                convolution(width, width, 1),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                convolution(width, out_channels, 1),
            )
            for rate in rates
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class ConvNeXtHead(nn.Module):
    """The head of efficient computation sharing (ICCV 2023), from MultiMAE (ECCV 2022).

    Each place of the features is projected to ``width`` channels and unfolded to 4 × 4 places of width/16 channels, on which
    ConvNeXt blocks and a 1×1 convolution follow.

    Args:
        in_channels: channels of the features.
        out_channels: channels of the output.
        width: channels of the projection, a multiple of 16.
        depth: number of ConvNeXt blocks.

    Shape:
        (B, in_channels, h, w) to (B, out_channels, 4h, 4w).

    Raises:
        UserError: if ``width`` is not a multiple of 16.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 3072, depth: int = 2) -> None:
        super().__init__()
        if width % 16:
            raise UserError(f"--head_width {width} of a convnext head is not a multiple of 16")
        self.taps_arguments = {"in_channels": in_channels, "out_channels": out_channels, "width": width, "depth": depth}
        self.project = nn.Conv2d(in_channels, width, 1)
        self.unfold = nn.PixelShuffle(4)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width // 16, ls_init_value=1.0) for _ in range(depth)))
        self.answer = nn.Conv2d(width // 16, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.blocks(self.unfold(self.project(x))))


class HourHead(nn.Module):
    """Predictions for every hour from features with a stride of several hours.

    An ASPP head predicts all hours of a position in separate channels, which are rearranged in time. After a causal network with
    stride S, position j depends on hours 0..S·j − 1 and predicts hours S·j − 1 .. S·j + S − 2.

    Args:
        in_channels: channels of the features.
        out_channels: K, predictions per hour.
        hours: T, number of hours.
        stride: S, hours per position.
        shifted: whether the network pads an empty hour in front.
        **options: options of :class:`ASPP`.

    Shape:
        (B, in_channels, P) to (B, K, T).
    """

    def __init__(
        self, in_channels: int, out_channels: int, hours: int, stride: int = 1, shifted: bool = False, **options
    ) -> None:
        super().__init__()
        self.taps_arguments = {
            "in_channels": in_channels, "out_channels": out_channels, "hours": hours, "stride": stride, "shifted": shifted,
            **{key: list(value) if key == "rates" else value for key, value in options.items()},
        }  # fmt: skip
        self.hours, self.stride, self.shifted = hours, stride, shifted
        self.answers = ASPP(in_channels, out_channels * stride, dimensions=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        answers = self.answers(x).unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2)
        return answers[..., int(self.shifted) :][..., : self.hours]


#: limits of a described head, so that a damaged description does not take all memory
_LARGEST, _DEEPEST = 2**20, 100
HEADS: dict[str, Callable[..., nn.Module]] = {"ASPP": ASPP, "ConvNeXtHead": ConvNeXtHead, "HourHead": HourHead}


def make_head(description: Mapping) -> nn.Module | None:
    """Return the head that a task file describes by its ``type`` and ``arguments``, on the meta device; ``None`` if it is not one
    of these.

    Raises:
        UserError: if the arguments do not make such a head.
    """
    make, arguments = HEADS.get(description["type"]), description.get("arguments")
    if make is None or not isinstance(arguments, Mapping):
        return None
    depth = arguments.get("depth", 0)
    large = any(isinstance(value, int) and value > _LARGEST for value in arguments.values())
    if large or not isinstance(depth, int) or depth > _DEEPEST:
        raise UserError(f"the description of a head of type {description['type']} is damaged: {dict(arguments)}"[:200])
    try:
        with torch.device("meta"):
            return make(**arguments)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = first_line(error)
        raise UserError(f"the description of a head of type {description['type']} is damaged: {reason}") from None
