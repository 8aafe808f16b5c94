"""Models in plain torch, as people build them, weights random: what whole-model rows time and tests
convert. All widths can be divided by `shrink`.

Sizes: DeepLabV3 and V3+ after Chen et al. (arXiv:1706.05587, 1802.02611), VAN-B2 after Guo et al.
(arXiv:2202.09741), WaveNet after van den Oord et al. (arXiv:1609.03499) in the sizes of
r9y9/wavenet_vocoder, TCN after Bai et al. (arXiv:1803.01271).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def conv_bn(c, k, taps, stride=1, dilation=1, norm=nn.BatchNorm2d):
    return nn.Conv2d(c, k, taps, stride, dilation * (taps - 1) // 2, dilation, bias=False), norm(k)


class Bottleneck(nn.Module):
    def __init__(self, c, width, stride, dilation, downsample):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, stride, dilation)
        self.conv3, self.bn3 = conv_bn(width, 4 * width, 1)
        self.downsample = (
            nn.Sequential(*conv_bn(c, 4 * width, 1, stride)) if downsample else nn.Identity()
        )

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class ASPP(nn.Module):
    """DeepLab's head: a 1x1 branch, one per rate, and the pooled image."""

    def __init__(self, c, k, rates, norm=nn.BatchNorm2d):
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(*conv_bn(c, k, 1, norm=norm), nn.ReLU())])
        self.convs += [
            nn.Sequential(*conv_bn(c, k, 3, dilation=rate, norm=norm), nn.ReLU()) for rate in rates
        ]
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, k, 1))
        self.project = nn.Sequential(*conv_bn((2 + len(rates)) * k, k, 1, norm=norm), nn.ReLU())

    def forward(self, x):
        pooled = self.pooling(x).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(conv(x) for conv in self.convs), pooled], 1))


class ResNet(nn.Module):
    """A ResNet's features: (those of the first stage, those of the last); `dilated` of the last
    stages keep their resolution."""

    def __init__(self, blocks, dilated, shrink=1):
        super().__init__()
        c = 64 // shrink
        self.stem = nn.Sequential(
            nn.Conv2d(3, c, 7, 2, 3, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        self.layers, dilation = nn.ModuleList(), 1
        for i, count in enumerate(blocks):
            before, width, stride = dilation, (64 << i) // shrink, 1 if i == 0 else 2
            if i >= len(blocks) - dilated:
                dilation, stride = dilation * stride, 1
            first = Bottleneck(c, width, stride, before, True)
            c = 4 * width
            self.layers.append(
                nn.Sequential(
                    first, *(Bottleneck(c, width, 1, dilation, False) for _ in range(count - 1))
                )
            )
        self.channels = c

    def forward(self, x):
        low = x = self.layers[0](self.stem(x))
        for layer in self.layers[1:]:
            x = layer(x)
        return low, x


class DeepLabV3(nn.Module):
    """DeepLabV3 at output stride 8 on ResNet50, or with blocks (3, 4, 23, 3) on ResNet101."""

    def __init__(self, shrink=1, classes=21, blocks=(3, 4, 6, 3)):
        super().__init__()
        k = 256 // shrink
        self.backbone = ResNet(blocks, 2, shrink)
        self.classifier = nn.Sequential(
            ASPP(self.backbone.channels, k, (12, 24, 36)),
            *conv_bn(k, k, 3),
            nn.ReLU(),
            nn.Conv2d(k, classes, 1),
        )

    def forward(self, x):
        return F.interpolate(self.classifier(self.backbone(x)[1]), x.shape[2:], mode="bilinear")


def separable(c, k, dilation=1):
    return nn.Sequential(
        nn.Conv2d(c, c, 3, 1, dilation, dilation, groups=c, bias=False),
        *conv_bn(c, k, 1),
        nn.ReLU(),
    )


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ on ResNet101 at output stride 16: separable ASPP, and a decoder that sees the
    first stage."""

    def __init__(self, shrink=1, classes=21, blocks=(3, 4, 23, 3)):
        super().__init__()
        k = 256 // shrink
        self.backbone = ResNet(blocks, 1, shrink)
        self.aspp = ASPP(self.backbone.channels, k, (12, 24, 36))
        for i, rate in enumerate((12, 24, 36)):
            self.aspp.convs[1 + i] = separable(self.backbone.channels, k, rate)
        self.low = nn.Sequential(*conv_bn(256 // shrink, 48 // shrink, 1), nn.ReLU())
        self.classifier = nn.Sequential(
            separable(k + 48 // shrink, k), separable(k, k), nn.Conv2d(k, classes, 1)
        )

    def forward(self, x):
        low, high = self.backbone(x)
        high = F.interpolate(self.aspp(high), low.shape[2:], mode="bilinear")
        return F.interpolate(
            self.classifier(torch.cat([high, self.low(low)], 1)), x.shape[2:], mode="bilinear"
        )


class VANBlock(nn.Module):
    """Large kernel attention, a depthwise 5x5, a dilated depthwise 7x7 and a 1x1, then an MLP with
    a depthwise 3x3."""

    def __init__(self, c, ratio):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.before, self.after = nn.Sequential(nn.Conv2d(c, c, 1), nn.GELU()), nn.Conv2d(c, c, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(c, c, 5, padding=2, groups=c),
            nn.Conv2d(c, c, 7, padding=9, dilation=3, groups=c),
            nn.Conv2d(c, c, 1),
        )
        wide = c * ratio
        self.mlp = nn.Sequential(
            nn.Conv2d(c, wide, 1),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
            nn.GELU(),
            nn.Conv2d(wide, c, 1),
        )

    def forward(self, x):
        y = self.before(self.norm1(x))
        x = x + self.after(y * self.attention(y))
        return x + self.mlp(self.norm2(x))


class VAN(nn.Sequential):
    """VAN-B2 for classification."""

    def __init__(self, shrink=1, classes=1000, depths=(3, 3, 12, 3)):
        layers, before = [], 3
        for i, (c, depth, ratio) in enumerate(zip((64, 128, 320, 512), depths, (8, 8, 4, 4))):
            c //= shrink
            taps, stride = (7, 4) if i == 0 else (3, 2)
            layers += [
                nn.Sequential(nn.Conv2d(before, c, taps, stride, taps // 2), nn.BatchNorm2d(c)),
                *(VANBlock(c, ratio) for _ in range(depth)),
            ]
            before = c
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class WaveNetLayer(nn.Module):
    """A gated causal convolution, padded on both sides and cut; residual and skip."""

    def __init__(self, c, gate, skip, dilation):
        super().__init__()
        self.cut = 2 * dilation
        self.conv = nn.Conv1d(c, gate, 3, padding=self.cut, dilation=dilation)
        self.out, self.skip = nn.Conv1d(gate // 2, c, 1), nn.Conv1d(gate // 2, skip, 1)

    def forward(self, x):
        a, b = self.conv(x)[..., : x.shape[2]].chunk(2, 1)
        y = a.tanh() * b.sigmoid()
        return (self.out(y) + x) * 0.5**0.5, self.skip(y)


class WaveNet(nn.Module):
    """24 layers in 4 cycles of dilations 1 to 32, 128 residual and skip channels, a gate of 256."""

    def __init__(self, shrink=1, layers=24, classes=30):
        super().__init__()
        c = 128 // shrink
        self.first = nn.Conv1d(1, c, 1)
        self.layers = nn.ModuleList(WaveNetLayer(c, 2 * c, c, 2 ** (i % 6)) for i in range(layers))
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv1d(c, c, 1), nn.ReLU(), nn.Conv1d(c, classes, 1)
        )

    def forward(self, x):
        x, total = self.first(x), 0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.last(total * len(self.layers) ** -0.5)


class TemporalBlock(nn.Module):
    """Two causal convolutions: padded on both sides, the end chomped off."""

    def __init__(self, c, k, taps, dilation):
        super().__init__()
        self.chomp = (taps - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(c, k, taps, padding=self.chomp, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(k, k, taps, padding=self.chomp, dilation=dilation))
        self.downsample = nn.Conv1d(c, k, 1) if c != k else nn.Identity()

    def forward(self, x):
        y = self.conv1(x)[..., : x.shape[2]].relu()
        y = self.conv2(y)[..., : x.shape[2]].relu()
        return (y + self.downsample(x)).relu()


class TCN(nn.Sequential):
    """Bai et al.'s temporal convolutional network: dilations 1, 2, 4, ..."""

    def __init__(self, c, widths, taps=3):
        super().__init__(
            *(
                TemporalBlock(before, k, taps, 2**i)
                for i, (before, k) in enumerate(zip((c, *widths), widths))
            )
        )


def head(c=4, k=4, rates=(2, 4)):
    """A small ASPP head without statistics of the batch."""
    return ASPP(c, k, rates, norm=lambda n: nn.GroupNorm(2, n))


# name -> (model of shrink=1, shape of its input): the training batches of the workloads
MODELS = {
    "deeplabv3_resnet50": (DeepLabV3, (4, 3, 480, 480)),
    "deeplabv3_resnet101": (
        lambda **sizes: DeepLabV3(**{"blocks": (3, 4, 23, 3)} | sizes),
        (4, 3, 480, 480),
    ),
    "deeplabv3plus_resnet101": (DeepLabV3Plus, (8, 3, 512, 512)),
    "van_b2": (VAN, (128, 3, 224, 224)),
    "wavenet": (WaveNet, (8, 1, 10240)),
}
