"""Parallel branches in one launch beside the same branches one by one: `python perf/branches.py
--target cuda:90`.

A row per set of branches, pass and batch: launches, programs, bytes from and to memory (counted),
and times: predicted, with a GPU (--measure) measured, too. One by one is what "auto" runs for each
branch, with the slices, sums and concatenations around it. Exit status 1 when a result is wrong,
130 after Ctrl-C: what was measured by then is summed up.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from math import exp, log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from tridil import choice, devices, drivers, families, tuner, workloads  # noqa: E402
from tridil import config as cfg  # noqa: E402
from tridil.branches import Branches  # noqa: E402
from tridil.problem import PASSES  # noqa: E402

MEASURED = ("measured_us", "measured_apart_us", "measured_aten_us", "right")


def row_of(name: str, branches: Branches, pass_: str, target: str) -> tuple[dict, object]:
    """(what is counted and predicted of a pass, the config of its launch; None where there is no
    such launch)."""
    device, precision = devices.of_target(target), "tf32"
    config, together, apart = choice.decide_branches(branches, pass_, target, precision)
    one_by_one = [choice.decide(p, pass_, target, precision) for p in branches.problems]
    row = {
        "branches": name,
        "n": branches.first.n,
        "pass": pass_,
        "kernel": None,
        "programs": None,
        "launches": None,
        "launches_apart": sum(
            1 if c.backend == "aten" else len(plan(p, pass_, c.config, precision))
            for p, c in zip(branches.problems, one_by_one)
        )
        + (branches.bytes_around[pass_] > 0),
        "MB": branches.bytes / 1e6,
        "MB_apart": (sum(p.bytes for p in branches.problems) + branches.bytes_around[pass_]) / 1e6,
        "predicted_us": None,
        "predicted_apart_us": 1e6 * apart,
        "apart_runs": "+".join(sorted({c.backend for c in one_by_one})),
    }
    if config:
        family = families.of(config.kernel)
        launches = family.branch_plan(branches, pass_, config, "ieee", "")
        programs = launches[0].grid[0]
        row |= {
            "kernel": f"{config.kernel} {cfg.describe(config)}",
            "programs": programs,
            "idle_SMs": max(0, device.sms - programs) / device.sms,
            "launches": len(launches),
            "predicted_us": 1e6 * together,
        }
    return row, config


def plan(problem, pass_, config, precision):
    precision = precision if problem.dtype == "float32" else "ieee"
    return families.of(config.kernel).plan(problem, pass_, config, precision, "")


def measured(branches: Branches, pass_: str, config, gpu) -> dict:
    """Times on a GPU in us, of one launch, and one by one by tridil's kernels and by ATen, with what
    is around them; and whether the launch's results are right."""
    row = tuner.measure_branches(branches, pass_, [config], gpu)
    times = {"": row["ms"], "apart_": row["kernels_ms"], "aten_": row.get("aten_ms")}
    return {f"measured_{name}us": ms and 1e3 * ms for name, ms in times.items()} | {
        "right": row["config"] is not None
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default=None, help="like cuda:90 (default: this machine's)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4], help="images")
    parser.add_argument("--measure", action="store_true", help="measure, too: needs a GPU")
    parser.add_argument(
        "--seconds", type=float, help="measure no further pass after this time (default: all)"
    )
    args = parser.parse_args(argv)
    if args.measure and (args.target or not torch.cuda.is_available()):
        parser.error("--measure needs a GPU, and measures on that one alone: leave --target out")
    try:
        target = drivers.check_target(args.target) if args.target else drivers.target()
    except ValueError as e:
        parser.error(str(e))
    if min(args.batch, default=0) < 1:
        parser.error(f"--batch takes positive numbers of images, got {args.batch}")
    gpu = tuner.Gpu(torch.device("cuda", torch.cuda.current_device())) if args.measure else None
    return run(target, args.batch, gpu, args.seconds)


def run(
    target: str,
    batches,
    gpu: tuner.Gpu | None,
    seconds: float | None = None,
    out: Path | None = None,
) -> int:
    """Prints the table of all sets of branches for a target, each with so many images, and keeps it
    as out/branches.csv; with a GPU, measured until `seconds` are over. The exit status."""
    rows: list = []
    status = 0
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)
    for name, found in workloads.branches().items():
        for n in batches:
            some = replace(found, problems=tuple(replace(p, n=n) for p in found.problems))
            for pass_ in PASSES:
                row, config = row_of(name, some, pass_, target)
                if gpu and config and time.monotonic() < deadline:
                    try:
                        row |= measured(some, pass_, config, gpu)
                    except KeyboardInterrupt:  # the rest is predicted still
                        status, deadline = 130, 0.0
                rows.append(row)
    table = pd.DataFrame(rows)
    if out:
        table.to_csv(out / "branches.csv", index=False)
    print(f"predicted and counted for {devices.of_target(target).name}, fp16, channels_last\n")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}", na_rep="-"))
    joined = table.dropna(subset=["predicted_us"])
    sums = joined.groupby(["branches", "n"])[["predicted_us", "predicted_apart_us"]].sum()
    share = (sums["predicted_us"] / sums["predicted_apart_us"]).rename("share of the time")
    print("\nforward and backward, predicted: one launch a pass / one by one")
    print(share.unstack().to_string(float_format=lambda x: f"{x:.2f}"))
    if gpu is None:
        return 0
    right = verdict(table.reindex(columns=list(dict.fromkeys([*table, *MEASURED]))))
    return status or int(not right)


def verdict(table: pd.DataFrame) -> bool:
    """Prints what the measured passes say; whether all results were right."""
    found = table.dropna(subset=["right"])
    ours, *others = (found[name].astype(float) for name in MEASURED[:3])
    shares = (ours / pd.concat(others, axis=1).min(axis=1)).dropna()
    mean = exp(sum(map(log, shares)) / len(shares)) if len(shares) else float("nan")
    wrong = int((~found["right"].astype(bool)).sum())
    print(
        f"\none launch takes {mean:.2f} of the time of the faster way one by one (geometric mean of {len(shares)} passes, measured), "
        f"less in {int((shares < 1).sum())}; "
        + (f"{wrong} WRONG or failed" if wrong else "all right")
    )
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
