"""Rows of single layers: timed on a GPU; without one, interpreted on a reduced copy and compiled
for the target."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby

import torch
from providers import Gpu, precision_of, provider

from tridil import choice, cost_model, reference, testing
from tridil import config as cfg
from tridil.clock import turns
from tridil.families import Config
from tridil.problem import Problem

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
LAYERS_AHEAD = 8  # whose kernels are compiled together


def attempt(row: dict, measure) -> dict:
    """The row with what `measure()` found, or with its failure."""
    try:
        return row | measure()
    # one row that fails must not end the sweep: it says why
    except Exception as e:
        return row | {"failure": f"{type(e).__name__}: {e}".replace("\n", " ")[:300]}


def sizes(problem: Problem) -> dict:
    """The columns that describe a convolution."""
    p = problem
    return dict(
        problem=p.key(),
        n=p.n,
        c=p.c,
        h=p.h,
        w=p.w,
        k=p.k,
        r=p.r,
        s=p.s,
        stride=max(p.stride),
        dilation=max(p.dilation),
        groups=p.groups,
        dense_macs=p.dense_macs,
        useful_macs=p.useful_macs,
    )


def part_of(problem: Problem, pass_: str, limit: int = 2**32):
    """(part, slices of both operands, slices of the result) whose float64 reference takes about
    `limit` bytes: leading images; wgrad: channels."""
    (top, bottom), (left, right) = problem.padding
    per_image = 32 * (
        problem.c * (problem.h + top + bottom) * (problem.w + left + right)
        + problem.k * problem.p * problem.q
    )
    if pass_ != "wgrad":
        n = min(problem.n, max(1, limit // per_image))
        return replace(problem, n=n), ((slice(n),), (slice(None),)), (slice(n),)
    pieces = -(-problem.n * per_image // limit)
    groups = max(1, problem.groups // pieces)
    c, k = (
        max(1, size * groups // problem.groups // (pieces if problem.groups == 1 else 1))
        for size in (problem.c, problem.k)
    )
    return (
        replace(problem, c=c, k=k, groups=groups),
        ((slice(None), slice(k)), (slice(None), slice(c))),
        (slice(k), slice(c // groups)),
    )


def gpu_rows(gpu: Gpu, pending, device):
    """Measured rows: pending is a list of (workload, row); the tensors and float64 references of a
    layer are made once. Kernels are compiled some layers at a time, not during the measurements:
    those see the host, too."""
    left = set()
    for i, (workload, jobs) in enumerate(groupby(pending, key=lambda job: job[0])):
        if workload not in left:
            left = set(list(dict.fromkeys(w for w, _ in pending))[i : i + LAYERS_AHEAD])
            _compile(gpu, [job for job in pending if job[0] in left], device)
        tensors = testing.random_tensors(workload.problem, gpu.device)
        for pass_, rows in groupby((row for _, row in jobs), key=lambda row: row["pass"]):
            expected = []
            for row in rows:
                yield attempt(
                    row,
                    lambda: _on_gpu(gpu, workload.problem, pass_, tensors, expected, row, device),
                )


def _compile(gpu, pending, device):
    chosen = [(row["pass"], *_chosen(gpu, w.problem, row)) for w, row in pending]
    jobs = [
        (problem, pass_, precision, config)
        for pass_, problem, precision, config in chosen
        if config
    ]
    with gpu.compiling(jobs, device.target) as compiled:
        for job in jobs:
            compiled(*job)


def _chosen(gpu, problem: Problem, row: dict):
    """(problem in the provider's layout, precision, tridil's config or None)."""
    problem, precision = (
        replace(problem, layout=provider(row["provider"]).layout),
        precision_of(problem),
    )
    if not row["provider"].startswith("tridil"):
        return problem, precision, None
    return (
        problem,
        precision,
        choice.decide(
            problem, row["pass"], row["target"], precision, torch.device(gpu.device)
        ).config,
    )


def _on_gpu(gpu, problem, pass_, tensors, expected, row, device):
    x, w, _, dy = tensors
    operands = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    part, cuts, result_cut = part_of(problem, pass_)
    if not expected:
        expected.append(
            getattr(reference, pass_)(part, *(t[cut] for t, cut in zip(operands, cuts)))
        )
    runs = provider(row["provider"])
    problem, precision, config = _chosen(gpu, problem, row)
    operands = [t.contiguous(memory_format=FORMATS[runs.layout]) for t in operands]
    with runs.setting():
        calls = [
            runs.make(problem, pass_, *(t.clone() if i else t for t in operands), config)
            for i in range(turns(problem.bytes, gpu.l2_bytes))
        ]
        result = calls[0]()
        error, budget = testing.check(result[result_cut], expected[0], part, pass_, precision)
        same = torch.equal(result, calls[0]())
        del result
        found = gpu.times(calls)
        ms = found["ms"]
        found |= dict(
            **gpu.state(),
            tflops_dense=2e-9 * problem.dense_macs / ms,
            tflops_useful=2e-9 * problem.useful_macs / ms,
            gb_s=1e-6 * problem.bytes / ms,
            extra_mib=gpu.extra_bytes(calls[0]) / 2**20,
            bit_identical=same,
            error=error,
            budget=budget,
            checked_on=part.key(),
        )
    return found | (tiles(problem, pass_, config, device, precision) if config else {})


def tiles(problem, pass_, config, device, precision):
    """What is counted from a config."""
    moved, requested = cfg.moved_bytes(problem, pass_, config)
    return dict(
        config=f"{config.kernel} {cfg.describe(config)}",
        executed_macs=cfg.executed_macs(problem, pass_, config),
        compulsory_bytes=problem.bytes,
        moved_bytes=moved,
        requested_bytes=requested,
        predicted_ms=1e3 * cost_model.predict(problem, pass_, config, device, precision).seconds,
    )


def reduced(
    problem: Problem, config: Config | None, pixels: int | None = None
) -> tuple[Problem, dict]:
    """A copy of a layer, and of its config, for the interpreter: same filter, stride, padding,
    dilation and pixel box.

    Channels of a group beyond 32 become 32 plus the remainder mod 32, tiles of them at most 32; at
    most 8 splits, 2 groups (depthwise stays depthwise) and 2 images; maps of more than `pixels`
    (2048, depthwise 256) are halved, down to the filter's extent.
    """
    pixels = pixels or (256 if problem.groups == problem.c else 2048)
    groups = min(problem.groups, 2)
    c, k = (
        size if size <= 32 else 32 + size % 32
        for size in (problem.c // problem.groups, problem.k // problem.groups)
    )
    sides, extents = (
        [problem.h, problem.w],
        [d * (t - 1) + 1 for d, t in zip(problem.dilation, (problem.r, problem.s))],
    )
    while sides[0] * sides[1] > pixels and (axes := [i for i in (0, 1) if sides[i] > extents[i]]):
        i = max(axes, key=sides.__getitem__)
        sides[i] = max(extents[i], -(-sides[i] // 2))
    n = min(problem.n, 2 if 2 * sides[0] * sides[1] <= pixels else 1)
    most = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT_K": 8}
    tiles = {
        name: min(getattr(config, name), size)
        for name, size in most.items()
        if config and hasattr(config, name)
    }
    return replace(
        problem, n=n, c=c * groups, k=k * groups, groups=groups, h=sides[0], w=sides[1]
    ), config and replace(config, **tiles)


def cpu_rows(pending, device):
    """Rows without times: a worker compiles the kernels of the real layer while this process
    interprets them on a reduced copy."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _compiling_worker)
    try:
        compiled = [
            pool.submit(_resources, w.problem, row["pass"], row["target"], precision_of(w.problem))
            for w, row in pending
        ]
        for (workload, row), future in zip(pending, compiled):
            yield attempt(
                row, lambda: _interpreted(workload.problem, row["pass"], device) | future.result()
            )
    finally:
        pool.shutdown(cancel_futures=True)


def _compiling_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # before triton is imported: interpreted kernels cannot be compiled
    os.environ.pop("TRITON_INTERPRET", None)


def _resources(problem, pass_, target, precision):
    from tridil.aot import resources

    rows = resources(
        problem, pass_, cost_model.best(problem, pass_, target, precision), target, precision
    )
    mma = dict.fromkeys(row["mma"] for row in rows if row["mma"] != "none")
    return dict(
        kernels="+".join(dict.fromkeys(row["kernel"] for row in rows)),
        registers=max(row["registers"] for row in rows),
        spills=sum(row["spills"] for row in rows),
        shared_bytes=max(row["shared_bytes"] for row in rows),
        mma="+".join(mma) or "none",
        overhead=rows[0]["overhead"],
    )


def _interpreted(problem, pass_, device):
    from tridil import launch

    precision = precision_of(problem)
    config = cost_model.best(problem, pass_, device.target, precision)
    part, part_config = reduced(problem, config)
    x, w, bias, dy = testing.random_tensors(part)
    operands = {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    result = getattr(launch, pass_)(part, *operands, part_config)
    error, budget = testing.check(result, getattr(reference, pass_)(part, *operands), part, pass_)
    found = choice.decide(problem, pass_, device.target, precision)
    auto = found.prediction.seconds if found.backend == "triton" else found.cudnn
    return dict(
        error=error,
        budget=budget,
        checked_on=part.key(),
        auto=found.backend,
        cudnn_ms=1e3 * found.cudnn,
        gain=found.cudnn / auto,
    ) | tiles(problem, pass_, config, device, precision)
