"""The specification against PyTorch in float64, and by identities that need no second
implementation."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tridil import reference, testing
from tridil.problem import Problem, problem_of

problems = st.randoms(use_true_random=False).map(lambda rng: testing.random_problem(rng, "float64"))
seeds = st.integers(0, 2**31 - 1)


def conv(p, x, w, bias=None):
    (top, bottom), (left, right) = p.padding
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)), w, bias, p.stride, 0, p.dilation, p.groups
    )


@settings(max_examples=150)
@given(problems, seeds)
def test_three_passes_are_pytorch_and_autograd(p, seed):
    x, w, bias, dy = testing.random_tensors(p, "cpu", seed)
    x.requires_grad_(), w.requires_grad_()
    y = conv(p, x, w, bias)
    assert y.shape == p.y_shape
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    for got, expected in (
        (reference.fprop(p, x, w, bias), y),
        (reference.dgrad(p, dy, w), dx),
        (reference.wgrad(p, dy, x), dw),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@settings(max_examples=50)
@given(problems, seeds)
def test_passes_are_adjoint(p, seed):
    """<y, dy> = <x, dx> = <w, dw>."""
    x, w, _, dy = testing.random_tensors(p, "cpu", seed)
    inner = [
        (a * b).sum()
        for a, b in (
            (reference.fprop(p, x, w), dy),
            (x, reference.dgrad(p, dy, w)),
            (w, reference.wgrad(p, dy, x)),
        )
    ]
    scale = reference.fprop(p, x.abs(), w.abs()).norm() * dy.norm() + 1e-30
    assert abs(inner[0] - inner[1]) < 1e-12 * scale and abs(inner[0] - inner[2]) < 1e-12 * scale


@pytest.mark.parametrize(
    "stride, padding, dilation, groups", [(1, 2, 2, 1), (2, 3, 3, 2), (3, 0, 1, 4), (2, 5, 2, 1)]
)
def test_torch_nn_grad(stride, padding, dilation, groups, seed):
    p = problem_of(
        (2, 8, 13, 14), (12, 8 // groups, 3, 2), None, stride, padding, dilation, groups, "float64"
    )
    x, w, _, dy = testing.random_tensors(p, "cpu", seed)
    args = (stride, padding, dilation, groups)
    torch.testing.assert_close(
        reference.dgrad(p, dy, w), torch.nn.grad.conv2d_input(x.shape, w, dy, *args)
    )
    torch.testing.assert_close(
        reference.wgrad(p, dy, x), torch.nn.grad.conv2d_weight(x, w.shape, dy, *args)
    )


@pytest.mark.parametrize("d", [2, 3])
def test_dilated_is_dense_on_residue_sub_grids(d, seed):
    """Stride 1, no padding: d*d independent dense convolutions."""
    p = Problem(2, 6, 6 * d, 5 * d, 4, 3, 3, dilation=(d, d), dtype="float64")
    x, w, _, _ = testing.random_tensors(p, "cpu", seed)
    y, dense = reference.fprop(p, x, w), replace(p, h=6, w=5, dilation=(1, 1))
    for a in range(d):
        for b in range(d):
            torch.testing.assert_close(
                y[..., a::d, b::d], reference.fprop(dense, x[..., a::d, b::d], w)
            )


def test_low_precision_tensors_are_computed_in_float64(seed):
    p = Problem(1, 8, 5, 5, 8, 3, 3, dtype="bfloat16")
    x, w, bias, dy = testing.random_tensors(p, "cpu", seed)
    assert x.dtype == dy.dtype == torch.bfloat16
    torch.testing.assert_close(
        reference.fprop(p, x, w, bias), conv(p, x.double(), w.double(), bias.double())
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_budgets_admit_rounding_and_nothing_else(dtype, seed):
    """The correctly rounded result passes with room for summation; a lost product, a shifted tap, a
    NaN or a result rounded lower does not."""
    p = Problem(2, 32, 9, 9, 32, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), dtype=dtype)
    x, w, _, dy = testing.random_tensors(p, "cpu", seed)
    lower = {
        "float16": "bfloat16",
        "bfloat16": "float8_e4m3fn",
        "float32": "bfloat16",
        "float64": "float32",
    }[dtype]
    for pass_, args in (("fprop", (x, w)), ("dgrad", (dy, w)), ("wgrad", (dy, x))):
        exact = getattr(reference, pass_)(p, *args)
        rounded = exact.to(x.dtype)

        def broken(t, p=p, pass_=pass_, exact=exact):
            error, allowed = testing.check(t, exact, p, pass_)
            return error > allowed

        assert not broken(rounded)
        lossy = [args[0].clone(), args[1]]
        # one image loses one channel
        lossy[0][0, 5] = 0
        nan = rounded.clone()
        nan.flatten()[random.randrange(nan.numel())] = float("nan")
        for wrong in (
            getattr(reference, pass_)(p, *lossy).to(x.dtype),
            nan,
            rounded.roll(1, -1),
            exact.to(getattr(torch, lower)).to(x.dtype),
        ):
            assert broken(wrong)


@pytest.mark.parametrize("depth", [9, 288, 4608])
def test_float32_sums_are_inside_their_budget_and_tf32_is_not(depth, seed):
    """Plain float32 summation stays inside, and the budget is not so wide that tf32 would pass for
    ieee."""
    x, w = torch.randn(512, depth), torch.randn(depth)
    exact = x.double() @ w.double()
    assert (
        ((x * w).cumsum(1)[:, -1].double() - exact).abs()
        < testing.budget(exact, torch.float32, depth)
    ).all()

    def tf32(t):
        return (t.view(torch.int32) & ~0x1FFF).view(torch.float32).double()

    error = (tf32(x) @ tf32(w) - exact).abs()
    assert (error > testing.budget(exact, torch.float32, depth)).any()
    assert (error <= testing.budget(exact, torch.float32, depth, "tf32")).all()


def test_random_problems_cover_the_space():
    rng = random.Random(0)
    seen = [testing.random_problem(rng) for _ in range(3000)]
    kinds = {
        "strides": lambda p: {1, 2, 3} <= {s for q in seen for s in q.stride},
        "asymmetric": lambda p: p.padding[0][0] != p.padding[0][1],
        "beyond the map": lambda p: p.r > 1 and p.dilation[0] > p.h,
        "padding beyond the extent": lambda p: p.padding[0][0] > p.dilation[0] * (p.r - 1) + 1,
        "dilations differ": lambda p: p.dilation[0] != p.dilation[1],
        "depthwise": lambda p: p.groups == p.c > 1,
        "multiplier": lambda p: p.groups == p.c > 1 and p.k == 2 * p.c,
        "groups": lambda p: 1 < p.groups < p.c,
        "even": lambda p: p.r % 2 == 0,
        "row": lambda p: p.r == 1 < p.s,
        "column": lambda p: p.s == 1 < p.r,
        "pixel": lambda p: p.h == p.w == 1,
        "dead tap": lambda p: any(lo == hi for lo, hi in map(p.fprop_axes[0].live_out, range(p.r))),
        **{f"C={c}": lambda p, c=c: p.c == c for c in (1, 3, 4, 25)},
    }
    missing = [name for name, kind in kinds.items() if not any(map(kind, seen))]
    assert not missing and all(p.dense_macs <= 2e5 for p in seen)
