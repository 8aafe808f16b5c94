"""Which config the cost model picks for every pass of every workload in fp16 and fp32, its launches
and its multiply-accumulates: what compare.py --picks compares. Imports the tridil of PYTHONPATH."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tridil import config, cost_model, families, workloads


def picks(targets: list[str]) -> dict[str, list]:
    """ "target pass problem" -> [config, MACs, launches]."""
    found = {}
    problems = [w.problem for dtype in ("float16", "float32") for w in workloads.load(dtype)]
    for target in targets:
        for problem in dict.fromkeys(problems):
            for pass_ in ("fprop", "dgrad", "wgrad"):
                best = cost_model.best(problem, pass_, target, "tf32")
                precision = "tf32" if problem.dtype == "float32" else "ieee"
                plan = families.of(best.kernel).plan(problem, pass_, best, precision, "")
                found[f"{target} {pass_} {problem.key()}"] = [
                    f"{best.kernel} {config.describe(best)}",
                    config.executed_macs(problem, pass_, best),
                    [[launch.name, *launch.grid] for launch in plan],
                ]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--targets", required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.json.write_text(json.dumps(picks(args.targets.split(","))))
