"""The torch boundary: derivatives, fakes, what is launched and what is not."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from tridil import (
    choice,
    config,
    dilated_conv1d,
    dilated_conv2d,
    drivers,
    launch,
    ops,
    passes,
    reference,
    testing,
)
from tridil.problem import PASSES, Problem

OPS = {pass_: getattr(torch.ops.tridil, pass_) for pass_ in PASSES}
CASES = {
    "dilated": Problem(
        2, 3, 5, 6, 4, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), dtype="float64"
    ),
    "strided": Problem(
        1, 2, 7, 6, 3, 3, 2, (2, 3), ((3, 1), (0, 2)), (3, 2), dtype="float64", layout="nchw"
    ),
    "groups": Problem(1, 4, 4, 5, 4, 3, 2, (1, 1), ((2, 2), (2, 2)), (2, 2), 2, dtype="float64"),
    "depthwise": Problem(1, 3, 5, 4, 3, 3, 3, (2, 2), ((2, 2), (2, 2)), (2, 2), 3, dtype="float64"),
    "dead taps": Problem(
        1,
        2,
        3,
        3,
        2,
        3,
        3,
        padding=((9, 9), (9, 9)),
        dilation=(9, 9),
        dtype="float64",
        layout="nchw",
    ),
}


def geometry(p):
    return p.stride, (*p.padding[0], *p.padding[1]), p.dilation, p.groups, p.layout == "nhwc"


def arguments(p, pass_, device, seed=0):
    x, w, bias, dy = testing.random_tensors(p, device, seed)
    return {"fprop": (x, w, bias), "dgrad": (dy, w, p.x_shape), "wgrad": (dy, x, p.w_shape)}[
        pass_
    ] + geometry(p)


@pytest.fixture
def forget():
    """No plan of a test outlives it, none of another reaches it."""
    passes._runs.clear()
    yield
    passes._runs.clear()


@pytest.fixture
def launches(monkeypatch, forget):
    count, prepare = Counter(), launch.prepare

    def counted(problem, pass_, *args):
        run = prepare(problem, pass_, *args)
        return lambda *tensors: count.update([pass_]) or run(*tensors)

    monkeypatch.setattr(launch, "prepare", counted)
    return count


@pytest.mark.parametrize("nhwc", [True, False])
def test_depthwise_wgrad_reads_x_and_dy_as_they_lie(nhwc, launches, monkeypatch, device, seed):
    """(C, 1, R, S) weights lie the same in both memory formats: the pass runs in that of x."""
    p, seen, prepare = (
        replace(CASES["depthwise"], layout="nhwc" if nhwc else "nchw"),
        {},
        launch.prepare,
    )
    monkeypatch.setattr(
        launch,
        "prepare",
        lambda problem, pass_, *args: (
            seen.update({pass_: problem.layout}) or prepare(problem, pass_, *args)
        ),
    )
    x, w, _, dy = testing.random_tensors(p, device, seed)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    x, w = (
        x.contiguous(memory_format=memory_format).requires_grad_(),
        w.contiguous().requires_grad_(),
    )
    ops.convolve(x, w, None, p).backward(dy.contiguous(memory_format=memory_format))
    assert seen == dict.fromkeys(PASSES, p.layout)
    assert w.grad.is_contiguous()
    torch.testing.assert_close(w.grad, reference.wgrad(p, dy, x.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, device, seed, poisoned):
    p = CASES[name]
    x, w, bias, _ = (t.requires_grad_() for t in testing.random_tensors(p, device, seed))
    for inputs in ((x, w, bias), (x, w)):

        def f(x, w, bias=None):
            return ops.convolve(x, w, bias, p)

        assert gradcheck(f, inputs, fast_mode=True) and gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.slow
def test_derivatives_in_slow_mode(device, seed):
    p = Problem(1, 1, 2, 3, 1, 2, 2, padding=((1, 1), (1, 1)), dilation=(2, 2), dtype="float64")
    inputs = [t.requires_grad_() for t in testing.random_tensors(p, device, seed)[:3]]
    assert gradcheck(lambda *a: ops.convolve(*a, p), inputs) and gradgradcheck(
        lambda *a: ops.convolve(*a, p), inputs
    )


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, pass_, device, seed):
    args = arguments(CASES[name], pass_, device, seed)
    torch.library.opcheck(
        OPS[pass_].default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_ops_are_the_reference_and_fakes_have_their_strides(name, pass_, device, seed, poisoned):
    p = CASES[name]
    args = arguments(p, pass_, device, seed)
    got = OPS[pass_](*args)
    error, budget = testing.check(
        got,
        getattr(reference, pass_)(p, *args[:2], *([args[2]] if pass_ == "fprop" else [])),
        p,
        pass_,
    )
    assert error <= budget
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS[pass_](
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
        got.shape,
        got.stride(),
        got.dtype,
        got.device,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_their_tensor(dtype, device, seed):
    p = CASES["groups"]
    x, w, bias, dy = (t.to(dtype).requires_grad_() for t in testing.random_tensors(p, device, seed))
    for got in torch.autograd.grad(
        ops.convolve(x, w, bias, replace(p, dtype=str(dtype)[6:])), (x, w, bias), dy
    ):
        assert got.dtype == dtype


@pytest.mark.parametrize(
    "needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str
)
def test_only_wanted_gradients_are_launched(needs, launches, device, seed):
    p = CASES["dilated"]
    tensors = [
        t.requires_grad_(bool(need))
        for t, need in zip(testing.random_tensors(p, device, seed), needs)
    ]
    y = ops.convolve(*tensors, p)
    assert launches == Counter(fprop=1) and y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert launches == Counter(
        {k: v for k, v in dict(fprop=1, dgrad=needs[0], wgrad=needs[1]).items() if v}
    )
    assert [t.grad is not None for t in tensors] == [bool(n) for n in needs]


@pytest.mark.parametrize(
    "which", [("x",), ("w",), ("bias",), ("x", "w"), ("h",), ("h", "bias")], ids="+".join
)
@pytest.mark.parametrize("dim", [1, 2])
def test_only_gradients_that_are_asked_for_are_launched(which, dim, launches, device, seed):
    """By torch.autograd.grad and backward(inputs=...), of leaves and of what lies between, though
    all require one."""
    conv, plain = (dilated_conv2d, F.conv2d) if dim == 2 else (dilated_conv1d, F.conv1d)
    shapes = (2, 2, *[5] * dim), (4, 2, *[3] * dim), (4,)
    x, w, bias = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in shapes
    )
    tensors = dict(x=x, w=w, bias=bias, h=x * 2)
    asked, wanted = (
        [tensors[name] for name in which],
        Counter(fprop=1, dgrad=bool({"x", "h"} & {*which}), wgrad="w" in which),
    )

    def grads(conv, **kwargs):
        return torch.autograd.grad(
            conv(tensors["h"], w, bias, 1, 2, 2, **kwargs).square().sum(), asked, retain_graph=True
        )

    expected = grads(plain)
    for got, value in zip(grads(conv, backend="triton"), expected):
        torch.testing.assert_close(got, value)
    assert launches == +wanted
    leaves = [t for t in asked if t.is_leaf]
    if leaves and len(leaves) == len(asked):
        launches.clear()
        conv(x * 2, w, bias, 1, 2, 2, backend="triton").square().sum().backward(inputs=leaves)
        assert launches == +wanted
        for leaf, value in zip(leaves, expected):
            torch.testing.assert_close(leaf.grad, value)


def test_second_derivatives_that_nobody_asked_for_are_not_launched(launches, device, seed):
    """A gradient penalty: dx, then the gradient of its norm by w alone, or by x alone."""
    x, w = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((1, 2, 5, 5), (2, 2, 3, 3))
    )

    def penalty(conv, **kwargs):
        (dx,) = torch.autograd.grad(
            conv(x, w, None, 1, 2, 2, **kwargs).pow(3).sum(), x, create_graph=True
        )
        return dx.square().sum()

    expected = {t: torch.autograd.grad(penalty(F.conv2d), t)[0] for t in (x, w)}
    value = penalty(dilated_conv2d, backend="triton")
    assert launches == dict(fprop=1, dgrad=1)
    for t, wanted in ((w, dict(fprop=1, wgrad=2)), (x, dict(fprop=1, dgrad=1))):
        launches.clear()
        torch.testing.assert_close(torch.autograd.grad(value, t, retain_graph=True)[0], expected[t])
        assert launches == wanted


@pytest.mark.slow
@pytest.mark.parametrize("nhwc_w", [False, True])
@pytest.mark.parametrize("nhwc_x", [False, True])
@pytest.mark.parametrize("groups, multiplier", [(1, 2), (4, 1), (4, 2)])
def test_the_weight_gradient_has_the_format_of_the_weight(
    groups, multiplier, nhwc_x, nhwc_w, device, seed
):
    """Strides of sides of length 1 included, also where C/groups is 1 and both formats are one
    memory; the fake agrees; it is no view."""
    x, w = (
        torch.randn(2, 4, 5, 6, device=device),
        torch.randn(4 * multiplier, 4 // groups, 3, 2, device=device),
    )
    x = x.contiguous(
        memory_format=torch.channels_last if nhwc_x else torch.contiguous_format
    ).requires_grad_()
    w = (
        torch.empty_like(
            w, memory_format=torch.channels_last if nhwc_w else torch.contiguous_format
        )
        .copy_(w)
        .requires_grad_()
    )
    (dw,) = torch.autograd.grad(
        dilated_conv2d(x, w, None, 1, 2, 2, groups, backend="triton").square().sum(), w
    )
    (expected,) = torch.autograd.grad(F.conv2d(x, w, None, 1, 2, 2, groups).square().sum(), w)
    torch.testing.assert_close(dw, expected, rtol=1e-3, atol=1e-3)
    assert dw.stride() == w.stride() and not dw._is_view()
    args = (
        torch.randn(2, 4 * multiplier, 5, 8, device=device),
        x.detach(),
        w.shape,
        (1, 1),
        (2, 2, 2, 2),
        (2, 2),
        groups,
        nhwc_w,
    )
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS["wgrad"](
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    assert fake.stride() == OPS["wgrad"](*args).stride() == w.stride()


RELOADS = {
    "ops": "for _ in range(2): importlib.reload(tridil.ops)",
    "all": "for name in sorted(n for n in sys.modules if n.startswith('tridil.') and 'kernels' not in n): importlib.reload(sys.modules[name])",
    "package": "importlib.reload(tridil)",
    "deleted": """
for name in [n for n in sys.modules if n.split(".")[0] == "tridil"]: del sys.modules[name]
import gc, tridil
gc.collect()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", RELOADS)
def test_the_module_may_be_executed_again(how):
    """Operators are defined once per process; graphs and compiled functions of before go on."""
    code = f"""
import importlib, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, tridil, tridil.ops
x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3, requires_grad=True)
expected, = torch.autograd.grad(torch.conv2d(x, w, dilation=2).square().sum(), w)
compiled = torch.compile(lambda: tridil.dilated_conv2d(x, w, dilation=2, backend="triton"), backend="aot_eager", fullgraph=True)
exported = torch.export.export(tridil.DilatedConv2d(2, 3, 3, dilation=2, backend="triton"), (x,)).module()
fprop, value, before = torch.ops.tridil.fprop, tridil.dilated_conv2d(x, w, dilation=2, backend="triton"), exported(x)
compiled()
{RELOADS[how]}
assert torch.ops.tridil.fprop is fprop and torch.equal(exported(x), before)
for y in (value, compiled(), tridil.dilated_conv2d(x, w, dilation=2, backend="triton")):
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), w)[0], expected)
torch.testing.assert_close(torch.func.vmap(lambda x: tridil.dilated_conv2d(x, w, dilation=2, backend="triton"))(x[None])[0], y)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


LACKING = """
import importlib, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, tridil
from torch.nn import functional as F
names = tridil.private.NAMES
real = importlib.import_module

def lack(lacking):
    \"\"\"Imports tridil anew, with a PyTorch that lacks these names.\"\"\"
    lacking = {":".join((module, path.split(".")[0])) for module, path in (name.split(":") for name in lacking)}
    class Module:
        def __init__(self, name):
            self.name, self.module = name, real(name)
        def __getattr__(self, part):
            if f"{self.name}:{part}" in lacking:
                raise AttributeError(part)
            return getattr(self.module, part)
    for name in [n for n in sys.modules if n.split(".")[0] == "tridil"]: del sys.modules[name]
    importlib.import_module = Module
    try:
        return real("tridil")
    finally:
        importlib.import_module = real
"""


def lacking(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LACKING + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_pytorch_that_lacks_what_nothing_stands_for():
    lacking("""
needed = [name for name, replaced in names.items() if not replaced]
assert len(needed) > 5
for name in needed:
    try:
        lack([name])
    except ImportError as error:
        assert name.replace(":", ".") in str(error) and torch.__version__ in str(error), error
    else:
        raise AssertionError(name)
""")


@pytest.mark.slow
def test_a_pytorch_that_lacks_what_something_stands_for():
    """Values, derivatives, transforms, autocast and the tracer's refusal without any of the names."""
    lacking("""
lacking = [name for name, replaced in names.items() if replaced]
assert len(lacking) > 8
tridil = lack(lacking)
assert tridil.private.is_watched() and tridil.private._DisableAutocast is None
x, w = torch.randn(2, 2, 6, 6, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
def ours(x, w): return tridil.dilated_conv2d(x, w, dilation=2, backend="triton")
def plain(x, w): return torch.conv2d(x, w, dilation=2)
def values(conv):
    yield conv(x, w)
    first = torch.autograd.grad(conv(x, w).square().sum(), (x, w), create_graph=True)
    yield from first
    yield torch.autograd.grad(first[0].square().sum(), w)[0]
    yield torch.autograd.grad(conv(x, w), x, torch.ones(2, 2, 3, 2, 2), is_grads_batched=True)[0]
    yield torch.func.vmap(lambda x: conv(x, w))(x[None].detach())[0]
    yield torch.func.jvp(lambda x: conv(x, w.detach()), (x.detach(),), (x.detach(),))[1]
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, w)
    yield y.float()
    yield torch.autograd.grad(y.float().sum(), w)[0]
    yield torch.compile(conv, backend="aot_eager")(x, w)
for i, (a, b) in enumerate(zip(values(ours), values(plain), strict=True)):
    tolerance = 1e-1 if i in (7, 8) else 1e-3
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{i}: {m}")
try:
    torch.jit.trace(ours, (x, w))
except TypeError as error:
    assert "torch.jit.trace cannot record" in str(error)
else:
    raise AssertionError
""")


def test_double_backward_launches_what_it_needs(launches, device, seed):
    """dx depends on dy through dgrad; its derivative is one more fprop."""
    p = CASES["dilated"]
    x, w, _, dy = testing.random_tensors(p, device, seed)
    x.requires_grad_(), dy.requires_grad_()
    (dx,) = torch.autograd.grad(ops.convolve(x, w, None, p), x, dy, create_graph=True)
    assert launches == Counter(fprop=1, dgrad=1)
    torch.autograd.grad(dx.square().sum(), dy)
    assert launches == Counter(fprop=2, dgrad=1)


@pytest.mark.parametrize("change", [dict(n=0), dict(c=0), dict(h=0), dict(w=0)])
@pytest.mark.parametrize("pass_", PASSES)
def test_empty_tensors_launch_nothing(pass_, change, launches, device, poisoned):
    p = replace(CASES["dilated"], padding=((4, 4), (4, 4)), **change)
    args = arguments(p, pass_, device)
    got = OPS[pass_](*args)
    expected = getattr(reference, pass_)(p, *args[:2], *([args[2]] if pass_ == "fprop" else []))
    assert not launches and torch.equal(got, expected)


def test_no_grad_saves_nothing(device, seed):
    p = CASES["dilated"]
    tensors = testing.random_tensors(p, device, seed)[:3]
    assert ops.convolve(*tensors, p).grad_fn is None
    with torch.no_grad():
        assert ops.convolve(tensors[0].requires_grad_(), *tensors[1:], p).grad_fn is None


def test_saved_tensors_are_checked_for_changes(device, seed):
    p = CASES["dilated"]
    x, w, bias, _ = testing.random_tensors(p, device, seed)
    y = ops.convolve(x.requires_grad_(), w.requires_grad_(), bias, p)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("asked, count", [("xw", 5), ("x", 4), ("w", 4)])
def test_dgrad_and_wgrad_share_a_copy_of_dy(dim, asked, count, monkeypatch, device, seed):
    """Kernels that read channels_last copy x and w, then dy once, and w or x again."""
    p = Problem(2, 64, 1, 9, 64, 1, 3, padding=((0, 0), (2, 2)), dilation=(1, 2), layout="nchw")
    x, w, _, dy = testing.random_tensors(p, device, seed)
    function = dilated_conv2d
    if dim == 1:
        function, (x, w, dy) = dilated_conv1d, (t.squeeze(2) for t in (x, w, dy))
    padding, dilation = (2, 2) if dim == 1 else ((0, 2), (1, 2))
    x.requires_grad_("x" in asked), w.requires_grad_("w" in asked)
    copied, copy = [], launch._copy
    monkeypatch.setattr(launch, "_copy", lambda t, *a: copied.append(t.data_ptr()) or copy(t, *a))
    wanted = [t for t in (x, w) if t.requires_grad]
    options = {pass_: config.candidates(p, pass_, drivers.target()) for pass_ in PASSES}
    gather = {pass_: next(c for c in options[pass_] if c.kernel == "gather") for pass_ in PASSES}
    with choice.override(**gather):
        y = function(x, w, None, 1, padding, dilation, backend="triton")
        got = dict(zip(asked, torch.autograd.grad(y, wanted, dy)))
    assert copied.count(dy.data_ptr()) == 1 and len(copied) == count
    dy, x, w = (t.detach().view(*t.shape[:2], 1, -1) for t in (dy, x, w))
    for role, grad in got.items():
        expected = reference.dgrad(p, dy, w) if role == "x" else reference.wgrad(p, dy, x)
        torch.testing.assert_close(grad.view(expected.shape), expected.to(grad.dtype))
    assert launch._shared.get() is None


def test_a_backward_within_a_backward(device, seed):
    """Hooks of saved tensors run within a pass of a derivative."""
    x, w, _, dy = testing.random_tensors(CASES["dead taps"], device, seed)
    leaves = [t.requires_grad_() for t in (x, w)]
    y, inner = dilated_conv2d(x, w, None, 1, 9, 9, backend="triton"), []

    def pack(t):
        if not inner:
            inner.append(None)
            with torch.enable_grad():
                again = dilated_conv2d(x, w, None, 1, 9, 9, backend="triton")
                inner[:] = torch.autograd.grad(again, leaves, dy)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outer = torch.autograd.grad(y, leaves, dy, create_graph=True)
    expected = torch.autograd.grad(F.conv2d(x, w, None, 1, 9, 9), leaves, dy)
    torch.testing.assert_close(inner, list(expected))
    torch.testing.assert_close(outer, expected)
    assert launch._shared.get() is None


@pytest.fixture
def prepared(monkeypatch, forget):
    """(problem, pass, config, precision) of what is prepared; nothing runs."""
    seen = []
    monkeypatch.setattr(
        launch,
        "prepare",
        lambda problem, pass_, config, precision, epilogue: (
            seen.append((problem, pass_, config, precision)) or (lambda *tensors: torch.empty(0))
        ),
    )
    return seen


@pytest.mark.parametrize("setting, expected", [("tf32", "tf32"), ("ieee", "ieee")])
def test_precision_follows_cudnn(setting, expected, prepared, device, seed):
    before, other = (
        torch.backends.cudnn.conv.fp32_precision,
        "tf32" if setting == "ieee" else "ieee",
    )
    try:
        for precision in (other, setting):
            torch.backends.cudnn.conv.fp32_precision = precision
            for dtype in ("float32", "float16"):
                OPS["fprop"](*arguments(Problem(1, 4, 5, 5, 4, 3, 3, dtype=dtype), "fprop", device))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    # float16 does not depend on it: prepared once
    assert [row[-1] for row in prepared] == [other, "ieee", expected]


def test_the_target_reaches_the_config(monkeypatch, prepared, device, seed):
    for target, clamp in (("cuda:80", False), ("cuda:100", True), ("cuda:80", False)):
        monkeypatch.setenv("TRIDIL_TARGET", target)
        assert drivers.target() == target
        OPS["fprop"](*arguments(CASES["dilated"], "fprop", device))
        assert [row for row in prepared if row[2].CLAMP is clamp]
    assert len(prepared) == 2


def test_launches_under_the_inputs_device(monkeypatch, forget):
    """The target is that of the input's device, which need not be the current one, and so is the
    launch's device."""
    order = []

    class Guard:
        def __init__(self, device):
            order.append(str(device))

        def __enter__(self):
            order.append("enter")

        def __exit__(self, *error):
            order.append("exit")

    class OnAnotherDevice(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # a machine with one GPU has no cuda:1 to ask
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(passes.drivers, "target", lambda: order.append("target") or "cuda:80")
    monkeypatch.setattr(launch, "prepare", lambda *args: lambda *tensors: order.append("launch"))
    x, w = torch.randn(1, 4, 5, 5).as_subclass(OnAnotherDevice), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        passes.run(
            "fprop", x, w, None, x.shape, w.shape, ((1, 1), (0, 0, 0, 0), (1, 1), 1), False, False
        )
    assert order == [
        "cuda:1",
        "enter",
        "target",
        "exit",
        "cuda:1",
        "enter",
        "launch",
        "exit",
        "cuda:1",
        "enter",
        "launch",
        "exit",
    ]
