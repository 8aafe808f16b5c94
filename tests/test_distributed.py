"""Two gloo processes on the CPU: DDP and FSDP2 give converted models the gradients of one process."""
import copy
import warnings

import models
import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tridil import convert, revert

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="no gloo")
BUILD = {"head": (models.head, (4, 4, 6, 7)), "tcn": (lambda: models.TCN(3, (4, 4), taps=2), (4, 3, 11))}


def step(model, x):
    """Gradients by name."""
    model.zero_grad()
    model(x).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def worker(rank, how, path, seed):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    try:
        for name, (build, shape) in BUILD.items():
            torch.manual_seed(seed)
            plain, x = build(), torch.randn(shape)
            for order in ("convert first", "convert last") if how == "ddp" else ("convert first",):
                model = copy.deepcopy(plain)
                if order == "convert last":
                    model = DistributedDataParallel(model)
                assert convert(model, backend="aten").replaced
                if order == "convert first":
                    model = shard(model) if how == "fsdp" else DistributedDataParallel(model)
                got, expected = step(model, x.chunk(2)[rank]), step(plain, x)
                assert got.keys() == expected.keys()
                for key, grad in got.items():
                    grad = grad.full_tensor() if how == "fsdp" else grad
                    torch.testing.assert_close(grad, expected[key], msg=lambda m, where=(name, order, key): f"{where}: {m}")
            if how == "fsdp" and name == "head":
                with pytest.raises(ValueError, match="convs.1.0 is a FSDPDilatedConv2d: revert before"):
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


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(how, tmp_path, seed):
    multiprocessing.spawn(worker, (how, tmp_path / "rendezvous", seed), nprocs=2)
