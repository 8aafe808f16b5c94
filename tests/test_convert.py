"""Whole models: what convert changes and leaves, that converted models train like the originals,
and what scan sees."""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import tridil
from tridil import DilatedConv1d, DilatedConv2d, Problem, convert, launch, passes, revert, scan

BUILD = {"deeplab": lambda: models.DeepLabV3(16), "tcn": lambda: models.TCN(5, (8, 8, 6, 6))}
INPUTS = {"deeplab": (2, 3, 48, 48), "tcn": (3, 5, 50)}
SMALL = {"head": models.head, "tcn": lambda: models.TCN(3, (4, 4), taps=2)}
SMALL_INPUTS = {"head": (2, 4, 6, 7), "tcn": (2, 3, 11)}


def close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name],
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def train(model, batches, mode="eager", lr=0.05):
    """Outputs and gradients of every step of SGD, and the state after the last."""
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if mode == "compile" else model
    optimizer, results = torch.optim.SGD(model.parameters(), lr, momentum=0.9), {}
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if mode == "autocast" else nullcontext():
            y = run(x)
        (y.float() if mode == "autocast" else y).square().mean().backward()
        optimizer.step()
        results |= {
            f"{i} output": y.detach(),
            **{f"{i} {name}": p.grad.clone() for name, p in model.named_parameters()},
        }
    return results | {f"state {name}": t.clone() for name, t in model.state_dict().items()}


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton")
    count, prepare = Counter(), launch.prepare

    def counted(problem, pass_, *args):
        run = prepare(problem, pass_, *args)
        return lambda *tensors: count.update([pass_]) or run(*tensors)

    monkeypatch.setattr(launch, "prepare", counted)
    # what was prepared before counts nothing, what is prepared here must not outlive it
    passes._runs.clear()
    yield count
    passes._runs.clear()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compile", "autocast"])
@pytest.mark.parametrize("name", BUILD)
def test_converted_models_train_like_the_original(name, mode, seed):
    """Outputs, gradients of every parameter, five steps of SGD, state_dict both ways."""
    torch._dynamo.reset()
    plain = BUILD[name]()
    ours = copy.deepcopy(plain)
    report = convert(ours, backend="aten")
    assert len(report.replaced) == {"deeplab": 5 + 3 + 3, "tcn": 6}[name]
    batches = torch.randn(5, *INPUTS[name])
    close(train(ours, batches, mode), train(plain, batches, mode), 0)
    fresh, other = BUILD[name](), BUILD[name]()
    convert(other, backend="aten")
    fresh.load_state_dict(ours.state_dict()), other.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.eval()(batches[0]), other.eval()(batches[0]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compile", "autocast"])
@pytest.mark.parametrize("name", SMALL)
def test_models_train_on_the_kernels(name, mode, device, seed, poisoned):
    pytest.importorskip("triton")
    torch._dynamo.reset()
    dtype = torch.float32 if mode == "autocast" else torch.float64
    plain = SMALL[name]().to(device, dtype)
    ours = copy.deepcopy(plain)
    assert convert(ours, min_dilation=1, backend="triton").replaced
    batches = torch.randn(
        1 if mode == "autocast" else 5, *SMALL_INPUTS[name], dtype=dtype, device=device
    )
    close(
        train(ours, batches, mode), train(plain, batches, mode), 0.1 if mode == "autocast" else 1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inductor_runs_the_kernels(memory_format, launches, device, seed):
    """Inductor chooses memory formats around operators that it does not know."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    torch._dynamo.reset()
    plain = models.head().to(device)
    ours = copy.deepcopy(plain)
    convert(ours, min_dilation=1, backend="triton")
    x = (
        torch.randn(2, 4, 6, 7, device=device)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    outputs = [run(x) for run in (plain, torch.compile(ours, fullgraph=True))]
    assert launches["fprop"] == 2 and outputs[1].stride() == outputs[0].stride()
    grads = [
        torch.autograd.grad(y.square().mean(), [x, *m.parameters()])
        for y, m in zip(outputs, (plain, ours))
    ]
    for got, expected in zip((outputs[1], *grads[1]), (outputs[0], *grads[0])):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_which_layers_are_converted(seed):
    class Mine(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight.abs(), dilation=2)

    model = nn.ModuleDict(
        dict(
            dilated=nn.Conv2d(4, 4, 3, dilation=2),
            wide=nn.Conv2d(4, 4, (1, 3), dilation=(1, 4)),
            sound=nn.Conv1d(4, 4, 2, dilation=3),
            flat=nn.Conv2d(4, 4, (1, 3), dilation=(4, 1)),
            dense=nn.Conv2d(4, 4, 3),
            point=nn.Conv2d(4, 4, 1, dilation=2),
            mine=Mine(4, 4, 3, dilation=2),
            up=nn.ConvTranspose2d(4, 4, 3, dilation=2),
            volume=nn.Conv3d(4, 4, 3, dilation=2),
            lazy=nn.LazyConv2d(4, 3, dilation=2),
            ours=DilatedConv2d(4, 4, 3, dilation=2),
            replaced=nn.Conv2d(4, 4, 3, dilation=2),
            unwanted=nn.Conv2d(4, 4, 3, dilation=2),
            linear=nn.Linear(4, 4),
        )
    )
    model.shared = model.dilated
    model.replaced.forward = lambda x: x
    parameters, seen = dict(model.named_parameters()), []
    report = convert(
        model,
        predicate=lambda name, module: (
            seen.append((name, module)) or name not in ("unwanted", "mine")
        ),
        backend="aten",
    )
    assert report.replaced == ["dilated", "wide", "sound"]
    reasons = dict(
        flat="dilation 1 of kernel 1x3 is below min_dilation=2",
        dense="dilation 1 of kernel 3x3 is below min_dilation=2",
        point="kernel 1x1 has one tap",
        mine="predicate is false",
        up="is transposed: convert(model, transposed=True) takes it",
        volume="Conv3d is neither",
        lazy="run the model once",
        ours="is a DilatedConv2d already",
        replaced="its forward was replaced",
        unwanted="predicate is false",
    )
    assert report.skipped.keys() == reasons.keys() and all(
        part in report.skipped[name] for name, part in reasons.items()
    )
    assert seen == [
        (name, model[name]) for name in ("dilated", "wide", "sound", "mine", "unwanted")
    ]
    assert [type(model[n]) for n in report.replaced] == [
        DilatedConv2d,
        DilatedConv2d,
        DilatedConv1d,
    ] and type(model.mine) is Mine
    assert (
        all(model[n].backend == "aten" for n in report.replaced) and model.shared is model.dilated
    )
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys() and all(
        after[name] is parameters[name] for name in parameters
    )
    text = str(report).splitlines()
    assert text[1].split() == ["dilated", "yes"]
    # with the one that is one already
    assert text[-1].startswith(f"4 of {3 + len(reasons)} convolution layers run")
    lines = report.details().splitlines()
    assert len(lines) == 1 + 3 + len(reasons) and lines[1].split() == ["dilated", "yes"]
    assert lines[4].startswith("flat ") and "no: dilation 1" in lines[4]

    again = convert(model, min_dilation=1)
    assert (
        again.replaced == ["flat", "dense", "unwanted"]
        and "Mine is a subclass of nn.Conv2d and may compute" in again.skipped["mine"]
    )
    assert (
        revert(model) == ["dilated", "wide", "sound", "flat", "dense", "unwanted"]
        and revert(model) == []
    )
    assert {type(model[n]) for n in reasons.keys() - {"ours", "mine", "lazy", "up", "volume"}} == {
        nn.Conv2d
    } and type(model.ours) is DilatedConv2d
    assert "backend" not in vars(model.dilated) and convert(model, min_dilation=5).replaced == []


def test_bad_arguments_change_nothing():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2))
    for error, bad, match in (
        (ValueError, dict(backend="cudnn"), "cudnn"),
        (ValueError, dict(min_dilation=0), "got 0"),
        (TypeError, dict(min_dilation=1.5), "1.5"),
        (TypeError, dict(predicate="0"), "'0'"),
    ):
        with pytest.raises(error, match=match):
            convert(model, **bad)
    for f in (convert, revert):
        with pytest.raises(TypeError, match="must be an nn.Module, got list"):
            f([model])
    with pytest.raises(TypeError, match="got list"):
        scan([model])
    with pytest.raises(ZeroDivisionError):
        convert(
            nn.Sequential(*model, nn.Conv2d(4, 4, 3, dilation=2)),
            predicate=lambda name, _: 1 // (1 - int(name)),
        )
    assert type(model[0]) is nn.Conv2d


def test_the_model_itself_may_be_a_layer(seed):
    layer, x = nn.Conv2d(4, 6, 3, dilation=2), torch.randn(2, 4, 9, 9)
    expected = layer(x)
    assert (
        convert(layer).replaced == [""]
        and type(layer) is DilatedConv2d
        and torch.equal(layer(x), expected)
    )
    assert revert(layer) == [""] and type(layer) is nn.Conv2d and torch.equal(layer(x), expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 3, "same"])
def test_padding_modes(mode, padding, backend, device, seed):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, dilation=2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 2, padding=padding, padding_mode=mode, dilation=3),
    ).to(device)
    x = torch.randn(2, 4, 9, 8, device=device)
    expected = model(x)
    assert convert(model, backend=backend).replaced == ["0", "2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def normed(make):
    torch.manual_seed(0)
    return make(nn.Conv2d(4, 6, 3, dilation=2))


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_kept(name, device, backend, seed):
    """Outputs and gradients, in both modes; copies of what was parametrised before stay what they
    are."""
    plain, ours = (nn.Sequential(normed(NORMS[name])).to(device) for _ in range(2))
    twin = copy.deepcopy(ours) if not name.startswith("old") else plain
    assert (
        convert(ours, backend=backend).replaced == ["0"]
        and isinstance(ours[0], DilatedConv2d)
        and not isinstance(twin[0], DilatedConv2d)
    )
    x = torch.randn(2, 4, 7, 6, device=device)
    for training in (True, False, True):
        outputs = [m.train(training)(x) for m in (plain, ours)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
        grads = [
            torch.autograd.grad(y.square().sum(), list(m.parameters()))
            for y, m in zip(outputs, (plain, ours))
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)
    assert list(ours.state_dict()) == list(plain.state_dict())
    if not name.startswith("old"):
        expected = ours.eval()(x)
        # shares its class with ours, which revert gives up
        again = copy.deepcopy(ours)
        torch.testing.assert_close(again(x), expected)
        assert revert(ours) == ["0"] and type(ours[0]).__bases__ == (nn.Conv2d,)
        parametrize.register_parametrization(ours[0], "bias", nn.Identity())
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        for tensor in ("bias", "weight"):
            parametrize.remove_parametrizations(ours[0], tensor)
        torch.testing.assert_close(again(x), expected)
        parametrize.remove_parametrizations(again[0], "weight")
        assert (
            type(ours[0]) is nn.Conv2d
            and type(again[0]) is DilatedConv2d
            and revert(again) == ["0"]
            and type(again[0]) is nn.Conv2d
        )
        torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)


def test_state_and_hooks_are_kept(seed):
    """train/eval, requires_grad, hooks of all kinds, an optimizer made before."""
    model, calls = nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), nn.ReLU()).eval(), []
    model[0].register_forward_hook(lambda *a: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *a: calls.append("pre"))
    model[0].register_full_backward_hook(lambda *a: calls.append("backward"))
    model[0].weight.register_hook(lambda g: calls.append("weight"))
    model[0].bias.requires_grad_(False)
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), model[0].weight.detach().clone()
    convert(model)
    model(torch.randn(2, 4, 9, 9).requires_grad_()).sum().backward()
    optimizer.step()
    assert (
        Counter(calls) == Counter(["pre", "forward", "backward", "weight"])
        and not model[0].training
        and model[0].bias.grad is None
    )
    torch.testing.assert_close(model[0].weight.detach(), before - model[0].weight.grad)
    assert model[0].to(torch.float64).weight.dtype == torch.float64


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
def test_copies_of_converted_models(duplicate, seed):
    model, x = models.head(), torch.randn(2, 4, 9, 9)
    replaced = convert(model, backend="aten").replaced
    other = duplicate(model)
    assert torch.equal(other(x), model(x)) and other.convs[1][0].backend == "aten"
    assert (
        revert(other) == replaced
        and type(other.convs[1][0]) is nn.Conv2d
        and type(model.convs[1][0]) is DilatedConv2d
    )


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "fx"])
def test_models_that_were_compiled_or_traced_before(how, launches, device, seed):
    torch._dynamo.reset()
    plain, x = (
        nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), nn.ReLU()).to(device),
        torch.randn(2, 4, 7, 6, device=device),
    )
    model = {
        "torch.compile": lambda: torch.compile(plain, backend="aot_eager"),
        "fx": lambda: torch.fx.symbolic_trace(plain),
        "Module.compile": lambda: plain.compile(backend="aot_eager") or plain,
    }[how]()
    expected = model(x)
    assert len(convert(model, backend="triton").replaced) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert launches == Counter(fprop=1)
    assert len(revert(model)) == 1
    model(x)
    assert launches == Counter(fprop=1)


def test_fx_traces_converted_models(backend, device, seed):
    model, x = models.head().to(device), torch.randn(2, 4, 6, 7, device=device)
    expected, seen = model.convs[1](x), []
    model.convs[1][0].register_forward_hook(lambda module, args, y: seen.append(type(y)))
    convert(model, backend=backend)
    traced = torch.fx.symbolic_trace(model.convs[1])
    assert [node.op for node in traced.graph.nodes] == [
        "placeholder",
        *["call_module"] * (len(traced.graph.nodes) - 2),
        "output",
    ] and not seen
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [torch.Tensor] and isinstance(traced.get_submodule("0"), DilatedConv2d)


def leaves(model):
    """Names of the modules that torch.fx calls."""
    return [
        node.target
        for node in torch.fx.symbolic_trace(model).graph.nodes
        if node.op == "call_module"
    ]


class Chomped(nn.Conv1d):
    """As the layers of pytorch-tcn: pads, and has a `causal` and a `_pad` of its own."""

    def __init__(self, channels, taps, dilation, causal=True):
        super().__init__(channels, channels, taps, dilation=dilation)
        self.causal, self.length = causal, dilation * (taps - 1)

    def _pad(self, x):
        return F.pad(
            x,
            (self.length, 0) if self.causal else (self.length // 2, self.length - self.length // 2),
        )

    def forward(self, x, scale=1):
        return super().forward(self._pad(x)) * scale


class Same(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return F.conv2d(
            F.pad(input, (2, 2, 2, 2)), weight, bias, self.stride, 0, self.dilation, self.groups
        )


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, None)


class Named(nn.Conv2d):
    pass


class Owner(nn.Conv2d):
    backend = "mine"


class Subclasses(nn.Module):
    def __init__(self):
        super().__init__()
        for cls in (Same, Standardised, Scaled, Named, Owner):
            setattr(self, cls.__name__, cls(2, 2, 3, padding=0 if cls is Same else 2, dilation=2))
        self.Chomped = Chomped(2, 3, 2)

    def forward(self, x):
        for name in ("Same", "Standardised", "Scaled", "Named", "Owner"):
            x = getattr(self, name)(x)
        return self.Chomped(x.flatten(2), scale=3)


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_subclasses(named, backend, launches, device, seed):
    """Those that come to nn.Conv's convolution, and any that a predicate names; what they compute
    beside it stays. Copies, compiled, reverted."""
    torch._dynamo.reset()
    model, x = Subclasses().to(device), torch.randn(2, 2, 4, 5, device=device, requires_grad=True)
    model.Scaled.bias = None

    def step(model):
        y = model(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    expected, classes, keys = (
        step(model),
        [type(m) for m in model.modules()],
        list(model.state_dict()),
    )
    report = convert(
        model, predicate=(lambda name, module: True) if named else None, backend=backend
    )
    converted = [*["Same", "Standardised"] * named, "Scaled", "Named", "Chomped"]
    assert report.replaced == converted and "with a backend of its own" in report.skipped["Owner"]
    assert named or all(
        "may compute something else: a predicate" in report.skipped[name]
        for name in ("Same", "Standardised")
    )
    kinds = {name: type(getattr(model, name)) for name in converted}
    assert all(
        issubclass(kind, (DilatedConv1d if name == "Chomped" else DilatedConv2d, globals()[name]))
        for name, kind in kinds.items()
    )
    for run in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ):
        launches.clear()
        torch.testing.assert_close(step(run), expected, rtol=1e-3, atol=1e-3)
        assert set(launches.values()) == ({len(converted)} if backend == "triton" else set())
    assert repr(model.Chomped).startswith(
        "DilatedChomped(2, 2, kernel_size=(3,)"
    ) and "causal" not in repr(model.Chomped)
    again = convert(model, predicate=lambda name, _: name == "Named").skipped["Named"]
    assert again == f"is a DilatedNamed already: its backend was {backend!r} and is 'auto' now"
    assert (
        revert(model) == converted
        and [type(m) for m in model.modules()] == classes
        and list(model.state_dict()) == keys
    )
    assert leaves(nn.Sequential(model.Named)) == [] and not any(
        {"backend", "_converted", "__module__"} & vars(m).keys() for m in model.modules()
    )


@pytest.mark.parametrize(
    "attributes",
    [
        dict(dilation=2, padding=2),
        dict(kernel_size=3, dilation=(2,)),
        dict(dilation=[2, 2], stride=1, groups=1),
        dict(dilation=torch.tensor(2)),
        dict(kernel_size=[3], dilation=2, padding=(2,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [1, 2])
def test_attributes_that_users_set(attributes, dim, backend, device, seed):
    """PyTorch runs whatever F.conv2d and F.conv1d read: ints and short tuples, too."""
    layer, x = (
        (nn.Conv1d if dim == 1 else nn.Conv2d)(4, 4, 3, padding=1).to(device),
        torch.randn(2, 4, *[9] * dim, device=device),
    )
    for name, value in attributes.items():
        setattr(layer, name, value[:dim] if isinstance(value, list) else value)
    expected = layer(x)
    assert convert(layer, backend=backend).replaced == [""]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert revert(layer) == [""]
    layer.kernel_size = layer.dilation = 1
    assert convert(layer).skipped == {"": f"kernel {'x'.join('1' * dim)} has one tap"}
    layer.dilation = 1.5
    assert convert(layer).skipped == {
        "": "PyTorch does not run it: dilation must be made of ints, got 1.5"
    }
    assert convert(nn.Conv2d(3, 4, (1, 3), dilation=(2,))).replaced == [""]


def test_a_second_convert_sets_the_backend(launches, device, seed):
    """Of the layers that it would convert; those that users built keep theirs."""
    built = DilatedConv2d(4, 4, 3, dilation=2, backend="aten")
    model, x = (
        nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), built, nn.Conv2d(4, 4, 3)).to(device),
        torch.randn(1, 4, 12, 12, device=device),
    )
    convert(model)
    report = convert(model, backend="triton")
    assert (
        not report.replaced
        and report.skipped["0"]
        == "is a DilatedConv2d already: its backend was 'auto' and is 'triton' now"
    )
    assert (
        report.skipped["1"]
        == "is a DilatedConv2d already"
        == convert(model, backend="triton").skipped["0"]
    )
    model(x)
    assert launches == {"fprop": 1} and [m.backend for m in model[:2]] == ["triton", "aten"]
    assert (
        "below min_dilation=4" in convert(model, min_dilation=4, backend="aten").skipped["0"]
        and model[0].backend == "triton"
    )


class Int8(torch.Tensor):
    """A weight that is dequantised where F.conv2d or F.conv1d is called, and nowhere else."""

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().max() / 127
        quantised = (weight.detach() / scale).round().as_subclass(cls)
        quantised.scale = scale
        return quantised

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.conv2d, F.conv1d):
            with torch._C.DisableTorchFunctionSubclass():
                args = args[0], args[1].as_subclass(torch.Tensor) * args[1].scale, *args[2:]
            return func(*args, **(kwargs or {}))
        return cls.other(func, types, args, kwargs)

    @classmethod
    def other(cls, func, types, args, kwargs):
        return super().__torch_function__(func, types, args, kwargs or {})


class StrictInt8(Int8):
    @classmethod
    def other(cls, func, types, args, kwargs):
        return NotImplemented


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind", ["mode", "two modes", "default device", "Int8", "StrictInt8", "Int8 and mode", "causal"]
)
@pytest.mark.parametrize("dim", [1, 2])
def test_modes_and_weights_that_know_conv2d(dim, kind, backend, launches, device, seed):
    """They see what a plain layer shows, and what they hand on runs on the kernels, as under a
    default device."""
    if kind == "causal" and dim == 2:
        pytest.skip("1D only")
    layer, x = (
        (nn.Conv1d if dim == 1 else nn.Conv2d)(3, 4, 3, padding=2, dilation=2).to(device),
        torch.randn(1, 3, *[7] * dim, device=device),
    )
    if kind == "causal":
        layer, ours = (
            nn.Sequential(nn.ConstantPad1d((4, 0), 0), nn.Conv1d(3, 4, 3, dilation=2)).to(device),
            DilatedConv1d(3, 4, 3, dilation=2, causal=True, backend=backend).to(device),
        )
        ours.load_state_dict(layer[1].state_dict())
    if "Int8" in kind:
        quantised = globals()[kind.split()[0]].of(layer.weight)
        del layer.weight
        layer.weight = quantised

    def run(layer):
        modes = [
            Seen()
            for _ in range(
                {"mode": 1, "causal": 1, "Int8 and mode": 1, "two modes": 2}.get(kind, 0)
            )
        ]
        with (
            torch.device(device) if kind == "default device" else nullcontext(),
            ExitStack() as stack,
        ):
            for mode in modes:
                stack.enter_context(mode)
            return layer(x), [mode.functions for mode in modes]

    expected, seen = run(layer)
    if kind != "causal":
        ours = layer
        assert convert(layer, backend=backend).replaced == [""]
    got, ours_seen = run(ours)
    assert type(got) is type(expected) and launches == ({"fprop": 1} if backend == "triton" else {})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [[f for f in fs if f in (F.conv2d, F.conv1d, F.pad)] for fs in ours_seen] == [
        [f for f in fs if f in (F.conv2d, F.conv1d, F.pad)] for fs in seen
    ]
    if "Int8" not in kind and kind != "causal":
        assert ours_seen == seen
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("dim", [1, 2])
def test_a_mode_that_answers_nothing(dim, backend, device, seed):
    class Nothing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return NotImplemented

    layer, x = (
        (nn.Conv1d if dim == 1 else nn.Conv2d)(3, 4, 3, dilation=2).to(device),
        torch.randn(1, 3, *[7] * dim, device=device),
    )
    convert(layer, backend=backend)
    with (
        pytest.raises(
            TypeError, match=f"conv{dim}d.*NotImplemented|NotImplemented.*conv{dim}d|conv{dim}d"
        ),
        Nothing(),
    ):
        layer(x)
    assert not torch.overrides._get_current_function_mode_stack() and layer(x).shape[1] == 4


class Packed(torch.Tensor):
    """A weight of int8 whose operators are ATen's: convolutions unpack it, tridil's are unknown."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=scale.dtype, device=data.device
        )

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale)
        if func is not torch.ops.aten.convolution.default:
            raise NotImplementedError(f"{func} of packed weights")
        return func(args[0], args[1].data_ * args[1].scale, *args[2:], **(kwargs or {}))


@pytest.mark.parametrize("dim", [1, 2])
def test_weights_that_know_atens_operators(dim, launches, monkeypatch, device, seed):
    """ "auto" leaves them to ATen; asked for, the kernels are asked of them, which they do not know."""
    layer, x = (
        (nn.Conv1d if dim == 1 else nn.Conv2d)(3, 4, 3, dilation=2).to(device),
        torch.randn(1, 3, *[7] * dim, device=device),
    )
    data, scale = (
        torch.randint(-9, 9, layer.weight.shape, dtype=torch.int8, device=device),
        torch.tensor(0.1, device=device),
    )
    del layer.weight
    layer.weight = Packed(data, scale)
    expected = layer(x)
    assert convert(layer, backend="auto").replaced == [""]
    # as on a GPU
    monkeypatch.setattr(
        tridil.functional, "_choose", lambda problem, input, backend: ("triton", backend == "auto")
    )
    torch.testing.assert_close(layer(x), expected)
    assert not launches
    layer.backend = "triton"
    with pytest.raises(NotImplementedError, match="tridil.fprop.default of packed weights"):
        layer(x)


@pytest.mark.parametrize("watcher", ["mode", "weight"])
def test_compiled_layers_show_conv2d_too(watcher, backend, device, seed):
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            y = super().__torch_function__(func, types, args, kwargs or {})
            return y * 2 if func is F.conv2d else y

    layer, x = (
        nn.Conv2d(3, 4, 3, dilation=2, bias=False).to(device),
        torch.randn(1, 3, 7, 7, device=device),
    )
    expected = layer(x).detach() * (2 if watcher == "weight" else 1)

    def watched():
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with Seen() if watcher == "mode" else nullcontext() as seen:
            return compiled(x), seen

    if watcher == "weight":
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    try:
        watched()
    except (AssertionError, TypeError) as e:
        if torch.torch_version.TorchVersion(torch.__version__) >= (2, 12):
            raise
        pytest.skip(f"torch {torch.__version__} compiles no plain layer so: {str(e)[:80]}")
    convert(layer, backend=backend)
    y, seen = watched()
    torch.testing.assert_close(y.detach().as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4)
    assert watcher == "weight" or F.conv2d in seen.functions


def fusable(device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=2, dilation=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=2, dilation=2),
    )
    model[1].running_mean.uniform_()
    return model.to(device).eval()


def tools():
    """name -> (works with converted layers, function of a model and an input whose result tells
    what the tool made of the layers)."""
    from torch.ao import quantization as ao
    from torch.ao.quantization._equalize import equalize
    from torch.fx.experimental.optimization import fuse

    def classes(model):
        return [type(m).__name__.removeprefix("Dilated") for m in model.children()]

    def configured(model, config):
        model.qconfig = config
        return model

    def eager(model, x):
        prepared = ao.prepare(configured(model, ao.get_default_qconfig("fbgemm")))
        prepared(x)
        return [type(m).__module__ for m in ao.convert(prepared).children()]

    def graph(model, x):
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        prepared = prepare_fx(model, ao.get_default_qconfig_mapping("fbgemm"), (x,))
        prepared(x)
        return classes(convert_fx(prepared))

    def hooked(model, x):
        kinds = []
        model[0].register_forward_hook(lambda module, args, y: kinds.append(type(y)))
        torch.fx.symbolic_trace(model)(x)
        return kinds

    def normed(model, x):
        nn.utils.spectral_norm(model[0])
        return torch.fx.symbolic_trace(model)(x).shape

    def counted(model, x):
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    return {
        "symbolic_trace": (True, lambda model, x: leaves(model)),
        "hooks": (True, hooked),
        "spectral_norm": (True, normed),
        "FlopCounterMode": (True, counted),
        "fuse_conv_bn_eval": (
            True,
            lambda model, x: classes(
                nn.Sequential(nn.utils.fuse_conv_bn_eval(*model[:2]), *model[2:])
            ),
        ),
        "prune": (
            True,
            lambda model, x: list(
                dict(prune.l1_unstructured(model[0], "weight", 0.5).named_buffers())
            ),
        ),
        "convert_sync_batchnorm": (
            True,
            lambda model, x: classes(nn.SyncBatchNorm.convert_sync_batchnorm(model)),
        ),
        "fx.experimental.optimization.fuse": (False, lambda model, x: classes(fuse(model))),
        "fuse_modules": (
            False,
            lambda model, x: classes(ao.fuse_modules(model, [["0", "1", "2"]])),
        ),
        "equalize": (
            False,
            lambda model, x: classes(equalize(model, [["0", "3"]], threshold=1e-3, inplace=False)),
        ),
        "prepare": (False, eager),
        "prepare_fx": (False, graph),
        "prepare_qat": (
            False,
            lambda model, x: [
                type(m).__module__
                for m in ao.prepare_qat(
                    configured(model.train(), ao.get_default_qat_qconfig("fbgemm"))
                ).children()
            ],
        ),
        "quantize_dynamic": (
            False,
            lambda model, x: [
                type(m).__module__
                for m in ao.quantize_dynamic(
                    model, {nn.Conv2d: ao.default_dynamic_qconfig}
                ).children()
            ],
        ),
        "thop": (
            False,
            lambda model, x: pytest.importorskip("thop").profile(model, (x,), verbose=False),
        ),
        "ptflops": (
            False,
            lambda model, x: pytest.importorskip("ptflops").get_model_complexity_info(
                model,
                tuple(x.shape[1:]),
                as_strings=False,
                print_per_layer_stat=False,
                backend="pytorch",
            ),
        ),
    }


TOOLS = (
    "symbolic_trace hooks spectral_norm FlopCounterMode fuse_conv_bn_eval prune convert_sync_batchnorm fx.experimental.optimization.fuse "
    "fuse_modules equalize prepare prepare_fx prepare_qat quantize_dynamic thop ptflops"
).split()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOOLS)
def test_tools_that_look_at_layers(name, backend, seed):
    """README's table: each works on converted layers, or after revert."""
    works, tool = tools()[name]
    x, model = torch.randn(2, 4, 8, 8), fusable()
    expected = tool(fusable(), x)
    assert (
        len(convert(model, backend=backend if not torch.cuda.is_available() else "aten").replaced)
        == 2
    )
    if not works:
        assert revert(model) == ["0", "3"]
    assert tool(model, x) == expected
    table = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert any(
        line.startswith("|") and {"spectral_norm": "norms"}.get(name, name) in line
        for line in table.splitlines()
    )


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SMALL)
def test_activation_checkpointing(name, use_reentrant, backend, device, seed):
    model = SMALL[name]().to(device, torch.float64)
    convert(model, backend=backend)
    x, results = (
        torch.randn(SMALL_INPUTS[name], dtype=torch.float64, device=device, requires_grad=True),
        [],
    )
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SMALL)
def test_exported_models_run(name, backend, device, seed):
    model = SMALL[name]().to(device)
    convert(model, backend=backend)
    x = torch.randn(SMALL_INPUTS[name], device=device)
    exported = torch.export.export(model, (x,))
    operators = {str(node.target) for node in exported.graph.nodes}
    assert any(op.startswith("tridil.fprop") for op in operators) == (backend == "triton")
    torch.testing.assert_close(exported.module()(x), model(x))
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    torch.testing.assert_close(torch.export.load(stream).module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("backend_", ["auto", "triton"])
def test_exported_graphs_in_another_process(backend_, tmp_path, seed):
    """Those with tridil's operators need `import tridil` before they are loaded; "auto" on the CPU
    exports ATen's convolutions. README says so."""
    if backend_ == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter runs CPU tensors")
    model, x, file = (
        nn.Sequential(nn.Conv2d(2, 3, 3, dilation=2)),
        torch.randn(1, 2, 6, 6),
        tmp_path / "graph.pt2",
    )
    convert(model, backend=backend_)
    torch.export.save(torch.export.export(model, (x,)), file)
    for imported in (True, False):
        code = f"import torch{', tridil' * imported}; torch.export.load({str(file)!r}).module()(torch.randn(1, 2, 6, 6))"
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env
        )
        assert (done.returncode == 0) is (imported or backend_ == "auto"), done.stderr
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert (
        'need `import tridil` before `torch.export.load`, or ATen\'s convolutions, also where "auto" was exported on the CPU'
        in readme
    )


@pytest.mark.filterwarnings("ignore")
# the others export no other kind of layer
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in SMALL), "causal"]
)
def test_onnx_has_plain_convolutions(name, backend, device, seed):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = DilatedConv1d(3, 4, 2, dilation=3, causal=True) if name == "causal" else SMALL[name]()
    x = torch.randn(SMALL_INPUTS.get(name, (2, 3, 9)), device=device)
    convolutions = sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    convert(model.to(device).eval(), backend=backend)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    nodes = [node for node in program.graph.node if node.op_type == "Conv"]
    assert len(nodes) == convolutions and {node.domain for node in program.graph.node} == {""}
    session = runtime.InferenceSession(program.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach().cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused(device, seed):
    model, x = (
        nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2)).to(device),
        torch.randn(1, 4, 7, 7, device=device),
    )
    expected = model(x)
    convert(model, backend="aten")
    with pytest.raises(
        TypeError, match=r"TorchScript cannot compile DilatedConv2d: .*tridil.revert"
    ):
        torch.jit.script(model)
    with pytest.raises(TypeError, match=r"TorchScript cannot compile dilated_conv2d"):
        torch.jit.script(scripted)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    revert(model)
    script = torch.jit.script(model)
    torch.testing.assert_close(script(x), expected)
    report = convert(script)
    assert not report.replaced and "is TorchScript" in report.skipped["0"]
    pytest.importorskip("triton")
    convert(model, backend="triton")
    with pytest.raises(TypeError, match="torch.jit.trace cannot record the Triton backend"):
        torch.jit.trace(model, x)


def scripted(x, w):
    return tridil.dilated_conv2d(x, w)


def problem(
    n,
    c,
    h,
    w,
    k,
    taps,
    pad=(0, 0),
    dil=(1, 1),
    dtype="float32",
    layout="nchw",
    stride=(1, 1),
    groups=1,
):
    pads = tuple(p if isinstance(p, tuple) else (p, p) for p in pad)
    return Problem(n, c, h, w, k, *taps, stride, pads, dil, groups, dtype, layout)


class Functional(nn.Module):
    """Convolutions of every kind of call."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6)
        self.causal = DilatedConv1d(6, 6, 2, dilation=3, causal=True, backend="aten")

    def forward(self, x, scale=1):
        x = self.bn(self.conv(x))
        x = F.conv2d(x, x.new_ones(6, 3, 2, 3), None, (2, 1), "valid", groups=2) * scale
        x = F.conv2d(x, x.new_ones(6, 6, 2, 2), padding="same", dilation=3)
        x = tridil.dilated_conv2d(input=x, weight=x.new_ones(6, 6, 1, 3), padding=(0, 1))
        x = self.causal(self.causal(x.flatten(2)))
        x = F.conv1d(x[0], x.new_ones(6, 6, 3), stride=2, padding=1)
        return F.conv_transpose1d(x, x.new_ones(6, 1, 1))


EXPECTED = {
    problem(2, 4, 9, 8, 6, (3, 3), (2, 2), (2, 2)): 1,
    problem(2, 6, 9, 8, 6, (2, 3), stride=(2, 1), groups=2): 1,
    problem(2, 6, 4, 6, 6, (2, 2), ((1, 2), (1, 2)), (3, 3)): 1,
    problem(2, 6, 4, 6, 6, (1, 3), (0, 1)): 1,
    problem(2, 6, 1, 24, 6, (1, 2), (0, (3, 0)), (1, 3)): 2,
    problem(1, 6, 1, 24, 6, (1, 3), (0, 1), stride=(1, 2)): 1,
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", ["real", "meta", "fake"])
@pytest.mark.parametrize("converted", [None, "auto", "triton"])
def test_scan_lists_problems(converted, kind, seed, monkeypatch):
    """Without a launch, without Triton even."""
    monkeypatch.setattr(tridil.drivers, "_has_triton", lambda: False)
    with torch._subclasses.FakeTensorMode() if kind == "fake" else nullcontext():
        model = Functional().to("meta") if kind == "meta" else Functional()
        if converted:
            convert(model, backend=converted)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        found = scan(
            model, torch.randn(2, 4, 9, 8, device="meta" if kind == "meta" else "cpu"), scale=2
        )
        assert list(found.items()) == list(EXPECTED.items())
        if kind == "real":
            assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm]
)
def test_scan_leaves_the_state_of_norms(norm, seed):
    model = nn.Sequential(norm(nn.Conv2d(4, 6, 3, dilation=2)), nn.BatchNorm2d(6))
    state = copy.deepcopy(model.state_dict())
    assert scan(model, torch.randn(2, 4, 7, 6)).total() == 1
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_scan_follows_dtype_layout_and_compiled_models(backend, device, seed):
    layer = nn.Conv2d(4, 6, 3, dilation=2).to(device)
    convert(layer, backend=backend)
    x, base = torch.randn(2, 4, 9, 8, device=device), problem(2, 4, 9, 8, 6, (3, 3), dil=(2, 2))
    assert (
        scan(layer, x)
        == {base: 1}
        == scan(torch.compile(layer, backend="aot_eager"), x)
        == scan(lambda t: layer(t), x)
    )
    nhwc = problem(2, 4, 9, 8, 6, (3, 3), dil=(2, 2), layout="nhwc")
    assert scan(layer, x.to(memory_format=torch.channels_last)) == {nhwc: 1}
    with torch.autocast(device.type, torch.bfloat16):
        assert scan(layer, x) == {problem(2, 4, 9, 8, 6, (3, 3), dil=(2, 2), dtype="bfloat16"): 1}
    assert not scan(layer, x[:0]) and not scan(
        nn.Linear(3, 3).to(device), torch.randn(2, 3, device=device)
    )
    exported = torch.export.export(
        nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2).to(device)), (x,)
    ).module()
    assert scan(exported, x) == {base: 1}
    with pytest.raises(RuntimeError, match="expected|shapes|channels"):  # the model's own error
        scan(nn.Conv2d(3, 6, 3).to(device), x)


def test_scan_of_a_deeplab_is_its_layers(seed):
    model = models.DeepLabV3(16).eval()
    x = torch.randn(1, 3, 64, 64)
    found = scan(model, x)
    assert found.total() == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    convert(model)
    assert scan(model, x) == found
    assert Counter(p.dilation[0] for p in found.elements() if p.dilation[0] > 1) == {
        2: 6,
        4: 2,
        12: 1,
        24: 1,
        36: 1,
    }


class Asks(nn.Conv2d):
    """Those that derive from it give a tag, each its own."""

    tags: list = []

    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        assert tag not in Asks.tags
        Asks.tags.append(tag)


class Answers(Asks, tag="answers"):
    pass


def test_classes_that_ask_those_that_derive_from_them(backend):
    model = nn.Sequential(nn.Conv2d(3, 3, 3, dilation=2), Answers(3, 3, 3, dilation=2))
    x = torch.randn(1, 3, 9, 9)
    expected = model(x)
    assert convert(model, backend=backend).replaced == ["0", "1"] and Asks.tags == ["answers"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert revert(model) == ["0", "1"] and type(model[1]) is Answers


class Remade(nn.Conv2d):
    """Says itself how it is copied."""

    def __reduce__(self):
        return Remade.make, (self.state_dict(),)

    @staticmethod
    def make(state):
        layer = Remade(3, 3, 3, dilation=2)
        layer.load_state_dict(state)
        return layer


def test_copies_of_a_layer_that_says_how_it_is_made(backend):
    layer, x = Remade(3, 3, 3, dilation=2), torch.randn(1, 3, 9, 9)
    expected = layer(x)
    convert(layer, backend=backend)
    for same in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(same, DilatedConv2d) and same.backend == backend
        torch.testing.assert_close(same(x), expected, rtol=1e-4, atol=1e-4)
        assert revert(same) == [""] and type(same) is Remade


def test_explain_says_which_dtypes_it_knows():
    x, w = torch.ones(1, 3, 9, 9, dtype=torch.int32), torch.ones(4, 3, 3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="int32 .* run through ATen"):
        tridil.explain(x, w)
