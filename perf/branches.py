"""Parallel branches in one launch beside the same branches one by one: `python perf/branches.py
--target cuda:90`.

A row per set of branches, pass and batch: launches, programs, bytes from and to memory (counted),
and times: predicted, with a GPU (--measure) measured, too. One by one is what "auto" runs for each
branch, with the slices, sums and concatenations around it. Exit status 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from tridil import (  # noqa: E402
    choice,
    cost_model,
    devices,
    drivers,
    families,
    launch,
    multi_rate,
    passes,
    testing,
    tuner,
    workloads,
)
from tridil import config as cfg  # noqa: E402
from tridil.branches import Branches  # noqa: E402
from tridil.problem import PASSES  # noqa: E402


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
        launches = family.branch_plan(branches, pass_, config, "ieee", False)
        programs = family.branch_programs(branches, pass_, config)
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
    return families.of(config.kernel).plan(problem, pass_, config, precision, False)


def measured(branches: Branches, pass_: str, config, gpu) -> dict:
    """Times on a GPU in us, of one launch, and one by one by tridil's kernels and by ATen, with what
    is around them; and whether the launch's
    results are right."""
    x, dy = (
        testing.random_tensors(replace(branches.first, c=c, k=k, groups=1), gpu.device, seed)[place]
        for c, k, seed, place in (
            (branches.x_channels[-1], branches.y_channels[-1], 0, 0),
            (branches.x_channels[-1], branches.y_channels[-1], 1, 3),
        )
    )
    last = drivers.FORMATS[branches.first.layout]
    x, dy = (t.contiguous(memory_format=last) for t in (x, dy))
    ws = [gpu.tensors(p)[1] for p in branches.problems]
    a, b = {"fprop": (x, ws), "dgrad": (dy, ws), "wgrad": (dy, x)}[pass_]

    def kernels(p, a, b, bias):
        best = cost_model.best(p, pass_, gpu.spec, "ieee")
        return launch.prepare(p, pass_, best, "ieee")(a, b)

    def aten(p, a, b, bias):
        return passes.aten(p, pass_, a, b)

    runs = {
        "measured_us": launch.prepare_branches(branches, pass_, config, "ieee"),
        "measured_apart_us": lambda a, b: multi_rate.one_by_one(
            branches, pass_, a, b, None, kernels
        ),
        "measured_aten_us": lambda a, b: multi_rate.one_by_one(branches, pass_, a, b, None, aten),
    }

    def exact(p, a, b, bias):
        return gpu.reference(p, pass_, a, b)

    got, expected = (
        runs["measured_us"](a, b),
        multi_rate.one_by_one(branches, pass_, a, b, None, exact),
    )
    depth, right = sum(testing.reduction_depth(p, pass_) for p in branches.problems), True
    for one, wanted in zip(*([t] if torch.is_tensor(t) else t for t in (got, expected))):
        allowed = testing.budget(wanted, one.dtype, depth, "ieee", pass_)
        right &= bool(((one.double() - wanted).abs() <= allowed).all())
    # filters of fprop and dgrad are the same in all rounds: a network has them in L2, too
    return {
        name: 1e3 * gpu.milliseconds(partial(alone, run, b) if b is ws else run, a, x)
        for name, run in runs.items()
    } | {"right": right}


def alone(run, filters, a, _):
    return run(a, filters)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default=None, help="like cuda:90 (default: this machine's)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4], help="images")
    parser.add_argument("--measure", action="store_true", help="measure, too: needs a GPU")
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
    rows = []
    for name, found in workloads.branches().items():
        for n in args.batch:
            some = replace(found, problems=tuple(replace(p, n=n) for p in found.problems))
            for pass_ in PASSES:
                row, config = row_of(name, some, pass_, target)
                rows.append(row | (measured(some, pass_, config, gpu) if gpu and config else {}))
    table = pd.DataFrame(rows)
    print(f"predicted and counted for {devices.of_target(target).name}, fp16, channels_last\n")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}", na_rep="-"))
    joined = table.dropna(subset=["predicted_us"])
    sums = joined.groupby(["branches", "n"])[["predicted_us", "predicted_apart_us"]].sum()
    share = (sums["predicted_us"] / sums["predicted_apart_us"]).rename("share of the time")
    print("\nforward and backward, predicted: one launch a pass / one by one")
    print(share.unstack().to_string(float_format=lambda x: f"{x:.2f}"))
    return int(gpu is not None and not table["right"].dropna().all())


if __name__ == "__main__":
    sys.exit(main())
