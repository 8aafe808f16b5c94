#!/usr/bin/env python
"""Compares two revisions, or two results.csv of perf/sweep.py: what became worse, what better.

    python perf/compare.py main HEAD          both in temporary worktrees, which are removed afterwards
    python perf/compare.py HEAD .             the working tree as it is
    python perf/compare.py old/results.csv new/results.csv
    python perf/compare.py HEAD~1 HEAD --picks     only which configs, launches and counts the cost model picks

Of revisions HEAD's tests run first. With a GPU both are swept in turn: base, head, head, base.
Without one, or with --static, they are compared by what the compiler makes of a suite's kernels, by
the host's time of a call over a bare launch, and by how many kernels a network compiles. Exit
status 1 when something is worse or HEAD's tests fail, 2 when the input cannot be compared, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tridil import drivers  # noqa: E402

KEY = ["model", "layer", "pass", "dtype", "layout", "provider"]
COUNTED = ["spills", "registers", "overhead", "executed_macs", "extra_mib"]
FIGURES = ["ms", "ms_q1", "ms_q3", *COUNTED]
# figure -> how much of it may be added or lost without a word
TIME, HOST = 0.03, 0.15
STATIC = {"spills": 0, "overhead": 0.02, "per_fma": 0.02, "executed_macs": 0.005}
# growth is worse only where fewer programs fit on an SM, or spills appear
OCCUPANCY = ("registers", "shared_bytes")
# in the interpreter the kernels' own take many minutes
TESTS = "tests/test_problem.py tests/test_config.py tests/test_launch.py"
GPU_TESTS = "tests/test_kernels.py"


class Unusable(Exception):
    """The input cannot be compared; the message says why."""


def judge(what: str, figure: str, base, head, tolerance: float = 0) -> list[dict]:
    """The finding that a figure, of which less is better, changed by more than tolerance * base;
    none where either side lacks it."""
    if pd.isna(base) or pd.isna(head) or abs(head - base) <= tolerance * base:
        return []
    return [
        {
            "what": what,
            "figure": figure,
            "base": f"{base:.6g}",
            "head": f"{head:.6g}",
            "change": f"{head / base - 1:+.1%}" if base else "",
            "worse": head > base,
        }
    ]


def failure(what: str, base: str, head: str) -> list[dict]:
    """The finding that one side alone has a failure, which is a text."""
    if bool(base) == bool(head):
        return []
    return [
        {
            "what": what,
            "figure": "failure",
            "base": base[:60],
            "head": head[:60],
            "change": "",
            "worse": bool(head),
        }
    ]


def name(key: tuple[str, ...]) -> str:
    return " ".join(filter(None, key))


def only_in(base: dict, head: dict) -> list[str]:
    """What one side alone has, a line each."""
    return [
        f"only in {side}: {name(key)}"
        for side, here, there in (("BASE", base, head), ("HEAD", head, base))
        for key in here
        if key not in there
    ]


def read(path: Path) -> pd.DataFrame:
    """Rows of tridil in a results.csv, by KEY, with `broken`: why the row is no result, or "".
    Raises Unusable."""
    numbers = [*FIGURES, "error", "budget"]
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys((*KEY, "failure"), str))
        missing = [
            column for column in (*KEY, "target", "failure", *numbers) if column not in frame
        ]
        if missing:
            raise Unusable(
                f"{path} lacks the columns {', '.join(missing)}: write it again with perf/sweep.py --fresh"
            )
        frame[numbers] = frame[numbers].astype(float)
    except (OSError, ValueError) as e:  # pandas' errors of reading are ValueErrors
        raise Unusable(f"{path}: {e}") from None
    frame[KEY] = frame[KEY].fillna("")
    frame = frame[frame["provider"].str.startswith("tridil")].drop_duplicates(KEY, keep="last")
    frame["broken"] = [
        row["failure"]
        if pd.notna(row["failure"])
        else ""
        if pd.isna(row["budget"]) or row["error"] <= row["budget"]
        else f"error {row['error']:.3g} > budget {row['budget']:.3g}"
        for row in frame.to_dict("records")
    ]
    return frame.set_index(KEY)[["target", "broken", *FIGURES]]


def merged(rounds: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame of several rounds: median times, whose quartiles become the extremes of the rounds;
    a failure of any round."""
    frame = pd.concat([part.assign(ms_q1=part["ms"], ms_q3=part["ms"]) for part in rounds])
    how = dict(target="last", broken="max", ms="median", ms_q1="min", ms_q3="max") | dict.fromkeys(
        COUNTED, "max"
    )
    return frame.groupby(level=KEY, sort=False).agg(how)


def compare_sweeps(base: pd.DataFrame, head: pd.DataFrame) -> tuple[list[dict], list[str]]:
    """(findings, lines to print) of two frames of `read`.

    A time is noise where the quartile ranges overlap or it changed by less than TIME. Counted
    figures have no noise; where the time is better beyond noise, those that only stand for time are
    not held against it.
    """
    common = [key for key in base.index if key in head.index]
    if not common:
        raise Unusable(
            "no row of tridil is in both: compare sweeps of the same suite, passes and dtypes"
        )
    targets = sorted({*base["target"], *head["target"]})
    if len(targets) > 1:
        raise Unusable(
            f"the rows are of different GPU architectures ({', '.join(targets)}): compare sweeps of one"
        )
    base, head = base.to_dict("index"), head.to_dict("index")
    findings, logs = [], []
    for key in common:
        a, b, what = base[key], head[key], name(key)
        findings += failure(what, a["broken"], b["broken"])
        if a["broken"] or b["broken"]:
            continue
        overlap = a["ms_q1"] <= b["ms_q3"] and b["ms_q1"] <= a["ms_q3"]
        timed = [] if overlap else judge(what, "ms", a["ms"], b["ms"], TIME)
        findings += timed
        for figure in COUNTED:
            found = judge(what, figure, a[figure], b[figure])
            faster = timed and not timed[0]["worse"] and figure != "extra_mib"
            findings += [f for f in found if not (f["worse"] and faster)]
        if pd.notna(a["ms"]) and pd.notna(b["ms"]):
            logs.append(math.log(b["ms"] / a["ms"]))
    lines = only_in(base, head) + [f"{len(common)} rows compared"]
    if logs:
        lines.append(
            f"time of HEAD / time of BASE: {math.exp(sum(logs) / len(logs)):.3f} (geometric mean of {len(logs)} rows, measured)"
        )
    return findings, lines


def grouped(rows: list[dict], *names) -> dict[tuple, list[dict]]:
    """The rows by the text of some of their columns, in order."""
    found = {}
    for row in rows:
        found.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    return found


def whole(rows: list[dict]) -> dict:
    """The kernels of a pass as one row, for a pass whose kernels or config changed: how many
    programs fit is then no yardstick."""
    first = {name: rows[0].get(name) for name in (*STATIC, "failure")}
    return first | {
        "kernel": "+".join(str(row["kernel"]) for row in rows),
        "spills": sum(row.get("spills", 0) for row in rows),
        "registers": max(row.get("registers", 0) for row in rows),
    }


def compare_kernels(base: list[dict], head: list[dict]) -> tuple[list[dict], list[str]]:
    """(findings, lines to print) of the rows that `python -m tridil aot --json` wrote."""
    base, head = (grouped(rows, "layer", "pass", "target") for rows in (base, head))
    common = [key for key in base if key in head]
    findings, changed = [], 0
    for key in common:
        before, after = base[key], head[key]
        same = [(row["kernel"], row.get("config")) for row in before] == [
            (row["kernel"], row.get("config")) for row in after
        ]
        changed += not same
        for a, b in zip(before, after) if same else [(whole(before), whole(after))]:
            kernels = (
                a["kernel"] if a["kernel"] == b["kernel"] else f"{a['kernel']} -> {b['kernel']}"
            )
            what = f"{name(key)} {kernels}"
            findings += failure(what, a.get("failure") or "", b.get("failure") or "")
            if a.get("failure") or b.get("failure"):
                continue
            for figure, tolerance in STATIC.items():
                findings += judge(what, figure, a.get(figure), b.get(figure), tolerance)
            fewer, spilled = (
                (a.get("ctas_per_sm") or 0) - (b.get("ctas_per_sm") or 0),
                b["spills"] - a["spills"],
            )
            for figure in OCCUPANCY:
                findings += [
                    f
                    for f in judge(what, figure, a.get(figure), b.get(figure))
                    if (max(fewer, spilled) > 0 if f["worse"] else min(fewer, spilled) < 0)
                ]
    return findings, [
        *only_in(base, head),
        f"kernels: {len(common)} passes of layers compared, {changed} with other kernels or tiles (static)",
    ]


def compare_figure(
    base: list[dict], head: list[dict], names, figure: str, tolerance: float
) -> tuple[list[dict], list[str]]:
    """(findings, lines to print) of one figure, by the columns `names`; of several rounds the
    median."""
    base, head = (
        {key: median(row[figure] for row in part) for key, part in grouped(rows, *names).items()}
        for rows in (base, head)
    )
    return [
        f
        for key in base
        if key in head
        for f in judge(name(key), figure, base[key], head[key], tolerance)
    ], only_in(base, head)


def git(*arguments, cwd=None) -> str:
    """What git prints. Raises Unusable with git's message."""
    try:
        return subprocess.run(
            ["git", *map(str, arguments)], capture_output=True, text=True, check=True, cwd=cwd
        ).stdout.strip()
    except subprocess.CalledProcessError as e:
        raise Unusable(
            f"git {arguments[0]}: {e.stderr.strip() or f'status {e.returncode}'}"
        ) from None
    except OSError as e:
        raise Unusable(f"git cannot be run: {e}") from None


def resolve(repository: Path, base: str, head: str) -> dict[str, str | None]:
    """The commits of BASE and HEAD; None is the working tree. Raises Unusable."""
    commits = {}
    for side, revision in (("BASE", base), ("HEAD", head)):
        try:
            commits[side] = (
                None
                if revision == "."
                else git("rev-parse", "--verify", "--quiet", revision + "^{commit}", cwd=repository)
            )
        except Unusable:
            raise Unusable(
                f"{side} {revision!r} is no revision of {repository}, no '.' and no .csv file"
            ) from None
    dirty = git("diff", "--name-only", "HEAD", "--", "tridil", "perf", cwd=repository)
    if dirty and commits["HEAD"] == git("rev-parse", "HEAD", cwd=repository):
        raise Unusable(
            f"HEAD {head!r} is checked out with changes that are not committed, in {', '.join(dirty.split())}: commit them, or give '.' "
            "for the working tree as it is"
        )
    return commits


@contextmanager
def worktrees(repository: Path, commits: dict):
    """({side: folder of its tree}, a temporary folder); all that it made is gone afterwards."""
    try:
        with tempfile.TemporaryDirectory(
            prefix="tridil-compare-", ignore_cleanup_errors=True
        ) as folder:
            trees = {
                side: Path(folder, side) if commit else repository
                for side, commit in commits.items()
            }
            for side, commit in commits.items():
                if commit:
                    git("worktree", "add", "--detach", trees[side], commit, cwd=repository)
            yield trees, Path(folder)
    finally:
        git("worktree", "prune", cwd=repository)


def execute(command: list[str], cwd: Path, env: dict) -> subprocess.CompletedProcess:
    """Runs a command with its output captured; interrupted, it ends all processes that the command
    started, which write to its folders."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate()
            return subprocess.CompletedProcess(command, process.returncode, out, err)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def compare_picks(base: dict, head: dict) -> tuple[list[dict], list[str]]:
    """(findings, lines) of what `perf/picks.py` wrote of both: a pick, its launches or its count that
    differs is worse, for a change of form has none."""
    known = base.keys() & head.keys()
    changed = sorted(key for key in known if base[key] != head[key])
    findings = [
        {
            "what": key,
            "figure": "pick",
            "base": str(base[key]),
            "head": str(head[key]),
            "change": "",
            "worse": True,
        }
        for key in changed
    ]
    return findings, [
        *only_in(dict.fromkeys((key,) for key in base), dict.fromkeys((key,) for key in head)),
        f"{len(known)} picks compared, {len(changed)} differ",
    ]


def compare_trees(args, trees: dict, folder: Path, run) -> tuple[list[dict], list[str]]:
    """(findings, lines to print) of two trees; run is like `execute`. Raises Unusable."""

    def call(side, *arguments, out=None):
        """(finished process, its last lines); Unusable when it did not write `out`."""
        print(
            f"{side} {getattr(args, side.lower())}: python {' '.join(map(str, arguments))}",
            flush=True,
        )
        env = drivers.clean(os.environ)
        path = os.pathsep.join(filter(None, (str(trees[side]), env.get("PYTHONPATH"))))
        env |= {
            "PYTHONPATH": path,
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TRIDIL_CACHE": str(folder / "tuned"),
        }
        done = run([sys.executable, *map(str, arguments)], trees[side], env)
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        words = " ".join(arguments[:3] if arguments[0] == "-m" else arguments[:1])
        if out and not out.exists():
            raise Unusable(
                f"{side}: python {words} ended with status {done.returncode} and no result:\n{last}"
            )
        return done, last

    def rows(side, *arguments):
        """The rows that a command writes with --json."""
        out = folder / f"{side}.json"
        out.unlink(missing_ok=True)
        call(side, *arguments, "--json", out, out=out)
        return json.loads(out.read_text())

    if args.picks:
        # the same script for both, which may not have it
        script = str(Path(__file__).resolve().with_name("picks.py"))
        return compare_picks(
            *(rows(side, script, "--targets", args.targets) for side in ("BASE", "HEAD"))
        )
    has_gpu = torch.cuda.is_available() and not args.static
    if not args.no_tests:
        done, last = call(
            "HEAD",
            "-m",
            "pytest",
            "-q",
            *shlex.split(args.tests or (GPU_TESTS if has_gpu else TESTS)),
        )
        if done.returncode:
            return failure("tests of HEAD", "", f"pytest ended with status {done.returncode}"), [
                f"{last}\nnothing is compared: HEAD's tests fail"
            ]
    more = shlex.split(args.args)
    if has_gpu:
        rounds = {"BASE": [], "HEAD": []}
        for i, side in enumerate(("BASE", "HEAD", "HEAD", "BASE")):
            out = folder / f"sweep{i}"
            call(
                side,
                "perf/sweep.py",
                "--fresh",
                "--suite",
                args.suite,
                "--providers",
                "tridil",
                "--out",
                out,
                *more,
                out=out / "results.csv",
            )
            rounds[side].append(read(out / "results.csv"))
        return compare_sweeps(*map(merged, rounds.values()))
    targets = args.targets.split(",")
    base, head = (
        [
            row
            for target in targets
            for row in rows(
                side, "-m", "tridil", "aot", "--suite", args.suite, "--target", target, *more
            )
        ]
        for side in ("BASE", "HEAD")
    )
    findings, lines = compare_kernels(base, head)
    cuda = ",".join(target for target in targets if target.startswith("cuda"))
    for title, script, names, figure, tolerance, rounds in (
        (
            "host time of a call / of a bare launch",
            ("perf/host_overhead.py", "--repetitions", 500),
            ("target", "call"),
            "ratio",
            HOST,
            2,
        ),
        (
            "kernels of a cold start",
            ("perf/cold_start.py", "--count"),
            ("layers", "target"),
            "kernels",
            0,
            1,
        ),
    ):
        found = {"BASE": [], "HEAD": []}
        try:
            for side in ("BASE", "HEAD", "HEAD", "BASE")[: 2 * rounds]:
                found[side] += rows(side, *script, "--targets", cuda)
        except Unusable as e:
            lines.append(f"{title}: not compared. {e}")
            continue
        worse, said = compare_figure(*found.values(), names, figure, tolerance)
        findings += [f | {"what": f"{title}, {f['what']}"} for f in worse]
        lines += [*said, f"{title}: compared"]
    return findings, lines


def main(argv=None, run=execute) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a revision, '.' or a .csv file")
    parser.add_argument("head", metavar="HEAD", help="a revision, '.' or a .csv file")
    parser.add_argument("--static", action="store_true", help="no times, also with a GPU")
    parser.add_argument(
        "--picks",
        action="store_true",
        help="nothing but the configs that are picked for all workloads, their launches and counts",
    )
    parser.add_argument("--suite", default="quick", help="suite of tridil.workloads")
    parser.add_argument(
        "--targets",
        default="cuda:80,cuda:90",
        help="what kernels are compiled for (default: %(default)s); with times, the GPU",
    )
    parser.add_argument(
        "--tests", help=f"arguments of pytest (default: {TESTS}; with a GPU {GPU_TESTS})"
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="do not run HEAD's tests: they passed already"
    )
    parser.add_argument(
        "--args",
        default="",
        help='more arguments of perf/sweep.py, or of tridil aot, like --args="--passes fprop"',
    )
    args = parser.parse_args(argv)
    try:
        if ".csv" in (Path(args.base).suffix, Path(args.head).suffix):
            findings, lines = compare_sweeps(read(Path(args.base)), read(Path(args.head)))
        else:
            repository = Path(git("rev-parse", "--show-toplevel"))
            with worktrees(repository, resolve(repository, args.base, args.head)) as (
                trees,
                folder,
            ):
                findings, lines = compare_trees(args, trees, folder, run)
    except Unusable as e:
        parser.error(str(e))
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    for title, worse in (("worse", True), ("better", False)):
        rows = [f for f in findings if f["worse"] == worse]
        if rows:
            print(f"\n{title}:\n{pd.DataFrame(rows).drop(columns='worse').to_string(index=False)}")
    print("", *lines, sep="\n")
    worse = sum(f["worse"] for f in findings)
    print(
        f"verdict: {'REGRESSION' if worse else 'no regression'} ({worse} worse, {len(findings) - worse} better)"
    )
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
