"""torch.func transforms, forward-mode AD and activation checkpointing through the Triton backend:
what F.conv2d gives under the same ones."""

import random
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from torch.autograd import forward_ad, functional, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tridil import (
    DilatedConv2d,
    dilated_conv1d,
    dilated_conv2d,
    dilated_conv_transpose2d,
    launch,
    multi_rate_conv2d,
    passes,
    reference,
    testing,
)
from tridil.problem import PASSES, Problem

conv2d = partial(dilated_conv2d, backend="triton")
# stride, padding, dilation, groups
GEOMETRY = {
    "dilated": (1, (0, 2), 2, 1),
    "groups": (1, (0, 1), 1, 2),
    "strided": ((1, 2), (0, 1), (1, 2), 1),
}
BATCHED = [batched for batched in product((False, True), repeat=3) if any(batched)]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


@pytest.fixture
def launches(monkeypatch):
    count, prepare = Counter(), launch.prepare

    def counted(problem, pass_, *args):
        run = prepare(problem, pass_, *args)
        return lambda *tensors: count.update([pass_]) or run(*tensors)

    monkeypatch.setattr(launch, "prepare", counted)
    passes._runs.clear()
    yield count
    passes._runs.clear()


def draw(*shape, device, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, device=device)


def tensors(device, groups=1, size=(2, 3), dtype=torch.float64):
    """x, w, bias"""
    return tuple(
        torch.randn(shape, device=device, dtype=dtype)
        for shape in ((2, 2, *size), (2, 2 // groups, 1, 2), (2,))
    )


def same(f, *args, strides=False, **tolerance):
    """What f computes with tridil's convolution and with ATen's, anything that holds tensors."""
    got, expected = (tree_leaves(f(conv, *args)) for conv in (conv2d, F.conv2d))
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)
            assert not strides or a.stride() == b.stride()


# ---- vmap
@pytest.mark.parametrize("batched", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("pass_", PASSES)
def test_operators_under_vmap(pass_, groups, batched, launches, device, seed):
    """One convolution, whichever tensors are batched."""
    p = Problem(2, 4, 2, 3, 8, 1, 2, (2, 1), ((1, 0), (1, 2)), (1, 2), groups, "float64", "nchw")
    x, w, _, dy = testing.random_tensors(p, device, seed)
    a, b = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    shape = {"fprop": None, "dgrad": p.x_shape, "wgrad": p.w_shape}[pass_]
    dims = tuple(random.randrange(5) if yes else None for yes in batched)
    a, b = (
        t if dim is None else torch.stack([t, t.flip(0), -t.roll(1, 3)], dim)
        for t, dim in zip((a, b), dims)
    )
    op, geometry = (
        getattr(torch.ops.tridil, pass_),
        (p.stride, (1, 0, 1, 2), p.dilation, groups, False),
    )
    got = vmap(lambda a, b: op(a, b, shape, *geometry), dims, out_dims=1)(a, b)
    assert launches == {pass_: 1}
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip((a, b), dims)]
        torch.testing.assert_close(got[:, i], getattr(reference, pass_)(p, *one))


@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap(batched, device, seed):
    """Values, gradients of all, gradients per sample; batches at any axis."""
    *geometry, groups = random.choice(list(GEOMETRY.values()))
    args, dims = [], []
    for t, yes in zip(tensors(device, groups), batched):
        dims.append(random.randrange(t.dim() + 1) if yes else None)
        args.append(torch.stack([t, t.flip(0) * 2], dims[-1]) if yes else t)
    out = random.randrange(5)

    def f(conv, *args):
        return vmap(lambda *a: conv(*a, *geometry, groups), tuple(dims), out)(*args)

    def loss(conv, *args):
        return conv(*args, *geometry, groups).pow(3).sum()

    same(f, *args, strides=True)
    same(lambda conv, *args: grad(lambda *a: f(conv, *a).pow(3).sum(), (0, 1, 2))(*args), *args)
    same(lambda conv, *args: vmap(grad(partial(loss, conv), (0, 1, 2)), tuple(dims))(*args), *args)


def test_the_batch_of_a_shared_filter_is_summed_in_one_pass(launches, device, seed):
    """No gradient of w per sample that would be summed afterwards."""
    x, w, bias = draw(3, 2, 2, 2, 3, device=device), *tensors(device)[1:]
    grad(lambda w: vmap(lambda x: conv2d(x, w, bias, 1, (0, 2), 2))(x).sum())(w)
    assert launches == {"fprop": 1, "wgrad": 1}


def test_nested_and_chunked(device, seed):
    xs, ws, bias = (
        draw(2, 3, 1, 2, 2, 3, device=device),
        draw(3, 2, 2, 1, 2, device=device),
        draw(2, device=device),
    )
    same(lambda conv: vmap(vmap(lambda x, w: conv(x, w, bias), (0, None)), (1, 0), 2)(xs, ws))
    same(lambda conv: vmap(vmap(lambda x, w: conv(x, w, bias), (None, 0)), (0, None))(xs[:, 0], ws))
    same(
        lambda conv: vmap(lambda x, w: conv(x, w, bias), (1, 0), chunk_size=2)(
            xs[0].transpose(0, 1), ws
        )
    )
    # unbatched images, (C, H, W)
    same(lambda conv: vmap(lambda x: conv(x, ws[0], bias))(xs[0, :, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_formats_and_dtypes_of_a_layer_per_sample(dtype, device, seed):
    layer = DilatedConv2d(4, 8, (1, 3), padding=(0, 2), dilation=2, dtype=dtype, device=device).to(
        memory_format=torch.channels_last
    )
    x = (
        draw(6, 4, 2, 3, device=device, dtype=dtype)
        .contiguous(memory_format=torch.channels_last)
        .unflatten(0, (3, 2))
    )
    parameters = dict(layer.named_parameters())

    def per_sample(backend):
        layer.backend = backend
        return vmap(
            grad(lambda p, x: functional_call(layer, p, x).float().square().mean()), (None, 0)
        )(parameters, x)

    expected, got = per_sample("aten"), per_sample("triton")
    assert passes.is_channels_last(x.shape[1:], vmap(layer)(x).stride()[1:])
    for name, value in expected.items():
        assert got[name].dtype == dtype
        torch.testing.assert_close(
            got[name], value, rtol=1e-2, atol=1e-2 if dtype == torch.float16 else 1e-5
        )


def test_a_causal_conv1d(device, seed):
    x, w = draw(3, 2, 2, 5, device=device), draw(2, 2, 2, device=device)
    ours = partial(dilated_conv1d, dilation=2, causal=True, backend="triton")

    def plain(x, w):
        return F.conv1d(F.pad(x, (2, 0)), w, dilation=2)

    torch.testing.assert_close(vmap(ours, (0, None))(x, w), vmap(plain, (0, None))(x, w))
    torch.testing.assert_close(jvp(ours, (x[0], w), (x[1], w)), jvp(plain, (x[0], w), (x[1], w)))


# ---- forward mode
@pytest.mark.parametrize("which", BATCHED, ids=str)
def test_tangents(which, launches, device, seed):
    """Of some of x, w and bias, as dual numbers and through jvp; what has none costs nothing."""
    inputs, steps = tensors(device), tensors(device)

    def dual(conv):
        with forward_ad.dual_level():
            args = [
                forward_ad.make_dual(t, dt) if yes else t
                for t, dt, yes in zip(inputs, steps, which)
            ]
            return tuple(forward_ad.unpack_dual(conv(*args, 1, (0, 2), 2)))

    same(dual, strides=True)
    assert launches == {"fprop": 1 + sum(which[:2])}

    def direction(conv):
        def f(*some):
            some = iter(some)
            return conv(*(next(some) if yes else t for t, yes in zip(inputs, which)), 1, (0, 2), 2)

        return jvp(f, *(tuple(t for t, yes in zip(ts, which) if yes) for ts in (inputs, steps)))

    same(direction, strides=True)
    with torch.no_grad():
        same(direction)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "strided"])
def test_gradcheck_in_forward_mode(name, device, seed):
    *geometry, groups = GEOMETRY[name]
    inputs = [t.requires_grad_() for t in tensors(device, groups, (1, 2))]

    def f(*args):
        return conv2d(*args, *geometry, groups)

    assert gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    if name == "strided":
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


COMPOSED = {
    "hessian": lambda f, args, steps: hessian(f, (0, 1))(*args),
    "jacfwd": lambda f, args, steps: jacfwd(f, (0, 1))(*args),
    "jacrev": lambda f, args, steps: jacrev(f, (0, 1))(*args),
    "jacfwd of jacfwd": lambda f, args, steps: jacfwd(jacfwd(f, (0, 1)), (0, 1))(*args),
    "jacrev of jacrev": lambda f, args, steps: jacrev(jacrev(f, (0, 1)), (0, 1))(*args),
    "jacrev of jacfwd": lambda f, args, steps: jacrev(jacfwd(f, (0, 1)), (0, 1))(*args),
    "jvp of grad": lambda f, args, steps: jvp(grad(f, (0, 1)), args, steps),
    "grad of jvp": lambda f, args, steps: grad(lambda *a: jvp(f, a, steps)[1], (0, 1))(*args),
    "jvp of jvp": lambda f, args, steps: jvp(lambda *a: jvp(f, a, steps)[1], args, steps),
    "jvp of vjp": lambda f, args, steps: jvp(
        lambda *a: vjp(f, *a)[1](torch.ones((), dtype=a[0].dtype, device=a[0].device)), args, steps
    ),
    "vectorized": lambda f, args, steps: functional.jacobian(f, args, vectorize=True),
    "vectorized, forward": lambda f, args, steps: functional.jacobian(
        f, args, vectorize=True, strategy="forward-mode"
    ),
    "vectorized hessian": lambda f, args, steps: functional.hessian(f, args, vectorize=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions(name, device, seed):
    x, w, bias = tensors(device, size=(1, 3))
    args, steps = (x[:1, :1], w[:, :1]), (torch.randn_like(x[:1, :1]), torch.randn_like(w[:, :1]))
    same(
        lambda conv: COMPOSED[name](
            lambda x, w: conv(x, w, bias, 1, (0, 2), 2).pow(3).sum(), args, steps
        )
    )


def test_dual_numbers_and_backward(device, seed):
    """Reverse over forward, and forward over reverse, outside of torch.func."""
    steps = tensors(device)

    def both(conv):
        inputs = [t.clone().requires_grad_() for t in saved]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, dt) for t, dt in zip(inputs, steps)]
            y = conv(*duals, 1, (0, 2), 2).pow(3).sum()
            reverse = torch.autograd.grad(
                forward_ad.unpack_dual(y).tangent, inputs, retain_graph=True
            )
            forward = [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(y, duals)]
        return reverse, forward

    saved = tensors(device)
    same(both)


# ---- compiled
@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["vmap", "per sample", "jvp"])
def test_compiled_in_one_graph(name, requires_grad, device, seed):
    def build(conv):
        def f(w, x):
            return conv(x, w, None, 1, (0, 2), 2).pow(2)

        return {
            "vmap": lambda w, x: vmap(f, (None, 0))(w, x),
            "jvp": lambda w, x: jvp(lambda w: f(w, x[0]), (w,), (w,)),
            "per sample": lambda w, x: vmap(grad(lambda w, x: f(w, x).sum()), (None, 0))(w, x),
        }[name]

    torch._dynamo.reset()
    args = [
        t.requires_grad_(requires_grad)
        for t in (tensors(device)[1], draw(2, 1, 2, 2, 3, device=device))
    ]
    got, expected = (
        torch.compile(build(conv2d), backend="aot_eager", fullgraph=True)(*args),
        build(F.conv2d)(*args),
    )
    torch.testing.assert_close(got, expected)
    if requires_grad:
        got, expected = (
            torch.autograd.grad(sum(t.pow(2).sum() for t in tree_leaves(out)), args)
            for out in (got, expected)
        )
        torch.testing.assert_close(got, expected)


# ---- activation checkpointing
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_runs_forward_again(use_reentrant, launches, device, seed):
    x, w, bias = (t.requires_grad_() for t in tensors(device))

    def block(x):
        return conv2d(conv2d(x, w, None, 1, "same", 2).relu(), w, bias, 1, (0, 2), 2)

    expected = torch.autograd.grad(block(x).square().sum(), (x, w, bias))
    assert launches == {"fprop": 2, "dgrad": 2, "wgrad": 2}
    for t in (x, w, bias):
        t.grad = None
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    assert launches == {"fprop": 6, "dgrad": 4, "wgrad": 4}
    for t, g in zip((x, w, bias), expected):
        assert torch.equal(t.grad, g)


def test_a_batch_of_no_items(device):
    """vmap over nothing: shapes of one item behind a 0."""
    x, w = torch.randn(2, 3, 9, 9, device=device), torch.randn(4, 3, 3, 3, device=device)
    conv = partial(dilated_conv2d, dilation=2, backend="triton")
    none, no_filters = x[:0, None], w[None][:0]
    assert vmap(partial(conv, weight=w))(none).shape == (0, 1, 4, 5, 5)
    assert vmap(lambda w: conv(x, w))(no_filters).shape == (0, 2, 4, 5, 5)
    assert vmap(conv)(none, no_filters).shape == (0, 1, 4, 5, 5)
    assert vmap(lambda b: conv(x, w, b))(torch.randn(0, 4, device=device)).shape == (0, 2, 4, 5, 5)
    assert vmap(grad(lambda w: conv(x, w).sum()))(no_filters).shape == (0, 4, 3, 3, 3)
    up = partial(dilated_conv_transpose2d, weight=w.transpose(0, 1), backend="triton")
    assert vmap(up)(none).shape == (0, 1, 4, 11, 11)
    assert vmap(lambda b: up(x, bias=b))(torch.randn(0, 4, device=device)).shape == (
        0,
        2,
        4,
        11,
        11,
    )

    def branches(w):
        args = dict(padding=[1, 2], dilation=[1, 2], backend="triton")
        return multi_rate_conv2d(x, [w, w], **args)

    assert vmap(branches)(no_filters).shape == (0, 2, 8, 9, 9)
    assert vmap(grad(lambda w: branches(w).sum()))(no_filters).shape == (0, 4, 3, 3, 3)
