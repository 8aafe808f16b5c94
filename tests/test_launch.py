"""Plans: the launches of a pass without tensors."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tridil import cost_model, drivers, launch, testing
from tridil.problem import PASSES, Problem

P = Problem(2, 16, 9, 9, 24, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))


def cfg(p, pass_):
    return cost_model.best(p, pass_, "cuda:80")


def test_one_launch_for_stride_1_and_one_per_residue_class():
    assert [len(launch.plan(P, pass_, cfg(P, pass_))) for pass_ in ("fprop", "dgrad")] == [1, 1]
    odd = replace(P, stride=(2, 2), dilation=(3, 3))
    # gcd 1: every class has taps
    assert len(launch.plan(odd, "dgrad", cfg(odd, "dgrad"))) == 4
    even = replace(P, stride=(2, 2))
    # gcd 2: three classes are zero
    assert len(launch.plan(even, "dgrad", cfg(even, "dgrad"))) == 1
    assert not even.dgrad_covers and odd.dgrad_covers


def test_no_tap_is_wasted_in_strided_dgrad():
    odd = replace(P, stride=(2, 2), dilation=(3, 3))
    taps = [
        dict(item.constexprs)["R"] * dict(item.constexprs)["S"]
        for item in launch.plan(odd, "dgrad", cfg(odd, "dgrad"))
    ]
    assert sorted(taps) == [1, 2, 2, 4]


@pytest.mark.parametrize("pass_", PASSES)
def test_split_k_adds_one_fixed_order_sum(pass_):
    one, two = (
        launch.plan(P, pass_, replace(cfg(P, pass_), kernel="gather", SPLIT_K=n)) for n in (1, 4)
    )
    assert len(one) == 1 and [item.name for item in two] == [one[0].name, "sum_splits"]
    assert two[0].grid[0] == 4 * one[0].grid[0]
    result = {"fprop": P.y_shape, "dgrad": P.x_shape, "wgrad": P.w_shape}[pass_]
    assert one[0].workspace == 0 and two[0].workspace == 4 * math.prod(result)


def test_split_strided_dgrad_sums_each_residue_class():
    odd = replace(P, stride=(2, 2), dilation=(3, 3))
    items = launch.plan(odd, "dgrad", replace(cfg(odd, "dgrad"), kernel="gather", SPLIT_K=3))
    assert [item.name for item in items] == ["correlate", "sum_splits"] * 4
    assert max(item.workspace for item in items) == 3 * 2 * 16 * 5 * 5


@pytest.mark.parametrize(
    "n, expected", [(2**31 // (16 * 81) - 1, False), (2**31 // (16 * 81) + 1, True)]
)
def test_int64_only_where_needed(n, expected):
    big = replace(P, n=n, k=8)
    assert dict(launch.plan(big, "fprop", cfg(big, "fprop"))[0].constexprs)["INT64"] is expected


def test_plans_are_cached_by_problem():
    """Dilation included: pytorch's and FlagGems' tuning keys once lacked it."""
    a, b = (launch.plan(replace(P, dilation=(d, d)), "fprop", cfg(P, "fprop")) for d in (1, 2))
    assert a != b and launch.plan(P, "fprop", cfg(P, "fprop")) == b


def test_results_are_allocated_once_and_nothing_else_is(monkeypatch):
    """No workspace: channels_last tensors are read in place, and only wgrad's partial sums are
    extra."""
    p = replace(P, layout="nhwc")
    x, w, bias, dy = (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in testing.random_tensors(
            p, torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0
        )
    )
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **kw: allocated.append(empty(*a, **kw)) or allocated[-1]
    )
    pointers = []
    monkeypatch.setattr(
        launch.Ready,
        "__call__",
        lambda self, tensors: pointers.append(
            [tensors[role].data_ptr() for _, role, _ in self.places]
        ),
    )
    launch.fprop(p, x, w, bias, cfg(p, "fprop"))
    launch.dgrad(p, dy, w, cfg(p, "dgrad"))
    launch.wgrad(p, dy, x, replace(cfg(p, "wgrad"), SPLIT_K=3))
    y, dx, dw, partials = allocated
    assert partials.numel() == 3 * dw.numel() and partials.dtype == torch.float32
    assert pointers == [
        [t.data_ptr() for t in ts]
        for ts in ((x, w, bias, y), (dy, w, w, dx), (x, dy, partials), (partials, x, dw))
    ]


@pytest.mark.parametrize("pass_", PASSES)
def test_config_is_checked_against_the_target(pass_, monkeypatch):
    """A tile for 227 KiB of shared memory is refused where there are 99 KiB."""
    x, w, bias, dy = testing.random_tensors(P, torch.device("cpu"), 0)
    monkeypatch.setenv("TRIDIL_TARGET", "cuda:86")
    big = replace(
        cfg(P, pass_), num_stages=12, **{"BLOCK_M" if pass_ == "wgrad" else "BLOCK_K": 64}
    )
    with pytest.raises(ValueError, match="cuda:86 has 101376"):
        getattr(launch, pass_)(
            P, *{"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_], big
        )
    assert drivers.target() == "cuda:86"
