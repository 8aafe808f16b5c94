"""Bytes that the kernels of depthwise and grouped layers load and store, counted by an emulator of
the compiled code on reduced copies, against those that the sweep reports: equal for direct kernels,
an upper bound for tiles of matrix products. `emulated_bytes.py 80 [N]`: every N-th layer."""

import sys
from dataclasses import replace
from pathlib import Path

import ptxemu

ptxemu.install(int(sys.argv[1]), halo="ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "perf"))

import layers  # noqa: E402

from tridil import config, cost_model, drivers, launch, testing, workloads  # noqa: E402
from tridil.problem import PASSES  # noqa: E402

# lanes' copies to shared memory count in both
LANES, BOXES = ("global_load_bytes", "global_store_bytes"), ("g2s_bytes", "s2g_bytes")
for pass_ in PASSES:
    seen, worst = set(), 0.0
    for w in workloads.suite("depthwise")[:: int(sys.argv[2]) if sys.argv[2:] else 1]:
        cfg = cost_model.best(w.problem, pass_, drivers.target())
        memory, _ = config.moved_bytes(w.problem, pass_, cfg)
        if w.kind == "depthwise" and pass_ != "wgrad":
            worst = max(worst, memory / w.problem.bytes)
        p, cfg = layers.reduced(w.problem, cfg, 512)
        p = replace(p, n=1)
        key = p, cfg
        if key in seen or config.fits(cfg, p, pass_, drivers.target()):
            continue
        seen.add(key)
        x, weight, _, dy = testing.random_tensors(p)
        x, weight, dy = (t.to(memory_format=drivers.FORMATS[p.layout]) for t in (x, weight, dy))
        ptxemu.launches.clear()
        getattr(launch, pass_)(
            p, *{"fprop": (x, weight, None), "dgrad": (dy, weight), "wgrad": (dy, x)}[pass_], cfg
        )
        counted = sum(
            item.stats[name]
            for item in ptxemu.launches
            for name in LANES + BOXES * (cfg.kernel in ("tma", "hopper"))
        )
        reported = config.moved_bytes(p, pass_, cfg)[1]
        assert counted == reported if w.kind == "depthwise" else counted <= reported, (
            pass_,
            p.key(),
            cfg,
            counted,
            reported,
        )
    print(
        f"{pass_}: {len(seen)} geometries, bytes as reported on {drivers.target()}"
        + (
            f"; memory traffic / compulsory of depthwise layers at most {worst:.2f}"
            if worst
            else ""
        ),
        flush=True,
    )
    assert worst <= 1.3
