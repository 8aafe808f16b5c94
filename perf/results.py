"""The rows of a sweep: the columns of results.csv, what each means, and how people see it. A new
column is a line here, and its value in layers.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = ("model", "layer", "pass", "dtype", "layout", "provider", "target", "code")


@dataclass(frozen=True)
class Column:
    """One column of results.csv.

    kind: "measured", "predicted" (counted from the tiles or modelled, not timed) or "". head: its
    heading in tables, lines apart; None: in the CSV only. form: a format, or a function of the
    value; scale divides numbers; over: the column that it is shown over. untimed: shown only where
    nothing was timed.
    """

    kind: str
    meaning: str
    head: str | None = None
    form: str | Callable = "{:.3g}"
    scale: float = 1
    over: str | None = None
    untimed: bool = False
    # the heading where nothing was timed, if it differs
    untimed_head: str | None = None

    def heading(self, timed: bool) -> str:
        if not timed and self.untimed_head:
            return self.untimed_head
        return f"{self.head}\n{self.kind}" if self.kind else self.head

    def show(self, frame: pd.DataFrame, name: str) -> list[str]:
        """The cells of a table."""
        values = frame[name]
        if callable(self.form):
            return [self.form(value) for value in values]
        values = values.astype(float) / (
            frame[self.over].astype(float) if self.over else self.scale
        )
        return [self.form.format(value) if pd.notna(value) else "" for value in values]


def text(value) -> str:
    return "" if pd.isna(value) else str(value)


def milliseconds(value) -> str:
    """Times of kernels; those below a microsecond say so."""
    if pd.isna(value):
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{1e3 * value:.2f} us"


def short(dtype: str) -> str:
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}.get(
        dtype, dtype
    )


COLUMNS = {
    "model": Column("", "model of the layer; (machine) for what the machine itself reaches"),
    "layer": Column("", "layer of the model; (model) for all of it"),
    "kind": Column("", "ASPP, dense, 1D, depthwise, grouped, narrow; model; machine"),
    "count": Column("", "times the layer occurs in the model"),
    "pass": Column(
        "",
        "fprop, dgrad or wgrad; of a model inference or training; of the machine copy or matmul",
        "pass",
        text,
    ),
    "config": Column(
        "",
        "the tiles: kernel, pixel box (images x rows x columns), channels, reduction step or splits",
        "kernel",
        lambda value: text(value).split(" ")[0],
    ),
    "dtype": Column("", "of all tensors", "dtype", short),
    "layout": Column("", "memory format of x and y: nhwc (channels_last) or nchw", "layout", text),
    "provider": Column("", "what ran, see perf/providers.py", "provider", text),
    "version": Column("", "of the provider"),
    "target": Column("", "GPU architecture"),
    "code": Column("", "fingerprint of the sources and of the versions of torch and triton"),
    "problem": Column("", "the convolution"),
    "also": Column("", "other layers of the same convolution: it runs once for all of them"),
    **{name: Column("", "of the convolution") for name in "nchwkrs"},
    "stride": Column("", "larger one"),
    "dilation": Column("", "larger one"),
    "groups": Column("", "of the convolution"),
    "ms": Column(
        "measured", "median time of a call on the device; of a model, of a step", "ms", "{:.3f}"
    ),
    "ms_q1": Column("measured", "first quartile", "q1 ms", "{:.3f}"),
    "ms_q3": Column("measured", "third quartile", "q3 ms", "{:.3f}"),
    "eager_ms": Column(
        "measured",
        "median of one call by CUDA events, L2 flushed before it: what its launches cost the host shows where it is longer",
        "eager\nms",
        "{:.3f}",
    ),
    "clock": Column(
        "",
        "of ms: graph (replays of a CUDA graph of calls whose tensors take turns, so that L2 holds none) or events (as eager_ms)",
    ),
    "clock_mhz": Column("measured", "clock of the SMs right after the timing"),
    "temperature_c": Column("measured", "of the GPU right after the timing"),
    "tflops_dense": Column("measured", "10^12 operations/s, padding counted", "dense\nTFLOP/s"),
    "tflops_useful": Column(
        "measured", "10^12 operations/s, padding not counted", "useful\nTFLOP/s"
    ),
    "gb_s": Column(
        "measured", "10^9 bytes/s of compulsory traffic: operands and result once", "GB/s"
    ),
    "extra_mib": Column(
        "measured",
        "peak memory beyond operands and result; of a model beyond parameters and input",
        "extra\nMiB",
        "{:.1f}",
    ),
    "bit_identical": Column(
        "measured",
        "whether a second run gives the same bits",
        "same\nbits",
        lambda value: {"True": "yes", "False": "NO"}.get(str(value), ""),
    ),
    "ratio": Column(
        "measured",
        "time of the fastest cuDNN layout / time: above 1 is faster than cuDNN",
        "x cuDNN",
        "{:.2f}",
    ),
    "predicted_ms": Column(
        "predicted", "time of tridil by its cost model", "ms", milliseconds, untimed=True
    ),
    "cudnn_ms": Column(
        "predicted",
        "estimate of cuDNN's time, in its favour",
        "cuDNN\nms",
        milliseconds,
        untimed=True,
    ),
    "auto": Column(
        "predicted",
        'what backend="auto" takes: the kernels (triton) or ATen (aten)',
        "auto\ntakes",
        text,
        untimed=True,
    ),
    "gain": Column(
        "predicted",
        'estimate of cuDNN / time of what "auto" takes',
        "gain",
        "{:.2f}",
        untimed=True,
    ),
    "roof_ms": Column(
        "predicted",
        "useful MACs at the peak of the device's units, or compulsory bytes at its DRAM bandwidth, whichever takes longer",
        "roof ms",
        milliseconds,
        untimed=True,
    ),
    "error": Column(
        "measured",
        "absolute error against float64, of the element that uses most of its budget",
        "error/\nbudget",
        "{:.2f}",
        over="budget",
        untimed_head="error/budget\ninterpreter,\nreduced copy",
    ),
    "budget": Column("measured", "error allowed to that element"),
    "checked_on": Column("", "the convolution whose result was checked"),
    "dense_macs": Column(
        "predicted",
        "multiply-accumulates, padding counted",
        "dense/\nuseful",
        over="useful_macs",
        untimed=True,
    ),
    "useful_macs": Column("predicted", "multiply-accumulates that read the image"),
    "executed_macs": Column(
        "predicted",
        "multiply-accumulates of the tiles, overhang counted",
        "executed/\nuseful",
        over="useful_macs",
    ),
    "compulsory_bytes": Column("predicted", "x, w and y once"),
    "moved_bytes": Column(
        "predicted",
        "bytes from and to memory where L2 serves every re-read: operands, result, partial sums",
        "moved/\ncompulsory",
        over="compulsory_bytes",
    ),
    "requested_bytes": Column(
        "predicted",
        "bytes that programs load and store, re-reads in L1 and L2 included; of tiles of matrix products at most",
        "requested/\ncompulsory",
        over="compulsory_bytes",
    ),
    "kernels": Column("measured", "kernels compiled for the target"),
    "registers": Column("measured", "per thread, largest of the kernels", "regs", "{:.0f}"),
    "spills": Column("measured", "local-memory instructions of all kernels", "spills", "{:.0f}"),
    "shared_bytes": Column(
        "measured", "shared memory per program, largest", "shared\nKiB", "{:.0f}", 1024
    ),
    "mma": Column("measured", "tensor-core instruction in the machine code", "MMA", text),
    "overhead": Column(
        "measured",
        "warp instructions of the main loop that are not products, per 2048 multiply-accumulates",
        "over-\nhead",
        "{:.2f}",
    ),
    "failure": Column(
        "", "why there is no result", "failure", lambda value: "FAILED" if pd.notna(value) else ""
    ),
}


def triton_version() -> str:
    for name in ("triton", "pytorch-triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def output(command: list[str]) -> str:
    """What a command prints, run in the repository; nothing when it fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine_line(device: str, driver: str, target: str) -> str:
    """What a table needs beside its numbers, in one line: hardware, versions, commit."""
    commit = output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    commit += (
        "-dirty" if output(["git", "status", "--porcelain", "--", "tridil", "perf/*.py"]) else ""
    )
    return (
        f"device {device} | target {target} | driver {driver} | torch {torch.__version__} | triton {triton_version()} | "
        f"cuDNN {torch.backends.cudnn.version() or 'none'} | commit {commit}"
    )


def geometry(frame: pd.DataFrame) -> pd.Series:
    """The convolution of each row in few words, like "n4 c2048 60x60 k256 3x3 d36"; empty where
    the row has none."""

    def words(row) -> str:
        if row[list("nchwkrs")].isna().any():
            return ""
        n, c, h, w, k, r, s = row[list("nchwkrs")].astype(int)
        more = {"stride": "s", "dilation": "d", "groups": "g"}
        parts = [f"n{n} c{c} {h}x{w} k{k} {r}x{s}"]
        parts += [f"{short}{int(row[name])}" for name, short in more.items() if row[name] > 1]
        return " ".join(parts)

    return frame.apply(words, axis=1) if len(frame) else pd.Series(dtype=str)


def read(path: Path) -> pd.DataFrame:
    """The rows of a results file, of this version's columns; the last of those with one identity.
    Columns that an older file lacks are empty.

    Raises ValueError for a file that is none.
    """
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS), dtype=object)
    try:
        frame = pd.read_csv(
            path, dtype={"code": str, "version": str, "failure": object, "bit_identical": object}
        )
    # pandas' errors of reading are ValueErrors
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as a table: {e}") from None
    if missing := [name for name in IDENTITY if name not in frame]:
        raise ValueError(
            f"{path} is no table of a sweep: it lacks the columns {', '.join(missing)}"
        )
    return frame.reindex(columns=list(COLUMNS)).drop_duplicates(
        list(IDENTITY), keep="last", ignore_index=True
    )


def with_ratio(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `ratio` filled in: time of the fastest cuDNN layout of the same layer, pass
    and dtype / time."""
    keys = [column for column in IDENTITY if column not in ("provider", "layout")]
    best = (
        frame["ms"]
        .where(frame["provider"].str.startswith("cudnn"))
        .astype(float)
        .groupby([frame[key] for key in keys])
        .transform("min")
    )
    return frame.assign(ratio=best / frame["ms"].astype(float))


def exceeds(frame: pd.DataFrame) -> pd.Series:
    """Rows whose error exceeds its budget; layers that ran must have both."""
    checked = ~frame["kind"].isin(("model", "machine")) | frame["error"].notna()
    return (
        checked
        & frame["failure"].isna()
        & ~(frame["error"].astype(float) <= frame["budget"].astype(float))
    )


def is_broken(frame: pd.DataFrame) -> pd.Series:
    """Rows of tridil that failed or whose error exceeds its budget."""
    return frame["provider"].str.startswith("tridil") & (frame["failure"].notna() | exceeds(frame))


def summary(frame: pd.DataFrame) -> list[str]:
    """MACs over the suite, a line per pass and dtype; with times also the geometric mean of the
    ratio to cuDNN."""
    lines = []
    of_layers = frame[frame["executed_macs"].notna() & (frame["kind"] != "model")]
    for (pass_, dtype), part in of_layers.groupby(["pass", "dtype"], sort=False):
        dense, useful, executed = (
            part[f"{name}_macs"].sum() for name in ("dense", "useful", "executed")
        )
        lines.append(
            f"{pass_} {dtype}, {len(part)} layers: dense/useful MACs {dense / useful:.3f}, executed/useful MACs {executed / useful:.3f} "
            "(predicted)"
        )
        if part["ratio"].notna().any():
            lines[-1] += (
                f", {np.exp(np.log(part['ratio'].astype(float)).mean()):.2f} x the best cuDNN (geometric mean, measured)"
            )
    for row, wrong in zip(frame.to_dict("records"), exceeds(frame)):
        name = f"{row['provider']} {row['pass']} {row['dtype']} of {row['model']} {row['layer']}"
        if pd.notna(row["failure"]):
            lines.append(f"FAILED {name}: {row['failure']}")
        elif wrong:
            lines.append(
                f"BROKEN BUDGET {name}: error {row['error']:.3g} > budget {row['budget']:.3g}"
            )
    return lines


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """What people read: text columns whose names have up to three lines, quantity and kind; those
    that hold nothing are left out."""
    timed = frame["ms"].notna().any()
    view = {
        column.heading(timed): column.show(frame, name)
        for name, column in COLUMNS.items()
        if column.head and not (column.untimed and timed)
    }
    view = pd.DataFrame(view, index=frame.index)
    if frame["layout"].nunique() < 2:
        del view["layout"]
    return view[
        [name for name in view if (view[name] != "").any() and (name != "provider" or timed)]
    ]
