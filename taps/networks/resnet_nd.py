"""ResNets in one to three dimensions (arXiv 1512.03385), for series and volumes.

Blocks are built and named as in timm's networks, which are only for images, so that :mod:`taps.methods.blocks` finds them.
The output of a *causal* network does not depend on later hours, so that predictions for an hour cannot use what happens
after it, such as the end of the record.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

from taps.errors import unknown
from taps.networks.layers_nd import CONVOLUTIONS, POOLS, Layers


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv3 → norm → relu → conv3 → norm)."""

    expansion = 1

    def __init__(self, layers: Layers, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = layers.convolution(inputs, width, 3, stride, dilation)
        self.bn1 = layers.norm(width)
        self.conv2 = layers.convolution(width, width, 3, 1, dilation)
        self.bn2 = layers.norm(width)
        self.downsample = layers.projection(inputs, width, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(shortcut + self.bn2(self.conv2(x)))


class Bottleneck(nn.Module):
    """relu(shortcut(x) + conv1 → conv3 → conv1, each with a norm), with four times as many output channels."""

    expansion = 4

    def __init__(self, layers: Layers, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = layers.convolution(inputs, width, 1)
        self.bn1 = layers.norm(width)
        self.conv2 = layers.convolution(width, width, 3, stride, dilation)
        self.bn2 = layers.norm(width)
        self.conv3 = layers.convolution(width, 4 * width, 1)
        self.bn3 = layers.norm(4 * width)
        self.downsample = layers.projection(inputs, 4 * width, stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.act(shortcut + self.bn3(self.conv3(x)))


#: name -> block, and number of blocks per stage
RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A ResNet in one to three dimensions.

    Args:
        name: a name in :data:`RESNETS`.
        dimensions: 1, 2 or 3.
        in_channels: channels of the input.
        channels: channels of the four stages (times four at the output of bottlenecks).
        output_stride: 8, 16 or 32; stages that would exceed it are dilated instead.
        pool: average over all positions at the end.
        causal: with one dimension, make outputs independent of later positions.
        dynamic_kernels: with one dimension, number of kernels of dynamic convolutions, which the first layer and the projections
            are then, as in DynaShare's program; 0: ordinary convolutions.

    Shape:
        (B, in_channels, *positions) to (B, num_features, *positions / output_stride), with ``pool`` (B, num_features). A
        causal network pads one empty position in front, so that output j depends on positions 0..output_stride·j − 1.
        A series is padded with zeros at the end.
    """

    def __init__(
        self,
        name: str,
        dimensions: int,
        in_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        output_stride: int = 8,
        pool: bool = False,
        causal: bool = False,
        dynamic_kernels: int = 0,
    ) -> None:
        super().__init__()
        block, depths = RESNETS[name]
        layers = Layers(dimensions, causal, dynamic_kernels)
        self.pretrained_cfg = {"architecture": f"{name}_{dimensions}d"}
        self.dimensions, self.causal, self.output_stride = dimensions, causal, output_stride
        if dimensions == 1:  # a small stem that keeps short series apart, as in DynaShare's program
            stem = in_channels
            dynamic = bool(dynamic_kernels)
            self.conv1 = layers.pointwise(stem, stem, 2) if dynamic else layers.convolution(stem, stem, 2, 2)
            self.maxpool = POOLS[1](1, 2, ceil_mode=True)
        else:
            stem = channels[0]
            self.conv1 = layers.convolution(in_channels, stem, 7, 2)
            self.maxpool = POOLS[dimensions](3, 2, 1)
        self.bn1 = layers.norm(stem)
        self.act1 = nn.ReLU(inplace=True)
        stride, dilation, inputs = 4, 1, stem
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            step = 1
            if stage and stride < output_stride:
                step, stride = 2, 2 * stride
            elif stage:
                dilation *= 2
            blocks = []
            for index in range(depth):
                blocks.append(block(layers, inputs, width, step if index == 0 else 1, dilation))
                inputs = block.expansion * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = inputs
        self.pool = pool
        for module in self.modules():
            if isinstance(module, tuple(CONVOLUTIONS.values())):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if self.dimensions == 1:  # padding at the end completes the last position
            x = pad(x, (int(self.causal), -(x.shape[2] + self.causal) % self.output_stride))
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).mean(2) if self.pool else x


def create_volume_backbone(
    name: str, in_channels: int = 1, channels: Sequence[int] | None = None, output_stride: int = 8
) -> nn.Module:
    """Create a 3-D ResNet from volumes (B, in_channels, D, H, W) to features (B, ``.num_features``).

    Args:
        name: a name in :data:`RESNETS`.
        in_channels, channels, output_stride: as in :class:`ResNet`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in RESNETS:
        raise unknown("network for volumes", name, RESNETS)
    widths = tuple(channels) if channels else (64, 128, 256, 512)
    net = ResNet(name, 3, in_channels, widths, output_stride, pool=True)
    options = {"in_channels": in_channels, "channels": list(widths), "output_stride": output_stride}
    net.taps_origin = {"model": name, "kind": "volumes", "weights": "random", "options": options}  # type: ignore[assignment]
    return net
