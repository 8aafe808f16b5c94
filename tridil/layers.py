"""Layers for `kernelize` of Hugging Face's kernels, which gives their forward to layers that have the
state of nn.Conv2d and nn.Conv1d: no state of their own."""

from __future__ import annotations

import torch
from torch import nn

from .functional import dilated_conv1d, dilated_conv2d
from .module import run


class _Stateless(nn.Module):
    """What `kernelize` asks of a layer, and the state that its forward finds."""

    has_backward = True
    can_torch_compile = True
    weight: torch.Tensor
    bias: torch.Tensor | None


class DilatedConv2d(_Stateless):
    """The forward of nn.Conv2d by `dilated_conv2d`; input (N, C, H, W) or (C, H, W)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return run(dilated_conv2d, self, input, self.weight, self.bias, backend="auto")


class DilatedConv1d(_Stateless):
    """The forward of nn.Conv1d by `dilated_conv1d`; input (N, C, L) or (C, L)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return run(dilated_conv1d, self, input, self.weight, self.bias, backend="auto")
