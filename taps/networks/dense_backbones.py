"""Backbones with feature maps as output, for dense predictions: dilated convolutional networks and vision transformers."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.functional import interpolate

from taps.errors import UserError, first_line
from taps.networks.backbones import create_backbone
from taps.networks.multimae import WITHOUT_NORM, is_multimae
from taps.storage.hub import local_file
from taps.storage.state_dict import read_state_dict


class TokenMap(nn.Module):
    """A vision transformer with its tokens (B, N, C) rearranged to a map (B, C, h, w)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.num_features = net.num_features
        self.pretrained_cfg = getattr(net, "pretrained_cfg", None)

    def forward(self, x: Tensor) -> Tensor:
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        if patch is not None and getattr(self.net.patch_embed, "dynamic_img_pad", False):
            size = tuple(-(-side // of) * of for side, of in zip(x.shape[-2:], patch, strict=True))
            if size != tuple(x.shape[-2:]):  # padding would move the map against the image
                x = interpolate(x, size, mode="bilinear", align_corners=False)
        tokens = self.net(x)  # not its forward_features: only a call uses a task's own class token
        if tokens.dim() == 4:  # (B, h, w, C)
            return tokens.permute(0, 3, 1, 2)
        tokens = tokens[:, getattr(self.net, "num_prefix_tokens", 0) :]
        size = getattr(getattr(self.net, "patch_embed", None), "dynamic_feat_size", None)
        if size is None:
            raise UserError(f"{type(self.net).__name__} does not say how its tokens lie, so it cannot predict maps")
        height, width = size(x.shape[-2:])
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def as_deeplab(net: ResNet, is_random: bool) -> ResNet:
    """Change a dilated ResNet of timm's into the Deeplab-ResNet of AdaShare (§4 and its program), in place.

    The pooling of the stem rounds up (29 × 29 features instead of 28 × 28 at 224 pixels), and the first block of a dilated stage
    has the stage's dilation in all of its 3 × 3 convolutions. From random weights, convolutions start with N(0, 0.01), and the
    last norm of a block with weight 1, not 0.
    """
    if isinstance(net.maxpool, nn.MaxPool2d):
        net.maxpool.ceil_mode = True
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        wide = [module for module in stage.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
        dilation = max((convolution.dilation for convolution in wide), default=(1, 1))
        for convolution in wide:
            convolution.dilation = convolution.padding = dilation
    for module in net.modules() if is_random else ():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return net


def create_dense_backbone(
    name: str,
    pretrained: bool = False,
    path: str | None = None,
    output_stride: int = 8,
    channels: Sequence[int] | None = None,
    image_size: Sequence[int] | None = None,
    patch_size: int | None = None,
    deeplab: bool = True,
    **timm_options,
) -> nn.Module:
    """Create a timm network from images (B, 3, H, W) to features (B, C, h, w); ``.num_features`` is C.

    Args:
        name: name of a timm network that supports dilation, or of a vision transformer.
        pretrained, path: as in :func:`taps.networks.backbones.create_backbone`.
        output_stride: H / h of a convolutional network: 8, 16 or 32; that of a transformer is its patch size.
        channels: channels of a ResNet's four stages, for small networks without pretrained weights.
        image_size: (H, W) of a transformer's position embeddings.
        patch_size: patch size of a transformer in pixels; ``None``: its own.
        deeplab: build a dilated ResNet as AdaShare's program does, see :func:`as_deeplab`; otherwise as timm does.
        **timm_options: passed to ``timm.create_model``.

    Raises:
        UserError: for an unknown name, or a network that does not support the output stride or the channels.
    """
    config = timm.get_pretrained_cfg(name.split(".")[0], allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        size = tuple(image_size) if image_size else config.input_size[1:]
        patches = {"patch_size": patch_size} if patch_size else {}
        if path is not None and is_multimae(read_state_dict(local_file(path))):
            timm_options = {**WITHOUT_NORM, **timm_options}
        fixed = {"global_pool": "", "img_size": size, **patches, **timm_options}
        any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}  # test images are larger than training crops
        try:
            net = create_backbone(name, pretrained, path, **fixed, **any_size)
        except TypeError:
            net = create_backbone(name, pretrained, path, **fixed)
        made = TokenMap(net)
        return _with_origin(made, net, {"image_size": list(size), **patches, **timm_options})
    options = {"channels": tuple(channels), **timm_options} if channels else timm_options
    stride = {"output_stride": output_stride} if output_stride != 32 else {}
    try:
        net = create_backbone(name, pretrained, path, global_pool="", **stride, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error.__cause__ or error)
        wanted = f"output stride {output_stride}" + (
            f" and channels {' '.join(map(str, channels))}" if channels else ""
        )
        raise UserError(f"{name} cannot be made with {wanted} ({reason}); try --output_stride 32") from None
    if deeplab and output_stride < 32 and isinstance(net, ResNet):
        as_deeplab(net, is_random=path is None and not pretrained)
    widths = {"channels": list(channels)} if channels else {}
    return _with_origin(net, net, {"output_stride": output_stride, "deeplab": deeplab, **widths, **timm_options})


def _with_origin(net: nn.Module, inner: nn.Module, options: dict) -> nn.Module:
    """Say how a network of maps was made; ``inner`` is timm's network in it."""
    origin: dict = inner.taps_origin  # type: ignore[assignment]
    net.taps_origin = {**origin, "kind": "maps", "options": options}  # type: ignore[assignment]
    net.__dict__.pop("taps_structure", None)  # which these options say
    return net
