"""Which config runs a pass of a problem: lookup, measuring, and the choice between the kernels and ATen.

A pass runs the config of `override`, else the one measured on this GPU (user's cache, then the shipped table), else a hint (measured with other
sources, on another GPU of the target, in the other memory format or at another batch size), else the pick of the cost model.
"""
from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import torch

from . import assumed, cache, cost_model, devices, dispatch
from . import config as cfg
from .problem import PASSES, Problem

log = logging.getLogger("tridil")
# called with no arguments whenever an answer of `resolve` may have changed: those who keep answers forget them
listeners: list = []
_overrides: dict[str, dict] = {}
_told: set[str] = set()


def _changed():
    for listener in listeners:
        listener()


@contextmanager
def override(**configs: dict):
    """Within the context the passes named (fprop=, dgrad=, wgrad=) run the given configs, whatever was measured; for tests and experiments."""
    global _overrides
    unknown = set(configs) - set(PASSES)
    if unknown:
        raise ValueError(f"unknown passes {sorted(unknown)}: use {', '.join(PASSES)}")
    before, _overrides = _overrides, _overrides | configs
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
    config: dict
    source: str
    backend: str
    why: str
    record: dict | None
    prediction: cost_model.Prediction
    cudnn: float


def device_spec(target: str, device=None) -> tuple[devices.Device, str]:
    """(spec, name) of a torch.device, or of the GPU that stands for the target where there is no such device."""
    if device is not None and getattr(device, "type", "cpu") == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
        return devices.of_name(name, target), name
    spec = devices.of_target(target)
    return spec, spec.name


def lookup(problem: Problem, pass_: str, target: str, precision: str, spec: devices.Device, name: str) -> tuple[dict, str, dict | None]:
    """(config, source, record): the record only of a fresh measurement of this very problem on this GPU."""
    def fits(config):
        return cfg.fits(config, problem, pass_, target) is None
    if pass_ in _overrides:
        return _overrides[pass_], "override", None
    tables = [("user's cache", cache.user(target)), ("shipped table", cache.shipped(target))]
    key = cache.key(problem, pass_, precision)
    for table, entries in tables:
        record = entries.get(key, {}).get(name)
        if record and cache.is_fresh(record) and fits(record["config"]):
            return record["config"], f"{table}: measured {record['date'][:10]}", record
    for table, entries in tables:
        for what, hint in _hints(problem, pass_, precision, entries, name):
            if fits(hint["config"]):
                return hint["config"], f"hint of the {table}: {what}", None
    return cost_model.best(problem, pass_, spec, precision), "cost model (nothing measured)", None


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
    if record and record.get("aten_ms"):
        faster = record["ms"] <= record["aten_ms"]
        why = f"measured: {record['ms']:.4g} ms, ATen {record['aten_ms']:.4g} ms"
    elif record:
        faster, why = True, f"measured: {record['ms']:.4g} ms; ATen could not run it"
    elif source == "override":
        faster, why = True, "override"
    else:
        faster = prediction.seconds * assumed.MARGIN <= estimate
        why = (f"predicted: {1e3 * prediction.seconds:.4g} ms, cuDNN estimated at {1e3 * estimate:.4g} ms; "
               f"the kernels need a factor of {assumed.MARGIN}")
    return Choice(config, source, "triton" if faster else "aten", why, record, prediction, estimate)


def resolve(problem: Problem, pass_: str, target: str, precision: str, device=None, allow_aten: bool = False) -> dict | None:
    """The config that runs one pass, or None where ATen is known to be faster (only with allow_aten).

    device: the tensors' torch.device. Where nothing was measured there, it is measured now if torch.backends.cudnn.benchmark or TRIDIL_TUNE=1 says so
    (never while a CUDA graph is captured); else the first miss of the process logs how to measure.
    """
    choice = decide(problem, pass_, target, precision, device)
    if choice.record is None and choice.source != "override" and device is not None and device.type == "cuda":
        if _tunes_on_first_use():
            if tune(problem, passes=(pass_,), top=4, device=device, precision=precision, progress=False, notify=False):
                choice = decide(problem, pass_, target, precision, device)
        elif target not in _told:
            _told.add(target)
            log.warning("tridil: nothing was measured for %s on %s, %s; to measure it: python -m tridil tune --shape \"%s\" --dtype %s",
                        cache.key(problem, pass_, precision), target, choice.source, shape_of(problem), problem.dtype)
    return None if allow_aten and choice.backend == "aten" else choice.config


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
        self._flush = None

    def tensors(self, problem: Problem):
        """(x, w, bias, dy) in the problem's memory format."""
        from .launch import FORMATS
        from .testing import random_tensors
        return tuple(t.contiguous(memory_format=FORMATS[problem.layout]) if t.dim() == 4 else t for t in random_tensors(problem, self.device))

    def run(self, problem: Problem, pass_: str, config: dict | None, tensors, precision: str):
        """The result of one pass by a config, or by ATen."""
        from . import launch, ops
        x, w, _, dy = tensors
        operands = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
        if config is None:
            return ops.aten(problem, pass_, *operands)
        return getattr(launch, pass_)(problem, *operands, *([None] if pass_ == "fprop" else []), config, precision)

    def reference(self, problem: Problem, pass_: str, tensors):
        """The float64 result of one pass."""
        from . import reference
        x, w, _, dy = tensors
        return getattr(reference, pass_)(problem, *{"fprop": (x, w, None), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_])

    def milliseconds(self, fn) -> float:
        """Median time of a call by CUDA events, after a warm-up, the L2 cache flushed before each."""
        from triton.testing import do_bench
        return do_bench(fn, warmup=10, rep=50, return_mode="median")

    def compile(self, jobs: list) -> None:
        """Fills Triton's cache with the kernels of (problem, pass, precision, config) jobs, on all cores."""
        from .aot import precompile
        precompile(jobs, self.target)


def tune(subject, *args, passes=PASSES, top: int = 8, budget: float | None = None, device=None, precision: str | None = None, force: bool = False,
         progress: bool = True, gpu: Gpu | None = None, notify: bool = True, **kwargs) -> list[dict]:
    """Measures which config runs fastest, and ATen beside it, and keeps the answers in the user's cache (`tridil.cache`).

    subject: a Problem or several; or the input of a convolution with its weight and the other arguments of `dilated_conv2d`; or a module with example
    inputs, whose convolutions are measured. passes: of "fprop", "dgrad", "wgrad". top: candidates, the cost model's best. budget: seconds; what was
    measured by then is kept, and a later call goes on, since what is already in the cache is left out unless `force`. Under torchrun every rank
    measures its part. A candidate whose result is wrong cannot win.

    Returns a row per pass: problem, pass, precision, config (None where every candidate was rejected), ms, aten_ms, predicted_ms, tried, rejected
    (pairs of config and reason), target, device, date. Raises RuntimeError where there is no GPU, TypeError for another subject, ValueError for an
    unknown pass.
    """
    problems = _problems(subject, args, kwargs)
    if set(passes) - set(PASSES) or top < 1:
        raise ValueError(f"passes must be of {PASSES} and top at least 1, got passes={passes}, top={top}")
    if gpu is None:
        device = torch.device(device if device is not None else "cuda")
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(f"configs are measured on a GPU, got {device} and torch.cuda.is_available() is {torch.cuda.is_available()}; "
                               "python -m tridil explain shows what is predicted")
        with torch.cuda.device(device):
            return tune(problems, passes=passes, top=top, budget=budget, precision=precision, force=force, progress=progress,
                        gpu=Gpu(torch.device("cuda", torch.cuda.current_device())), notify=notify)
    from .ops import fp32_precision
    deadline = time.monotonic() + (float("inf") if budget is None else budget)
    jobs = [(p, pass_, (precision or fp32_precision(gpu.target)) if p.dtype == "float32" else "ieee") for p in dict.fromkeys(problems)
            if not p.is_empty for pass_ in passes]
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    jobs = [job for job in jobs[rank::world] if force or not _is_measured(*job, gpu)]
    rows: list[dict] = []
    picks: dict[tuple, list[dict]] = {}
    for i, job in enumerate(_bar(jobs, progress)):
        if time.monotonic() >= deadline:
            log.warning("tridil: the budget of %g s ended after %d of %d measurements: the same command goes on from there", budget, i, len(jobs))
            break
        if job not in picks:                                             # compiled some jobs at a time, on all cores
            picks = {other: cost_model.rank(*other[:2], gpu.spec, other[2])[:top] for other in jobs[i:i + 32]}
            gpu.compile([(*other, config) for other, configs in picks.items() for config in configs])
        rows.append(row := _measure(*job, picks[job], gpu, deadline))
        _keep(row)
    if rows and notify:
        _changed()
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


def _measure(problem: Problem, pass_: str, precision: str, configs: list[dict], gpu: Gpu, deadline: float) -> dict:
    """One row of `tune`. A result outside its error budget, against float64 (where memory is short: against ATen), rejects its config."""
    from .testing import budget, reduction_depth
    tensors, rejected, seen, best, aten_ms = gpu.tensors(problem), [], [], None, None

    def measured(config):
        """(result, milliseconds)"""
        return gpu.run(problem, pass_, config, tensors, precision), gpu.milliseconds(lambda: gpu.run(problem, pass_, config, tensors, precision))
    try:
        aten, aten_ms = measured(None)
    except (RuntimeError, NotImplementedError) as e:                     # no such convolution there
        log.info("tridil: ATen cannot run %s of %s: %s", pass_, problem.key(), e)
    try:
        expected, share = gpu.reference(problem, pass_, tensors), 1
    except torch.OutOfMemoryError:
        if aten_ms is None:
            raise
        expected, share = aten.double(), 2                               # both err
    allowed = share * budget(expected, getattr(torch, problem.dtype), reduction_depth(problem, pass_), precision, pass_)
    queue = list(configs)
    while queue and (best is None or time.monotonic() < deadline):
        config = queue.pop(0)
        seen.append(config)
        reason = None
        try:
            result, ms = measured(config)
            error = (result.double() - expected).abs()
            bad = ~(error <= allowed)                                    # NaN is bad
            if bad.any():
                reason = f"{int(bad.sum())} of {bad.numel()} elements are wrong, by up to {error.nan_to_num(nan=float('inf')).max():.3g}"
            elif best is None or ms < best[1]:
                best = config, ms
        except Exception as e:                                           # a config that does not compile or launch has lost
            reason = f"{type(e).__name__}: {e}"
        if reason:
            rejected.append((config, reason))
            log.warning("tridil: rejected %s for %s of %s: %s", cfg.describe(config), pass_, problem.key(), reason)
        if not queue and best and best[0] in configs:                    # at last the winner's neighbours in pipeline depth
            near = (dict(best[0], num_stages=best[0]["num_stages"] + change) for change in (-1, 1))
            queue = [c for c in near if c not in seen and cfg.fits(c, problem, pass_, gpu.target) is None]
    config, ms = best or (None, None)
    predicted = 1e3 * cost_model.predict(problem, pass_, config, gpu.spec, precision).seconds if config else None
    return {"problem": problem, "pass": pass_, "precision": precision, "config": config, "ms": ms, "aten_ms": aten_ms, "predicted_ms": predicted,
            "tried": len(seen), "rejected": rejected, "target": gpu.target, "device": gpu.name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _keep(row: dict) -> None:
    """Writes a row of `tune` into the user's cache."""
    if row["config"] is not None:
        record = {"config": row["config"], "ms": round(row["ms"], 6), "aten_ms": row["aten_ms"] and round(row["aten_ms"], 6), **cache.fingerprint(),
                  "torch": torch.__version__, "date": row["date"]}
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
