"""The predicted times: what they are made of, how they order, and that every pick is legal."""

import math
from dataclasses import replace

import pytest

from tridil import config, cost_model, cudnn, devices, families, workloads
from tridil.families.gemm import waves_of
from tridil.problem import PASSES, Problem

P = Problem(4, 256, 60, 60, 256, 3, 3, padding=((12, 12), (12, 12)), dilation=(12, 12))
H100, A100 = devices.of_target("cuda:90"), devices.of_target("cuda:80")


def predicted(problem, pass_, device, **change):
    cfg = cost_model.best(problem, pass_, device)
    return cost_model.predict(problem, pass_, replace(cfg, **change), device)


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("pass_", PASSES)
def test_no_prediction_beats_the_roof(device, pass_):
    changes = (
        {},
        {"n": 64, "h": 20, "w": 20},
        {"c": 16, "k": 16},
        {"stride": (2, 2)},
        {"dtype": "float64"},
        {"dtype": "float32"},
    )
    for p in (replace(P, **change) for change in changes):
        found = cost_model.predict(p, pass_, cost_model.best(p, pass_, device), device)
        assert (
            found.seconds >= cost_model.roof(p, device)
            and found.seconds >= found.parts["launches"] > 0
        )
        assert (
            found.limiter
            and found.seconds <= sum(found.parts.values())
            and found.limiter in str(found)
        )


KINDS = {
    "dense": {},
    "far": {"dilation": (1, 12)},
    "narrow": {"c": 3},
    "pointwise": {"r": 1, "s": 1},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 256},
}
D2 = replace(P, dilation=(2, 2), padding=((2, 2), (2, 2)))


def test_kinds_of_the_estimate_of_aten():
    for kind, change in KINDS.items():
        p = replace(D2, **change)
        assert (
            {cudnn.kind(p, pass_) for pass_ in PASSES}
            == {kind}
            == {cudnn.kind(replace(p, stride=(2, 2)), pass_) for pass_ in ("fprop", "wgrad")}
        )
        assert cudnn.kind(replace(p, stride=(2, 2)), "dgrad") == (
            kind if kind in ("depthwise", "pointwise") else "strided dgrad"
        )
        assert cudnn.kind(replace(p, stride=(2, 2), dilation=(1, 1)), "dgrad") == (
            kind if kind != "far" else "dense"
        )
    assert (
        cudnn.kind(replace(D2, c=16), "fprop") == "dense"
        and cudnn.kind(replace(D2, k=12), "fprop") == "narrow"
    )
    assert cudnn.kind(replace(D2, k=12, dtype="float32"), "fprop") == "dense", "48 bytes"


@pytest.mark.parametrize("device", devices.DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("pass_", PASSES)
def test_the_estimate_of_aten(device, pass_):
    """Never below the roof; grows with the work; copies of NCHW operands are counted."""
    for kind, change in KINDS.items():
        for more in (
            {},
            {"dtype": "float32"},
            {"dtype": "float64"},
            {"stride": (2, 1)},
            {"n": 1, "h": 13},
        ):
            p = replace(D2, **{**change, **more})
            nchw, twice = replace(p, layout="nchw"), replace(p, n=2 * p.n)
            assert (
                cost_model.roof(p, device)
                < cost_model.cudnn(p, pass_, device)
                < cost_model.cudnn(twice, pass_, device)
            )
            assert cudnn.seconds(p, pass_, device) == cost_model.cudnn(p, pass_, device)
            assert cost_model.cudnn(nchw, pass_, device) == cudnn.seconds(nchw, pass_, device)
            mixed = replace(nchw, operands="nhwc")
            assert cost_model.cudnn(mixed, pass_, device) == cudnn.seconds(p, pass_, device)
            if kind not in ("depthwise", "pointwise"):
                assert cudnn.seconds(nchw, pass_, device) > cudnn.seconds(p, pass_, device)


def test_copies_of_contiguous_tensors_are_counted():
    """Once read and once written, in predictions, in the ranking and in the words."""
    p = replace(P, layout="nchw")
    for pass_, shapes in {
        "fprop": (p.x_shape, p.w_shape),
        "dgrad": (p.y_shape, p.w_shape),
        "wgrad": (p.y_shape, p.x_shape),
    }.items():
        config = cost_model.best(P, pass_, H100)
        plain, copied = (cost_model.predict(q, pass_, config, H100) for q in (P, p))
        moved = 2 * 2 * sum(map(math.prod, shapes)) / (H100.dram * 1e9)
        assert moved < copied.parts[cost_model.COPIES] < 1.5 * moved + 6e-6
        assert cost_model.COPIES not in plain.parts
        assert copied.seconds > plain.seconds + moved
    # of a plain model whose activations are channels_last
    mixed = replace(p, operands="nhwc")
    config = cost_model.best(mixed, "wgrad", H100)
    assert cost_model.COPIES not in cost_model.predict(mixed, "wgrad", config, H100).parts
    assert cost_model.copies(replace(p, n=0), "fprop", families.of("tma"), H100) == 0
    sequence = Problem(32, 64, 1, 131072, 128, 1, 3, layout="nchw", dtype="float32")
    found = cost_model.predict(sequence, "fprop", cost_model.best(sequence, "fprop", H100), H100)
    assert found.limiter == cost_model.COPIES or found.parts[cost_model.COPIES] > 3e-4
    depthwise = replace(p, groups=p.c, k=p.c)
    best = cost_model.best(depthwise, "fprop", H100)
    assert cost_model.COPIES not in cost_model.predict(depthwise, "fprop", best, H100).parts


def test_the_estimate_of_aten_where_no_row_is_near():
    """Then it is the faster of what could be: dilation 12 is slow where it was measured; cuDNN's
    depthwise kernels without dilation reach memory's speed; groups of fewer than 16 channels share
    blocks."""
    assert cudnn.seconds(D2, "fprop", H100) < 0.8 * cudnn.seconds(P, "fprop", H100)
    assert cudnn.seconds(D2, "fprop", A100) == cudnn.seconds(P, "fprop", A100)
    depthwise = replace(D2, groups=256, n=64, dilation=(4, 4), padding=((4, 4), (4, 4)))
    near = replace(depthwise, dilation=(2, 2), padding=((2, 2), (2, 2)))
    assert cudnn.seconds(near, "wgrad", H100) < 0.3 * cudnn.seconds(depthwise, "wgrad", H100)
    for layout, dtype, is_native in (
        ("nhwc", "float16", False),
        ("nhwc", "float32", False),
        ("nchw", "float16", False),
        ("nchw", "bfloat16", True),
        ("nchw", "float32", True),
    ):
        p = replace(depthwise, layout=layout, dtype=dtype)
        ratio = cudnn.seconds(replace(p, dilation=(1, 1)), "fprop", H100) / cudnn.seconds(
            p, "fprop", H100
        )
        assert ratio > 0.9 if is_native else ratio < 0.6
    # 32, 16, 8, 4 channels
    times = [
        cudnn.seconds(replace(D2, n=512, groups=groups), "wgrad", H100)
        for groups in (8, 16, 32, 64)
    ]
    assert times[0] < times[1] and max(times[1:]) / min(times[1:]) < 1.1


@pytest.mark.parametrize("pass_", PASSES)
def test_more_work_takes_longer(pass_):
    """Ten times the images take about ten times as long; twice the SMs half as long; dead taps cost
    nothing."""
    for device in (H100, A100):
        small, large = (predicted(replace(P, n=n), pass_, device).seconds for n in (16, 160))
        # the sums of shared tiles do not grow with the work
        shares = getattr(cost_model.best(replace(P, n=16), pass_, device), "STREAM", False)
        assert (5 if shares else 7) < large / small < 12
        half = replace(device, sms=device.sms // 2, dram=device.dram / 2)
        assert 1.6 < predicted(replace(P, n=160), pass_, half).seconds / large < 2.4
        far = replace(P, n=160, dilation=(36, 36), padding=((36, 36), (36, 36)))
        assert predicted(far, pass_, device).seconds < (0.9 if pass_ == "wgrad" else 0.7) * large


def test_the_reasons():
    """Every limiter, on a problem that has it."""
    assert (
        "too few programs"
        in predicted(
            replace(P, n=1, h=9, w=9, dilation=(1, 1), padding=((1, 1), (1, 1))),
            "fprop",
            H100,
            SPLIT_K=1,
        ).limiter
    )
    assert (
        predicted(
            replace(P, r=1, s=1, padding=((0, 0), (0, 0)), n=256, c=16, k=16), "fprop", H100
        ).limiter
        == "DRAM bandwidth"
    )
    dense = replace(P, n=64, c=1024, k=1024, dilation=(1, 1), padding=((1, 1), (1, 1)))
    assert predicted(dense, "fprop", devices.of_target("cuda:86")).limiter == "tensor cores"
    assert predicted(replace(P, n=1, h=3, w=3, c=16, k=16), "fprop", H100).limiter == "launches"
    small = {
        "BLOCK_IMG": 1,
        "BLOCK_P": 4,
        "BLOCK_Q": 8,
        "BLOCK_N": 64,
        "BLOCK_K": 32,
        "SPLIT_K": 1,
        "num_warps": 4,
    }
    near = replace(A100, l2_clock=1000)
    found = cost_model.predict(
        replace(P, n=64), "fprop", replace(gather(P, "fprop", A100), **small), near
    )
    assert found.limiter in ("shared memory", "instruction issue")
    assert predicted(dense, "fprop", replace(H100, l2_clock=8)).limiter == "L2 bandwidth"
    limiters = {
        predicted(w.problem, pass_, A100).limiter
        for w in workloads.suite("aspp")
        for pass_ in PASSES
    }
    assert "unequal programs in the last wave" in limiters


def gather(problem, pass_, device):
    return next(cfg for cfg in cost_model.rank(problem, pass_, device) if cfg.kernel == "gather")


def test_waves():
    """Programs of 10,000 clocks (and PROGRAM) on 10 SMs that hold two: the second on an SM costs
    less than the first, a third needs a new round."""

    def clocks(n, most=10_000):
        return float(waves_of(n, 10_000 * n, most, 10, 2, 0.6))

    assert clocks(1) == pytest.approx(clocks(10)) and clocks(11) == pytest.approx(clocks(20))
    assert clocks(10) < clocks(20) < 2 * clocks(10) and clocks(20) < clocks(21) <= clocks(
        30
    ) < clocks(40) <= 2.01 * clocks(20)
    assert clocks(200, 50_000) > clocks(200), "the longest program may end late"


@pytest.mark.parametrize("pass_", ["fprop", "dgrad"])
def test_small_grids_are_split(pass_):
    """One 33x33 map: 9 x 2 tiles of 128x128 would leave most SMs idle; a large batch needs no
    split. The workspace is bounded."""
    small = Problem(1, 2048, 33, 33, 256, 3, 3, padding=((12, 12), (12, 12)), dilation=(12, 12))
    small = small if pass_ == "fprop" else replace(small, c=256, k=2048)
    for target in ("cuda:80", "cuda:90", "cuda:100"):
        cfg = cost_model.best(small, pass_, target)
        splits = cfg.SPLIT_K > 1 or getattr(cfg, "STREAM", False)
        enough = config.grid(small, pass_, cfg) >= devices.of_target(target).sms // 2
        assert splits and enough, cfg
        assert cfg.SPLIT_K * 4 * 33 * 33 * 256 <= 2**26
        assert cost_model.best(replace(small, n=64), pass_, target).SPLIT_K == 1


def test_the_pick_depends_on_dilation():
    """A config chosen for one dilation must not be looked up for another: the boxes differ."""
    for pass_ in ("fprop", "dgrad"):
        far, near = (
            cost_model.best(replace(P, dilation=(d, d), padding=((d, d), (d, d))), pass_, "cuda:90")
            for d in (12, 1)
        )
        assert far != near


@pytest.mark.parametrize(
    "target, most", [("cuda:80", 1.10), ("cuda:90", 1.10), ("cuda:120", 1.10), ("cuda:100", 1.10)]
)
@pytest.mark.parametrize("pass_", PASSES)
def test_picks_skip_the_padding_of_aspp_layers(pass_, target, most):
    """Over the 28 ASPP rows dense work is 1.76 x the useful work; the picked tiles stay within
    1.10."""
    problems = [w.problem for w in workloads.suite("aspp")]
    assert len(problems) == 28
    useful = sum(p.useful_macs for p in problems)
    assert sum(p.dense_macs for p in problems) / useful > 1.7
    assert (
        sum(config.executed_macs(p, pass_, cost_model.best(p, pass_, target)) for p in problems)
        / useful
        <= most
    )


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_every_workload_has_a_legal_pick(target):
    for w in workloads.load():
        for pass_ in PASSES:
            assert (
                config.fits(cost_model.best(w.problem, pass_, target), w.problem, pass_, target)
                is None
            )


def test_why_this_kernel():
    """Every reason, in words."""

    def reason(target, pass_="fprop", cfg=None, **change):
        p = replace(P, h=64, w=64, **change)
        return cost_model.why(
            p, pass_, cfg or cost_model.best(p, pass_, target), devices.of_target(target)
        )

    descriptors = next(
        cfg for cfg in cost_model.rank(replace(P, h=64, w=64), "fprop", H100) if cfg.kernel == "tma"
    )
    told = reason("cuda:90", cfg=descriptors)
    assert told.startswith("cuda:90 loads boxes of the image by descriptor")
    assert "no descriptors" in reason("cuda:80") and "no descriptors" in reason("hip:gfx942")
    for pass_, change in (("fprop", {"c": 3}), ("dgrad", {"k": 3}), ("wgrad", {"c": 3})):
        assert "3 channels" in reason("cuda:90", pass_, **change)
    assert "multiples of 16 bytes" in reason(
        "cuda:90", c=65
    ) and "multiple of the stride" in reason("cuda:90", stride=(3, 3), dilation=(2, 2))
    assert "does not run on tensor cores" in reason("cuda:90", dtype="float64")
    assert "pointer loads: kernel tma is predicted to take " in reason(
        "cuda:90", n=1, cfg=gather(replace(P, n=1, h=64, w=64), "fprop", H100)
    )
