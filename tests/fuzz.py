"""Random geometries through tridil.launch against the float64 reference: python tests/fuzz.py
--count 500 --seed 0 --seconds 600 --state FILE

Every geometry runs its three passes with the default config and with random candidates, in each
dtype; --kernel tma draws geometries that tensor descriptors can describe and runs random configs of
that kernel. The result must stay inside its error budget and every element must be written.
Geometry i of a seed is the same on every machine; with --state a later run goes on where the last
one stopped. Exit status 1 and a line that repeats the case where one is broken.
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tridil import config, cost_model, drivers, launch, reference, testing  # noqa: E402
from tridil.families.tma import architecture  # noqa: E402
from tridil.problem import PASSES  # noqa: E402


def configs(problem, pass_, rng):
    """The default config and, every other time, a random candidate with a random split, stage count
    and clamping."""
    target = drivers.target()
    default, candidates = (
        cost_model.best(problem, pass_, target),
        config.candidates(problem, pass_, target),
    )
    yield default
    for cfg in rng.sample(candidates, rng.randrange(2)):
        change = {"num_stages": rng.choice([1, 2, 3])}
        if hasattr(cfg, "CLAMP"):
            change["CLAMP"] = cfg.CLAMP or rng.random() < 0.5
        if cfg.kernel == "depthwise":
            change |= {
                "COLS": rng.choice([1, 2, 3, 4]),
                "TAPS": rng.choice([1, 2, cfg.TAPS]),
                "BLOCK_P": rng.choice([1, 2, cfg.BLOCK_P]),
            }
        if pass_ == "wgrad":
            change["SPLIT_K"] = rng.choice([1, 1, 2, 3, 5])
        changed = replace(cfg, **change)
        yield cfg if config.fits(changed, problem, pass_, target) else changed


def tma_problem(rng, max_macs):
    """A random geometry whose passes all have a descriptor: channels in multiples of 16 bytes,
    strides that divide the dilation."""
    while True:
        p = testing.random_problem(rng, max_macs=max_macs)
        p = replace(
            p, c=-(-p.c // p.groups // 8) * 8 * p.groups, k=-(-p.k // p.groups // 8) * 8 * p.groups
        )
        if all(next(tma_configs(p, pass_, random.Random(0), "cuda:90"), None) for pass_ in PASSES):
            return p


def tma_configs(problem, pass_, rng, target=None):
    """One random config of the tma kernel; tiles are small, and few enough that geometries share
    compiled kernels."""
    box = rng.choice([(1, 8, 8), (4, 4, 4), (1, 1, 64), (16, 2, 2), (1, 4, 8)])
    cfg = dict(
        zip(("BLOCK_IMG", "BLOCK_P", "BLOCK_Q"), box),
        kernel="tma",
        BLOCK_N=rng.choice([16, 64]),
        WARP_SPECIALIZE=False,
        num_warps=4,
        num_stages=rng.choice([1, 3]),
        maxnreg=None,
        SPLIT_K=rng.choice([1, 1, 3]),
    )
    if pass_ == "wgrad":
        cfg["BLOCK_M"] = rng.choice([16, 64])
    else:
        cfg |= {"BLOCK_K": rng.choice([16, 32]), "WEIGHT_FIRST": cfg["BLOCK_N"] == 64}
    if problem.groups > 1:
        cfg["BLOCK_M" if pass_ == "wgrad" else "BLOCK_K"] = 16
    cfg = config.from_json(cfg, pass_)
    if config.fits(cfg, problem, pass_, target or drivers.target()) is None:
        yield cfg


def run_geometry(seed, index, dtypes, device, max_macs=2e5, kernel=None):
    """Runs one geometry in every dtype; returns (passes run, largest share of a budget used,
    message of the first failure or None)."""
    rng, draw, runs, most = random.Random(f"{seed}/{index}"), configs, 0, 0.0
    if kernel == "tma":
        draw, geometry = tma_configs, tma_problem(rng, max_macs)
    else:
        geometry = testing.random_problem(rng, max_macs=max_macs)
    for dtype in dtypes:
        p = replace(geometry, dtype=dtype)
        x, w, bias, dy = testing.random_tensors(p, device, rng.randrange(2**31))
        bias = bias if rng.random() < 0.5 else None
        for pass_, args in (("fprop", (x, w, bias)), ("dgrad", (dy, w)), ("wgrad", (dy, x))):
            expected = getattr(reference, pass_)(p, *args)
            for cfg in draw(p, pass_, rng):
                try:
                    error, budget = testing.check(
                        getattr(launch, pass_)(p, *args, cfg), expected, p, pass_
                    )
                # a failure to compile or to launch is a finding, too
                except Exception as e:
                    print(f"{type(e).__name__}: {e}", file=sys.stderr)
                    error, budget = float("inf"), 0.0
                runs += 1
                most = max(most, error / budget if budget else 0.0)
                if not error <= budget:
                    return (
                        runs,
                        most,
                        (
                            f"FAILED {pass_} of {p.key()}: error {error:.3g} exceeds the budget {budget:.3g} with {cfg}; "
                            f"repeat: python tests/fuzz.py --seed {seed} --start {index} --count 1 "
                            f"--dtypes {','.join(dtypes)}{' --kernel ' + kernel if kernel else ''}"
                        ),
                    )
    return runs, most, None


def fuzz(count, seed, seconds, dtypes, device, start=0, state=None, kernel=None):
    """Runs geometries start .. start+count-1 for at most `seconds`, from `state` (a dict) on;
    returns the state."""
    state = state or {"next": start, "geometries": 0, "runs": 0, "most": 0.0, "failures": []}
    deadline = time.monotonic() + seconds
    while state["next"] < start + count and time.monotonic() < deadline:
        runs, most, failure = run_geometry(seed, state["next"], dtypes, device, kernel=kernel)
        state["next"] += 1
        state["geometries"] += 1
        state["runs"] += runs
        state["most"] = max(state["most"], most)
        state["failures"] += [failure] if failure else []
    return state


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=500, help="geometries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="index of the first geometry")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time")
    parser.add_argument("--state", type=Path, help="file that keeps progress")
    parser.add_argument(
        "--dtypes",
        default="float16,float32",
        help="comma-separated (fp32 does not run on tensor cores)",
    )
    parser.add_argument(
        "--kernel", choices=["tma"], help="run this kernel only, on a target that has it"
    )
    args = parser.parse_args(argv)
    if args.kernel and architecture(drivers.target()) < 90:
        parser.error(
            f"kernel tma needs sm_90 or later, the target is {drivers.target()}: set TRIDIL_TARGET=cuda:90 to interpret it"
        )
    dtypes = args.dtypes.split(",")
    unknown = set(dtypes) - {"float16", "bfloat16", "float32", "float64"}
    if unknown:
        parser.error(f"unknown dtypes {sorted(unknown)}: use float16, bfloat16, float32, float64")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty returns NaN
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    identity = {
        "seed": args.seed,
        "start": args.start,
        "dtypes": dtypes,
        "target": drivers.target(),
        "kernel": args.kernel,
    }
    state = json.loads(args.state.read_text()) if args.state and args.state.exists() else None
    if state and state.pop("of") != identity:
        parser.error(
            f"{args.state} belongs to another seed, start, dtypes or target: give another file"
        )
    end = time.monotonic() + args.seconds
    while True:
        done = state["geometries"] if state else 0
        step = min(args.count, done + 10)
        state = fuzz(
            step, args.seed, end - time.monotonic(), dtypes, device, args.start, state, args.kernel
        )
        if args.state:
            temporary = args.state.with_suffix(".part")
            temporary.write_text(json.dumps({**state, "of": identity}))
            temporary.replace(args.state)
        if state["geometries"] >= args.count or time.monotonic() >= end:
            break
    for failure in state["failures"]:
        print(failure)
    print(
        f"fuzz: {state['geometries']} of {args.count} geometries x {len(PASSES)} passes x {args.dtypes} (seed {args.seed}, {device.type}, "
        f"{drivers.target()}): {state['runs']} runs, {len(state['failures'])} failures, at most {state['most']:.0%} of a budget used"
    )
    return 1 if state["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
