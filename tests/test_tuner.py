"""Lookup, measuring and the choice of backend, with a GPU whose times are made up."""

import logging
import os
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import tridil
from tridil import (
    assumed,
    cache,
    choice,
    config,
    cost_model,
    devices,
    drivers,
    families,
    reference,
    testing,
    tuner,
    verdict,
)
from tridil.problem import PASSES, Problem

P = Problem(2, 64, 9, 9, 64, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
NAME, TARGET = "NVIDIA H100 80GB HBM3", "cuda:90"
CUDA = torch.device("cuda", 0)


class FakeGpu:
    """Runs passes through the float64 reference; the time of config number i of the model's ranking
    is times[i] ms, of ATen aten_ms."""

    target, name, spec, device = TARGET, NAME, devices.of_name(NAME, TARGET), torch.device("cpu")

    def __init__(self, times=(), aten_ms=1.0, wrong=(), broken=()):
        self.times, self.aten_ms, self.wrong, self.broken = times, aten_ms, wrong, broken
        self.ran, self.compiled, self.clock = [], [], 0.0

    def tensors(self, problem):
        return testing.random_tensors(problem)

    def reference(self, problem, pass_, a, b):
        return getattr(reference, pass_)(problem, a, b)

    def number(self, problem, pass_, cfg):
        ranked = cost_model.rank(problem, pass_, self.spec, "tf32")
        return ranked.index(cfg) if cfg in ranked else 99

    def prepare(self, problem, pass_, cfg, precision):
        return partial(self.run, problem, pass_, cfg)

    def run(self, problem, pass_, cfg, a, b):
        result = self.reference(problem, pass_, a, b).to(a.dtype)
        if cfg is None:
            if self.aten_ms is None:
                raise RuntimeError("no such convolution")
            self.last = (
                self.aten_ms[torch.backends.cudnn.benchmark]
                if isinstance(self.aten_ms, tuple)
                else self.aten_ms
            )
            return result
        i = self.number(problem, pass_, cfg)
        self.ran.append((problem, pass_, i))
        if i in self.broken:
            raise RuntimeError("out of resources")
        if i in self.wrong:
            result[0, 0, 0, 0] += 1
        self.last = self.times[i] if i < len(self.times) else 5.0
        return result

    def milliseconds(self, run, a, b):
        run(a, b)
        return self.last

    def compiling(self, jobs):
        self.compiled += jobs
        return nullcontext(lambda *job: job[-1] is None or job[-1] > 0)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIDIL_CACHE", str(tmp_path))
    for name in ("TRIDIL_TUNE", "TRIDIL_BACKEND", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    choice._told.clear()
    cache._memory.clear()


def tune(subject=P, gpu=None, passes=("fprop",), **kwargs):
    return tuner.tune(subject, gpu=gpu or FakeGpu(), passes=passes, progress=False, **kwargs)


def lookup(problem=P, pass_="fprop", name=NAME):
    return choice.lookup(problem, pass_, TARGET, "ieee", devices.of_name(name, TARGET), name)


def ranked(problem=P, pass_="fprop"):
    return cost_model.rank(problem, pass_, FakeGpu.spec, "tf32")


def made_with(cfg, problem=P, pass_="fprop"):
    """What a record says of the sources."""
    return {"code": choice.code_of(problem, pass_, cfg, "ieee"), "triton": cache.triton()}


# ---- measuring
def test_the_fastest_wins_and_is_kept():
    gpu = FakeGpu(times=[3, 2, 0.5, 4])
    (row,) = tune(gpu=gpu, top=4)
    assert (
        row["config"] == ranked()[2]
        and (row["ms"], row["aten_ms"]) == (0.5, 1.0)
        and not row["rejected"]
    )
    assert lookup() == (ranked()[2], f"user's cache: measured {row['date'][:10]}", lookup()[2])
    record = lookup()[2]
    assert (
        record["ms"] == 0.5
        and record["aten_ms"] == 1.0
        and record["torch"] == torch.__version__
        and cache.is_fresh(record)
    )
    assert [cfg for *_, cfg in gpu.compiled] == ranked()[:4]
    assert {i for *_, i in gpu.ran} == {0, 1, 2, 3, 99}, (
        "and the winner's neighbours in pipeline depth"
    )


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("wrong", [(0,), (1,), (0, 1)])
def test_a_wrong_result_cannot_win(pass_, wrong, caplog):
    """Not even of the reference pick, and however fast."""
    (row,) = tune(gpu=FakeGpu(times=[0.1, 0.1, 3, 4], wrong=wrong), passes=(pass_,), top=3)
    assert row["config"] not in [ranked(P, pass_)[i] for i in wrong]
    assert [cfg for cfg, _ in row["rejected"]] == [ranked(P, pass_)[i] for i in wrong]
    assert all(
        "elements are wrong, by up to" in reason for _, reason in row["rejected"]
    ) and caplog.text.count("rejected") == len(wrong)


def test_a_config_that_does_not_run_loses():
    (row,) = tune(gpu=FakeGpu(times=[0.1, 2, 3], broken=(0,)), top=3)
    assert row["config"] == ranked()[1] and "out of resources" in row["rejected"][0][1]


def test_nothing_is_kept_when_every_candidate_fails():
    (row,) = tune(gpu=FakeGpu(broken=range(100)), top=3)
    assert row["config"] is None and lookup()[1].startswith("cost model")


def test_without_aten():
    (row,) = tune(gpu=FakeGpu(times=[2, 1], aten_ms=None), top=2)
    assert (
        row["aten_ms"] is None
        and choice.decide(P, "fprop", TARGET, "ieee", None).backend == "triton"
    )


def test_short_of_memory_for_float64(monkeypatch):
    """ATen's result is then the reference, within twice the budget."""
    gpu = FakeGpu(times=[1, 2, 3], wrong=(0,))
    exact = gpu.reference
    gpu.run = lambda *args, run=gpu.run: (
        setattr(gpu, "reference", exact),
        run(*args),
        setattr(gpu, "reference", short),
    )[1]

    def short(*a):
        raise torch.OutOfMemoryError("short")

    gpu.reference = short
    (row,) = tune(gpu=gpu, top=3)
    assert row["config"] == ranked()[1] and len(row["rejected"]) == 1


def test_aten_is_timed_under_both_settings_and_judged_by_the_present_one(monkeypatch):
    """ATen keeps a thread's first algorithm for a convolution whatever the setting is later: each
    setting is timed in a thread of its own."""
    gpu, threads = FakeGpu(times=[2.0], aten_ms=(3.0, 1.0)), []
    prepare = gpu.prepare
    gpu.prepare = lambda problem, pass_, cfg, precision: (
        cfg or threads.append(threading.get_ident()),
        prepare(problem, pass_, cfg, precision),
    )[1]
    (row,) = tune(gpu=gpu, top=1)
    assert (row["aten_ms"], row["aten_benchmark_ms"]) == (
        3.0,
        1.0,
    ) and not torch.backends.cudnn.benchmark
    assert len(threads) == 2 and threading.get_ident() not in threads
    for benchmark, backend, why in (
        (False, "triton", "2 ms, ATen 3 ms with cudnn.benchmark off"),
        (True, "aten", "ATen 1 ms with cudnn.benchmark on"),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        found = choice.decide(P, "fprop", TARGET, "ieee")
        assert found.backend == backend and why in found.why
    record = lookup()[2]
    assert choice.aten_ms({"aten_ms": 3.0}) == (3.0, "cudnn.benchmark off"), (
        "what was measured, where the other was not"
    )
    assert choice.aten_ms(record | {"aten_ms": None, "aten_benchmark_ms": None}) is None


def test_what_is_not_compiled_by_the_deadline_is_left(monkeypatch):
    gpu, asked = FakeGpu(times=[3, 2, 1]), []

    def compiling(jobs):
        return nullcontext(
            lambda problem, pass_, precision, cfg, timeout: asked.append(timeout) or len(asked) < 3
        )

    gpu.compiling = compiling
    (row,) = tune(gpu=gpu, top=3, budget=1000)
    assert asked[0] is None and 0 < asked[2] < asked[1] <= 1000, (
        "the first one is waited for, the others until the deadline"
    )
    assert row["config"] == ranked()[1] and row["tried"] == 2


def test_budget_and_resuming(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: clock[0])
    problems = [replace(P, n=n) for n in (1, 2, 3, 4)]
    gpu = FakeGpu()
    run = gpu.run
    # every run takes a second
    gpu.run = lambda *a: (clock.__setitem__(0, clock[0] + 1), run(*a))[1]
    first = tune(problems, gpu=gpu, budget=20, top=2)
    assert 0 < len(first) < 4 and "budget of 20 s ended" in caplog.text
    rest = tune(problems, gpu=gpu, top=2)
    assert [r["problem"] for r in first + rest] == problems, "what is in the cache is left out"
    assert (
        tune(problems, gpu=gpu, top=2) == []
        and len(tune(problems, gpu=gpu, top=1, force=True)) == 4
    )


def test_subjects(monkeypatch):
    """A problem, several, a convolution's tensors, a module; a layer that occurs twice is measured
    once."""
    x, w = torch.randn(2, 16, 9, 9), torch.randn(16, 16, 3, 3)
    f32 = replace(P, c=16, k=16, dtype="float32", layout="nchw")
    assert [
        r["problem"]
        for r in tuner.tune(
            x, w, None, padding=2, dilation=2, gpu=FakeGpu(), passes=("fprop",), progress=False
        )
    ] == [f32]
    conv = torch.nn.Conv2d(16, 16, 3, padding=2, dilation=2)
    rows = tuner.tune(
        torch.nn.Sequential(conv, torch.nn.ReLU(), conv),
        x,
        gpu=FakeGpu(),
        passes=("dgrad",),
        progress=False,
    )
    assert [(r["problem"], r["pass"]) for r in rows] == [(f32, "dgrad")]
    assert len(tune([P, P, replace(P, n=1)])) == 2
    for wrong in ("layer", [P, 3], None):
        with pytest.raises(TypeError, match="tune takes"):
            tune(wrong)
    with pytest.raises(ValueError, match="forward"):
        tune(passes=("forward",))
    with pytest.raises(RuntimeError, match="on a GPU"):
        tridil.tune(P, device="cpu")


# ---- lookup
def test_order_of_lookup(monkeypatch):
    model, user, shipped, override = ranked()[:4]

    def table(cfg, **change):
        return {
            cache.key(P, "fprop"): {
                NAME: {
                    "config": config.to_json(cfg),
                    "ms": 1.0,
                    "aten_ms": 2.0,
                    "date": "2026-01-01",
                    **made_with(cfg),
                    **change,
                }
            }
        }

    assert lookup() == (model, "cost model (nothing measured)", None)
    monkeypatch.setattr(cache, "shipped", lambda target: table(shipped))
    assert lookup()[:2] == (shipped, "shipped table: measured 2026-01-01")
    cache.add(TARGET, table(user))
    assert lookup()[:2] == (user, "user's cache: measured 2026-01-01")
    with choice.override(fprop=override):
        assert lookup() == (override, "override", None) and lookup(pass_="wgrad")[1].startswith(
            "cost model"
        )
    assert lookup()[0] == user
    # merged: the fresh one stays
    cache.add(TARGET, table(user, date="2027", triton="another"))
    assert lookup()[0] == user
    with pytest.raises(ValueError, match="forward"), choice.override(forward=user):
        pass
    with choice.override(fprop=config.to_json(override)):
        assert lookup()[0] == override, "as it is written in files"


def test_what_was_measured_with_other_kernels_or_launches_is_a_hint(monkeypatch):
    """Sources of the kernels that run, and how they are launched; other families' are no matter."""
    measured()
    assert lookup()[1].startswith("user's cache")
    real = cache._source
    for module, stays in (
        ("tridil.kernels.gather", False),
        ("tridil.kernels.tma", False),
        ("tridil.kernels.depthwise", True),
    ):
        used = {
            launch.kernel.partition(":")[0]
            for launch in families.of(ranked()[0].kernel).plan(P, "fprop", ranked()[0], "ieee", "")
        }
        monkeypatch.setattr(
            cache, "_source", lambda name, module=module: real(name) + " " * (name == module)
        )
        assert lookup()[1].startswith("user's cache") == (stays or module not in used), module
    monkeypatch.setattr(cache, "_source", real)
    family = families.of(ranked()[0].kernel)
    plan = type(family).plan
    monkeypatch.setattr(
        type(family),
        "plan",
        lambda *a: [replace(launch, workspace=launch.workspace + 1) for launch in plan(*a)],
    )
    assert "measured with other sources" in lookup()[1]


def test_hints_of_every_kind(monkeypatch):
    def add(problem, name=NAME, **change):
        record = {
            "config": config.to_json(ranked()[1]),
            "ms": 1.0,
            "aten_ms": 0.001,
            "date": "2026-01-01",
            **made_with(ranked()[1]),
            **change,
        }
        cache.add(TARGET, {cache.key(problem, "fprop"): {name: record}})

    add(replace(P, n=8))
    assert (
        lookup()[:2] == (ranked()[1], "hint of the user's cache: measured at batch size 8")
        and lookup()[2] is None
    )
    add(replace(P, layout="nchw"))
    assert "in the other memory format" in lookup()[1]
    add(P, "NVIDIA H200")
    assert "on NVIDIA H200" in lookup()[1]
    add(P, triton="0.1")
    assert (
        "measured with other sources or another Triton" in lookup()[1] and "H200" not in lookup()[1]
    )
    assert choice.decide(P, "fprop", TARGET, "ieee").record is None
    assert lookup(replace(P, dilation=(3, 3), padding=((3, 3), (3, 3))))[1].startswith(
        "cost model"
    ), "another dilation is another problem"


def test_a_hint_that_does_not_fit_is_passed_over():
    cfg = replace(ranked()[0], BLOCK_N=24)
    cache.add(
        TARGET,
        {
            cache.key(P, "fprop"): {
                NAME: {
                    "config": config.to_json(cfg),
                    "ms": 1.0,
                    "date": "2026",
                    "triton": cache.triton(),
                }
            }
        },
    )
    assert lookup() == (ranked()[0], "cost model (nothing measured)", None)


# ---- the choice
def measured(problem=P, pass_="fprop", ms=1.0, aten_ms=2.0):
    record = {
        "config": config.to_json(ranked(problem, pass_)[0]),
        "ms": ms,
        "aten_ms": aten_ms,
        "date": "2026-01-01",
        **made_with(ranked(problem, pass_)[0], problem, pass_),
    }
    cache.add(TARGET, {cache.key(problem, pass_): {NAME: record}})


def test_measured_times_decide():
    measured(ms=1.0, aten_ms=2.0)
    found = choice.decide(P, "fprop", TARGET, "ieee")
    assert (
        found.backend == "triton"
        and found.why == "measured: 1 ms, ATen 2 ms with cudnn.benchmark off"
    )
    measured(pass_="dgrad", ms=3.0, aten_ms=2.0)
    assert choice.decide(P, "dgrad", TARGET, "ieee").backend == "aten"
    assert choice.resolve(P, "dgrad", TARGET, "ieee", allow_aten=True) is None
    assert choice.resolve(P, "dgrad", TARGET, "ieee") == ranked(P, "dgrad")[0], (
        "backend='triton' never falls back"
    )


def test_predictions_decide_with_a_margin(monkeypatch):
    spec = devices.of_target(TARGET)
    time = cost_model.predict(P, "fprop", ranked()[0], spec).seconds
    for estimate, backend in (
        (time * assumed.MARGIN * 1.01, "triton"),
        (time * assumed.MARGIN * 0.99, "aten"),
    ):
        monkeypatch.setattr(cost_model, "cudnn", lambda *a, e=estimate: e)
        found = choice.decide(P, "fprop", TARGET, "ieee")
        assert (
            found.backend == backend
            and "predicted" in found.why
            and str(assumed.MARGIN) in found.why
        )


def test_override_decides():
    with choice.override(fprop=ranked()[2]):
        assert choice.resolve(P, "fprop", TARGET, "ieee", allow_aten=True) == ranked()[2]


def test_listeners_hear_of_changes():
    heard = []
    choice.listeners.append(lambda: heard.append(1))
    try:
        with choice.override(fprop=ranked()[2]):
            assert len(heard) == 1
        assert len(heard) == 2
        tune()
        assert len(heard) == 3
    finally:
        choice.listeners.pop()


# ---- first use
@pytest.fixture
def cuda(monkeypatch):
    """An H100, as far as torch.cuda can be asked."""
    gpu = FakeGpu(times=[3, 2, 0.5])
    state = SimpleNamespace(gpu=gpu, capturing=False)
    # however slow the machine is
    monkeypatch.setattr(assumed, "FIRST_USE", 600)
    monkeypatch.setenv("TRIDIL_TARGET", TARGET)
    properties = SimpleNamespace(
        name=NAME,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        memory_clock_rate=2619000,
        memory_bus_width=5120,
    )
    for name, value in (
        ("is_available", lambda: True),
        ("get_device_properties", lambda *a: properties),
        ("device", lambda d: nullcontext()),
        ("current_device", lambda: 0),
        ("is_current_stream_capturing", lambda: state.capturing),
        ("get_device_capability", lambda *a: (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tuner, "Gpu", lambda device: gpu)
    return state


def test_the_first_miss_says_how_to_measure(cuda, caplog):
    with caplog.at_level(logging.WARNING):
        assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[0] and not cuda.gpu.ran
        choice.resolve(P, "dgrad", TARGET, "ieee", CUDA)
    (message,) = [r.getMessage() for r in caplog.records]
    command = message[message.index("python -m tridil ") :]
    from tridil.__main__ import parse_shape

    assert (
        command.startswith("python -m tridil tune --shape ")
        and parse_shape(command.split('"')[1], "float16") == P
    )


@pytest.mark.parametrize("how", ["variable", "benchmark"])
def test_first_use_measures_where_asked(cuda, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("TRIDIL_TUNE", "1")
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[2]
    ran = len(cuda.gpu.ran)
    assert (
        ran
        and choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[2]
        and len(cuda.gpu.ran) == ran
    ), "once"
    with choice.override(dgrad=ranked(P, "dgrad")[1]):
        choice.resolve(P, "dgrad", TARGET, "ieee", CUDA)
    assert len(cuda.gpu.ran) == ran


def test_first_use_says_what_it_does_and_is_bounded(cuda, monkeypatch, caplog):
    """One warning a process, with the convolution, the time and the file; after assumed.FIRST_USE
    seconds it runs the best so far. ATen is timed as it runs, once."""
    monkeypatch.setenv("TRIDIL_TUNE", "1")
    clock = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: clock[0])
    run = cuda.gpu.run
    cuda.gpu.run = lambda *a: (clock.__setitem__(0, clock[0] + 0.3 * assumed.FIRST_USE), run(*a))[1]
    assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[0]
    assert [i for *_, i in cuda.gpu.ran] == [0, 0], (
        "ATen, a result and a timing of it took all there was"
    )
    record = lookup()[2]
    assert record["aten_ms"] == 1.0 and record["aten_benchmark_ms"] is None
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        cache.key(P, "fprop") in message
        and f"{assumed.FIRST_USE:g} s" in message
        and str(cache.path(TARGET)) in message
    )
    choice.resolve(P, "wgrad", TARGET, "ieee", CUDA)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_first_use_is_measured_on_every_rank(cuda, rank, monkeypatch):
    """Only several problems are shared out; a rank that did not measure would run other kernels
    than the others."""
    monkeypatch.setenv("TRIDIL_TUNE", "1")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[2] and cuda.gpu.ran
    assert [r["pass"] for r in tune(P, passes=("dgrad", "wgrad"))] == ["dgrad", "wgrad"]
    assert [r["problem"].n for r in tune([replace(P, n=n) for n in (3, 4)])] == [3 + rank]


def test_the_variable_can_forbid_it(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("TRIDIL_TUNE", "0")
    choice.resolve(P, "fprop", TARGET, "ieee", CUDA)
    assert not cuda.gpu.ran


def test_nothing_is_measured_while_a_graph_is_captured(cuda, monkeypatch):
    monkeypatch.setenv("TRIDIL_TUNE", "1")
    cuda.capturing = True
    assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[0] and not cuda.gpu.ran
    cuda.capturing = False
    assert choice.resolve(P, "fprop", TARGET, "ieee", CUDA) == ranked()[2] and cuda.gpu.ran


# ---- what people see
def test_info_names_what_was_measured(cuda, capsys, monkeypatch):
    from tridil.__main__ import main

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)

    def line():
        assert main(["info"]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert (
        "0 passes in your cache, 0 passes in the shipped table" in line()
        and "To measure: python -m tridil tune" in line()
    )
    measured()
    assert (
        "1 passes in your cache" in line()
        and str(cache.path(TARGET)) in line()
        and "To measure" not in line()
    )
    record = {
        "config": config.to_json(ranked()[0]),
        "ms": 1.0,
        "date": "2026-01-01",
        "code": "another",
        "triton": "0",
    }
    cache.add(TARGET, {cache.key(P, "wgrad"): {NAME: record}})
    assert "1 passes in your cache and 1 by other sources, which are hints" in line()


def test_explain_measured_and_predicted(cuda, monkeypatch):
    monkeypatch.setattr(drivers, "can_run", lambda problem, device: None)
    measured(pass_="fprop", ms=1.0, aten_ms=2.0)
    measured(pass_="dgrad", ms=3.0, aten_ms=2.0)
    rows = verdict.rows_of(P, CUDA)
    assert [r["backend"] for r in rows[:2]] == ["triton", "aten"] and [r["ms"] for r in rows] == [
        1.0,
        3.0,
        None,
    ]
    assert (
        rows[0]["cudnn_ms"] == 2.0
        and rows[2]["source"].startswith("cost model")
        and all(r["predicted_ms"] > r["roof_ms"] > 0 for r in rows)
    )
    text = verdict.text_of(P, CUDA)
    assert (
        "1 ms measured" in text
        and "cuDNN 2 ms measured" in text
        and text.count("ms predicted (limited by") == 3
        and "ms estimated" in text
    )
    for backend in ("triton", "aten"):
        assert {(r["backend"], r["why"]) for r in verdict.rows_of(P, CUDA, backend)} == {
            (backend, "asked for")
        }
    monkeypatch.setenv("TRIDIL_BACKEND", "triton")
    assert {r["why"] for r in verdict.rows_of(P, CUDA)} == {"TRIDIL_BACKEND=triton"}


def test_public_explain(capsys):
    x, w = torch.randn(1, 16, 9, 9), torch.randn(16, 16, 3, 3)
    rows = tridil.explain(x, w, padding=2, dilation=2)
    out = capsys.readouterr().out
    assert [r["pass"] for r in rows] == list(PASSES) and {r["backend"] for r in rows} == {"aten"}
    assert (
        out.count("config from:") == 3
        and "n1 c16 h9 w9 k16 3x3 stride1 pad2 dil2 g1 float32 nchw -> 9x9" in out
    )


SCRIPT = textwrap.dedent("""
    import contextlib, sys, torch
    sys.path.insert(0, {tests!r})
    import test_tuner
    from tridil import tuner
    from tridil.__main__ import main
    torch.cuda.is_available = lambda: True
    torch.cuda.device = lambda d: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda d: print(f"device {{d}}")
    tuner.Gpu = lambda device: test_tuner.FakeGpu(times=[3, 2, 0.5])
    sys.exit(main(sys.argv[1:]))
""")


def command(tmp_path, *args, launcher=()):
    script = tmp_path / "fake_gpu.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    env = dict(os.environ, TRIDIL_TARGET=TARGET, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )


@pytest.mark.slow
def test_command_line(tmp_path):
    shape = ("tune", "--shape", P.shape(), "--top", 3)
    out = command(tmp_path, *shape, "--passes", "fprop,wgrad", "--budget", "10m")
    assert (
        out.returncode == 0 and "2 measured, kept in" in out.stdout and "0.5000 ms" in out.stdout
    ), out.stdout + out.stderr
    assert set(cache.user(TARGET)) == {cache.key(P, "fprop"), cache.key(P, "wgrad")}
    assert "0 measured" in command(tmp_path, *shape, "--passes", "fprop,wgrad").stdout
    (tmp_path / "zoo.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Conv2d(16, 8, 3, dilation=2), torch.randn(1, 16, 9, 9)\n"
        "def wrong():\n    return 3\n"
    )
    out = command(tmp_path, "tune", "--model", "zoo:make", "--top", 1, "--passes", "dgrad")
    assert out.returncode == 0 and "k8 3x3 stride1 pad0 dil2" in out.stdout, out.stdout + out.stderr
    for bad in (
        ("--model", "zoo:wrong"),
        ("--model", "zoo"),
        ("--suite", "none"),
        ("--budget", "soon"),
        ("--passes", "forward"),
        ("--top", 0),
    ):
        out = command(tmp_path, "tune", *bad)
        assert out.returncode == 2 and "error" in out.stderr and "Traceback" not in out.stderr, (
            bad,
            out.stderr,
        )
    # with a GPU it would measure for minutes
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    out = subprocess.run(
        [sys.executable, "-m", "tridil", "tune"], capture_output=True, text=True, env=env
    )
    assert out.returncode == 1 and "measured on a GPU" in out.stderr


@pytest.mark.slow
def test_torchrun_splits_the_problems_and_merges(tmp_path):
    """Two real processes, a file of measurements; every problem is measured once, rank 0 shows them
    all."""
    (tmp_path / "zoo.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(16, 8, 3, dilation=2), "
        "torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 16, 1)), torch.randn(1, 16, 9, 9)\n"
    )
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    out = command(
        tmp_path,
        "tune",
        "--model",
        "zoo:make",
        "--passes",
        "fprop,wgrad",
        "--top",
        1,
        launcher=launcher,
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert (
        "device 0" in out.stdout
        and "device 1" in out.stdout
        and "6 measured, kept in" in out.stdout
    )
    assert out.stdout.count(": 3.0000 ms") == 6 and len(cache.user(TARGET)) == 6
