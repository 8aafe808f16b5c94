"""Transposed convolutions: `dilated_conv_transpose2d` and 1d, and their layers. The forward pass is
dgrad of the convolution that they transpose, whose strided kernels multiply no zeros; their
gradients are fprop and wgrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.common_types import _size_1_t, _size_2_t
from torch.overrides import has_torch_function_variadic

from . import functional, ops, passes, private
from .module import _Dilated, _finish
from .problem import Problem, pair, single, to_int


def dilated_conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv_transpose2d` on the kernels of `dilated_conv2d`.

    input (N, C, H, W) or (C, H, W), weight (C, K/groups, R, S), bias (K,) or None. Returns (N, K, P,
    Q) or (K, P, Q) with P = (H-1)*stride - 2*padding + dilation*(R-1) + output_padding + 1.
    Differentiable twice. backend, autocast and errors are those of `dilated_conv2d`; an
    output_padding of stride or more runs through ATen.
    """
    return _run(2, input, weight, bias, stride, padding, output_padding, groups, dilation, backend)


def dilated_conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv_transpose1d`: `dilated_conv_transpose2d` of input (N, C, L) or (C,
    L) and weight (C, K/groups, S)."""
    return _run(1, input, weight, bias, stride, padding, output_padding, groups, dilation, backend)


def _run(dims, input, weight, bias, stride, padding, output_padding, groups, dilation, backend):
    compiling = torch.compiler.is_compiling()
    plain: Any = torch.conv_transpose2d if dims == 2 else torch.conv_transpose1d
    args = stride, padding, output_padding, groups, dilation
    if (
        has_torch_function_variadic(input, weight, bias)
        or compiling
        and functional._foreign_modes()
    ):
        function = dilated_conv_transpose2d if dims == 2 else dilated_conv_transpose1d
        return functional._show(function, plain, (input, weight, bias), *args, backend=backend)
    dtype, autocast = functional._dtype(input, weight, bias)
    if input.layout != torch.strided or weight.layout != torch.strided:
        functional._check_layout(input, weight, backend)
        return plain(input, weight, bias, *args)
    problem = problem_of(dims, input, weight, bias, *args, dtype)
    if problem is None and backend == "triton":
        raise NotImplementedError(
            f"the Triton kernels cannot run output_padding {output_padding} with stride {stride}: it must be smaller than the stride"
        )
    chosen, auto = (
        ("aten", True) if problem is None else functional._choose(problem, input, backend)
    )
    if problem is None or functional._runs_aten(problem, chosen, auto, input, weight):
        return plain(input, weight, bias, *args)
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if autocast:
        x, weight = functional._cast(x, dtype), functional._cast(weight, dtype)
        bias = bias if bias is None else bias.to(dtype)
        with private.without_autocast(x.device.type):
            y = ops.transpose(x, weight, bias, problem, auto)
    else:
        y = ops.transpose(x, weight, bias, problem, auto)
    return y if input.dim() == dims + 2 else y.squeeze(0)


def problem_of(
    dims: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: Any,
    dilation: Any,
    dtype: torch.dtype,
) -> Problem | None:
    """The convolution that is transposed: its x is the result, its y the input; None where
    output_padding reaches the stride, for there is no such convolution. Raises ValueError and
    TypeError, with the values, where F.conv_transpose raises."""
    if weight.dim() != dims + 2 or input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"input must be {dims + 1}D or {dims + 2}D and weight {dims + 2}D (in_channels, out_channels/groups, taps), "
            f"got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )

    def sides(value, name):
        return (
            pair(value, name) if dims == 2 else (0 if "padding" in name else 1, single(value, name))
        )

    stride, dilation = sides(stride, "stride"), sides(dilation, "dilation")
    padding, extra = sides(padding, "padding"), sides(output_padding, "output_padding")
    groups, c, k = to_int(groups, "groups"), weight.shape[0], weight.shape[1]
    for name, value, least in (
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
        ("output_padding", extra, 0),
    ):
        if value[0] < least or value[1] < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if groups < 1 or c % groups:
        raise ValueError(
            f"weight {tuple(weight.shape)} has {c} input channels, which groups={groups} must divide"
        )
    if input.shape[-1 - dims] != c:
        raise ValueError(
            f"input {tuple(input.shape)} has {input.shape[-1 - dims]} channels, but weight {tuple(weight.shape)} expects {c}"
        )
    if bias is not None and tuple(bias.shape) != (k * groups,):
        raise ValueError(
            f"bias must have shape ({k * groups},), one element per output channel, got {tuple(bias.shape)}"
        )
    n = input.shape[0] if input.dim() == dims + 2 else 1
    h, w = (1, input.shape[-1])[-2:] if dims == 1 else (input.shape[-2], input.shape[-1])
    r, s = (1, weight.shape[-1]) if dims == 1 else (weight.shape[-2], weight.shape[-1])
    sizes = []
    for size, taps, st, pad, more, rate in zip((h, w), (r, s), stride, padding, extra, dilation):
        if more >= max(st, rate):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, got {extra}, {stride} and {dilation}"
            )
        sizes.append((size - 1) * st - 2 * pad + rate * (taps - 1) + more + 1)
    if (h < 1 or w < 1) and n and c:  # last, for a compiler may not know it
        raise ValueError(
            f"only the batch or the channels of input may be empty, got {tuple(input.shape)}"
        )
    if sizes[0] < 1 or sizes[1] < 1:
        raise ValueError(
            f"the result would have size {sizes[0]}x{sizes[1]}: pad less, got padding {padding}"
        )
    if extra[0] >= stride[0] or extra[1] >= stride[1]:
        return None
    last = (
        passes.has_channels_last(weight)
        or dims == 2
        and passes.has_channels_last(input if input.dim() == 4 else input.unsqueeze(0))
    )
    double_on_cuda = (input.device.type, dtype) == ("cuda", torch.float64)
    return Problem(
        n,
        k * groups,
        sizes[0],
        sizes[1],
        c,
        r,
        s,
        stride,
        ((padding[0], padding[0]), (padding[1], padding[1])),
        dilation,
        groups,
        str(dtype).removeprefix("torch."),
        "nhwc" if last and not double_on_cuda else "nchw",
    )


# ---- layers
class DilatedConvTranspose2d(_Dilated, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with the same arguments, state_dict and results. backend: as in
    `dilated_conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_2_t = 1,
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        _finish(self, backend)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _forward(self, dilated_conv_transpose2d, 2, input, output_size)


class DilatedConvTranspose1d(_Dilated, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with the same arguments, state_dict and results. backend: as in
    `dilated_conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: _size_1_t = 0,
        output_padding: _size_1_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_1_t = 1,
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        _finish(self, backend)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _forward(self, dilated_conv_transpose1d, 1, input, output_size)


def _forward(layer: Any, function: Any, dims: int, input, output_size) -> torch.Tensor:
    """What nn.ConvTranspose's forward computes, by `function`."""
    extra = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    )
    return function(
        input,
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        extra,
        layer.groups,
        layer.dilation,
        backend=layer.backend,
    )
