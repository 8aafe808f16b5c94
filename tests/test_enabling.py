"""enable: models as they are run through tridil."""

import enum
import pickle

import numpy as np
import pytest
import torch
from test_pytorch_suite import close, gradients, module_db, op_db
from test_transposed import Generator
from torch import nn
from torch.nn import functional as F

import tridil
from tridil import enabling, functional

pytestmark = pytest.mark.usefixtures("poisoned")
PLAIN = {name: getattr(torch, name) for name in (*enabling._TAKEN, *enabling._TRANSPOSED)}


@pytest.fixture(autouse=True)
def disabled():
    yield
    tridil.disable()
    assert all(getattr(F, name) is function for name, function in PLAIN.items())


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions of tridil that were called."""
    seen = []

    def watched(name, function):
        return lambda *args, **kwargs: seen.append(name) or function(*args, **kwargs)

    for table in (enabling._TAKEN, enabling._TRANSPOSED):
        for name, (function, *rest) in list(table.items()):
            monkeypatch.setitem(table, name, (watched(name, function), *rest))
    return seen


def test_what_is_taken(calls, device):
    x, w = torch.randn(1, 4, 9, 9, device=device), torch.randn(4, 4, 3, 3, device=device)
    tridil.enable()
    for arguments, taken in (
        (dict(dilation=2), True),
        (dict(dilation=(1, 3)), True),
        (dict(dilation=[2]), True),
        (dict(dilation=1), False),
        (dict(dilation=(1, 1)), False),
        (dict(), False),
    ):
        calls.clear()
        close(F.conv2d(x, w, **arguments), PLAIN["conv2d"](x, w, **arguments))
        assert bool(calls) == taken, arguments
    calls.clear()
    F.conv2d(x, w, None, 1, 2, 2)  # by place
    assert calls == ["conv2d"]
    F.conv2d(x, w[..., :1, :1], dilation=3)  # one tap
    F.conv2d(x, w[..., :1, :], dilation=(3, 1))  # along the other axis
    F.conv_transpose2d(x, w, dilation=2)
    assert calls == ["conv2d"]
    nn.Conv1d(4, 4, 3, dilation=2, device=device)(x[0, :, 0])
    assert calls == ["conv2d", "conv1d"]
    tridil.enable(transposed=True, predicate=lambda p: p.dilation == (1, 1))
    calls.clear()
    F.conv2d(x, w, dilation=2)
    F.conv_transpose2d(x, w, None, 2, 1, 1)
    F.conv_transpose2d(x, w, dilation=2)
    assert calls == ["conv_transpose2d"]
    tridil.disable()
    tridil.disable()
    assert F.conv2d is PLAIN["conv2d"]


def test_contexts_nest():
    tridil.enable(min_dilation=4)
    outer = F.conv2d
    with tridil.enabled(transposed=True):
        assert F.conv2d is not outer and F.conv_transpose2d is not PLAIN["conv_transpose2d"]
        with tridil.enabled():
            pass
        assert F.conv_transpose2d is not PLAIN["conv_transpose2d"]
    assert F.conv2d is outer and F.conv_transpose2d is PLAIN["conv_transpose2d"]
    with pytest.raises(RuntimeError, match="inside"), tridil.enabled():
        raise RuntimeError("inside")
    assert F.conv2d is outer


@pytest.mark.parametrize(
    ("error", "rest"),
    [
        (ValueError, dict(min_dilation=0)),
        (TypeError, dict(min_dilation="a")),
        (TypeError, dict(predicate=3)),
        (ValueError, dict(backend="cudnn")),
    ],
)
def test_bad_arguments_change_nothing(error, rest):
    with pytest.raises(error):
        tridil.enable(**rest)
    assert F.conv2d is PLAIN["conv2d"]


def test_what_runs_as_aten_does_not_come_back(calls, device):
    """backend="aten" calls PyTorch's own function, not the one that stands for it."""
    x, w = torch.randn(1, 4, 9, 9, device=device), torch.randn(4, 4, 3, 3, device=device)
    with tridil.enabled(backend="aten", transposed=True):
        close(F.conv2d(x, w, dilation=2), PLAIN["conv2d"](x, w, dilation=2))
        F.conv_transpose2d(x, w, dilation=2)
        assert functional.dilated_conv2d(x, w, dilation=2, backend="aten").shape[-1] == 5
    assert calls == ["conv2d", "conv_transpose2d"]


@pytest.mark.parametrize("name", list(PLAIN))
@pytest.mark.slow
def test_samples(name, backend, device):
    """PyTorch's samples of each function, all of them taken."""
    (op,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    count = 0
    with tridil.enabled(min_dilation=1, transposed=True, backend=backend):
        for sample in op.sample_inputs(device, torch.float64, requires_grad=True):
            tensors = (sample.input, *sample.args[:2])
            expected = PLAIN[name](sample.input, *sample.args, **sample.kwargs)
            try:
                got = getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
            except NotImplementedError as e:
                assert backend == "triton" and "output_padding" in str(e)
                continue
            close(got, expected)
            for a, b in zip(gradients(got, tensors), gradients(expected, tensors), strict=True):
                close(a, b)
            count += 1
    assert count >= 5


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_module_cases(layer, backend, device):
    (info,) = (info for info in module_db if info.module_cls is layer)
    count = 0
    for case in info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=False
    ):
        build, call = case.constructor_input, case.forward_input
        kwargs = dict(build.kwargs) | dict(device=device, dtype=torch.float64)
        module = layer(*build.args, **kwargs)
        expected = module(*call.args, **call.kwargs)
        with tridil.enabled(min_dilation=1, transposed=True, backend=backend):
            close(module(*call.args, **call.kwargs), expected)
        count += 1
    assert count >= 2


def test_models_as_they_are(calls, backend, device, seed):
    from models import head

    for model, x, taken in (
        (head().to(device), torch.randn(1, 4, 9, 9, device=device), {"conv2d"}),
        (
            Generator().to(device),
            torch.randn(1, 6, 7, device=device),
            {"conv1d", "conv_transpose1d"},
        ),
    ):
        leaves = list(model.parameters())
        expected = model(x)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        calls.clear()
        with tridil.enabled(transposed=True, backend=backend):
            y = model(x)
            grads = torch.autograd.grad(y.square().sum(), leaves)
            assert set(calls) == taken
            compiled = torch.compile(model, backend="aot_eager")(x)
        for a, b in zip((y, compiled, *grads), (expected, expected, *wanted)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_compiles_pytorchs_own(device):
    """Those who script while it is enabled get aten's operators, as before."""
    x = torch.randn(2, 3, 9, 9, device=device)

    def function(x: torch.Tensor, w: torch.Tensor):
        return F.conv2d(x, w, dilation=2)

    with tridil.enabled(transposed=True):
        for layer, given in (
            (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x),
            (nn.Conv2d(3, 4, 3, dilation=2, padding="same"), x),
            (nn.Conv1d(3, 4, 3, dilation=2), x[..., 0]),
            (nn.ConvTranspose2d(3, 4, 3, dilation=2), x),
            (nn.ConvTranspose1d(3, 4, 3, dilation=2), x[..., 0]),
        ):
            layer.to(device)
            torch.testing.assert_close(torch.jit.script(layer)(given), layer(given))
        w = torch.randn(4, 3, 3, 3, device=device)
        torch.testing.assert_close(torch.jit.script(function)(x, w), function(x, w))
        assert pickle.loads(pickle.dumps(F.conv2d)) is F.conv2d


class Two(enum.IntEnum):
    TWO = 2


def test_dilations_are_what_pytorch_takes(device):
    x, w = torch.randn(2, 3, 9, 9, device=device), torch.randn(4, 3, 3, 3, device=device)
    for dilation in (2, (2,), [2, 1], np.int64(2), np.int64(1), torch.tensor(2), Two.TWO):
        with tridil.enabled(backend="aten"):
            y = F.conv2d(x, w, dilation=dilation)
        rate = dilation.item() if isinstance(dilation, torch.Tensor) else dilation
        torch.testing.assert_close(y, torch.conv2d(x, w, dilation=rate))
    for dilation in (2.0, "2", (), None, (2.5, 1)):
        with tridil.enabled(), pytest.raises((TypeError, RuntimeError), match="conv2d|dilation"):
            F.conv2d(x, w, dilation=dilation)
    for tensors in ((x, [1]), ([1], w)):
        with tridil.enabled(), pytest.raises(TypeError):
            F.conv2d(*tensors, dilation=2)


@pytest.mark.parametrize("predicate", [None, lambda problem: True])
def test_fx_traces_calls_of_the_function(predicate, device):
    class Calls(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias, dilation=2)

    x = torch.randn(2, 3, 9, 9, device=device)
    layer = Calls(3, 4, 3).to(device)
    with tridil.enabled(predicate=predicate):
        traced = torch.fx.symbolic_trace(layer)
        torch.testing.assert_close(traced(x), layer(x))
    # without sizes a predicate cannot be asked
    targets = {node.target for node in traced.graph.nodes}
    assert (tridil.dilated_conv2d in targets) == (predicate is None)
