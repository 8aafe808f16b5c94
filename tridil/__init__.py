"""Triton kernels for dilated (atrous) convolution: `dilated_conv2d` is `F.conv2d`, `DilatedConv2d`
is `nn.Conv2d`, `convert` a whole model."""

from . import layers
from .convert import convert, revert, scan
from .enabling import disable, enable, enabled
from .functional import dilated_conv1d, dilated_conv2d
from .module import DilatedConv1d, DilatedConv2d
from .multi_rate import MultiRateConv2d, multi_rate_conv1d, multi_rate_conv2d
from .problem import Problem
from .transposed import (
    DilatedConvTranspose1d,
    DilatedConvTranspose2d,
    dilated_conv_transpose1d,
    dilated_conv_transpose2d,
)
from .tuner import tune
from .verdict import explain

__version__ = "0.1.0"
__all__ = [
    "DilatedConv1d",
    "DilatedConv2d",
    "DilatedConvTranspose1d",
    "DilatedConvTranspose2d",
    "MultiRateConv2d",
    "Problem",
    "convert",
    "dilated_conv1d",
    "dilated_conv2d",
    "dilated_conv_transpose1d",
    "dilated_conv_transpose2d",
    "disable",
    "enable",
    "enabled",
    "explain",
    "layers",
    "multi_rate_conv1d",
    "multi_rate_conv2d",
    "revert",
    "scan",
    "tune",
]
