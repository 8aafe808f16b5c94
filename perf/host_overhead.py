#!/usr/bin/env python
"""Host time of eager calls, without a GPU: how long until the launch, over a bare Triton launch of
the same kernels with the same arguments; and how long the search for tiles takes of the three
passes of a shape that was never seen, over its goal of 3 ms.

Kernels are compiled for --target (ptxas comes with Triton) and launched on CPU tensors through a
driver whose launcher does nothing, so what is timed is Python: argument checks, lookups,
allocation, autograd, Triton. All take turns in one run; figures are medians, ratios those of
rounds.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

from tridil import choice, cost_model, devices, dilated_conv2d, drivers, functional
from tridil.problem import PASSES, Problem

# a dilated layer of DeepLabV3-ResNet50, which takes one kernel per pass but for wgrad's sum; what
# runs through ATen is small, since it computes
LAYER = Problem(4, 256, 60, 60, 256, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
SMALL = Problem(
    1,
    64,
    32,
    32,
    64,
    3,
    3,
    padding=((2, 2), (2, 2)),
    dilation=(2, 2),
    dtype="float32",
    layout="nchw",
)
TARGETS = {
    "no grad": 2.5,
    "forward+backward": 3.0,
    "aten, forward+backward": 1.15,
    "auto that chose ATen": 1.15,
    "new shape, dense": 1,
    "new shape, depthwise": 1,
}
GOAL = 3000  # microseconds of the search for the three passes of a new shape


def stub_driver(arch: int):
    """A Triton driver for sm_`arch` on CPU tensors: loads nothing and launches nothing, but calls
    the launch hooks."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Launcher:
        def __init__(self, src, metadata):
            pass

        def __call__(
            self,
            gx,
            gy,
            gz,
            stream,
            function,
            kernel_metadata,
            launch_metadata,
            enter_hook,
            exit_hook,
            *args,
        ):
            for hook in (enter_hook, exit_hook):
                if hook is not None:
                    hook(launch_metadata)

    class Utils:
        def load_binary(self, name, kernel, shared, device):
            return 1, 1, 0, 0, 1024

        def get_device_properties(self, device):
            return {
                "max_shared_mem": 232448,
                "max_num_regs": 65536,
                "multiprocessor_count": 132,
                "warpSize": 32,
            }

    class Stub(DriverBase):
        """The device's index is the architecture, so that kernels of several do not mix in Triton's
        caches."""

        launcher_cls, utils = Launcher, Utils()

        def __init__(self):
            self.get_current_device, self.get_current_stream = lambda: arch, lambda device=None: 0

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            from triton.backends.nvidia.driver import ty_to_cpp

            return ty_to_cpp(ty)

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError("nothing runs here")

    return Stub()


def timed(functions: dict, repetitions: int) -> dict[str, list[float]]:
    """Microseconds of each function in each round; a round calls all of them, and each follows
    every other one equally often."""
    times = {name: [] for name in functions}
    for f in functions.values():
        f(), f()
    orders = list(permutations(functions.items()))
    for i in range(repetitions):
        for name, f in orders[i % len(orders)]:
            begin = perf_counter_ns()
            f()
            times[name].append((perf_counter_ns() - begin) / 1e3)
    return times


def recorded(f) -> list:
    """Bare launches, as functions without arguments, of the kernels that f launches."""
    from tridil import launch

    seen, call = [], launch.Ready.__call__
    launch.Ready.__call__ = lambda self, tensors: (
        seen.append((self, self.arguments(tensors))) or call(self, tensors)
    )
    try:
        f()
    finally:
        launch.Ready.__call__ = call
    return [
        (item.launch.name, partial(item.fn[item.grid], *arguments, **item.options))
        for item, arguments in seen
    ]


def searched(target: str, groups: int) -> list[float]:
    """Microseconds of the search for each of 42 shapes: 256 channels, maps of 30 to 72 pixels."""
    device, times = devices.of_target(target), []
    for h, w in product(range(30, 73, 7), range(31, 73, 8)):
        begin = perf_counter_ns()
        problem = replace(LAYER, h=h, w=w, groups=groups)
        for pass_ in PASSES:
            cost_model.best(problem, pass_, device)
        times.append((perf_counter_ns() - begin) / 1e3)
    return times


def measure(target: str, repetitions: int) -> list[dict]:
    """Rows of one target: what, kernels, microseconds, those of its yardstick, their ratio and its
    target."""
    from triton.runtime import driver

    driver.set_active(stub_driver(int(target[5:])))
    x, w, dy = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        for shape in (LAYER.x_shape, LAYER.w_shape, LAYER.y_shape)
    )
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    conv = partial(dilated_conv2d, padding=2, dilation=2, backend="triton")

    def no_grad():
        with torch.no_grad():
            return conv(x, w)

    def forward_backward(conv, x, w, dy):
        x.grad = w.grad = None
        conv(x, w).backward(dy)

    train = partial(forward_backward, conv, *leaves, dy)
    bare_forward, bare_all = recorded(no_grad), recorded(train)
    small = [
        torch.randn(SMALL.x_shape).requires_grad_(),
        torch.randn(SMALL.w_shape).requires_grad_(),
        torch.randn(SMALL.y_shape),
    ]
    tiny = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 1, 1)
    plain = partial(forward_backward, partial(F.conv2d, padding=2, dilation=2), *small)
    aten, auto = (
        partial(
            forward_backward,
            partial(dilated_conv2d, padding=2, dilation=2, backend=backend),
            *small,
        )
        for backend in ("aten", "auto")
    )
    # apart: a convolution that runs leaves cold caches behind
    us = timed(
        {
            "no grad": no_grad,
            "bare": lambda: [f() for _, f in bare_forward],
            "train": train,
            "bare all": lambda: [f() for _, f in bare_all],
        },
        repetitions,
    )

    def choose(problem, device, backend):
        return "triton" if backend == "auto" else backend, backend == "auto"

    with (
        mock.patch.object(functional, "_choose", choose),
        mock.patch.object(choice, "resolve", lambda *a: None),
    ):
        # auto: as on a GPU where ATen is faster
        us |= timed({"aten": aten, "auto": auto, "F.conv2d": plain}, max(repetitions // 4, 1))
    us |= timed(
        {
            "aten, tiny": lambda: dilated_conv2d(*tiny, backend="aten"),
            "F.conv2d, tiny": lambda: F.conv2d(*tiny),
        },
        repetitions,
    )

    def names(bare):
        return " ".join(kernel for kernel, _ in bare)

    rows = [
        ("no grad", names(bare_forward), us["no grad"], us["bare"]),
        ("forward+backward", names(bare_all), us["train"], us["bare all"]),
        ("aten, forward+backward", "", us["aten"], us["F.conv2d"]),
        ("auto that chose ATen", "", us["auto"], us["F.conv2d"]),
        ("aten, tiny layer", "", us["aten, tiny"], us["F.conv2d, tiny"]),
    ]
    for kind, groups in (("dense", 1), ("depthwise", LAYER.c)):
        found = searched(target, groups)
        rows.append((f"new shape, {kind}", "", found, [GOAL] * len(found)))
    return [
        {
            "target": target,
            "call": name,
            "kernels": kernels,
            "us": median(a),
            "yardstick_us": median(b),
            "ratio": median(x / y for x, y in zip(a, b)),
            "at_most": TARGETS.get(name),
        }
        for name, kernels, a, b in rows
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", default="cuda:80,cuda:90")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a ratio is above its target"
    )
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    import pandas as pd

    if drivers.interpreted():
        parser.error("unset TRITON_INTERPRET: the interpreter launches nothing")
    torch.set_num_threads(1)
    gc.disable()
    table = pd.DataFrame(
        [row for target in args.targets.split(",") for row in measure(target, args.repetitions)]
    )
    print(table.round(2).to_string(index=False, na_rep=""))
    if args.json:
        table.to_json(args.json, orient="records", indent=1)
    return int(args.check and bool((table["ratio"] > table["at_most"]).any()))


if __name__ == "__main__":
    raise SystemExit(main())
