"""A GPU that is none. `python fake_gpu.py SCRIPT|-m MODULE|-c CODE ...` runs a program on it, with
two tiny layers in place of every suite and quick tests in place of the kernels'.

Made up: CPU tensors, Triton's interpreter, clocks that say what a test wants. Emulated
(EMULATOR=module:arch, where a driver runs compiled kernels on CPU tensors): perf's and the tuner's
own classes; only the device's name, the clock and what torch.cuda says are replaced.
"""

import importlib
import os
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

PERF = Path(__file__).resolve().parents[1] / "perf"
EMULATOR = os.environ.get("EMULATOR")
if __name__ == "__main__":
    if EMULATOR:
        module, _, arch = EMULATOR.partition(":")
        importlib.import_module(module).install(arch=int(arch), halo="ignore")
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(PERF.parent), str(PERF)]

import providers  # noqa: E402
import torch  # noqa: E402

from tridil import clock, devices, reference, testing, tuner, workloads  # noqa: E402
from tridil.branches import Branches  # noqa: E402
from tridil.problem import Problem  # noqa: E402

NAME = "NVIDIA H100 80GB HBM3"
TINY = [
    workloads.Workload(
        "net",
        "d3",
        2,
        Problem(2, 16, 5, 6, 16, 3, 3, padding=((3, 3), (3, 3)), dilation=(3, 3)),
        "made up",
    ),
    workloads.Workload(
        "net",
        "grouped",
        1,
        Problem(1, 8, 4, 4, 8, 3, 3, padding=((1, 1), (1, 1)), groups=2),
        "made up",
    ),
]
PROPERTIES = SimpleNamespace(
    name=NAME,
    multi_processor_count=132,
    L2_cache_size=2**16,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    uuid="none",
)


def suite(name, dtype="float16", layout="nhwc"):
    return [replace(w, problem=replace(w.problem, dtype=dtype, layout=layout)) for w in TINY]


def branches(dtype="float16", layout="nhwc"):
    whole = replace(TINY[0].problem, dtype=dtype, layout=layout)
    point = replace(whole, r=1, s=1, padding=((0, 0), (0, 0)), dilation=(1, 1))
    return {"tiny": Branches((whole, point))}


class SweepGpu(providers.Gpu):
    """A clock that says 1, 2, 3 ms for the three providers of a pass, and 1 ms for the machine's
    copies and products."""

    device, l2_bytes, roof_size = "cpu", 2**16, 32

    def __init__(self, name="Fake GPU 9000"):
        self.name, self.calls, self.compiled, self.turns, self.settings = name, 0, [], [], []

    def describe(self):
        return self.name, "1.2.3"

    def state(self):
        return {"clock_mhz": 1755.0, "temperature_c": 41.0}

    def spec(self, target):
        return devices.of_name(self.name, target)

    def compiling(self, jobs, target):
        self.compiled += jobs
        return nullcontext(lambda *job: True)

    def times(self, calls):
        q1, ms, q3 = self.quartiles(calls)
        return dict(ms=ms, ms_q1=q1, ms_q3=q3, eager_ms=2 * ms, clock="graph")

    def quartiles(self, calls):
        self.turns.append(len(calls))
        self.settings.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
        result = [call() for call in calls[:2]][0]
        if result is not None and result.dim() == 2:
            return 1.0, 1.0, 1.0
        self.calls += 1
        ms = (self.calls - 1) % 3 + 1
        return ms - 0.25, ms, ms + 0.25

    def extra_bytes(self, fn):
        return 3 * 2**20


class TunerGpu(tuner.Gpu):
    """Runs passes through the float64 reference and ATen; every config takes as long as it is
    predicted to."""

    last = 1.0

    def __init__(self, device):
        self.device, self.target, self.name = torch.device("cpu"), "cuda:90", NAME
        self.spec = devices.of_name(NAME, self.target)

    def tensors(self, problem):
        return testing.random_tensors(problem)

    def prepare(self, problem, pass_, config, precision):
        def run(a, b):
            self.last = 1.0 if config is None else 0.5
            return getattr(reference, pass_)(problem, a, b).to(a.dtype)

        return run

    def milliseconds(self, run, a, b):
        run(a, b)
        return self.last

    def compiling(self, jobs):
        return nullcontext(lambda *job: True)


class EmulatedSweepGpu(providers.Gpu):
    device, roof_size = "cpu", 32


class EmulatedTunerGpu(tuner.Gpu):
    def __init__(self, device):
        super().__init__(torch.device("cpu"))


def ticks(calls, rep=50):
    """A clock that runs the first calls and says 1 ms."""
    for call in calls[:2]:
        call()
    return 0.75, 1.0, 1.25


def queries() -> list:
    """(object, attribute, value) of what is replaced for an emulated device: what torch.cuda says,
    and the clock."""
    answers = dict(
        is_available=True,
        current_device=0,
        device_count=1,
        get_device_name=NAME,
        get_device_properties=PROPERTIES,
        get_device_capability=(9, 0),
        memory_allocated=0,
        max_memory_allocated=2**20,
        reset_peak_memory_stats=None,
        synchronize=None,
        set_device=None,
        mem_get_info=(2**34, 2**36),
        is_current_stream_capturing=False,
    )
    replaced = [
        (torch.cuda, name, lambda *_, value=value: value) for name, value in answers.items()
    ]
    return [
        *replaced,
        (torch.cuda, "device", lambda *_: nullcontext()),
        (clock, "eager", ticks),
        (clock, "graph", ticks),
    ]


def main():
    os.environ["TRIDIL_TARGET"] = f"cuda:{EMULATOR.partition(':')[2]}" if EMULATOR else "cuda:90"
    workloads.suite, workloads.branches = suite, branches
    for where, name, value in queries():
        setattr(where, name, value)
    tuner.Gpu = EmulatedTunerGpu if EMULATOR else TunerGpu
    providers.Gpu = EmulatedSweepGpu if EMULATOR else lambda: SweepGpu(NAME)
    sys.argv = [
        "tests/test_devices.py" if argument == "tests/test_kernels.py" else argument
        for argument in sys.argv[1:]
    ]
    if sys.argv[0] == "-m":
        module = sys.argv.pop(1)
        if module == "pytest":
            # its tests have a device of their own
            torch.cuda.is_available = lambda: False
            sys.argv[1:1] = ["-n", "0"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    # what compute-sanitizer runs
    elif sys.argv[0] == "-c":
        if EMULATOR:
            exec(sys.argv[1].replace('"cuda"', '"cpu"'), {"__name__": "__main__"})
        print("==== ERROR SUMMARY: 0 errors")
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
