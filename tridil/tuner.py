"""Measures which config runs a pass fastest, and ATen beside it; keeps the answers in the user's
cache, where choice.py looks them up."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from . import (
    aot,
    assumed,
    cache,
    choice,
    clock,
    cost_model,
    devices,
    drivers,
    families,
    functional,
    multi_rate,
    passes,
    reference,
)
from . import config as cfg
from .branches import Branches
from .choice import ATEN
from .convert import scan
from .drivers import FORMATS
from .families import Config
from .problem import PASSES, Problem
from .testing import budget, random_tensors, reduction_depth

log: logging.Logger = logging.getLogger("tridil")


class Gpu:
    """What measuring needs of hardware."""

    def __init__(self, device: torch.device) -> None:
        self.device: torch.device = device
        self.target: str = drivers.target()
        self.spec: devices.Device
        self.name: str
        self.spec, self.name = choice.device_spec(self.target, device)

    def tensors(self, problem: Problem) -> tuple[torch.Tensor, ...]:
        """(x, w, bias, dy) in the problem's memory formats."""
        x, w, bias, dy = random_tensors(problem, self.device)
        x, dy = (t.contiguous(memory_format=FORMATS[problem.operand_layout]) for t in (x, dy))
        return x, w.contiguous(memory_format=FORMATS[problem.layout]), bias, dy

    def prepare(
        self, problem: Problem, pass_: str, config: Config | None, precision: str
    ) -> Callable[..., torch.Tensor]:
        """Function of a pass's two tensors: by a config, or (None) by ATen."""
        from . import launch  # imports Triton

        return (
            partial(passes.aten, problem, pass_)
            if config is None
            else launch.prepare(problem, pass_, config, precision)
        )

    def reference(
        self, problem: Problem, pass_: str, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """The float64 result of one pass."""
        return getattr(reference, pass_)(problem, a, b)

    def milliseconds(
        self, run: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor
    ) -> float:
        """Median time of run(a, b) on the device: its tensors take turns with copies, so that none
        is in the L2 cache."""
        size = sum(t.numel() * t.element_size() for t in (a, b))
        sets = [
            (a, b),
            *(
                (a.clone(), b.clone())
                for _ in range(clock.turns(size, int(self.spec.l2 * 2**20)) - 1)
            ),
        ]
        (_, median, _), _ = clock.device([partial(run, *operands) for operands in sets])
        return median

    def compiling(
        self, jobs: list[tuple[Problem, str, str, Config]]
    ) -> AbstractContextManager[Callable[..., bool]]:
        """`aot.compiling` for this device."""
        return aot.compiling(jobs, self.target)


def tune(
    subject: Problem | Branches | Iterable[Problem] | torch.Tensor | torch.nn.Module,
    *args: Any,
    passes: Sequence[str] = PASSES,
    top: int = 8,
    budget: float | None = None,
    device: torch.types.Device = None,
    precision: str | None = None,
    force: bool = False,
    progress: bool = True,
    gpu: Gpu | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Measures which config runs fastest, and ATen beside it, and keeps the answers in the user's
    cache (`tridil.cache`).

    subject: a Problem or several; or the input of a convolution with its weight and the other
    arguments of `dilated_conv2d`; or a module with example inputs, whose convolutions are measured;
    or Branches: see `tune_branches`.
    passes: of "fprop", "dgrad", "wgrad". top: candidates, the cost model's best. budget: seconds;
    what was measured by then is kept, and a later call goes on, since what is already in the cache
    is left out unless `force`. Under torchrun every rank measures its part of several problems. A
    candidate whose result is wrong cannot win.

    Returns a row per pass: problem, pass, precision, config (None where every candidate was
    rejected), ms, aten_ms and aten_benchmark_ms (ATen with cuDNN's heuristics and with its search),
    predicted_ms, tried, rejected (pairs of config and reason), target, device, date. Raises
    RuntimeError where there is no GPU, TypeError for another subject, ValueError for an unknown
    pass.
    """
    if isinstance(subject, Branches):
        return tune_branches(subject, passes=passes, top=top, device=device, gpu=gpu)
    problems = list(dict.fromkeys(_problems(subject, args, kwargs)))
    if set(passes) - set(PASSES) or top < 1:
        raise ValueError(
            f"passes must be of {PASSES} and top at least 1, got passes={passes}, top={top}"
        )
    if gpu is None:
        device = torch.device(device if device is not None else "cuda")
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(
                f"configs are measured on a GPU, got {device} and torch.cuda.is_available() is {torch.cuda.is_available()}; "
                "python -m tridil explain shows what is predicted"
            )
        with torch.cuda.device(device):
            return tune(
                problems,
                passes=passes,
                top=top,
                budget=budget,
                precision=precision,
                force=force,
                progress=progress,
                gpu=Gpu(torch.device("cuda", torch.cuda.current_device())),
            )
    jobs = [
        (
            p,
            pass_,
            (precision or drivers.fp32_precision(gpu.target)) if p.dtype == "float32" else "ieee",
        )
        for p in problems
        if not p.is_empty
        for pass_ in passes
    ]
    if len(problems) > 1:
        rank, world = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        jobs = jobs[rank::world]
    jobs = [job for job in jobs if force or not _is_measured(*job, gpu)]
    rows = _measure_now(jobs, gpu, top, budget, tuple(ATEN.values()), progress)
    if len(rows) < len(jobs):
        log.warning(
            "tridil: the budget of %g s ended after %d of %d measurements: the same command goes on from there",
            budget,
            len(rows),
            len(jobs),
        )
    if rows:
        choice.changed()
    return rows


def tune_branches(
    branches: Branches,
    *,
    passes: Sequence[str] = PASSES,
    top: int = 4,
    device: torch.types.Device = None,
    gpu: Gpu | None = None,
) -> list[dict[str, Any]]:
    """Measures parallel branches in one launch, by the `top` configs that the cost model ranks first,
    beside the same branches one by one, by tridil's kernels and by ATen, and keeps the answers in the
    user's cache: `multi_rate_conv2d` then runs the faster.

    Returns a row per pass that a launch can run: branches, pass, config (None where every candidate
    was wrong or failed), ms, apart_ms (the faster of the two ways one by one), kernels_ms, aten_ms,
    predicted_ms, rejected, target, device, date. Errors as in `tune`.
    """
    if gpu is None:
        found = torch.device(device if device is not None else "cuda")
        if found.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(f"configs are measured on a GPU, got {found}")
        with torch.cuda.device(found):
            here = Gpu(torch.device("cuda", torch.cuda.current_device()))
            return tune_branches(branches, passes=passes, top=top, gpu=here)
    problem, rows = branches.first, []
    precision = drivers.fp32_precision(gpu.target) if problem.dtype == "float32" else "ieee"
    for pass_ in passes:
        ranked = cost_model.rank_of_branches(branches, pass_, gpu.spec, precision)[:top]
        if ranked:
            row = measure_branches(branches, pass_, [c for c, _ in ranked], gpu, precision)
            predicted = dict(ranked).get(row["config"])
            rows.append(row | {"predicted_ms": predicted and 1e3 * predicted})
            _keep_branches(rows[-1], precision)
    if rows:
        choice.changed()
    return rows


def measure_branches(
    branches: Branches, pass_: str, configs: Sequence[Config], gpu: Gpu, precision: str = "ieee"
) -> dict[str, Any]:
    """One row of `tune_branches`."""
    from . import launch  # imports Triton

    whole = replace(branches.first, c=branches.x_channels[-1], k=branches.y_channels[-1], groups=1)
    x, _, _, dy = gpu.tensors(whole)
    ws = [gpu.tensors(problem)[1] for problem in branches.problems]
    a, b = {"fprop": (x, ws), "dgrad": (dy, ws), "wgrad": (dy, x)}[pass_]

    def apart(one):
        return lambda a, b: multi_rate.one_by_one(branches, pass_, a, b, None, one)

    def kernels(p, a, b, bias):
        config = cost_model.best(p, pass_, gpu.spec, precision)
        return launch.prepare(p, pass_, config, precision)(a, b)

    def timed(run) -> float:
        # filters of fprop and dgrad are the same in all rounds: a network has them in L2, too
        return gpu.milliseconds((lambda t, _: run(t, ws)) if b is ws else run, a, x)

    def listed(found):
        return [found] if torch.is_tensor(found) else found

    expected = listed(apart(lambda p, a, b, bias: gpu.reference(p, pass_, a, b))(a, b))
    depth = sum(reduction_depth(problem, pass_) for problem in branches.problems)
    best, rejected = None, []
    for config in configs:
        try:
            run = launch.prepare_branches(branches, pass_, config, precision)
            for got, wanted in zip(listed(run(a, b)), expected):
                allowed = budget(wanted, got.dtype, depth, precision, pass_)
                if not bool(((got.double() - wanted).abs() <= allowed).all()):
                    raise ValueError("its result is wrong")
            ms = timed(run)
            best = (config, ms) if best is None or ms < best[1] else best
        # what does not compile or launch is said, and the next one is tried
        except Exception as e:
            rejected.append((config, f"{type(e).__name__}: {e}"))
            log.warning("tridil: rejected %s for %s of %s: %s", config, pass_, branches.key(), e)
    times = {"kernels_ms": timed(apart(kernels))}
    try:
        times["aten_ms"] = timed(apart(lambda p, a, b, bias: passes.aten(p, pass_, a, b)))
    except (RuntimeError, NotImplementedError) as e:  # no such convolution there
        log.info("tridil: ATen cannot run %s of %s: %s", pass_, branches.key(), e)
    return {
        "branches": branches,
        "pass": pass_,
        "config": best and best[0],
        "ms": best and best[1],
        "apart_ms": min(times.values()),
        **times,
        "rejected": rejected,
        "target": gpu.target,
        "device": gpu.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _keep_branches(row: dict, precision: str) -> None:
    config, branches, pass_ = row["config"], row["branches"], row["pass"]
    if config is None:
        return
    plan = families.of(config.kernel).branch_plan(branches, pass_, config, precision, "")
    times = {
        name: round(row[name], 6)
        for name in ("ms", "apart_ms", "kernels_ms", "aten_ms")
        if name in row
    }
    record = {
        "config": cfg.to_json(config),
        **times,
        "code": cache.code(plan),
        "triton": cache.triton(),
        "torch": torch.__version__,
        "date": row["date"],
    }
    cache.add(row["target"], {cache.key(branches, pass_, precision): {row["device"]: record}})


def _measure_now(
    jobs: list,
    gpu: Gpu,
    top: int,
    budget: float | None,
    settings: tuple[bool, ...],
    progress: bool = False,
) -> list[dict]:
    """Rows of (problem, pass, precision) jobs, kept in the user's cache; their kernels are compiled
    in threads, between the measurements. settings: those of torch.backends.cudnn.benchmark under which ATen is
    timed."""
    deadline = time.monotonic() + (float("inf") if budget is None else budget)
    ranked = {job: cost_model.rank(job[0], job[1], gpu.spec, job[2])[:top] for job in jobs}
    rows: list[dict] = []
    with gpu.compiling(
        [(*job, config) for job, configs in ranked.items() for config in configs]
    ) as compiled:
        for job in _bar(jobs, progress):
            if rows and time.monotonic() >= deadline:
                break
            rows.append(
                row := _measure(
                    job[0], job[1], job[2], ranked[job], gpu, deadline, settings, compiled
                )
            )
            _keep(row)
    return rows


def _first_use(problem: Problem, pass_: str, precision: str, device: torch.device) -> bool:
    """`choice.first_use`: the best of few candidates within a short budget; ATen is timed as it
    runs now."""
    return bool(
        _measure_now(
            [(problem, pass_, precision)],
            Gpu(device),
            4,
            assumed.FIRST_USE,
            (torch.backends.cudnn.benchmark,),
        )
    )


choice.first_use = _first_use


def rows_of_all_ranks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks of a torchrun, which one rank of every host also merges into its user's
    cache; without torchrun, rows."""
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
        return list(scan(subject, *args, **kwargs))
    if isinstance(subject, torch.Tensor):
        return [functional.problem_of_tensors(subject, *args, **kwargs)]
    problems = list(subject) if isinstance(subject, (list, tuple, set)) else [subject]
    if not all(isinstance(p, Problem) for p in problems):
        raise TypeError(
            f"tune takes Problems, a convolution's tensors, or a module and its inputs, got {type(subject).__name__}"
        )
    return problems


def _is_measured(problem, pass_, precision, gpu) -> bool:
    record = cache.user(gpu.target).get(cache.key(problem, pass_, precision), {}).get(gpu.name)
    return record is not None and cache.is_fresh(record)


def _measure(
    problem: Problem,
    pass_: str,
    precision: str,
    configs: list[Config],
    gpu: Gpu,
    deadline: float,
    settings,
    compiled,
) -> dict:
    """One row of `tune`. A result outside its error budget, against float64 (where memory is short:
    against ATen), rejects its config."""
    x, w, _, dy = gpu.tensors(problem)
    a, b = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    rejected, seen, best = [], [], None
    aten, aten_times = _measure_aten(problem, pass_, precision, gpu, a, b, settings)
    try:
        expected, share = gpu.reference(problem, pass_, a, b), 1
    except torch.OutOfMemoryError:
        if aten is None:
            raise
        expected, share = aten.double(), 2  # both err
    del aten
    allowed = share * budget(
        expected, getattr(torch, problem.dtype), reduction_depth(problem, pass_), precision, pass_
    )
    queue = list(configs)
    while queue and (best is None or time.monotonic() < deadline):
        config, reason = queue.pop(0), None
        try:
            if not compiled(
                problem,
                pass_,
                precision,
                config,
                None if best is None else deadline - time.monotonic(),
            ):
                # it takes longer than there is time
                break
            seen.append(config)
            run = gpu.prepare(problem, pass_, config, precision)
            error = (run(a, b).double() - expected).abs()
            bad = ~(error <= allowed)  # NaN is bad
            if bad.any():
                reason = f"{int(bad.sum())} of {bad.numel()} elements are wrong, by up to {error.nan_to_num(nan=float('inf')).max():.3g}"
            else:
                ms = gpu.milliseconds(run, a, b)
                best = (config, ms) if best is None or ms < best[1] else best
        # a config that does not compile or launch has lost
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
        if reason:
            rejected.append((config, reason))
            log.warning(
                "tridil: rejected %s for %s of %s: %s",
                cfg.describe(config),
                pass_,
                problem.key(),
                reason,
            )
        # at last the winner's neighbours in pipeline depth
        if not queue and best and best[0] in configs:
            near = (replace(best[0], num_stages=best[0].num_stages + change) for change in (-1, 1))
            queue = [
                c for c in near if c not in seen and cfg.fits(c, problem, pass_, gpu.target) is None
            ]
    config, ms = best or (None, None)  # type: ignore[assignment]
    predicted = (
        1e3 * cost_model.predict(problem, pass_, config, gpu.spec, precision).seconds
        if config
        else None
    )
    return {
        "problem": problem,
        "pass": pass_,
        "precision": precision,
        "config": config,
        "ms": ms,
        **aten_times,
        "predicted_ms": predicted,
        "tried": len(seen),
        "rejected": rejected,
        "target": gpu.target,
        "device": gpu.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _measure_aten(problem: Problem, pass_: str, precision: str, gpu: Gpu, a, b, settings):
    """(result or None, {"aten_ms": ..., "aten_benchmark_ms": ...}), None where it was not measured
    or ATen has no such convolution.

    Each setting has a thread of its own: ATen remembers the first algorithm that a thread took for
    a convolution, whatever the setting is then.
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
        except (RuntimeError, NotImplementedError) as e:  # no such convolution there
            log.info("tridil: ATen cannot run %s of %s: %s", pass_, problem.key(), e)
        finally:
            torch.backends.cudnn.benchmark = before
    return result, times


def _keep(row: dict) -> None:
    """Writes a row of `tune` into the user's cache."""
    if row["config"] is not None:
        times = {name: row[name] and round(row[name], 6) for name in ("ms", *ATEN)}
        code = choice.code_of(row["problem"], row["pass"], row["config"], row["precision"])
        record = {
            "config": cfg.to_json(row["config"]),
            **times,
            "code": code,
            "triton": cache.triton(),
            "torch": torch.__version__,
            "date": row["date"],
        }
        cache.add(
            row["target"],
            {cache.key(row["problem"], row["pass"], row["precision"]): {row["device"]: record}},
        )


def _bar(jobs: list, progress: bool):
    """The jobs, with a progress bar where rich is installed."""
    if not progress:
        return jobs
    try:
        from rich.progress import track
    except ImportError:
        return jobs
    return track(jobs, description="measuring", disable=not jobs)
