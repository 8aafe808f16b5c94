#!/usr/bin/env python
"""Cold start without a GPU: how many kernels a network compiles, and how long that and the import
take.

DeepLabV3-ResNet50, forward and backward, fp16, channels_last, N=4 at 480x480, default configs.
"dilated" are its dilated layers, which is what one replaces; "all" is every Conv2d. Two launches
share a kernel when Triton's JIT would find it in its cache: same function, constexprs, options, and
specialisation of every argument. Each is compiled once into an empty cache: in one process
(seconds), and on all cores (parallel_seconds).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tridil import aot, cost_model, workloads
from tridil.problem import PASSES, Problem

MODEL = "tv/deeplabv3_resnet50"


def dilated() -> list[Problem]:
    """The distinct dilated layers."""
    return [w.problem for w in workloads.load() if w.model == MODEL]


def network() -> list[Problem]:
    """The distinct convolutions of the whole network; torchvision's ResNet-50 with
    replace_stride_with_dilation [False, True, True]."""

    def conv(c, size, k, taps=1, stride=1, dilation=1):
        pad = dilation * (taps - 1) // 2
        return Problem(
            4,
            c,
            size,
            size,
            k,
            taps,
            taps,
            (stride, stride),
            ((pad, pad), (pad, pad)),
            (dilation, dilation),
        )

    layers, channels = [conv(3, 480, 64, 7, 2)], 64
    stages = (
        (64, 120, 1, (1, 1, 1)),
        (128, 120, 2, (1, 1, 1, 1)),
        (256, 60, 1, (1, 2, 2, 2, 2, 2)),
        (512, 60, 1, (2, 4, 4)),
    )
    for width, size, stride, dilations in stages:
        for i, d in enumerate(dilations):
            s = 1 if i else stride
            layers += [conv(channels, size, width), conv(width, size, width, 3, s, d)]
            if not i:
                layers.append(conv(channels, size, 4 * width, 1, s))
            size //= s
            layers.append(conv(width, size, 4 * width))
            channels = 4 * width
    head = [
        conv(2048, 60, 256),
        conv(2048, 1, 256),
        conv(1280, 60, 256),
        conv(256, 60, 256, 3),
        conv(256, 60, 21),
    ]
    return list(dict.fromkeys([*layers, *dilated(), *head]))


LAYERS = {"dilated": dilated, "all": network}


def kernels(layers: list[Problem], target: str) -> list:
    """(kernel, triton's ASTSource, options) of each distinct kernel of the layers' three passes, as
    the JIT tells them apart; the image has no dgrad, the last layer has a bias."""
    found = {}
    for p in layers:
        for pass_ in PASSES:
            if pass_ == "dgrad" and p.c == 3:
                continue
            for item, source in aot.sources(
                p,
                pass_,
                cost_model.best(p, pass_, target),
                target,
                epilogue="bias" if pass_ == "fprop" and p.k == 21 else "",
            ):
                found.setdefault((source.hash(), item.options), (item.name, source, item.options))
    return list(found.values())


def _compile(job) -> None:
    name, target, i = job
    _, source, options = kernels(LAYERS[name](), target)[i]
    aot.compile_source(source, options, target)


def _seconds(f) -> float:
    """Seconds that f takes with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as folder:
        # read at each compilation; children inherit it
        os.environ["TRITON_CACHE_DIR"] = folder
        begin = perf_counter()
        f()
        return perf_counter() - begin


def measure(name: str, target: str, compiles: bool, workers: int) -> dict:
    """One row: how many kernels of which function, and seconds to compile them."""
    found = kernels(LAYERS[name](), target)
    names = [kernel for kernel, *_ in found]
    row = {
        "layers": name,
        "target": target,
        "problems": len(LAYERS[name]()),
        "kernels": len(found),
        "of which": " ".join(f"{names.count(kernel)} {kernel}" for kernel in dict.fromkeys(names)),
    }
    if compiles:

        def parallel():
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_compile, [(name, target, i) for i in range(len(found))]))

        row["seconds"] = _seconds(
            lambda: [aot.compile_source(source, options, target) for _, source, options in found]
        )
        row["parallel_seconds"] = _seconds(parallel)
    return row


def import_seconds() -> tuple[float, float]:
    """(seconds of `import torch`, what `import tridil` adds) in a fresh interpreter, whose files
    are in memory."""
    code = "from time import perf_counter as t; a = t(); import torch; b = t(); import tridil; c = t(); print(b - a, c - b)"
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).resolve().parents[1],
        ).stdout
    torch, tridil = map(float, out.split())
    return torch, tridil


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", default="cuda:80,cuda:90,cuda:100")
    parser.add_argument("--count", action="store_true", help="count kernels, compile none")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    import pandas as pd

    workers = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    targets = args.targets.split(",")
    table = pd.DataFrame(
        [
            measure(name, target, not args.count and name == "dilated", workers)
            for target in targets
            for name in LAYERS
        ]
    )
    print(table.round(1).to_string(index=False, na_rep=""))
    if args.json:
        table.to_json(args.json, orient="records", indent=1)
    if not args.count:
        torch, tridil = import_seconds()
        print(
            f"parallel: {workers} processes, their start included\nimport torch {torch:.2f} s, import tridil after it {tridil:.3f} s"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
