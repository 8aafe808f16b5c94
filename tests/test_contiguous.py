"""The family contiguous: x, dy and y read and written where they are. Triton's interpreter takes
boxes that begin at multiples of 16 bytes only; the others run on compiled code, on a GPU or a driver
that runs it on CPU tensors."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from tridil import (
    choice,
    config,
    cost_model,
    devices,
    dilated_conv1d,
    drivers,
    families,
    launch,
    reference,
    testing,
)
from tridil.families.contiguous import no_planes
from tridil.families.tma import architecture
from tridil.problem import PASSES, Problem

FAMILY = families.of("contiguous")
pytestmark = pytest.mark.usefixtures("poisoned")
H100 = devices.of_target("cuda:90")
SEQUENCE = Problem(
    8, 256, 1, 4096, 256, 1, 3, padding=((0, 0), (16, 0)), dilation=(1, 8), layout="nchw"
)


@pytest.fixture
def target(monkeypatch):
    """One whose descriptors read planes."""
    if drivers.interpreted():
        monkeypatch.setenv("TRIDIL_TARGET", "cuda:90")
    if architecture(drivers.target()) // 10 not in (9, 10):
        pytest.skip(f"{drivers.target()} has no tensor descriptors that pay")
    return drivers.target()


def draw_problem(rng, maps=None):
    """Rows of whole 16 bytes; ragged channels, groups, any dilation, padding on one side or both,
    beyond the map, outputs that read nothing; in maps strided rows."""
    maps = rng.random() < 0.4 if maps is None else maps
    groups = rng.choice([1, 1, 1, 2])
    c, k = (rng.choice([32, 64, 72, 128, 136]) for _ in range(2)) if groups == 1 else (128, 256)
    dilations = [8, 16] if drivers.interpreted() else [1, 2, 3, 5, 16, 100]
    dilation, taps, width = rng.choice(dilations), rng.choice([1, 2, 3, 5]), 8 * rng.randint(1, 30)
    rows, height = (rng.choice([1, 3]), rng.randint(3, 8)) if maps else (1, 1)
    reach = dilation * (taps - 1)
    if rng.random() < 0.6:
        sides = rng.choice([(reach, 0), (reach // 2, reach - reach // 2)])
    else:
        out, low = 8 * rng.randint(1, 30), rng.randint(0, reach + 9)
        sides = (low, max(out - width + reach - low, -reach - low))
        sides = (reach, 0) if sides[1] < 0 else sides
    if drivers.interpreted():
        sides = (reach, 0)
    step = rng.choice([1, 2, 3])
    stride = rng.choice([1, 1, 2]) if maps and (rows == 1 or step % 2 == 0) else 1
    return Problem(
        rng.choice([1, 2, 3]),
        c,
        height,
        width,
        k,
        rows,
        taps,
        (stride, 1),
        ((step * (rows - 1) // 2,) * 2, sides),
        (step, dilation),
        groups,
        rng.choice(["float16", "bfloat16"]),
        "nchw",
    )


def check(p, rng, device, target):
    """All passes that the family can run, twice: how many."""
    count = 0
    for pass_ in PASSES:
        # tf32 is wgrad's alone
        wide = pass_ == "wgrad" and rng.random() < 0.3 and drivers.fp32_precision(target) == "tf32"
        q, precision = (replace(p, dtype="float32"), "tf32") if wide else (p, "ieee")
        options = FAMILY.options(q, pass_, target, precision)
        options = [c for c in options if config.fits(c, q, pass_, target) is None]
        if not options:
            continue
        chosen = rng.choice(options)
        split = replace(chosen, SPLIT_K=3)
        if rng.random() < 0.3 and config.fits(split, q, pass_, target) is None:
            chosen = split
        x, w, bias, dy = testing.random_tensors(q, device, rng.randrange(2**31))
        args = {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
        expected = getattr(reference, pass_)(q, *args)
        got, again = (getattr(launch, pass_)(q, *args, chosen, precision) for _ in range(2))
        assert got.is_contiguous() and torch.equal(got, again)
        error, budget = testing.check(got, expected, q, pass_, precision)
        assert error <= budget, (q.key(), pass_, chosen, error, budget)
        count += 1
    return count


@pytest.mark.parametrize(
    "p",
    [
        replace(SEQUENCE, n=2, c=128, w=40, k=256, groups=2),
        replace(SEQUENCE, n=2, c=72, w=24, k=136, dtype="bfloat16"),
        Problem(
            2, 64, 7, 24, 72, 3, 2, (2, 1), ((2, 2), (8, 0)), (2, 8), layout="nchw"
        ),  # strided rows
    ],
    ids=["groups", "ragged channels", "strided rows"],
)
def test_geometries(p, target, device, seed):
    assert check(p, random.Random(seed), device, target) >= 2


@pytest.mark.parametrize("maps", [False, True])
def test_random_geometries(maps, target, device, seed):
    rng, count = random.Random(seed), 0
    while not count:
        count = check(draw_problem(rng, maps), rng, device, target)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(300))
def test_many_random_geometries(number, target, device, seed):
    rng = random.Random(seed)
    check(draw_problem(rng), rng, device, target)


def test_operands_are_read_where_they_are(target, device, monkeypatch):
    p = replace(SEQUENCE, n=2, c=64, w=32, k=64)
    x, w, bias, dy = testing.random_tensors(p, device)
    read, call = set(), launch.Ready.__call__
    monkeypatch.setattr(
        launch.Ready,
        "__call__",
        lambda self, ts: read.update(t.data_ptr() for t in ts.values()) or call(self, ts),
    )
    for pass_, args in {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}.items():
        read.clear()
        chosen = next(iter(FAMILY.options(p, pass_, target, "ieee")))
        getattr(launch, pass_)(p, *args, chosen)
        in_place = {t.data_ptr() for t in args if t is not w}
        assert in_place <= read and (w.data_ptr() in read) <= (pass_ == "wgrad")


def test_gradients_of_a_sequence(target, device, seed):
    """Through autograd, all passes by this family."""
    x = torch.randn(2, 64, 32, device=device).half().requires_grad_()
    w = (torch.randn(64, 64, 3, device=device) * 0.07).half().requires_grad_()
    dy = torch.randn(2, 64, 32, device=device).half()
    p = replace(SEQUENCE, n=2, c=64, w=32, k=64, padding=((0, 0), (8, 8)))
    configs = {pass_: next(iter(FAMILY.options(p, pass_, target, "ieee"))) for pass_ in PASSES}
    with choice.override(**configs):
        y = dilated_conv1d(x, w, None, padding=8, dilation=8, backend="triton")
        grads = torch.autograd.grad(y, (x, w), dy)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    expected = F.conv1d(x64, w64, None, padding=8, dilation=8)
    wanted = torch.autograd.grad(expected, (x64, w64), dy.double())
    for pass_, got, exact in zip(PASSES, (y, *grads), (expected, *wanted)):
        assert got.is_contiguous() and got.shape == exact.shape
        got, exact = (t.detach().unsqueeze(2) for t in (got, exact))
        error, budget = testing.check(got, exact, p, pass_)
        assert error <= budget


# ---- what the host knows
def test_it_is_the_default_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("TRIDIL_EXPERIMENTAL", raising=False)
    for pass_ in PASSES:
        ranked = cost_model.rank(SEQUENCE, pass_, H100)
        chosen = cost_model.best(SEQUENCE, pass_, H100)
        assert chosen == next(c for c in ranked if c.kernel != "contiguous")
        # predicted to be the fastest, since nothing is copied but w
        copied = cost_model.predict(SEQUENCE, pass_, chosen, H100)
        planes = next(c for c in ranked if c.kernel == "contiguous")
        found = cost_model.predict(SEQUENCE, pass_, planes, H100)
        assert found.seconds < copied.seconds
        less = found.parts.get(cost_model.COPIES, 0.0)
        moved = [config.moved_bytes(SEQUENCE, pass_, c)[0] for c in (chosen, planes)]
        assert moved[1] < 0.6 * moved[0]
        assert less < 0.2 * copied.parts[cost_model.COPIES]
        assert "experimental" in cost_model.why(SEQUENCE, pass_, planes, H100)
        monkeypatch.setenv("TRIDIL_EXPERIMENTAL", "1")
        assert cost_model.best(SEQUENCE, pass_, H100) == ranked[0] == planes
        monkeypatch.delenv("TRIDIL_EXPERIMENTAL")


@pytest.mark.parametrize(
    "change, pass_, reason",
    [
        (dict(layout="nhwc"), "fprop", "contiguous tensors"),
        (dict(operands="nhwc"), "wgrad", "contiguous tensors"),
        (dict(dtype="float32"), "fprop", "16 bits"),
        (dict(dtype="float64"), "wgrad", "16 bits"),
        (dict(w=4092), "fprop", "multiples of 16 bytes, got 4092"),
        (dict(padding=((0, 0), (17, 0))), "dgrad", "multiples of 16 bytes, got 4096 and 4097"),
        (dict(c=20), "fprop", "channels in multiples"),
        (dict(stride=(1, 2)), "fprop", "neighbouring pixels"),
        (dict(stride=(1, 2)), "dgrad", "neighbouring pixels"),
        (dict(h=5), "wgrad", "wgrad of sequences, got a map of 5x4096"),
    ],
)
def test_what_has_no_planes(change, pass_, reason):
    p = replace(SEQUENCE, **change)
    assert reason in no_planes(p, pass_)
    assert not FAMILY.options(p, pass_, "cuda:90", "tf32")
    made = config.from_json(
        dict(
            kernel="contiguous", SPLIT_K=1, num_warps=4, num_stages=3, maxnreg=None, BLOCK_IMG=1,
            BLOCK_P=1, BLOCK_Q=64, BLOCK_N=64, WARP_SPECIALIZE=False,
        )
        | (dict(BLOCK_M=64) if pass_ == "wgrad" else dict(BLOCK_K=64, WEIGHT_FIRST=True)),
        pass_,
    )  # fmt: skip
    assert reason in config.fits(made, p, pass_, "cuda:90")


def test_bad_tiles():
    p = SEQUENCE
    good = next(iter(FAMILY.options(p, "fprop", "cuda:90", "ieee")))
    for change, reason in (
        (dict(BLOCK_P=2), "part of one row"),
        (dict(BLOCK_IMG=2), "part of one row"),
        (dict(BLOCK_Q=32), "must be one of"),
        (dict(WEIGHT_FIRST=1), "WEIGHT_FIRST must be"),
    ):
        assert reason in config.fits(replace(good, **change), p, "fprop", "cuda:90")
    assert "needs sm_90" in config.fits(good, p, "fprop", "cuda:80")
    halves = replace(p, groups=2, k=64)
    assert "must divide the 32" in config.fits(good, halves, "fprop", "cuda:90")
