"""Two gloo processes: DDP, FSDP2 and DTensor give converted models and convolutions the gradients
of one process.

They see no GPU, which two of them could not share, and interpret the kernels.
"""

import copy
import importlib.util
import warnings

import models
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tridil import convert, dilated_conv2d, revert

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo"
)
BUILD = {
    "head": (models.head, (4, 4, 6, 7)),
    "tcn": (lambda: models.TCN(3, (4, 4), taps=2), (4, 3, 11)),
}
BACKENDS = [
    "aten",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
    ),
]


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def step(model, x):
    """Gradients by name."""
    model.zero_grad()
    model(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank, how, backend, path, seed):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    try:
        for name, (build, shape) in BUILD.items():
            torch.manual_seed(seed)
            plain, x = build(), torch.randn(shape)
            for order in (
                ("convert first", "convert last")
                if how == "ddp" and backend == "aten"
                else ("convert first",)
            ):
                model = copy.deepcopy(plain)
                if order == "convert last":
                    model = DistributedDataParallel(model)
                assert convert(model, backend=backend).replaced
                if order == "convert first":
                    model = shard(model) if how == "fsdp" else DistributedDataParallel(model)
                got, expected = step(model, x.chunk(2)[rank]), step(plain, x)
                assert got.keys() == expected.keys()
                for key, grad in got.items():
                    grad = grad.full_tensor() if how == "fsdp" else grad
                    torch.testing.assert_close(
                        grad, expected[key], msg=lambda m, where=(name, order, key): f"{where}: {m}"
                    )
            if how == "fsdp" and name == "head":
                with pytest.raises(
                    ValueError, match="convs.1.0 is a FSDPDilatedConv2d: revert before"
                ):
                    revert(model)
    finally:
        distributed.destroy_process_group()


def shard(model):
    """Every layer with parameters on its own, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            fully_shard(module)
    return fully_shard(model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(how, backend, tmp_path, seed):
    multiprocessing.spawn(worker, (how, backend, tmp_path / "rendezvous", seed), nprocs=2)


def dtensor_worker(rank, path, seed):
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(seed)
        # 2 and 1 images
        x, w, bias = (
            torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 2, 4), (2, 2, 1, 2), (2,))
        )
        for some, geometry in (
            ((x, w, bias), (1, (0, 2), 2)),
            ((x, w, bias), ((1, 2), 0, 1)),
            ((x, w), (1, (0, 2), 2)),
        ):
            results = []
            for placement in (None, Shard(0), Replicate()):
                leaves = [
                    t.clone()
                    if placement is None
                    else distribute_tensor(t, mesh, [Replicate() if i else placement])
                    for i, t in enumerate(some)
                ]
                y = dilated_conv2d(
                    *(t.requires_grad_() for t in leaves),
                    *[None] * (3 - len(leaves)),
                    *geometry,
                    backend="triton",
                )
                grads = torch.autograd.grad(y.square().sum(), leaves)
                if placement is not None:
                    summed = (Partial() if placement.is_shard() else placement,)
                    assert y.placements == grads[0].placements == (placement,) and all(
                        g.placements == summed for g in grads[1:]
                    )
                    assert y.to_local().shape[0] == (2 - rank if placement.is_shard() else 3)
                results.append(
                    [t.full_tensor() if isinstance(t, DTensor) else t for t in (y.detach(), *grads)]
                )
            for got in results[1:]:
                torch.testing.assert_close(got, results[0])
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_dtensors_that_are_sharded_by_images(backend, tmp_path, seed):
    multiprocessing.spawn(dtensor_worker, (tmp_path / "rendezvous", seed), nprocs=2)
