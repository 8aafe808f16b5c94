"""Everything that needs a GPU, in one command of less than nine minutes: `python perf/gpu_check.py
FOLDER`.

Steps: what is there, the families hopper (or blackwell) and contiguous beside the other kernels, the kernel tests
natively, the quick sweep against cuDNN, the cost model against the clock, parallel branches in one
launch, tuning of the deeplab suite, a few launches under compute-sanitizer. Each has its share of
the time and is stopped at its end; what one leaves over the next ones get. What a step has by then
is kept: it is "partial". FOLDER receives at most eight files: check.log, verdict.md, results.csv,
results.md, report.html, model.csv, tuned.json. Exit status 1 when a result was wrong or a step
crashed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tridil import drivers  # noqa: E402

GRACE = 10  # seconds that an interrupted step has to report
TESTS = 125  # seconds of the kernel tests
BROKEN = ("FAILED tridil", "BROKEN BUDGET tridil")
# each tensor in an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), else the tool sees
# PyTorch's large ones only. What it may flag below sm_100 and is no fault: masked lanes of a
# pipelined load issue cp.async of zero bytes, whose address may lie outside the tensor; PTX says
# nothing is read
SANITIZED = """
import os
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
import torch
from tridil import cost_model, drivers, launch, testing
from tridil.problem import PASSES, Problem
for p in (Problem(2, 64, 17, 19, 64, 3, 3, padding=((6, 6), (6, 6)), dilation=(6, 6)), Problem(1, 3, 16, 16, 8, 3, 3, dilation=(2, 2)),
          Problem(2, 32, 15, 15, 32, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2), groups=32)):
    x, w, bias, dy = testing.random_tensors(p, "cuda")
    for pass_, operands in zip(PASSES, ((x, w, bias), (dy, w), (dy, x))):
        getattr(launch, pass_)(p, *operands, cost_model.best(p, pass_, drivers.target()))
torch.cuda.synchronize()
"""


@dataclass
class Step:
    """One command. seconds: its share; words: those of the lines that sum up what it printed;
    files: what it leaves in its folder."""

    name: str
    command: list[str]
    seconds: float
    words: tuple[str, ...]
    files: tuple[str, ...] = ()
    # regular expression of what the output of a step that was stopped must not have
    wrong: str = "Traceback"


def lines_with(output: str, *words: str) -> str:
    """The last three lines with one of the words, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "; ".join(
        [line for line in lines if any(word in line for word in words)][-3:]
        or lines[-1:]
        or ["no output"]
    )[:600]


def steps(work: Path) -> list[Step]:
    python = sys.executable
    sweep, family = (str(ROOT / "perf" / name) for name in ("sweep.py", "family.py"))
    found = [
        Step("machine", [python, "-m", "tridil", "info"], 20, ("cuda:0",)),
        Step(
            "hopper",
            [python, family, "hopper", "blackwell", "--seconds", "10"],
            30,
            ("hopper", "blackwell"),
            wrong="WRONG|FAILED|Traceback",
        ),
        Step(
            "contiguous",
            [python, family, "contiguous", *"--suite audio1d --layout nchw --seconds 15".split()],
            40,
            ("contiguous",),
            wrong="WRONG|FAILED|Traceback",
        ),
        Step(
            "tests",
            [
                python,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--maxfail",
                "20",
                "--seconds",
                str(TESTS - 2 * GRACE),
                "tests/test_kernels.py",
            ],
            TESTS,
            (" passed", " failed", " error"),
            wrong=r"\d (failed|error)",
        ),
        Step(
            "sweep",
            [python, sweep, "--suite", "quick", "--out", str(work)],
            120,
            ("x the best cuDNN", *BROKEN),
            ("results.csv", "results.md", "report.html"),
            "|".join(BROKEN),
        ),
        Step(
            "validate",
            [python, sweep, "--suite", "quick", "--validate-model", "--out", str(work)],
            80,
            ("rank correlation",),
            ("model.csv",),
        ),
        Step(
            "branches",
            [
                python,
                str(ROOT / "perf" / "branches.py"),
                "--measure",
                "--batch",
                "1",
                "--seconds",
                "30",
            ],
            45,
            ("one launch takes",),
            wrong="WRONG|Traceback",
        ),
        Step(
            "tune",
            [python, "-m", "tridil", "tune", "--suite", "deeplab", "--budget", "60s"],
            80,
            ("measured, kept",),
        ),
        Step(
            "export",
            [python, "-m", "tridil", "cache", "export", str(work / "tuned.json")],
            20,
            ("written",),
            ("tuned.json",),
        ),
    ]
    if tool := shutil.which("compute-sanitizer"):
        found.append(
            Step(
                "sanitizer",
                [tool, "--tool", "memcheck", "--error-exitcode", "1", python, "-c", SANITIZED],
                40,
                ("ERROR SUMMARY",),
            )
        )
    return found


def run(command: list[str], seconds: float, env: dict) -> tuple[int | str, str]:
    """(exit status, output) of a command. When its time ended it is interrupted: "stopped";
    "killed", with all it started, when that has not ended it after ten seconds."""
    # a pipe would stay open as long as anything that the command started
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(max(seconds - GRACE, 1))
        except subprocess.TimeoutExpired:
            # the sweep still reports what it has
            process.send_signal(signal.SIGINT)
            status = "killed"
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
                status = "stopped"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def outcome(step: Step, status: int | str, text: str) -> str:
    """ "ok", "partial" (its time ended, nothing is wrong), "left out" or "FAILED"."""
    if status == "left out":
        return status
    if status == "stopped":
        return "FAILED" if re.search(step.wrong, text) else "partial"
    return "ok" if status == 0 else "FAILED"


def main(argv=None, has_gpu: bool | None = None, run=run, steps=steps) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="receives the results")
    parser.add_argument(
        "--seconds", type=float, default=510, help="of all steps together (default: 510)"
    )
    parser.add_argument(
        "--steps", help="only these, comma-separated (default: all, whose names verdict.md shows)"
    )
    args = parser.parse_args(argv)
    names = [step.name for step in steps(Path())]
    asked = args.steps.split(",") if args.steps else names
    if unknown := set(asked).difference(names):
        parser.error(f"--steps takes some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if has_gpu is None:
        import torch

        has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print(
            "gpu_check: there is no GPU here (torch.cuda.is_available() is False); nothing was checked",
            file=sys.stderr,
        )
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    begin, lines, words = time.monotonic(), [], []
    with (
        tempfile.TemporaryDirectory() as temporary,
        open(args.folder / "check.log", "w", encoding="utf-8") as log,
    ):
        work = Path(temporary)
        env = drivers.clean(os.environ) | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        # what this run measured, and nothing else
        env |= {"TRIDIL_CACHE": str(work / "cache")}
        todo = [step for step in steps(work) if step.name in asked]
        for i, step in enumerate(todo):
            left, ahead = (
                args.seconds - (time.monotonic() - begin),
                sum(later.seconds for later in todo[i:]),
            )
            limit = min(left, step.seconds * max(1.0, left / ahead))
            since = time.monotonic()
            status, text = (
                run(step.command, limit, env) if left > 1 else ("left out", "no time was left")
            )
            took = time.monotonic() - since
            words.append(outcome(step, status, text))
            told = words[-1] + {
                "FAILED": f" (status {status})",
                "partial": f" (stopped after {limit:.0f} s)",
            }.get(words[-1], "")
            lines.append(f"{step.name}: {told}, {took:.0f} s: {lines_with(text, *step.words)}")
            log.write(
                f"==== {step.name}: {' '.join(step.command)[:300]}\n{text}\n==== {told}, {took:.1f} s\n\n"
            )
            log.flush()
            for name in step.files:
                if (work / name).exists():
                    shutil.copy(work / name, args.folder / name)
    verdict = (
        "FAILED" if "FAILED" in words else "passed" if set(words) <= {"ok"} else "passed, in part"
    )
    page = ["# GPU check: " + verdict, "", *(f"- {line}" for line in lines), ""]
    (args.folder / "verdict.md").write_text("\n".join(page), encoding="utf-8")
    print(
        "\n".join(
            [
                *lines,
                f"gpu_check {verdict}, {time.monotonic() - begin:.0f} s, results in {args.folder}",
            ]
        )
    )
    return int("FAILED" in words)


if __name__ == "__main__":
    sys.exit(main())
