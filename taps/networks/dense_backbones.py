"""Backbones with feature maps as output, for dense predictions: dilated convolutional networks and vision transformers."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from torch import Tensor, nn

from taps.errors import UserError
from taps.networks.backbones import create_backbone


class TokenMap(nn.Module):
    """A vision transformer with its tokens (B, N, C) rearranged to a map (B, C, h, w)."""

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
    """Create a timm network from images (B, 3, H, W) to features (B, C, h, w); ``.num_features`` is C.

    Args:
        name: name of a timm network that supports dilation, or of a vision transformer.
        pretrained, path: as in :func:`taps.networks.backbones.create_backbone`.
        output_stride: H / h of a convolutional network: 8, 16 or 32; that of a transformer is its patch size.
        channels: channels of a ResNet's four stages, for small networks without pretrained weights.
        image_size: (H, W) of a transformer's position embeddings.
        patch_size: patch size of a transformer in pixels; ``None``: its own.

    Raises:
        UserError: for an unknown name, or a network that does not support the output stride or the channels.
    """
    config = timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        size = tuple(image_size) if image_size else config.input_size[1:]
        patches = {"patch_size": patch_size} if patch_size else {}
        any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}  # test images are larger than training crops
        try:
            net = create_backbone(name, pretrained, path, global_pool="", img_size=size, **patches, **any_size)
        except TypeError:
            net = create_backbone(name, pretrained, path, global_pool="", img_size=size, **patches)
        return TokenMap(net)
    options = {"channels": tuple(channels)} if channels else {}
    stride = {"output_stride": output_stride} if output_stride != 32 else {}
    try:
        return create_backbone(name, pretrained, path, global_pool="", **stride, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        wanted = f"output stride {output_stride}" + (
            f" and channels {' '.join(map(str, channels))}" if channels else ""
        )
        raise UserError(f"{name} cannot be made with {wanted} ({reason}); try --output_stride 32") from None
