"""Axis and Problem against brute force."""

import copy
import pickle
import random
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tridil import Problem, testing
from tridil.problem import PASSES, Axis, pads, pair, problem_of, single

small = st.integers(1, 9)
axes = st.builds(
    Axis,
    size=small,
    out=small,
    stride=st.integers(1, 4),
    offset=st.integers(-20, 8),
    dilation=st.integers(1, 12),
    taps=small,
)
problems = st.randoms(use_true_random=False).map(testing.random_problem)


def reads(axis, i, t):
    return 0 <= i * axis.stride + axis.offset + t * axis.dilation < axis.size


@given(axes, st.data())
def test_live_taps_of_a_range_of_outputs(axis, data):
    """The half-open range holds every tap that some output reads, and its ends are read."""
    i0 = data.draw(st.integers(0, axis.out - 1))
    i1 = data.draw(st.integers(i0, axis.out - 1))
    live = [t for t in range(axis.taps) if any(reads(axis, i, t) for i in range(i0, i1 + 1))]
    lo, hi = axis.live(i0, i1)
    assert 0 <= lo <= hi <= axis.taps and set(live) <= set(range(lo, hi))
    # a tap may fall between two outputs of a stride larger than the map; otherwise the range is
    # exact
    if axis.stride <= axis.size or i0 == i1:
        assert list(range(lo, hi)) == live


@given(axes)
def test_live_outputs_and_work(axis):
    pairs = [(i, t) for i in range(axis.out) for t in range(axis.taps) if reads(axis, i, t)]
    for t in range(axis.taps):
        assert list(range(*axis.live_out(t))) == [i for i, tap in pairs if tap == t]
    assert axis.useful == len(pairs)
    sizes = [1, 2, 3, 7, 16]
    for size, total, at_least, of_taps in zip(
        sizes, axis.steps(sizes), axis.live_blocks(sizes).T, axis.steps_out(sizes).T
    ):
        walked = [
            hi - lo
            for lo, hi in (
                axis.live(i, min(i + size, axis.out) - 1) for i in range(0, axis.out, size)
            )
        ]
        assert total == sum(walked) and list(at_least) == [
            sum(n > less for n in walked) for less in range(len(at_least))
        ]
        assert max(walked) == sum(at_least > 0)
        live = {(i // size, t) for i, t in pairs}
        assert len(live) <= total <= axis.taps * -(-axis.out // size)
        if axis.stride <= axis.size:
            assert walked == [sum(b == index for b, _ in live) for index in range(len(walked))]
        assert list(of_taps) == [
            -(-sum(tap == t for _, tap in pairs) // size) for t in range(axis.taps)
        ]


@settings(max_examples=300)
@given(axes)
def test_a_subsampled_axis_reads_the_same_elements(axis):
    found = axis.subsampled
    touched = {
        (i, t): i * axis.stride + axis.offset + t * axis.dilation
        for i in range(axis.out)
        for t in range(axis.taps)
        if reads(axis, i, t)
    }
    if found is None:
        assert axis.stride > 1 and (axis.dilation % axis.stride and axis.taps > 1 or not touched)
        return
    view, first, step = found
    assert (
        view.stride == 1
        and step == axis.stride
        and 0 <= first < axis.size
        and view.size == len(range(first, axis.size, step))
    )
    assert touched == {
        (i, t): first + step * (i + view.offset + t * view.dilation)
        for i in range(view.out)
        for t in range(view.taps)
        if reads(view, i, t)
    }


def correlate(axis, src, filters, out):
    for i in range(axis.out):
        for t in range(axis.taps):
            if reads(axis, i, t):
                out[axis.out0 + i * axis.out_step] += (
                    src[i * axis.stride + axis.offset + t * axis.dilation]
                    * filters[axis.tap0 + t * axis.tap_step]
                )
    return out


@settings(max_examples=200)
@given(problems)
def test_axes_are_the_convolution_and_its_adjoint(p):
    """Along each axis: fprop_axes is y, dgrad_axes is dx, each element once, with no wasted tap."""
    for dim, (size, out, taps) in enumerate(((p.h, p.p, p.r), (p.w, p.q, p.s))):
        stride, (lo, _), dil = p.stride[dim], p.padding[dim], p.dilation[dim]
        x, w, dy = (np.random.default_rng(0).integers(-9, 9, n) for n in (size, taps, out))
        hits = [
            (i, t, i * stride - lo + t * dil)
            for i in range(out)
            for t in range(taps)
            if 0 <= i * stride - lo + t * dil < size
        ]
        y, dx = np.zeros(out, int), np.zeros(size, int)
        for i, t, pixel in hits:
            y[i] += x[pixel] * w[t]
            dx[pixel] += dy[i] * w[t]
        assert (correlate(p.fprop_axes[dim], x, w, np.zeros(out, int)) == y).all()
        got, written = np.zeros(size, int), []
        for axis in p.dgrad_axes[dim]:
            assert axis.dilation >= 1 and axis.stride == 1
            correlate(axis, dy, w, got)
            written += range(axis.out0, axis.out0 + axis.out * axis.out_step, axis.out_step)
        assert (
            (got == dx).all()
            and len(written) == len(set(written))
            and set(written) <= set(range(size))
        )
        assert sum(a.useful for a in p.dgrad_axes[dim]) == len(hits)
    assert p.dgrad_covers == all(
        {a.out0 + i * a.out_step for a in axes for i in range(a.out)} == set(range(size))
        for axes, size in zip(p.dgrad_axes, (p.h, p.w))
    )


@given(problems)
def test_shapes_and_work(p):
    y = torch.empty(p.n, p.c, p.h + sum(p.padding[0]), p.w + sum(p.padding[1]), device="meta")
    y = torch.nn.functional.conv2d(
        y, torch.empty(p.w_shape, device="meta"), None, p.stride, 0, p.dilation, p.groups
    )
    assert (
        y.shape == p.y_shape
        and p.x_shape == (p.n, p.c, p.h, p.w)
        and p.w_shape == (p.k, p.c // p.groups, p.r, p.s)
    )
    assert p.dense_macs == y.numel() * p.c // p.groups * p.r * p.s
    live = (
        sum(
            0 <= i * p.stride[0] - p.padding[0][0] + r * p.dilation[0] < p.h
            and 0 <= j * p.stride[1] - p.padding[1][0] + s * p.dilation[1] < p.w
            for i in range(p.p)
            for j in range(p.q)
            for r in range(p.r)
            for s in range(p.s)
        )
        if p.p * p.q * p.r * p.s < 3000
        else None
    )
    assert live is None or p.useful_macs == live * p.n * p.k * p.c // p.groups
    assert p.bytes == 2 * (np.prod(p.x_shape) + np.prod(p.w_shape) + np.prod(p.y_shape))
    for pass_ in ("fprop", "wgrad"):
        assert np.prod(p.gemm_shape(pass_)) * p.groups == p.dense_macs
    m, n, k = p.gemm_shape("dgrad")
    assert (m, n * p.groups, k * p.groups) == (p.n * p.h * p.w, p.c, p.k * p.r * p.s) and len(
        PASSES
    ) == 3


@given(problems)
def test_identity(p):
    for other in (
        pickle.loads(pickle.dumps(p)),
        copy.deepcopy(p),
        replace(p),
        Problem(*astuple(p)),
    ):
        assert other == p and hash(other) == hash(p) and other.key() == p.key()
    assert replace(p, n=p.n + 1) != p and replace(p, n=p.n + 1).key() != p.key()


def test_a_hash_does_not_travel_between_processes():
    p = Problem(1, 1, 5, 5, 1, 3, 3)
    hash(p)
    assert "_hash" in vars(p) and "_hash" not in vars(pickle.loads(pickle.dumps(p)))


def test_key_tells_every_field_apart():
    p = Problem(4, 2048, 60, 60, 256, 3, 3, padding=((12, 12), (12, 12)), dilation=(12, 12))
    assert p.key() == "n4 c2048 h60 w60 k256 3x3 stride1 pad12 dil12 g1 float16 nhwc"
    changes = dict(
        n=2,
        c=64,
        h=61,
        w=61,
        k=64,
        r=1,
        s=1,
        stride=(1, 2),
        padding=((12, 13), (12, 12)),
        dilation=(12, 6),
        groups=2,
        dtype="float32",
        layout="nchw",
    )
    keys = {replace(p, **{name: value}).key() for name, value in changes.items()}
    assert len(keys | {p.key()}) == len(changes) + 1


def test_one_tap_axes_have_dilation_1():
    p = Problem(1, 4, 5, 5, 4, 1, 3, dilation=(4, 2))
    assert p.dilation == (1, 2) and p == replace(p, dilation=(7, 2))
    assert Problem(1, 4, 5, 5, 4, 1, 1, dilation=(4, 4)).dilation == (1, 1)


def test_asymmetric_padding():
    p = problem_of((2, 4, 1, 9), (6, 4, 1, 3), (6,), (1, 2), ((0, 0), (4, 0)), (1, 2), 1, "float32")
    assert (
        p
        == Problem(
            2, 4, 1, 9, 6, 1, 3, (1, 2), ((0, 0), (4, 0)), (1, 2), dtype="float32", layout="nchw"
        )
        and p.q == 5
    )
    with pytest.raises(ValueError, match="padding must not be negative"):
        problem_of((2, 4, 1, 9), (6, 4, 1, 3), None, 1, ((0, 0), (4, -1)), 1, 1, "float32")


@pytest.mark.parametrize("value", [3, [3], (3,), np.int64(3), torch.tensor(3), torch.Size([3])])
def test_single_takes_what_conv1d_takes(value):
    assert single(value, "stride") == 3


@pytest.mark.parametrize(
    "value, error",
    [
        ((1, 2), ValueError),
        ((), ValueError),
        (1.0, TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_single_refuses_what_conv1d_refuses(value, error):
    with pytest.raises(error, match="stride must"):
        single(value, "stride")


def test_even_filters_with_padding_same():
    """PyTorch puts the odd zero last."""
    assert pads("same", (1, 1), (3, 1), (2, 4)) == ((1, 2), (1, 2)) and pads(
        "valid", (2, 2), (3, 1), (2, 4)
    ) == ((0, 0), (0, 0))
    p = problem_of((1, 1, 7, 8), (1, 1, 2, 4), None, 1, "same", (3, 1), 1, "float32")
    assert (p.p, p.q) == (7, 8) and p.padding == ((1, 2), (1, 2))


@pytest.mark.parametrize(
    "value",
    [
        3,
        [3],
        (3,),
        (3, 3),
        [3, 3],
        torch.Size([3, 3]),
        np.int64(3),
        (np.int32(3),) * 2,
        torch.tensor(3),
        (torch.tensor(3), 3),
    ],
)
def test_pair(value):
    got = pair(value, "stride")
    assert got == (3, 3) and all(type(v) is int for v in got)


@pytest.mark.parametrize(
    "value, error",
    [
        (True, TypeError),
        (1.0, TypeError),
        ("1", TypeError),
        (None, TypeError),
        ((1.0, 1), TypeError),
        (range(2), TypeError),
        (np.array([1, 2]), TypeError),
        ((), ValueError),
        ((1, 2, 3), ValueError),
        (2**63, ValueError),
        (torch.tensor(1.5), TypeError),
    ],
)
def test_pair_refuses(value, error):
    with pytest.raises(error, match="stride must"):
        pair(value, "stride")


BAD = {
    "weight": dict(w_shape=(4, 2, 3)),
    "input must be 3D": dict(x_shape=(1, 1, 4, 9, 9)),
    "groups must be positive, got 0": dict(groups=0),
    "expects 8": dict(groups=2),
    "bias must have shape": dict(bias_shape=(5,)),
    "stride must be positive, got .0, 1.": dict(stride=(0, 1)),
    "dilation must be positive, got .-1, -1.": dict(dilation=-1),
    "padding must not be negative": dict(padding=-1),
    "padding must be an int, a pair of ints, 'valid' or 'same', got 'full'": dict(padding="full"),
    "needs stride 1, got stride=.2, 2.": dict(padding="same", stride=2),
    "extent 11 .*larger than the padded input's height 9": dict(dilation=5),
    "output channels .=7.": dict(w_shape=(7, 2, 3, 3), groups=2),
    "filter must not be empty, got 0x3": dict(w_shape=(4, 4, 0, 3)),
    "may be empty, got shape": dict(x_shape=(1, 4, 0, 9), padding=9),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_name_the_values(message):
    good = dict(
        x_shape=(1, 4, 9, 9),
        w_shape=(4, 4, 3, 3),
        bias_shape=None,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        dtype="float32",
    )
    problem_of(**good)
    with pytest.raises(ValueError, match=message):
        problem_of(**good | BAD[message])


@pytest.mark.parametrize(
    "change",
    [
        dict(stride=(0, 1)),
        dict(dilation=(1, 0)),
        dict(padding=((0, -1), (0, 0))),
        dict(groups=0),
        dict(groups=3),
        dict(k=0),
        dict(r=0),
        dict(h=-1),
        dict(h=2),
        dict(c=-4),
    ],
)
def test_problem_has_an_output_or_raises(change):
    with pytest.raises(ValueError):
        replace(Problem(1, 4, 5, 5, 4, 3, 3), **change)


def test_empty_problems():
    p = Problem(1, 4, 5, 5, 4, 3, 3)
    assert (
        not p.is_empty
        and replace(p, n=0).is_empty
        and replace(p, c=0).is_empty
        and replace(p, n=0).useful_macs == 0
    )


def test_drawn_problems_are_valid():
    for _ in range(200):
        p = testing.random_problem(random.Random(random.random()))
        assert p.p >= 1 and p.q >= 1 and 0 <= p.useful_macs <= p.dense_macs


def test_layers_of_models_and_large_maps_are_within_32_bits():
    """What a GPU's memory holds: long signals, large images, many channels (a vmap puts its batch
    there)."""
    from tridil import workloads

    assert not [layer for layer in workloads.suite("all") if layer.problem.beyond_int32]
    large = [
        Problem(1, 1, 1, 2**27, 8, 1, 3, padding=((0, 0), (2**15, 0)), dilation=(1, 2**14)),
        Problem(1, 4, 2**27, 1, 4, 9, 1),
        Problem(1, 3, 2**15, 2**15, 4, 3, 3, padding=((36, 36), (36, 36)), dilation=(36, 36)),
        Problem(
            1,
            2**20,
            33,
            33,
            2**20,
            3,
            3,
            padding=((36, 36), (36, 36)),
            dilation=(36, 36),
            groups=2**20,
        ),
        Problem(2**16, 4, 128, 128, 4, 3, 3),
        Problem(4, 64, 1024, 1024, 64, 3, 3, (64, 64), ((512, 512), (512, 512)), (512, 512)),
    ]
    assert [p.beyond_int32 for p in large] == [None] * len(large)


def _extreme(rng):
    """A problem with few outputs whose sizes, strides, dilations and padding may be of any
    magnitude."""

    def axis():
        size, taps, stride, dilation = (
            rng.randrange(1, 2 ** rng.randrange(1, bits)) for bits in (18, 4, 23, 23)
        )
        extent = dilation * (taps - 1) + 1
        lo = rng.choice([0, extent // 2, extent - 1, rng.randrange(2 * extent)])
        return (
            size,
            taps,
            stride,
            (lo, max(extent - size - lo, 0) + rng.randrange(20 * stride)),
            dilation,
        )

    (h, r, st_h, pad_h, dil_h), (w, s, st_w, pad_w, dil_w) = axis(), axis()
    groups, c, k = rng.choice([(1, 3, 4), (1, 64, 32), (8, 8, 8), (1, 2**14, 8), (2, 8, 2**15)])
    n, layout = rng.choice([1, 2, 1000]), rng.choice(["nhwc", "nchw"])
    p = Problem(
        n, c, h, w, k, r, s, (st_h, st_w), (pad_h, pad_w), (dil_h, dil_w), groups, "float16", layout
    )
    return (
        p if p.p * p.q < 2000 and min(p.stride[0], h) * min(p.stride[1], w) < 300 else _extreme(rng)
    )


def _int32_values(launch):
    """What a kernel computes in 32 bits from its arguments, at its extremes; offsets of lanes
    relative to their tile are unsigned."""
    a = dict(launch.scalars) | dict(launch.constexprs)
    n, h, w, p, q = (a[name] for name in "NHWPQ")
    sh, sw, oh, ow, dh, dw = (
        a.get(name, 1) for name in ("stride_h", "stride_w", "off_h", "off_w", "dil_h", "dil_w")
    )
    r, s, channels = a["R"], a["S"], a.get("C", 1) * a.get("G", a["K"])
    bi, bp, bq = (a[f"BLOCK_{side}"] for side in ("IMG", "P", "Q"))
    for size, out, stride, offset, dilation, taps in ((h, p, sh, oh, dh, r), (w, q, sw, ow, dw, s)):
        yield from (
            -offset + dilation,
            size - offset + dilation,
            size - offset + taps * dilation + stride,
        )
        # the kernels' FAR, and any tap
        yield from ((out - 1) * stride + offset + taps * dilation, 2**31 - 2**30 + taps * dilation)
    yield from (n + bi, max(abs(oh), r * dh) * w + max(abs(ow), s * dw))
    if "wgrad" in launch.kernel:
        # of whole boxes, of which some rows may have one that is wider than the map
        yield from (bq * sw, bp * sh, (q + bq) * sw, bi * h + (p + bp) * sh)
        yield from (q + bq, bi * p + p + bp)
    if launch.kernel.endswith("wgrad_depthwise"):
        yield from (bp * sh * w + (q + bq) * sw, bq * sw * channels, bq * a["K"], bp * q + q + bq)
    if launch.kernel.endswith(":correlate"):
        yield from (dw * channels, dh * w + s * dw)
    if "COLS" in a:
        grid_h, grid_w = a.get("grid_h", 1), a["grid_w"]
        yield from (grid_w * a["COLS"] * 2 + q, grid_h * bp + p, (a["COLS"] + s) * dw + abs(ow))


def test_what_is_within_32_bits_is_so_in_the_kernels(seed):
    """Every 32-bit value of the kernels' candidates stays below 2**31, for geometries of any
    magnitude that are not refused."""
    pytest.importorskip("triton")
    from tridil import config, launch

    rng, refused, checked = random.Random(seed), 0, 0
    while checked < 60:
        p = _extreme(rng)
        if p.beyond_int32:
            refused += 1
            continue
        checked += 1
        for pass_ in PASSES:
            for option in config.candidates(p, pass_, rng.choice(["cuda:80", "cuda:90"]))[::7]:
                for item in launch.plan(p, pass_, option):
                    if "sum" not in item.kernel:
                        assert max(map(abs, _int32_values(item))) < 2**31, (p.key(), pass_, option)
    assert refused
