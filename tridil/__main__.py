"""The command line: `python -m tridil info | explain | aot` (also the console script `tridil`)."""
from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import __version__, dispatch
from .problem import PASSES, Problem, problem_of


def info(args) -> int:
    """Versions, devices, target and backends."""
    try:
        import triton
        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    small = Problem(1, 16, 8, 8, 16, 3, 3, dilation=(2, 2))
    print(f"tridil {__version__}  python {platform.python_version()}  torch {torch.__version__}  triton {triton_version}")
    print(f"target {dispatch.target()}{' (interpreted)' if dispatch.interpreted() else ''}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        print(f"{str(device):8} {name}: auto runs {dispatch.choose(small, device)}; triton {dispatch.can_run(small, device) or 'can run'}")
    return 0


def parse_shape(text: str, dtype: str = "float16", layout: str = "nhwc") -> Problem:
    """Problem of e.g. "n=4 c=256 h=60 w=60 k=256 r=3 d=12": also s, stride, pad, g; pairs as "d=12,6"; pad defaults to d*(r-1)//2.

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
        raise ValueError(f"shape {text!r} has unknown names {sorted(unknown)} and lacks {sorted(missing)}: use n c h w k r s d g stride pad")
    one = {name: values.get(name, (default,))[0] for name, default in (("n", 1), ("c", 0), ("h", 0), ("w", 0), ("k", 0), ("r", 3), ("g", 1))}
    s = values.get("s", (one["r"],))[0]
    dilation, stride = values.get("d", (1,)), values.get("stride", (1,))
    d_h, d_w = dilation[0], dilation[-1]
    pad = values.get("pad", (d_h * (one["r"] - 1) // 2, d_w * (s - 1) // 2))
    if one["g"] < 1 or one["c"] % one["g"]:
        raise ValueError(f"c (={one['c']}) must be a multiple of g (={one['g']})")
    return problem_of((one["n"], one["c"], one["h"], one["w"]), (one["k"], one["c"] // one["g"], one["r"], s), None,
                      stride, pad, dilation, one["g"], dtype, layout)


def explain(args) -> int:
    """What runs for one layer, and why."""
    problem = parse_shape(args.shape, args.dtype)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(problem.key(), f"-> {problem.p}x{problem.q}, target {args.target or dispatch.target()}, {device}")
    for row in dispatch.explain(problem, device, args.backend, args.target):
        macs = "  ".join(f"{name} {row[name + '_macs'] / 1e6:.4g}M" for name in ("dense", "useful", "executed"))
        print(f"{row['pass']}: {row['backend']} ({row['why']})\n  kernel {row['kernel']} ({row['kernel_why']}): {row['config']}\n"
              f"  config from: {row['source']}\n  MACs (counted): {macs}")
    return 0


def aot(args) -> int:
    """Compiles the default kernels of a suite or a shape for a target and reads the machine code; status 1 when one spills or exceeds a limit."""
    import pandas as pd

    from . import workloads
    from .aot import report
    from .config import describe, device_limits
    target = args.target or dispatch.target()
    layers = [(args.shape, parse_shape(args.shape, args.dtype))] if args.shape else \
        [(w.name, w.problem) for w in workloads.suite(args.suite, args.dtype)]
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    # the format of the results as layers give it: dw that of nn.Conv2d's weight
    jobs = [(name, replace(p, layout="nchw" if pass_ == "wgrad" else "nhwc"), pass_) for name, p in layers for pass_ in args.passes.split(",")]
    rows = report(jobs, target, args.save)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    bad = [row for row in rows if row.get("failure") or row["spills"] or row["shared_bytes"] > device_limits(target)[1]]
    frame = pd.DataFrame([dict(row, layer=row["layer"][:40], config=describe(row["config"]) if row.get("config") else "", loads=str(row.get("loads")),
                               **{"executed/useful": round(row.get("executed_macs", 0) / row["useful_macs"], 3)}) for row in rows])
    columns = ("layer", "pass", "kernel", "config", "registers", "spills", "shared_bytes", "ctas_per_sm", "mma", "loop_instructions", "per_fma",
               "overhead", "cutlass", "bound", "limiter", "l2_bytes_per_fma", "loads", "executed/useful", "failure")
    with pd.option_context("display.width", None, "display.max_columns", None, "display.max_rows", None, "display.max_colwidth", 90):
        print(frame[[name for name in columns if name in frame]].astype(object).fillna("").to_string(index=False))
    print(f"{len(rows)} kernels for {target}, {len(bad)} that spill, exceed a limit or fail\noverhead: warp instructions of the main loop that are "
          "not products, per 2048 FMA; cutlass: the same of CUTLASS 4.2. All figures are static, none is a time")
    return int(len(bad) > 0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="tridil", description="Triton kernels for dilated convolution")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(run=info)
    for name, run in (("explain", explain), ("aot", aot)):
        sub = commands.add_parser(name, help=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument("--shape", required=name == "explain", help='e.g. "n=4 c=256 h=60 w=60 k=256 r=3 d=12"; also s, stride, pad, g')
        sub.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32", "float64"))
        sub.add_argument("--target", help="like cuda:80, cuda:90, hip:gfx942 (default: the active driver's, or TRIDIL_TARGET)")
    commands.choices["explain"].add_argument("--backend", default="auto", choices=dispatch.BACKENDS)
    commands.choices["explain"].add_argument("--device", help="torch device of the tensors (default: cuda if there is one)")
    commands.choices["aot"].add_argument("--suite", default="quick", help="suite of tridil.workloads")
    commands.choices["aot"].add_argument("--passes", default=",".join(PASSES))
    commands.choices["aot"].add_argument("--json", help="write the rows to this file")
    commands.choices["aot"].add_argument("--save", help="keep PTX and SASS in this folder")
    args = parser.parse_args(argv)
    try:
        dispatch.check_target(getattr(args, "target", None) or dispatch.target())
        return args.run(args)
    except (ValueError, NotImplementedError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    sys.exit(main())
