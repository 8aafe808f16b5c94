"""Transposed convolutions against F.conv_transpose and nn.ConvTranspose, both backends."""

import copy

import pytest
import torch
from test_pytorch_suite import close, gradients, module_db, op_db
from torch import nn
from torch.nn import functional as F

import tridil
from tridil import dilated_conv_transpose1d, dilated_conv_transpose2d

pytestmark = pytest.mark.usefixtures("poisoned")
FUNCTIONS = {
    1: (dilated_conv_transpose1d, F.conv_transpose1d),
    2: (dilated_conv_transpose2d, F.conv_transpose2d),
}
LAYERS = {
    1: (tridil.DilatedConvTranspose1d, nn.ConvTranspose1d),
    2: (tridil.DilatedConvTranspose2d, nn.ConvTranspose2d),
}


@pytest.mark.parametrize(
    ("x", "w", "arguments"),
    [
        ((2, 4, 5, 6), (4, 6, 3, 3), dict(stride=2, padding=1, output_padding=1)),
        ((1, 4, 5, 6), (4, 3, 2, 2), dict(stride=2)),
        (
            (2, 6, 4, 5),
            (6, 2, 3, 2),
            dict(stride=(3, 2), padding=(1, 0), dilation=(2, 3), groups=2),
        ),
        ((2, 3, 7, 4), (3, 5, 3, 3), dict(dilation=2, padding=2)),
        ((4, 5, 6), (4, 3, 4, 4), dict(stride=2, padding=1)),
        ((2, 4, 9), (4, 6, 16), dict(stride=8, padding=4)),
        ((2, 4, 9), (4, 2, 4), dict(stride=2, padding=1, output_padding=1, groups=2)),
        ((4, 9), (4, 3, 3), dict(dilation=4)),
        # the stride is no more than the output padding: through ATen
        ((1, 4, 5, 5), (4, 3, 3, 3), dict(stride=2, dilation=4, output_padding=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_values_and_derivatives(x, w, arguments, last, backend, device, seed):
    function, plain = FUNCTIONS[len(w) - 2]
    x, w = torch.randn(x, device=device), torch.randn(w, device=device)
    bias = torch.randn(w.shape[1] * arguments.get("groups", 1), device=device)
    if last and x.dim() == 4:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    expected = plain(x, w, bias, **arguments)
    if backend == "triton" and arguments.get("output_padding") == 3:
        with pytest.raises(NotImplementedError, match="must be smaller than the stride"):
            function(x, w, bias, **arguments, backend="triton")
        backend = "auto"
    got = function(x, w, bias, **arguments, backend=backend)
    close(got, expected)
    assert got.stride() == expected.stride()
    dy = torch.randn_like(expected).requires_grad_()
    first = [torch.autograd.grad(y, leaves, dy, create_graph=True) for y in (got, expected)]
    for a, b in zip(*first):
        close(a, b)
    vs = [torch.randn_like(t) for t in first[0]]
    for a, b in zip(*(torch.autograd.grad(g, [x, w, dy], vs) for g in first)):
        close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples(dims, dtype, backend, device):
    (op,) = (op for op in op_db if op.name == f"nn.functional.conv_transpose{dims}d")
    function, plain = FUNCTIONS[dims]
    count = 0
    for sample in op.sample_inputs(device, dtype, requires_grad=True):
        tensors = (sample.input, *sample.args[:2])
        expected = plain(sample.input, *sample.args, **sample.kwargs)
        try:
            got = function(sample.input, *sample.args, **sample.kwargs, backend=backend)
        except NotImplementedError as e:  # output_padding beyond the stride, kernels asked for
            assert backend == "triton" and "output_padding" in str(e)
            continue
        close(got, expected)
        for a, b in zip(gradients(got, tensors), gradients(expected, tensors), strict=True):
            close(a, b)
        count += 1
    assert count >= 5


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_module_cases(dims, training, backend, device):
    ours, plain = LAYERS[dims]
    (info,) = (info for info in module_db if info.module_cls is plain)
    count = 0
    for case in info.module_inputs_func(
        info, device=device, dtype=torch.float64, requires_grad=True, training=training
    ):
        build, call = case.constructor_input, case.forward_input
        kwargs = dict(build.kwargs) | dict(device=device, dtype=torch.float64)
        theirs = plain(*build.args, **kwargs)
        layer = ours(*build.args, **kwargs, backend=backend)
        layer.load_state_dict(theirs.state_dict())
        close(layer(*call.args, **call.kwargs), theirs(*call.args, **call.kwargs))
        count += 1
    assert count >= 2


def test_layers(backend, device, seed):
    """output_size, state_dict, repr, compiled, exported, autocast, half."""
    layer = tridil.DilatedConvTranspose2d(4, 6, 3, 2, 1, device=device, backend=backend)
    plain = nn.ConvTranspose2d(4, 6, 3, 2, 1, device=device)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 5, device=device)
    close(layer(x, output_size=[10, 10]), plain(x, output_size=[10, 10]))
    assert ("backend" in repr(layer)) == (backend != "auto")
    for same in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(layer, (x,)).module(),
        copy.deepcopy(layer),
    ):
        close(same(x), plain(x))
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x), rtol=0.05, atol=0.1)
    torch.testing.assert_close(layer.half()(x.half()).float(), plain(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(
        torch.func.vmap(layer.float())(x[:, None]).squeeze(1), plain(x), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("dims", [1, 2])
def test_samples_that_must_raise(dims, backend, device):
    (op,) = (op for op in op_db if op.name == f"nn.functional.conv_transpose{dims}d")
    function, _ = FUNCTIONS[dims]
    for sample in op.error_inputs_func(op, device) if op.error_inputs_func else ():
        arguments = sample.sample_input
        with pytest.raises((ValueError, TypeError)):
            function(arguments.input, *arguments.args, **arguments.kwargs, backend=backend)
    x, w = (torch.zeros(1, 4, 9, 9)[:, :, : 9 if dims == 2 else 0], torch.zeros(4, 2, 3, 3))
    x, w = (x, w) if dims == 2 else (torch.zeros(1, 4, 9), torch.zeros(4, 2, 3))
    x, w = x.to(device), w.to(device)
    for error, match, rest in (
        (ValueError, "must divide", dict(groups=3)),
        (ValueError, "stride must be at least 1", dict(stride=0)),
        (ValueError, "padding must be at least 0", dict(padding=-1)),
        (ValueError, "output_padding must be smaller", dict(output_padding=1)),
        (ValueError, "pad less", dict(padding=9)),
        (ValueError, "bias must have shape", dict(bias=torch.zeros(3, device=device))),
        (TypeError, "stride must be made of ints", dict(stride="a")),
    ):
        with pytest.raises(error, match=match):
            function(x, w, **rest, backend=backend)
    with pytest.raises(ValueError, match="channels"):
        function(x[:, :3], w, backend=backend)
    with pytest.raises(ValueError, match="weight"):
        function(x, w[0], backend=backend)


class Generator(nn.Sequential):
    """HiFi-GAN in small (arXiv:2010.05646): transposed layers, then dilated residual ones."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(6, 8, 7, padding=3),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(8, 4, 16, 8, 4),
            nn.Conv1d(4, 4, 3, padding=3, dilation=3),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose1d(4, 2, 4, 2, 1),
            nn.Conv1d(2, 1, 7, padding=3),
        )


def test_converted_on_request(backend, device, seed):
    model, x = Generator().to(device), torch.randn(2, 6, 9, device=device)
    expected, plain = model(x), copy.deepcopy(model)
    report = tridil.convert(model, backend=backend)
    assert report.replaced == ["3"] and "transposed=True" in report.skipped["2"]
    report = tridil.convert(model, backend=backend, transposed=True)
    assert report.replaced == ["2", "5"]
    assert type(model[2]) is tridil.DilatedConvTranspose1d
    y = model(x)
    close(y, expected)
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters()):
        close(a.grad, b.grad)
    assert tridil.revert(model) == ["2", "3", "5"] and type(model[2]) is nn.ConvTranspose1d
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_the_suite_holds_the_layers_of_networks():
    """Each row is the convolution whose dgrad is a transposed layer of these sizes."""
    from tridil import transposed, workloads

    layers = {w.name: w.problem for w in workloads.suite("transposed")}
    assert len(layers) == 16
    for name, c, k, taps, stride, pad, size in (
        ("U-Net up 1024", 1024, 512, (2, 2), 2, 0, (4, 1024, 32, 32)),
        ("DCGAN 128->3", 128, 3, (4, 4), 2, 1, (128, 128, 32, 32)),
        ("HiFi-GAN V1 up 8, 256->128", 256, 128, (16,), 8, 4, (16, 256, 256)),
    ):
        x, w = (
            torch.empty(size, device="meta").half(),
            torch.empty(c, k, *taps, device="meta").half(),
        )
        p = transposed.problem_of(len(taps), x, w, None, stride, pad, 0, 1, 1, x.dtype)
        y = FUNCTIONS[len(taps)][1](x, w, None, stride, pad)
        assert (p.n, p.c, p.w) == (*y.shape[:2], y.shape[-1])
        assert p.h == (y.shape[-2] if len(taps) == 2 else 1)
        assert any(q.key() == p.key().replace("nchw", "nhwc") for q in layers.values()), (
            name,
            p.key(),
        )
