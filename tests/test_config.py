"""What is legal, what is sensible, and how much the default tiles execute."""
from dataclasses import replace

import pytest

from tridil import config
from tridil.problem import PASSES, problem_of

P = problem_of((4, 64, 41, 41), (96, 64, 3, 3), None, 1, 12, 12, 1, "float16", "nhwc")


def live(axis, first, block):
    """Taps that read the image for some output of the block."""
    outs = range(first, min(first + block, axis.out))
    return sum(any(0 <= i * axis.stride + axis.offset + t * axis.dilation < axis.size for i in outs) for t in range(axis.taps))


def count_macs(p, pass_, cfg):
    """Executed MACs, counted tile by tile as the kernels walk them."""
    bi, bp, bq, n = cfg["BLOCK_IMG"], cfg["BLOCK_P"], cfg["BLOCK_Q"], cfg["BLOCK_N"]
    images, total = len(range(0, p.n, bi)), 0
    c, k = p.c // p.groups, p.k // p.groups
    reduced, cols = {"fprop": (c, k), "dgrad": (k, c), "wgrad": (None, c)}[pass_]
    for h, w in config.passes_axes(p, pass_):
        if pass_ == "wgrad":
            for r in range(p.r):
                for s in range(p.s):
                    boxes = len(range(*h.live_out(r), bp)) * len(range(*w.live_out(s), bq)) * images
                    total += boxes * bi * bp * bq * len(range(0, c, n)) * n * len(range(0, k, cfg["BLOCK_M"])) * cfg["BLOCK_M"]
            continue
        for i in range(0, h.out, bp):
            for j in range(0, w.out, bq):
                taps = live(h, i, bp) * live(w, j, bq)
                total += images * bi * bp * bq * taps * len(range(0, reduced, cfg["BLOCK_K"])) * cfg["BLOCK_K"] * len(range(0, cols, n)) * n
    return total * p.groups


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("p", [P, replace(P, groups=2, dtype="float32"), replace(P, stride=(2, 3), dilation=(4, 3), padding=((3, 3), (5, 5)))])
def test_executed_macs(p, pass_):
    cfgs = config.candidates(p, pass_, "cuda:90")
    assert 4 <= len(cfgs) <= 60
    for cfg in cfgs:
        assert config.executed_macs(p, pass_, cfg) == count_macs(p, pass_, cfg) >= p.useful_macs


def test_executed_macs_flat():
    """27 (tap, channel) pairs of an RGB layer are one step of 32; wgrad's single column tile unites all taps."""
    p = problem_of((1, 3, 16, 16), (16, 3, 3, 3), None, 1, 1, 1, 1, "float16", "nhwc")
    cfg = config.default(p, "fprop", "cuda:90")
    assert cfg["kernel"] == "gather_flat"
    step = -(-27 // cfg["BLOCK_K"]) * cfg["BLOCK_K"]
    assert config.executed_macs(p, "fprop", cfg) == 256 * 16 * step
    cfg = dict(config.default(p, "wgrad", "cuda:90"), BLOCK_N=32, BLOCK_M=16, BLOCK_IMG=1, BLOCK_P=8, BLOCK_Q=8)
    assert config.executed_macs(p, "wgrad", cfg) == 256 * 16 * 32


@pytest.mark.parametrize("target", config.TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("pass_", PASSES)
def test_candidates_are_legal(target, dtype, pass_):
    for p in (P, replace(P, groups=32), replace(P, c=3, k=1000, groups=1), replace(P, h=1, w=5000, r=1, padding=((0, 0), (12, 12)))):
        p = replace(p, dtype=dtype)
        cfgs = config.candidates(p, pass_, target)
        assert cfgs and all(config.fits(cfg, p, pass_, target) is None for cfg in cfgs)
        assert all(cfg["CLAMP"] == (target in ("cuda:100", "cuda:120")) for cfg in cfgs)
        assert config.default(p, pass_, target) in cfgs


@pytest.mark.parametrize("change, reason", [
    ({"BLOCK_N": 48}, "power of two"), ({"BLOCK_K": 8}, "at least 16"), ({"num_stages": 0}, "positive int"), ({"num_warps": 3}, "power of two"),
    ({"BLOCK_P": 2.0}, "positive int"), ({"num_stages": 19}, "shared memory"), ({"BLOCK_N": 1024}, "spills"),
    ({"kernel": "winograd"}, "unknown kernel"), ({"maxnreg": 300}, "24 to 255"),
    ({"num_warps": 16}, "65536 registers"), ({"CLAMP": None}, "True or False"), ({"BLOCK_X": 1}, "exactly the entries")])
def test_fits_gives_the_reason(change, reason):
    good = config.default(P, "fprop", "cuda:80")
    assert config.fits(good, P, "fprop", "cuda:80") is None
    assert reason in config.fits({**good, **change}, P, "fprop", "cuda:80")


def test_fits_knows_pass_and_grid():
    good = config.default(P, "fprop", "cuda:80")
    assert "unknown pass" in config.fits(good, P, "forward", "cuda:80")
    assert "exactly the entries" in config.fits(good, P, "wgrad", "cuda:80")
    huge = replace(P, n=2**30, h=64, w=64, padding=((1, 1), (1, 1)), dilation=(1, 1))
    small = dict(good, BLOCK_IMG=1, BLOCK_P=1, BLOCK_Q=16, BLOCK_N=16)
    assert "2**31" in config.fits(small, huge, "fprop", "cuda:80")


def test_default_depends_on_dilation():
    """A config chosen for one dilation must not be looked up for another: the boxes differ."""
    wide = replace(P, c=256, k=256, h=60, w=60)
    for pass_ in ("fprop", "dgrad"):
        far, near = (config.default(replace(wide, dilation=(d, d), padding=((d, d), (d, d))), pass_, "cuda:90") for d in (12, 1))
        assert far != near


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("pass_", PASSES)
def test_default_tiles_skip_the_padding_of_aspp_layers(pass_, target):
    """Over the 28 ASPP rows dense work is 1.76 x the useful work; the default tiles stay within 1.20."""
    from tridil import workloads
    problems = [w.problem for w in workloads.suite("aspp")]
    assert len(problems) == 28
    useful = sum(p.useful_macs for p in problems)
    assert sum(p.dense_macs for p in problems) / useful > 1.7
    assert sum(config.executed_macs(p, pass_, config.default(p, pass_, target)) for p in problems) / useful <= 1.20


def test_every_workload_has_a_default():
    from tridil import workloads
    for w in workloads.load():
        for pass_ in PASSES:
            config.default(w.problem, pass_, "cuda:90")
