"""Parallel branches in one launch: against float64, and against the branches one by one."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import tridil
from tridil import cost_model, devices, families, multi_rate_conv1d, multi_rate_conv2d
from tridil.branches import Branches
from tridil.families import persistent
from tridil.problem import PASSES, Problem


def aspp(n=1, c=32, size=9, k=24, rates=(2, 4, 6, 0), dtype="float16", layout="nhwc", **rest):
    """DeepLab's head: a rate of 0 is a 1x1 convolution."""
    problems = (
        Problem(n, c, size, size, k, 3 if d else 1, 3 if d else 1, (1, 1), ((d, d), (d, d)), (d or 1,) * 2, 1, dtype, layout)
        for d in rates
    )  # fmt: skip
    return Branches(tuple(problems), **rest)


def strided(branches, stride):
    return replace(branches, problems=tuple(replace(p, stride=stride) for p in branches.problems))


def random_branches(rng, dtype):
    """Mixed filters, rates beyond the map, 1x1, one to five branches, unequal channels, groups,
    depthwise ones."""
    n, h, w, g = rng.choice([1, 2, 3]), rng.randint(3, 12), rng.randint(3, 12), rng.choice([1, 1, 1, 2, 3])  # fmt: skip
    shared, how = rng.random() < 0.6, rng.choice(["cat", "cat", "sum"])
    stride, layout = rng.choice([(1, 1)] * 4 + [(2, 1), (2, 2)]), rng.choice(["nhwc", "nhwc", "nchw"])  # fmt: skip
    # what descriptors can describe, or any
    some = [16, 24, 40, 64] if rng.random() < 0.4 else [1, 3, 4, 8, 16, 17, 20, 33, 40]
    if depthwise := rng.random() < 0.2:
        g, some = rng.choice([3, 8, 16, 24, 33]), [1, 1, 2]
    c, k = g * (1 if depthwise else rng.choice(some)), g * rng.choice(some)
    problems = []
    for _ in range(rng.choice([1, 2, 3, 4, 5])):
        r, s = rng.choice([(1, 1), (3, 3), (3, 3), (3, 1), (1, 3), (5, 3), (5, 5)])
        d = rng.choice([1, 2, 3, 7, 15]), rng.choice([1, 2, 4, 9])
        padding = tuple((rate * (taps - 1) // 2,) * 2 for rate, taps in zip(d, (r, s)))
        problems.append(
            Problem(
                n,
                c if shared or depthwise else g * rng.choice(some),
                h,
                w,
                k if how == "sum" else g * rng.choice(some),
                r,
                s,
                stride,
                padding,
                d,
                g,
                dtype,
                layout,
            )
        )
    return Branches(tuple(problems), shared, how)


def depthwise(c=24, size=7, layout="nhwc", dtype="float16", k=None, stride=(1, 1), **rest):
    """MixNet's kind: 3x3 to 1x13 filters of one channel a group, dilated or not."""
    k = k or c
    problems = (
        Problem(2, c, size, size, k, r, s, stride, ((d * (r // 2),) * 2, (d * (s // 2),) * 2), (d, d), c, dtype, layout)
        for r, s, d in ((3, 3, 2), (5, 5, 1), (1, 13, 3))
    )  # fmt: skip
    return Branches(tuple(problems), **rest)


def unequal_filters():
    """3x3, 3x1 and 1x3 taps: those of the smaller ones end where others' go on."""
    return Branches(
        tuple(
            Problem(1, 16, 9, 9, 16, r, s, padding=((r // 2 * 2,) * 2, (s // 2 * 2,) * 2),
                    dilation=(2 if r > 1 else 1, 2 if s > 1 else 1))
            for r, s in ((3, 3), (3, 1), (1, 3))
        )
    )  # fmt: skip


def tensors(branches, device="cpu"):
    """(x, filters, bias, dy), random, of order 1."""
    p, dtype = branches.first, getattr(torch, branches.first.dtype)
    fmt = torch.channels_last if p.layout == "nhwc" else torch.contiguous_format

    def draw(shape, scale=1.0):
        t = (torch.randn(shape, device=device) * scale).to(dtype)
        return t.to(memory_format=fmt) if t.dim() == 4 else t

    ws = [draw(shape, (shape[1] * shape[2] * shape[3]) ** -0.5) for shape in branches.w_shapes]
    return draw(branches.x_shape), ws, draw((branches.y_shape[1],)), draw(branches.y_shape)


def plain(branches, x, ws, bias=None):
    """What PyTorch computes, branch by branch."""
    results = []
    for i, p in enumerate(branches.problems):
        part = x if branches.shared_input else x.split([q.c for q in branches.problems], 1)[i]
        padding = [lo for lo, _ in p.padding]
        results.append(F.conv2d(part, ws[i], None, p.stride, padding, p.dilation, p.groups))
    y = sum(results) if branches.reduce == "sum" else torch.cat(results, 1)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def references(branches, x, ws, bias, dy):
    """pass -> the float64 results."""
    x64, w64 = x.double().requires_grad_(), [w.double().requires_grad_() for w in ws]
    y = plain(branches, x64, w64, bias.double())
    dx, *dw = torch.autograd.grad(y, [x64, *w64], dy.double())
    return {"fprop": [y.detach()], "dgrad": [dx], "wgrad": dw}


def run(branches, **rest):
    """The arguments of multi_rate_conv2d that describe branches."""
    return dict(
        padding=[[lo for lo, _ in p.padding] for p in branches.problems],
        dilation=[p.dilation for p in branches.problems],
        stride=branches.first.stride,
        groups=branches.first.groups,
        shared_input=branches.shared_input,
        reduce=branches.reduce,
        **rest,
    )


def depth(branches, pass_):
    """Products of one element of a result, at most."""
    sizes = {
        "fprop": [p.c // p.groups * p.r * p.s for p in branches.problems],
        "dgrad": [p.k // p.groups * p.r * p.s for p in branches.problems],
        "wgrad": [p.n * p.p * p.q for p in branches.problems],
    }[pass_]
    return sum(sizes) if branches.adds(pass_) else max(sizes)


def assert_close(got, expected, branches, pass_):
    from tridil import drivers, testing

    for actual, wanted in zip(got, expected, strict=True):
        assert actual.shape == wanted.shape
        allowed = testing.budget(wanted, actual.dtype, depth(branches, pass_), pass_=pass_)
        if actual.dtype == torch.bfloat16 and drivers.interpreted():
            allowed = allowed * 2
        error = (actual.double() - wanted).abs().nan_to_num(nan=float("inf"))
        assert (error <= allowed).all(), (
            f"{pass_} of {branches.key()}: error {error.max()}, budget {allowed.max()}"
        )


def check_kernels(branches, device, rng, most=2):
    """All passes of all families that can, some configs of each, twice: the same bits."""
    from tridil import drivers, families, launch

    x, ws, bias, dy = tensors(branches, device)
    expected, ran = references(branches, x, ws, bias, dy), 0
    for pass_, args in (("fprop", (x, ws, bias)), ("dgrad", (dy, ws)), ("wgrad", (dy, x))):
        for family in families.FAMILIES:
            options = family.branch_options(branches, pass_, drivers.target(), "ieee")
            for config in rng.sample(options, min(most, len(options))):
                prepared = launch.prepare_branches(
                    branches, pass_, config, "ieee", "bias" if pass_ == "fprop" else ""
                )
                got, again = ([out] if torch.is_tensor(out) else out for out in (prepared(*args), prepared(*args)))  # fmt: skip
                assert_close(got, expected[pass_], branches, pass_)
                assert all(map(torch.equal, got, again))
                ran += 1
    return ran


@pytest.mark.parametrize(
    "branches",
    [
        aspp(),
        aspp(layout="nchw"),
        aspp(dtype="bfloat16", n=2, size=7, k=16, rates=(3, 30)),
        aspp(reduce="sum"),
        aspp(c=16, k=16, shared_input=False, rates=(1, 3, 0)),
        aspp(c=16, k=16, shared_input=False, reduce="sum", rates=(1, 3)),
        aspp(dtype="float32", c=20, k=12, rates=(1,)),
        unequal_filters(),
        depthwise(),
        depthwise(dtype="float32", c=6, layout="nchw", shared_input=False),
        depthwise(c=6, k=12, stride=(2, 1), shared_input=False, reduce="sum"),
        depthwise(dtype="bfloat16", reduce="sum"),
        # dgrad by residue classes, of which a 1x1, and rates that the stride divides, reach some
        strided(aspp(c=16, k=24, rates=(1, 2, 3, 0)), (2, 2)),
        strided(aspp(c=16, k=16, shared_input=False, rates=(2, 0), layout="nchw"), (2, 3)),
        strided(depthwise(c=8, size=9), (2, 2)),
        strided(depthwise(c=6, k=12, shared_input=False, layout="nchw", dtype="float32"), (3, 2)),
    ],
    ids=lambda b: (
        f"{len(b.problems)} {b.first.dtype} {b.first.layout} {b.shared_input} {b.reduce} groups {b.first.groups} stride {b.first.stride}"
    ),
)
def test_branches_in_one_launch(branches, device, poisoned, seed):
    pytest.importorskip("triton")
    assert check_kernels(branches, device, random.Random(seed), 1) >= len(PASSES)


@pytest.mark.parametrize(
    "pass_, kernel", [("dgrad", "tma"), ("wgrad", "gather"), ("wgrad", "gather_flat"), ("wgrad", "tma")]
)  # fmt: skip
def test_slices_and_split_sums(pass_, kernel, device, poisoned, seed, monkeypatch):
    """Later branches read and write beyond the first one: channels of dy, partial sums of filters."""
    pytest.importorskip("triton")
    from tridil import drivers, families, launch

    if drivers.interpreted():
        monkeypatch.setenv("TRIDIL_TARGET", "cuda:90")
    target, size = drivers.target(), 3 if kernel == "gather_flat" else 64
    layout = "nchw" if kernel == "tma" else "nhwc"
    branches = aspp(2, size, 6, 64, rates=(2, 3, 0), layout=layout)
    found = families.of(kernel).branch_options(branches, pass_, target, "ieee")
    options = [config for config in found if config.kernel == kernel]
    if not options:
        assert kernel == "tma" and target in ("cuda:80", "cuda:86", "cuda:89")
        pytest.skip(f"{target} has no tensor descriptors")
    config = replace(random.Random(seed).choice(options), SPLIT_K=1 if pass_ == "dgrad" else 2)
    x, ws, bias, dy = tensors(branches, device)
    run = launch.prepare_branches(branches, pass_, config)
    got = run(*((dy, ws) if pass_ == "dgrad" else (dy, x)))
    expected = references(branches, x, ws, bias, dy)[pass_]
    assert_close([got] if torch.is_tensor(got) else got, expected, branches, pass_)


@pytest.mark.parametrize(
    "dtype",
    ["float16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "float32"))],
)
def test_random_branches(dtype, device, poisoned, seed):
    pytest.importorskip("triton")
    rng = random.Random(seed)
    assert check_kernels(random_branches(rng, dtype), device, rng, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_many_random_branches(number, device, poisoned, seed):
    pytest.importorskip("triton")
    rng = random.Random(seed)
    assert check_kernels(
        random_branches(rng, rng.choice(["float16", "float16", "float32"])), device, rng
    )


@pytest.mark.parametrize(
    "branches",
    [
        aspp(c=8, k=8, size=5, dtype="float32", rates=(2, 4, 0)),
        aspp(c=8, k=8, size=5, dtype="float32", layout="nchw", reduce="sum", rates=(1, 3)),
        aspp(c=8, k=8, size=7, dtype="float32", shared_input=False, rates=(2, 0)),
    ],
    ids=["shared cat", "nchw sum", "own channels"],
)
def test_derivatives_are_those_of_the_branches(branches, backend, device, poisoned, seed):
    x, ws, bias, dy = (t for t in tensors(branches, device))
    leaves = [x, *ws, bias]
    for t in leaves:
        t.requires_grad_()
    y = multi_rate_conv2d(x, ws, bias, **run(branches, backend=backend))
    expected = plain(branches, x, ws, bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last) == expected.is_contiguous(
        memory_format=torch.channels_last
    )
    dy = dy.requires_grad_()
    grads = [torch.autograd.grad(out, leaves, dy, create_graph=True) for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    vs = [torch.randn_like(t) for t in grads[0]]
    second = [torch.autograd.grad(got, [*leaves[:-1], dy], vs, allow_unused=True) for got in grads]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)


def test_dgrad_and_wgrad_share_a_copy_of_dy(device, monkeypatch, seed):
    launch = pytest.importorskip("tridil.launch")
    branches = aspp(c=8, k=8, size=5, dtype="float32", layout="nchw", rates=(2, 4))
    x, ws, _, dy = tensors(branches, device)
    leaves = [t.requires_grad_() for t in (x, *ws)]
    y = multi_rate_conv2d(x, ws, None, **run(branches, backend="triton"))
    copied, copy = [], launch._copy
    monkeypatch.setattr(launch, "_copy", lambda t, *a: copied.append(t.data_ptr()) or copy(t, *a))
    got = torch.autograd.grad(y, leaves, dy)
    assert copied.count(dy.data_ptr()) == 1 and copied.count(x.data_ptr()) == 1
    expected = torch.autograd.grad(plain(branches, x, ws, None), leaves, dy)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient(backend, device, seed):
    branches = aspp(c=8, k=8, size=6, dtype="float32", rates=(2, 0))
    x, ws, bias, dy = tensors(branches, device)
    ws[1].requires_grad_()
    y = multi_rate_conv2d(x, ws, bias, **run(branches, backend=backend))
    (dw,) = torch.autograd.grad(y, [ws[1]], dy)
    (expected,) = torch.autograd.grad(plain(branches, x, ws, bias), [ws[1]], dy)
    torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-4)


def test_transforms_see_the_branches(backend, device, seed):
    branches = aspp(c=8, k=8, size=6, dtype="float32", rates=(2, 0))
    x, ws, _, _ = tensors(branches, device)

    def function(x):
        return multi_rate_conv2d(x, ws, **run(branches, backend=backend)).square().sum()

    def expected(x):
        return plain(branches, x, ws).square().sum()

    xs = torch.stack([x, 2 * x])
    for transform, t in (
        (torch.func.grad, x),
        (lambda f: torch.func.vmap(torch.func.grad(f)), xs),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), x),
    ):
        torch.testing.assert_close(
            transform(function)(t), transform(expected)(t), rtol=1e-3, atol=1e-3
        )


def test_1d_and_unbatched(backend, device, seed):
    x = torch.randn(2, 8, 20, device=device)
    ws = [torch.randn(4, 8, 3, device=device), torch.randn(6, 8, 5, device=device)]
    args = dict(padding=[2, 8], dilation=[2, 4], backend=backend)
    expected = torch.cat([F.conv1d(x, ws[0], None, 1, 2, 2), F.conv1d(x, ws[1], None, 1, 8, 4)], 1)
    got = multi_rate_conv1d(x, ws, **args)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        multi_rate_conv1d(x[0], ws, **args), expected[0], rtol=1e-4, atol=1e-4
    )
    branches = aspp(c=8, k=8, size=6, dtype="float32", rates=(2, 0))
    x, ws, bias, _ = tensors(branches, device)
    got = multi_rate_conv2d(x[0], ws, bias, **run(branches, backend=backend))
    torch.testing.assert_close(got, plain(branches, x, ws, bias)[0], rtol=1e-4, atol=1e-4)


def test_biases(backend, device, seed):
    branches = aspp(c=8, k=8, size=6, dtype="float32", rates=(2, 1, 0))
    x, ws, bias, _ = tensors(branches, device)
    parts = [bias[:8], None, bias[16:]]
    got = multi_rate_conv2d(x, ws, parts, **run(branches, backend=backend))
    whole = torch.cat([bias[:8], torch.zeros_like(bias[:8]), bias[16:]])
    torch.testing.assert_close(got, plain(branches, x, ws, whole), rtol=1e-4, atol=1e-4)
    summed = replace(branches, reduce="sum")
    got = multi_rate_conv2d(x, ws, parts, **run(summed, backend=backend))
    expected = plain(summed, x, ws, bias[:8] + bias[16:])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_autocast(backend, device, seed):
    branches = aspp(c=16, k=8, size=6, dtype="float32", rates=(2, 0))
    x, ws, bias, _ = tensors(branches, device)
    for t in (x, *ws):
        t.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = multi_rate_conv2d(x, ws, bias, **run(branches, backend=backend))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(branches, x, ws, bias), rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(y.float().sum(), [x, *ws])
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_compiled_and_exported(backend, device, seed):
    branches = aspp(c=8, k=8, size=6, dtype="float32", rates=(2, 0))
    x, ws, bias, _ = tensors(branches, device)
    layer = tridil.MultiRateConv2d(8, 8, [3, 1], (2, 1), device=device, backend=backend)
    leaves = [x.requires_grad_(), *layer.parameters()]
    expected = layer(x)
    for compiled in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(layer, (x,)).module(),
    ):
        y = compiled(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (y, layer(x))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_operators_pass_opcheck(device, seed):
    pytest.importorskip("triton")
    branches = aspp(c=8, k=8, size=5, dtype="float32", rates=(2, 0))
    x, ws, bias, dy = tensors(branches, device)
    for t in (x, *ws, bias, dy):
        t.requires_grad_()
    from tridil import multi_rate

    geometry = multi_rate._geometry(branches)
    shapes = [size for w in ws for size in w.shape]
    for op, args in (
        (torch.ops.tridil.branches_fprop, (x, ws, bias)),
        (torch.ops.tridil.branches_dgrad, (dy, ws, x.shape)),
        (torch.ops.tridil.branches_wgrad, (dy, x, shapes)),
    ):
        torch.library.opcheck(op.default, (*args, *geometry, False))


def test_the_layer_is_a_list_of_convolutions(backend, device, seed):
    layer = tridil.MultiRateConv2d(
        8, [4, 6, 5], [3, (1, 3), 1], (2, 3, 1), device=device, backend=backend
    )
    convs = nn.ModuleList(
        [
            nn.Conv2d(8, 4, 3, padding=2, dilation=2),
            nn.Conv2d(8, 6, (1, 3), padding=(0, 3), dilation=3),
            nn.Conv2d(8, 5, 1),
        ]
    ).to(device)
    convs.load_state_dict(layer.state_dict())
    layer.load_state_dict(convs.state_dict())
    x = torch.randn(2, 8, 9, 7, device=device)
    torch.testing.assert_close(
        layer(x), torch.cat([conv(x) for conv in convs], 1), rtol=1e-4, atol=1e-4
    )
    own = tridil.MultiRateConv2d(
        [3, 5], 4, 3, (1, 2), shared_input=False, reduce="sum", device=device
    )
    expected = own[0](x[:, :3]) + own[1](x[:, 3:])
    torch.testing.assert_close(own(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "weights must be a sequence", dict(weights=torch.zeros(8, 8, 3, 3))),
        (ValueError, "at least|a tensor per branch", dict(weights=[])),
        (TypeError, "input and weights must be tensors", dict(weights=[None, None])),
        (ValueError, "padding must have a value per branch, got 1 for 2", dict(padding=[1])),
        (TypeError, "padding must be a sequence", dict(padding=1)),
        (TypeError, "dilation must be a sequence", dict(dilation="same")),
        (ValueError, "one output size", dict(padding=[1, 1])),
        (ValueError, "reduce must be", dict(reduce="mean")),
        (ValueError, "bias must have shape", dict(bias=torch.zeros(3))),
        (ValueError, "bias must have a tensor or None per branch", dict(bias=[None])),
        (ValueError, "branches read", dict(shared_input=False)),
        (ValueError, "one number of output channels", dict(reduce="sum", weights=[torch.zeros(8, 8, 3, 3), torch.zeros(4, 8, 1, 1)])),
        (ValueError, "channels", dict(weights=[torch.zeros(8, 7, 3, 3), torch.zeros(8, 8, 1, 1)])),
        (ValueError, "one dtype", dict(weights=[torch.zeros(8, 8, 3, 3), torch.zeros(8, 8, 1, 1).double()])),
        (ValueError, "dilation must be positive", dict(dilation=[0, 1])),
    ],
)  # fmt: skip
def test_bad_arguments(error, match, change):
    given = dict(
        weights=[torch.zeros(8, 8, 3, 3), torch.zeros(8, 8, 1, 1)], padding=[1, 0], dilation=[1, 1]
    )
    weights = (given := given | change).pop("weights")
    with pytest.raises(error, match=match):
        multi_rate_conv2d(torch.zeros(1, 8, 5, 5), weights, given.pop("bias", None), **given)


def test_bad_layers():
    with pytest.raises(ValueError, match="odd"):
        tridil.MultiRateConv2d(8, 8, 2, (1, 2))
    with pytest.raises(ValueError, match="out_channels must have a value per branch, got 1 for 2"):
        tridil.MultiRateConv2d(8, [8], 3, (1, 2))


# ---- work and choice
def deeplab(n=1):
    return aspp(n, 2048, 60, 256, (12, 24, 36, 0))


def test_work_is_that_of_the_branches():
    together = deeplab()
    assert together.useful_macs == sum(p.useful_macs for p in together.problems)
    x, y = (2 * 2048 * 3600, 2 * 1024 * 3600)
    assert together.bytes == x + y + 2 * 2048 * 256 * (27 + 1)
    assert together.bytes_around == {"fprop": 2 * y, "dgrad": 9 * x + 2 * y, "wgrad": 2 * y}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("n", [1, 4])
def test_deeplab_is_predicted_to_gain(target, n, monkeypatch):
    """Forward and backward together, against the branches one by one as the kernels run them."""
    # what runs is not asked here, and answers are kept by device
    monkeypatch.setattr(
        persistent, "unavailable", lambda kernel, meant, t: None if t == meant else "other target"
    )
    device, branches = replace(devices.of_target(target), name="predicted"), deeplab(n)
    together = apart = 0
    for pass_ in PASSES:
        together += cost_model.best_of_branches(branches, pass_, device)[1]
        apart += cost_model.around_branches(branches, pass_, device) + sum(
            cost_model.predict(p, pass_, cost_model.best(p, pass_, device), device).seconds
            for p in branches.problems
        )
    # hopper's equal steps, which joined branches do not have, serve the branches one by one well
    assert together <= (0.9 if target == "cuda:90" else 0.75) * apart


def test_launches_of_deeplabs_head():
    """Forward 1, backward at most 3."""
    from tridil import families

    for target in ("cuda:80", "cuda:90", "cuda:100"):
        device, counts = devices.of_target(target), []
        for pass_ in PASSES:
            config, _ = cost_model.best_of_branches(deeplab(), pass_, device)
            plan = families.of(config.kernel).branch_plan(deeplab(), pass_, config, "ieee", "")
            counts.append(len(plan))
        assert counts[0] == 1 and sum(counts[1:]) <= 3


def test_the_table_of_branches(capsys, monkeypatch, device, seed):
    """perf/branches.py: without a GPU predictions for a target; with one times and a verdict."""
    table = pytest.importorskip("branches")
    assert table.main(["--target", "cuda:80", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "predicted and counted for NVIDIA A100" in text and "ESPNet-C level2 ESP" in text
    for bad in (["--target", "cuda:70"], ["--batch", "0"], ["--measure", "--target", "cuda:80"]):
        with pytest.raises(SystemExit) as stopped:
            table.main(bad)
        assert stopped.value.code == 2

    class Gpu(table.tuner.Gpu):
        def milliseconds(self, run, a, b):
            run(a, b)
            return 1.0

    gpu, small = Gpu(device), aspp(c=16, k=16, size=7, rates=(2, 0))
    for pass_ in PASSES:
        row, config = table.row_of("small", small, pass_, gpu.target)
        found = table.measured(small, pass_, config, gpu)
        assert row["launches"] >= 1 and found["right"] and found["measured_aten_us"] == 1000


def test_measured_branches_decide(device, monkeypatch, tmp_path, seed):
    """What was measured to be faster runs, together or one by one, until the kernels change."""
    pytest.importorskip("triton")
    from tridil import cache, choice, drivers, tuner

    monkeypatch.setenv("TRIDIL_CACHE", str(tmp_path))
    branches, target = aspp(c=16, k=16, size=4, rates=(2, 0)), drivers.target()

    class Gpu(tuner.Gpu):
        """The first launches, of the branches together, take `first` ms, later ones 2."""

        def milliseconds(self, run, a, b):
            run(a, b)
            self.calls = getattr(self, "calls", 0) + 1
            return self.first if self.calls <= 2 else 2.0

    for first, together in ((1.0, True), (3.0, False)):
        for pass_ in PASSES:
            gpu = Gpu(device)
            gpu.first = first
            (row,) = tridil.tune(branches, passes=[pass_], top=2, gpu=gpu)
            assert (
                row["config"]
                and not row["rejected"]
                and row["apart_ms"] == 2
                and row["ms"] == first
            )
            found = choice.resolve_branches(branches, pass_, target, "ieee", device, True)
            assert (found == row["config"]) if together else found is None
            # asked for, the kernels run together
            assert choice.resolve_branches(branches, pass_, target, "ieee", device) == row["config"]
    monkeypatch.setattr(cache, "code", lambda launches: "changed")
    assert choice.measured_branches(branches, "fprop", target, "ieee", gpu.name) is None
    with pytest.raises(RuntimeError, match="measured on a GPU"):
        tridil.tune(branches, device="cpu")
    wrong = Gpu(device)
    wrong.first, wrong.reference = 1.0, lambda p, q, a, b: Gpu.reference(wrong, p, q, a, b) + 1
    (row,) = tridil.tune(branches, passes=["fprop"], top=1, gpu=wrong)
    assert row["config"] is None and "wrong" in row["rejected"][0][1]


def test_sets_of_real_networks():
    from tridil import workloads

    found = workloads.branches()
    assert {len(b.problems) for b in found.values()} == {3, 4, 5}
    assert sum(bool(b.apart("fprop")) for b in found.values()) == 0


def test_dgrad_of_large_strides_stays_apart():
    """A kernel is compiled for each residue class of the stride."""
    found = {n: strided(aspp(size=40), (n, n)).apart("dgrad") for n in (3, 4)}
    assert found[3] is None and "of which there are 16: at most 9" in found[4]


def test_explained(capsys):
    rows = tridil.explain(deeplab(), target="cuda:80")
    text = capsys.readouterr().out
    assert [row["pass"] for row in rows] == list(PASSES) and text.count("together (predicted") >= 2
    for row in rows:
        assert row["together"] == (row["predicted_ms"] < row["predicted_apart_ms"])
    many = Branches(9 * aspp(rates=(2,)).problems)
    rows = tridil.explain(many, target="cuda:80")
    assert not rows[1]["together"] and "at most 8 branches, got 9" in rows[1]["why"]
    assert "one by one" in capsys.readouterr().out


@pytest.mark.parametrize("pass_", PASSES)
def test_large_branches_that_descriptors_cannot_take_are_joined(pass_):
    """Pointer loads stay a choice where one branch of a large set has unaligned channels."""
    first = Problem(4, 256, 60, 60, 256, 3, 3, padding=((6, 6), (6, 6)), dilation=(6, 6))
    found = Branches((first, replace(first, k=252)))
    kernels = {
        config.kernel.partition("_")[0]
        for family in families.FAMILIES
        for config in family.branch_options(found, pass_, "cuda:90", "ieee")
    }
    assert "gather" in kernels


def _replace(layer):
    layer[0] = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect").to(layer[1].weight)


CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer[0], "weight", 0.5),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer[0]),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer[0]),
    "another layer": _replace,
    "hook": lambda layer: layer[0].register_forward_hook(lambda *args: 2 * args[-1]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "weight" in name else ()) for name in CHANGES],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_layer_is_its_layers_whatever_became_of_them(name, backend, device):
    """Hooks, which old weight_norm and pruning are, are called, in every step."""
    layer = tridil.MultiRateConv2d(3, 4, 3, [1, 2], backend=backend).to(device)
    x = torch.randn(2, 3, 7, 7, device=device)
    layer(x)
    CHANGES[name](layer)
    for _ in range(2):
        y = layer(x)
        torch.testing.assert_close(
            y, torch.cat([conv(x) for conv in layer], 1), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-3, atol=1e-4)
        y.sum().backward()
        with torch.no_grad():
            for p in layer.parameters():
                p += 0.1


def test_arguments_of_the_layer_that_are_no_python_ints(device):
    layer = tridil.MultiRateConv2d(np.int64(3), np.int64(4), np.int64(3), [1, 2], device=device)
    assert layer(torch.randn(1, 3, 5, 5, device=device)).shape == (1, 8, 5, 5)
    assert type(layer[:1]) is nn.ModuleList and layer[:1][0] is layer[0]


def test_the_format_is_that_of_a_concatenation(backend, device):
    """channels_last where every branch's result is."""
    x, w = torch.randn(1, 3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    last = w.to(memory_format=torch.channels_last)
    for filters in ([w, last], [last, w], [last, last], [w, w]):
        y = multi_rate_conv2d(x, filters, padding=[1, 2], dilation=[1, 2], backend=backend)
        parts = [F.conv2d(x, f, padding=d, dilation=d) for d, f in enumerate(filters, 1)]
        assert y.stride() == torch.cat(parts, 1).stride()
