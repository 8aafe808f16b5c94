"""Predicted time of (problem, pass, config) on a device: ranks candidates where nothing was
measured, and says what limits them.

How long a config takes is its family's to say; what is assumed stands in assumed.py. `python
perf/sweep.py --validate-model` compares predictions with the clock of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter

from . import config as cfg
from . import cudnn as aten
from . import devices, families
from .devices import Device
from .families import Config, Prediction
from .problem import Problem


def roof(problem: Problem, device: Device, precision: str = "tf32") -> float:
    """Seconds that no implementation of a pass can beat: useful MACs at the peak of the device's
    units, or compulsory bytes at DRAM bandwidth."""
    rate = device.mma_rate(problem.dtype, precision) * device.sms * device.clock * 1e9
    return max(problem.useful_macs / rate, problem.bytes / (device.dram * 1e9))


def predict(
    problem: Problem, pass_: str, config: Config, device: Device, precision: str = "tf32"
) -> Prediction:
    """Time of one pass whose tensors are channels_last, its launches one after another."""
    return families.of(config.kernel).predict(problem, pass_, config, device, precision)


def cudnn(problem: Problem, pass_: str, device: Device, precision: str = "tf32") -> float:
    """Seconds that ATen is given (cudnn.py), on channels_last tensors as in `predict`: of others
    both make copies; depthwise layers run in place."""
    is_depthwise = aten.kind(problem, pass_) == "depthwise"
    return aten.seconds(
        problem if is_depthwise else replace(problem, layout="nhwc"), pass_, device, precision
    )


def _ranked(problem: Problem, pass_: str, device: Device, precision: str) -> Iterator[Config]:
    """The candidates of all families, the fastest prediction first; made as they are asked for.
    Raises ValueError when there is none."""
    found, none = [], True
    for family in families.FAMILIES:
        seconds, config = family.search(problem, pass_, device, precision)
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
def _best(problem: Problem, pass_: str, device: Device, precision: str) -> Config:
    return next(_ranked(problem, pass_, device, precision))


def best(problem: Problem, pass_: str, device: Device | str, precision: str = "tf32") -> Config:
    """The config that runs where nothing was measured, on a device or on the one that stands for a
    target such as "cuda:90"."""
    return _best(
        problem, pass_, devices.of_target(device) if isinstance(device, str) else device, precision
    )


def why(
    problem: Problem, pass_: str, config: Config, device: Device, precision: str = "tf32"
) -> str:
    """Why the config's kernel is the one of that pass, in words: what it is meant for, and what
    keeps the families before it in favour from running."""
    family = families.of(config.kernel)
    reasons = [family.why(problem, pass_, config, device, precision)]
    for other in families.FAMILIES[families.FAMILIES.index(family) + 1 :]:
        legal = [
            option
            for option in other.options(problem, pass_, device.target, precision)
            if cfg.fits(option, problem, pass_, device.target) is None
        ]
        if legal:
            ratio = (
                other.seconds(problem, pass_, legal, device, precision).min()
                / predict(problem, pass_, config, device, precision).seconds
            )
            reasons.append(
                f"kernel {other.kernels[0]} is predicted to take {ratio:.2f} times as long"
            )
        elif reason := other.why_not(problem, pass_, device.target, precision):
            reasons.append(reason)
    return ": ".join(reasons)
