"""Rows of whole networks: time and peak memory of a step on a GPU; without one, the work of the
layers that tridil.convert replaces."""

from __future__ import annotations

import os
from unittest import mock

import torch
from layers import FORMATS, attempt, tiles
from models import MODELS
from providers import cudnn_search, precision_of, provider

import tridil
from tridil import cost_model
from tridil.problem import PASSES

STEPS = ("inference", "training")


def _step(model, x, dtype, training: bool):
    """A function that runs one step: forward under no_grad, or forward, backward and SGD; 16-bit
    types through autocast."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def forward():
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model(x)

    def step():
        if not training:
            with torch.no_grad():
                return forward()
        optimizer.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()
        optimizer.step()
        return None

    return step


def _built(name: str, device, layout: str, dtype=torch.float32):
    """(model, input), always of the same seed."""
    build, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(0)
        model, x = build(), torch.randn(shape)
    if x.dim() == 4:
        model, x = (
            model.to(memory_format=FORMATS[layout]),
            x.contiguous(memory_format=FORMATS[layout]),
        )
    return model.to(device, dtype), x.to(device, dtype)


def gpu_rows(gpu, pending):
    """Measured rows."""
    for row in pending:
        yield attempt(row, lambda: _on_gpu(gpu, row))


def _on_gpu(gpu, row):
    runs, dtype, training = (
        provider(row["provider"]),
        getattr(torch, row["dtype"]),
        row["pass"] == "training",
    )
    # one setting for all: most layers are cuDNN's whoever runs the dilated ones. First-use tuning
    # is off: what was measured before is used
    with cudnn_search(), runs.setting(), mock.patch.dict(os.environ, TRIDIL_TUNE="0"):
        found = {}
        model, x = _built(row["model"], gpu.device, runs.layout)
        # the outputs of the network as it is, in fp32 and in its dtype
        if not training:
            model.eval()
            found = _checked(
                runs.model(_built(row["model"], gpu.device, runs.layout)[0].eval()), model, x, dtype
            )
        model = runs.model(model)
        step = _step(model, x, dtype, training)
        step()
        return (
            found | gpu.times([step]) | gpu.state() | dict(extra_mib=gpu.extra_bytes(step) / 2**20)
        )


def _checked(model, plain, x, dtype) -> dict:
    """The largest difference of the outputs to those of the plain network in fp32; four times that
    of the plain network in `dtype` is allowed, and 2**-10 of their root mean square."""
    cudnn = torch.backends.cudnn.conv
    before, cudnn.fp32_precision = cudnn.fp32_precision, "ieee"
    try:
        exact = _step(plain, x, torch.float32, False)().float()
    finally:
        cudnn.fp32_precision = before
    error, own = (
        (_step(m, x, dtype, False)().float() - exact).abs().max().item() for m in (model, plain)
    )
    return dict(
        error=error,
        budget=4 * own + 2**-10 * exact.square().mean().sqrt().item(),
        checked_on=f"output {tuple(exact.shape)}",
    )


def counted_rows(pending, device):
    """Rows without times: multiply-accumulates, and predicted time, of the layers that tridil
    replaces; counted on meta tensors."""
    for row in pending:
        yield attempt(row, lambda: _counted(row, device))


def _counted(row, device):
    model, x = _built(row["model"], "meta", "nhwc", dtype=getattr(torch, row["dtype"]))
    layers = {
        problem: count
        for problem, count in tridil.scan(model, x).items()
        if max(problem.dilation) > 1
    }
    totals = dict.fromkeys(
        ("dense_macs", "useful_macs", "executed_macs", "predicted_ms", "roof_ms"), 0
    )
    for problem, count in layers.items():
        for pass_ in PASSES if row["pass"] == "training" else PASSES[:1]:
            precision = precision_of(problem)
            config = cost_model.best(problem, pass_, device.target, precision)
            one = tiles(problem, pass_, config, device, precision) | dict(
                dense_macs=problem.dense_macs,
                useful_macs=problem.useful_macs,
                roof_ms=1e3 * cost_model.roof(problem, device, precision),
            )
            totals = {name: total + count * one[name] for name, total in totals.items()}
    return totals | dict(checked_on=f"{sum(layers.values())} dilated layers, counted")
