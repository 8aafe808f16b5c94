"""DilatedConv2d is nn.Conv2d, DilatedConv1d is nn.Conv1d."""

import copy
import inspect
import io
import pickle
import typing

import pytest
import torch
from torch import nn

from tridil import DilatedConv1d, DilatedConv2d

LAYERS = [
    dict(),
    dict(dilation=2, padding=2),
    dict(stride=(2, 1), padding=(2, 3), dilation=(2, 3)),
    dict(padding="same", dilation=3),
    dict(padding="valid", dilation=2),
    dict(groups=4, padding=2, dilation=2),
    dict(bias=False, dilation=(1, 4)),
    dict(kernel_size=(2, 4), padding="same"),
    *[
        dict(padding=2, dilation=2, padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    ],
    dict(padding="same", dilation=2, kernel_size=(2, 3), padding_mode="reflect"),
    dict(padding=(1, 2), padding_mode="circular", stride=2),
]


def layers(backend, device, args):
    args = dict(in_channels=4, out_channels=8, kernel_size=3) | args
    plain, ours = (
        nn.Conv2d(**args, device=device),
        DilatedConv2d(**args, device=device, backend=backend),
    )
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.slow
@pytest.mark.parametrize("args", LAYERS, ids=str)
def test_forward_backward_and_state(args, backend, device, seed, poisoned):
    plain, ours = layers(backend, device, args)
    for shape in ((2, 4, 12, 11), (4, 12, 11), (0, 4, 12, 11)):
        inputs = [torch.randn(shape, device=device, requires_grad=True)]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        for layer, x in zip((plain, ours), inputs):
            layer.zero_grad()
            y = layer(x)
            (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        expected, got = plain(inputs[0]), ours(inputs[1])
        assert got.shape == expected.shape and got.stride() == expected.stride()
        pairs = [
            (got, expected),
            (inputs[1].grad, inputs[0].grad),
            *((a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters())),
        ]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict())


def test_same_initialisation_and_construction():
    for args in LAYERS:
        built = []
        for cls in (nn.Conv2d, DilatedConv2d):
            torch.manual_seed(0)
            built.append(cls(4, 8, **dict(dict(kernel_size=3), **args)))
        assert all(torch.equal(a, b) for a, b in zip(built[0].parameters(), built[1].parameters()))
    assert DilatedConv2d(4, 8, 3, 1, 2, 2, 1, True, "zeros").dilation == (2, 2)
    assert DilatedConv2d(4, 8, 3, dtype=torch.float64, device="meta").weight.dtype == torch.float64


@pytest.mark.parametrize(
    "plain, ours, more",
    [(nn.Conv2d, DilatedConv2d, ["backend"]), (nn.Conv1d, DilatedConv1d, ["causal", "backend"])],
)
def test_signatures_are_written_out(plain, ours, more, device, seed):
    """For tools that inspect them: the names, order and defaults of nn.Conv's."""
    parameters = list(inspect.signature(ours).parameters.values())
    expected = list(inspect.signature(plain).parameters.values())
    assert [(p.name, p.default, p.kind) for p in parameters[: -len(more)]] == [
        (p.name, p.default, p.kind) for p in expected
    ]
    assert typing.get_type_hints(ours.__init__).keys() - set(more) == typing.get_type_hints(
        plain.__init__
    ).keys() | {"device", "dtype"}
    assert [(p.name, p.kind) for p in parameters[-len(more) :]] == [
        (name, inspect.Parameter.KEYWORD_ONLY) for name in more
    ]
    layer = nn.utils.skip_init(ours, 3, 4, 3, dilation=2, device=device, backend="aten")
    assert (
        layer.backend == "aten"
        and layer.dilation == (2,) * len(layer.dilation)
        and layer.weight.device.type == device.type
    )
    assert nn.utils.skip_init(ours, 3, 4, 3, 1, 0, 2, bias=False).bias is None
    with pytest.raises(TypeError, match="nonsense"):
        ours(3, 4, 3, nonsense=1)


@pytest.mark.parametrize(
    "args",
    [
        dict(groups=3),
        dict(padding="same", stride=2),
        dict(padding="full"),
        dict(padding_mode="mirror"),
        dict(backend="cudnn"),
    ],
)
def test_bad_layers(args):
    with pytest.raises(ValueError):
        DilatedConv2d(4, 8, **dict(dict(kernel_size=3), **args))


@pytest.mark.parametrize(
    "args, backend_",
    [
        (dict(), "auto"),
        (dict(stride=2, padding=1, dilation=2, groups=2, bias=False), "auto"),
        (dict(padding="same"), "aten"),
    ],
)
def test_repr(args, backend_):
    plain, ours = nn.Conv2d(4, 8, 3, **args), DilatedConv2d(4, 8, 3, **args, backend=backend_)
    suffix = "" if backend_ == "auto" else f", backend='{backend_}'"
    assert repr(ours) == f"Dilated{repr(plain)[:-1]}{suffix})"


def saved(layer):
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
def test_copies(duplicate, device, seed):
    layer, x = (
        DilatedConv2d(4, 8, 3, padding="same", dilation=3, backend="aten").to(device),
        torch.randn(1, 4, 9, 9, device=device),
    )
    other = duplicate(layer)
    assert (
        type(other) is DilatedConv2d and other.backend == "aten" and torch.equal(other(x), layer(x))
    )


def test_objects_saved_without_a_backend(seed):
    """An nn.Conv2d's state, or an older pickle's."""
    plain, layer = nn.Conv2d(4, 8, 3, padding=2, dilation=2), DilatedConv2d.__new__(DilatedConv2d)
    layer.__setstate__(plain.__dict__.copy())
    x = torch.randn(1, 4, 9, 9)
    assert (
        layer.backend == "auto" and torch.equal(layer(x), plain(x)) and "backend" not in repr(layer)
    )
    plain.__class__ = DilatedConv2d
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), layer(x))


def test_the_layer_uses_its_backend(device, seed):
    pytest.importorskip("triton")
    layer = DilatedConv2d(4, 8, 3, backend="triton").to(device)
    with pytest.raises(TypeError, match="dtype complex64"):
        layer.to(torch.complex64)(torch.randn(1, 4, 5, 5, dtype=torch.complex64, device=device))
    layer.backend = "aten"
    assert layer(torch.randn(1, 4, 5, 5, dtype=torch.complex64, device=device)).shape == (
        1,
        8,
        3,
        3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions(dtype, backend, device, seed):
    plain, ours = (
        layer.to(dtype) for layer in layers(backend, device, dict(padding=2, dilation=2))
    )
    x = torch.randn(2, 4, 9, 9, device=device).to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), plain(x), rtol=tolerance, atol=tolerance)
    channels_last = ours.to(memory_format=torch.channels_last)(x)
    assert channels_last.stride() == plain.to(memory_format=torch.channels_last)(x).stride()
    torch.testing.assert_close(channels_last, plain(x), rtol=tolerance, atol=tolerance)


LAYERS_1D = [
    dict(),
    dict(dilation=2, padding=2),
    dict(stride=2, padding=3, dilation=3),
    dict(padding="same", dilation=3),
    dict(kernel_size=2, padding="same"),
    dict(padding="valid", dilation=2),
    dict(groups=4, padding=2, dilation=2),
    dict(bias=False, dilation=4),
    dict(kernel_size=1, stride=3),
    *[
        dict(padding=2, dilation=2, padding_mode=mode)
        for mode in ("reflect", "replicate", "circular")
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize("args", LAYERS_1D, ids=str)
def test_conv1d_forward_backward_and_state(args, backend, device, seed, poisoned):
    args = dict(in_channels=4, out_channels=8, kernel_size=3) | args
    plain, ours = (
        nn.Conv1d(**args, device=device),
        DilatedConv1d(**args, device=device, backend=backend),
    )
    ours.load_state_dict(plain.state_dict()), plain.load_state_dict(ours.state_dict())
    for shape in ((2, 4, 13), (4, 13), (0, 4, 13)):
        check_against(plain, ours, torch.randn(shape, device=device))
    assert repr(ours) == f"Dilated{repr(plain)[:-1]}, backend={backend!r})"


def check_against(plain, ours, x):
    """Outputs, strides, and gradients of the input and of every parameter."""
    results = []
    for f in (plain, ours):
        leaves = [x.clone().requires_grad_(), *f.parameters()]
        y = f(leaves[0])
        grads = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel(), device=x.device).view(y.shape)).sum(), leaves
        )
        results.append([y, *grads])
    assert (
        results[0][0].shape == results[1][0].shape
        and results[0][0].stride() == results[1][0].stride()
    )
    for got, expected in zip(results[1], results[0]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "length", [1, 13, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 12))]
)
@pytest.mark.parametrize(
    "stride, dilation, taps, groups",
    [(1, 1, 3, 1), (1, 4, 3, 1), (2, 3, 2, 2), (3, 2, 4, 1), (2, 5, 1, 4), (1, 30, 2, 1)],
)
def test_causal_layers(stride, dilation, taps, groups, length, backend, device, seed, poisoned):
    """Padding and chomping give the same; an output does not see what comes later."""
    plain = nn.Conv1d(4, 8, taps, stride, dilation * (taps - 1), dilation, groups).to(device)
    ours = DilatedConv1d(4, 8, taps, stride, 0, dilation, groups, causal=True, backend=backend).to(
        device
    )
    ours.load_state_dict(plain.state_dict())
    x, outputs = torch.randn(2, 4, length, device=device), -(-length // stride)

    class Chomped(nn.Module):
        parameters = plain.parameters

        def forward(self, x):
            return plain(x)[..., :outputs].contiguous()

    check_against(Chomped(), ours, x)
    check_against(Chomped(), ours, x[1])
    assert (
        ours(x).shape == (2, 8, outputs)
        and "causal=True" in repr(ours)
        and "causal" not in repr(DilatedConv1d(4, 4, 3))
    )
    later = x.clone()
    later[..., length // 2 + 1 :] += 1
    seen = length // 2 // stride + 1
    assert torch.equal(ours(later)[..., :seen], ours(x)[..., :seen])


def test_causal_layers_copy_no_padded_input(monkeypatch, device, seed):
    pytest.importorskip("triton")
    from tridil import functional, ops

    seen, convolve = [], ops.convolve
    monkeypatch.setattr(functional.F, "pad", lambda *a, **k: pytest.fail("padded a copy"))
    monkeypatch.setattr(
        functional.ops,
        "convolve",
        lambda x, w, bias, p, auto: seen.append((x, p)) or convolve(x, w, bias, p, auto),
    )
    x = torch.randn(2, 4, 9, device=device)
    y = DilatedConv1d(4, 6, 3, dilation=2, causal=True, backend="triton").to(device)(x)
    ((got, problem),) = seen
    assert (
        got.data_ptr() == x.data_ptr()
        and problem.padding == ((0, 0), (4, 0))
        and (problem.h, problem.r, problem.q) == (1, 1, 9)
    )
    assert y.is_contiguous()


@pytest.mark.parametrize(
    "args",
    [dict(padding=2), dict(padding="same"), dict(padding="valid"), dict(padding_mode="reflect")],
)
def test_causal_layers_take_no_padding(args):
    with pytest.raises(ValueError, match="causal=True pads by itself"):
        DilatedConv1d(4, 8, 3, dilation=2, causal=True, **args)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved]
)
def test_copies_of_causal_layers(duplicate, seed):
    layer, x = DilatedConv1d(4, 8, 3, dilation=3, causal=True, backend="aten"), torch.randn(1, 4, 9)
    other = duplicate(layer)
    assert (
        type(other) is DilatedConv1d and other.backend == "aten" and torch.equal(other(x), layer(x))
    )
