"""What people see of a sweep: the columns, the table, the Markdown page."""
from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = ("model", "layer", "pass", "dtype", "layout", "provider", "target", "code")
# column of the CSV -> (measured, predicted or "", meaning); "predicted" is counted from the tiles, not timed
COLUMNS = {
    "model": ("", "model of the layer; (machine) for what the machine itself reaches"), "layer": ("", "layer of the model; (model) for all of it"),
    "kind": ("", "ASPP, dense, 1D, depthwise, grouped, narrow; model; machine"), "count": ("", "times the layer occurs in the model"),
    "pass": ("", "fprop, dgrad or wgrad; of a model inference or training; of the machine copy or matmul"), "dtype": ("", "of all tensors"),
    "layout": ("", "memory format of x and y: nhwc (channels_last) or nchw"),
    "provider": ("", "what ran, see perf/providers.py"), "version": ("", "of the provider"),
    "target": ("", "GPU architecture"), "code": ("", "fingerprint of the sources and of the versions of torch and triton"),
    "problem": ("", "the convolution"), **{name: ("", "of the convolution") for name in "nchwkrs"},
    "stride": ("", "larger one"), "dilation": ("", "larger one"), "groups": ("", "of the convolution"),
    "config": ("", "the tiles: pixel box (images x rows x columns), channels, reduction step or splits"),
    "ms": ("measured", "median time of a call on the device; of a model, of a step"), "ms_q1": ("measured", "first quartile"),
    "ms_q3": ("measured", "third quartile"),
    "eager_ms": ("measured", "median of one call by CUDA events, L2 flushed before it: what its launches cost the host shows where it is longer"),
    "clock": ("", "of ms: graph (replays of a CUDA graph of calls whose tensors take turns, so that L2 holds none) or events (as eager_ms)"),
    "clock_mhz": ("measured", "clock of the SMs right after the timing"),
    "temperature_c": ("measured", "of the GPU right after the timing"),
    "tflops_dense": ("measured", "10^12 operations/s, padding counted"), "tflops_useful": ("measured", "10^12 operations/s, padding not counted"),
    "gb_s": ("measured", "10^9 bytes/s of compulsory traffic: operands and result once"),
    "extra_mib": ("measured", "peak memory beyond operands and result; of a model beyond parameters and input"),
    "bit_identical": ("measured", "whether a second run gives the same bits"),
    "ratio": ("measured", "time of the fastest cuDNN layout / time: above 1 is faster than cuDNN"),
    "error": ("measured", "absolute error against float64, of the element that uses most of its budget"),
    "budget": ("measured", "error allowed to that element"), "checked_on": ("", "the convolution whose result was checked"),
    "predicted_ms": ("predicted", "time of tridil by its cost model"),
    "roof_ms": ("predicted", "useful MACs at the peak of the device's units, or compulsory bytes at its DRAM bandwidth, whichever takes longer"),
    "dense_macs": ("predicted", "multiply-accumulates, padding counted"), "useful_macs": ("predicted", "multiply-accumulates that read the image"),
    "executed_macs": ("predicted", "multiply-accumulates of the tiles, overhang counted"),
    "compulsory_bytes": ("predicted", "x, w and y once"),
    "moved_bytes": ("predicted", "bytes from and to memory where L2 serves every re-read: operands, result, partial sums"),
    "requested_bytes": ("predicted", "bytes that programs load and store, re-reads in L1 and L2 included; of gather and tma at most"),
    "kernels": ("measured", "kernels compiled for the target"), "registers": ("measured", "per thread, largest of the kernels"),
    "spills": ("measured", "local-memory instructions of all kernels"), "shared_bytes": ("measured", "shared memory per program, largest"),
    "mma": ("measured", "tensor-core instruction in the machine code"),
    "overhead": ("measured", "warp instructions of the main loop that are not products, per 2048 multiply-accumulates"),
    "failure": ("", "why there is no result")}


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
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine_line(device: str, driver: str, target: str) -> str:
    """What a table needs beside its numbers, in one line: hardware, versions, commit."""
    commit = output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    commit += "-dirty" if output(["git", "status", "--porcelain", "--", "tridil", "perf/*.py"]) else ""
    return (f"device {device} | target {target} | driver {driver} | torch {torch.__version__} | triton {triton_version()} | "
            f"cuDNN {torch.backends.cudnn.version() or 'none'} | commit {commit}")


def read(path: Path) -> pd.DataFrame:
    """The rows of a results file; the last of those with one identity. Raises ValueError when the columns are not this version's."""
    if not path.exists():
        return pd.DataFrame(columns=list(COLUMNS), dtype=object)
    frame = pd.read_csv(path, dtype={"code": str, "version": str, "failure": object, "bit_identical": object})
    if list(frame) != list(COLUMNS):
        raise ValueError(f"{path} has the columns of another version: start over with --fresh or give another --out")
    return frame.drop_duplicates(list(IDENTITY), keep="last", ignore_index=True)


def with_ratio(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `ratio` filled in: time of the fastest cuDNN layout of the same layer, pass and dtype / time."""
    keys = [column for column in IDENTITY if column not in ("provider", "layout")]
    best = frame["ms"].where(frame["provider"].str.startswith("cudnn")).astype(float).groupby([frame[key] for key in keys]).transform("min")
    return frame.assign(ratio=best / frame["ms"].astype(float))


def exceeds(frame: pd.DataFrame) -> pd.Series:
    """Rows whose error exceeds its budget; layers that ran must have both."""
    checked = ~frame["kind"].isin(("model", "machine")) | frame["error"].notna()
    return checked & frame["failure"].isna() & ~(frame["error"].astype(float) <= frame["budget"].astype(float))


def is_broken(frame: pd.DataFrame) -> pd.Series:
    """Rows of tridil that failed or whose error exceeds its budget."""
    return frame["provider"].str.startswith("tridil") & (frame["failure"].notna() | exceeds(frame))


def summary(frame: pd.DataFrame) -> list[str]:
    """MACs over the suite, a line per pass and dtype; with times also the geometric mean of the ratio to cuDNN."""
    lines = []
    of_layers = frame[frame["executed_macs"].notna() & (frame["kind"] != "model")]
    for (pass_, dtype), part in of_layers.groupby(["pass", "dtype"], sort=False):
        dense, useful, executed = (part[f"{name}_macs"].sum() for name in ("dense", "useful", "executed"))
        lines.append(f"{pass_} {dtype}, {len(part)} layers: dense/useful MACs {dense / useful:.3f}, executed/useful MACs {executed / useful:.3f} "
                     "(predicted)")
        if part["ratio"].notna().any():
            lines[-1] += f", {np.exp(np.log(part['ratio'].astype(float)).mean()):.2f} x the best cuDNN (geometric mean, measured)"
    for row, wrong in zip(frame.to_dict("records"), exceeds(frame)):
        name = f"{row['provider']} {row['pass']} {row['dtype']} of {row['model']} {row['layer']}"
        if pd.notna(row["failure"]):
            lines.append(f"FAILED {name}: {row['failure']}")
        elif wrong:
            lines.append(f"BROKEN BUDGET {name}: error {row['error']:.3g} > budget {row['budget']:.3g}")
    return lines


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """What people read: text columns whose names have up to three lines, quantity and kind; those that hold nothing are left out."""
    def number(column, form="{:.3g}", scale=1):
        return [form.format(value / scale) if pd.notna(value) else "" for value in column.astype(float)]
    timed, useful = frame["ms"].notna().any(), frame["useful_macs"].astype(float)
    view = pd.DataFrame({
        "pass": frame["pass"], "kernel": [config.split()[0] if isinstance(config, str) else "" for config in frame["config"]],
        "dtype": frame["dtype"].replace({"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}),
        "layout": frame["layout"] if frame["layout"].nunique() > 1 else "",
        "provider": frame["provider"], "ms\nmeasured": number(frame["ms"], "{:.3f}"),
        "q1-q3 ms\nmeasured": [f"{a:.3f}-{b:.3f}" if pd.notna(a) else "" for a, b in zip(frame["ms_q1"], frame["ms_q3"])],
        "eager\nms\nmeasured": number(frame["eager_ms"], "{:.3f}"),
        "dense\nTFLOP/s\nmeasured": number(frame["tflops_dense"]), "useful\nTFLOP/s\nmeasured": number(frame["tflops_useful"]),
        "GB/s\nmeasured": number(frame["gb_s"]), "extra\nMiB\nmeasured": number(frame["extra_mib"], "{:.1f}"),
        "same\nbits\nmeasured": [{"True": "yes", "False": "NO"}.get(str(same), "") for same in frame["bit_identical"]],
        "x cuDNN\nmeasured": number(frame["ratio"], "{:.2f}"), "ms\npredicted": "" if timed else number(frame["predicted_ms"], "{:.3f}"),
        "roof ms\npredicted": "" if timed else number(frame["roof_ms"], "{:.3f}"),
        "error/\nbudget\nmeasured": number(frame["error"].astype(float) / frame["budget"].astype(float), "{:.2f}"),
        "dense/\nuseful\npredicted": "" if timed else number(frame["dense_macs"].astype(float) / useful),
        "executed/\nuseful\npredicted": number(frame["executed_macs"].astype(float) / useful),
        "moved/\ncompulsory\npredicted": number(frame["moved_bytes"].astype(float) / frame["compulsory_bytes"].astype(float)),
        "requested/\ncompulsory\npredicted": number(frame["requested_bytes"].astype(float) / frame["compulsory_bytes"].astype(float)),
        "regs\nmeasured": number(frame["registers"], "{:.0f}"), "spills\nmeasured": number(frame["spills"], "{:.0f}"),
        "shared\nKiB\nmeasured": number(frame["shared_bytes"], "{:.0f}", 1024), "MMA\nmeasured": frame["mma"].astype(object).fillna(""),
        "over-\nhead\nmeasured": number(frame["overhead"], "{:.2f}")})
    view["failure"] = ["FAILED" if failed else "" for failed in frame["failure"].notna()]
    return view[[column for column in view if (view[column] != "").any() and (column != "provider" or timed)]]


def report(frame: pd.DataFrame, machine: str, notes: list[str], out: Path, console: Console) -> None:
    """Terminal table (a heading per layer), results.md, the pictures of plot.py, report.html."""
    import page  # both read this module
    import plot
    view, lines = table(frame), notes + summary(frame)
    titles = frame["model"] + " " + frame["layer"] + (" | " + frame["problem"].astype(object)).fillna("")
    heads = [column.split("\n") for column in view]
    widths = [max(map(len, [*head, *view[column]])) for head, column in zip(heads, view)]

    def line(cells):
        return " ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths)))
    depth = max(map(len, heads))
    text = [line(cells) for cells in zip(*([""] * (depth - len(head)) + head for head in heads))]
    for title, cells, previous in zip(titles, view.itertuples(index=False), [None, *titles]):
        text += [f"[bold]{escape(title)}[/bold]"] * (title != previous) + [line(cells)]
    console.print("\n".join(text), highlight=False, soft_wrap=True)
    console.print("\n".join(["", machine, *lines]), markup=False, highlight=False, soft_wrap=True)

    cells = [["layer", *(column.replace("/\n", "/").replace("\n", " ") for column in view)], ["---"] * (1 + view.shape[1]),
             *([title.replace(" | ", ": "), *row] for title, row in zip(titles, view.itertuples(index=False)))]
    legend = [f"- `{name}`{f' ({kind})' if kind else ''}: {meaning}" for name, (kind, meaning) in COLUMNS.items()]
    text = ["# Sweep", "", machine, "", *(f"- {item}" for item in lines), "", *("| " + " | ".join(row) + " |" for row in cells), "",
            "Columns of results.csv:", "", *legend, ""]
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    page.write(frame, out, machine, notes, plot.write(frame, out, machine))
