"""Sweeps layers of real models, and whole networks: speed and correctness, as a table, CSV,
Markdown, pictures and an HTML report.

    python perf/sweep.py                      the 12 layers of the suite "quick", float16
    python perf/sweep.py --suite aspp --dtypes float16,float32 --passes fprop
    python perf/sweep.py --suite all --filter kind=depthwise --filter "dilation=[3-9]"
    python perf/sweep.py --shape "n=4 c=256 h=60 w=60 k=256 r=3 d=12" --providers tridil,inductor
    python perf/sweep.py --suite none --models deeplabv3_resnet50,van_b2
    python perf/sweep.py --suite all --validate-model
    python perf/sweep.py --suite branches

With a GPU it times tridil and cuDNN (as PyTorch calls it, benchmark on), or other providers.
Without one it reports what is true there: correctness in Triton's interpreter on a reduced copy of
each layer, and what the compiler makes of the real layer for --target. Rows are kept as they
finish: a second run does only what is missing. Under torchrun every rank takes its share of the
layers, and the first one reports. Exit status 1 when a result of tridil is wrong or fails, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import sys
from contextlib import closing
from itertools import chain
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "perf")]
import branches  # noqa: E402
import layers  # noqa: E402
import networks  # noqa: E402
import validate  # noqa: E402
from models import MODELS  # noqa: E402
from providers import DEFAULT, PROVIDERS, Gpu, precision_of, provider, reason_against  # noqa: E402
from report import report  # noqa: E402
from results import COLUMNS, IDENTITY, is_broken, machine_line, read, triton_version, with_ratio  # noqa: E402

from tridil import cost_model, devices, drivers, tuner, workloads  # noqa: E402
from tridil.__main__ import parse_shape  # noqa: E402
from tridil.problem import DTYPE_BYTES, PASSES  # noqa: E402

NO_GPU = ("no GPU (interpreted; compiled for the target)", "none")
NOT_MEASURED = (
    "not measured, for want of a GPU: time, throughput, memory, bit-identity, cuDNN. Errors are of the interpreter, on reduced copies "
    "(checked_on in results.csv); registers, spills, shared memory and MMA are read from the machine code of the real layer's kernels"
)


def machine_rows(gpu: Gpu, pending):
    """What the machine reaches: bytes per second of a copy, operations per second of a matrix
    product."""
    for row in pending:
        yield layers.attempt(row, lambda: _machine(gpu, row))


def _machine(gpu, row):
    n = gpu.roof_size
    a = torch.randn((n, n), device=gpu.device).to(getattr(torch, row["dtype"]))
    out = torch.empty_like(a)
    run = (lambda: torch.mm(a, a, out=out)) if row["pass"] == "matmul" else (lambda: out.copy_(a))
    matmul = torch.backends.cuda.matmul
    # the roof of what convolutions use
    before, matmul.fp32_precision = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        found = gpu.times([run])
    finally:
        matmul.fp32_precision = before
    speed = (
        dict(tflops_dense=2e-9 * n**3)
        if row["pass"] == "matmul"
        else dict(gb_s=2e-6 * a.numel() * a.element_size())
    )
    return found | gpu.state() | {name: value / found["ms"] for name, value in speed.items()}


def fingerprint() -> str:
    """Of all that a row depends on: the sources, torch, triton, cuDNN."""
    found = hashlib.sha256(
        repr((torch.__version__, triton_version(), torch.backends.cudnn.version())).encode()
    )
    perf = [
        ROOT / "perf" / f"{name}.py"
        for name in ("sweep", "layers", "networks", "models", "providers")
    ]
    for path in sorted(
        [*(ROOT / "tridil").rglob("*.py"), ROOT / "tridil" / "workloads.csv", *perf]
    ):
        found.update(path.read_bytes())
    return found.hexdigest()[:10]


def arguments(argv, gpu) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(choices):
        def read(text):
            wrong = [name for name in text.split(",") if name not in choices]
            if wrong:
                raise argparse.ArgumentTypeError(
                    f"{', '.join(wrong)} cannot be had here: use {', '.join(choices)}"
                )
            return text.split(",")

        return read

    def available(text):
        try:
            wrong = [
                reason
                for name in text.split(",")
                if (reason := reason_against(name, gpu is not None))
            ]
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        if wrong:
            raise argparse.ArgumentTypeError("; ".join(wrong))
        return text.split(",")

    def shape(text):
        try:
            return parse_shape(text) and text
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    parser.add_argument(
        "--suite",
        default=None,
        choices=[*workloads.SUITES, "branches", "none"],
        help="layers of real models (default: quick); branches: parallel ones in one launch and one by one (branches.csv)",
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        type=shape,
        help='a convolution of your own, like "n=4 c=256 h=60 w=60 k=256 r=3 d=12"',
    )
    parser.add_argument(
        "--models", default=[], type=listed(MODELS), help=f"whole networks, of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        help="regular expression: only layers whose 'model layer' it matches, or "
        "column=expression on any other column that describes a layer (kind, n, c, h, w, k, r, s, stride, dilation, groups, ...)",
    )
    parser.add_argument(
        "--passes",
        default=PASSES,
        type=listed(PASSES),
        help=f"comma-separated, of {', '.join(PASSES)} (default: all)",
    )
    parser.add_argument(
        "--dtypes",
        default=["float16"],
        type=listed(DTYPE_BYTES),
        help=f"comma-separated, of {', '.join(DTYPE_BYTES)}",
    )
    parser.add_argument(
        "--providers",
        default=DEFAULT if gpu else DEFAULT[:1],
        type=available,
        help=f"of {', '.join(PROVIDERS)}, or package.module:function with the signature of F.conv2d; all but tridil need a GPU",
    )
    parser.add_argument(
        "--target",
        type=target_of,
        help="like cuda:90 (default), cuda:80, hip:gfx942: what kernels are compiled for; with a GPU it is the GPU's",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results.csv, the pages and pictures (default: perf/results/<device>)",
    )
    parser.add_argument(
        "--validate-model",
        action="store_true",
        help="compare the cost model's times with measured ones, on candidates of every "
        "layer; without a GPU: what it predicts, beside the roof",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of keeping the rows that are there"
    )
    args = parser.parse_args(argv)
    if args.suite == "branches":
        taken = {"--suite", "--target", "--out"}
        given = {
            f"--{name.replace('_', '-')}"
            for name, value in vars(args).items()
            if value != parser.get_default(name)
        }
        if other := ", ".join(sorted(given - taken)):
            parser.error(f"--suite branches takes --target and --out, got {other}")
    suite = args.suite or ("none" if args.shape or args.models else "quick")
    suite = "none" if suite == "branches" else suite
    args.layers = [
        w
        for dtype in args.dtypes
        for w in (workloads.suite(suite, dtype) if suite != "none" else [])
    ]
    args.layers += [
        workloads.Workload("shape", text, 1, parse_shape(text, dtype), "the command line")
        for dtype in args.dtypes
        for text in args.shape
    ]
    try:
        args.layers = [w for w in args.layers if all(_matches(w, text) for text in args.filter)]
    except (re.error, KeyError) as e:
        parser.error(f"--filter: {e.args[0]}")
    if not args.layers and not args.models and args.suite != "branches":
        parser.error(
            f"no layer of suite {suite!r} matches --filter {' '.join(map(repr, args.filter))}"
        )
    if gpu and args.target:
        parser.error(
            f"--target {args.target} is for machines without a GPU: with one, the target is the GPU's"
        )
    return args


def _matches(w, text: str) -> bool:
    column, equal, expression = text.partition("=")
    described = {
        "model": w.model,
        "layer": w.layer,
        "kind": w.kind,
        "count": w.count,
        "dtype": w.problem.dtype,
    } | layers.sizes(w.problem)
    if not equal or not re.fullmatch(r"[a-z_]+", column):
        return re.search(text, w.name) is not None
    if column not in described:
        raise KeyError(f"there is no column {column!r}: use {', '.join(described)}")
    value = str(described[column])
    return (re.fullmatch if value.isdigit() else re.search)(expression, value) is not None


def _same(workloads) -> list[list]:
    """The workloads of each convolution."""
    found: dict = {}
    for w in workloads:
        found.setdefault(w.problem, []).append(w)
    return list(found.values())


def _wanted(args, target: str, code: str, gpu, device) -> list[tuple]:
    """(workload or None, row) of all that is asked for, the machine's roofs first."""
    versions = {name: provider(name).version() for name in args.providers}

    def row(model, layer, kind, pass_, dtype, name, **more):
        layout = provider(name).layout if name in versions else "-"
        return (
            dict(
                model=model,
                layer=layer,
                kind=kind,
                count=1,
                dtype=dtype,
                layout=layout,
                provider=name,
                version=versions.get(name, torch.__version__),
                target=target,
                code=code,
                **{"pass": pass_},
            )
            | more
        )

    wanted = []
    if gpu:
        wanted += [
            (None, row("(machine)", what, "machine", what, dtype, "torch"))
            for dtype in args.dtypes
            for what in ("copy", "matmul")
        ]
    wanted += [
        (None, row(name, "(model)", "model", step, dtype, by))
        for name in args.models
        for dtype in args.dtypes
        if dtype != "float64"
        for step in networks.STEPS
        for by in args.providers
        if provider(by).model
    ]
    for w, *others in _same(args.layers):
        precision = precision_of(w.problem)
        described = layers.sizes(w.problem) | {
            "count": w.count,
            "also": "; ".join(other.name for other in others),
            "roof_ms": 1e3 * cost_model.roof(w.problem, device, precision),
        }
        wanted += [
            (w, row(w.model, w.layer, w.kind, pass_, w.problem.dtype, name, **described))
            for pass_ in args.passes
            for name in args.providers
        ]
    return wanted


def target_of(name: str) -> str:
    try:
        return drivers.check_target(name)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def main(argv=None, gpu: Gpu | None = None) -> int:
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if gpu is None and torch.cuda.is_available():
        torch.cuda.set_device(local)
        gpu = Gpu()
    args = arguments(argv, gpu)
    if not gpu:
        os.environ.update(TRITON_INTERPRET="1", TRIDIL_TARGET=args.target or drivers.ASSUMED)
    target, code, console = drivers.target(), fingerprint(), Console(quiet=rank > 0)
    if not console.is_terminal:
        console = Console(width=120, quiet=rank > 0)
    out = args.out or ROOT / "perf" / "results" / re.sub(
        r"\W+", "-", (gpu.describe()[0] if gpu else f"no-gpu-{target}").lower()
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"sweep.py: error: --out {out}: {e.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.suite == "branches":
        if rank:
            return 0
        clock = tuner.Gpu(torch.device("cuda", local)) if gpu else None
        return branches.run(target, (1, 2, 4), clock, out=out)
    device = gpu.spec(target) if gpu else devices.of_target(target)
    if args.validate_model:
        return validate.run(
            gpu, [w for w, *_ in _same(args.layers)], args.passes, device, out, console
        )
    path = out / (f"results.rank{rank}.csv" if rank else "results.csv")
    if args.fresh:
        path.unlink(missing_ok=True)
    try:
        old = read(path)
    except ValueError as e:
        print(f"sweep.py: {e}: start over with --fresh or give another --out", file=sys.stderr)
        raise SystemExit(2) from None
    done = set(old[old["failure"].isna()][list(IDENTITY)].itertuples(index=False, name=None))
    wanted = _wanted(args, target, code, gpu, device)
    # a layer stays on one rank
    units = list(dict.fromkeys(_unit(w, row) for w, row in wanted))
    mine = [(w, row) for w, row in wanted if units.index(_unit(w, row)) % world == rank]
    pending = [(w, row) for w, row in mine if _identity(row) not in done]
    console.print(
        f"{len(mine)} rows, {len(mine) - len(pending)} of them already in {path}", highlight=False
    )
    of_machine, of_models = (
        [row for w, row in pending if w is None and row["kind"] == kind]
        for kind in ("machine", "model")
    )
    of_layers = [(w, row) for w, row in pending if w is not None]
    if gpu:
        rows = chain(
            machine_rows(gpu, of_machine),
            networks.gpu_rows(gpu, of_models),
            layers.gpu_rows(gpu, of_layers, device),
        )
    else:
        rows = chain(networks.counted_rows(of_models, device), layers.cpu_rows(of_layers, device))
    # a generator: closing it closes the one that runs
    stopped = _append(path, pending, (row for row in rows), console)
    frame = read(path)
    if world > 1 and not stopped:
        frame = _gathered(frame, rank, world)
        if rank:
            return int(is_broken(frame).any())
    frame = with_ratio(frame)
    frame.to_csv(path.with_suffix(".tmp"), index=False)
    path.with_suffix(".tmp").replace(path)
    order = {_identity(row): i for i, (_, row) in enumerate(wanted)}
    place = pd.Series(
        [order.get(key) for key in frame[list(IDENTITY)].itertuples(index=False, name=None)],
        index=frame.index,
        dtype=float,
    )
    frame = frame.loc[place.dropna().sort_values().index]
    if len(frame):
        report(
            frame,
            machine_line(*(gpu.describe() if gpu else NO_GPU), target),
            [] if gpu else [NOT_MEASURED],
            out,
            console,
        )
    if stopped:
        console.print(
            f"{stopped}: {len(frame)} of {len(wanted)} rows are done; the same command goes on from there"
        )
        return 130 if stopped == "interrupted" else 1
    return int(is_broken(frame).any())


def _identity(row) -> tuple:
    return tuple(row[name] for name in IDENTITY)


def _unit(workload, row) -> tuple:
    return row["model"], row["layer"], row["dtype"], "" if workload else row["pass"]


def _gathered(frame: pd.DataFrame, rank: int, world: int) -> pd.DataFrame:
    """The rows of all ranks."""
    from torch import distributed

    distributed.init_process_group("gloo")
    parts: list = [None] * world
    distributed.all_gather_object(parts, frame.to_dict("records"))
    distributed.destroy_process_group()
    return pd.DataFrame([row for part in parts for row in part], columns=list(COLUMNS))


def _append(path: Path, pending: list, rows, console: Console) -> str | None:
    """Appends each row to the CSV as it comes; None, or what ended it early."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    is_new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file, closing(rows), bar:
        writer = csv.DictWriter(file, list(COLUMNS))
        if is_new:
            writer.writeheader()
        task = bar.add_task("", total=len(pending))
        try:
            for _, row in pending:
                bar.update(
                    task,
                    description=f"{row['model']} {row['layer']}"[:36]
                    + f" {row['pass']} {row['provider']}",
                )
                found = next(rows)
                # the interpreter and the compiling worker read sources late
                if fingerprint() != row["code"]:
                    return "the sources changed under the sweep"
                writer.writerow(found)
                file.flush()
                bar.advance(task)
        except KeyboardInterrupt:
            return "interrupted"
    return None


if __name__ == "__main__":
    sys.exit(main())
