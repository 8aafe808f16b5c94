"""The command line: `python -m tridil info | explain | aot | tune | cache` (also the console script
`tridil`)."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__, cache, cost_model, devices, drivers, tuner, verdict, workloads
from . import config as cfg
from .aot import report
from .branches import Branches
from .problem import PASSES, Problem, problem_of
from .workloads import SUITES

DTYPE, LAYOUT = "float16", "nhwc"  # where options give none


def info(args: argparse.Namespace) -> int:
    """Versions, devices, target and backends."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    small = Problem(1, 16, 8, 8, 16, 3, 3, dilation=(2, 2))
    print(
        f"tridil {__version__}  python {platform.python_version()}  torch {torch.__version__}  triton {triton_version}"
    )
    print(f"target {drivers.target()}{' (interpreted)' if drivers.interpreted() else ''}")
    devices = [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]
    for device in devices:
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        print(
            f"{str(device):8} {name}: auto runs {drivers.choose(small, device)}; triton {drivers.can_run(small, device) or 'can run'}"
        )
        if device.type == "cuda":
            print(f"         {measured_on(name)}")
    return 0


def measured_on(name: str) -> str:
    """What was measured on a GPU of that name, and what to run next."""
    target, counts = drivers.target(), []
    for table, entries in (
        ("your cache", cache.user(target)),
        ("the shipped table", cache.shipped(target)),
    ):
        records = [records[name] for records in entries.values() if name in records]
        fresh = sum(map(cache.is_fresh, records))
        counts += [
            (
                f"{fresh} passes in {table}"
                + (
                    f" and {len(records) - fresh} by other sources, which are hints"
                    if fresh < len(records)
                    else ""
                ),
                fresh,
            )
        ]
    known = sum(fresh for _, fresh in counts)
    advice = (
        ""
        if known
        else "; until then tiles and backend are predicted. To measure: python -m tridil tune --suite deeplab, or --model package.module:factory"
    )
    return f"measured: {', '.join(text for text, _ in counts)} ({cache.path(target)}){advice}"


def alone(args: argparse.Namespace, name: str, *others: str) -> None:
    """Raises ValueError where the option `name` makes others void that were given."""
    if given := [f"--{other}" for other in others if getattr(args, other) is not None]:
        raise ValueError(f"--{name} makes {', '.join(given)} void: leave that out")


def parse_shape(text: str, dtype: str = DTYPE, layout: str = LAYOUT) -> Problem:
    """Problem of e.g. "n=4 c=256 h=60 w=60 k=256 r=3 d=12": also s, stride, pad, g; pairs as
    "d=12,6"; pad defaults to d*(r-1)//2, of four numbers they are top, bottom, left, right.

    Raises ValueError for unknown or missing names.
    """
    values = {}
    for item in text.replace(";", " ").split():
        name, _, value = item.partition("=")
        try:
            values[name] = tuple(int(v) for v in value.split(","))
        except ValueError:
            raise ValueError(f"cannot read {item!r}: expected name=int or name=int,int") from None
    unknown = set(values) - set("n c h w k r s d g stride pad".split())
    missing = set("c h w k".split()) - set(values)
    if unknown or missing:
        raise ValueError(
            f"shape {text!r} has unknown names {sorted(unknown)} and lacks {sorted(missing)}: use n c h w k r s d g stride pad"
        )
    one = {
        name: values.get(name, (default,))[0]
        for name, default in (("n", 1), ("c", 0), ("h", 0), ("w", 0), ("k", 0), ("r", 3), ("g", 1))
    }
    s = values.get("s", (one["r"],))[0]
    dilation, stride = values.get("d", (1,)), values.get("stride", (1,))
    d_h, d_w = dilation[0], dilation[-1]
    pad = values.get("pad", (d_h * (one["r"] - 1) // 2, d_w * (s - 1) // 2))
    if one["g"] < 1 or one["c"] % one["g"]:
        raise ValueError(f"c (={one['c']}) must be a multiple of g (={one['g']})")
    four = len(pad) == 4
    problem = problem_of(
        (one["n"], one["c"], one["h"] + four * sum(pad[:2]), one["w"] + four * sum(pad[2:])),
        (one["k"], one["c"] // one["g"], one["r"], s),
        None,
        stride,
        0 if four else pad,
        dilation,
        one["g"],
        dtype,
        layout,
    )
    top, bottom, left, right = pad if four else (0, 0, 0, 0)
    sides = (top, bottom), (left, right)
    return replace(problem, h=one["h"], w=one["w"], padding=sides) if four else problem


def explain(args: argparse.Namespace) -> int:
    """What runs for one layer, or for a model, and why; what a model gains."""
    if (args.shape is None) == (args.model is None):
        raise ValueError("explain takes --shape for one layer, or --model for a network")
    if args.model is not None:
        alone(args, "model", "backend")
        if args.input is None:
            alone(args, "model without --input", "dtype", "layout")
        model, inputs = model_and_input(args)
        found = verdict.verdict_of(
            verdict.counts_of(model, *inputs),
            device_of(args.device) if torch.cuda.is_available() else None,
            args.target or (None if torch.cuda.is_available() else drivers.target()),
        )
        print(verdict.verdict_text(found))
        return 0
    alone(args, "shape", "input")
    problem = parse_shape(args.shape, args.dtype or DTYPE, args.layout or LAYOUT)
    print(verdict.text_of(problem, device_of(args.device), args.backend or "auto", args.target))
    return 0


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the first GPU, or the CPU. Raises ValueError for one that is not
    there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"--device {name}: {first_line(e)}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs here; for one that is not: --target cuda:90"
        )
    return device


def first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def passes_of(text: str) -> list[str]:
    """ "fprop,wgrad" -> its names. Raises ValueError for others than the three passes."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PASSES]:
        raise ValueError(f"--passes {text}: {unknown} are not of {', '.join(PASSES)}")
    return names


def model_and_input(args: argparse.Namespace) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """(model, inputs) of --model, with --input on the meta device: neither weights nor results take
    memory or time. Raises ValueError that says what is wrong."""
    if args.input is None:
        model, *inputs = model_of(args.model)
        return model, tuple(inputs)
    try:
        shape = tuple(map(int, args.input.split(",")))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise ValueError(f"--input takes sizes such as 8,3,512,512, got {args.input!r}")
    with torch.device("meta"):
        model = made(args.model, "a function that returns a module")
    model = model[0] if isinstance(model, tuple) and model else model
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{args.model} must return a module, got {type(model).__name__}")
    dtype = getattr(torch, args.dtype or DTYPE)
    last = (args.layout or LAYOUT) == "nhwc" and len(shape) == 4
    x = torch.empty(shape, dtype=dtype, device="meta")
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    try:
        model = model.to("meta", dtype)
        if last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model(x)
    except Exception as e:  # it is the user's code
        raise ValueError(
            f"--model {args.model} does not run on --input {args.input}: {first_line(e)}"
        ) from e
    return model, (x,)


def made(text: str, usage: str) -> Any:
    """What the factory of "package.module:factory" returns."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name, None) if module and name else None
        subject = factory() if callable(factory) else None
    # it is the user's code
    except Exception as e:
        raise ValueError(f"--model {text}: {type(e).__name__}: {first_line(e)}") from e
    if not callable(factory):
        raise ValueError(f"--model takes package.module:factory, {usage}, got {text!r}")
    return subject


def model_of(text: str) -> tuple[Any, ...]:
    """(module, *inputs) of "package.module:factory". Raises ValueError that says what is wrong."""
    subject = made(text, "a function that returns (module, inputs)")
    if not isinstance(subject, tuple) or len(subject) != 2:
        raise ValueError(f"{text} must return (module, inputs), got {type(subject).__name__}")
    module, inputs = subject
    return (module, *inputs) if isinstance(inputs, (tuple, list)) else (module, inputs)


def writable(path: str | None) -> None:
    """Raises ValueError where no file of that name can be written."""
    if path is None:
        return
    parent = Path(path).absolute().parent
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {parent} is no folder that may be written to")


def tune(args: argparse.Namespace) -> int:
    """Measures the fastest configs of a suite, a layer or a model on this GPU and keeps them; under
    torchrun each rank measures its part."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    passes = passes_of(args.passes)
    dtype, layout = args.dtype or DTYPE, args.layout or LAYOUT
    if args.model is not None:
        alone(args, "model", "shape", "suite", "dtype", "layout")
        subject = model_of(args.model)
    elif args.shape is not None:
        alone(args, "shape", "suite")
        subject = ([parse_shape(args.shape, dtype, layout)],)
    else:
        subject = ([w.problem for w in workloads.suite(args.suite or "quick", dtype, layout)],)
    try:
        rows = tuner.tune(
            *subject,
            passes=passes,
            top=args.top,
            budget=args.budget,
            force=args.force,
        )
    except RuntimeError as e:
        print(f"tridil tune: {e}", file=sys.stderr)
        return 1
    rows = tuner.rows_of_all_ranks(rows)
    if int(os.environ.get("RANK", 0)) == 0:
        for row in rows:
            result = (
                "every candidate was rejected"
                if row["config"] is None
                else f"{row['ms']:.4f} ms {cfg.describe(row['config'])}"
            )
            print(
                f"{row['problem'].key()} | {row['pass']}: {result}; ATen {row['aten_ms'] or float('nan'):.4f} ms; {row['tried']} tried, "
                f"{len(row['rejected'])} rejected"
            )
        print(f"{len(rows)} measured, kept in {cache.path(drivers.target())}")
    return int(any(row["config"] is None for row in rows))


def show_cache(args: argparse.Namespace) -> int:
    """Shows the measured configs, merges tables from other machines, exports them."""
    if args.action == "merge":
        if args.target:
            raise ValueError("merge takes the target of each file: leave --target out")
        if not args.files:
            raise ValueError("merge takes the files to merge, got none")
        for file in map(Path, args.files):
            if not file.exists():
                raise ValueError(f"there is no file {file}")
            target, entries = cache.load(file)
            kept = cache.add(target, entries)
            print(
                f"{file}: {len(entries)} entries for {target} {'merged into' if kept else 'could not be written to'} {cache.path(target)}"
            )
            if not kept:
                return 1
        return 0
    if args.action == "show" and args.files:
        raise ValueError(f"show takes no file, got {args.files}: merge or export does")
    target = args.target or drivers.target()
    entries = cache.merge(cache.shipped(target), cache.user(target))
    if args.action == "export":
        if len(args.files) != 1:
            raise ValueError(f"export takes one file, got {args.files}")
        writable(args.files[0])
        cache.write(Path(args.files[0]), target, entries)
        print(f"{len(entries)} entries for {target} written to {args.files[0]}")
        return 0
    for key, records in entries.items():
        for device, r in records.items():
            print(
                f"{key} | {device}: {r['ms']:.4f} ms, ATen {r.get('aten_ms') or float('nan'):.4f} ms | {written(r['config'])} | {r['date'][:10]}"
                f"{'' if cache.is_fresh(r) else ' (stale: a hint only)'}"
            )
    print(f"{len(entries)} entries for {target} in {cache.path(target)} and the shipped table")
    return 0


def written(config: dict[str, Any]) -> str:
    """`config.describe` of a config as files have it."""
    try:
        return cfg.describe(
            cfg.from_json(config, "wgrad" if "BLOCK_M" in config or "ROWS" in config else "fprop")
        )
    except ValueError as e:
        return f"not of this version ({e})"


def seconds(text: str) -> float:
    """60, 60s, 10m or 1h as seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        value = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 60s, 10m or 1h, got {text!r}")
    return value


def aot(args: argparse.Namespace) -> int:
    """Compiles the default kernels of a suite or a shape for a target and reads the machine code;
    status 1 when one spills or exceeds a limit."""
    try:
        import pandas as pd
    except ImportError:
        raise ValueError("aot prints its table with pandas: pip install pandas") from None
    passes = passes_of(args.passes)
    writable(args.json)
    if args.shape is not None:
        alone(args, "shape", "suite")
    if args.suite not in (None, "branches", *SUITES):
        raise ValueError(f"unknown suite {args.suite!r}: use one of {', '.join(SUITES)}, branches")
    target, dtype = args.target or drivers.target(), args.dtype or DTYPE

    # the format of the results as layers give it: dw that of nn.Conv2d's weight, which with one
    # channel per group is that of x
    def layout(problem: Problem, pass_: str) -> str:
        return "nchw" if pass_ == "wgrad" and problem.c > problem.groups else "nhwc"

    jobs: list[tuple[str, Problem | Branches, str]]
    if args.suite == "branches":
        spec = devices.of_target(target)
        jobs = [
            (name, replace(joined, problems=problems), pass_)
            for name, joined in workloads.branches(dtype).items()
            for pass_ in passes
            for problems in [tuple(replace(p, layout=layout(p, pass_)) for p in joined.problems)]
            if cost_model.best_of_branches(joined, pass_, spec)
        ]
    else:
        layers = (
            [(args.shape, parse_shape(args.shape, dtype))]
            if args.shape is not None
            else [(w.name, w.problem) for w in workloads.suite(args.suite or "quick", dtype)]
        )
        jobs = [
            (name, replace(p, layout=layout(p, pass_)), pass_)
            for name, p in layers
            for pass_ in passes
        ]
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    rows = report(jobs, target, args.save)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    bad = [
        row
        for row in rows
        if row.get("failure")
        or row["spills"]
        or row["shared_bytes"] > devices.of_target(target).limits[1]
    ]
    frame = pd.DataFrame(
        [
            dict(
                row,
                layer=row["layer"][:40],
                config=written(row["config"]) if row.get("config") else "",
                loads=str(row.get("loads")),
                **{"executed/useful": round(row.get("executed_macs", 0) / row["useful_macs"], 3)},
            )
            for row in rows
        ]
    )
    columns = (
        "layer",
        "pass",
        "kernel",
        "config",
        "registers",
        "spills",
        "shared_bytes",
        "ctas_per_sm",
        "mma",
        "loop_instructions",
        "per_fma",
        "overhead",
        "cutlass",
        "bound",
        "limiter",
        "l2_bytes_per_fma",
        "loads",
        "executed/useful",
        "failure",
    )
    with pd.option_context(
        "display.width",
        None,
        "display.max_columns",
        None,
        "display.max_rows",
        None,
        "display.max_colwidth",
        90,
    ):
        print(
            frame[[name for name in columns if name in frame]]
            .astype(object)
            .fillna("")
            .to_string(index=False)
        )
    print(
        f"{len(rows)} kernels for {target}, {len(bad)} that spill, exceed a limit or fail\noverhead: warp instructions of the main loop that are "
        "not products, per 2048 FMA; cutlass: the same of CUTLASS 4.2. All figures are static, none is a time"
    )
    return int(len(bad) > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tridil", description="Triton kernels for dilated convolution"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(run=info)
    for name, run in (("explain", explain), ("aot", aot), ("tune", tune)):
        sub = commands.add_parser(name, help=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--shape",
            help='e.g. "n=4 c=256 h=60 w=60 k=256 r=3 d=12"; also s, stride, pad, g',
        )
        sub.add_argument(
            "--dtype",
            choices=("float16", "bfloat16", "float32", "float64"),
            help=f"default: {DTYPE}",
        )
        if name != "aot":
            sub.add_argument(
                "--layout",
                choices=("nhwc", "nchw"),
                help=f"memory format of the results (default: {LAYOUT})",
            )
        if name != "tune":
            sub.add_argument(
                "--target",
                help="like cuda:80, cuda:90, hip:gfx942 (default: the active driver's, or TRIDIL_TARGET)",
            )
        if name != "explain":
            sub.add_argument(
                "--suite",
                help="suite of tridil.workloads, by default quick: "
                + ", ".join(SUITES)
                + ("; branches: several rates in one launch" if name == "aot" else ""),
            )
            sub.add_argument("--passes", default=",".join(PASSES))
    commands.choices["explain"].add_argument(
        "--model",
        help="package.module:factory, a function that returns a module (with --input) or (module, inputs)",
    )
    commands.choices["explain"].add_argument(
        "--input", metavar="N,C,H,W", help="sizes of the model's input; nothing is computed"
    )
    commands.choices["explain"].add_argument("--backend", choices=drivers.BACKENDS)
    commands.choices["explain"].add_argument(
        "--device", help="torch device of the tensors (default: cuda if there is one)"
    )
    commands.choices["aot"].add_argument("--json", help="write the rows to this file")
    commands.choices["aot"].add_argument("--save", help="keep PTX and SASS in this folder")
    sub = commands.choices["tune"]
    sub.add_argument(
        "--model",
        help="package.module:factory, a function that returns (module, inputs): its convolutions are measured",
    )
    sub.add_argument("--top", type=int, default=8, help="candidates a pass, the cost model's best")
    sub.add_argument(
        "--budget",
        type=seconds,
        help="stop after this time, e.g. 60s or 10m; the same command goes on from there",
    )
    sub.add_argument("--force", action="store_true", help="measure again what was measured")
    sub = commands.add_parser("cache", help=show_cache.__doc__)
    sub.set_defaults(run=show_cache)
    sub.add_argument("action", nargs="?", default="show", choices=("show", "merge", "export"))
    sub.add_argument(
        "files",
        nargs="*",
        help="merge: tables to merge into this user's; export: the file to write",
    )
    sub.add_argument("--target", help="like cuda:90 (default: the active driver's)")
    args = parser.parse_args(argv)
    try:
        if target := getattr(args, "target", None):
            drivers.check_target(target)
        drivers.target()  # TRIDIL_TARGET is checked before work begins
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    # MemoryError: tables of the tiles of a map of 10^12 pixels
    except (ValueError, NotImplementedError, OSError, MemoryError) as e:
        print(f"tridil {args.command}: error: {first_line(e)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
