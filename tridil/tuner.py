"""Which config runs a pass of a problem: lookup, measuring, and the choice between the kernels and ATen.

A pass runs the config of `override`, else the one measured on this GPU (user's cache, then the shipped table), else a hint (measured with other
sources, on another GPU of the target, in the other memory format or at another batch size), else the pick of the cost model.
"""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

import torch

from . import assumed, cache, clock, cost_model, devices, dispatch, families
from . import config as cfg
from .families import Config
from .problem import PASSES, Problem

log = logging.getLogger("tridil")
# called with no arguments whenever an answer of `resolve` may have changed: those who keep answers forget them
listeners: list = []
_overrides: dict[str, Config] = {}
_told: set[tuple] = set()


def _changed():
    for listener in listeners:
        listener()


@contextmanager
def override(**configs: Config | Mapping):
    """Within the context the passes named (fprop=, dgrad=, wgrad=) run the given configs, as objects or as they are written in files, whatever was
    measured; for tests and experiments."""
    global _overrides
    unknown = set(configs) - set(PASSES)
    if unknown:
        raise ValueError(f"unknown passes {sorted(unknown)}: use {', '.join(PASSES)}")
    given = {pass_: c if isinstance(c, Config) else cfg.from_json(c, pass_) for pass_, c in configs.items()}
    before, _overrides = _overrides, _overrides | given
    _changed()
    try:
        yield
    finally:
        _overrides = before
        _changed()


@dataclass(frozen=True)
class Choice:
    """What runs one pass: the config of the kernels, where it came from, and whether "auto" runs the kernels or ATen, and why.

    record is the measurement behind the config, None where there is none; prediction is the cost model's of config.
    """
    config: Config
    source: str
    backend: str
    why: str
    record: dict | None
    prediction: cost_model.Prediction
    cudnn: float


def device_spec(target: str, device=None) -> tuple[devices.Device, str]:
    """(spec, name) of a torch.device, as its driver describes it, or of the GPU that stands for the target where there is no such device."""
    if device is not None and getattr(device, "type", "cpu") == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return devices.of_properties(properties, target), properties.name
    spec = devices.of_target(target)
    return spec, spec.name


def lookup(problem: Problem, pass_: str, target: str, precision: str, spec: devices.Device, name: str) -> tuple[Config, str, dict | None]:
    """(config, source, record): the record only of a fresh measurement of this very problem on this GPU."""
    def legal(record):
        """The config of a record, if it is one for this pass."""
        try:
            config = cfg.from_json(record["config"], pass_)
        except ValueError:                                  # of another version
            return None
        return config if cfg.fits(config, problem, pass_, target) is None else None
    if pass_ in _overrides:
        return _overrides[pass_], "override", None
    tables = [("user's cache", cache.user(target)), ("shipped table", cache.shipped(target))]
    key = cache.key(problem, pass_, precision)
    for table, entries in tables:
        record = entries.get(key, {}).get(name)
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
    return cache.code(families.of(config.kernel).plan(problem, pass_, config, precision, False))


def _hints(problem, pass_, precision, entries, name):
    """(what it is, record) of measurements that are not this one but near it, the nearest first."""
    other_layout = replace(problem, layout="nchw" if problem.layout == "nhwc" else "nhwc")
    batches = sorted((abs(n.bit_length() - problem.n.bit_length()), n) for n in {2**e for e in range(11)} | {3, 6, 12, 24} if n != problem.n)
    near = [(problem, "measured with other sources or another Triton"), (other_layout, "measured in the other memory format"),
            *((replace(problem, n=n), f"measured at batch size {n}") for distance, n in batches if distance <= 2)]
    for p, what in near:
        records = entries.get(cache.key(p, pass_, precision), {})
        for device in sorted(records, key=lambda d: (d != name, d)):
            yield what + (f" on {device}" if device != name else ""), records[device]


def decide(problem: Problem, pass_: str, target: str, precision: str = "tf32", device=None) -> Choice:
    """The config of a pass and the backend that "auto" runs: of two measured times the shorter; else the kernels where they are predicted to be
    `assumed.MARGIN` times as fast as the estimate of cuDNN."""
    spec, name = device_spec(target, device)
    config, source, record = lookup(problem, pass_, target, precision, spec, name)
    prediction, estimate = cost_model.predict(problem, pass_, config, spec, precision), cost_model.cudnn(problem, pass_, spec, precision)
    if record and (known := aten_ms(record)):
        faster = record["ms"] <= known[0]
        why = f"measured: {record['ms']:.4g} ms, ATen {known[0]:.4g} ms with {known[1]}"
    elif record:
        faster, why = True, f"measured: {record['ms']:.4g} ms; ATen could not run it"
    elif source == "override":
        faster, why = True, "override"
    else:
        faster = prediction.seconds * assumed.MARGIN <= estimate
        why = (f"predicted: {1e3 * prediction.seconds:.4g} ms, cuDNN estimated at {1e3 * estimate:.4g} ms; "
               f"the kernels need a factor of {assumed.MARGIN}")
    return Choice(config, source, "triton" if faster else "aten", why, record, prediction, estimate)


# how ATen is measured: with the algorithms that cuDNN's heuristics choose, and with those that its search finds (torch.backends.cudnn.benchmark)
ATEN = {"aten_ms": False, "aten_benchmark_ms": True}


def aten_ms(record: dict) -> tuple[float, str] | None:
    """(milliseconds, how) of ATen in a record of the cache: as it runs under the present torch.backends.cudnn.benchmark, else as it was measured."""
    for name in sorted(ATEN, key=lambda name: ATEN[name] != torch.backends.cudnn.benchmark):
        if record.get(name):
            return record[name], f"cudnn.benchmark {'on' if ATEN[name] else 'off'}"
    return None


def resolve(problem: Problem, pass_: str, target: str, precision: str, device=None, allow_aten: bool = False) -> Config | None:
    """The config that runs one pass, or None where ATen is known to be faster (only with allow_aten).

    device: the tensors' torch.device. Where nothing was measured there, it is measured now if torch.backends.cudnn.benchmark or TRIDIL_TUNE=1 says so
    (never while a CUDA graph is captured); else the first miss of the process logs how to measure.
    """
    choice = decide(problem, pass_, target, precision, device)
    if choice.record is None and choice.source != "override" and device is not None and device.type == "cuda":
        if _tunes_on_first_use():
            _tell_of_first_use(problem, pass_, precision, target)
            if _measure_now([(problem, pass_, precision)], Gpu(device), 4, assumed.FIRST_USE, (torch.backends.cudnn.benchmark,)):
                choice = decide(problem, pass_, target, precision, device)
        elif _tells("miss", target):
            log.warning("tridil: nothing was measured for %s on %s, %s; to measure it: python -m tridil tune --shape \"%s\" --dtype %s",
                        cache.key(problem, pass_, precision), target, choice.source, shape_of(problem), problem.dtype)
    return None if allow_aten and choice.backend == "aten" else choice.config


def _tells(*what) -> bool:
    """Whether this is the first time that the process has this to tell."""
    if what in _told:
        return False
    _told.add(what)
    return True


def _tell_of_first_use(problem, pass_, precision, target):
    level = logging.WARNING if _tells("first use", target) else logging.INFO
    why = "TRIDIL_TUNE=1" if os.environ.get("TRIDIL_TUNE") == "1" else "torch.backends.cudnn.benchmark"
    log.log(level, "tridil: %s: measuring %s, about %g s, as every new convolution and pass from now on; answers are kept in %s (TRIDIL_TUNE=0 "
            "measures nothing)", why, cache.key(problem, pass_, precision), assumed.FIRST_USE, cache.path(target))


def _tunes_on_first_use() -> bool:
    variable = os.environ.get("TRIDIL_TUNE", "")
    asked = variable == "1" or variable != "0" and torch.backends.cudnn.benchmark
    return asked and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def shape_of(p: Problem) -> str:
    """A problem as the command line takes it (--shape)."""
    def pair(a, b):
        return f"{a}" if a == b else f"{a},{b}"
    (top, bottom), (left, right) = p.padding
    pad = pair(top, left) if (top, left) == (bottom, right) else f"{top},{bottom},{left},{right}"
    return f"n={p.n} c={p.c} h={p.h} w={p.w} k={p.k} r={p.r} s={p.s} stride={pair(*p.stride)} pad={pad} d={pair(*p.dilation)} g={p.groups}"


class Gpu:
    """What measuring needs of hardware."""

    def __init__(self, device: torch.device):
        self.device = device
        self.target = dispatch.target()
        self.spec, self.name = device_spec(self.target, device)

    def tensors(self, problem: Problem):
        """(x, w, bias, dy) in the problem's memory format."""
        from .launch import FORMATS
        from .testing import random_tensors
        return tuple(t.contiguous(memory_format=FORMATS[problem.layout]) if t.dim() == 4 else t for t in random_tensors(problem, self.device))

    def prepare(self, problem: Problem, pass_: str, config: Config | None, precision: str) -> Callable:
        """Function of a pass's two tensors: by a config, or (None) by ATen."""
        from . import launch, ops
        return partial(ops.aten, problem, pass_) if config is None else launch.prepare(problem, pass_, config, precision)

    def reference(self, problem: Problem, pass_: str, a, b):
        """The float64 result of one pass."""
        from . import reference
        return getattr(reference, pass_)(problem, a, b)

    def milliseconds(self, run: Callable, a, b) -> float:
        """Median time of run(a, b) on the device: its tensors take turns with copies, so that none is in the L2 cache."""
        size = sum(t.numel() * t.element_size() for t in (a, b))
        sets = [(a, b), *((a.clone(), b.clone()) for _ in range(clock.turns(size, int(self.spec.l2 * 2**20)) - 1))]
        (_, median, _), _ = clock.device([partial(run, *operands) for operands in sets])
        return median

    def compiling(self, jobs: list):
        """`aot.compiling` for this device."""
        from .aot import compiling
        return compiling(jobs, self.target)


def tune(subject, *args, passes=PASSES, top: int = 8, budget: float | None = None, device=None, precision: str | None = None, force: bool = False,
         progress: bool = True, gpu: Gpu | None = None, **kwargs) -> list[dict]:
    """Measures which config runs fastest, and ATen beside it, and keeps the answers in the user's cache (`tridil.cache`).

    subject: a Problem or several; or the input of a convolution with its weight and the other arguments of `dilated_conv2d`; or a module with example
    inputs, whose convolutions are measured. passes: of "fprop", "dgrad", "wgrad". top: candidates, the cost model's best. budget: seconds; what was
    measured by then is kept, and a later call goes on, since what is already in the cache is left out unless `force`. Under torchrun every rank
    measures its part of several problems. A candidate whose result is wrong cannot win.

    Returns a row per pass: problem, pass, precision, config (None where every candidate was rejected), ms, aten_ms and aten_benchmark_ms (ATen with
    cuDNN's heuristics and with its search), predicted_ms, tried, rejected (pairs of config and reason), target, device, date. Raises RuntimeError
    where there is no GPU, TypeError for another subject, ValueError for an unknown pass.
    """
    problems = list(dict.fromkeys(_problems(subject, args, kwargs)))
    if set(passes) - set(PASSES) or top < 1:
        raise ValueError(f"passes must be of {PASSES} and top at least 1, got passes={passes}, top={top}")
    if gpu is None:
        device = torch.device(device if device is not None else "cuda")
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(f"configs are measured on a GPU, got {device} and torch.cuda.is_available() is {torch.cuda.is_available()}; "
                               "python -m tridil explain shows what is predicted")
        with torch.cuda.device(device):
            return tune(problems, passes=passes, top=top, budget=budget, precision=precision, force=force, progress=progress,
                        gpu=Gpu(torch.device("cuda", torch.cuda.current_device())))
    from .ops import fp32_precision
    jobs = [(p, pass_, (precision or fp32_precision(gpu.target)) if p.dtype == "float32" else "ieee") for p in problems
            if not p.is_empty for pass_ in passes]
    if len(problems) > 1:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        jobs = jobs[rank::world]
    jobs = [job for job in jobs if force or not _is_measured(*job, gpu)]
    rows = _measure_now(jobs, gpu, top, budget, tuple(ATEN.values()), progress)
    if len(rows) < len(jobs):
        log.warning("tridil: the budget of %g s ended after %d of %d measurements: the same command goes on from there", budget, len(rows), len(jobs))
    if rows:
        _changed()
    return rows


def _measure_now(jobs: list, gpu: Gpu, top: int, budget: float | None, settings: tuple[bool, ...], progress: bool = False) -> list[dict]:
    """Rows of (problem, pass, precision) jobs, kept in the user's cache; their kernels are compiled in threads meanwhile. settings: those of
    torch.backends.cudnn.benchmark under which ATen is timed."""
    deadline = time.monotonic() + (float("inf") if budget is None else budget)
    ranked = {job: cost_model.rank(*job[:2], gpu.spec, job[2])[:top] for job in jobs}
    rows: list[dict] = []
    with gpu.compiling([(*job, config) for job, configs in ranked.items() for config in configs]) as compiled:
        for job in _bar(jobs, progress):
            if rows and time.monotonic() >= deadline:
                break
            rows.append(row := _measure(*job, ranked[job], gpu, deadline, settings, compiled))
            _keep(row)
    return rows


def gather(rows: list[dict]) -> list[dict]:
    """The rows of all ranks of a torchrun, which one rank of every host also merges into its user's cache; without torchrun, rows."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return rows
    import torch.distributed as dist
    dist.init_process_group("gloo")
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    rows = [row for part in parts for row in part]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for row in rows:
            _keep(row)
    dist.barrier()
    dist.destroy_process_group()
    return rows


def _problems(subject, args, kwargs) -> list[Problem]:
    if isinstance(subject, Problem):
        return [subject]
    if isinstance(subject, torch.nn.Module):
        from .convert import scan
        return list(scan(subject, *args, **kwargs))
    if isinstance(subject, torch.Tensor):
        from .functional import problem_of_tensors
        return [problem_of_tensors(subject, *args, **kwargs)]
    problems = list(subject) if isinstance(subject, (list, tuple, set)) else [subject]
    if not all(isinstance(p, Problem) for p in problems):
        raise TypeError(f"tune takes Problems, a convolution's tensors, or a module and its inputs, got {type(subject).__name__}")
    return problems


def _is_measured(problem, pass_, precision, gpu) -> bool:
    record = cache.user(gpu.target).get(cache.key(problem, pass_, precision), {}).get(gpu.name)
    return record is not None and cache.is_fresh(record)


def _measure(problem: Problem, pass_: str, precision: str, configs: list[Config], gpu: Gpu, deadline: float, settings, compiled) -> dict:
    """One row of `tune`. A result outside its error budget, against float64 (where memory is short: against ATen), rejects its config."""
    from .testing import budget, reduction_depth
    x, w, _, dy = gpu.tensors(problem)
    a, b = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    rejected, seen, best = [], [], None
    aten, aten_times = _measure_aten(problem, pass_, precision, gpu, a, b, settings)
    try:
        expected, share = gpu.reference(problem, pass_, a, b), 1
    except torch.OutOfMemoryError:
        if aten is None:
            raise
        expected, share = aten.double(), 2                               # both err
    del aten
    allowed = share * budget(expected, getattr(torch, problem.dtype), reduction_depth(problem, pass_), precision, pass_)
    queue = list(configs)
    while queue and (best is None or time.monotonic() < deadline):
        config, reason = queue.pop(0), None
        try:
            if not compiled(problem, pass_, precision, config, None if best is None else deadline - time.monotonic()):
                break                                                    # it takes longer than there is time
            seen.append(config)
            run = gpu.prepare(problem, pass_, config, precision)
            error = (run(a, b).double() - expected).abs()
            bad = ~(error <= allowed)                                    # NaN is bad
            if bad.any():
                reason = f"{int(bad.sum())} of {bad.numel()} elements are wrong, by up to {error.nan_to_num(nan=float('inf')).max():.3g}"
            else:
                ms = gpu.milliseconds(run, a, b)
                best = (config, ms) if best is None or ms < best[1] else best
        except Exception as e:                                           # a config that does not compile or launch has lost
            reason = f"{type(e).__name__}: {e}"
        if reason:
            rejected.append((config, reason))
            log.warning("tridil: rejected %s for %s of %s: %s", cfg.describe(config), pass_, problem.key(), reason)
        if not queue and best and best[0] in configs:                    # at last the winner's neighbours in pipeline depth
            near = (replace(best[0], num_stages=best[0].num_stages + change) for change in (-1, 1))
            queue = [c for c in near if c not in seen and cfg.fits(c, problem, pass_, gpu.target) is None]
    config, ms = best or (None, None)
    predicted = 1e3 * cost_model.predict(problem, pass_, config, gpu.spec, precision).seconds if config else None
    return {"problem": problem, "pass": pass_, "precision": precision, "config": config, "ms": ms, **aten_times, "predicted_ms": predicted,
            "tried": len(seen), "rejected": rejected, "target": gpu.target, "device": gpu.name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _measure_aten(problem: Problem, pass_: str, precision: str, gpu: Gpu, a, b, settings):
    """(result or None, {"aten_ms": ..., "aten_benchmark_ms": ...}), None where it was not measured or ATen has no such convolution.

    Each setting has a thread of its own: ATen remembers the first algorithm that a thread took for a convolution, whatever the setting is then.
    """
    result, times, before = None, dict.fromkeys(ATEN), torch.backends.cudnn.benchmark
    for name, benchmark in ATEN.items():
        if benchmark not in settings:
            continue

        def measured():
            with torch.cuda.device(gpu.device) if gpu.device.type == "cuda" else nullcontext():
                run = gpu.prepare(problem, pass_, None, precision)
                return run(a, b), gpu.milliseconds(run, a, b)
        torch.backends.cudnn.benchmark = benchmark
        try:
            with ThreadPoolExecutor(1) as thread:
                result, times[name] = thread.submit(measured).result()
        except (RuntimeError, NotImplementedError) as e:                 # no such convolution there
            log.info("tridil: ATen cannot run %s of %s: %s", pass_, problem.key(), e)
        finally:
            torch.backends.cudnn.benchmark = before
    return result, times


def _keep(row: dict) -> None:
    """Writes a row of `tune` into the user's cache."""
    if row["config"] is not None:
        times = {name: row[name] and round(row[name], 6) for name in ("ms", *ATEN)}
        code = code_of(row["problem"], row["pass"], row["config"], row["precision"])
        record = {"config": cfg.to_json(row["config"]), **times, "code": code, "triton": cache.triton(), "torch": torch.__version__, "date": row["date"]}
        cache.add(row["target"], {cache.key(row["problem"], row["pass"], row["precision"]): {row["device"]: record}})


def _bar(jobs: list, progress: bool):
    """The jobs, with a progress bar where rich is installed."""
    if not progress:
        return jobs
    try:
        from rich.progress import track
    except ImportError:
        return jobs
    return track(jobs, description="measuring", disable=not jobs)
