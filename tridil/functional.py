"""dilated_conv2d: arguments -> Problem -> backend -> autograd Function. Start reading here."""
from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

import torch
from torch.nn import functional as F

from . import dispatch, ops
from .problem import Problem, pair, problem_of, to_int


def dilated_conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, backend: str = "auto") -> torch.Tensor:
    """`torch.nn.functional.conv2d`, with dilation at the price of dense convolution.

    input (N, C, H, W) or (C, H, W), weight (K, C/groups, R, S), bias (K,) or None, all of one dtype and on one device. stride, padding and
    dilation are ints or pairs (h, w); padding may be "valid" or "same". Returns (N, K, P, Q) or (K, P, Q), in the memory format that
    `F.conv2d` gives. Differentiable twice. Under `torch.autocast` it computes in the dtype that `F.conv2d` would.

    backend: "triton" runs the Triton kernels (float16, bfloat16, float32, float64) or raises with the reason why they cannot run, "aten" runs
    `F.conv2d`, "auto" (or the environment variable TRIDIL_BACKEND) the kernels for tensors on a GPU that the active Triton driver serves and
    ATen elsewhere. Raises TypeError and ValueError, with the values, where `F.conv2d` raises.
    """
    if not (isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))):
        raise TypeError(f"input and weight must be tensors and bias a tensor or None, got {type(input).__name__}, {type(weight).__name__} and "
                        f"{type(bias).__name__}")
    device = input.device
    if weight.device != device or bias is not None and bias.device != device:
        raise ValueError(f"input, weight and bias must be on one device, got {device}, {weight.device}, {bias if bias is None else bias.device}")
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = _autocast(input) if autocast else input.dtype
    if autocast or weight.dtype != dtype or bias is not None and bias.dtype != dtype:
        dtypes = [t if t is None else _autocast(t) if autocast else t.dtype for t in (input, weight, bias)]
        if dtypes[2] not in (dtype, None) or dtypes[1] != dtype and input.numel():
            raise ValueError(f"input, weight and bias must have one dtype, got {dtypes}: convert them with .to(...)")
    if input.layout != torch.strided or weight.layout != torch.strided:
        if backend == "triton" or "sparse" in f"{input.layout}{weight.layout}":
            raise TypeError(f"input and weight must be strided tensors, got {input.layout} and {weight.layout}: convert them with .to_dense()")
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    stride = stride if type(stride) is int else pair(stride, "stride")
    padding = padding if type(padding) in (int, str) else pair(padding, "padding")
    dilation = dilation if type(dilation) is int else pair(dilation, "dilation")
    groups = to_int(groups, "groups")
    lookup = _problem.__wrapped__ if torch.compiler.is_compiling() else _problem
    problem = lookup(input.shape, input.stride(), weight.shape, weight.stride(), None if bias is None else bias.shape,
                     stride, padding, dilation, groups, dtype, device.type)
    variable = os.environ.get("TRIDIL_BACKEND", "auto") if backend == "auto" else backend
    if _choose(problem, device, backend, variable) == "aten" or problem.is_empty:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    auto = variable == "auto"
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        with torch.autocast(device.type, enabled=False):
            y = ops.convolve(x, weight, bias, problem, auto)
    else:
        y = ops.convolve(x, weight, bias, problem, auto)
    return y if input.dim() == 4 else y.squeeze(0)


# what `dispatch.choose` answered: it asks the driver
_chosen: dict = {}


def _choose(problem, device, backend, variable) -> str:
    if torch.compiler.is_compiling() or variable == "aten" or variable == "auto" and device.type == "cpu":
        return dispatch.choose(problem, device, backend)
    try:
        key = problem.dtype, device, variable, *ops.switches(device)
    except Exception:                   # no Triton, or whatever a driver raises where it finds no device
        return dispatch.choose(problem, device, backend)
    if key not in _chosen:
        _chosen[key] = dispatch.choose(problem, device, backend)
    return _chosen[key]


@lru_cache(maxsize=4096)
def _problem(x_shape, x_stride, w_shape, w_stride, bias_shape, stride, padding, dilation, groups, dtype, device_type) -> Problem:
    problem = problem_of(x_shape, w_shape, bias_shape, stride, padding, dilation, groups, str(dtype).removeprefix("torch."))
    if len(x_shape) == 3:
        x_shape, x_stride = (1, *x_shape), (x_shape[0] * x_stride[0], *x_stride)
    # cuDNN returns float64 contiguous
    if (device_type, dtype) != ("cuda", torch.float64) and (ops.is_channels_last(x_shape, x_stride) or ops.is_channels_last(w_shape, w_stride)):
        problem = replace(problem, layout="nhwc")
    return problem


def _autocast(t: torch.Tensor) -> torch.dtype:
    """The dtype to which autocast converts a tensor for a convolution."""
    lower = torch.get_autocast_dtype(t.device.type)
    return lower if t.dtype.is_floating_point and t.dtype != torch.float64 else t.dtype
