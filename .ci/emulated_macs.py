"""Executed MACs of the ASPP layers' default boxes, counted by an emulator of tensor-core
instructions, against what the sweep reports.

Channels are reduced to one tile and images to one box; neither changes executed/useful. Depthwise
layers run no tensor-core instruction: their count, which the interpreter's tests confirm, is the
sweep's.
"""

import sys
from dataclasses import replace

import ptxemu

ptxemu.install(int(sys.argv[1]), halo="ignore")

from tridil import config, cost_model, drivers, launch, testing, workloads  # noqa: E402
from tridil.problem import PASSES  # noqa: E402

for pass_ in PASSES:
    executed = useful = 0
    seen = {}
    for w in workloads.suite("aspp")[:: int(sys.argv[2]) if sys.argv[2:] else 1]:
        cfg = cost_model.best(w.problem, pass_, drivers.target())
        useful += w.problem.useful_macs
        if cfg.kernel == "depthwise":
            executed += config.executed_macs(w.problem, pass_, cfg)
            continue
        # one channel tile, of the smallest size that the family has
        size = 64 if cfg.kernel == "hopper" else 32
        p = replace(w.problem, n=min(w.problem.n, cfg.BLOCK_IMG), c=size, k=size)
        smallest = {
            "SPLIT_K": 1,
            "BLOCK_N": size,
            "BLOCK_M" if pass_ == "wgrad" else "BLOCK_K": size,
        }
        if cfg.kernel == "hopper":
            pingpong = pass_ == "wgrad" or cfg.BLOCK_IMG * cfg.BLOCK_P * cfg.BLOCK_Q <= 128
            smallest |= {"STREAM": False, "PINGPONG": pingpong}
        cfg = replace(cfg, **smallest)
        key = p, cfg
        if key not in seen:
            x, weight, bias, dy = testing.random_tensors(p)
            before = ptxemu.totals["macs"]
            getattr(launch, pass_)(
                p,
                *{"fprop": (x, weight, bias), "dgrad": (dy, weight), "wgrad": (dy, x)}[pass_],
                cfg,
            )
            seen[key] = ptxemu.totals["macs"] - before
            assert seen[key] == config.executed_macs(p, pass_, cfg), (
                pass_,
                p.key(),
                seen[key],
                config.executed_macs(p, pass_, cfg),
            )
        executed += seen[key] * w.problem.useful_macs / p.useful_macs
    print(
        f"{pass_}: {len(seen)} geometries, executed/useful {executed / useful:.3f} counted on {drivers.target()}",
        flush=True,
    )
    assert len(sys.argv) > 2 or executed / useful <= 1.10
