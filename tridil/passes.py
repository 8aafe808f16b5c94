"""One pass on tensors: in which memory formats, and what runs it, the Triton kernels or ATen.
Imports no Triton until kernels run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch

from . import choice, drivers, private
from .problem import Problem

# stride, padding (h_lo, h_hi, w_lo, w_hi), dilation, groups
Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether ATen takes 4D strides for channels_last (c10's `is_channels_last_strides_2d`);
    ambiguous ones are contiguous."""
    (n, c, h, w), (s_n, s_c, s_h, s_w) = shape, strides
    return (
        s_c != 0
        and 0 not in shape[1:]
        and c * s_c <= s_w
        and w * s_w <= s_h
        and h * s_h <= s_n
        and h * s_h != s_c
        # compilers may not know it
        and (torch.compiler.is_compiling() or type(n) is not int or n != 0)
    )


def has_channels_last(t: torch.Tensor) -> bool:
    """`is_channels_last` of a tensor, 4D or 3D."""
    shape, strides = t.shape, t.stride()
    return is_channels_last(
        map_shape(shape),
        strides if len(shape) == 4 else (*strides[:2], shape[2] * strides[2], strides[2]),
    )


def map_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The 4D shape of a tensor, 4D or 3D."""
    return shape if len(shape) == 4 else (*shape[:2], 1, shape[2])


# what runs a pass: (pass, shapes, geometry, dtype, device, switches) -> function of (a, b, bias);
# forgotten when a config may have changed
_runs: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}
choice.listeners.append(_runs.clear)


@lru_cache(maxsize=1)
def _launch():  # imports Triton
    from . import launch

    return launch


def driver_device(device: torch.device) -> int | None:
    """The device of Triton's driver, where tensors are not on a GPU that says it. Raises where
    Triton is missing or has no driver."""
    return None if device.type == "cuda" else _launch().device()


def one_copy_of(t: torch.Tensor) -> AbstractContextManager[None]:
    """Within the context, kernels that read t in the same memory format share one copy; before
    kernels ran there is nothing to share."""
    launch = sys.modules.get(f"{__package__}.launch")
    return launch.one_copy_of(t) if launch else nullcontext()


def run(
    pass_: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    channels_last: bool,
    auto: bool,
) -> torch.Tensor:
    """One pass on its two tensors, under their device; channels_last is the format of the result,
    auto whether ATen may run it."""
    if len(x_shape) == 3:
        with private.without_views():
            return run(
                pass_,
                a.unsqueeze(2),
                b.unsqueeze(2),
                bias,
                map_shape(x_shape),
                map_shape(w_shape),
                geometry,
                channels_last,
                auto,
            ).squeeze(2)
    others = pass_ == "wgrad" and has_other_format(b, channels_last)
    prepared = _lookup(pass_, a, bias, x_shape, w_shape, geometry, channels_last, others, auto)
    if a.is_cuda and a.device.index != torch.cuda.current_device():
        with torch.cuda.device(a.device):
            return prepared(a, b, bias)
    return prepared(a, b, bias)


def has_other_format(t: torch.Tensor, channels_last: bool) -> bool:
    """Whether a 4D tensor has not that memory format, but the other one."""
    wanted, other = torch.contiguous_format, torch.channels_last
    if channels_last:
        wanted, other = other, wanted
    return not t.is_contiguous(memory_format=wanted) and t.is_contiguous(memory_format=other)


def _lookup(pass_, a, bias, x_shape, w_shape, geometry, channels_last, others, auto):
    """others: whether the operands of wgrad have another format than its result."""
    dtype, device, cudnn = a.dtype, a.device, torch.backends.cudnn
    key = (
        pass_,
        x_shape,
        w_shape,
        geometry,
        channels_last,
        others,
        auto,
        bias is None,
        dtype,
        device,
        driver_device(device),
        os.environ.get("TRIDIL_TARGET"),
        cudnn.benchmark,
        dtype is torch.float32 and cudnn.conv.fp32_precision,
    )
    run = _runs.get(key)
    if run is None:
        with torch.cuda.device(device) if a.is_cuda else nullcontext():
            run = _prepare(
                pass_,
                bias is not None,
                x_shape,
                w_shape,
                geometry,
                channels_last,
                others,
                auto,
                dtype,
                device,
            )
        if len(_runs) >= 4096:
            _runs.clear()
        _runs[key] = run
    return run


def _prepare(
    pass_, has_bias, x_shape, w_shape, geometry, channels_last, others, auto, dtype, device
):
    stride, padding, dilation, groups = geometry
    problem = Problem(
        *x_shape,
        w_shape[0],
        *w_shape[2:],
        stride,
        (padding[:2], padding[2:]),
        dilation,
        groups,
        str(dtype).removeprefix("torch."),
        "nhwc" if channels_last else "nchw",
        ("nchw" if channels_last else "nhwc") if others else "",
    )
    if problem.is_empty:
        return partial(
            _without_products,
            {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_],
            channels_last,
        )
    # of this device, not of the one that was current
    target = drivers.target()
    precision = drivers.fp32_precision(target) if dtype == torch.float32 else "ieee"
    allow_aten, unfit = auto and all(lo == hi for lo, hi in problem.padding), problem.beyond_int32
    if unfit and not allow_aten:
        raise NotImplementedError(f"the Triton kernels cannot run this convolution: {unfit}")
    config = (
        None if unfit else choice.resolve(problem, pass_, target, precision, device, allow_aten)
    )
    if config is None:
        return partial(aten, problem, pass_)
    return _launch().prepare(problem, pass_, config, precision, "bias" if has_bias else "")


def is_all_aten(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    channels_last: bool,
) -> bool:
    """Whether ATen runs every pass that a call on these tensors may need."""
    wgrad_last = has_channels_last(x if w.shape[1] == 1 else w)
    needed = (
        ("fprop", True, channels_last),
        ("dgrad", x.requires_grad, channels_last),
        ("wgrad", w.requires_grad, wgrad_last),
    )
    return all(
        getattr(
            _lookup(
                pass_,
                x,
                bias if pass_ == "fprop" else None,
                map_shape(x.shape),
                map_shape(w.shape),
                geometry,
                nhwc,
                pass_ == "wgrad" and has_other_format(x if x.dim() == 4 else x.unsqueeze(2), nhwc),
                True,
            ),
            "func",
            None,
        )
        is aten
        for pass_, need, nhwc in needed
        if need
    )


def _without_products(shape, channels_last, a, b, bias=None):
    """Without images or pixels there is nothing to launch: the result is zero, or the bias."""
    out = empty(a, shape, channels_last).zero_()
    return out if bias is None else out.add_(bias.view(1, -1, 1, 1))


def formatted(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t in a memory format, strides of sides of length 1 included: ATen reads the format off them."""
    wanted = _strides(t.shape, channels_last)
    if t.stride() == wanted:
        return t
    if t.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    ):
        with private.without_views():
            return t.as_strided(t.shape, wanted)
    return torch.empty_strided(t.shape, wanted, dtype=t.dtype, device=t.device).copy_(t)


def _strides(shape, channels_last):
    _, c, h, w = map_shape(shape)
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return strides if len(shape) == 4 else (*strides[:2], strides[3])


def aten(
    problem: Problem,
    pass_: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One pass through ATen, in problem.layout. Raises NotImplementedError for padding that differs
    on both sides, which ATen does not have."""
    if any(lo != hi for lo, hi in problem.padding):
        raise NotImplementedError(f"ATen's convolution has no padding {problem.padding}")
    geometry = (
        problem.stride,
        [lo for lo, _ in problem.padding],
        problem.dilation,
        False,
        [0, 0],
        problem.groups,
    )
    nhwc = problem.layout == "nhwc"
    with private.below_autograd():
        if pass_ == "fprop":
            return formatted(
                torch.ops.aten.convolution(a, formatted(b, nhwc), bias, *geometry), nhwc
            )
        if pass_ == "dgrad":
            # of x only sizes and format are read: ATen copies dy into its format
            x, w = empty(a, problem.x_shape, nhwc), formatted(b, nhwc)
        else:
            x, w = b, empty(b, problem.w_shape, nhwc)
        mask = [pass_ == "dgrad", pass_ == "wgrad", False]
        return formatted(
            torch.ops.aten.convolution_backward(a, x, w, None, *geometry, mask)[mask.index(True)],
            nhwc,
        )


def empty(like: torch.Tensor, shape: Sequence[int], channels_last: bool) -> torch.Tensor:
    """A tensor of like's dtype and device, of 4 or 3 dimensions, in a memory format."""
    if len(shape) == 3 and channels_last:
        return torch.empty_strided(
            shape, _strides(shape, True), dtype=like.dtype, device=like.device
        )
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
