"""dilated_conv2d and dilated_conv1d: arguments -> Problem -> backend -> autograd Function. Start
reading here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from . import drivers, ops, passes, private
from .problem import Problem, pair, problem_of, single, to_int


def dilated_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`, with dilation at the price of dense convolution.

    input (N, C, H, W) or (C, H, W), weight (K, C/groups, R, S), bias (K,) or None, all of one dtype
    and on one device. stride, padding and dilation are ints or pairs (h, w); padding may be "valid"
    or "same". Returns (N, K, P, Q) or (K, P, Q), in the memory format that `F.conv2d` gives.
    Differentiable twice. Under `torch.autocast` it computes in the dtype that `F.conv2d` would.

    backend: "triton" runs the Triton kernels (float16, bfloat16, float32, float64; geometry within
    32 bits) or raises with the reason why they cannot run, "aten" runs `F.conv2d`, "auto" (or the
    environment variable TRIDIL_BACKEND) the kernels for tensors on a GPU that the active Triton
    driver serves and ATen elsewhere. Meta tensors give their shapes, whatever the backend. Modes
    and subclasses with a `__torch_function__` see `F.conv2d`. Raises TypeError and ValueError, with
    the values, where `F.conv2d` raises.
    """
    compiling = torch.compiler.is_compiling()
    if has_torch_function_variadic(input, weight, bias) or compiling and _foreign_modes():
        return _show(
            dilated_conv2d,
            torch.conv2d,
            (input, weight, bias),
            stride,
            padding,
            dilation,
            groups,
            backend=backend,
        )
    dtype, autocast = _dtype(input, weight, bias)
    if input.layout != torch.strided or weight.layout != torch.strided:
        _check_layout(input, weight, backend)
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    stride = stride if type(stride) is int else pair(stride, "stride")
    if not (type(padding) is int or isinstance(padding, str)):
        padding = pair(padding, "padding")
    dilation = dilation if type(dilation) is int else pair(dilation, "dilation")
    groups = to_int(groups, "groups")
    problem = _looked_up(
        input.shape,
        input.stride(),
        weight.shape,
        weight.stride(),
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
        dtype,
        input.device.type,
    )
    chosen, auto = _choose(problem, input, backend)
    if _runs_aten(problem, chosen, auto, input, weight):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = _run(
        input if input.dim() == 4 else input.unsqueeze(0),
        weight,
        bias,
        problem,
        dtype,
        autocast,
        auto,
    )
    return y if input.dim() == 4 else y.squeeze(0)


def problem_of_tensors(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Problem:
    """The Problem that `dilated_conv2d` runs for these arguments. Raises what it raises."""
    dtype, _ = _dtype(input, weight, bias)
    return _problem.__wrapped__(
        input.shape,
        input.stride(),
        weight.shape,
        weight.stride(),
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
        dtype,
        input.device.type,
    )


def dilated_conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    causal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv1d` on the kernels of `dilated_conv2d`, as a map of height 1, and
    causal convolution without a padded copy.

    input (N, C, L) or (C, L), weight (K, C/groups, S), bias (K,) or None. stride, padding and
    dilation are ints or tuples of one; padding may be "valid" or "same". causal=True puts
    dilation*(S-1) zeros before the first sample and none after the last, so that output t depends
    on inputs up to t*stride: it has ceil(L/stride) samples. backend, autocast, derivatives and
    errors are those of `dilated_conv2d`; causal=True with another padding than 0 raises ValueError.
    """
    compiling = torch.compiler.is_compiling()
    if has_torch_function_variadic(input, weight, bias) or compiling and _foreign_modes():
        return _show(
            dilated_conv1d,
            torch.conv1d,
            (input, weight, bias),
            stride,
            padding,
            dilation,
            groups,
            causal=causal,
            backend=backend,
        )
    dtype, autocast = _dtype(input, weight, bias)
    if input.layout != torch.strided or weight.layout != torch.strided:
        _check_layout(input, weight, backend)
        if causal:
            raise TypeError(
                f"causal=True needs strided tensors, got {input.layout} and {weight.layout}: convert them with .to_dense()"
            )
        return torch.conv1d(input, weight, bias, stride, padding, dilation, groups)
    problem = _problem_1d(input, weight, bias, stride, padding, dilation, groups, causal, dtype)
    chosen, auto = _choose(problem, input, backend)
    if _runs_aten(problem, chosen, auto, input, weight):
        if causal:
            input, weight, dilation = _padded(input, weight, dilation, problem)
        return torch.conv1d(input, weight, bias, stride, padding, dilation, groups)
    x = input if input.dim() == 3 else input.unsqueeze(0)
    y = _run(x, weight, bias, problem, dtype, autocast, auto)
    return y if input.dim() == 3 else y.squeeze(0)


def _padded(input, weight, dilation, problem: Problem) -> tuple:
    """A causal convolution's input with its zeros, weight and dilation: without taps that read
    zeros alone, where these may be too many for any memory."""
    zeros, step = problem.padding[1][0], problem.dilation[1]
    if not torch.compiler.is_compiling() and problem.beyond_int32:
        zeros = min(zeros, (problem.w - 1) // step * step)
        weight = weight[..., problem.s - 1 - zeros // step :]
        dilation = dilation if zeros else 1  # of one tap, which cuDNN would refuse
    return F.pad(input, (zeros, 0)) if zeros else input, weight, dilation


def _is_foreign(t) -> bool:
    """Whether a tensor's class has rules of its own for operators, and so none for tridil's, which
    a DTensor (it has placements) has."""
    return (
        type(t) not in ops.ORDINARY
        and getattr(type(t), "__torch_dispatch__", None)
        not in (None, torch.Tensor.__torch_dispatch__)
        and not isinstance(t, (private.FakeTensor, private.FunctionalTensor))
        and not hasattr(t, "placements")
    )


def _foreign_modes() -> list:
    """Torch function modes but for the one of a default device."""
    return [
        mode for mode in private.function_modes() if not isinstance(mode, private.DeviceContext)
    ]


def _show(function, plain, tensors, *args, **kwargs):
    """`function` before those who watch torch functions: modes and subclasses see `plain`
    (F.conv2d, F.conv1d), as with a plain layer, and where they hand it on, `function` runs; under
    torch.compile, ATen. torch.fx and classes with a true `knows_tridil` see `function` itself."""
    compiling = torch.compiler.is_dynamo_compiling()
    modes, values = _foreign_modes(), () if compiling else private.overloaded_args(tensors)
    knowing = (
        isinstance(watcher, torch.fx.Proxy) or getattr(type(watcher), "knows_tridil", False)
        for watcher in (*modes[-1:], *values)
    )
    if not (compiling or modes or values) or any(knowing):
        return handle_torch_function(function, tensors, *tensors, *args, **kwargs)
    if kwargs.pop("causal", False):
        stride, padding, dilation, groups = args
        problem = _problem_1d(*tensors, *args, True, _dtype(*tensors)[0])
        x, w, dilation = _padded(*tensors[:2], dilation, problem)
        tensors, args = (x, w, tensors[2]), (stride, padding, dilation, groups)
    if compiling:
        return plain(*tensors, *args)
    with _at_the_bottom(_Below(function, plain, kwargs)):
        return plain(*tensors, *args)


class Reroute(TorchFunctionMode):
    """Calls `function` for `plain`, with kwargs beside: what `convert` puts around layers whose own
    code calls F.conv2d or F.conv1d."""

    function: Callable[..., Any]
    plain: Callable[..., Any]
    kwargs: Mapping[str, Any]

    def __init__(
        self,
        function: Callable[..., Any],
        plain: Callable[..., Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.function, self.plain, self.kwargs = function, plain, kwargs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (
            self.function(*args, **(kwargs or {}), **self.kwargs)
            if func is self.plain
            else func(*args, **(kwargs or {}))
        )


class _Below(Reroute):
    """The same below all other modes, after the subclasses among the arguments have seen `plain`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = private.overloaded_args((*args, *kwargs.values())) if func is self.plain else ()
        if not values:
            return super().__torch_function__(func, types, args, kwargs)
        # what a subclass makes of it comes here again
        with self:
            for value in values:
                result = value.__torch_function__(func, types, args, kwargs)
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)  # raises what PyTorch raises


@contextmanager
def _at_the_bottom(mode):
    """Puts a mode below those that are active."""
    modes = [private.pop_mode() for _ in private.function_modes()]
    shown = [mode, *(other for other in reversed(modes) if not isinstance(other, _Below))]
    for other in shown:
        private.push_mode(other)
    try:
        yield
    finally:
        for _ in shown:
            private.pop_mode()
        for other in reversed(modes):
            private.push_mode(other)


def _refuse_torchscript():
    raise TypeError(
        "TorchScript cannot compile dilated_conv2d and dilated_conv1d: use torch.compile or torch.export, or script F.conv2d"
    )


for _function in (dilated_conv2d, dilated_conv1d):
    setattr(_function, "__prepare_scriptable__", _refuse_torchscript)  # noqa: B010


def _dtype(input, weight, bias) -> tuple[torch.dtype, bool]:
    """The dtype in which a convolution computes, and whether autocast is on. TypeError and
    ValueError for tensors that do not go together."""
    if not (
        isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and (bias is None or isinstance(bias, torch.Tensor))
    ):
        raise TypeError(
            f"input and weight must be tensors and bias a tensor or None, got {type(input).__name__}, {type(weight).__name__} and "
            f"{type(bias).__name__}"
        )
    device = input.device
    if weight.device != device or bias is not None and bias.device != device:
        raise ValueError(
            f"input, weight and bias must be on one device, got {device}, {weight.device}, {bias if bias is None else bias.device}"
        )
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = _autocast(input) if autocast else input.dtype
    if autocast or weight.dtype != dtype or bias is not None and bias.dtype != dtype:
        dtypes = [
            t if t is None else _autocast(t) if autocast else t.dtype for t in (input, weight, bias)
        ]
        if dtypes[2] not in (dtype, None) or dtypes[1] != dtype and input.numel():
            raise ValueError(
                f"input, weight and bias must have one dtype, got {dtypes}: convert them with .to(...)"
            )
    return dtype, autocast


def _runs_aten(problem, chosen, auto, input, weight) -> bool:
    """Whether a call is left to ATen: what `_choose` answered, and what the kernels are not for."""
    compiling = torch.compiler.is_compiling()
    return (
        chosen == "aten"
        or (not compiling and problem.is_empty)  # compiled, the operator asks
        or (compiling or private.is_tracing())
        and _to_onnx()
        or auto
        and (_is_foreign(input) or _is_foreign(weight))
    )


def _check_layout(input, weight, backend):
    """TypeError where ATen has no convolution of these layouts, or the Triton kernels are asked
    for."""
    if backend == "triton" or "sparse" in f"{input.layout}{weight.layout}":
        raise TypeError(
            f"input and weight must be strided tensors, got {input.layout} and {weight.layout}: convert them with .to_dense()"
        )


@private.mark_constant
def _to_onnx() -> bool:
    """Whether torch.onnx exports: ONNX has a Conv and no Triton. Nor has TorchScript, whose tracer
    is refused."""
    if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return True
    if private.is_tracing():
        raise TypeError(
            "torch.jit.trace cannot record the Triton backend: trace with backend='aten', or use torch.export"
        )
    return False


def _run(x, weight, bias, problem: Problem, dtype, autocast, auto) -> torch.Tensor:
    """`ops.convolve` of batched tensors, in dtype."""
    if not autocast:
        return ops.convolve(x, weight, bias, problem, auto)
    x, weight, bias = (
        _cast(x, dtype),
        _cast(weight, dtype),
        bias if bias is None else bias.to(dtype),
    )
    with private.without_autocast(x.device.type):
        return ops.convolve(x, weight, bias, problem, auto)


def _cast(t, dtype) -> torch.Tensor:
    """t in autocast's dtype. Of parameters it is the copy that autocast keeps for F.conv2d."""
    if (
        t.dtype is torch.float32
        and dtype is not torch.float32
        and t.requires_grad
        and t.is_leaf
        and type(t) in ops.ORDINARY
    ):
        copy = private.autocast_copy(t, dtype)
        if copy is not None:
            return copy
    return t.to(dtype)


def _problem_1d(input, weight, bias, stride, padding, dilation, groups, causal, dtype) -> Problem:
    if weight.dim() != 3 or input.dim() not in (2, 3):
        raise ValueError(
            f"input must be 2D (C, L) or 3D (N, C, L) and weight 3D (out_channels, in_channels/groups, S), got shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    stride, dilation = single(stride, "stride"), single(dilation, "dilation")
    padding = padding if isinstance(padding, str) else single(padding, "padding")
    if causal and padding != 0:
        raise ValueError(
            f"causal=True pads by itself, with dilation*(S-1) zeros on the left: leave padding at 0, got {padding!r}"
        )
    channels, length = input.shape[-2:]
    (k, c, taps), (s_k, s_c, s_s) = weight.shape, weight.stride()
    if not isinstance(padding, str):
        padding = (0, 0), (dilation * (taps - 1) if causal else padding, 0 if causal else padding)
    # F.conv1d makes the input contiguous first: the result's memory format depends on the weight
    # only
    return _looked_up(
        (*input.shape[:-1], 1, length),
        (channels * length, length, length, 1)[-1 - input.dim() :],
        (k, c, 1, taps),
        (s_k, s_c, taps * s_s, s_s),
        None if bias is None else bias.shape,
        (1, stride),
        padding,
        (1, dilation),
        to_int(groups, "groups"),
        dtype,
        input.device.type,
    )


# what `drivers.choose` answered: it asks the driver
_chosen: dict = {}


def _choose(problem, input, backend) -> tuple[str, bool]:
    """(what runs, "triton" or "aten"; whether a pass may run through ATen though the kernels could
    run it)."""
    variable, device = (
        os.environ.get("TRIDIL_BACKEND", "auto") if backend == "auto" else backend,
        input.device,
    )
    auto = variable == "auto"
    if (
        torch.compiler.is_compiling()
        or variable == "aten"
        or auto
        and device.type == "cpu"
        or problem.beyond_int32
    ):
        return drivers.choose(problem, device, backend), auto
    try:
        key = (
            problem.dtype,
            device,
            variable,
            passes.driver_device(device),
            auto and os.environ.get("TRIDIL_TARGET"),
        )
    # no Triton, or whatever a driver raises where it finds no device
    except Exception:
        key = None
    if key in _chosen:
        return _chosen[key], auto
    # the device of a fake tensor need not be
    is_there = not (isinstance(input, private.FakeTensor) and drivers.can_run(problem, device))
    chosen = drivers.choose(problem, device if is_there else torch.device("meta"), backend)
    if key and is_there:
        _chosen[key] = chosen
    return chosen, auto


def _looked_up(*arguments) -> Problem:
    """`_problem`, known from earlier calls where the sizes have a hash: symbolic ones have none."""
    if not torch.compiler.is_compiling():
        try:
            return _problem(*arguments)
        except TypeError:
            pass
    return _problem.__wrapped__(*arguments)


@lru_cache(maxsize=4096)
def _problem(
    x_shape,
    x_stride,
    w_shape,
    w_stride,
    bias_shape,
    stride,
    padding,
    dilation,
    groups,
    dtype,
    device_type,
) -> Problem:
    problem = problem_of(
        x_shape,
        w_shape,
        bias_shape,
        stride,
        padding,
        dilation,
        groups,
        str(dtype).removeprefix("torch."),
    )
    if len(x_shape) == 3:
        x_shape, x_stride = (1, *x_shape), (x_shape[0] * x_stride[0], *x_stride)
    # cuDNN returns float64 contiguous
    if (device_type, dtype) != ("cuda", torch.float64) and (
        passes.is_channels_last(x_shape, x_stride) or passes.is_channels_last(w_shape, w_stride)
    ):
        problem = replace(problem, layout="nhwc")
    return problem


def _autocast(t: torch.Tensor) -> torch.dtype:
    """The dtype to which autocast converts a tensor for a convolution."""
    lower = torch.get_autocast_dtype(t.device.type)
    return lower if t.dtype.is_floating_point and t.dtype != torch.float64 else t.dtype
