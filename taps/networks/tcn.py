"""Temporal convolutional networks (TCN, arXiv 1803.01271)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from taps.networks.layers_nd import Layers


class TemporalBlock(nn.Module):
    """relu(shortcut(x) + two causal dilated convolutions, each followed by norm, relu and dropout).

    BatchNorm replaces the paper's weight normalisation, so that tasks can have their own norms.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        layers = Layers(1, causal=True)
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
    """A temporal convolutional network: residual blocks with dilations 1, 2, 4, …

    Args:
        in_channels: channels of the input.
        channels: channels of the first blocks; the last value is repeated for the others.
        blocks: number of blocks; n blocks have a receptive field of 1 + 4 · (2^n − 1) positions.
        dropout: probability of dropout.

    Shape:
        (B, in_channels, T) to (B, num_features, T); outputs depend only on the present and the past.
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
