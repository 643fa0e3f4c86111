"""Residual networks for series and volumes: ResNets in one to three dimensions, and the temporal convolutional network.

timm's networks are for images. These have the same blocks, named alike, so that everything that knows blocks by their name
(:mod:`taps.blocks`) knows these. A *causal* network's output at an hour depends on no later hour: what is asked about an hour
can't be read from what happens after it, such as the end of the record.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

from taps.errors import UserError, unknown


class CausalConv1d(nn.Conv1d):
    """A convolution over time that sees the present and the past only: zeros are put in front, none behind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


class _Layers:
    """Makes convolutions and norms of a number of dimensions."""

    def __init__(self, dimensions: int, causal: bool = False) -> None:
        self.dimensions, self.causal = dimensions, causal

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Module:
        options = {"stride": stride, "dilation": dilation, "bias": False}
        if self.causal:
            return CausalConv1d(inputs, outputs, kernel, **options)
        return CONVOLUTIONS[self.dimensions](
            inputs, outputs, kernel, padding=dilation * (kernel // 2) * (kernel % 2), **options
        )

    def norm(self, channels: int) -> nn.Module:
        return _NORMS[self.dimensions](channels)

    def projection(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        """What takes a block's input to the shape of its output; ``None`` where that is the same."""
        if stride == 1 and inputs == outputs:
            return None
        return nn.Sequential(self.convolution(inputs, outputs, 1, stride), self.norm(outputs))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + conv3 → norm → relu → conv3 → norm) (ResNet, arXiv 1512.03385)."""

    expansion = 1

    def __init__(self, layers: _Layers, inputs: int, width: int, stride: int, dilation: int) -> None:
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
    """relu(shortcut(x) + conv1 → conv3 → conv1, each with a norm), four times as wide outside (ResNet, arXiv 1512.03385)."""

    expansion = 4

    def __init__(self, layers: _Layers, inputs: int, width: int, stride: int, dilation: int) -> None:
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


#: name -> block and number of blocks of each stage
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
        in_channels: of the input.
        channels: of the four stages (four times as many behind bottlenecks).
        output_stride: positions of the input by one of the output: 8, 16 or 32; what is not strided is dilated.
        pool: mean over all positions at the end.
        causal: for one dimension: an output depends on no later position.

    Shape:
        (B, in_channels, *positions) to (B, num_features, *positions / output_stride), with ``pool`` (B, num_features). A
        causal network puts one empty position in front, so that output j has seen positions 0..output_stride·j − 1.
        A series is filled up with zeros behind.
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
    ) -> None:
        super().__init__()
        block, depths = RESNETS[name]
        layers = _Layers(dimensions, causal)
        self.pretrained_cfg = {"architecture": f"{name}_{dimensions}d"}
        self.dimensions, self.causal, self.output_stride = dimensions, causal, output_stride
        if dimensions == 1:  # hours are few, and none should be mixed away (DynaShare's program)
            stem = in_channels
            self.conv1 = layers.convolution(in_channels, stem, 2, 2)
            self.maxpool = _POOLS[1](1, 2, ceil_mode=True)
        else:
            stem = channels[0]
            self.conv1 = layers.convolution(in_channels, stem, 7, 2)
            self.maxpool = _POOLS[dimensions](3, 2, 1)
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
        if self.dimensions == 1:  # zeros behind fill the last position up
            x = pad(x, (int(self.causal), -(x.shape[2] + self.causal) % self.output_stride))
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(2).mean(2) if self.pool else x


class TemporalBlock(nn.Module):
    """relu(shortcut(x) + two causal dilated convolutions, each followed by norm, relu and dropout) (TCN, arXiv 1803.01271).

    With BatchNorm in the place of weight normalisation, so that tasks can have norms of their own.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        layers = _Layers(1, causal=True)
        self.conv1 = layers.convolution(inputs, outputs, 3, 1, dilation)
        self.bn1 = layers.norm(outputs)
        self.conv2 = layers.convolution(outputs, outputs, 3, 1, dilation)
        self.bn2 = layers.norm(outputs)
        self.downsample = layers.projection(inputs, outputs, 1)
        self.drop = nn.Dropout(dropout)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.drop(self.act(self.bn1(self.conv1(x))))
        return self.act(shortcut + self.drop(self.act(self.bn2(self.conv2(x)))))


class TCN(nn.Module):
    """A temporal convolutional network (arXiv 1803.01271): residual blocks whose dilation doubles.

    Args:
        in_channels: of the input.
        channels: of the blocks: the first block has ``channels[0]``, the others the following, the last repeated.
        blocks: how many; n of them see the last 1 + 4 · (2^n − 1) positions.
        dropout: probability.

    Shape:
        (B, in_channels, T) to (B, num_features, T); the output at an hour has seen that hour and those before.
    """

    causal, output_stride = True, 1

    def __init__(
        self, in_channels: int, channels: Sequence[int] = (64, 128, 256, 512), blocks: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.pretrained_cfg = {"architecture": "tcn"}
        widths = [channels[min(index, len(channels) - 1)] for index in range(blocks)]
        sides = [in_channels, *widths]
        self.blocks = nn.Sequential(
            *(TemporalBlock(sides[index], width, 2**index, dropout) for index, width in enumerate(widths))
        )
        self.num_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def create_series_backbone(
    name: str, in_channels: int, channels: Sequence[int] | None = None, causal: bool = True, output_stride: int = 8
) -> nn.Module:
    """A network from series (B, in_channels, T) to features (B, ``.num_features``, T / ``.output_stride``).

    Args:
        name: a name in :data:`RESNETS`, or ``"tcn"``.
        in_channels: of the input.
        channels: of the stages; ``None``: 64 to 512.
        causal: whether an output may depend on later hours; a TCN's never does.
        output_stride: of a ResNet.

    Raises:
        UserError: for an unknown name, or a TCN that is not to be causal.
    """
    widths = tuple(channels) if channels else (64, 128, 256, 512)
    if name == "tcn":
        if not causal:
            raise UserError("a tcn never looks ahead; leave --no-causal out, or take a resnet")
        return TCN(in_channels, widths)
    if name not in RESNETS:
        raise unknown("network for series", name, [*RESNETS, "tcn"])
    return ResNet(name, 1, in_channels, widths, output_stride, causal=causal)


def create_volume_backbone(
    name: str, in_channels: int = 1, channels: Sequence[int] | None = None, output_stride: int = 8
) -> nn.Module:
    """A 3-D ResNet from volumes (B, in_channels, D, H, W) to features (B, ``.num_features``).

    Args:
        name: a name in :data:`RESNETS`.
        in_channels, channels, output_stride: as in :class:`ResNet`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in RESNETS:
        raise unknown("network for volumes", name, RESNETS)
    return ResNet(name, 3, in_channels, tuple(channels) if channels else (64, 128, 256, 512), output_stride, pool=True)
