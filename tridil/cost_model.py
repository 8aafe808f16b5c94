"""Predicted time of (problem, pass, config) on a device: ranks candidates where nothing was measured, and says what limits them.

A launch is tiles of unequal numbers of steps (live taps x channel blocks) on SMs that hold a few programs each. A step costs the clocks of its
busiest unit: tensor cores, instruction issue, shared memory, L2. The launch costs the larger of its waves of programs and its DRAM traffic. What is
assumed stands in assumed.py; nothing was fitted to a measurement: `python perf/sweep.py --validate-model` compares both on a GPU.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod

from . import assumed, devices, direct
from . import config as cfg
from . import cudnn as aten
from .devices import Device
from .problem import DTYPE_BYTES, Problem

UNITS = {"tensor": "tensor cores", "issue": "instruction issue", "shared": "shared memory", "l2": "L2 bandwidth"}


@dataclass(frozen=True)
class Prediction:
    """seconds of a pass, what limits it in words, and the seconds that its parts would take alone (they overlap)."""
    seconds: float
    limiter: str
    parts: dict[str, float]

    def __str__(self):
        parts = ", ".join(f"{name} {1e6 * seconds:.3g}" for name, seconds in self.parts.items())
        return f"{1e6 * self.seconds:.4g} us predicted, limited by {self.limiter} (alone, in us: {parts})"


def roof(problem: Problem, device: Device, precision: str = "tf32") -> float:
    """Seconds that no implementation of a pass can beat: useful MACs at the peak of the device's units, or compulsory bytes at DRAM bandwidth."""
    rate = device.mma_rate(problem.dtype, precision) * device.sms * device.clock * 1e9
    return max(problem.useful_macs / rate, problem.bytes / (device.dram * 1e9))


def step_clocks(problem: Problem, pass_: str, config: dict, device: Device, precision: str = "tf32") -> dict[str, float]:
    """Clocks of an SM for one step of one program, by unit, each at its peak."""
    (m, n, k), nbytes, warps = cfg.tile(config, pass_), DTYPE_BYTES[problem.dtype], config["num_warps"]
    c_align, k_align = (gcd(size // problem.groups * nbytes, 16) for size in (problem.c, problem.k))
    fma, moved = m * n * k, (m + n) * k * nbytes
    mma = cfg.has_mma(problem, precision)
    products = fma / 2048 * (nbytes / 2) if mma else fma / 32
    kind = config["kernel"].removesuffix("_flat")
    fixed, per_copy = assumed.LOOP[kind, pass_]
    if config.get("WARP_SPECIALIZE"):
        other = assumed.SPECIALIZED
    elif kind == "tma":
        other, products = warps * fixed, fma / 2**16
    else:
        # bytes of one copy of each operand: x or dy, and (innermost channels C) w or (wgrad) x
        widths = c_align if pass_ == "fprop" else k_align, c_align
        each = [per_copy / width if width >= 4 else assumed.SCATTERED / nbytes for width in widths]
        if config["kernel"] == "gather_flat":
            image = pass_ == "wgrad"                                    # which operand is the one that taps shift
            each[image] = assumed.FLAT / widths[image]
        other = warps * fixed + sum(cost * size * k * nbytes / 32 for size, cost in zip((m, n), each))
    if kind == "tma":                               # operands stay in shared memory; a warpgroup reads its 64 rows and all columns
        read = (m + (-(-m // 64) if device.target == "cuda:90" else 1) * n) * k * nbytes
    else:                                                               # warps in a grid, each reads its rows and columns
        rows = max(1, min(warps, m // 32)) if m >= n else max(1, warps // max(1, min(warps, n // 32)))
        read = (warps // rows * m + rows * n) * k * nbytes
    return {"tensor": fma / device.mma_rate(problem.dtype, precision), "issue": (products + other) / 4, "shared": (moved + read) / 128,
            "l2": moved / device.l2_clock / assumed.L2}


def resident(problem: Problem, pass_: str, config: dict, device: Device) -> int:
    """Programs that one SM holds, by shared memory, registers (accumulator and about 90 more a thread) and threads."""
    if config.get("WARP_SPECIALIZE"):                                   # its warps take all registers
        return 1
    (m, n, _), threads = cfg.tile(config, pass_), 32 * config["num_warps"]
    shared, _, most_threads, most = device.limits
    registers = min(255, m * n * (2 if problem.dtype == "float64" else 1) // threads + 90)
    need = cfg.shared_bytes(config, problem, pass_, device.target) + 1024
    return max(1, min(shared // need, 65536 // (threads * registers), most_threads // threads, most))


def predict(problem: Problem, pass_: str, config: dict, device: Device, precision: str = "tf32") -> Prediction:
    """Time of one pass whose tensors are channels_last, its launches one after another."""
    if config["kernel"] == "depthwise":
        return _direct(problem, pass_, config, device)
    clocks = step_clocks(problem, pass_, config, device, precision)
    unit = max(clocks, key=clocks.get)
    step, hertz = clocks[unit] / assumed.ATTAINED, device.clock * 1e9
    fit, warps = resident(problem, pass_, config, device), config["num_warps"]
    alone = assumed.ALONE_SPECIALIZED if config.get("WARP_SPECIALIZE") else min(1.0, assumed.ALONE * (warps / 4) ** 0.5)
    split, launches, waves, work, programs = config["SPLIT_K"], 0, 0.0, 0.0, 0
    for axes in problem.axes(pass_):
        count = cfg.tiles(problem, pass_, config, axes)
        total, most = cfg.launch_steps(problem, pass_, config, axes)
        waves += _waves(count, total * step, most / split * step, device.sms, fit, alone)
        launches, work, programs = launches + 1, work + total * step / device.sms, max(programs, count)
    result = prod({"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_])
    partial = 0.0
    if split > 1:
        launches *= 2
        bytes_ = 4 * result * (2 * split + 1)
        partial = bytes_ / (device.l2_clock * assumed.L2 * device.sms * hertz if bytes_ < device.l2 * 2**19 else device.dram * 1e9 * assumed.DRAM)
    dram = problem.bytes / (device.dram * 1e9 * assumed.DRAM)
    if pass_ == "dgrad" and not problem.dgrad_covers:                    # dx begins as zeros
        launches, dram = launches + 1, dram + result * DTYPE_BYTES[problem.dtype] / (device.dram * 1e9 * assumed.DRAM)
    waves, work = waves / hertz, work / hertz
    parts = {UNITS[name]: clocks[name] * work / step for name in clocks} | {"waves of programs": waves, "DRAM bandwidth": dram}
    if partial:
        parts["partial sums"] = partial
    parts["launches"] = launches * assumed.LAUNCH
    seconds = max(waves, dram) + partial + parts["launches"]
    if parts["launches"] + partial > seconds / 2:
        limiter = "launches" if parts["launches"] > partial else "partial sums"
    elif dram >= waves:
        limiter = "DRAM bandwidth"
    elif work < 0.6 * waves:
        limiter = f"too few programs ({programs} on {device.sms} SMs)" if programs < 2 * device.sms else "unequal programs in the last wave"
    else:
        limiter = UNITS[unit]
    return Prediction(seconds, limiter, parts)


def _direct(problem: Problem, pass_: str, config: dict, device: Device) -> Prediction:
    """`predict` of a direct kernel, whose clocks are counted in direct.clocks."""
    clocks, hertz = direct.clocks(problem, pass_, config, device), device.clock * 1e9
    launches = (2 if pass_ == "wgrad" else 1) * len(problem.axes(pass_))
    if pass_ == "dgrad" and not problem.dgrad_covers and not direct.fill(problem):
        launches += 1
    issue, l2, waves, dram = (clocks[name] / hertz for name in ("issue", "l2", "waves", "dram"))
    parts = {UNITS["issue"]: issue, UNITS["l2"]: l2, "waves of programs": waves, "DRAM bandwidth": dram, "launches": launches * assumed.LAUNCH}
    seconds = max(waves, dram) + assumed.OVERLAP * min(waves, dram) + launches * assumed.LAUNCH
    if launches * assumed.LAUNCH > seconds / 2:
        limiter = "launches"
    elif dram >= waves:
        limiter = "DRAM bandwidth"
    else:
        limiter = UNITS["issue" if issue >= l2 else "l2"] if max(issue, l2) >= 0.6 * waves else "too few programs"
    return Prediction(seconds, limiter, parts)


def _waves(programs: int, total: float, most: float, sms: int, fit: int, alone: float) -> float:
    """Clocks of a launch of `programs` whose steps take `total` clocks in sum and `most` in the longest, `fit` of them at a time on an SM."""
    def rate(together):
        return min(1.0, alone * together)
    if not programs:
        return 0.0
    equal = most * programs <= 1.05 * total
    most, total = most + assumed.PROGRAM * alone, total + programs * assumed.PROGRAM * alone / max(min(fit, -(-programs // sms)), 1)
    mean, busiest = total / programs, -(-programs // sms)
    if programs <= sms * fit:
        return max(most / alone, busiest * mean / rate(busiest))
    if equal:                                                            # full rounds and a last one
        rounds, rest = divmod(programs, sms * fit)
        last = -(-rest // sms)
        return (rounds * fit / rate(fit) + (last / rate(last) if rest else 0)) * mean
    return max(most / alone, total / sms / rate(fit) + most / 2)         # the last program begins at a random moment of another


def cudnn(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> float:
    """Seconds that ATen is given (cudnn.py), on channels_last tensors as in `predict`: of others both make copies; depthwise layers run in place."""
    is_depthwise = aten.kind(problem, pass_) == "depthwise"
    return aten.seconds(problem if is_depthwise else replace(problem, layout="nhwc"), pass_, device, precision)


def rank(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> list[dict]:
    """The candidates for a device, the fastest prediction first. Raises ValueError when no tile fits."""
    options = cfg.candidates(problem, pass_, device.target, precision)
    if not options:
        raise ValueError(f"no tile fits {pass_} of {problem.key()} on {device.target}")
    return sorted(options, key=lambda config: predict(problem, pass_, config, device, precision).seconds)


@lru_cache(maxsize=4096)
def _best(problem: Problem, pass_: str, device: Device, precision: str) -> tuple:
    return tuple(rank(problem, pass_, device, precision)[0].items())


def best(problem: Problem, pass_: str, device: Device | str, precision: str = "tf32") -> dict:
    """The config that runs where nothing was measured, on a device or on the one that stands for a target such as "cuda:90"."""
    return dict(_best(problem, pass_, devices.of_target(device) if isinstance(device, str) else device, precision))


def why(problem: Problem, pass_: str, config: dict, device: Device, precision: str = "tf32") -> str:
    """Why the config's kernel is the one of that pass, in words."""
    target = device.target
    if config["kernel"] == "depthwise":
        return "one channel per group: a direct kernel, since a matrix product would be mostly zeros"
    if config["kernel"] == "tma":
        return f"{target} loads boxes of the image by descriptor"
    if config["kernel"] == "gather_flat":
        channels = (problem.k if pass_ == "dgrad" else problem.c) // problem.groups
        if not cfg.is_flat(problem, pass_):
            return f"{channels} channels: a tile of several taps reads dy once for all of them"
        return f"{channels} channels: blocks of (tap, channel) pairs waste less than blocks of channels"
    options = list(cfg.tma_options(problem, pass_, target, precision))
    legal = [option for option in options if cfg.fits(option, problem, pass_, target) is None]
    if legal:
        other = min((predict(problem, pass_, option, device, precision) for option in legal), key=lambda p: p.seconds)
        return (f"descriptors, whose boxes have sides of powers of two, are predicted to take "
                f"{other.seconds / predict(problem, pass_, config, device, precision).seconds:.2f} times as long")
    if options:
        return cfg.fits(options[0], problem, pass_, target)
    if not cfg.has_mma(problem, precision):
        return f"{problem.dtype} does not run on tensor cores here"
    return f"pointer loads: {target} has no descriptors that pay"
