"""DilatedConv2d and DilatedConv1d: nn.Conv2d and nn.Conv1d whose forward is dilated_conv2d and
dilated_conv1d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.common_types import _size_1_t, _size_2_t
from torch.nn.functional import pad

from .drivers import BACKENDS
from .functional import dilated_conv1d, dilated_conv2d


class _Dilated:
    """What both layers have beside torch's: the backend. `convert` derives classes from it and from
    users' layers: it adds no other names."""

    backend: str = "auto"  # of objects pickled without one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # what a user's class does with those that derive from it is not for `convert`'s
        if "_plain" not in cls.__dict__:
            super().__init_subclass__(**kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        mark_leaf(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + (  # type: ignore[misc]
            "" if self.backend == "auto" else f", backend={self.backend!r}"
        )

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls it
        raise TypeError(
            f"TorchScript cannot compile {type(self).__name__}: use torch.compile or torch.export, or script the plain layers "
            f"(tridil.revert(model) after tridil.convert(model); the state_dict is the same)"
        )


def _finish(layer: Any, backend: str) -> None:
    """The end of __init__."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    layer.backend = backend
    mark_leaf(layer)


def run(
    function: Callable[..., torch.Tensor],
    layer: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """What nn.Conv's _conv_forward computes, by dilated_conv2d or dilated_conv1d."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input, padding = (
            pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode),
            0,
        )
    return function(
        input,
        weight,
        bias,
        layer.stride,
        padding,
        layer.dilation,
        layer.groups,
        **kwargs,
    )


def mark_leaf(layer: Any) -> None:
    """Makes torch.fx call a layer and not trace through it, as it does with those of torch.nn:
    tracers ask the object for its module. Subclasses that users derive are traced through, as those
    of nn.Conv2d are."""
    if type(layer).__module__ in (__name__, "torch.nn.utils.parametrize"):
        layer.__module__ = "torch.nn"


class DilatedConv2d(_Dilated, nn.Conv2d):
    """`torch.nn.Conv2d` with the same arguments, state_dict and results; input (N, C, H, W) or (C,
    H, W).

    backend: "auto", "triton" or "aten", as in `dilated_conv2d`. Raises ValueError for another name.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        _finish(self, backend)

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return run(dilated_conv2d, self, input, weight, bias, backend=self.backend)


class DilatedConv1d(_Dilated, nn.Conv1d):
    """`torch.nn.Conv1d` with the same arguments, state_dict and results; input (N, C, L) or (C, L).

    causal=True pads on the left only, by dilation*(kernel_size-1) zeros: output t sees no input
    after t*stride, and there are ceil(L/stride) outputs. Raises ValueError for causal=True with a
    padding or a padding_mode of its own, and for an unknown backend.
    """

    causal: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        causal: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        _finish(self, backend)
        if causal and (self.padding != (0,) or self.padding_mode != "zeros"):
            raise ValueError(
                f"causal=True pads by itself, with dilation*(kernel_size-1) zeros on the left: leave padding at 0 and padding_mode at "
                f"'zeros', got padding={self.padding} and padding_mode={self.padding_mode!r}"
            )
        self.causal = causal

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return run(
            dilated_conv1d, self, input, weight, bias, backend=self.backend, causal=self.causal
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", causal=True" if self.causal else "")
