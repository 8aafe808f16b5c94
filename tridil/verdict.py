"""What runs for a convolution, and why: rows, and text for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from . import choice, cost_model, drivers
from . import config as cfg
from .functional import problem_of_tensors
from .problem import PASSES, Problem


def rows_of(
    problem: Problem, device, backend: str = "auto", target: str | None = None
) -> list[dict]:
    """What runs for each pass, and why: rows with pass, backend, why, kernel, kernel_why, config,
    source of the config, dense/useful/executed MACs, ms (measured, or None), predicted_ms, copies_ms
    (of contiguous tensors, in it) and limiter of the cost model, cudnn_ms (estimated; measured where there is a measurement of ATen).

    MACs are counts, not times. Where ATen runs, kernel and config are what Triton would run. With
    target (like "cuda:90") the answer is for a GPU of that target, whatever the device.
    """
    if target:
        # of the GPU that stands for the target
        aim, device, chosen = target, None, "aten" if drivers.unfit(problem) else "triton"
    else:
        aim, chosen = drivers.target(), drivers.choose(problem, device, backend)
    variable = os.environ.get("TRIDIL_BACKEND", "auto") if backend == "auto" else backend
    spec, _ = choice.device_spec(aim, device)
    rows = []
    for pass_ in PASSES:
        precision = drivers.fp32_precision(aim) if problem.dtype == "float32" else "ieee"
        found = choice.decide(problem, pass_, aim, precision, device)
        if problem.is_empty:
            runs, why = (
                "aten",
                f"there is nothing to multiply: n={problem.n}, c={problem.c}, {problem.h}x{problem.w}",
            )
        elif variable != "auto":
            runs, why = variable, "asked for" if backend != "auto" else f"TRIDIL_BACKEND={variable}"
        elif chosen == "aten":
            runs, why = (
                "aten",
                drivers.can_run(problem, device)
                or drivers.too_old(device.type, device.index)
                or "CPU tensors run through ATen",
            )
        else:
            runs, why = found.backend, found.why
        record, config = found.record or {}, found.config
        rows.append(
            {
                "pass": pass_,
                "backend": runs,
                "why": why,
                "kernel": config.kernel,
                "kernel_why": cost_model.why(problem, pass_, config, spec, precision),
                "config": cfg.describe(config),
                "source": found.source,
                "dense_macs": problem.dense_macs,
                "useful_macs": problem.useful_macs,
                "executed_macs": cfg.executed_macs(problem, pass_, config),
                "ms": record.get("ms"),
                "predicted_ms": 1e3 * found.prediction.seconds,
                "copies_ms": 1e3 * found.prediction.parts.get(cost_model.COPIES, 0.0),
                "limiter": found.prediction.limiter,
                "cudnn_ms": (choice.aten_ms(record) or (1e3 * found.cudnn,))[0],
                "roof_ms": 1e3 * cost_model.roof(problem, spec, precision),
            }
        )
    return rows


def text_of(
    problem: Problem,
    device,
    backend: str = "auto",
    target: str | None = None,
    rows: list[dict] | None = None,
) -> str:
    """`rows_of`, or the rows that it gave, as people read them."""
    rows = rows_of(problem, device, backend, target) if rows is None else rows
    where = f"target {target}" if target else f"tensors on {device}, target {drivers.target()}"
    if not target and drivers.is_assumed():
        where += " (assumed: there is no GPU here)"
    lines = [f"{problem.key()} -> {problem.p}x{problem.q}, {where}"]
    reasons = {(row["backend"], row["why"]) for row in rows}
    if len(reasons) == 1:
        lines[0] += f"\nall passes: {rows[0]['backend']} ({rows[0]['why']})"
    library = choice.library(target or drivers.target())
    for row in rows:
        macs = ", ".join(
            f"{name} {macs_text(row[name + '_macs'])}" for name in ("dense", "useful", "executed")
        )
        times = [
            f"{row['predicted_ms']:.4g} ms predicted (limited by {row['limiter']})",
            f"{row['roof_ms']:.4g} ms roof",
            f"{library} {row['cudnn_ms']:.4g} ms {'estimated' if row['ms'] is None else 'measured'}",
        ]
        if row["copies_ms"]:
            times[0] += f", of which {row['copies_ms']:.4g} ms are copies that channels_last saves"
        if row["ms"] is not None:
            times.insert(0, f"{row['ms']:.4g} ms measured")
        told = f" ({row['why']})" if len(reasons) > 1 else ""
        lines.append(
            f"{row['pass']}: {row['backend']}{told}\n  kernel {row['kernel']} ({row['kernel_why']}): {row['config']}\n"
            f"  config from: {row['source']}\n  MACs (counted): {macs}\n  kernels: {', '.join(times)}"
        )
    return "\n".join(lines)


def macs_text(count: int) -> str:
    """A number of multiply-accumulates as people read it."""
    for unit, name in ((1e9, "GMACs"), (1e6, "MMACs"), (1e3, "kMACs")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} MACs"


def explain(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> list[dict[str, Any]]:
    """Prints what `dilated_conv2d` runs for these arguments, and why: for each pass the backend,
    the kernel, its config and where that came from, dense, useful and executed
    multiply-accumulates, the measured or predicted time and what limits it. Returns the rows of
    `rows_of`.
    """
    problem = problem_of_tensors(input, weight, bias, stride, padding, dilation, groups)
    rows = rows_of(problem, input.device, backend)
    print(text_of(problem, input.device, backend, rows=rows))
    return rows
