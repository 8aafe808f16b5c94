"""PyTorch's own conv2d samples and nn.Conv2d cases, through both backends."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tridil import DilatedConv2d, dilated_conv2d

# they need expecttest, which extra [test] brings
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
module_db = pytest.importorskip("torch.testing._internal.common_modules").module_db

# those imports forbid setting torch.backends flags in the whole process: allow it again
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

(OP,) = (op for op in op_db if op.name == "nn.functional.conv2d")
(MODULE,) = (info for info in module_db if info.module_cls is nn.Conv2d)
DTYPES = [torch.float32, torch.float64]
pytestmark = pytest.mark.usefixtures("poisoned")


def close(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    # sums of up to a few hundred products of magnitudes up to 81 that cancel
    tolerance = 1e-3 if got.dtype == torch.float32 else 1e-10
    scale = max(1.0, expected.detach().abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


def gradients(y, tensors):
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    return (
        torch.autograd.grad(
            (
                y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
            ).sum(),
            wanted,
        )
        if wanted
        else ()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype, backend, device):
    count = 0
    for sample in OP.sample_inputs(device, dtype, requires_grad=True):
        tensors = (sample.input, *sample.args[:2])
        expected = F.conv2d(sample.input, *sample.args, **sample.kwargs)
        got = dilated_conv2d(sample.input, *sample.args, **sample.kwargs, backend=backend)
        close(got, expected)
        assert got.stride() == expected.stride()
        for a, b in zip(gradients(got, tensors), gradients(expected, tensors), strict=True):
            close(a, b)
        count += 1
    assert count >= 10


def test_samples_that_must_raise(backend, device):
    count = 0
    for sample in OP.error_inputs(device):
        arguments = sample.sample_input
        with pytest.raises((ValueError, TypeError)):
            dilated_conv2d(arguments.input, *arguments.args, **arguments.kwargs, backend=backend)
        count += 1
    assert count >= 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_module_cases(dtype, training, backend, device):
    """Constructor, forward (batched and not, every padding and padding mode), and the case's own
    reference where it has one."""
    count = 0
    for case in MODULE.module_inputs_func(
        MODULE, device=device, dtype=dtype, requires_grad=True, training=training
    ):
        build, call = case.constructor_input, case.forward_input
        kwargs = dict(build.kwargs) | dict(device=device, dtype=dtype)
        plain, ours = (
            nn.Conv2d(*build.args, **kwargs).train(training),
            DilatedConv2d(*build.args, **kwargs, backend=backend).train(training),
        )
        ours.load_state_dict(plain.state_dict())
        expected, got = plain(*call.args, **call.kwargs), ours(*call.args, **call.kwargs)
        close(got, expected)
        if case.reference_fn is not None:
            close(got, case.reference_fn(ours, *call.args, **call.kwargs))
        for a, b in zip(
            gradients(got, (*call.args, *ours.parameters())),
            gradients(expected, (*call.args, *plain.parameters())),
            strict=True,
        ):
            close(a, b)
        count += 1
    assert count >= 4
