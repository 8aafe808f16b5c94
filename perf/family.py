"""A kernel family beside the best of the other kernels and cuDNN, where the model promises most:
`python perf/family.py hopper blackwell --seconds 25`.

A line per pass of a layer: the times of ATen, of the best prediction of the other families, of the
family's best predictions. A first look before anything is tuned; of several families the first
that runs on the GPU.
Exit status 1 when a result is wrong, 130 after Ctrl-C: what was measured by then is summed up.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import exp, log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from tridil import config, cost_model, drivers, families, testing, tuner, workloads  # noqa: E402
from tridil.problem import PASSES  # noqa: E402


def jobs_of(family, layers: list, gpu: tuner.Gpu, top: int) -> list:
    """[(layer, problem, pass, config of another family, configs of the family)], the passes where the
    predicted gain is largest first."""
    found = []
    for layer in layers:
        for pass_ in PASSES:
            p = layer.problem
            everything = cost_model.rank(p, pass_, gpu.spec, "ieee")
            ranked, others = (
                [cfg for cfg in everything if (cfg.kernel in family.kernels) == mine]
                for mine in (True, False)
            )
            # with equal steps and without the best
            kinds = [
                next((cfg for cfg in ranked if getattr(cfg, "STREAM", False) == stream), None)
                for stream in (False, True)
            ]
            configs = list(dict.fromkeys([*filter(None, kinds), *ranked]))[:top]
            if configs:
                before, after = (
                    cost_model.predict(p, pass_, cfgs[0], gpu.spec, "ieee").seconds
                    for cfgs in (others, ranked)
                )
                found.append(
                    (after / before, f"{layer.model} {layer.layer}", p, pass_, others[0], configs)
                )
    return [job[1:] for job in sorted(found, key=lambda job: job[0])]


def measure(
    p, pass_: str, other, configs: list, gpu: tuner.Gpu, compiled
) -> tuple[str, float | None, bool]:
    """(times in words, share of the other's time that the family's best takes or None, whether all
    results are right)."""
    x, w, _, dy = gpu.tensors(p)
    a, b = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    expected = gpu.reference(p, pass_, a, b)
    allowed = testing.budget(
        expected, getattr(torch, p.dtype), testing.reduction_depth(p, pass_), "ieee", pass_
    )
    told, times, right = [], {}, True
    for cfg in (None, other, *configs):
        name = "ATen" if cfg is None else f"{cfg.kernel} {config.describe(cfg)}"
        try:
            assert cfg is None or compiled(p, pass_, "ieee", cfg)
            run = gpu.prepare(p, pass_, cfg, "ieee")
            error = (run(a, b).double() - expected).abs()
            if cfg is not None and not bool((error <= allowed).all()):
                told.append(f"{name} WRONG by up to {error.nan_to_num(nan=float('inf')).max():.3g}")
                right = False
                continue
            times[cfg] = gpu.milliseconds(run, a, b)
            told.append(f"{name} {times[cfg]:.4f} ms")
        # what does not compile or launch is said, and the next one runs
        except Exception as e:
            told.append(f"{name} FAILED {type(e).__name__}: {str(e)[:150]}")
            right &= cfg is None
    best = min((times[cfg] for cfg in configs if cfg in times), default=None)
    return "; ".join(told), best / times[other] if best and other in times else None, right


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [family.kernels[0] for family in families.FAMILIES]
    parser.add_argument(
        "kernels", nargs="+", choices=names, metavar="kernel", help=", ".join(names)
    )
    parser.add_argument("--suite", default="quick", choices=workloads.SUITES)
    parser.add_argument("--layout", default="nhwc", choices=list(drivers.FORMATS))
    parser.add_argument(
        "--seconds", type=float, default=25, help="begin no pass after this time (default: 25)"
    )
    parser.add_argument(
        "--top", type=int, default=2, help="configs of the family for each pass (default: 2)"
    )
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    gpu = tuner.Gpu(torch.device("cuda", torch.cuda.current_device()))
    layers = workloads.suite(args.suite, layout=args.layout)
    found = ((name, jobs_of(families.of(name), layers, gpu, args.top)) for name in args.kernels)
    kernel, jobs = next((pair for pair in found if pair[1]), (" or ".join(args.kernels), []))
    shares, wrong, status = [], 0, 0
    try:
        with gpu.compiling(
            [
                (p, pass_, "ieee", cfg)
                for _, p, pass_, other, configs in jobs
                for cfg in (other, *configs)
            ]
        ) as compiled:
            for layer, p, pass_, other, configs in jobs:
                if time.monotonic() > deadline:
                    break
                told, share, right = measure(p, pass_, other, configs, gpu, compiled)
                shares += [share] if share else []
                wrong += not right
                print(f"{layer} {p.key()} {pass_}: {told}", flush=True)
    except KeyboardInterrupt:
        status = 130
        print("interrupted")
    mean = exp(sum(map(log, shares)) / len(shares)) if shares else float("nan")
    if jobs:
        print(
            f"{kernel} takes {mean:.2f} of the other kernels' time (geometric mean of {len(shares)} passes of {len(jobs)}, measured), less in "
            f"{sum(share < 1 for share in shares)}; {wrong} wrong or failed"
        )
    else:
        print(f"no layer of {args.suite} for the family {kernel} on {gpu.target}")
    return status or int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
