"""What the compiler, scalers and precision switches of PyTorch make of the public function, beside
F.conv2d."""

import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from tridil import (
    DilatedConv2d,
    dilated_conv1d,
    dilated_conv2d,
    dilated_conv_transpose2d,
    multi_rate_conv2d,
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dilation", "shape"])
def test_no_recompilation_storm(what, backend, device, seed):
    """A dozen dilations, or sizes, take at most two graphs: the first, and one for any."""
    counter, w = CompileCounter(), torch.randn(4, 3, 3, 3, device=device)
    compiled = torch.compile(
        lambda x, w, d: dilated_conv2d(x, w, None, 1, d, d, backend=backend),
        backend=counter,
        fullgraph=True,
    )
    for i in range(1, 13):
        x, d = (
            (torch.randn(1, 3, 9, 10, device=device), i)
            if what == "dilation"
            else (torch.randn(2 + i % 3, 3, 4 + i, 16 - i, device=device), 2)
        )
        torch.testing.assert_close(
            compiled(x, w, d), F.conv2d(x, w, None, 1, d, d), rtol=1e-3, atol=1e-3
        )
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_inductor(mode, backend, device, seed):
    """Forward and backward through Inductor; strides as in eager."""
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler on the CPU")
    layer = DilatedConv2d(4, 6, 3, padding=2, dilation=2, backend=backend).to(device)
    x = (
        torch.randn(2, 4, 7, 8, device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    found, expected = [], []
    for f, out in ((torch.compile(layer, mode=mode, fullgraph=True), found), (layer, expected)):
        layer.zero_grad()
        y = f(x)
        y.square().sum().backward()
        out += [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
        x.grad = None
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert a.stride() == b.stride()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_grad_scaler_skips_steps_that_overflow(backend, device, seed):
    """A scale too large for fp16 gradients is halved and the step left out, as with nn.Conv2d."""
    layer = DilatedConv2d(3, 4, 3, padding=2, dilation=2, backend=backend).to(device)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler, x = (
        torch.amp.GradScaler(device.type, init_scale=2.0**40),
        torch.randn(2, 3, 6, 7, device=device),
    )

    def step():
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = layer(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    assert scaler.get_scale() == 2.0**39 and torch.equal(layer.weight, before)
    scaler.update(8.0)  # a scale that fits
    step()
    assert (
        scaler.get_scale() == 8
        and not torch.equal(layer.weight, before)
        and layer.weight.isfinite().all()
    )


def test_both_tf32_switches(monkeypatch):
    """The older allow_tf32 and the newer fp32_precision say the same."""
    from tridil.drivers import fp32_precision

    cudnn = torch.backends.cudnn
    for allowed in (True, False, True):
        cudnn.allow_tf32 = allowed
        assert fp32_precision("cuda:80") == ("tf32" if allowed else "ieee")
    for precision in ("ieee", "tf32"):
        cudnn.conv.fp32_precision = precision
        assert fp32_precision("cuda:80") == precision


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fullgraph", "graph breaks allowed", "without Dynamo"])
@pytest.mark.parametrize("dim", [1, 2])
def test_compiled_autograd_over_an_eager_forward(dim, how, backend, device, seed):
    """Gradients of plain convolutions, and of a gradient (where Dynamo compiles none of ATen's)."""
    from torch._dynamo import compiled_autograd

    ours, plain = (dilated_conv2d, F.conv2d) if dim == 2 else (dilated_conv1d, F.conv1d)
    leaves = [
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((2, 3, *[8] * dim), (4, 3, *[3] * dim), (4,))
    ]
    graphs, results = [], []

    def compiler(graph):
        graphs.append(graph)
        return (
            graph
            if how == "without Dynamo"
            else torch.compile(graph, backend="aot_eager", fullgraph=how == "fullgraph")
        )

    for f in (plain, partial(ours, backend=backend)):
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            tensors = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs)]
            y = f(*tensors, 1, 2, 2)
            with nullcontext() if f is plain else compiled_autograd._enable(compiler):
                y.square().sum().backward()
            results.append([t.grad for t in tensors])
        (dx,) = torch.autograd.grad(
            f(*leaves, 1, 2, 2).square().sum(), leaves[0], create_graph=True
        )
        with (
            nullcontext()
            if f is plain or backend == "aten"
            else compiled_autograd._enable(compiler)
        ):
            dx.square().sum().backward()
        results.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    assert len(graphs) == (3 if backend == "aten" else 4)
    for expected, got in zip(results[:4], results[4:]):
        for a, b in zip(got, expected):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


CALLS = {
    "2d": (partial(dilated_conv2d, dilation=2), 2),
    "1d": (partial(dilated_conv1d, dilation=2), 1),
    "transposed": (lambda x, w, **k: dilated_conv_transpose2d(x, w.transpose(0, 1), **k), 2),
    "branches": (
        lambda x, w, **k: multi_rate_conv2d(x, [w, w], padding=[1, 2], dilation=[1, 2], **k),
        2,
    ),
}


# what takes seconds
CALLS_SLOW_LAST = [
    *list(CALLS)[:2],
    *(pytest.param(name, marks=pytest.mark.slow) for name in list(CALLS)[2:]),
]


@pytest.mark.parametrize("name", CALLS_SLOW_LAST)
def test_symbolic_sizes_outside_dynamo(name, backend, device):
    """make_fx and fake tensors: sizes are symbols, which have no hash, though nothing compiles."""
    call, dims = CALLS[name]
    x = torch.randn(2, 3, *[9] * dims, device=device, requires_grad=True)
    w = torch.randn(4, 3, *[3] * dims, device=device, requires_grad=True)

    def gradients(x, w):
        return torch.autograd.grad(call(x, w, backend=backend).square().sum(), (x, w))

    traced = make_fx(gradients, tracing_mode="symbolic")(x, w)
    for got, expected in zip(traced(x, w), gradients(x, w)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(t.detach()) for t in (x, w)]
    with mode:
        assert call(*fakes, backend=backend).dim() == dims + 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CALLS_SLOW_LAST)
def test_a_batch_size_that_only_data_tell(name, layout, backend, device):
    """Nothing asks whether there are images: export and fullgraph take u0 of them."""
    call, dims = CALLS[name]
    x, w = (torch.randn(n, 3, *[s] * dims, device=device) for n, s in ((2, 9), (4, 3)))
    if dims == 2:
        x, w = x.to(memory_format=layout), w.to(memory_format=layout)

    class Chosen(torch.nn.Module):
        def forward(self, x, keep, w):
            return call(x[keep], w, backend=backend)

    keep = torch.tensor([True, False], device=device)
    exported = torch.export.export(Chosen(), (x, keep, w)).module()
    torch.testing.assert_close(exported(x, ~keep, w), Chosen()(x, ~keep, w), rtol=1e-3, atol=1e-3)
    assert exported(x, keep & ~keep, w).shape == call(x[:0], w, backend="aten").shape
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(Chosen(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, keep, w), exported(x, keep, w))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_a_message():
    with pytest.raises(Exception, match="TorchScript"):
        torch.jit.script(DilatedConv2d(3, 4, 3, dilation=2))
