"""Which config runs a pass of a problem, and whether the kernels or ATen run it. Reads only:
tuner.py measures.

A pass runs the config of `override`, else the one measured on this GPU (user's cache, then the
shipped table), else a hint (measured with other sources, on another GPU of the target, in the other
memory format or at another batch size), else the pick of the cost model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import assumed, cache, cost_model, devices, families
from . import config as cfg
from .branches import Branches
from .families import Config
from .problem import PASSES, Problem

log: logging.Logger = logging.getLogger("tridil")
# called with no arguments whenever an answer of `resolve` may have changed: those who keep answers
# forget them
listeners: list[Callable[[], object]] = []
# measures one pass of a problem, (problem, pass, precision, torch.device) -> whether there is an
# answer now: what climbs from a convolution to the tuner, which sets it
first_use: Callable[[Problem, str, str, torch.device], bool] | None = None
_overrides: dict[str, Config] = {}
_told: set[tuple] = set()


def changed() -> None:
    """Tells the listeners."""
    for listener in listeners:
        listener()


@contextmanager
def override(**configs: Config | Mapping[str, Any]) -> Iterator[None]:
    """Within the context the passes named (fprop=, dgrad=, wgrad=) run the given configs, as
    objects or as they are written in files, whatever was measured; for tests and experiments."""
    global _overrides
    unknown = set(configs) - set(PASSES)
    if unknown:
        raise ValueError(f"unknown passes {sorted(unknown)}: use {', '.join(PASSES)}")
    given = {
        pass_: c if isinstance(c, Config) else cfg.from_json(c, pass_)
        for pass_, c in configs.items()
    }
    before, _overrides = _overrides, _overrides | given
    changed()
    try:
        yield
    finally:
        _overrides = before
        changed()


@dataclass(frozen=True)
class Choice:
    """What runs one pass: the config of the kernels, where it came from, and whether "auto" runs
    the kernels or ATen, and why.

    record is the measurement behind the config, None where there is none; prediction is the cost
    model's of config.
    """

    config: Config
    source: str
    backend: str
    why: str
    record: dict[str, Any] | None
    prediction: cost_model.Prediction
    cudnn: float


def device_spec(target: str, device: torch.device | None = None) -> tuple[devices.Device, str]:
    """(spec, name) of a torch.device, as its driver describes it, or of the GPU that stands for the
    target where there is no such device."""
    if (
        device is not None
        and getattr(device, "type", "cpu") == "cuda"
        and torch.cuda.is_available()
    ):
        properties = torch.cuda.get_device_properties(device)
        return devices.of_properties(properties, target), properties.name
    spec = devices.of_target(target)
    return spec, spec.name


def lookup(
    problem: Problem, pass_: str, target: str, precision: str, spec: devices.Device, name: str
) -> tuple[Config, str, dict[str, Any] | None]:
    """(config, source, record): the record only of a fresh measurement of this very problem on this
    GPU."""

    def legal(record):
        """The config of a record, if it is one for this pass."""
        try:
            config = cfg.from_json(record["config"], pass_)
        except ValueError:  # of another version
            return None
        return config if cfg.fits(config, problem, pass_, target) is None else None

    if pass_ in _overrides:
        return _overrides[pass_], "override", None
    tables = [("user's cache", cache.user(target)), ("shipped table", cache.shipped(target))]
    key = cache.key(problem, pass_, precision)
    for table, entries in tables:
        record: Any = entries.get(key, {}).get(name)
        config = legal(record) if record and cache.is_fresh(record) else None
        if config and record.get("code") == code_of(problem, pass_, config, precision):
            return config, f"{table}: measured {record['date'][:10]}", record
    for table, entries in tables:
        for what, hint in _hints(problem, pass_, precision, entries, name):
            if config := legal(hint):
                return config, f"hint of the {table}: {what}", None
    return cost_model.best(problem, pass_, spec, precision), "cost model (nothing measured)", None


def code_of(problem: Problem, pass_: str, config: Config, precision: str) -> str:
    """`cache.code` of what a config launches."""
    return cache.code(families.of(config.kernel).plan(problem, pass_, config, precision, ""))


def _hints(problem, pass_, precision, entries, name):
    """(what it is, record) of measurements that are not this one but near it, the nearest first."""
    other_layout = replace(
        problem, layout="nchw" if problem.layout == "nhwc" else "nhwc", operands=""
    )
    batches = sorted(
        (abs(n.bit_length() - problem.n.bit_length()), n)
        for n in {2**e for e in range(11)} | {3, 6, 12, 24}
        if n != problem.n
    )
    near = [
        (problem, "measured with other sources or another Triton"),
        (other_layout, "measured in the other memory format"),
        *(
            (replace(problem, n=n), f"measured at batch size {n}")
            for distance, n in batches
            if distance <= 2
        ),
    ]
    for p, what in near:
        records = entries.get(cache.key(p, pass_, precision), {})
        for device in sorted(records, key=lambda d: (d != name, d)):
            yield what + (f" on {device}" if device != name else ""), records[device]


def library(target: str) -> str:
    """What ATen calls on a target, by the name that people know."""
    return "cuDNN" if target.startswith("cuda") else "ATen"


def decide(
    problem: Problem,
    pass_: str,
    target: str,
    precision: str = "tf32",
    device: torch.device | None = None,
) -> Choice:
    """The config of a pass and the backend that "auto" runs: of two measured times the shorter;
    else the kernels where they are predicted to be `assumed.MARGIN` times as fast as the estimate
    of cuDNN."""
    spec, name = device_spec(target, device)
    config, source, record = lookup(problem, pass_, target, precision, spec, name)
    prediction, estimate = (
        cost_model.predict(problem, pass_, config, spec, precision),
        cost_model.cudnn(problem, pass_, spec, precision),
    )
    if record and (known := aten_ms(record)):
        faster = record["ms"] <= known[0]
        why = f"measured: {record['ms']:.4g} ms, ATen {known[0]:.4g} ms with {known[1]}"
    elif record:
        faster, why = True, f"measured: {record['ms']:.4g} ms; ATen could not run it"
    elif source == "override":
        faster, why = True, "override"
    else:
        faster = prediction.seconds * assumed.MARGIN <= estimate
        why = (
            f"predicted: {1e3 * prediction.seconds:.4g} ms, {library(target)} estimated at {1e3 * estimate:.4g} ms; "
            f"ATen stays unless the kernels are {assumed.MARGIN} times as fast"
        )
    return Choice(config, source, "triton" if faster else "aten", why, record, prediction, estimate)


# how ATen is measured: with the algorithms that cuDNN's heuristics choose, and with those that its
# search finds (torch.backends.cudnn.benchmark)
ATEN = {"aten_ms": False, "aten_benchmark_ms": True}


def aten_ms(record: dict[str, Any]) -> tuple[float, str] | None:
    """(milliseconds, how) of ATen in a record of the cache: as it runs under the present
    torch.backends.cudnn.benchmark, else as it was measured."""
    for name in sorted(ATEN, key=lambda name: ATEN[name] != torch.backends.cudnn.benchmark):
        if record.get(name):
            return record[name], f"cudnn.benchmark {'on' if ATEN[name] else 'off'}"
    return None


def resolve(
    problem: Problem,
    pass_: str,
    target: str,
    precision: str,
    device: torch.device | None = None,
    allow_aten: bool = False,
) -> Config | None:
    """The config that runs one pass, or None where ATen is known to be faster (only with
    allow_aten).

    device: the tensors' torch.device. Where nothing was measured there, it is measured now if
    torch.backends.cudnn.benchmark or TRIDIL_TUNE=1 says so (never while a CUDA graph is captured);
    else the first miss of the process logs how to measure.
    """
    choice = decide(problem, pass_, target, precision, device)
    if (
        choice.record is None
        and choice.source != "override"
        and device is not None
        and device.type == "cuda"
    ):
        if first_use and _tunes_on_first_use():
            _tell_of_first_use(problem, pass_, precision, target)
            if first_use(problem, pass_, precision, device):
                choice = decide(problem, pass_, target, precision, device)
        elif _tells("miss", target):
            log.warning(
                'tridil: nothing was measured for %s on %s, %s; to measure it: python -m tridil tune --shape "%s" --dtype %s',
                cache.key(problem, pass_, precision),
                target,
                choice.source,
                problem.shape(),
                problem.dtype,
            )
    return None if allow_aten and choice.backend == "aten" else choice.config


def _tells(*what) -> bool:
    """Whether this is the first time that the process has this to tell."""
    if what in _told:
        return False
    _told.add(what)
    return True


def _tell_of_first_use(problem, pass_, precision, target):
    level = logging.WARNING if _tells("first use", target) else logging.INFO
    why = (
        "TRIDIL_TUNE=1"
        if os.environ.get("TRIDIL_TUNE") == "1"
        else "torch.backends.cudnn.benchmark"
    )
    log.log(
        level,
        "tridil: %s: measuring %s, about %g s, as every new convolution and pass from now on; answers are kept in %s (TRIDIL_TUNE=0 "
        "measures nothing)",
        why,
        cache.key(problem, pass_, precision),
        assumed.FIRST_USE,
        cache.path(target),
    )


def _tunes_on_first_use() -> bool:
    variable = os.environ.get("TRIDIL_TUNE", "")
    asked = variable == "1" or variable != "0" and torch.backends.cudnn.benchmark
    return asked and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def decide_branches(
    branches: Branches,
    pass_: str,
    target: str,
    precision: str = "tf32",
    device: torch.device | None = None,
) -> tuple[Config | None, float, float]:
    """(config of the launch that runs a pass of all branches, its seconds, seconds of the branches
    one by one as "auto" runs each, with what is around them). The config is None where no launch can
    run them."""
    spec, _ = device_spec(target, device)
    apart = cost_model.around_branches(branches, pass_, spec)
    for problem in branches.problems:
        choice = decide(problem, pass_, target, precision, device)
        record, aten = choice.record, aten_ms(choice.record) if choice.record else None
        if choice.backend == "triton":
            apart += record["ms"] / 1e3 if record else choice.prediction.seconds
        else:
            apart += aten[0] / 1e3 if aten else choice.cudnn / assumed.MARGIN
    found = cost_model.best_of_branches(branches, pass_, spec, precision)
    return (None, apart, apart) if found is None else (*found, apart)


def measured_branches(
    branches: Branches, pass_: str, target: str, precision: str, name: str
) -> tuple[Config, dict[str, Any]] | None:
    """(config, record) of the fresh measurement of a pass of all branches on the GPU of that name."""
    key = cache.key(branches, pass_, precision)
    for entries in (cache.user(target), cache.shipped(target)):
        record = entries.get(key, {}).get(name)
        if not record or not cache.is_fresh(record):
            continue
        try:
            config = cfg.from_json(record["config"], pass_)
            plan = families.of(config.kernel).branch_plan(branches, pass_, config, precision, "")
        # of another version
        except (ValueError, NotImplementedError):
            continue
        unfit = families.of(config.kernel).unfit(config, branches, pass_, target)
        if unfit is None and record.get("code") == cache.code(plan):
            return config, record
    return None


def resolve_branches(
    branches: Branches,
    pass_: str,
    target: str,
    precision: str,
    device: torch.device | None = None,
    auto: bool = False,
) -> Config | None:
    """The config that runs a pass of all branches in one launch, or None: where no launch can, and
    (auto) where they are predicted to be faster one by one."""
    spec, name = device_spec(target, device)
    if measured := measured_branches(branches, pass_, target, precision, name):
        best, record = measured
        return best if not auto or record["ms"] <= record["apart_ms"] else None
    if not auto:
        found = cost_model.best_of_branches(branches, pass_, spec, precision)
        return found and found[0]
    config, together, apart = decide_branches(branches, pass_, target, precision, device)
    return config if together < apart else None
