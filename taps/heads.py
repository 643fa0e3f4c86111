"""Heads for maps and for the hours of a series, and backbones that give feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import Tensor, nn

from taps.backbones import create_backbone
from taps.errors import UserError
from taps.residual import CONVOLUTIONS, CausalConv1d


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling by summation (DeepLab-LargeFOV's, arXiv 1606.00915; the head of AdaShare).

    One branch a rate: dilated convolution → ReLU → dropout → 1×1 convolution → ReLU → dropout → 1×1 convolution; the
    branches' outputs are added.

    Args:
        in_channels: of the features.
        out_channels: of the output.
        width: channels inside, published 1024.
        rates: dilations, published (6, 12, 18, 24).
        dropout: probability, published 0.5.
        dimensions: 1, 2 or 3.
        causal: of one dimension: an output depends on no later position.

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


class HourHead(nn.Module):
    """Answers for every hour from features that stand for several hours each.

    An ASPP head whose channels are the answers for the hours of one position; they are put in a row. Behind a causal
    network with stride S position j has seen hours 0..S·j − 1 and answers for hours S·j − 1 .. S·j + S − 2.

    Args:
        in_channels: of the features.
        out_channels: K, answers an hour.
        hours: T.
        stride: S, hours a position.
        shifted: whether the network puts an empty hour in front.
        **options: of :class:`ASPP`.

    Shape:
        (B, in_channels, P) to (B, K, T).
    """

    def __init__(
        self, in_channels: int, out_channels: int, hours: int, stride: int = 1, shifted: bool = False, **options
    ) -> None:
        super().__init__()
        self.hours, self.stride, self.shifted = hours, stride, shifted
        self.answers = ASPP(in_channels, out_channels * stride, dimensions=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        answers = self.answers(x).unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2)
        return answers[..., int(self.shifted) :][..., : self.hours]


class TokenMap(nn.Module):
    """A vision transformer whose output is a map: tokens (B, N, C) in their grid, (B, C, h, w)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.num_features = net.num_features
        self.pretrained_cfg = getattr(net, "pretrained_cfg", None)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.net.forward_features(x)
        if tokens.dim() == 4:  # (B, h, w, C)
            return tokens.permute(0, 3, 1, 2)
        tokens = tokens[:, getattr(self.net, "num_prefix_tokens", 0) :]
        height, width = self.net.patch_embed.dynamic_feat_size(x.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def create_dense_backbone(
    name: str,
    pretrained: bool = False,
    path: str | None = None,
    output_stride: int = 8,
    channels: Sequence[int] | None = None,
    image_size: Sequence[int] | None = None,
    patch_size: int | None = None,
) -> nn.Module:
    """A timm network that maps images (B, 3, H, W) to features (B, C, h, w); ``.num_features`` is C.

    Args:
        name: any timm name of a network that can be dilated, or of a vision transformer.
        pretrained, path: as in :func:`taps.backbones.create_backbone`.
        output_stride: H / h of a convolutional network: 8, 16 or 32; a transformer has that of its patches.
        channels: of a ResNet's four stages; for small networks with a random start.
        image_size: (H, W), for transformers, whose position embeddings are made for one size.
        patch_size: of a transformer, in pixels, instead of its own.

    Raises:
        UserError: for an unknown name, or a network that cannot have this output stride or these channels.
    """
    config = timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        size = tuple(image_size) if image_size else config.input_size[1:]
        patches = {"patch_size": patch_size} if patch_size else {}
        any_size = {
            **patches,
            "dynamic_img_size": True,
            "dynamic_img_pad": True,
        }  # test images are larger than training crops
        try:
            net = create_backbone(name, pretrained, path, global_pool="", img_size=size, **any_size)
        except TypeError:
            net = create_backbone(name, pretrained, path, global_pool="", img_size=size, **patches)
        return TokenMap(net)
    options = {"channels": tuple(channels)} if channels else {}
    stride = {"output_stride": output_stride} if output_stride != 32 else {}
    try:
        return create_backbone(name, pretrained, path, global_pool="", **stride, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} cannot be made with output stride {output_stride}"
            + (f" and channels {' '.join(map(str, channels))}" if channels else "")
            + f" ({reason}); try --output_stride 32"
        ) from None
