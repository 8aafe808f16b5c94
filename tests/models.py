"""Models in plain torch, as people build them: DeepLabV3-ResNet50 and a TCN, of any width, and a small ASPP head."""
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
        self.downsample = nn.Sequential(*conv_bn(c, 4 * width, 1, stride)) if downsample else nn.Identity()

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class ASPP(nn.Module):
    """DeepLab's head: a 1x1 branch, one per rate, and the pooled image."""

    def __init__(self, c, k, rates, norm=nn.BatchNorm2d):
        super().__init__()
        self.convs = nn.ModuleList([nn.Sequential(*conv_bn(c, k, 1, norm=norm), nn.ReLU())])
        self.convs += [nn.Sequential(*conv_bn(c, k, 3, dilation=rate, norm=norm), nn.ReLU()) for rate in rates]
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, k, 1))
        self.project = nn.Sequential(*conv_bn((2 + len(rates)) * k, k, 1, norm=norm), nn.ReLU())

    def forward(self, x):
        pooled = self.pooling(x).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(conv(x) for conv in self.convs), pooled], 1))


class DeepLabV3(nn.Module):
    """DeepLabV3 on ResNet50 at output stride 8, all of the widths divided by `shrink`."""

    def __init__(self, shrink=1, classes=21):
        super().__init__()
        c = 64 // shrink
        self.stem = nn.Sequential(nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        layers, dilation = [], 1
        for i, (blocks, stride, dilate) in enumerate([(3, 1, False), (4, 2, False), (6, 2, True), (3, 2, True)]):
            before, width = dilation, (64 << i) // shrink
            if dilate:
                dilation, stride = dilation * stride, 1
            first = Bottleneck(c, width, stride, before, True)
            c = 4 * width
            layers.append(nn.Sequential(first, *(Bottleneck(c, width, 1, dilation, False) for _ in range(blocks - 1))))
        self.layers = nn.Sequential(*layers)
        k = 256 // shrink
        self.classifier = nn.Sequential(ASPP(c, k, (12, 24, 36)), *conv_bn(k, k, 3), nn.ReLU(), nn.Conv2d(k, classes, 1))

    def forward(self, x):
        return F.interpolate(self.classifier(self.layers(self.stem(x))), x.shape[2:], mode="bilinear")


class TemporalBlock(nn.Module):
    """Two causal convolutions: padded on both sides, the end chomped off."""

    def __init__(self, c, k, taps, dilation):
        super().__init__()
        self.chomp = (taps - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(c, k, taps, padding=self.chomp, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(k, k, taps, padding=self.chomp, dilation=dilation))
        self.downsample = nn.Conv1d(c, k, 1) if c != k else nn.Identity()

    def forward(self, x):
        y = self.conv1(x)[..., :x.shape[2]].relu()
        y = self.conv2(y)[..., :x.shape[2]].relu()
        return (y + self.downsample(x)).relu()


class TCN(nn.Sequential):
    """Bai et al.'s temporal convolutional network: dilations 1, 2, 4, ..."""

    def __init__(self, c, widths, taps=3):
        super().__init__(*(TemporalBlock(before, k, taps, 2**i) for i, (before, k) in enumerate(zip((c, *widths), widths))))


def head(c=4, k=4, rates=(2, 4)):
    """A small ASPP head without statistics of the batch."""
    return ASPP(c, k, rates, norm=lambda n: nn.GroupNorm(2, n))
