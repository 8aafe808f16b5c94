"""Predicted time of (problem, pass, config) on a device: ranks candidates where nothing was
measured, and says what limits them.

How long a config takes is its family's to say; what is assumed stands in assumed.py. `python
perf/sweep.py --validate-model` compares predictions with the clock of a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod
from operator import itemgetter

from . import assumed, devices, families
from . import config as cfg
from . import cudnn as aten
from .branches import Branches
from .devices import Device
from .families import Config, Family, Prediction
from .problem import DTYPE_BYTES, Problem


def roof(problem: Problem, device: Device, precision: str = "tf32") -> float:
    """Seconds that no implementation of a pass can beat: useful MACs at the peak of the device's
    units, or compulsory bytes at DRAM bandwidth."""
    rate = device.mma_rate(problem.dtype, precision) * device.sms * device.clock * 1e9
    return max(problem.useful_macs / rate, problem.bytes / (device.dram * 1e9))


def predict(
    problem: Problem, pass_: str, config: Config, device: Device, precision: str = "tf32"
) -> Prediction:
    """Time of one pass, its launches one after another, copies of contiguous tensors included."""
    family = families.of(config.kernel)
    found = family.predict(problem, pass_, config, device, precision)
    copied = copies(problem, pass_, family, device)
    if not copied:
        return found
    limiter = COPIES if copied > found.seconds else found.limiter
    return Prediction(found.seconds + copied, limiter, found.parts | {COPIES: copied})


COPIES = "copies to channels_last"


def copies(problem: Problem, pass_: str, family: Family, device: Device) -> float:
    """Seconds of bringing the operands of a pass into the memory formats in which a family reads them:
    each is read and written once."""
    copied = [] if problem.is_empty else family.copies(problem, pass_)
    return _copying(copied, problem.dtype, device)


def _copying(tensors: list[int], dtype: str, device: Device) -> float:
    """Seconds in which tensors of so many elements are read and written, one after another."""
    moved = 2 * DTYPE_BYTES[dtype] * sum(tensors)
    return moved / (device.dram * 1e9 * assumed.DRAM) + len(tensors) * assumed.LAUNCH


def cudnn(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> float:
    """Seconds that ATen is given (cudnn.py), its own copies of contiguous tensors included."""
    same = replace(problem, layout=problem.operand_layout, operands="")
    return aten.seconds(same, pass_, device, precision)


def _ranked(
    problem: Problem, pass_: str, device: Device, precision: str, experimental: bool = True
) -> Iterator[Config]:
    """The candidates of all families, or of all that are not experimental, the fastest prediction
    first; made as they are asked for. Raises ValueError when there is none."""
    found, none = [], True
    for family in families.FAMILIES:
        if family.experimental > experimental:
            continue
        seconds, config = family.search(problem, pass_, device, precision)
        if not len(seconds):
            continue
        seconds = seconds + copies(problem, pass_, family, device)
        found += [(value, config, i) for i, value in enumerate(seconds.tolist())]
    for _, config, i in sorted(found, key=itemgetter(0)):
        option = config(i)
        if cfg.fits(option, problem, pass_, device.target) is None:
            none = False
            yield option
    if none:
        raise ValueError(f"no tile fits {pass_} of {problem.key()} on {device.target}")


def rank(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> list[Config]:
    """The candidates for a device, the fastest prediction first. Raises ValueError when no tile
    fits."""
    return list(_ranked(problem, pass_, device, precision))


@lru_cache(maxsize=4096)
def _best(
    problem: Problem, pass_: str, device: Device, precision: str, experimental: bool
) -> Config:
    return next(_ranked(problem, pass_, device, precision, experimental))


def best(problem: Problem, pass_: str, device: Device | str, precision: str = "tf32") -> Config:
    """The config that runs where nothing was measured, on a device or on the one that stands for a
    target such as "cuda:90": of an experimental family only with TRIDIL_EXPERIMENTAL=1."""
    if isinstance(device, str):
        device = devices.of_target(device)
    return _best(problem, pass_, device, precision, os.environ.get("TRIDIL_EXPERIMENTAL") == "1")


def best_of_branches(
    branches: Branches, pass_: str, device: Device, precision: str = "tf32"
) -> tuple[Config, float] | None:
    """(config, seconds) of the launch that is predicted to run a pass of all branches fastest; None
    where none can."""
    return next(iter(rank_of_branches(branches, pass_, device, precision)), None)


@lru_cache(maxsize=1024)
def rank_of_branches(
    branches: Branches, pass_: str, device: Device, precision: str = "tf32"
) -> list[tuple[Config, float]]:
    """The same of all candidates, the fastest prediction first."""
    found: list[tuple[Config, float]] = []
    for family in families.FAMILIES:
        if configs := family.branch_options(branches, pass_, device.target, precision):
            seconds = family.branch_seconds(branches, pass_, configs, device, precision)
            seconds = seconds + _copies_of_branches(branches, pass_, family, device)
            found += zip(configs, seconds.tolist())
    return sorted(found, key=itemgetter(1))


def _copies_of_branches(branches: Branches, pass_: str, family: Family, device: Device) -> float:
    problem = branches.first
    if pass_ == "wgrad" or family.operand_format(problem, "x")[0] == problem.layout:
        return 0.0
    shapes = [branches.x_shape if pass_ == "fprop" else branches.y_shape, *branches.w_shapes]
    return _copying(list(map(prod, shapes)), problem.dtype, device)


def around_branches(branches: Branches, pass_: str, device: Device) -> float:
    """Seconds of what branches one by one need beside their convolutions: slices that are copied,
    results that are added or put side by side."""
    moved = branches.bytes_around[pass_]
    return moved / (device.dram * 1e9 * assumed.DRAM) + (assumed.LAUNCH if moved else 0.0)


def _caution(family: Family) -> str:
    """What keeps an experimental family from running, in words."""
    words = " (experimental: a measurement chooses it, or TRIDIL_EXPERIMENTAL=1)"
    return words if family.experimental else ""


def why(
    problem: Problem, pass_: str, config: Config, device: Device, precision: str = "tf32"
) -> str:
    """Why the config's kernel is the one of that pass, in words: what it is meant for, and what
    keeps the families before it in favour from running."""
    family = families.of(config.kernel)
    reasons = [family.why(problem, pass_, config, device, precision) + _caution(family)]
    for other in families.FAMILIES[families.FAMILIES.index(family) + 1 :]:
        legal = [
            option
            for option in other.options(problem, pass_, device.target, precision)
            if cfg.fits(option, problem, pass_, device.target) is None
        ]
        if legal:
            seconds = other.seconds(problem, pass_, legal, device, precision).min()
            seconds += copies(problem, pass_, other, device)
            ratio = seconds / predict(problem, pass_, config, device, precision).seconds
            reasons.append(
                f"kernel {other.kernels[0]} is predicted to take {ratio:.2f} times as long"
                + _caution(other)
            )
        elif reason := other.why_not(problem, pass_, device.target, precision):
            reasons.append(reason)
    return ": ".join(reasons)
