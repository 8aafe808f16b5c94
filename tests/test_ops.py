"""The torch boundary: derivatives, fakes, what is launched and what is not."""
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from torch.autograd import gradcheck, gradgradcheck

from tridil import dispatch, launch, ops, reference, testing
from tridil.problem import PASSES, Problem

OPS = {pass_: getattr(torch.ops.tridil, pass_) for pass_ in PASSES}
CASES = {
    "dilated": Problem(2, 3, 5, 6, 4, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), dtype="float64"),
    "strided": Problem(1, 2, 7, 6, 3, 3, 2, (2, 3), ((3, 1), (0, 2)), (3, 2), dtype="float64", layout="nchw"),
    "groups": Problem(1, 4, 4, 5, 4, 3, 2, (1, 1), ((2, 2), (2, 2)), (2, 2), 2, dtype="float64"),
    "depthwise": Problem(1, 3, 5, 4, 3, 3, 3, (2, 2), ((2, 2), (2, 2)), (2, 2), 3, dtype="float64"),
    "dead taps": Problem(1, 2, 3, 3, 2, 3, 3, padding=((9, 9), (9, 9)), dilation=(9, 9), dtype="float64", layout="nchw"),
}


def geometry(p):
    return p.stride, (*p.padding[0], *p.padding[1]), p.dilation, p.groups, p.layout == "nhwc"


def arguments(p, pass_, device, seed=0):
    x, w, bias, dy = testing.random_tensors(p, device, seed)
    return {"fprop": (x, w, bias), "dgrad": (dy, w, p.x_shape), "wgrad": (dy, x, p.w_shape)}[pass_] + geometry(p)


@pytest.fixture
def forget():
    """No plan of a test outlives it, none of another reaches it."""
    ops._runs.clear()
    yield
    ops._runs.clear()


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
    p, seen, prepare = replace(CASES["depthwise"], layout="nhwc" if nhwc else "nchw"), {}, launch.prepare
    monkeypatch.setattr(launch, "prepare", lambda problem, pass_, *args: seen.update({pass_: problem.layout}) or prepare(problem, pass_, *args))
    x, w, _, dy = testing.random_tensors(p, device, seed)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    x, w = x.contiguous(memory_format=memory_format).requires_grad_(), w.contiguous().requires_grad_()
    ops.convolve(x, w, None, p).backward(dy.contiguous(memory_format=memory_format))
    assert seen == dict.fromkeys(PASSES, p.layout)
    assert w.grad.is_contiguous()
    torch.testing.assert_close(w.grad, reference.wgrad(p, dy, x.detach()))


@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, device, seed, poisoned):
    p = CASES[name]
    x, w, bias, _ = (t.requires_grad_() for t in testing.random_tensors(p, device, seed))
    for inputs in ((x, w, bias), (x, w)):
        def f(x, w, bias=None):
            return ops.convolve(x, w, bias, p)
        assert gradcheck(f, inputs, fast_mode=True) and gradgradcheck(f, inputs, fast_mode=True)


def test_derivatives_in_slow_mode(device, seed):
    p = Problem(1, 1, 2, 3, 1, 2, 2, padding=((1, 1), (1, 1)), dilation=(2, 2), dtype="float64")
    inputs = [t.requires_grad_() for t in testing.random_tensors(p, device, seed)[:3]]
    assert gradcheck(lambda *a: ops.convolve(*a, p), inputs) and gradgradcheck(lambda *a: ops.convolve(*a, p), inputs)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, pass_, device, seed):
    args = arguments(CASES[name], pass_, device, seed)
    torch.library.opcheck(OPS[pass_].default, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_ops_are_the_reference_and_fakes_have_their_strides(name, pass_, device, seed, poisoned):
    p = CASES[name]
    args = arguments(p, pass_, device, seed)
    got = OPS[pass_](*args)
    error, budget = testing.check(got, getattr(reference, pass_)(p, *args[:2], *([args[2]] if pass_ == "fprop" else [])), p, pass_)
    assert error <= budget
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPS[pass_](*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (got.shape, got.stride(), got.dtype, got.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_their_tensor(dtype, device, seed):
    p = CASES["groups"]
    x, w, bias, dy = (t.to(dtype).requires_grad_() for t in testing.random_tensors(p, device, seed))
    for got in torch.autograd.grad(ops.convolve(x, w, bias, replace(p, dtype=str(dtype)[6:])), (x, w, bias), dy):
        assert got.dtype == dtype


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_only_wanted_gradients_are_launched(needs, launches, device, seed):
    p = CASES["dilated"]
    tensors = [t.requires_grad_(bool(need)) for t, need in zip(testing.random_tensors(p, device, seed), needs)]
    y = ops.convolve(*tensors, p)
    assert launches == Counter(fprop=1) and y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert launches == Counter({k: v for k, v in dict(fprop=1, dgrad=needs[0], wgrad=needs[1]).items() if v})
    assert [t.grad is not None for t in tensors] == [bool(n) for n in needs]


def test_double_backward_launches_what_it_needs(launches, device, seed):
    """dx depends on dy through dgrad; its derivative is one more fprop."""
    p = CASES["dilated"]
    x, w, _, dy = testing.random_tensors(p, device, seed)
    x.requires_grad_(), dy.requires_grad_()
    dx, = torch.autograd.grad(ops.convolve(x, w, None, p), x, dy, create_graph=True)
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


@pytest.fixture
def prepared(monkeypatch, forget):
    """(problem, pass, config, precision) of what is prepared; nothing runs."""
    seen = []
    monkeypatch.setattr(launch, "prepare", lambda problem, pass_, config, precision, has_bias: seen.append((problem, pass_, config, precision)) or (
        lambda *tensors: torch.empty(0)))
    return seen


@pytest.mark.parametrize("setting, expected", [("tf32", "tf32"), ("ieee", "ieee")])
def test_precision_follows_cudnn(setting, expected, prepared, device, seed):
    before, other = torch.backends.cudnn.conv.fp32_precision, "tf32" if setting == "ieee" else "ieee"
    try:
        for precision in (other, setting):
            torch.backends.cudnn.conv.fp32_precision = precision
            for dtype in ("float32", "float16"):
                OPS["fprop"](*arguments(Problem(1, 4, 5, 5, 4, 3, 3, dtype=dtype), "fprop", device))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert [row[-1] for row in prepared] == [other, "ieee", expected]                        # float16 does not depend on it: prepared once


def test_the_target_reaches_the_config(monkeypatch, prepared, device, seed):
    for target, clamp in (("cuda:80", False), ("cuda:100", True), ("cuda:80", False)):
        monkeypatch.setenv("TRIDIL_TARGET", target)
        assert dispatch.target() == target
        OPS["fprop"](*arguments(CASES["dilated"], "fprop", device))
        assert [row for row in prepared if row[2].CLAMP is clamp]
    assert len(prepared) == 2


def test_launches_under_the_inputs_device(monkeypatch, forget):
    """The target is that of the input's device, which need not be the current one, and so is the launch's device."""
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
    monkeypatch.setattr(ops.dispatch, "target", lambda: order.append("target") or "cuda:80")
    monkeypatch.setattr(launch, "prepare", lambda *args: lambda *tensors: order.append("launch"))
    x, w = torch.randn(1, 4, 5, 5).as_subclass(OnAnotherDevice), torch.randn(4, 4, 3, 3)
    for _ in range(2):
        ops._run("fprop", x, w, None, x.shape, w.shape, ((1, 1), (0, 0, 0, 0), (1, 1), 1), False, False)
    assert order == ["cuda:1", "enter", "target", "exit", "cuda:1", "enter", "launch", "exit", "cuda:1", "enter", "launch", "exit"]
