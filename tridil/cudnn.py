"""How long ATen takes a pass: an estimate in its favour, for where nothing was measured.

cuDNN multiplies every tap, padding included, and hides little of its memory traffic: both times are
added. Depthwise layers cost the instructions of kernels without products of matrices. The constants
stand in assumed.py with the published and measured rows that they were fitted to; `python
perf/published.py` judges them by other rows.
"""

from __future__ import annotations

from math import prod

from . import assumed
from .devices import Device
from .problem import DTYPE_BYTES, Problem


def kind(problem: Problem, pass_: str) -> str:
    """What the estimate depends on: "depthwise", "strided dgrad" (dilated, too: both rows are),
    "uneven groups" (their channels are no power of two), "grouped", "pointwise" (1x1 taps), "narrow"
    (a tensor of few, unaligned channels), "far" (dilation 12 or more, of wgrad 9) or "dense"."""
    if problem.groups == problem.c and problem.groups > 1:
        return "depthwise"
    if pass_ == "dgrad" and problem.stride != (1, 1) and problem.dilation != (1, 1):
        return "strided dgrad"
    if problem.groups > 1:
        each = problem.c // problem.groups, problem.k // problem.groups
        # of float32 no row tells
        uneven = DTYPE_BYTES[problem.dtype] == 2 and any(n & (n - 1) for n in each)
        return "uneven groups" if uneven else "grouped"
    if problem.r * problem.s == 1:
        return "pointwise"
    if _is_narrow(problem, problem.c) or _is_narrow(problem, problem.k):
        return "narrow"
    return "far" if max(problem.dilation) >= (9 if pass_ == "wgrad" else 12) else "dense"


def seconds(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> float:
    """Seconds of ATen for one pass on tensors in the problem's memory format, its copies included;
    `assumed.FAVOUR` times as fast as the fit."""
    if problem.is_empty:
        return assumed.LAUNCH
    found, hertz = kind(problem, pass_), device.sms * device.clock * 1e9
    shapes = {"x": problem.x_shape, "w": problem.w_shape, "y": problem.y_shape}
    times = dict.fromkeys(
        shapes,
        assumed.CUDNN_TRAFFIC["nhwc" if found in ("depthwise", "pointwise") else problem.layout],
    )
    if found == "depthwise":
        pixels = (
            prod(shapes["x"]) * problem.k // problem.c if pass_ == "dgrad" else prod(shapes["y"])
        )
        scalar = device.fma[problem.dtype == "float64"] * assumed.ATTAINED
        work = (
            max(pixels * _instructions(problem, pass_) / 128, problem.dense_macs / scalar) / hertz
        )
    else:
        share = assumed.CUDNN[pass_] * (
            assumed.CUDNN_FAR.get(device.target, 1) if found == "far" else 1
        )
        share = assumed.CUDNN_STRIDED if found == "strided dgrad" else share
        share = assumed.CUDNN_UNEVEN[problem.layout] if found == "uneven groups" else share
        work = _macs(problem, pass_) / (device.mma_rate(problem.dtype, precision) * share * hertz)
        times |= {
            name: assumed.CUDNN_NARROW[pass_]
            for name, c in (("x", problem.c), ("y", problem.k))
            if _is_narrow(problem, c)
        }
    memory = (
        DTYPE_BYTES[problem.dtype]
        * sum(times[name] * prod(shape) for name, shape in shapes.items())
        / (device.dram * 1e9)
    )
    if found in ("depthwise", "pointwise"):
        return (max(work, memory) + assumed.LAUNCH) / assumed.FAVOUR
    if pass_ == "wgrad" and 1 in (problem.h, problem.w):
        work, memory = work * assumed.CUDNN_1D_WGRAD, memory * assumed.CUDNN_1D_WGRAD
    copies = 3 if problem.layout == "nchw" or found == "narrow" else 0  # of x, w and y
    return (work + memory + (1 + copies) * assumed.LAUNCH) / assumed.FAVOUR


def _is_narrow(problem: Problem, channels: int) -> bool:
    return channels <= 32 and channels * DTYPE_BYTES[problem.dtype] % 16 > 0


def _macs(problem: Problem, pass_: str) -> float:
    """Multiply-accumulates that cuDNN executes: all taps, of a strided dgrad at every pixel of dx;
    channels in whole blocks."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    macs = (
        problem.dense_macs
        / (c * k)
        * (prod(problem.stride) if kind(problem, pass_) == "strided dgrad" else 1)
    )
    if kind(problem, pass_) == "uneven groups":
        return macs * c * k
    # groups of fewer than 16 channels share a block
    if problem.groups > 1:
        return macs * _up(c, 32) * _up(k, 32) * min(1, max(c, k) / 16)
    reduced, out = (k, c) if pass_ == "dgrad" else (c, k)
    return macs * _up(reduced, 16) * _up(out, 64)


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def _instructions(problem: Problem, pass_: str) -> float:
    """Instructions of a depthwise layer per pixel; none, so that memory limits, where cuDNN runs a
    layer that is not dilated: ATen leaves it those in channels_last and in float16
    (`use_cudnn_depthwise`), and no row tells how fast they are."""
    if problem.dilation == (1, 1) and (problem.layout == "nhwc" or problem.dtype == "float16"):
        return 0
    extent = max((t - 1) * d + 1 for t, d in zip((problem.r, problem.s), problem.dilation))
    if problem.layout == "nhwc" and problem.stride == (1, 1) and extent <= 5:
        return assumed.DEPTHWISE_NEAR[pass_]
    pixel, tap = assumed.DEPTHWISE_INSTRUCTIONS[problem.layout, pass_]
    return pixel + tap * problem.r * problem.s
