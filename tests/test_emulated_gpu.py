"""The real clockwork of sweep, tuner and gpu_check, with a device that runs compiled kernels on CPU
tensors where a test run has one: only the device's name, the clock and what torch.cuda says are
replaced."""

import os
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

pytest.importorskip("triton")

import fake_gpu
import family
import gpu_check
import results
import sweep
import test_gpu_check

from tridil import cache, choice, cost_model, drivers, tuner, workloads
from tridil import config as cfg
from tridil.problem import PASSES, Problem

pytestmark = pytest.mark.skipif(
    drivers.interpreted() or torch.cuda.is_available(),
    reason="needs a driver that runs compiled kernels on CPU tensors",
)
P = Problem(2, 32, 9, 9, 32, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    for where, name, value in fake_gpu.queries():
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(workloads, "suite", fake_gpu.suite)
    monkeypatch.setenv("TRIDIL_CACHE", str(tmp_path / "cache"))
    cache._memory.clear()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tune(dtype):
    """Candidates are compiled ahead, run, and checked; the answer is kept and looked up. None is
    rejected."""
    problems = [replace(P, dtype=dtype), replace(P, dtype=dtype, groups=32, layout="nchw")]
    rows = tuner.tune(problems, top=3, gpu=fake_gpu.EmulatedTunerGpu(None), progress=False)
    assert [(row["problem"], row["pass"]) for row in rows] == [
        (p, pass_) for p in problems for pass_ in PASSES
    ]
    for row in rows:
        assert (
            not row["rejected"]
            and row["tried"] >= 3
            and row["ms"] == row["aten_ms"] == row["aten_benchmark_ms"] == 1.0
        ), row
        found = choice.decide(row["problem"], row["pass"], row["target"], row["precision"])
        assert (
            found.config == row["config"]
            and found.source.startswith("user's cache")
            and found.backend == "triton"
        )


def test_first_use_measures_and_the_kernels_run_the_answer(monkeypatch):
    monkeypatch.setenv("TRIDIL_TUNE", "1")
    monkeypatch.setattr(tuner, "Gpu", fake_gpu.EmulatedTunerGpu)
    monkeypatch.setattr(
        choice,
        "device_spec",
        lambda target, device=None: (cost_model.devices.of_target(target), fake_gpu.NAME),
    )
    config = choice.resolve(P, "fprop", drivers.target(), "ieee", torch.device("cuda", 0))
    (record,) = cache.user(drivers.target())[cache.key(P, "fprop")].values()
    assert (
        record["config"] == cfg.to_json(config) and record["ms"] == 1.0 and record["aten_ms"] == 1.0
    )


def test_sweep_and_validate(tmp_path, capsys):
    names = ["tridil", "tridil_nchw", "cudnn"]
    gpu = fake_gpu.EmulatedSweepGpu()
    assert sweep.main(["--out", str(tmp_path), "--providers", ",".join(names)], gpu) == 0, (
        capsys.readouterr().out
    )
    rows = results.read(tmp_path / "results.csv")
    of_layers = rows[rows["kind"] != "machine"]
    assert (
        len(of_layers) == 2 * 3 * 3
        and rows["failure"].isna().all()
        and (rows["clock"] == "graph").all()
        and (of_layers["extra_mib"] < 1).all()
    )
    ours = of_layers[of_layers["provider"].str.startswith("tridil")]
    assert (ours["error"] <= ours["budget"]).all() and (ours["bit_identical"] == "True").all()
    assert (
        sweep.main(["--out", str(tmp_path), "--validate-model", "--passes", "fprop,wgrad"], gpu)
        == 0
    )
    frame = pd.read_csv(tmp_path / "model.csv")
    assert (frame["ms"] == 1.0).all() and len(frame) >= 8 and frame["failure"].isna().all()


def test_gpu_check_from_end_to_end(tmp_path, monkeypatch, capsys):
    driver = sys.modules["triton"].runtime.driver.active
    monkeypatch.setenv(
        "EMULATOR",
        f"{type(driver).__module__.partition('.')[0]}:{driver.get_current_target().arch}",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert (
        gpu_check.main(
            [str(tmp_path / "out"), "--seconds", "3000"],
            has_gpu=True,
            steps=test_gpu_check.on_the_fake_gpu,
        )
        == 0
    )
    out = capsys.readouterr().out
    steps = [step.name for step in test_gpu_check.on_the_fake_gpu(tmp_path)]
    said = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert list(said) == steps and "gpu_check passed" in out, out
    assert all(line.startswith("ok, ") for line in said.values()), out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "check.log",
        "verdict.md",
        "results.csv",
        "results.md",
        "report.html",
        "model.csv",
        "tuned.json",
    }
    assert (results.read(tmp_path / "out" / "results.csv")["clock"] == "graph").all()


def test_contiguous_beside_the_default_kernels(capsys, monkeypatch):
    """perf/family.py on contiguous tensors."""
    monkeypatch.setattr(tuner, "Gpu", fake_gpu.EmulatedTunerGpu)
    p = Problem(1, 64, 1, 64, 64, 1, 3, padding=((0, 0), (2, 2)), dilation=(1, 2), layout="nchw")
    layer = workloads.Workload("net", "layer", 1, p, "made up")
    monkeypatch.setattr(workloads, "suite", lambda name, layout: [layer])
    assert family.main(["contiguous", "--layout", "nchw", "--seconds", "600"]) == 0
    out = capsys.readouterr().out
    if drivers.target() in ("cuda:90", "cuda:100"):
        assert out.count("contiguous box ") >= 3 and "(geometric mean of 3 passes" in out
    else:
        assert out == f"no layer of quick for the family contiguous on {drivers.target()}\n"


def test_hopper_beside_the_default_kernels(capsys, monkeypatch):
    """perf/family.py, where the family can run."""
    monkeypatch.setattr(tuner, "Gpu", fake_gpu.EmulatedTunerGpu)
    layer = workloads.Workload("net", "layer", 1, replace(P, c=128, k=128), "made up")
    monkeypatch.setattr(workloads, "suite", lambda name, layout: [layer])
    assert family.main(["hopper", "--seconds", "600"]) == 0
    out = capsys.readouterr().out
    if drivers.target() == "cuda:90":
        assert (
            out.count("hopper box ") == 6
            and out.count(" stream ") == 3
            and "ATen 1.0000 ms" in out
            and "(geometric mean of 3 passes" in out
        )
    else:
        assert out == f"no layer of quick for the family hopper on {drivers.target()}\n"
