"""Triton kernels for dilated (atrous) 2D convolution: `dilated_conv2d` is `F.conv2d`, `DilatedConv2d` is `nn.Conv2d`."""
from .functional import dilated_conv2d
from .module import DilatedConv2d
from .problem import Problem

__version__ = "0.1.0"
__all__ = ["DilatedConv2d", "Problem", "dilated_conv2d"]
