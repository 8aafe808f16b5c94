"""perf/sweep.py: both paths end to end on tiny layers, the GPU's with a fake clock on CPU tensors."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import layers
import models
import pandas as pd
import pytest
import results
import sweep
import torch
from fake_gpu import TINY, SweepGpu, suite
from providers import PROVIDERS, provider, reason_against

import tridil
from tridil import config, cost_model, launch, reference, testing, workloads
from tridil.drivers import interpreted
from tridil.problem import PASSES, Problem

PERF = Path(__file__).resolve().parents[1] / "perf"  # conftest puts it on the path
pytestmark = pytest.mark.skipif(
    not interpreted(), reason="the sweep without a GPU, and with a fake one, interprets kernels"
)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(*arguments, gpu=None) -> (exit status, rows of results.csv, terminal output), on the tiny
    layers."""
    monkeypatch.setattr(workloads, "suite", suite)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    # main sets them: put them back
    for name in ("TRITON_INTERPRET", "TRIDIL_TARGET"):
        monkeypatch.setenv(name, os.environ.get(name, "cuda:80"))

    def run(*arguments, gpu=None):
        status = sweep.main(["--out", str(tmp_path), *arguments], gpu)
        return status, results.read(tmp_path / "results.csv"), capsys.readouterr().out

    run.out = tmp_path
    return run


def no_compiler(monkeypatch):
    """Cheap stand-in for the compiling worker, where a test is about something else."""

    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, *_):
            class Done:
                def result(self):
                    return {}

            return Done()

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(layers, "ProcessPoolExecutor", Pool)


def test_equal_layers_run_once(run, monkeypatch):
    """Layers of one geometry share a row, which names them all; so do those of the model check."""
    no_compiler(monkeypatch)
    first, second = TINY[:2]
    twins = [replace(first, model="other", layer="twin"), second, replace(first, model="third")]
    monkeypatch.setattr(
        workloads, "suite", lambda name, dtype="float16", layout="nhwc": [first, *twins]
    )
    status, rows, _ = run("--passes", "fprop", "--target", "cuda:80")
    assert status == 0 and list(rows["layer"]) == [first.layer, second.layer]
    assert rows["also"].fillna("").tolist() == [f"other twin; third {first.layer}", ""]
    assert f"other twin; third {first.layer}" in (run.out / "report.html").read_text()


@pytest.mark.slow
def test_without_a_gpu(run):
    status, rows, out = run("--target", "cuda:80")
    assert status == 0
    assert list(zip(rows["layer"], rows["pass"])) == [
        (w.layer, pass_) for w in TINY for pass_ in PASSES
    ]
    assert (rows["target"] == "cuda:80").all() and (rows["count"] == [2] * 3 + [1] * 3).all()
    assert (rows["error"] <= rows["budget"]).all() and (rows["budget"] > 0).all()
    assert (
        rows["mma"].str.startswith("HMMA").all()
        and (rows["registers"] >= 32).all()
        and (rows["shared_bytes"] > 0).all()
    )
    for row in rows.to_dict("records"):
        problem = next(w.problem for w in TINY if w.layer == row["layer"])
        chosen = cost_model.best(problem, row["pass"], "cuda:80")
        assert row["executed_macs"] == config.executed_macs(problem, row["pass"], chosen)
        assert (row["dense_macs"], row["useful_macs"]) == (problem.dense_macs, problem.useful_macs)
    # no invented time
    assert rows[["ms", "tflops_dense", "gb_s", "extra_mib", "ratio"]].isna().all(axis=None)
    assert "measured" in out and "predicted" in out and "not measured" in out
    ratio = (
        rows[rows["pass"] == "fprop"]["executed_macs"].sum()
        / rows[rows["pass"] == "fprop"]["useful_macs"].sum()
    )
    assert f"executed/useful MACs {ratio:.3f}" in out
    assert (run.out / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # what "auto" takes, cuDNN's estimate and the gain, from the choice itself
    for row in rows.to_dict("records"):
        assert row["auto"] in ("triton", "aten") and row["gain"] >= 1
        taken = row["predicted_ms"] if row["auto"] == "triton" else row["cudnn_ms"]
        assert row["gain"] == pytest.approx(row["cudnn_ms"] / taken)
    page = (run.out / "results.md").read_text()
    assert (
        "error/budget interpreter, reduced copy" in page
        and "gain predicted" in page
        and "executed/useful predicted" in page
        and "target cuda:80" in page
        and "| net d3: n2 c16" in page
    )


def test_a_second_run_does_what_is_missing(run, monkeypatch):
    no_compiler(monkeypatch)
    seen = []
    interpret = layers._interpreted
    monkeypatch.setattr(
        layers,
        "_interpreted",
        lambda problem, pass_, device: seen.append(pass_) or interpret(problem, pass_, device),
    )
    run("--passes", "fprop")
    assert seen == ["fprop"] * 2
    _, rows, out = run("--passes", "fprop,wgrad")
    assert (
        seen == ["fprop"] * 2 + ["wgrad"] * 2 and len(rows) == 4 and "2 of them already in" in out
    )
    run("--passes", "fprop,wgrad")
    assert len(seen) == 4
    monkeypatch.setattr(sweep, "fingerprint", lambda: "othercode")
    # other sources: measured again
    assert len(run("--passes", "fprop")[1]) == 6 and len(seen) == 6
    assert len(run("--passes", "fprop", "--fresh")[1]) == 2 and len(seen) == 8


def test_ctrl_c_keeps_what_is_done(run, monkeypatch):
    no_compiler(monkeypatch)
    interpret, calls = layers._interpreted, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return interpret(*arguments)

    monkeypatch.setattr(layers, "_interpreted", interrupted)
    status, rows, out = run()
    assert status == 130 and len(rows) == 2 and "interrupted: 2 of 6 rows" in out
    status, rows, _ = run()
    assert status == 0 and len(rows) == 6 and len(calls) == 7


def test_rows_of_changing_sources_are_not_kept(run, monkeypatch):
    no_compiler(monkeypatch)
    codes = iter(["first", "first", "second"])
    monkeypatch.setattr(sweep, "fingerprint", lambda: next(codes))
    status, rows, out = run("--passes", "fprop")
    assert (
        status == 1 and len(rows) == 1 and "the sources changed under the sweep: 1 of 2 rows" in out
    )


@pytest.mark.slow
def test_sigint_in_a_real_process_keeps_rows(tmp_path):
    command = [
        sys.executable,
        str(PERF / "sweep.py"),
        "--suite",
        "aspp",
        "--passes",
        "fprop",
        "--out",
        str(tmp_path),
    ]
    # a shell's background jobs ignore SIGINT, and their children inherit that
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path, deadline = tmp_path / "results.csv", time.time() + 600
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") >= 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    assert "Traceback" not in out and "interrupted" in out
    assert 1 <= len(results.read(path)) < len(workloads.suite("aspp"))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True])
def test_a_wrong_kernel_gives_status_1(run, monkeypatch, gpu):
    no_compiler(monkeypatch)
    right = launch.prepare

    def wrong(problem, pass_, *rest):
        run = right(problem, pass_, *rest)
        return (lambda *arguments: run(*arguments) * 1.01) if pass_ == "dgrad" else run

    monkeypatch.setattr(launch, "prepare", wrong)
    status, rows, out = run("--providers", "tridil", gpu=SweepGpu() if gpu else None)
    assert status == 1
    assert list(rows["error"] > rows["budget"]) == list(rows["pass"] == "dgrad")
    assert out.count("BROKEN BUDGET tridil dgrad") == 2
    # the rows say so until measured again
    monkeypatch.setattr(launch, "prepare", right)
    assert run("--providers", "tridil", gpu=SweepGpu() if gpu else None)[0] == 1


def test_a_layer_that_fails_says_why_and_is_tried_again(run, monkeypatch):
    no_compiler(monkeypatch)
    right = launch.wgrad

    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(launch, "wgrad", broken)
    status, rows, out = run()
    assert status == 1 and len(rows) == 6 and rows["failure"].notna().sum() == 2
    assert "FAILED tridil wgrad float16 of net d3: RuntimeError: no such instruction" in " ".join(
        out.split()
    )
    monkeypatch.setattr(launch, "wgrad", right)
    status, rows, _ = run()
    assert status == 0 and len(rows) == 6 and rows["failure"].isna().all()


@pytest.mark.slow
def test_with_a_fake_gpu(run):
    gpu = SweepGpu()
    status, rows, out = run("--dtypes", "float16,float32", gpu=gpu)
    machine, rows = rows[rows["kind"] == "machine"], rows[rows["kind"] != "machine"]
    assert status == 0 and len(rows) == 2 * 2 * 3 * 3
    assert (
        rows["failure"].isna().all()
        and (rows["bit_identical"] == "True").all()
        and (rows["extra_mib"] == 3).all()
    )
    assert (rows["clock_mhz"] == 1755).all() and (rows["temperature_c"] == 41).all()
    first = rows[
        (rows["layer"] == "d3") & (rows["pass"] == "fprop") & (rows["dtype"] == "float16")
    ].set_index("provider")
    problem = TINY[0].problem
    assert (
        list(first["ms"]) == [1, 2, 3]
        and list(first["ms_q1"]) == [0.75, 1.75, 2.75]
        and list(first["ms_q3"]) == [1.25, 2.25, 3.25]
    )
    assert list(first["layout"]) == ["nhwc", "nhwc", "nchw"]
    # best cuDNN: 2 ms
    assert list(first["ratio"]) == pytest.approx([2, 1, 2 / 3])
    assert first["tflops_dense"]["cudnn"] == pytest.approx(2 * problem.dense_macs / 2e-3 / 1e12)
    assert first["tflops_useful"]["tridil"] == pytest.approx(2 * problem.useful_macs / 1e-3 / 1e12)
    assert first["gb_s"]["tridil"] == pytest.approx(problem.bytes / 1e-3 / 1e9)
    # counted for our tiles only
    assert first["executed_macs"].notna().tolist() == [True, False, False]
    assert (
        "device Fake GPU 9000" in out and "driver 1.2.3" in out and "2.00 x the best cuDNN" in out
    )
    assert (run.out / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # roofs: a copy reads and writes, a product has n^3 multiply-accumulates
    roofs = machine.set_index(["pass", "dtype"])
    assert roofs["gb_s"]["copy", "float32"] == pytest.approx(2 * 32 * 32 * 4 / 1e-3 / 1e9)
    assert roofs["tflops_dense"]["matmul", "float16"] == pytest.approx(2 * 32**3 / 1e-3 / 1e12)
    # a search of its own for cuDNN, undone afterwards; compiled ahead what is launched; tensors in
    # turns until they exceed the L2 cache
    assert (
        gpu.settings[4:7] == [(False, False), (True, False), (True, False)]
        and not torch.backends.cudnn.benchmark
    )
    assert {(p.dtype, pass_) for p, pass_, *_ in gpu.compiled} == {
        (d, pass_) for d in ("float16", "float32") for pass_ in PASSES
    }
    assert gpu.turns[4] == -(-2 * gpu.l2_bytes // problem.bytes) > 4 and gpu.turns[0] == 1
    assert (
        (rows["eager_ms"] == 2 * rows["ms"]).all()
        and (rows["clock"] == "graph").all()
        and "eager" in out
    )


@pytest.mark.slow
def test_every_provider_computes_the_passes(run, monkeypatch, tmp_path):
    """A peer by its name, deterministic cuDNN, Inductor (here: what it is given), both layouts of
    tridil."""
    (tmp_path / "some_peer.py").write_text(
        "from torch.nn.functional import conv2d\nbroken = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    names = [
        "tridil",
        "tridil_nchw",
        "cudnn",
        "cudnn_deterministic",
        "inductor",
        "some_peer:conv2d",
    ]
    gpu = SweepGpu()
    status, rows, _ = run("--providers", ",".join(names), gpu=gpu)
    rows = rows[rows["kind"] != "machine"]
    assert status == 0 and list(rows["provider"][:6]) == names and rows["failure"].isna().all()
    # ATen's fp16 on CPUs exceeds its budget
    ours = rows["provider"].str.startswith("tridil")
    assert (rows["error"] <= rows["budget"])[ours].all() and (rows["error"] < 0.01).all()
    assert list(rows["layout"][:6]) == ["nhwc", "nchw", "nhwc", "nhwc", "nhwc", "nhwc"]
    # deterministic
    assert gpu.settings[5] == (True, True)
    assert rows.set_index("provider")["version"]["some_peer:conv2d"].iloc[0] == "unknown"
    assert (
        provider("some_peer:conv2d").missing() is None
        and "cannot be imported" in provider("some_peer:missing").missing()
    )


def test_why_a_provider_cannot_run():
    assert (
        reason_against("cudnn", False) == "cudnn needs a GPU"
        and reason_against("tridil", False) is None
    )
    assert reason_against("flaggems", True) == "flag_gems is not installed"
    assert all(p.meaning and p.version() for p in PROVIDERS.values())
    with pytest.raises(
        ValueError,
        match="unknown provider 'cuda-convnet': use tridil, .* or package.module:function",
    ):
        provider("cuda-convnet")


@pytest.mark.parametrize(
    "filters, count",
    [
        (["dilation=3"], 1),
        (["d3", "kind=narrow"], 1),
        (["kind=depthwise"], None),
        (["c=1"], None),
        (["groups=[23]"], 1),
        (["model=net"], 2),
    ],
)
def test_filters(filters, count, monkeypatch):
    monkeypatch.setattr(workloads, "suite", suite)
    command = [part for text in filters for part in ("--filter", text)]
    if count is None:
        with pytest.raises(SystemExit):
            sweep.arguments(command, None)
    else:
        assert len(sweep.arguments(command, None).layers) == count


def test_shapes_of_your_own(run, monkeypatch):
    no_compiler(monkeypatch)
    text = "n=1 c=16 h=6 w=7 k=16 r=3 d=2"
    status, rows, out = run("--shape", text, "--passes", "fprop,wgrad")
    assert (
        status == 0
        and list(rows["layer"]) == [text] * 2
        and list(rows["dilation"]) == [2, 2]
        and list(rows["h"]) == [6, 6]
    )


@pytest.fixture
def small_networks(monkeypatch):
    small = {
        "van_b2": (lambda: models.VAN(shrink=8, classes=3, depths=(1, 1, 1, 1)), (2, 3, 32, 32)),
        "wavenet": (lambda: models.WaveNet(shrink=16, layers=3), (2, 1, 40)),
    }
    for name, network in small.items():
        monkeypatch.setitem(models.MODELS, name, network)


@pytest.mark.slow
def test_whole_networks_on_a_fake_gpu(run, small_networks, monkeypatch):
    converted, tuned, gpu = [], set(), SweepGpu()
    monkeypatch.setattr(
        tridil,
        "convert",
        lambda model: (
            tuned.add(os.environ.get("TRIDIL_TUNE")) or converted.append(type(model)) or real(model)
        ),
    )
    status, rows, out = run(
        "--models", "van_b2,wavenet", "--dtypes", "bfloat16", "--providers", "tridil,cudnn", gpu=gpu
    )
    rows = rows[rows["kind"] == "model"]
    assert (
        status == 0
        and len(rows) == 2 * 2 * 2
        and rows["failure"].isna().all()
        and (rows["ms"] > 0).all()
        and (rows["extra_mib"] == 3).all()
    )
    assert set(gpu.settings[2:]) == {(True, False)} and tuned == {"0"}, (
        "all under one setting, none tunes"
    )
    of_inference = rows[rows["pass"] == "inference"]
    assert (of_inference["error"] <= of_inference["budget"]).all() and (
        of_inference["budget"] > 0
    ).all()
    assert set(converted) == {models.VAN, models.WaveNet}
    # another network
    monkeypatch.setattr(
        tridil, "convert", lambda model: [p.data.mul_(1.5) for p in model.parameters()]
    )
    assert run("--models", "wavenet", "--providers", "tridil", "--fresh", gpu=SweepGpu())[0] == 1


real = tridil.convert


def test_whole_networks_without_a_gpu(run):
    """Layers that are replaced, counted: DeepLabV3-ResNet50 has eleven."""
    status, rows, out = run("--models", "deeplabv3_resnet50", "--target", "cuda:90")
    assert (
        status == 0 and list(rows["pass"]) == ["inference", "training"] and rows["ms"].isna().all()
    )
    layers_ = [
        w
        for w in workloads.load()
        if w.model == "tv/deeplabv3_resnet50" and max(w.problem.dilation) > 1
    ]
    assert sum(w.count for w in layers_) == 11 and "11 dilated layers, counted" in set(
        rows["checked_on"]
    )
    assert rows["useful_macs"][0] == sum(w.count * w.problem.useful_macs for w in layers_)
    assert (
        rows["useful_macs"][1] == 3 * rows["useful_macs"][0]
        and (rows["predicted_ms"] > rows["roof_ms"]).all()
    )


@pytest.mark.slow
def test_ranks_share_the_layers_and_the_first_reports(tmp_path):
    """Two processes as torchrun starts them."""
    code = f"""
import sys
sys.path[:0] = [{str(PERF)!r}, {str(Path(__file__).parent)!r}]
import layers, sweep, workloads_
""".replace(
        "import layers, sweep, workloads_",
        """import layers, sweep
from fake_gpu import SweepGpu, suite
from tridil import workloads
workloads.suite = suite
sys.exit(sweep.main(["--passes", "fprop", "--out", sys.argv[1]], SweepGpu()))""",
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TRITON_INTERPRET": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=env | {"RANK": str(i), "LOCAL_RANK": str(i)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    out = [p.communicate(timeout=600)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], out
    rows = results.read(tmp_path / "results.csv")
    assert len(rows) == 2 + 2 * 3 and set(rows["layer"]) == {"copy", "matmul", "d3", "grouped"}
    assert (
        len(results.read(tmp_path / "results.rank1.csv")) == 4
        and "2.00 x the best cuDNN" in out[0]
        and "cuDNN" not in out[1]
    )


def test_the_model_against_a_clock(run, monkeypatch):
    """A clock that agrees with the model: correlation 1, regret 1; one that says the opposite:
    correlation -1, and the regret of it."""
    sign = [1]

    class Clock(SweepGpu):
        def quartiles(self, calls):
            calls[0]()
            self.calls += 1
            return 0.0, 10.0 + sign[0] * 0.01 * self.calls, 20.0

    status, _, out = run("--validate-model", "--passes", "fprop", gpu=Clock())
    assert (
        status == 0
        and "rank correlation 1.00 (median), regret 1.000" in out
        and "all measured on" in out
    )
    frame = pd.read_csv(run.out / "model.csv")
    assert (
        (frame["predicted_ms"] > 0).all()
        and frame["ms"].between(10, 11).all()
        and len(frame) > len(TINY)
    )
    sign[0] = -1
    assert (
        "rank correlation -1.00 (median), regret 1.0"
        in run("--validate-model", "--passes", "fprop", gpu=Clock())[2]
    )
    monkeypatch.setattr(launch, "prepare", lambda *a: 1 / 0)
    assert run("--validate-model", "--passes", "fprop", gpu=Clock())[0] == 1


def test_an_interrupted_validation_keeps_its_rows(run):
    class Clock(SweepGpu):
        def times(self, calls):
            self.calls += 1
            if self.calls == 3:
                assert len(pd.read_csv(run.out / "model.csv")) == 2, "written as they come"
                raise KeyboardInterrupt
            return {"ms": float(self.calls)}

    status, _, out = run("--validate-model", "--passes", "fprop", gpu=Clock())
    assert (
        status == 130
        and out.splitlines()[-1] == "interrupted"
        and "rank correlation" in out
        and len(pd.read_csv(run.out / "model.csv")) == 2
    )


def test_the_model_without_a_gpu(run):
    status, _, out = run("--validate-model", "--target", "cuda:90")
    frame = pd.read_csv(run.out / "model.csv")
    assert (
        status == 0 and "not measured, for want of a GPU" in out and "predicted time / roof" in out
    )
    assert (
        len(frame) == 3 * len(TINY)
        and (frame["predicted_ms"] >= frame["roof_ms"]).all()
        and "ms" not in frame
    )


def test_an_unstable_kernel_is_told(run, monkeypatch):
    right, noise = launch.prepare, iter(range(100))

    def noisy(problem, pass_, *rest):
        ready = right(problem, pass_, *rest)
        return (lambda *arguments: ready(*arguments) + next(noise)) if pass_ == "fprop" else ready

    monkeypatch.setattr(launch, "prepare", noisy)
    _, rows, _ = run("--providers", "tridil", "--passes", "fprop,dgrad", gpu=SweepGpu())
    assert list(rows["bit_identical"] == "False") == list(rows["pass"] == "fprop")


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("limit", [1, 60_000, 2**40])
def test_the_checked_part_is_a_part_of_the_result(pass_, groups, limit):
    problem = Problem(
        3,
        8,
        7,
        9,
        12,
        3,
        3,
        padding=((2, 1), (2, 2)),
        dilation=(2, 2),
        groups=groups,
        dtype="float64",
    )
    x, w, _, dy = testing.random_tensors(problem)
    operands = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[pass_]
    part, cuts, result_cut = layers.part_of(problem, pass_, limit)
    found = getattr(reference, pass_)(part, *(t[cut] for t, cut in zip(operands, cuts)))
    torch.testing.assert_close(found, getattr(reference, pass_)(problem, *operands)[result_cut])
    assert (part == problem) == (limit == 2**40)


def test_reduced_layers_keep_what_matters():
    for w in workloads.load():
        p = w.problem
        small, _ = layers.reduced(p, {})
        assert (small.r, small.s, small.stride, small.padding, small.dilation) == (
            p.r,
            p.s,
            p.stride,
            p.padding,
            p.dilation,
        )
        assert (small.groups == small.c) == (p.groups == p.c) and (small.groups > 1) == (
            p.groups > 1
        )
        assert (
            p.c // p.groups % 32 == small.c // small.groups % 32
            and p.k // p.groups % 32 == small.k // small.groups % 32
        )
        assert small.dense_macs <= 2e8 and small.n * small.p * small.q <= 5400, w.name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--passes", "forward"], "forward cannot be had here: use fprop, dgrad, wgrad"),
        (["--providers", "cudnn"], "cudnn needs a GPU"),
        (["--providers", "tridl"], "unknown provider 'tridl'"),
        (["--filter", "rate=3"], "there is no column 'rate'"),
        (["--filter", "("], "--filter: "),
        (["--shape", "n=1"], "lacks"),
        (["--filter", "nothing"], "no layer of suite 'quick' matches --filter 'nothing'"),
        (["--suite", "vision"], "invalid choice: 'vision'"),
        (
            ["--suite", "branches", "--passes", "fprop"],
            "--suite branches takes --target and --out, got --passes",
        ),
        (["--target", "banana"], "unknown target 'banana': use one of cuda:80"),
        (["--target", "cuda:70"], "unknown target 'cuda:70'"),
        (["--out", "/proc/nothing"], "--out /proc/nothing: No such file"),
        (["--out", __file__], "File exists"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        sweep.main(arguments)
    assert e.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_the_suite_of_branches(tmp_path, monkeypatch, capsys):
    found = {name: b for name, b in workloads.branches().items() if "RegSeg" in name}
    monkeypatch.setattr(workloads, "branches", lambda: found)
    arguments = ["--suite", "branches", "--target", "cuda:90", "--out", str(tmp_path)]
    assert sweep.main(arguments) == 0
    frame = pd.read_csv(tmp_path / "branches.csv")
    assert len(frame) == 3 * 3 and (frame["predicted_us"] < frame["predicted_apart_us"]).all()
    assert "predicted and counted for NVIDIA H100" in capsys.readouterr().out


def test_results_of_an_older_version_are_read(run):
    """Without the columns that are new since, with some that are gone."""
    no = {"eager_ms", "clock", "roof_ms"}
    row = {name: "x" for name in results.IDENTITY} | {"ms": 1.0, "gone": 3}
    pd.DataFrame([row]).to_csv(run.out / "old.csv", index=False)
    frame = results.read(run.out / "old.csv")
    assert (
        list(frame) == list(results.COLUMNS)
        and frame["ms"].tolist() == [1.0]
        and frame[list(no)].isna().all(axis=None)
    )


@pytest.mark.parametrize("content", ["layer,ms\nd3,1\n", "", "\x00\x01"])
def test_what_is_no_table_of_a_sweep_is_refused(run, content, capsys):
    (run.out / "results.csv").write_text(content)
    with pytest.raises(SystemExit) as e:
        sweep.main(["--out", str(run.out)])
    assert (
        e.value.code == 2
        and "results.csv" in capsys.readouterr().err
        and (run.out / "results.csv").read_text() == content
    )


def test_times_below_a_microsecond_say_so():
    assert results.milliseconds(0.25) == "0.250" and results.milliseconds(0.0008) == "0.80 us"
    assert results.milliseconds(float("nan")) == ""
