"""DilatedConv2d: nn.Conv2d whose forward is dilated_conv2d."""
from __future__ import annotations

from torch import nn
from torch.nn.functional import pad

from .dispatch import BACKENDS
from .functional import dilated_conv2d


class DilatedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with the same arguments, state_dict and results; input (N, C, H, W) or (C, H, W).

    backend: "auto", "triton" or "aten", as in `dilated_conv2d`. Raises ValueError for another name.
    """
    backend = "auto"                                     # of objects pickled without one

    def __init__(self, *args, backend: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.backend = backend

    def _conv_forward(self, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return dilated_conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")
