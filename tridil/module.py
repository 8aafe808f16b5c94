"""DilatedConv2d and DilatedConv1d: nn.Conv2d and nn.Conv1d whose forward is dilated_conv2d and dilated_conv1d."""
from __future__ import annotations

from torch import nn
from torch.nn.functional import pad

from .dispatch import BACKENDS
from .functional import dilated_conv1d, dilated_conv2d


class _Dilated:
    """What both layers have beside torch's: the backend."""
    backend = "auto"                                     # of objects pickled without one

    def __init__(self, *args, backend: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.backend = backend

    def _pad(self, input):
        """input and the zero padding that is left to do"""
        if self.padding_mode == "zeros":
            return input, self.padding
        return pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def __prepare_scriptable__(self):                    # torch.jit.script calls it
        raise TypeError(f"TorchScript cannot compile {type(self).__name__}: use torch.compile or torch.export, or script the plain layers "
                        f"(tridil.revert(model) after tridil.convert(model); the state_dict is the same)")


class DilatedConv2d(_Dilated, nn.Conv2d):
    """`torch.nn.Conv2d` with the same arguments, state_dict and results; input (N, C, H, W) or (C, H, W).

    backend: "auto", "triton" or "aten", as in `dilated_conv2d`. Raises ValueError for another name.
    """

    def _conv_forward(self, input, weight, bias):
        input, padding = self._pad(input)
        return dilated_conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, backend=self.backend)


class DilatedConv1d(_Dilated, nn.Conv1d):
    """`torch.nn.Conv1d` with the same arguments, state_dict and results; input (N, C, L) or (C, L).

    causal=True pads on the left only, by dilation*(kernel_size-1) zeros: output t sees no input after t*stride, and there are ceil(L/stride)
    outputs. Raises ValueError for causal=True with a padding or a padding_mode of its own, and for an unknown backend.
    """
    causal = False

    def __init__(self, *args, causal: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if causal and (self.padding != (0,) or self.padding_mode != "zeros"):
            raise ValueError(f"causal=True pads by itself, with dilation*(kernel_size-1) zeros on the left: leave padding at 0 and padding_mode at "
                             f"'zeros', got padding={self.padding} and padding_mode={self.padding_mode!r}")
        self.causal = causal

    def _conv_forward(self, input, weight, bias):
        input, padding = self._pad(input)
        return dilated_conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups, causal=self.causal, backend=self.backend)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", causal=True" if self.causal else "")
