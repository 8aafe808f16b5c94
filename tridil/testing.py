"""What tests and perf share: error budgets, random problems and tensors. Torch only."""

from __future__ import annotations

import random
from typing import Any

import torch

from .drivers import interpreted
from .problem import Problem


def reduction_depth(problem: Problem, pass_: str) -> int:
    """Products summed into one element of a pass's result, at most."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    taps = problem.r * problem.s
    return max(
        1, {"fprop": taps * c, "dgrad": taps * k, "wgrad": problem.n * problem.p * problem.q}[pass_]
    )


def budget(
    expected: torch.Tensor,
    dtype: torch.dtype,
    depth: int,
    precision: str = "ieee",
    pass_: str = "fprop",
) -> torch.Tensor:
    """Elementwise error allowed to a result of `dtype` that sums `depth` products of random sign,
    given its float64 value.

    The result is rounded once: half an ulp. Rounding each partial sum errs by about sqrt(depth) * u
    * rms, u the unit roundoff of the accumulator (float32; float64 for float64) and rms the
    result's root mean square, in wgrad at least that of the tap, since taps that read padding sum
    less (Higham and Mary, "Sharper probabilistic backward error analysis for basic linear algebra
    kernels with random data", SIAM J. Sci. Comput. 42, 2020); eight times that is allowed. Tensor
    cores truncate each block's sum instead (Fasi et al., "Numerical behavior of NVIDIA tensor
    cores", PeerJ Comput. Sci. 7, 2021), a bias of depth/24 * u * rms for blocks of 16; three times
    that is allowed. tf32 truncates both operands to 10 mantissa bits: every product errs by up to
    2**-9, their sum by about 2**-10 * rms; eight times that is allowed.
    """
    info = torch.finfo(dtype)
    rms = expected.square().mean().sqrt() if expected.numel() else expected.sum()
    if pass_ == "wgrad" and expected.numel():
        rms = rms.maximum(expected.square().mean((0, 1), keepdim=True).sqrt())
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    allowed = (
        expected.abs() * (info.eps / 2) * (1 + 2**-6)
        + (8 * depth**0.5 + depth / 8) * accumulator * rms
        + info.smallest_normal * info.eps
    )
    return (
        allowed + 2**-9 * expected.abs() + 2**-7 * rms
        if precision == "tf32" and dtype == torch.float32
        else allowed
    )


def check(
    actual: torch.Tensor,
    expected: torch.Tensor,
    problem: Problem,
    pass_: str,
    precision: str = "ieee",
) -> tuple[float, float]:
    """(error, budget) of the element that uses most of its budget; NaN and Inf in `actual` count as
    infinite error.

    actual: a pass's result in its dtype; expected: its float64 value. The result is wrong when
    error > budget.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"shapes differ: got {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    if not actual.numel():
        return 0.0, 0.0
    allowed = budget(expected, actual.dtype, reduction_depth(problem, pass_), precision, pass_)
    if actual.dtype == torch.bfloat16 and interpreted():
        # Triton's interpreter truncates to bfloat16
        allowed = allowed * 2
    error = (actual.double() - expected).abs().nan_to_num(nan=float("inf"))
    worst = (error / allowed).argmax()
    return error.flatten()[worst].item(), allowed.flatten()[worst].item()


def random_tensors(
    problem: Problem, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """(x, w, bias, dy) of a problem, normally distributed, the weights scaled so that results are
    of order 1. Drawn on the device."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, depth = getattr(torch, problem.dtype), reduction_depth(problem, "fprop")
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (problem.x_shape, problem.w_shape, (problem.k,), problem.y_shape)
    scales = (1.0, depth**-0.5, 1.0, 1.0)
    return tuple(
        torch.randn(shape, generator=g, dtype=drawn, device=device).mul_(scale).to(dtype)
        for shape, scale in zip(shapes, scales)
    )


def random_problem(rng: random.Random, dtype: str = "float16", max_macs: float = 2e5) -> Problem:
    """A small problem of random geometry: strides, dilations per axis and beyond the map,
    asymmetric and excessive padding, even and 1D filters, 1-pixel maps, groups and depthwise,
    narrow, ragged and aligned channels, both layouts; few enough MACs and tiles for the
    interpreter."""
    while True:
        r, s = rng.choice(
            [
                (3, 3),
                (3, 3),
                (1, 1),
                (2, 2),
                (1, 3),
                (3, 1),
                (5, 5),
                (4, 2),
                (1, 7),
                (7, 7),
                (1, 33),
            ]
        )
        h, w = (rng.choice([1, 2, 3, 5, 7, 8, 9, 12, 16, 21]) for _ in range(2))
        dilation: Any = tuple(rng.choice([1, 1, 2, 2, 3, 4, 5, 8, 13, 30]) for _ in range(2))
        stride: Any = tuple(rng.choice([1, 1, 1, 2, 2, 3, 5]) for _ in range(2))
        padding: Any = tuple(
            tuple(
                rng.choice([d * (t - 1) // 2, d * (t - 1) // 2, 0, rng.randrange(d * t + 2)])
                for _ in range(2)
            )
            for d, t in zip(dilation, (r, s))
        )
        groups = rng.choice([1, 1, 1, 1, 2, 3, 5])
        per_c, per_k = (
            rng.choice([1, 2, 3, 4, 8, 12, 16, 17, 24, 25, 32, 40, 64]) for _ in range(2)
        )
        if rng.random() < 0.15:
            groups, per_c, per_k = rng.choice([4, 7, 16, 24]), 1, rng.choice([1, 1, 2])
        try:
            problem = Problem(
                rng.choice([1, 1, 2, 3, 5]),
                per_c * groups,
                h,
                w,
                per_k * groups,
                r,
                s,
                stride,
                padding,
                dilation,
                groups,
                dtype,
                rng.choice(["nchw", "nhwc"]),
            )
        # the filter is larger than the padded input
        except ValueError:
            continue
        # of the interpreter, in small tiles
        steps = groups * r * s * -(-problem.n * problem.p * problem.q // 64)
        if problem.dense_macs <= max_macs and steps <= max_macs / 1000:
            return problem
