"""What a call costs on the host, and how few kernels a network compiles: counted and compared,
never timed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tridil import choice, dilated_conv2d, drivers, functional, ops, passes, testing
from tridil.problem import PASSES, Problem

ROOT = Path(__file__).parents[1]
CASES = {
    "dilated": Problem(
        2, 4, 7, 6, 6, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), dtype="float32"
    ),
    "strided, groups": Problem(
        1, 4, 7, 8, 6, 3, 2, (2, 3), ((3, 3), (1, 1)), (3, 2), 2, dtype="float32"
    ),
    "1x1": Problem(2, 4, 5, 3, 3, 1, 1, dtype="float32"),
    "NCHW": Problem(
        2,
        4,
        7,
        6,
        6,
        3,
        3,
        padding=((2, 2), (2, 2)),
        dilation=(2, 2),
        dtype="float32",
        layout="nchw",
    ),
}
pytestmark = pytest.mark.usefixtures("poisoned", "forget")


@pytest.fixture
def forget():
    """No plan of a test outlives it, none of another reaches it."""
    passes._runs.clear()
    functional._chosen.clear()
    yield
    passes._runs.clear()


@pytest.fixture
def asked(monkeypatch):
    """What `choice.resolve` was asked: (problem, pass, device, allow_aten); passes named in
    `asked.aten` run through ATen."""

    class Asked(list):
        aten = set()

    found, resolve = Asked(), choice.resolve

    def answer(problem, pass_, target, precision, device=None, allow_aten=False):
        found.append((problem, pass_, device, allow_aten))
        return (
            None
            if allow_aten and pass_ in found.aten
            else resolve(problem, pass_, target, precision, device)
        )

    monkeypatch.setattr(choice, "resolve", answer)
    return found


def tensors_of(p, device, seed):
    """x, w, bias, dy in memory that leads to the problem's layout."""
    memory = torch.channels_last if p.layout == "nhwc" else torch.contiguous_format
    return [
        t.contiguous(memory_format=memory) if t.dim() == 4 else t
        for t in testing.random_tensors(p, device, seed)
    ]


@pytest.mark.parametrize(
    "aten", [(), *[(pass_,) for pass_ in PASSES], ("fprop", "wgrad"), PASSES], ids="+".join
)
@pytest.mark.parametrize("name", CASES)
def test_passes_through_aten(name, aten, asked, device, seed):
    """Values, strides, dtypes and gradients of F.conv2d, whichever passes ATen runs; and it runs
    those."""
    p = CASES[name]
    asked.aten = set(aten)
    results = []
    for f in (
        lambda *a: ops.convolve(*a, p, True),
        lambda *a: F.conv2d(*a, p.stride, [lo for lo, _ in p.padding], p.dilation, p.groups),
    ):
        x, w, bias, dy = tensors_of(p, device, seed)
        leaves = [t.requires_grad_() for t in (x, w, bias)]
        y = f(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
        if len(results) == 1:
            assert ("Convolution" in type(y.grad_fn).__name__) is (aten == PASSES)
    for i, (got, expected) in enumerate(zip(*results)):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        # the weight gradient has the format of the weight
        if i == 2 and aten != PASSES:
            last = passes.is_channels_last(w.shape, w.stride())
            expected = torch.empty(
                w.shape,
                memory_format=torch.channels_last if last else torch.contiguous_format,
                device=device,
            ).copy_(expected)
        assert got.stride() == expected.stride(), i
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {pass_ for _, pass_, *_ in asked} == set(PASSES) and all(
        allowed for *_, allowed in asked
    )


@pytest.mark.slow
@pytest.mark.parametrize("aten", [("fprop",), ("dgrad",), ("wgrad",)], ids="+".join)
def test_second_derivatives_with_one_pass_through_aten(aten, asked, device, seed):
    p = replace(CASES["strided, groups"], dtype="float64", layout="nchw")
    asked.aten = set(aten)
    x, w, bias, _ = (t.requires_grad_() for t in testing.random_tensors(p, device, seed))
    assert torch.autograd.gradgradcheck(
        lambda *a: ops.convolve(*a, p, True), (x, w, bias), fast_mode=True
    )
    assert all(allowed for *_, allowed in asked)


def test_without_gradients_only_fprop_is_asked(asked, device, seed):
    p = CASES["dilated"]
    asked.aten = set(PASSES)
    x, w, bias, _ = tensors_of(p, device, seed)
    for tensor in (x, x.clone().requires_grad_()):
        with torch.no_grad():
            y = ops.convolve(tensor, w, bias, p, True)
        torch.testing.assert_close(y, F.conv2d(x, w, bias, 1, 2, 2), rtol=1e-4, atol=1e-4)
    assert [row[1] for row in asked] == ["fprop"]


def test_who_must_not_run_aten(asked, device, seed):
    """An explicit backend, and padding that ATen's convolution does not have."""
    p = CASES["dilated"]
    asked.aten = set(PASSES)
    x, w, bias, _ = tensors_of(p, device, seed)
    dilated_conv2d(x, w, bias, padding=2, dilation=2, backend="triton")
    ops.convolve(x, w, bias, replace(p, padding=((2, 1), (2, 2))), True)
    assert [allowed for *_, allowed in asked] == [False, False]


def test_a_second_call_asks_nothing(asked, monkeypatch, device, seed):
    """Neither the tuner nor the driver's target; whatever the answer depends on makes it ask again."""
    p = CASES["dilated"]
    x, w, bias, dy = tensors_of(p, device, seed)
    call = dict(padding=2, dilation=2, backend="triton")

    def train(x=x, w=w, bias=bias, **change):
        leaves = [t.detach().requires_grad_() for t in (x, w, bias)]
        dilated_conv2d(*leaves, **{**call, **change}).sum().backward()

    train()
    assert [row[1] for row in asked] == ["fprop", "dgrad", "wgrad"] and all(
        row[2] == device for row in asked
    )
    monkeypatch.setattr(drivers, "choose", lambda *a: pytest.fail("asked again"))
    monkeypatch.setattr(drivers, "target", lambda: pytest.fail("asked again"))
    train(), train()
    assert len(asked) == 3
    monkeypatch.undo()


@pytest.mark.parametrize(
    "change",
    ["dilation", "size", "format", "dtype", "bias", "benchmark", "precision", "target", "listener"],
)
def test_what_makes_it_ask_again(change, asked, monkeypatch, device, seed):
    p = CASES["dilated"]
    x, w, bias, _ = tensors_of(p, device, seed)
    args, call = [x, w, bias], dict(padding=2, dilation=2, backend="triton")
    dilated_conv2d(*args, **call)
    dilated_conv2d(*args, **call)
    assert len(asked) == 1
    if change == "dilation":
        call["dilation"] = 1
    elif change == "size":
        args[0] = x[:1]
    elif change == "format":
        args[:2] = x.contiguous(), w.contiguous()
    elif change == "dtype":
        args = [t.double() for t in args]
    elif change == "bias":
        args[2] = None
    elif change == "benchmark":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    elif change == "precision":
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee" if before == "tf32" else "tf32"
    elif change == "target":
        monkeypatch.setenv("TRIDIL_TARGET", "cuda:86")
    else:
        for forget in choice.listeners:
            forget()
    try:
        dilated_conv2d(*args, **call)
    finally:
        if change == "precision":
            torch.backends.cudnn.conv.fp32_precision = before
    assert len(asked) == 2


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operators(device, seed):
    """Modes, profilers and tracers see tridil's operators, though a plain call does not dispatch
    them."""
    p = CASES["dilated"]
    x, w, bias, _ = tensors_of(p, device, seed)

    def call(x):
        return dilated_conv2d(x, w, bias, padding=2, dilation=2, backend="triton")

    expected = call(x)
    with Seen() as seen:
        assert torch.equal(call(x), expected)
        call(x.clone().requires_grad_()).sum().backward()
    assert {f"tridil.{pass_}.default" for pass_ in ("fprop", "dgrad")} <= set(seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    assert "tridil::fprop" in {event.key for event in profile.key_averages()}
    graph = make_fx(call)(x)
    assert "tridil.fprop" in str(graph.code) and torch.equal(graph(x), expected)

    class Functions(torch.overrides.TorchFunctionMode):
        names = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Functions() as mode:
        call(x)
    assert any("conv2d" in name for name in mode.names)
    assert torch.equal(call(torch._neg_view(-x)), expected)


def test_function_transforms_and_forward_mode(device, seed):
    p = CASES["dilated"]
    x, w, bias, _ = tensors_of(p, device, seed)

    def loss(x, f=dilated_conv2d, **kwargs):
        return f(x, w, bias, padding=2, dilation=2, **kwargs).square().sum()

    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(x, backend="triton"))(x),
        torch.func.grad(lambda x: loss(x, F.conv2d))(x),
        rtol=1e-3,
        atol=1e-3,
    )
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(x)  # a dead wrapper
    torch.testing.assert_close(
        loss(*leaked, backend="triton"), loss(x, F.conv2d), rtol=1e-3, atol=1e-3
    )
    assert not loss(*leaked, backend="triton").requires_grad
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.jvp(lambda x: loss(x, backend="triton"), (x,), (x,)),
            torch.func.jvp(lambda x: loss(x, F.conv2d), (x,), (x,)),
            rtol=1e-3,
            atol=1e-3,
        )


# ---- compiled code, in processes that do not interpret kernels
def child(code, timeout=600):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "perf")])
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


STUB = """
import json
import torch, triton
from triton.runtime import driver
from host_overhead import stub_driver
from tridil import choice, config, launch
from tridil.problem import Problem
driver.set_active(stub_driver(TARGET))
p = Problem(1, 64, 9, 9, 64, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
cfg = next(c for c in config.candidates(p, "fprop", "cuda:TARGET") if c.kernel == KERNEL)
item = launch.Ready(*launch.plan(p, "fprop", cfg))
def tensor(shape, shift=0):
    n, c, h, w = shape
    return torch.empty(n * c * h * w + 8, dtype=torch.half)[shift:shift + n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)
def tensors(shift=0):
    return {"a": tensor(p.x_shape), "b": tensor(p.w_shape), "out": tensor(p.y_shape, shift)} | {"bias": tensor(p.w_shape)}
jit = []
run = item.fn.run
item.fn.run = lambda *a, **k: jit.append(k["grid"]) or run(*a, **k)
out = {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("target, kernel", [(80, "gather"), (90, "tma")])
def test_the_jit_runs_once_per_device_and_alignment(target, kernel):
    """Afterwards the compiled kernel is launched with the same arguments and hooks as through the
    JIT."""
    found = child(
        (
            STUB
            + """
seen = []
launcher = driver.active.launcher_cls
call = launcher.__call__
launcher.__call__ = lambda self, *a: seen.append(a) or call(self, *a)
for _ in range(3):
    item(tensors())
out["aligned"] = len(jit)
item(tensors(shift=1)), item(tensors(shift=1)), item(tensors())
out["misaligned"] = len(jit)
entered = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
same = tensors()
item(same)
item.fn[item.grid](*item.arguments(same), **item.options)
direct, through_jit = seen[-2:]
def plain(a):
    return [(x.base.data_ptr(), list(x.shape), list(x.strides), list(x.block_shape), x.padding) if hasattr(x, "block_shape") else
            x.data_ptr() if hasattr(x, "data_ptr") else str(x) for i, x in enumerate(a) if i != 6]
out["same"] = plain(direct) == plain(through_jit) and direct[6] is not None
out["hooks"] = entered.copy()
before = len(jit)
driver.set_active(stub_driver(TARGET + 6 if TARGET == 80 else 100))
item(tensors()), item(tensors())
out["another device"] = len(jit) - before
print(json.dumps(out))
"""
        )
        .replace("TARGET", str(target))
        .replace("KERNEL", repr(kernel))
    )
    name = "fprop n1 c64 9x9 k64 3x3 dil2x2"
    # descriptors take part in no specialisation, pointers do
    assert found == {
        "aligned": 1,
        "misaligned": 1 if kernel == "tma" else 2,
        "same": True,
        "hooks": [name, name],
        "another device": 1,
    }


@pytest.mark.parametrize(
    "target, most",
    [("cuda:90", 14), *(pytest.param(f"cuda:{n}", 14, marks=pytest.mark.slow) for n in (80, 100))],
)
def test_deeplab_shares_kernels(target, most):
    """Dilated layers of DeepLabV3-ResNet50, three passes each; the whole network takes fewer than
    one kernel per layer and pass."""
    found = child(f"""
import json, cold_start as c
print(json.dumps([(len(layers()), len(c.kernels(layers(), {target!r}))) for layers in c.LAYERS.values()]))
""")
    (layers, kernels), (all_layers, all_kernels) = found
    assert layers == 6 and 0 < kernels <= most
    assert all_layers == 30 and kernels < all_kernels < 3 * all_layers


@pytest.mark.slow
def test_the_count_is_the_jits():
    """The same layers, run forward and backward through a driver that launches nothing: as many
    kernels as were counted."""
    counted, compiled = child("""
import json, torch
from triton.runtime import driver
from cold_start import dilated, kernels
from host_overhead import stub_driver
from tridil import choice, ops
from tridil.kernels import common, gather, hopper, tma
driver.set_active(stub_driver(90))
for p in dilated():
    x, w, dy = (torch.empty(s, dtype=torch.half).to(memory_format=torch.channels_last).requires_grad_() for s in (p.x_shape, p.w_shape, p.y_shape))
    ops.convolve(x, w, None, p).backward(dy.detach())
jits = (gather.correlate, gather.correlate_flat, gather.wgrad, tma.correlate_tma, tma.wgrad_tma, common.sum_splits,
        hopper.correlate_hopper, hopper.wgrad_hopper)
print(json.dumps([len(kernels(dilated(), "cuda:90")), sum(len(f.device_caches[90][0]) for f in jits)]))
""")
    assert counted == compiled > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
def test_compiled_ahead_of_time_are_the_kernels_that_the_jit_looks_for(target):
    """Same entry of Triton's cache: else `aot.precompile`, which the tuner relies on, would compile
    for nobody."""
    found = child(
        """
import json, torch
from triton.runtime import driver
from host_overhead import stub_driver
from tridil import aot, choice, cost_model, launch
from tridil.problem import PASSES, Problem
driver.set_active(stub_driver(TARGET))
def layer(n, c, size, k, **rest):
    return Problem(n, c, size, size, k, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), **rest)
ready, init = [], launch.Ready.__init__
launch.Ready.__init__ = lambda self, item: ready.append(self) or init(self, item)
out = {}
for p in (layer(2, 64, 16, 64), layer(1, 3, 16, 24), layer(2, 64, 8, 64, dtype="float32"), layer(1, 32, 9, 32, groups=32), layer(1, 512, 4, 512),
          layer(8, 256, 32, 256), layer(4, 256, 16, 256), layer(8, 256, 32, 256, dtype="float32")):
    x, w, dy = (torch.empty(s, dtype=getattr(torch, p.dtype)).to(memory_format=torch.channels_last) for s in (p.x_shape, p.w_shape, p.y_shape))
    for pass_ in PASSES:
        config, precision, epilogue = cost_model.best(p, pass_, "cuda:TARGET"), "tf32" if p.dtype == "float32" else "ieee", "bias" if pass_ == "fprop" else ""
        bias = x.new_empty(p.k) if epilogue else None
        ready.clear()
        launch.prepare(p, pass_, config, precision, epilogue)(*{"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_], bias)
        for item, source in aot.sources(p, pass_, config, "cuda:TARGET", precision, epilogue):
            (jit,) = next(r for r in ready if r.launch == item).compiled.values()
            out.setdefault(item.name, []).append(aot.compile_source(source, item.options, "cuda:TARGET").hash == jit.hash)
print(json.dumps(out))
""".replace("TARGET", str(target))
    )
    kernels = {
        "correlate",
        "correlate_flat",
        "wgrad",
        "sum_splits",
        "correlate_depthwise",
        "wgrad_depthwise",
        "sum_partials",
    }
    if target == 90:
        kernels |= {"correlate_tma", "wgrad_tma", "correlate_hopper", "wgrad_hopper"}
    assert found.keys() == kernels
    assert all(map(all, found.values())), found


@pytest.mark.slow
def test_calls_can_be_captured_in_a_graph():
    """Forward and backward through the public function read no value back and allocate through
    torch alone: what capture in a CUDA graph forbids is absent from everything that PyTorch runs
    between the launches."""
    names, launches = child("""
import json, torch
from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver
from host_overhead import stub_driver
from tridil import choice, dilated_conv2d, launch
driver.set_active(stub_driver(90))
count, call = [], launch.Ready.__call__
launch.Ready.__call__ = lambda self, tensors: count.append(self.fn) or call(self, tensors)
names = set()
for n, c, size, k, kwargs in ((2, 64, 20, 64, dict(padding=4, dilation=4)), (1, 512, 4, 512, dict(padding=2, dilation=2)),
                              (1, 3, 9, 5, dict(stride=2)), (2, 32, 9, 32, dict(padding=2, dilation=2, groups=32))):
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.zeros(n, c, size, size, dtype=torch.half).to(memory_format=memory_format).requires_grad_()
        w = torch.zeros(k, c // kwargs.get("groups", 1), 3, 3, dtype=torch.half, requires_grad=True)
        bias = torch.zeros(k, dtype=torch.half, requires_grad=True)
        dy = torch.zeros_like(dilated_conv2d(x, w, None, backend="triton", **kwargs))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            dilated_conv2d(x, w, bias, backend="triton", **kwargs).backward(dy)
        names |= {event.key for event in seen.key_averages()}
print(json.dumps([sorted(names), len(count)]))
""")
    assert launches > 3 * 8 and "tridil::wgrad" in names
    forbidden = (
        "item",
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "equal",
        "cpu",
        "pin_memory",
    )
    assert not {f"aten::{name}" for name in forbidden} & set(names), names


def test_launch_hooks_see_the_convolution():
    """What Proton shows: a name, dense FLOPs and compulsory bytes, of every kernel that multiplies."""
    found = child("""
import json, torch, triton
from triton.runtime import driver
from host_overhead import stub_driver
from tridil import choice, ops
from tridil.problem import Problem
driver.set_active(stub_driver(90))
seen = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()))
for p in (Problem(8, 256, 32, 32, 128, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2)), Problem(2, 16, 9, 9, 16, 3, 3, dilation=(2, 2), groups=16)):
    x, w, dy = (torch.empty(s, dtype=torch.half).to(memory_format=torch.channels_last).requires_grad_() for s in (p.x_shape, p.w_shape, p.y_shape))
    ops.convolve(x, w, None, p).backward(dy.detach())
    seen.append(dict(dense=p.dense_macs, bytes=p.bytes))
shown = ("name", "flops16", "bytes", "dense")
print(json.dumps([{k: v for k, v in item.items() if k in shown} for item in seen if item.keys() & {"flops16", "dense"}]))
""")
    for i in (0, 4):
        *launches, expected = found[i : i + 4]
        assert [launch["name"].split()[0] for launch in launches] == ["fprop", "dgrad", "wgrad"]
        assert all(
            launch["flops16"] == 2 * expected["dense"] and launch["bytes"] == expected["bytes"]
            for launch in launches
        )


@pytest.mark.slow
def test_host_overhead_reports(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "perf" / "host_overhead.py",
            "--targets",
            "cuda:90",
            "--repetitions",
            "20",
        ],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "target",
        "call",
        "kernels",
        "us",
        "yardstick_us",
        "ratio",
        "at_most",
    ]
    for kernels, most in (
        ("no grad correlate_", "2.50"),
        ("forward+backward correlate_", "3.00"),
        ("aten, forward+backward", "1.15"),
        ("auto that chose ATen", "1.15"),
        ("new shape, dense", "1.00"),
        ("new shape, depthwise", "1.00"),
    ):
        (row,) = (line for line in lines if " ".join(line.split()).startswith(f"cuda:90 {kernels}"))
        *_, us, yardstick, ratio, at_most = row.split()
        assert at_most == most and float(us) > 0 and float(yardstick) > 0 and float(ratio) > 0
