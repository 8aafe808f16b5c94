"""What is legal, what is sensible, and how much the default tiles execute."""

import itertools
import json
from dataclasses import replace

import pytest

from tridil import config, cost_model, devices, workloads
from tridil.problem import PASSES, problem_of

P = problem_of((4, 64, 41, 41), (96, 64, 3, 3), None, 1, 12, 12, 1, "float16", "nhwc")


def live(axis, first, block):
    """Taps that read the image for some output of the block."""
    outs = range(first, min(first + block, axis.out))
    return sum(
        any(0 <= i * axis.stride + axis.offset + t * axis.dilation < axis.size for i in outs)
        for t in range(axis.taps)
    )


def count_macs(p, pass_, cfg):
    """Executed MACs, counted tile by tile as the kernels walk them."""
    bi, bp, bq = cfg.BLOCK_IMG, cfg.BLOCK_P, cfg.BLOCK_Q
    (m, n, step), images, total = config.tile(cfg, pass_), len(range(0, p.n, bi)), 0
    c, k = p.c // p.groups, p.k // p.groups
    reduced, cols = {"fprop": (c, k), "dgrad": (k, c), "wgrad": (None, c)}[pass_]
    for h, w in p.axes(pass_):
        # wgrad: the rectangle that the live ones of all taps of a tile span
        if cfg.kernel == "gather_flat":
            for columns in (
                range(i, min(i + n, p.r * p.s * c)) for i in range(0, p.r * p.s * c, n)
            ):
                taps = {divmod(j // c, p.s) for j in columns}
                spans = [
                    [axis.live_out(tap) for tap in {t[dim] for t in taps}]
                    for dim, axis in enumerate((h, w))
                ]
                sides = [
                    len(range(min(lo for lo, _ in span), max(hi for _, hi in span), side))
                    for span, side in zip(spans, (bp, bq))
                ]
                total += sides[0] * sides[1] * images * step * n * len(range(0, k, m)) * m
            continue
        if pass_ == "wgrad":
            for r in range(p.r):
                for s in range(p.s):
                    boxes = len(range(*h.live_out(r), bp)) * len(range(*w.live_out(s), bq)) * images
                    total += boxes * step * len(range(0, c, n)) * n * len(range(0, k, m)) * m
            continue
        # the columns of a map's edge have boxes of their own
        parts = [(0, w.out, bi, bp, bq)]
        if getattr(cfg, "EDGE_IMG", 0):
            whole = w.out // bq * bq
            edge = (whole, w.out, cfg.EDGE_IMG, cfg.EDGE_P, cfg.EDGE_Q)
            parts = [(0, whole, bi, bp, bq), edge]
        for first, end, count, rows, columns in parts:
            tiles = len(range(0, p.n, count)) * len(range(0, cols, n))
            for i in range(0, h.out, rows):
                for j in range(first, end, columns):
                    taps = live(h, i, rows) * live(w, j, min(columns, end - j))
                    total += tiles * m * n * taps * len(range(0, reduced, step)) * step
    return total * p.groups


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize(
    "p",
    [
        P,
        replace(P, groups=2, dtype="float32"),
        replace(P, stride=(2, 3), dilation=(4, 3), padding=((3, 3), (5, 5))),
    ],
)
def test_executed_macs(p, pass_):
    cfgs = config.candidates(p, pass_, "cuda:90")
    assert 4 <= len(cfgs) <= 100
    for cfg in cfgs:
        assert config.executed_macs(p, pass_, cfg) == count_macs(p, pass_, cfg) >= p.useful_macs


def test_executed_macs_flat():
    """27 (tap, channel) pairs of an RGB layer are one step of 32; wgrad's single column tile unites
    all taps."""
    p = problem_of((1, 3, 16, 16), (16, 3, 3, 3), None, 1, 1, 1, 1, "float16", "nhwc")
    cfg = cost_model.best(p, "fprop", "cuda:90")
    assert cfg.kernel == "gather_flat"
    step = -(-27 // cfg.BLOCK_K) * cfg.BLOCK_K
    assert config.executed_macs(p, "fprop", cfg) == 256 * 16 * step
    cfg = replace(
        cost_model.best(p, "wgrad", "cuda:90"),
        BLOCK_N=32,
        BLOCK_M=16,
        BLOCK_IMG=1,
        BLOCK_P=8,
        BLOCK_Q=8,
    )
    assert config.executed_macs(p, "wgrad", cfg) == 256 * 16 * 32


@pytest.mark.parametrize("target", devices.TARGETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("pass_", PASSES)
def test_candidates_are_legal(target, dtype, pass_):
    for p in (
        P,
        replace(P, groups=32),
        replace(P, c=3, k=1000, groups=1),
        replace(P, h=1, w=5000, r=1, padding=((0, 0), (12, 12))),
    ):
        p = replace(p, dtype=dtype)
        cfgs = config.candidates(p, pass_, target)
        assert cfgs and all(config.fits(cfg, p, pass_, target) is None for cfg in cfgs)
        assert all(
            cfg.CLAMP == (target in ("cuda:100", "cuda:120"))
            for cfg in cfgs
            if hasattr(cfg, "CLAMP")
        )
        assert cost_model.best(p, pass_, target) in cfgs


@pytest.mark.parametrize("pass_", PASSES)
def test_descriptors_are_for_hopper_and_datacenter_blackwell(pass_):
    kernels = {
        target: {cfg.kernel for cfg in config.candidates(P, pass_, target)}
        for target in devices.TARGETS
    }
    assert {target for target, names in kernels.items() if "tma" in names} == {
        "cuda:90",
        "cuda:100",
    }
    even = replace(P, h=64, w=64)
    assert cost_model.best(even, pass_, "cuda:100").kernel == "tma"
    assert cost_model.best(even, pass_, "cuda:90").kernel in ("tma", "hopper")
    for cfg in config.candidates(P, pass_, "cuda:90") + config.candidates(P, pass_, "cuda:100"):
        if cfg.kernel == "tma" and pass_ != "wgrad":
            assert cfg.WEIGHT_FIRST or cfg.WARP_SPECIALIZE or cfg.BLOCK_N < 64
    # fp64 has no descriptor, ieee fp32 no product on tensor cores
    assert {
        cfg.kernel for cfg in config.candidates(replace(P, dtype="float64"), pass_, "cuda:90")
    } == {"gather"}
    assert {
        cfg.kernel
        for cfg in config.candidates(replace(P, dtype="float32"), pass_, "cuda:90", "ieee")
    } == {"gather"}


TMA = {
    pass_: next(cfg for cfg in config.candidates(P, pass_, "cuda:90") if cfg.kernel == "tma")
    for pass_ in PASSES
}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"BLOCK_N": 48}, "power of two"),
        ({"BLOCK_K": 8}, "at least 16"),
        ({"num_stages": 0}, "positive int"),
        ({"num_warps": 3}, "power of two"),
        ({"BLOCK_P": 2.0}, "positive int"),
        ({"num_stages": 19}, "shared memory"),
        ({"BLOCK_N": 1024}, "spills"),
        ({"maxnreg": 300}, "24 to 255"),
        ({"SPLIT_K": 70000}, "at most 65535"),
        ({"num_warps": 16}, "65536 registers"),
        ({"BLOCK_N": 8}, "at most 2 warps"),
        ({"BLOCK_N": 4}, "of output channels 8"),
        ({"CLAMP": None}, "True or False"),
    ],
)
def test_fits_gives_the_reason(change, reason):
    good = cost_model.best(P, "fprop", "cuda:80")
    assert config.fits(good, P, "fprop", "cuda:80") is None
    assert reason in config.fits(replace(good, **change), P, "fprop", "cuda:80")


@pytest.mark.parametrize(
    "pass_, problem, change, reason",
    [
        ("fprop", {}, {"BLOCK_P": 6}, "power of two"),
        ("fprop", {}, {"BLOCK_IMG": 1, "BLOCK_P": 1, "BLOCK_Q": 512, "BLOCK_N": 16}, "at most 256"),
        ("fprop", {}, {"WARP_SPECIALIZE": True}, "is for sm_100"),
        ("fprop", {}, {"WEIGHT_FIRST": 1}, "True or False"),
        ("fprop", {"c": 63}, {}, "multiples of 16 bytes"),
        ("dgrad", {"k": 21}, {}, "multiples of 16 bytes"),
        ("wgrad", {"k": 100}, {}, "multiples of 16 bytes"),
        ("fprop", {"dtype": "float64"}, {"num_stages": 1}, "at most 4 bytes each"),
        ("fprop", {"stride": (2, 2), "dilation": (3, 4)}, {}, "multiple of the stride"),
        (
            "fprop",
            {"c": 192, "k": 192, "groups": 2},
            {"BLOCK_K": 64},
            "must divide the 96 channels",
        ),
        (
            "wgrad",
            {"c": 192, "k": 192, "groups": 2},
            {"BLOCK_M": 64},
            "must divide the 96 channels",
        ),
    ],
)
def test_fits_knows_the_limits_of_descriptors(pass_, problem, change, reason):
    assert config.fits(TMA[pass_], P, pass_, "cuda:90") is None
    assert reason in config.fits(
        replace(TMA[pass_], **change), replace(P, **problem), pass_, "cuda:90"
    )
    assert "sm_90 or later" in config.fits(
        TMA[pass_], P, pass_, "cuda:89"
    ) and "sm_90 or later" in config.fits(TMA[pass_], P, pass_, "hip:gfx942")


def test_strided_layers_that_descriptors_can_view():
    """Stride 2 with dilation 2 or 4, and strided 1x1; dgrad takes any stride, since a residue class
    has stride 1."""
    for change in (
        {"stride": (2, 2), "dilation": (2, 4)},
        {"r": 1, "s": 1, "stride": (2, 2), "padding": ((0, 0), (0, 0))},
    ):
        p = replace(P, **change)
        assert all(config.fits(TMA[pass_], p, pass_, "cuda:90") is None for pass_ in PASSES)
    assert (
        config.fits(TMA["dgrad"], replace(P, stride=(2, 3), dilation=(3, 2)), "dgrad", "cuda:90")
        is None
    )


def test_fits_knows_pass_and_grid():
    good = cost_model.best(P, "fprop", "cuda:80")
    assert "unknown pass" in config.fits(good, P, "forward", "cuda:80")
    assert "exactly the entries" in config.fits(good, P, "wgrad", "cuda:80")
    huge = replace(P, n=2**30, h=64, w=64, padding=((1, 1), (1, 1)), dilation=(1, 1))
    small = replace(good, BLOCK_IMG=1, BLOCK_P=1, BLOCK_Q=16, BLOCK_N=16)
    assert "2**31" in config.fits(small, huge, "fprop", "cuda:80")


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_every_channel_count_has_candidates(target):
    counts, kinds = (
        (1, 3, 8, 9, 17, 25, 64, 65),
        [("float16", "tf32"), ("float32", "tf32"), ("float32", "ieee"), ("float64", "ieee")],
    )
    for c, k, groups, (dtype, precision), pass_ in itertools.product(
        counts, counts, (1, 3), kinds, PASSES
    ):
        p = problem_of(
            (2, c * groups, 9, 11), (k * groups, c, 3, 3), None, 1, 2, 2, groups, dtype, "nhwc"
        )
        assert config.candidates(p, pass_, target, precision), (p.key(), pass_, precision)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_sequences_and_groups_waste_no_rows(target):
    """1D layers: tiles lie along W. Groups: at most twice the useful work from 16 channels a group
    on, four times at 4; as often again as groups are multiplied as one."""
    layers = [w.problem for w in workloads.load() if w.kind == "1D" or w.kind == "grouped"]
    widths = (4, 8, 16, 24, 40, 64)
    layers += [
        problem_of(
            (8, 32 * width, 28, 28), (32 * width, width, 3, 3), None, 1, 2, 2, 32, "float16", "nhwc"
        )
        for width in widths
    ]
    layers += [replace(p, dtype="float32") for p in layers[-len(widths) :]]
    for p in layers:
        for pass_ in PASSES:
            cfg = cost_model.best(p, pass_, target)
            assert p.h > 1 or cfg.BLOCK_P == 1, (p.key(), pass_, cfg)
            if p.groups > 1:
                most = 2 if p.c // p.groups >= 16 else 4
                most *= getattr(cfg, "BUNDLE", 1)  # what lies beside the diagonal
                assert config.executed_macs(p, pass_, cfg) <= most * p.useful_macs, (
                    p.key(),
                    pass_,
                    cfg,
                )


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"num_warps": 32}, "at most 255 registers, 16 warps"),
        ({"COLS": 300}, "at most 255 registers, 16 warps"),
        ({"BLOCK_N": 48}, "power of two"),
        ({"SPLIT_K": 2}, "does not split"),
    ],
)
def test_fits_knows_the_limits_of_direct_kernels(change, reason):
    p = problem_of((2, 32, 14, 14), (32, 1, 3, 3), None, 1, 2, 2, 32, "float16", "nhwc")
    cfg = cost_model.best(p, "fprop", "cuda:80")
    assert cfg.kernel == "depthwise" and config.fits(cfg, p, "fprop", "cuda:80") is None
    assert reason in config.fits(replace(cfg, **change), p, "fprop", "cuda:80")


def test_configs_on_disk():
    """What is written is read again; anything else is refused, with its entries."""
    for p, target in ((P, "cuda:80"), (P, "cuda:90"), (replace(P, groups=64, k=64), "cuda:90")):
        for pass_ in PASSES:
            for cfg in config.candidates(p, pass_, target):
                assert config.from_json(json.loads(json.dumps(config.to_json(cfg))), pass_) == cfg
    good = config.to_json(cost_model.best(P, "fprop", "cuda:80"))
    for bad, pass_, reason in (
        (good | {"kernel": "winograd"}, "fprop", "unknown kernel 'winograd'"),
        (good | {"BLOCK_X": 1}, "fprop", "exactly the entries"),
        ({**good} | {"BLOCK_M": 16}, "wgrad", "exactly the entries"),
        ({"kernel": "tma"}, "dgrad", "exactly the entries"),
        ({}, "fprop", "unknown kernel None"),
    ):
        with pytest.raises(ValueError, match=reason):
            config.from_json(bad, pass_)
    assert "exactly the entries" in config.fits(
        cost_model.best(P, "wgrad", "cuda:80"), P, "fprop", "cuda:80"
    )
