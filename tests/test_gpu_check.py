"""perf/gpu_check.py from end to end on a made-up device, and what it does when steps fail or take
too long."""

import re
import signal
import sys
import time
from pathlib import Path

import gpu_check
import pandas as pd
import pytest
from gpu_check import Step

from tridil.drivers import interpreted

FAKE = Path(__file__).with_name("fake_gpu.py")


def on_the_fake_gpu(work, sanitizer=True):
    """The real steps, whose python is fake_gpu.py's."""
    found = [
        Step(
            s.name,
            [sys.executable, str(FAKE), *s.command[s.command.index(sys.executable) + 1 :]],
            s.seconds,
            s.words,
            s.files,
        )
        for s in gpu_check.steps(work)
    ]
    return (
        found
        + [
            Step(
                "sanitizer",
                [sys.executable, str(FAKE), "-c", gpu_check.SANITIZED],
                60,
                ("ERROR SUMMARY",),
            )
        ]
        * sanitizer
    )


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="the made-up device interprets kernels")
def test_from_end_to_end(tmp_path, capsys):
    assert (
        gpu_check.main(
            [str(tmp_path / "out"), "--seconds", "3000"], has_gpu=True, steps=on_the_fake_gpu
        )
        == 0
    )
    out = capsys.readouterr().out
    lines = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert list(lines) == [
        "machine",
        "hopper",
        "contiguous",
        "tests",
        "sweep",
        "validate",
        "branches",
        "tune",
        "export",
        "sanitizer",
    ]
    assert all(line.startswith("ok, ") for line in lines.values()), out
    assert (
        " passed" in lines["tests"]
        and lines["sweep"].count("x the best cuDNN (geometric mean, measured)") == 3
    )
    assert (
        "rank correlation" in lines["validate"]
        and re.search(
            r"one launch takes .* of [1-9]\d* passes, measured.*all right", lines["branches"]
        )
        and "6 measured, kept in" in lines["tune"]
        and "0 errors" in lines["sanitizer"]
    )
    assert out.splitlines()[-1].startswith("gpu_check passed, ")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        files
        == {
            "check.log",
            "verdict.md",
            "results.csv",
            "results.md",
            "report.html",
            "model.csv",
            "tuned.json",
        }
        and len(files) <= 8
    )
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert (
        set(rows["provider"]) == {"tridil", "cudnn", "cudnn_nchw", "torch"}
        and rows["failure"].isna().all()
    )
    assert "# GPU check: passed" in (tmp_path / "out" / "verdict.md").read_text()


def scripted(results, seen):
    """A `run` that gives the results in turn, and writes what it was asked to."""
    turns = iter(results)

    def run(command, seconds, env):
        seen.append((command, seconds, env))
        return next(turns)

    return run


def fake_steps(*names, files=()):
    return lambda work: [Step(name, ["true", str(work)], 100, ("found",), files) for name in names]


def test_a_failed_step_fails_the_check_and_the_others_still_run(tmp_path, capsys):
    seen = []
    status = gpu_check.main(
        [str(tmp_path)],
        has_gpu=True,
        steps=fake_steps("a", "b", "c"),
        run=scripted([(1, "x\nfound 3 errors\nend"), ("stopped", ""), (0, "all\nfine")], seen),
    )
    out = capsys.readouterr().out.splitlines()
    assert status == 1 and len(seen) == 3
    assert "FAILED (status 1)" in out[0] and out[0].endswith("found 3 errors")
    assert (
        "b: partial (stopped after" in out[1]
        and out[1].endswith("no output")
        and out[2].endswith("fine")
        and "gpu_check FAILED" in out[3]
    )
    assert (
        "found 3 errors" in (tmp_path / "check.log").read_text()
        and "GPU check: FAILED" in (tmp_path / "verdict.md").read_text()
    )


@pytest.mark.parametrize(
    "name, result, word, verdict",
    [
        ("tests", ("stopped", "12 passed, 3 skipped in 100 s"), "partial", "passed, in part"),
        ("tests", ("stopped", "1 failed, 12 passed"), "FAILED", "FAILED"),
        ("tests", ("stopped", "12 passed, 2 errors"), "FAILED", "FAILED"),
        ("sweep", ("stopped", "interrupted: 5 of 9 rows"), "partial", "passed, in part"),
        ("sweep", ("stopped", "BROKEN BUDGET tridil fprop"), "FAILED", "FAILED"),
        ("sweep", ("stopped", "BROKEN BUDGET cudnn"), "partial", "passed, in part"),
        ("tune", ("stopped", "Traceback (most recent call last)"), "FAILED", "FAILED"),
        ("tune", ("killed", ""), "FAILED", "FAILED"),
        ("tune", (-11, ""), "FAILED", "FAILED"),
        ("validate", (0, ""), "ok", "passed"),
    ],
)
def test_only_wrong_results_and_crashes_fail(tmp_path, capsys, name, result, word, verdict):
    """A step whose time ended, and that answered, is partial."""

    def one(work):
        return [step for step in gpu_check.steps(work) if step.name == name]

    status = gpu_check.main([str(tmp_path)], has_gpu=True, steps=one, run=scripted([result], []))
    out = capsys.readouterr().out
    assert (
        out.startswith(f"{name}: {word}")
        and f"gpu_check {verdict}," in out
        and status == (verdict == "FAILED")
    )
    assert f"GPU check: {verdict}" in (tmp_path / "verdict.md").read_text()


def test_steps_are_chosen(tmp_path, capsys):
    seen = []
    arguments = dict(
        has_gpu=True, steps=fake_steps("a", "b", "c"), run=scripted([(0, "fine")] * 2, seen)
    )
    assert gpu_check.main([str(tmp_path), "--steps", "c,a"], **arguments) == 0
    assert len(seen) == 2 and capsys.readouterr().out.startswith("a: ok")
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path), "--steps", "a,d"], **arguments)
    assert "--steps takes some of a, b, c; got d" in capsys.readouterr().err


def test_time_is_shared(tmp_path, monkeypatch):
    """A step gets its share, and what earlier ones left; never more than what is left of the whole."""
    clock, seen = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])

    def run(command, seconds, env):
        seen.append(seconds)
        clock[0] += took[len(seen) - 1]
        return 0, ""

    took = [10, 300, 0]
    assert (
        gpu_check.main(
            [str(tmp_path), "--seconds", "300"],
            has_gpu=True,
            steps=fake_steps("a", "b", "c"),
            run=run,
        )
        == 0
    )
    assert (
        seen == [100, 145]
        and "c: left out, 0 s: no time was left" in (tmp_path / "verdict.md").read_text()
    )


def test_what_it_measures_depends_on_no_switch_or_cache_of_the_user(tmp_path, monkeypatch):
    switches = {"TRITON_INTERPRET", "TRIDIL_TARGET", "TRIDIL_BACKEND", "TRIDIL_TUNE"}
    for name in (*switches, "TRIDIL_CACHE"):
        monkeypatch.setenv(name, "1")
    seen = []
    gpu_check.main(
        [str(tmp_path)], has_gpu=True, steps=fake_steps("a"), run=scripted([(0, "")], seen)
    )
    env = seen[0][2]
    assert not switches & env.keys() and env["TRIDIL_CACHE"] != "1"


def test_a_command_that_takes_too_long_is_interrupted_then_killed(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    program = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
def told(*_):
    print("interrupted", flush=True)
    STOP
signal.signal(signal.SIGINT, told)
time.sleep(60)
"""
    for stop, how in (("sys.exit(130)", "stopped"), ("pass; time.sleep(60)", "killed")):
        begin = time.monotonic()
        status, text = gpu_check.run([sys.executable, "-c", program.replace("STOP", stop)], 6, None)
        assert (
            status == how
            and text.splitlines()[-1] == "interrupted"
            and time.monotonic() - begin < 45
        )
        child = int(text.split()[1])
        with pytest.raises(ProcessLookupError):  # nothing outlives the step
            for _ in range(100):
                gpu_check.os.kill(child, 0)
                if (
                    Path(f"/proc/{child}/stat").exists()
                    and Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                ):
                    raise ProcessLookupError
                time.sleep(0.1)
    assert gpu_check.run([sys.executable, "-c", "print(5); raise SystemExit(3)"], 30, None) == (
        3,
        "5\n",
    )
    assert signal.SIGINT


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_check.main([str(tmp_path / "out")], has_gpu=False) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_real_steps_are_commands_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/opt/{name}")
    steps = gpu_check.steps(tmp_path)
    assert [s.name for s in steps] == [
        "machine",
        "hopper",
        "contiguous",
        "tests",
        "sweep",
        "validate",
        "branches",
        "tune",
        "export",
        "sanitizer",
    ]
    assert sum(s.seconds for s in steps) <= 600 and steps[-1].command[0] == "/opt/compute-sanitizer"
    compile(gpu_check.SANITIZED, "sanitized", "exec")
    assert all(
        Path(part).exists()
        for s in steps
        for part in s.command
        if part.endswith(".py") and "/" in part[:1]
    )
