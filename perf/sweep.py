"""Sweeps layers of real models: speed and correctness of the kernels, as a table, CSV, Markdown and PNG.

    python perf/sweep.py                          the 12 layers of the suite "quick", float16
    python perf/sweep.py --suite aspp --dtypes float16,float32 --passes fprop
    python perf/sweep.py --suite all --validate-model

With a GPU it times tridil and cuDNN (as PyTorch calls it, benchmark on). Without one it reports what is true there: correctness in Triton's
interpreter on a reduced copy of each layer, and what the compiler makes of the real layer for --target. Rows are kept as they finish: a second
run does only what is missing. Exit status 1 when a result of tridil is wrong or fails, 130 after Ctrl-C.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "perf")]
import validate  # noqa: E402
from report import COLUMNS, IDENTITY, is_broken, machine_line, output, read, report, triton_version, with_ratio  # noqa: E402

from tridil import config as cfg  # noqa: E402
from tridil import cost_model, devices, dispatch, ops, reference, testing, tuner, workloads  # noqa: E402
from tridil.problem import DTYPE_BYTES, PASSES, Problem  # noqa: E402

PROVIDERS = ("tridil", "cudnn", "cudnn_nchw")
NO_GPU = ("no GPU (interpreted; compiled for the target)", "none")
NOT_MEASURED = ("not measured, for want of a GPU: time, throughput, memory, bit-identity, cuDNN. Errors are of the interpreter, on reduced copies "
                "(checked_on in results.csv); registers, spills, shared memory and MMA are read from the machine code of the real layer's kernels")


class Gpu:
    """The device and its clock: all that the sweep asks of hardware."""
    device = "cuda"

    def describe(self) -> tuple[str, str]:
        """(device name, driver version)."""
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
        return torch.cuda.get_device_name(), output(query) or "unknown"

    def quartiles(self, fn) -> tuple[float, float, float]:
        """Milliseconds of a call: first quartile, median, third quartile."""
        from triton.testing import do_bench
        return tuple(do_bench(fn, warmup=25, rep=100, quantiles=(0.25, 0.5, 0.75)))

    def extra_bytes(self, fn) -> int:
        """Peak of allocated bytes during a call, without its result."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()


def call(provider: str, problem: Problem, pass_: str, operands, config: dict | None):
    """A function without arguments that runs one pass on (x, w), (dy, w) or (dy, x), in the provider's memory format."""
    memory_format = torch.contiguous_format if provider == "cudnn_nchw" else torch.channels_last
    a, b = (t.contiguous(memory_format=memory_format) for t in operands)
    if provider == "tridil":
        from tridil import launch
        bias = [None] if pass_ == "fprop" else []
        return lambda: getattr(launch, pass_)(problem, a, b, *bias, config, _precision(problem))
    geometry = (problem.stride, [lo for lo, _ in problem.padding], problem.dilation, False, (0, 0), problem.groups)
    if pass_ == "fprop":
        return lambda: torch.ops.aten.convolution(a, b, None, *geometry)
    mask = [pass_ == "dgrad", pass_ == "wgrad", False]
    shape = problem.x_shape if pass_ == "dgrad" else problem.w_shape
    unread = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format)    # only its shape and format matter
    x, w = (unread, b) if pass_ == "dgrad" else (b, unread)
    return lambda: torch.ops.aten.convolution_backward(a, x, w, None, *geometry, mask)[mask.index(True)]


def _precision(problem: Problem) -> str:
    return ops.fp32_precision(dispatch.target()) if problem.dtype == "float32" else "ieee"


def part_of(problem: Problem, pass_: str, limit: int = 2**32):
    """(part, slices of both operands, slices of the result) whose float64 reference takes about `limit` bytes: leading images; wgrad: channels."""
    (top, bottom), (left, right) = problem.padding
    per_image = 32 * (problem.c * (problem.h + top + bottom) * (problem.w + left + right) + problem.k * problem.p * problem.q)
    if pass_ != "wgrad":
        n = min(problem.n, max(1, limit // per_image))
        return replace(problem, n=n), ((slice(n),), (slice(None),)), (slice(n),)
    pieces = -(-problem.n * per_image // limit)
    groups = max(1, problem.groups // pieces)
    c, k = (max(1, size * groups // problem.groups // (pieces if problem.groups == 1 else 1)) for size in (problem.c, problem.k))
    return replace(problem, c=c, k=k, groups=groups), ((slice(None), slice(k)), (slice(None), slice(c))), (slice(k), slice(c // groups))


def gpu_rows(gpu: Gpu, pending):
    """Measured rows: pending is a list of (workload, row); the tensors and float64 references of a layer are made once."""
    torch.backends.cudnn.benchmark = True
    for workload, jobs in groupby(pending, key=lambda job: job[0]):
        tensors = testing.random_tensors(workload.problem, gpu.device)
        for pass_, rows in groupby((row for _, row in jobs), key=lambda row: row["pass"]):
            expected = []
            for row in rows:
                yield attempt(row, lambda: _on_gpu(gpu, workload.problem, pass_, tensors, expected, row))  # noqa: B023 (called at once)


def _on_gpu(gpu, problem, pass_, tensors, expected, row):
    x, w, _, dy = tensors
    operands = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    part, cuts, result_cut = part_of(problem, pass_)
    if not expected:
        expected.append(getattr(reference, pass_)(part, *(t[cut] for t, cut in zip(operands, cuts))))
    tridil = row["provider"] == "tridil"
    config = tuner.decide(problem, pass_, row["target"], _precision(problem), torch.device(gpu.device)).config if tridil else None
    fn = call(row["provider"], problem, pass_, operands, config)
    result = fn()
    error, budget = testing.check(result[result_cut], expected[0], part, pass_, _precision(problem))
    same = torch.equal(result, fn())
    del result
    q1, ms, q3 = gpu.quartiles(fn)
    found = dict(ms=ms, ms_q1=q1, ms_q3=q3, tflops_dense=2e-9 * problem.dense_macs / ms, tflops_useful=2e-9 * problem.useful_macs / ms,
                 gb_s=1e-6 * problem.bytes / ms, extra_mib=gpu.extra_bytes(fn) / 2**20, bit_identical=same, error=error, budget=budget,
                 checked_on=part.key())
    return found | (_tiles(problem, pass_, config) if tridil else {})


def _tiles(problem, pass_, config):
    moved, requested = cfg.moved_bytes(problem, pass_, config)
    return dict(config=f"{config['kernel']} {cfg.describe(config)}", executed_macs=cfg.executed_macs(problem, pass_, config),
                compulsory_bytes=problem.bytes, moved_bytes=moved, requested_bytes=requested)


def reduced(problem: Problem, config: dict, pixels: int = 2048) -> tuple[Problem, dict]:
    """A copy of a layer, and of its config, for the interpreter: same filter, stride, padding, dilation and pixel box.

    Channels of a group beyond 32 become 32 plus the remainder mod 32, tiles of them at most 32; at most 8 splits, 2 groups
    (depthwise stays depthwise) and 2 images; maps of more than `pixels` are halved, down to the filter's extent.
    """
    groups = min(problem.groups, 2)
    c, k = (size if size <= 32 else 32 + size % 32 for size in (problem.c // problem.groups, problem.k // problem.groups))
    sides, extents = [problem.h, problem.w], [d * (t - 1) + 1 for d, t in zip(problem.dilation, (problem.r, problem.s))]
    while sides[0] * sides[1] > pixels and (axes := [i for i in (0, 1) if sides[i] > extents[i]]):
        i = max(axes, key=sides.__getitem__)
        sides[i] = max(extents[i], -(-sides[i] // 2))
    n = min(problem.n, 2 if 2 * sides[0] * sides[1] <= pixels else 1)
    tiles = {name: min(config[name], most) for name, most in (("BLOCK_M", 32), ("BLOCK_N", 32), ("BLOCK_K", 32), ("SPLIT_K", 8)) if name in config}
    return replace(problem, n=n, c=c * groups, k=k * groups, groups=groups, h=sides[0], w=sides[1]), config | tiles


def cpu_rows(pending):
    """Rows without times: a worker compiles the kernels of the real layer while this process interprets them on a reduced copy."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _compiling_worker)
    try:
        compiled = [pool.submit(_resources, w.problem, row["pass"], row["target"], _precision(w.problem)) for w, row in pending]
        for (workload, row), future in zip(pending, compiled):
            yield attempt(row, lambda: _interpreted(workload.problem, row["pass"], row["target"]) | future.result())  # noqa: B023 (called at once)
    finally:
        pool.shutdown(cancel_futures=True)


def _compiling_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("TRITON_INTERPRET", None)                    # before triton is imported: interpreted kernels cannot be compiled


def _resources(problem, pass_, target, precision):
    from tridil.aot import resources
    rows = resources(problem, pass_, cost_model.best(problem, pass_, target, precision), target, precision)
    mma = dict.fromkeys(row["mma"] for row in rows if row["mma"] != "none")
    return dict(kernels="+".join(dict.fromkeys(row["kernel"] for row in rows)), registers=max(row["registers"] for row in rows),
                spills=sum(row["spills"] for row in rows), shared_bytes=max(row["shared_bytes"] for row in rows), mma="+".join(mma) or "none",
                overhead=rows[0]["overhead"])


def _interpreted(problem, pass_, target):
    from tridil import launch
    config = cost_model.best(problem, pass_, target, _precision(problem))
    part, part_config = reduced(problem, config)
    x, w, bias, dy = testing.random_tensors(part)
    operands = {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    result = getattr(launch, pass_)(part, *operands, part_config)
    error, budget = testing.check(result, getattr(reference, pass_)(part, *operands), part, pass_)
    return dict(error=error, budget=budget, checked_on=part.key()) | _tiles(problem, pass_, config)


def attempt(row: dict, measure) -> dict:
    """The row with what `measure()` found, or with its failure."""
    try:
        return row | measure()
    except Exception as e:                                      # one layer that fails must not end the sweep: the row says why
        return row | {"failure": f"{type(e).__name__}: {e}".replace("\n", " ")[:300]}


def fingerprint() -> str:
    """Of all that a row depends on: the sources, torch, triton, cuDNN."""
    found = hashlib.sha256(repr((torch.__version__, triton_version(), torch.backends.cudnn.version())).encode())
    for path in sorted([*(ROOT / "tridil").rglob("*.py"), ROOT / "tridil" / "workloads.csv", Path(__file__)]):
        found.update(path.read_bytes())
    return found.hexdigest()[:10]


def main(argv=None, gpu: Gpu | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(choices):
        def read(text):
            wrong = [name for name in text.split(",") if name not in choices]
            if wrong:
                raise argparse.ArgumentTypeError(f"{', '.join(wrong)} cannot be had here: use {', '.join(choices)}")
            return text.split(",")
        return read
    gpu = gpu or (Gpu() if torch.cuda.is_available() else None)
    providers = PROVIDERS if gpu else ("tridil",)
    parser.add_argument("--suite", default="quick", choices=workloads.SUITES)
    parser.add_argument("--filter", default="", help="regular expression: only layers whose 'model layer' it matches")
    parser.add_argument("--passes", default=PASSES, type=listed(PASSES), help=f"comma-separated, of {', '.join(PASSES)} (default: all)")
    parser.add_argument("--dtypes", default=["float16"], type=listed(DTYPE_BYTES), help=f"comma-separated, of {', '.join(DTYPE_BYTES)}")
    parser.add_argument("--providers", default=providers, type=listed(providers), help=f"of {', '.join(PROVIDERS)}; cudnn needs a GPU")
    parser.add_argument("--target", help="like cuda:90 (default), cuda:80, hip:gfx942: what kernels are compiled for; with a GPU it is the GPU's")
    parser.add_argument("--out", type=Path, help="folder of results.csv, .md and .png (default: perf/results/<device>)")
    parser.add_argument("--validate-model", action="store_true", help="compare the cost model's times with measured ones, on candidates of every "
                        "layer; without a GPU: what it predicts, beside the roof")
    parser.add_argument("--fresh", action="store_true", help="start over instead of keeping the rows that are there")
    args = parser.parse_args(argv)
    layers = [w for dtype in args.dtypes for w in workloads.suite(args.suite, dtype) if re.search(args.filter, w.name)]
    if not layers:
        parser.error(f"no layer of suite {args.suite!r} matches --filter {args.filter!r}")
    if gpu and args.target:
        parser.error(f"--target {args.target} is for machines without a GPU: with one, the target is the GPU's")
    if not gpu:
        os.environ.update(TRITON_INTERPRET="1", TRIDIL_TARGET=args.target or "cuda:90")
    target, code, console = dispatch.target(), fingerprint(), Console()
    if not console.is_terminal:
        console = Console(width=120)
    out = args.out or ROOT / "perf" / "results" / re.sub(r"\W+", "-", (gpu.describe()[0] if gpu else f"no-gpu-{target}").lower())
    out.mkdir(parents=True, exist_ok=True)
    if args.validate_model:
        device = devices.of_name(gpu.describe()[0], target) if gpu else devices.of_target(target)
        return validate.run(gpu, layers, args.passes, device, call, out, console)
    path = out / "results.csv"
    if args.fresh:
        path.unlink(missing_ok=True)
    old = read(path)
    done = set(old[old["failure"].isna()][list(IDENTITY)].itertuples(index=False, name=None))
    wanted = [(w, {"model": w.model, "layer": w.layer, "count": w.count, "pass": pass_, "dtype": w.problem.dtype, "provider": provider,
                   "target": target, "code": code, "problem": w.problem.key(), "dense_macs": w.problem.dense_macs,
                   "useful_macs": w.problem.useful_macs}) for w in layers for pass_ in args.passes for provider in args.providers]
    pending = [(w, row) for w, row in wanted if _identity(row) not in done]
    console.print(f"{len(wanted)} rows, {len(wanted) - len(pending)} of them already in {path}", highlight=False)
    stopped = _append(path, pending, gpu_rows(gpu, pending) if gpu else cpu_rows(pending), console)
    frame = with_ratio(read(path))
    frame.to_csv(path.with_suffix(".tmp"), index=False)
    path.with_suffix(".tmp").replace(path)
    order = {_identity(row): i for i, (_, row) in enumerate(wanted)}
    place = pd.Series([order.get(key) for key in frame[list(IDENTITY)].itertuples(index=False, name=None)], index=frame.index, dtype=float)
    frame = frame.loc[place.dropna().sort_values().index]
    if len(frame):
        report(frame, machine_line(*(gpu.describe() if gpu else NO_GPU), target), [] if gpu else [NOT_MEASURED], out, console)
    if stopped:
        console.print(f"{stopped}: {len(frame)} of {len(wanted)} rows are done; the same command goes on from there")
        return 130 if stopped == "interrupted" else 1
    return int(is_broken(frame).any())


def _identity(row) -> tuple:
    return tuple(row[name] for name in IDENTITY)


def _append(path: Path, pending: list, rows, console: Console) -> str | None:
    """Appends each row to the CSV as it comes; None, or what ended it early."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file, closing(rows), bar:
        writer = csv.DictWriter(file, list(COLUMNS))
        if is_new:
            writer.writeheader()
        task = bar.add_task("", total=len(pending))
        try:
            for (workload, row) in pending:
                bar.update(task, description=f"{workload.name[:36]} {row['pass']} {row['provider']}")
                found = next(rows)
                if fingerprint() != row["code"]:            # the interpreter and the compiling worker read sources late
                    return "the sources changed under the sweep"
                writer.writerow(found)
                file.flush()
                bar.advance(task)
        except KeyboardInterrupt:
            return "interrupted"
    return None


if __name__ == "__main__":
    sys.exit(main())
