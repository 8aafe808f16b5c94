"""The specification: the three passes in float64, one tap after the other. Slow, exact, torch only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from .problem import Problem


def _taps(problem: Problem) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """(r, s, slices of the padded input that tap (r, s) reads): rows and columns of every output
    pixel."""
    for r in range(problem.r):
        for s in range(problem.s):
            yield (
                r,
                s,
                tuple(
                    slice(t * d, t * d + (out - 1) * st + 1, st)
                    for t, d, out, st in zip(
                        (r, s), problem.dilation, (problem.p, problem.q), problem.stride
                    )
                ),
            )


def _padded(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    (top, bottom), (left, right) = problem.padding
    return pad(x.double(), (left, right, top, bottom))


def _grouped(t: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    return t.double().unflatten(dim, (groups, t.shape[dim] // groups))


def fprop(
    problem: Problem, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """y (N, K, P, Q) float64 of x (N, C, H, W), w (K, C/G, R, S), bias (K,) or None."""
    x, w = _grouped(_padded(problem, x), problem.groups, 1), _grouped(w, problem.groups, 0)
    y = x.new_zeros(problem.n, problem.groups, problem.k // problem.groups, problem.p, problem.q)
    for r, s, (rows, cols) in _taps(problem):
        y += torch.einsum("ngchw,gkc->ngkhw", x[..., rows, cols], w[..., r, s])
    y = y.flatten(1, 2)
    return y if bias is None else y + bias.double().view(-1, 1, 1)


def dgrad(problem: Problem, dy: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """dx (N, C, H, W) float64 of dy (N, K, P, Q) and w (K, C/G, R, S): the adjoint of fprop in x."""
    dy, w = _grouped(dy, problem.groups, 1), _grouped(w, problem.groups, 0)
    (top, bottom), (left, right) = problem.padding
    dx = dy.new_zeros(
        problem.n,
        problem.groups,
        problem.c // problem.groups,
        problem.h + top + bottom,
        problem.w + left + right,
    )
    for r, s, (rows, cols) in _taps(problem):
        dx[..., rows, cols] += torch.einsum("ngkhw,gkc->ngchw", dy, w[..., r, s])
    return dx.flatten(1, 2)[..., top : top + problem.h, left : left + problem.w]


def wgrad(problem: Problem, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dw (K, C/G, R, S) float64 of dy (N, K, P, Q) and x (N, C, H, W): the adjoint of fprop in w."""
    dy, x = _grouped(dy, problem.groups, 1), _grouped(_padded(problem, x), problem.groups, 1)
    dw = dy.new_zeros(
        problem.groups,
        problem.k // problem.groups,
        problem.c // problem.groups,
        problem.r,
        problem.s,
    )
    for r, s, (rows, cols) in _taps(problem):
        dw[..., r, s] = torch.einsum("ngkhw,ngchw->gkc", dy, x[..., rows, cols])
    return dw.flatten(0, 1)
