"""What runs for a convolution, and why: rows, and text for people."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import choice, cost_model, drivers, private
from . import config as cfg
from .branches import Branches
from .convert import scan
from .functional import problem_of_tensors
from .problem import DTYPE_BYTES, PASSES, Problem


def rows_of(
    problem: Problem,
    device: torch.device | None,
    backend: str = "auto",
    target: str | None = None,
) -> list[dict[str, Any]]:
    """What runs for each pass, and why: rows with pass, backend, why, kernel, kernel_why, config,
    source of the config, dense/useful/executed MACs, ms (measured, or None), predicted_ms, copies_ms
    (of contiguous tensors, in it) and limiter of the cost model, cudnn_ms (estimated; measured where there is a measurement of ATen).

    MACs are counts, not times. Where ATen runs, kernel and config are what Triton would run. With
    target (like "cuda:90") the answer is for a GPU of that target, whatever the device.
    """
    if problem.dtype not in DTYPE_BYTES:
        raise ValueError(
            f"{problem.dtype} convolutions run through ATen, and nothing is predicted of them: dtypes of the kernels are {', '.join(DTYPE_BYTES)}"
        )
    if target:
        # of the GPU that stands for the target
        aim, device, chosen = target, None, "aten" if drivers.unfit(problem) else "triton"
    else:
        aim, chosen = drivers.target(), drivers.choose(problem, device, backend)  # type: ignore[arg-type]
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
                drivers.can_run(problem, device)  # type: ignore[arg-type]
                or drivers.too_old(device.type, device.index)  # type: ignore[union-attr]
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
    device: torch.device | None,
    backend: str = "auto",
    target: str | None = None,
    rows: list[dict[str, Any]] | None = None,
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


# ---- whole models
def counts_of(model: nn.Module, *inputs: Any, **kwargs: Any) -> Counter[Problem]:
    """`scan` of a model on the meta device, where nothing is computed; as it is where that does not
    work."""

    def meta(t):
        return t.to("meta") if isinstance(t, torch.Tensor) else t

    state = {name: meta(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        return scan(
            lambda *args, **kw: torch.func.functional_call(model, state, args, kw),
            *private.tree_map(meta, inputs),
            **private.tree_map(meta, kwargs),
        )
    # a model may make tensors of its own on a device, or look at values
    except Exception:
        return scan(model, *inputs, **kwargs)


def verdict_of(
    counts: Mapping[Problem, int],
    device: torch.device | None = None,
    target: str | None = None,
) -> dict[str, Any]:
    """What a model gains whose convolutions are these, each so often in a step.

    rows: of each dilated convolution problem, count, share (of the dense multiply-accumulates of all
    convolutions), per pass the backend that "auto" takes and why, kernels_ms, aten_ms and auto_ms of
    all passes and all calls, label of the times ("measured", "predicted" where a part of them is).
    share, gain and step_gain of the model: ATen's time over auto's, of the dilated convolutions, and
    of all convolutions (others run through ATen); None where there is nothing dilated. undilated:
    rows of depthwise layers of dilation 1 that auto would run through the kernels. advice: what to do
    next, sentences.
    """
    aim = target or drivers.target()
    device = None if target else device
    total = sum(count * problem.dense_macs for problem, count in counts.items())
    rows, undilated, others = [], [], 0.0
    for problem, count in counts.items():
        taps = problem.r * problem.s
        row = _row_of(problem, count, total, aim, device)
        if max(problem.dilation) > 1:
            rows.append(row)
            continue
        others += row["aten_ms"]
        depthwise = problem.groups == problem.c > 1 and taps > 1
        if depthwise and row["gain"] > 1 and "triton" in row["backends"].values():
            undilated.append(row)
    rows.sort(key=lambda row: -row["aten_ms"])
    aten, auto = (sum(row[name] for row in rows) for name in ("aten_ms", "auto_ms"))
    labels = {row["label"] for row in rows}
    found = dict(
        target=aim,
        rows=rows,
        undilated=undilated,
        share=sum(row["share"] for row in rows),
        gain=aten / auto if rows else None,
        step_gain=(aten + others) / (auto + others) if rows else None,
        label="predicted" if labels != {"measured"} else "measured",
    )
    return found | {"advice": _advice(found, aim)}


def _row_of(problem: Problem, count: int, total: int, aim: str, device) -> dict[str, Any]:
    precision = drivers.fp32_precision(aim) if problem.dtype == "float32" else "ieee"
    row: dict[str, Any] = dict(
        problem=problem,
        count=count,
        share=count * problem.dense_macs / max(total, 1),
        backends={},
        why={},
        kernels_ms=0.0,
        aten_ms=0.0,
        auto_ms=0.0,
        copies_ms=0.0,
        label="measured",
    )
    unfit = drivers.unfit(problem)
    for pass_ in PASSES:
        found = choice.decide(problem, pass_, aim, precision, device)
        record = found.record or {}
        aten = choice.aten_ms(record)
        kernels = record.get("ms", 1e3 * found.prediction.seconds)
        aten_ms = aten[0] if aten else 1e3 * found.cudnn
        backend = "aten" if unfit else found.backend
        row["backends"][pass_], row["why"][pass_] = backend, unfit or found.why
        row["kernels_ms"] += count * kernels
        row["aten_ms"] += count * aten_ms
        row["auto_ms"] += count * (kernels if backend == "triton" else aten_ms)
        if backend == "triton" and not record:
            row["copies_ms"] += 1e3 * count * found.prediction.parts.get(cost_model.COPIES, 0.0)
        if not record or not aten:
            row["label"] = "predicted"
    return row | {"gain": row["aten_ms"] / row["auto_ms"] if row["auto_ms"] else 1.0}


def _advice(found: dict[str, Any], aim: str) -> list[str]:
    rows, told = found["rows"], []
    if not rows:
        told.append("nothing here is dilated: nothing to convert")
    elif not any("triton" in row["backends"].values() for row in rows):
        told.append(f"nothing to gain: every pass stays with {choice.library(aim)}")
    copies = sum(row["copies_ms"] for row in rows)
    if copies:
        told.append(
            f"make the model and its input channels_last: that saves {copies:.4g} ms of copies a step"
        )
    elif any(row["problem"].layout == "nchw" and row["problem"].h > 1 for row in rows):
        told.append("make the model and its input channels_last, and ask again")
    if rows and found["label"] == "predicted":
        told.append("these times are predicted; tridil.tune(model, *inputs) measures them on a GPU")
    if found["undilated"]:
        gain = sum(row["aten_ms"] - row["auto_ms"] for row in found["undilated"])
        told.append(
            f"{sum(row['count'] for row in found['undilated'])} depthwise layers of dilation 1 are predicted to gain {gain:.4g} ms, too: "
            "convert(model, min_dilation=1, predicate=lambda name, layer: layer.groups > 1)"
        )
    return told


def verdict_text(found: dict[str, Any]) -> str:
    """`verdict_of` as people read it."""
    library = choice.library(found["target"])
    head = ("layer", "times", "MACs", *PASSES, "kernels ms", f"{library} ms", "auto ms", "gain", "")
    lines = [head]
    for row in found["rows"]:
        kernels = {"triton": "kernels", "aten": library}
        lines.append(
            (
                geometry(row["problem"]),
                str(row["count"]),
                f"{row['share']:.1%}",
                *(kernels[row["backends"][pass_]] for pass_ in PASSES),
                f"{row['kernels_ms']:.4g}",
                f"{row['aten_ms']:.4g}",
                f"{row['auto_ms']:.4g}",
                f"{row['gain']:.2f}x",
                row["label"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in lines
        if found["rows"]
    ]
    if found["rows"]:
        text.append(
            f"\n{len(found['rows'])} kinds of dilated layers, {found['share']:.1%} of the multiply-accumulates of all convolutions, "
            f"target {found['target']}, forward and backward:\n"
            f"  these layers run {found['gain']:.2f} times as fast as with {library} alone, {found['label']}"
            f"{'' if found['label'] == 'measured' else f' ({library} estimated)'}\n"
            f"  all convolutions {found['step_gain']:.2f} times; what is no convolution is not counted"
        )
    return "\n".join([*text, *(f"- {sentence}" for sentence in found["advice"])])


def geometry(problem: Problem) -> str:
    """A layer in a few words: `n4 c2048 60x60 k256 3x3 d12`."""

    def pair(a, b):
        return f"{a}" if a == b else f"{a},{b}"

    rest = [f"d{pair(*problem.dilation)}"] if max(problem.dilation) > 1 else []
    rest += [f"s{pair(*problem.stride)}"] if max(problem.stride) > 1 else []
    rest += [f"g{problem.groups}"] if problem.groups > 1 else []
    return (
        f"n{problem.n} c{problem.c} {problem.h}x{problem.w} k{problem.k} {problem.r}x{problem.s} "
        + " ".join([*rest, problem.dtype, problem.layout])
    )


# ---- parallel branches
def branch_rows(
    branches: Branches, device: torch.device | None = None, target: str | None = None
) -> list[dict[str, Any]]:
    """What "auto" does with parallel branches: rows with pass, together (whether one launch runs
    them), why, kernel and config (None where no launch can), ms and apart_ms (measured, or None),
    predicted_ms and predicted_apart_ms."""
    aim, rows = target or drivers.target(), []
    device = None if target else device
    precision = drivers.fp32_precision(aim) if branches.first.dtype == "float32" else "ieee"
    _, name = choice.device_spec(aim, device)
    for pass_ in PASSES:
        config, together, apart = choice.decide_branches(branches, pass_, aim, precision, device)
        measured = choice.measured_branches(branches, pass_, aim, precision, name)
        record = measured[1] if measured else {}
        config = measured[0] if measured else config
        if config is None:
            why = branches.apart(pass_) or "no kernel joins them"
        elif record:
            why = (
                f"measured: {record['ms']:.4g} ms together, {record['apart_ms']:.4g} ms one by one"
            )
        else:
            why = f"predicted: {1e3 * together:.4g} ms together, {1e3 * apart:.4g} ms one by one"
        joined = choice.resolve_branches(branches, pass_, aim, precision, device, True)
        rows.append(
            {
                "pass": pass_,
                "together": joined is not None,
                "why": why,
                "kernel": config and config.kernel,
                "config": config and cfg.describe(config),
                "ms": record.get("ms"),
                "apart_ms": record.get("apart_ms"),
                "predicted_ms": 1e3 * together if config else None,
                "predicted_apart_ms": 1e3 * apart,
            }
        )
    return rows


def branch_text(branches: Branches, rows: list[dict[str, Any]], aim: str) -> str:
    """`branch_rows` as people read them."""
    lines = [f"{branches.key()}, target {aim}"]
    for row in rows:
        kernel = f"; kernel {row['kernel']}: {row['config']}" if row["kernel"] else ""
        how = "together" if row["together"] else "one by one"
        lines.append(f"{row['pass']}: {how} ({row['why']}){kernel}")
    return "\n".join(lines)


def explain(
    subject: torch.Tensor | Problem | Branches | Mapping[Problem, int] | nn.Module,
    *args: Any,
    backend: str = "auto",
    target: str | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]] | dict[str, Any]:
    """Prints what runs, and why, and what it gains.

    explain(input, weight, bias=None, stride=1, ...), the arguments of `dilated_conv2d`, or
    explain(problem): for each pass the backend, the kernel, its config and where that came from,
    dense, useful and executed multiply-accumulates, the measured or predicted time and what limits
    it; returns the rows of `rows_of`.

    explain(model, *inputs), or explain(counts) with what `scan` gives: for each dilated layer, and in
    sum, its share of the multiply-accumulates, the backend that "auto" takes for each pass, the times
    of the kernels and of ATen, the gain, and what to do next; returns `verdict_of`. The model is
    traced on the meta device where it can be: nothing is computed, and no weight is changed.

    explain(branches), of `tridil.branches.Branches`: whether one launch runs them, and why; returns
    `branch_rows`.

    target, like "cuda:90": the answer for a GPU of that kind, whatever is here; without it and
    without a GPU it is for the one that `info` names. Raises TypeError for another subject, ValueError
    for a target that nothing can be compiled for.
    """
    if target is not None:
        drivers.check_target(target)
    if isinstance(subject, nn.Module) or isinstance(subject, Mapping):
        counts: Mapping[Problem, int] = (
            counts_of(subject, *args, **kwargs) if isinstance(subject, nn.Module) else subject
        )
        if not all(isinstance(p, Problem) and isinstance(n, int) for p, n in counts.items()):
            raise TypeError(
                f"counts must map Problems to how often each runs, as tridil.scan gives, got {dict(counts)!r:.100}"
            )
        device = torch.device("cuda") if torch.cuda.is_available() else None
        found = verdict_of(counts, device, target)
        print(verdict_text(found))
        return found
    if isinstance(subject, torch.Tensor):
        problem, device = problem_of_tensors(subject, *args, **kwargs), subject.device
    elif isinstance(subject, Branches):
        device = torch.device("cuda") if torch.cuda.is_available() else None
        found_rows = branch_rows(subject, device, target)
        print(branch_text(subject, found_rows, target or drivers.target()))
        return found_rows
    elif isinstance(subject, Problem):
        problem = subject
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = target or (None if torch.cuda.is_available() else drivers.target())
    else:
        raise TypeError(
            f"explain takes a tensor and what dilated_conv2d takes, a Problem, Branches, a model or what scan gives, got {type(subject).__name__}"
        )
    rows = rows_of(problem, device, backend, target)
    print(text_of(problem, device, backend, target, rows))
    return rows
