"""dilated_conv2d is F.conv2d: what it accepts, refuses and returns, with both backends."""

import enum
import itertools
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tridil import (
    DilatedConv1d,
    DilatedConv2d,
    convert,
    dilated_conv1d,
    dilated_conv2d,
    drivers,
    functional,
    passes,
)

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}
pytestmark = pytest.mark.usefixtures("poisoned")


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def same(got, expected):
    """Type, shape, strides, dtype, requires_grad and values agree."""
    assert (
        type(got) is type(expected)
        and got.shape == expected.shape
        and got.dtype == expected.dtype
        and got.device == expected.device
    )
    assert got.stride() == expected.stride() and got.requires_grad == expected.requires_grad
    tolerance = TOLERANCE.get(got.dtype, 1e-5)
    if got.device.type != "meta":
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=4 * tolerance)


def outcome(f, *args, **kwargs):
    try:
        return f(*args, **kwargs)
    except Exception as e:
        return e


def parity(backend, device, *args, plain=F.conv2d, ours=dilated_conv2d, **kwargs):
    """Raises where the two differ; returns whether F.conv2d raised."""
    args = [
        a.to(device) if isinstance(a, torch.Tensor) and a.dim() and a.device.type == "cpu" else a
        for a in args
    ]
    expected, got = outcome(plain, *args, **kwargs), outcome(ours, *args, backend=backend, **kwargs)
    if isinstance(expected, Exception):
        assert isinstance(got, (ValueError, TypeError)), (
            f"{plain.__name__} raised {expected!r}, {ours.__name__} gave {got!r}"
        )
        assert str(got)
        return True
    assert not isinstance(got, Exception), (
        f"{plain.__name__} accepts this, {ours.__name__} raised {got!r}"
    )
    same(got, expected)
    return False


SCALARS = [
    1,
    2,
    0,
    -1,
    2**63,
    True,
    1.0,
    "1",
    None,
    (1,),
    (2, 1),
    [2, 2],
    [1],
    (),
    (1, 1, 1),
    ((1, 2),),
    (0, 1),
    (1.0, 1.0),
    (True, 2),
    {1, 2},
    range(1, 3),
    torch.Size([2, 1]),
    np.int64(2),
    np.int32(2),
    np.float64(1),
    np.array([1, 2]),
    (np.int64(1), np.int64(2)),
    torch.tensor(2),
    torch.tensor([1, 2]),
    torch.tensor(1.0),
    (torch.tensor(1), torch.tensor(2)),
]


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_every_kind_of_argument(name, backend, device, seed):
    """The plain call comes first: a cache must not take True or 1.0 for the 1 it has seen."""
    args = draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6)
    raised = [parity(backend, device, *args, **{name: value}) for value in SCALARS]
    assert 5 < sum(raised) < len(raised) - 5


@pytest.mark.parametrize(
    "groups", [0, -1, 1, 2, 3, 4, True, 2.0, "2", None, (2,), np.int64(2), torch.tensor(2), 2**40]
)
def test_groups(groups, backend, device, seed):
    for per_group in (1, 2, 4):
        parity(backend, device, draw(2, 4, 7, 8), draw(6, per_group, 3, 3), draw(6), groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["valid", "same", "SAME", "reflect", ""])
def test_padding_strings(padding, backend, device, seed):
    for shape, stride, dilation in itertools.product(
        [(6, 4, 3, 3), (6, 4, 2, 4), (6, 4, 1, 1)], [1, 2, (1, 2), (1,)], [1, 3, (2, 1)]
    ):
        for x in (draw(2, 4, 13, 12), draw(4, 13, 12)):
            parity(backend, device, x, draw(*shape), draw(6), stride, padding, dilation)


@pytest.mark.parametrize(
    "x_shape, w_shape",
    [
        ((0, 4, 7, 8), (6, 4, 3, 3)),
        ((2, 4, 0, 8), (6, 4, 3, 3)),
        ((2, 4, 7, 0), (6, 4, 3, 1)),
        ((2, 4, 0, 8), (6, 4, 1, 1)),
        ((2, 0, 7, 8), (6, 0, 3, 3)),
        ((2, 0, 7, 8), (6, 4, 3, 3)),
        ((2, 4, 7, 8), (0, 4, 3, 3)),
        ((2, 4, 7, 8), (6, 4, 0, 3)),
        ((0, 0, 0, 0), (6, 0, 3, 3)),
        ((0, 4, 0, 8), (6, 4, 3, 3)),
        ((0, 4, 7, 8), (0, 4, 3, 3)),
        ((7, 8), (6, 4, 3, 3)),
        ((1, 2, 4, 7, 8), (6, 4, 3, 3)),
        ((7,), (6, 4, 3, 3)),
        ((), (6, 4, 3, 3)),
        ((2, 4, 7, 8), (6, 4, 3)),
        ((2, 4, 7, 8), (6, 4, 3, 3, 3)),
        ((2, 4, 7, 8), (6, 4)),
        ((4, 7, 8), (6, 4, 3, 3)),
        ((0, 7, 8), (6, 0, 3, 3)),
        ((4, 0, 8), (6, 4, 3, 3)),
        ((2, 4, 2, 2), (6, 4, 3, 3)),
        ((0, 4, 2, 2), (6, 4, 3, 3)),
        ((2, 5, 7, 8), (6, 4, 3, 3)),
        ((0, 5, 7, 8), (6, 4, 3, 3)),
        ((2, 4, 1, 1), (6, 4, 1, 1)),
        ((2, 1, 9, 9), (1, 1, 3, 3)),
        ((4, 4, 4), (6, 4, 1, 3)),
    ],
)
def test_shapes(x_shape, w_shape, backend, device, seed):
    for stride, padding, dilation in [
        (1, 0, 1),
        (1, 2, 1),
        (2, 2, 2),
        (1, "same", 2),
        (1, 5, (1, 4)),
    ]:
        for bias in (None, draw(w_shape[0])):
            parity(backend, device, draw(*x_shape), draw(*w_shape), bias, stride, padding, dilation)


@pytest.mark.parametrize("k, groups", [(5, 2), (1, 2), (0, 2), (4, 2), (4, 4), (8, 4), (6, 4)])
def test_groups_and_output_channels(k, groups, backend, device, seed):
    for n in (2, 0):
        parity(backend, device, draw(n, 4, 7, 8), draw(k, 4 // groups, 3, 3), None, 1, 0, 1, groups)


def test_bias(backend, device, seed):
    wide = draw(12)
    biases = [
        draw(1),
        draw(5),
        draw(6, 1),
        draw(1, 6),
        draw(0),
        torch.tensor(1.0),
        torch.tensor([1.0]).expand(6),
        wide[::2],
        wide[:6],
        1.0,
        [1.0] * 6,
    ]
    assert (
        sum(parity(backend, device, draw(2, 4, 7, 8), draw(6, 4, 3, 3), bias) for bias in biases)
        == 8
    )


def test_not_tensors(backend, device, seed):
    x, w, b = draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6)
    for args in (
        (x.numpy(), w, b),
        (x.tolist(), w, b),
        (x, None, b),
        (None, w),
        (x, w, b.numpy()),
        (x,),
        (),
        (x, w, b, 1, 0, 1, 1, 1),
    ):
        assert parity(backend, device, *args)
    with pytest.raises(TypeError, match="got ndarray, Tensor and NoneType"):
        dilated_conv2d(x.numpy(), w, backend=backend)


@pytest.mark.parametrize("d", [1, 2])
def test_mixed_dtypes(d, backend, device, seed):
    names = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for n, (x, w, b) in itertools.product((2, 0), itertools.product(names, names, [*names, None])):
        if not n or len({x, w, b} - {None}) > 1:
            parity(
                backend,
                device,
                draw(n, 4, 7, 8, dtype=x),
                draw(6, 4, 3, 3, dtype=w),
                b and draw(6, dtype=b),
                1,
                d,
                d,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_dtypes(dtype, backend, device, seed):
    for d, bias in itertools.product((1, 2), (draw(6, dtype=dtype), None)):
        assert not parity(
            backend,
            device,
            draw(2, 4, 7, 8, dtype=dtype),
            draw(6, 4, 3, 3, dtype=dtype),
            bias,
            1,
            d,
            d,
        )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    ],
)
def test_other_dtypes(dtype, device, seed):
    """ATen does what F.conv2d does; the Triton backend refuses, with the dtype and those it has."""
    args = [t.to(device, dtype) for t in (draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6))]
    expected, got = (
        outcome(F.conv2d, *args, 1, 2, 2),
        outcome(dilated_conv2d, *args, 1, 2, 2, backend="aten"),
    )
    assert type(got) is type(expected) and (
        isinstance(got, Exception) or torch.equal(got, expected)
    )
    pytest.importorskip("triton")
    with pytest.raises(
        TypeError, match=f"dtype {str(dtype)[6:]} .*float16, bfloat16, float32, float64"
    ):
        dilated_conv2d(*args, 1, 2, 2, backend="triton")


def test_devices(device, seed):
    x, w, b = draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6)
    for args in ((x.to("meta"), w, b), (x, w.to("meta"), b), (x, w, b.to("meta"))):
        with pytest.raises(ValueError, match="must be on one device, got .*meta"):
            dilated_conv2d(*args)


@pytest.mark.parametrize("which", ["aten", "auto", "triton"])
def test_shapes_alone(which, seed):
    """Meta tensors, and fake ones of a GPU that is not there: shapes, strides, dtypes, gradients
    and errors, whatever the backend."""
    pytest.importorskip("triton")
    from torch._subclasses import FakeTensorMode

    for mode, device, kwargs in itertools.product(
        (None, FakeTensorMode),
        ("meta", "cuda"),
        (dict(dilation=2), dict(padding="same"), dict(stride=2)),
    ):
        if (mode is None) == (device == "meta"):
            with mode() if mode else nullcontext():
                for plain, ours, dim in (
                    (F.conv2d, dilated_conv2d, 2),
                    (F.conv1d, dilated_conv1d, 1),
                ):
                    x, w, b = (
                        torch.empty(shape, device=device)
                        for shape in ((2, 4, *[9] * dim), (6, 4, *[3] * dim), (6,))
                    )
                    expected, got = plain(x, w, b, **kwargs), ours(x, w, b, **kwargs, backend=which)
                    assert (got.shape, got.stride(), got.dtype, got.device) == (
                        expected.shape,
                        expected.stride(),
                        expected.dtype,
                        expected.device,
                    )
                    if mode is None:
                        leaves = [t.requires_grad_() for t in (x, w, b)]
                        grads = torch.autograd.grad(
                            ours(*leaves, **kwargs, backend=which).sum(), leaves
                        )
                        assert [g.shape for g in grads] == [t.shape for t in leaves]
    x, w = torch.empty(2, 4, 9, device="meta"), torch.empty(6, 4, 3, device="meta")
    assert dilated_conv1d(x, w, dilation=3, causal=True, backend=which).shape == (2, 6, 9)
    assert DilatedConv2d(4, 6, 3, dilation=2, backend=which, device="meta")(
        x[:, :, None].expand(2, 4, 5, 9)
    ).shape == (2, 6, 1, 5)
    for error, args in ((ValueError, (x, w[:, :3])), (ValueError, (x, w, None, 0))):
        with pytest.raises(error):
            dilated_conv1d(*args, backend=which)
    if which == "triton":
        with pytest.raises(TypeError, match="dtype int64"):
            dilated_conv1d(x.long(), w.long(), backend=which)
        with pytest.raises(NotImplementedError, match="count in 32 bits"):
            dilated_conv1d(x, w, None, 1, 2**30, 2**30, backend=which)


@pytest.mark.parametrize(
    "geometry",
    [
        (1, 2**30, 2**30),
        (2**31 - 1, 1, 1),
        (1, 2**31, 2**31),
        (2**20, 0, 1),
        ((1, 2**21), 1, 1),
        (1, (2**24, 0), (2**24, 1)),
        (1, 2**18, 2**18),
        (2**18, 1, 1),
        ((2**17, 3), (2, 2**17), (2, 2**17)),
    ],
    ids=str,
)
def test_geometry_around_32_bits(geometry, device, seed):
    """Right in all passes, or refused with the numbers and left to ATen by "auto"."""
    pytest.importorskip("triton")
    x, w = (t.to(device).requires_grad_() for t in (draw(1, 3, 5, 4), draw(2, 3, 3, 3)))
    problem = functional.problem_of_tensors(x, w, None, *geometry)
    try:
        F.conv2d(x, w, None, *geometry)
    except RuntimeError:  # cuDNN has limits of its own
        assert x.is_cuda and problem.beyond_int32
    else:
        assert not parity("auto", device, x, w, None, *geometry)
    assert bool(problem.beyond_int32) is (
        max(itertools.chain(*(g if isinstance(g, tuple) else (g,) for g in geometry))) >= 2**20
    )
    if problem.beyond_int32:
        assert (
            drivers.can_run(problem, device) == problem.beyond_int32
            and problem.key() in problem.beyond_int32
        )
        with pytest.raises(
            NotImplementedError,
            match="cannot run this convolution: .* reaches [0-9]+ in fprop of n1 c3 .*32 bits",
        ):
            dilated_conv2d(x, w, None, *geometry, backend="triton")
        # of a graph, whose sizes are not those that were exported
        with pytest.raises(NotImplementedError, match="32 bits"):
            torch.ops.tridil.fprop(
                x,
                w,
                None,
                problem.stride,
                (*problem.padding[0], *problem.padding[1]),
                problem.dilation,
                1,
                False,
            )
    else:
        leaves = tuple(t.detach().cpu().requires_grad_() for t in (x, w))
        expected = F.conv2d(*leaves, None, *geometry)
        expected = expected, *torch.autograd.grad(expected.sum(), leaves)
        y = dilated_conv2d(x, w, None, *geometry, backend="triton")
        for got, wanted in zip((y, *torch.autograd.grad(y.sum(), (x, w))), expected):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_causal_geometry_around_32_bits(backend, device, seed):
    x, w = draw(1, 3, 20).to(device), draw(4, 3, 9).to(device)
    for dilation in (1, 2**10, 2**15):
        expected = F.conv1d(F.pad(x, (8 * dilation, 0)), w, dilation=dilation)
        torch.testing.assert_close(
            dilated_conv1d(x, w, dilation=dilation, causal=True, backend=backend),
            expected,
            rtol=1e-4,
            atol=1e-4,
        )
    pytest.importorskip("triton")
    for dilation in (2**20, 2**28, 2**33):
        with pytest.raises(
            NotImplementedError, match=f"pad0,{8 * dilation}:0 dil1,{dilation} .*32 bits"
        ):
            dilated_conv1d(x, w, dilation=dilation, causal=True, backend="triton")
        for t, mode in itertools.product(
            (x, x[0], x[:, :, :1]), (nullcontext, torch.overrides.BaseTorchFunctionMode)
        ):
            leaf = w.clone().requires_grad_()
            with mode():
                y = dilated_conv1d(t, leaf, dilation=dilation, causal=True)
            torch.testing.assert_close(y, F.conv1d(t, w[..., 8:]), rtol=1e-4, atol=1e-4)
            y.sum().backward()
            assert leaf.grad[..., 8].any() and not leaf.grad[..., :8].any()


def test_layouts_that_are_not_strided(seed):
    x, w, b = draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6)
    for args in ((x.to_sparse(), w, b), (x, w.to_sparse(), b)):
        with pytest.raises(TypeError, match="must be strided tensors, got .*sparse"):
            dilated_conv2d(*args)
    if torch.backends.mkldnn.is_available():
        torch.testing.assert_close(
            dilated_conv2d(x.to_mkldnn(), w, b).to_dense(), F.conv2d(x, w, b)
        )
        with pytest.raises(TypeError, match="mkldnn"):
            dilated_conv2d(x.to_mkldnn(), w, b, backend="triton")


class Sub(torch.Tensor):
    pass


def test_tensor_subclasses_and_views(backend, device, seed):
    x, w, b = draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6)
    for args in (
        (x, torch.nn.Parameter(w), torch.nn.Parameter(b)),
        (x.as_subclass(Sub), w, b),
        (x, w.as_subclass(Sub), b),
        (torch._neg_view(x), w, b),
        (x.requires_grad_(), w, b),
    ):
        assert not parity(backend, device, *args, 1, 2, 2)
    with torch.no_grad():
        assert not parity(backend, device, x, w, b, 1, 2, 2)
    with torch.inference_mode():
        assert not parity(backend, device, draw(2, 4, 7, 8), draw(6, 4, 3, 3), None, 1, 2, 2)


def test_keywords(backend, device, seed):
    x, w, b = (t.to(device) for t in (draw(2, 4, 9, 8), draw(6, 2, 3, 3), draw(6)))
    kwargs = dict(
        input=x, weight=w, bias=b, stride=(1, 2), padding=(2, 1), dilation=(2, 3), groups=2
    )
    same(dilated_conv2d(**kwargs, backend=backend), F.conv2d(**kwargs))
    with pytest.raises(TypeError):
        dilated_conv2d(x, w, b, 1, 0, 1, 1, backend)
    with pytest.raises(ValueError, match="backend must be one of .*'cudnn'"):
        dilated_conv2d(x[:, :2], w, backend="cudnn")


def variants(t):
    """The same values in other memory."""
    yield t.contiguous(memory_format=torch.channels_last)
    yield t.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat((t, t), 1)[:, : t.shape[1]]
    yield t.repeat_interleave(2, 3)[..., ::2]
    yield t.permute(0, 2, 3, 1).repeat_interleave(2, 1).permute(0, 3, 1, 2)[:, :, ::2]
    yield t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.slow
def test_memory_formats(backend, device, seed):
    """Result strides for every pair of input and weight memory, ambiguous shapes (C = 1, 1x1, one
    image) included."""
    for n, c, h, w, k, r, s in [
        (2, 4, 5, 6, 6, 3, 3),
        (2, 1, 5, 6, 1, 3, 3),
        (1, 1, 5, 6, 4, 1, 1),
        (2, 4, 1, 1, 6, 1, 1),
        (2, 4, 1, 6, 4, 1, 3),
        (1, 4, 5, 1, 1, 3, 1),
        (1, 1, 1, 6, 1, 1, 3),
    ]:
        x, weight = draw(n, c, h, w), draw(k, c, r, s)
        for xv, wv in itertools.product([x, *variants(x)], [weight, *list(variants(weight))[:3]]):
            assert not parity(backend, device, xv, wv, None, 1, (2 * (r - 1), 2 * (s - 1)), 2)
        assert not parity(
            backend,
            device,
            x[:, :1].expand(n, c, h, w),
            weight[:1].expand(k, c, r, s),
            None,
            1,
            2,
            1,
        )
    x = draw(4, 9, 8)
    for xv in (x, x.permute(1, 2, 0).contiguous().permute(2, 0, 1), x.transpose(1, 2)):
        assert not parity(backend, device, xv, draw(6, 4, 3, 3), None, 1, 2, 2)


@settings(max_examples=400)
@given(
    st.tuples(*[st.integers(1, 3)] * 4),
    st.permutations(range(4)),
    st.tuples(*[st.integers(1, 2)] * 4),
    st.integers(-1, 3),
)
def test_the_rule_of_memory_formats_is_atens(shape, order, step, expanded):
    """Result strides of F.conv2d for every order of dimensions, sliced and expanded."""
    t = torch.empty([shape[d] * step[d] for d in order]).permute(
        *[order.index(d) for d in range(4)]
    )
    t = t[tuple(slice(None, None, s) for s in step)]
    if expanded >= 0:
        t = t.narrow(expanded, 0, 1).expand(
            *[3 if d == expanded else n for d, n in enumerate(t.shape)]
        )
    x = t
    expected = F.conv2d(x, torch.empty(2, x.shape[1], 1, 1)).stride()
    nhwc = passes.is_channels_last(x.shape, x.stride())
    wanted = torch.empty(
        x.shape[0],
        2,
        *x.shape[2:],
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    ).stride()
    if x.shape[2] == x.shape[3] == 1:  # one memory in both formats, and ATen's kernels differ
        wanted, expected = wanted[:2], expected[:2]
    assert wanted == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        dict(),
        dict(stride=2),
        dict(groups=2),
        dict(padding="same", stride=1),
        dict(stride=(2, 3), dilation=3, padding=4),
    ],
)
def test_gradients(args, backend, device, seed):
    args = dict(padding=2, dilation=2) | args
    shapes = (2, 4, 9, 8), (6, 4 // args.get("groups", 1), 3, 3), (6,)
    for layout, needs in itertools.product(
        (torch.contiguous_format, torch.channels_last), itertools.product((True, False), repeat=3)
    ):
        tensors = [draw(*shape).to(device) for shape in shapes]
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        results = []
        for f in (F.conv2d, partial(dilated_conv2d, backend=backend)):
            leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs)]
            y = f(*leaves, **args)
            assert y.requires_grad == any(needs)
            if any(needs):
                (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
            results.append([t.grad for t in leaves])
        for got, expected in zip(*results):
            assert (got is None) == (expected is None)
            if got is not None:
                same(got, expected)


@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (2, 4, 9, 8), (4, 9, 8)])
def test_gradients_of_unbatched_and_empty_inputs(shape, backend, device, seed):
    results = []
    x, w, b = draw(*shape), draw(6, 4, 3, 3), draw(6)
    for f in (F.conv2d, partial(dilated_conv2d, backend=backend)):
        leaves = [t.to(device).clone().requires_grad_() for t in (x, w, b)]
        f(*leaves, 1, 2, 2).square().sum().backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "lower", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_autocast(lower, backend, device, seed):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    with torch.autocast(device.type, lower):
        for x, w, b in itertools.product(dtypes, dtypes, [torch.float32, lower, None]):
            parity(
                backend,
                device,
                draw(2, 4, 7, 8, dtype=x),
                draw(6, 4, 3, 3, dtype=w),
                b and draw(6, dtype=b),
                1,
                2,
                2,
            )
    leaves = [t.to(device).requires_grad_() for t in (draw(2, 4, 7, 8), draw(6, 4, 3, 3), draw(6))]
    with torch.autocast(device.type, lower):
        y = dilated_conv2d(*leaves, 1, 2, 2, backend=backend)
        expected = F.conv2d(*leaves, 1, 2, 2)
    same(y.detach(), expected.detach())
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    ):
        assert got.dtype == torch.float32
        same(got.to(lower), wanted.to(lower))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("leaf", ["weight", "input"])
def test_autocast_casts_a_parameter_once(leaf, dim, backend, device, seed):
    """One copy of what several convolutions share is saved, as by F.conv2d; nothing else is saved,
    and nothing outlives the autocast."""
    plain, ours = (F.conv2d, dilated_conv2d) if dim == 2 else (F.conv1d, dilated_conv1d)
    shared, other = (t.to(device) for t in (draw(4, 4, *[3] * dim), draw(2, 4, *[6] * dim)))
    if leaf == "input":
        shared, other = other, shared
    shared.requires_grad_()
    results = []
    for f in (plain, partial(ours, backend=backend)):
        for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            saved, count, shared.grad = set(), Counter(), None

            def pack(t):
                count[tuple(t.shape)] += 1
                saved.add(t.untyped_storage().data_ptr()) if t.shape == shared.shape else None
                return t

            with (
                grad(),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
                torch.autocast(device.type, torch.bfloat16),
            ):
                ys = [
                    f(shared, other * i, None, 1, 2, 2)
                    if leaf == "input"
                    else f(other * i, shared, None, 1, 2, 2)
                    for i in range(5)
                ]
            if grad is torch.enable_grad:
                sum(y.float().sum() for y in ys).backward()
                results.append((len(saved), count, shared.grad))
    assert results[0][:2] == results[1][:2] and results[0][0] == 1
    # five gradients and their sums are rounded, in both: of all products in absolute values
    leaf_, rest = shared.detach().double().abs().requires_grad_(), 10 * other.double().abs()
    args = (leaf_, rest) if leaf == "input" else (rest, leaf_)
    plain(*args, None, 1, 2, 2).sum().backward()
    most = 2 * 6 * torch.finfo(torch.bfloat16).eps / 2 * leaf_.grad
    assert ((results[1][2] - results[0][2]).abs() <= most).all()
    with torch.no_grad():
        shared.data.add_(1)  # which no version tells
    with torch.autocast(device.type, torch.bfloat16):
        args = (shared, other) if leaf == "input" else (other, shared)
        torch.testing.assert_close(ours(*args, backend=backend), plain(*args), rtol=3e-2, atol=3e-1)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic, backend, device, seed):
    def f(conv, x, w, b):
        return conv(x.relu(), w, b, 1, "same", (2, 3), 2) * 2

    torch._dynamo.reset()
    compiled = torch.compile(
        partial(f, partial(dilated_conv2d, backend=backend)),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for n in (2, 3):
        tensors = [
            t.to(device).requires_grad_() for t in (draw(n, 4, 9 + n, 9), draw(6, 2, 3, 2), draw(6))
        ]
        y, expected = compiled(*tensors), f(F.conv2d, *tensors)
        same(y.detach(), expected.detach())
        for got, wanted in zip(
            torch.autograd.grad(y.sin().sum(), tensors),
            torch.autograd.grad(expected.sin().sum(), tensors),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_symbolic_sizes(strict, backend, device, seed):
    from tridil import DilatedConv2d

    layer, x = (
        DilatedConv2d(4, 6, 3, padding=2, dilation=2, backend=backend).to(device),
        draw(2, 4, 9, 9).to(device),
    )
    sizes = {"input": {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=8, max=64)}}
    exported = torch.export.export(layer, (x,), strict=strict, dynamic_shapes=sizes).module()
    x = draw(3, 4, 12, 9).to(device)
    torch.testing.assert_close(exported(x), layer(x))


def test_problems_are_looked_up_once(monkeypatch, seed):
    """A second call builds nothing; another stride, memory format, dtype or bias does."""
    functional._problem.cache_clear()
    x, w, b = draw(2, 4, 9, 8), draw(6, 4, 3, 3), draw(6)
    for _ in range(3):
        dilated_conv2d(x, w, b, 1, 2, 2)
    assert functional._problem.cache_info().misses == 1
    for args in (
        (x, w, b, 2, 2, 2),
        (x, w, None, 1, 2, 2),
        (x, w, b, 1, 2, 1),
        (x.contiguous(memory_format=torch.channels_last), w, b, 1, 2, 2),
        (x.double(), w.double(), b.double(), 1, 2, 2),
    ):
        misses = functional._problem.cache_info().misses
        dilated_conv2d(*args)
        assert functional._problem.cache_info().misses == misses + 1


parity_1d = partial(parity, plain=F.conv1d, ours=dilated_conv1d)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
def test_every_kind_of_argument_1d(name, backend, device, seed):
    args = draw(2, 4, 9), draw(6, 4, 3), draw(6)
    raised = [
        parity_1d(backend, device, *args, **{name: value})
        for value in [*SCALARS, "same", "valid", "SAME"]
    ]
    assert 5 < sum(raised) < len(raised)


@pytest.mark.parametrize(
    "x_shape, w_shape",
    [
        ((2, 4, 9), (6, 4, 3)),
        ((4, 9), (6, 4, 3)),
        ((0, 4, 9), (6, 4, 3)),
        ((2, 4, 0), (6, 4, 3)),
        ((2, 0, 9), (6, 0, 3)),
        ((2, 4, 9), (0, 4, 3)),
        ((2, 4, 9), (6, 4, 0)),
        ((9,), (6, 4, 3)),
        ((2, 4, 9, 1), (6, 4, 3)),
        ((2, 4, 9), (6, 4)),
        ((2, 4, 9), (6, 4, 3, 1)),
        ((2, 5, 9), (6, 4, 3)),
        ((2, 4, 2), (6, 4, 3)),
        ((2, 1, 9), (1, 1, 2)),
        ((4, 4, 1), (6, 4, 1)),
        ((0, 9), (6, 0, 3)),
        ((2, 4, 9, 9), (6, 4, 3, 3)),
    ],
)
def test_shapes_1d(x_shape, w_shape, backend, device, seed):
    for stride, padding, dilation in [
        (1, 0, 1),
        (1, 2, (1,)),
        (2, (2,), 2),
        (1, "same", 2),
        ((3,), 5, 4),
        (1, 40, 30),
    ]:
        for bias in (None, draw(w_shape[0]), draw(w_shape[0] + 1)):
            parity_1d(
                backend, device, draw(*x_shape), draw(*w_shape), bias, stride, padding, dilation
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_memory_formats_1d(dtype, backend, device, seed):
    """F.conv1d makes its input contiguous; a weight whose channels are contiguous gives a result
    like it."""
    for n, c, length, k, taps in [
        (2, 4, 9, 6, 3),
        (2, 1, 9, 1, 3),
        (1, 1, 9, 4, 1),
        (2, 4, 1, 6, 1),
        (1, 4, 5, 1, 3),
    ]:
        x, w = draw(n, c, length, dtype=dtype), draw(k, c, taps, dtype=dtype)
        for xv in (
            x,
            x.mT.contiguous().mT,
            x.repeat_interleave(2, 2)[..., ::2],
            torch.cat((x, x), 1)[:, :c],
            x[:, :1].expand(n, c, length),
        ):
            for wv in (w, w.mT.contiguous().mT, w.repeat_interleave(2, 2)[..., ::2]):
                assert not parity_1d(
                    backend, device, xv, wv, draw(k, dtype=dtype), 1, 2 * (taps - 1), 2
                )
    parity_1d(backend, device, draw(2, 4, 9, dtype=dtype), draw(6, 4, 3, dtype=torch.float32))
    with torch.autocast(device.type, torch.bfloat16):
        for w_dtype in (torch.float32, torch.float64):
            parity_1d(
                backend,
                device,
                draw(2, 4, 9, dtype=dtype),
                draw(6, 4, 3, dtype=w_dtype),
                None,
                1,
                2,
                2,
            )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_1d(causal, backend, device, seed):
    tensors = [
        t.to(device, torch.float64).requires_grad_()
        for t in (draw(2, 2, 5), draw(2, 1, 2), draw(2))
    ]
    f = partial(
        dilated_conv1d,
        stride=2,
        dilation=3,
        padding=0 if causal else 2,
        groups=2,
        causal=causal,
        backend=backend,
    )
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True) and torch.autograd.gradgradcheck(
        f, tensors, fast_mode=True
    )


@pytest.mark.parametrize("how", ["eager", "layer", "converted", "compiled", "exported", "vmap"])
@pytest.mark.parametrize("causal", [False, True])
def test_results_of_conv1d_are_no_views(causal, how, backend, device, seed):
    """Results and gradients may be changed and detached in place, as those of F.conv1d."""
    if causal and how == "converted":
        pytest.skip("nn.Conv1d pads on both sides")
    torch._dynamo.reset()
    x, w = (t.to(device).requires_grad_() for t in (draw(2, 4, 9), draw(6, 4, 3)))
    ours = partial(dilated_conv1d, dilation=2, causal=causal, backend=backend)

    def plain(x, w):
        return F.conv1d(F.pad(x, (4 * causal, 0)), w, dilation=2)

    if how in ("layer", "converted", "exported"):
        layer = (
            nn.Conv1d(4, 6, 3, dilation=2)
            if how == "converted"
            else DilatedConv1d(4, 6, 3, dilation=2, causal=causal, backend=backend)
        )
        layer.bias, layer.weight = None, nn.Parameter(w.detach())
        convert(layer, backend=backend)
        w = layer.weight
        run = torch.export.export(layer, (x.detach(),)).module() if how == "exported" else layer
        f = lambda x, w: run(x)  # noqa: E731
    elif how == "vmap":
        f = lambda x, w: torch.vmap(ours, (0, None))(x[None], w)[0]  # noqa: E731
    else:
        f = torch.compile(ours, backend="aot_eager", fullgraph=True) if how == "compiled" else ours
    with torch.no_grad():
        y = f(x, w)
    if how != "vmap":
        assert not y._is_view()
        y.add_(nn.Parameter(torch.ones((), device=device)))
        assert y.requires_grad
    torch.testing.assert_close(
        y.detach(), plain(x, w).detach() + (how != "vmap"), rtol=1e-4, atol=1e-4
    )
    y = f(x, w)
    tensors = (x,) if how == "exported" else (x, w)
    grads = torch.autograd.grad(y.square().sum(), tensors, create_graph=how != "compiled")
    wanted = torch.autograd.grad(plain(x, w).square().sum(), tensors)
    for got, expected in zip(grads, wanted):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    if how != "vmap":
        for t in (y, *grads):
            assert not t._is_view()
            t.detach_()


@pytest.mark.parametrize("length, stride, dilation", [(1, 1, 1), (9, 1, 2), (10, 3, 4), (3, 2, 9)])
def test_causal(length, stride, dilation, backend, device, seed):
    x, w, b = (t.to(device) for t in (draw(2, 4, length), draw(6, 4, 3), draw(6)))
    for t in (x, x[0], x[:0]):
        expected = F.conv1d(F.pad(t, (2 * dilation, 0)), w, b, stride, 0, dilation)
        got = dilated_conv1d(t, w, b, stride, 0, dilation, causal=True, backend=backend)
        same(got, expected)
        assert got.shape[-1] == -(-length // stride)
    for padding in (1, "same", "valid", (2,)):
        with pytest.raises(ValueError, match="causal=True pads by itself"):
            dilated_conv1d(x, w, b, 1, padding, dilation, causal=True, backend=backend)
    with pytest.raises(ValueError, match="dilation must be positive"):
        dilated_conv1d(x, w, b, 1, 0, -1, causal=True, backend=backend)


@pytest.mark.parametrize("dynamic", [False, True])
def test_conv1d_compiles_in_one_graph(dynamic, backend, device, seed):
    torch._dynamo.reset()

    def f(x, w, b):
        return dilated_conv1d(x.relu(), w, b, 2, 0, 3, 2, causal=True, backend=backend) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3):
        tensors = [
            t.to(device).requires_grad_() for t in (draw(n, 4, 9 + n), draw(6, 2, 3), draw(6))
        ]
        y, expected = compiled(*tensors), f(*tensors)
        same(y.detach(), expected.detach())
        for got, wanted in zip(
            torch.autograd.grad(y.sin().sum(), tensors),
            torch.autograd.grad(expected.sin().sum(), tensors),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(dilation=2),
        dict(groups=2, stride=2, padding=3, dilation=(2, 3)),
        dict(padding="same", dilation=3),
    ],
)
def test_flops_are_those_of_conv2d(kwargs, backend, device, seed):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for f in (F.conv2d, partial(dilated_conv2d, backend=backend)):
        tensors = [
            t.to(device).requires_grad_()
            for t in (draw(2, 4, 9, 9), draw(6, 4 // kwargs.get("groups", 1), 3, 3), draw(6))
        ]
        for used in (
            tensors,
            [tensors[0].detach(), *tensors[1:]],
            [tensors[0], tensors[1].detach(), tensors[2]],
        ):
            with FlopCounterMode(display=False) as counter:
                f(*used, **kwargs).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[:3] == counts[3:] and counts[0] > counts[1] > 0


@pytest.mark.parametrize("first", ["tridil", "torch.utils.flop_counter"])
def test_flops_in_any_order_of_imports(first):
    """tridil imports no Triton, whose import reads TRITON_INTERPRET; flop_counter does."""
    pytest.importorskip("triton")
    code = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import {first}
assert "{first}" != "tridil" or not {{"triton", "torch.utils.flop_counter", "torch.distributed.tensor"}} & sys.modules.keys()
import tridil
from torch.utils.flop_counter import flop_registry
import torch
assert {{getattr(torch.ops.tridil, name) for name in ("fprop", "dgrad", "wgrad")}} < flop_registry.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LATE = {
    "torch.utils.flop_counter": (
        "torch.utils.module_tracker",
        """
from torch.utils.flop_counter import FlopCounterMode
counts, x, w = [], torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3, requires_grad=True)
for f in (torch.conv2d, lambda x, w: tridil.dilated_conv2d(x, w, backend="triton")):
    with FlopCounterMode(display=False) as counter:
        f(x, w).sum().backward()
    counts.append(counter.get_total_flops())
assert counts[0] == counts[1] > 0, counts
""",
    ),
    "torch.distributed.tensor": (
        "torch.distributed.tensor._api",
        """
from torch.distributed.tensor import DTensor
assert torch.ops.tridil.fprop.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
""",
    ),
}
BEFORE = {
    "looked up": "for _ in range(3): assert find_spec(NAME)",
    "run by hand": "spec = find_spec(NAME); sys.modules[NAME] = module_from_spec(spec); spec.loader.exec_module(sys.modules[NAME])",
    "raised": """
sys.modules[PART] = None
try: import_module(NAME)
except ImportError: del sys.modules[PART]
""",
    "lazy": """
spec = find_spec(NAME)
spec.loader = importlib.util.LazyLoader(spec.loader)
sys.modules[NAME] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
""",
    "threads": """
from threading import Thread
threads = [Thread(target=import_module, args=(NAME,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "reloaded": "importlib.reload(import_module(NAME))",
    "deleted": "import_module(NAME); del sys.modules[NAME]",
    "tridil reloaded": "import_module(NAME); importlib.reload(tridil.ops)",
    "tridil reloaded before": "importlib.reload(tridil.ops)",
}


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", LATE)
def test_late_registrations_survive(before, name):
    """FLOPs and shardings are registered whenever their module is executed, whatever happened to it
    before."""
    pytest.importorskip("triton")
    if name == "torch.distributed.tensor" and (
        not torch.distributed.is_available() or before in ("reloaded", "deleted")
    ):
        pytest.skip("PyTorch has no DTensor, or cannot execute it twice")
    part, check = LATE[name]
    code = f"""
import importlib, os, sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
os.environ["TRITON_INTERPRET"] = "1"
import torch, tridil, tridil.ops
NAME, PART = {name!r}, {part!r}
assert NAME not in sys.modules
{BEFORE[before]}
{check}"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_torch_function_is_asked(seed):
    """Symbolic values see the call, modes that of F.conv2d; those that say that they know tridil
    see it, too."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for f, x, w in (
        (dilated_conv2d, draw(1, 4, 5, 5), draw(6, 4, 3, 3)),
        (dilated_conv1d, draw(1, 4, 5), draw(6, 4, 3)),
    ):
        for Mode.knows_tridil in (False, True):
            seen = []
            with Mode():
                y = f(x, w, padding=2, dilation=2, backend="aten")
            assert seen == [
                f if Mode.knows_tridil else {dilated_conv2d: F.conv2d, dilated_conv1d: F.conv1d}[f]
            ]

        def call(x, w):
            return f(x, w, padding=2, dilation=2, backend="aten")

        traced = torch.fx.symbolic_trace(call)
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [
            f
        ] and torch.equal(traced(x, w), y)


def test_import_needs_no_triton_and_calls_no_cuda():
    code = """
import sys
sys.modules["triton"] = None
import torch
def no(*a, **k): raise AssertionError("a CUDA call")
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = no
import tridil
assert not any(m.startswith("triton.") for m in sys.modules)
x = torch.randn(1, 3, 256, 256)
y = tridil.dilated_conv2d(x, torch.randn(16, 3, 3, 3), dilation=2)
assert y.shape == (1, 16, 252, 252) and tridil.DilatedConv2d(3, 16, 3, dilation=2)(x).shape == y.shape
names = "dilated_conv1d dilated_conv2d DilatedConv1d DilatedConv2d Problem convert explain layers revert scan tune multi_rate_conv1d multi_rate_conv2d"
names += " MultiRateConv2d dilated_conv_transpose1d dilated_conv_transpose2d DilatedConvTranspose1d DilatedConvTranspose2d disable enable enabled"
assert {*tridil.__all__} == {*names.split()}
assert tridil.__version__
try:
    tridil.dilated_conv2d(x, torch.randn(16, 3, 3, 3), backend="triton")
except NotImplementedError as e:
    assert "riton is not installed" in str(e), e
else:
    raise AssertionError("the Triton backend ran without Triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_environment_chooses_the_backend(monkeypatch, device, seed):
    pytest.importorskip("triton")
    ran = []
    monkeypatch.setattr(
        functional.ops, "convolve", lambda *a: ran.append(a) or F.conv2d(a[0], a[1], a[2])
    )
    x, w = draw(1, 4, 5, 5).to(device), draw(4, 4, 3, 3).to(device)
    for name, count in (("aten", 0), ("triton", 1)):
        monkeypatch.setenv("TRIDIL_BACKEND", name)
        dilated_conv2d(x, w)
        assert len(ran) == count
        dilated_conv2d(x, w, backend="aten")
        assert len(ran) == count


class Padding(str, enum.Enum):
    SAME = "same"


@pytest.mark.parametrize("padding", [Padding.SAME, np.str_("same")])
def test_names_of_padding_may_be_strings_of_any_class(padding, backend, device):
    x, w = draw(1, 3, 7, 7).to(device), draw(4, 3, 3, 3).to(device)
    y = dilated_conv2d(x, w, None, 1, padding, 2, backend=backend)
    torch.testing.assert_close(y, F.conv2d(x, w, None, 1, "same", 2), rtol=1e-4, atol=1e-4)
    layer = nn.Conv2d(3, 4, 3, padding=padding, dilation=2).to(device)
    expected = layer(x)
    convert(layer, backend=backend)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
