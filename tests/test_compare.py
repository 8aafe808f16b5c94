"""perf/compare.py: verdicts and exit statuses on made-up rows; revisions of a tiny repository, a
fake runner; compiled once for real."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "perf"))
import compare  # noqa: E402

ROW = {
    "model": "net",
    "layer": "l",
    "pass": "fprop",
    "dtype": "float16",
    "layout": "nhwc",
    "provider": "tridil",
    "target": "cuda:90",
    "ms": 1.0,
    "ms_q1": 0.999,
    "ms_q3": 1.001,
    "spills": 0,
    "registers": 100,
    "overhead": 2.0,
    "executed_macs": 1000,
    "extra_mib": 4.0,
    "error": 1e-3,
    "budget": 1e-2,
    "failure": None,
}
KERNEL = {
    "layer": "net l",
    "pass": "fprop",
    "kernel": "correlate",
    "target": "cuda:80",
    "config": {"BLOCK_N": 64},
    "registers": 100,
    "spills": 0,
    "shared_bytes": 4096,
    "ctas_per_sm": 3,
    "overhead": 2.0,
    "per_fma": 4.0,
    "executed_macs": 1000,
}


def exact(ms):
    """A time whose quartiles are close by."""
    return {"ms": ms, "ms_q1": ms * 0.999, "ms_q3": ms * 1.001}


def write(path, rows):
    """A results.csv of ROW changed by each of `rows`, which are named l0, l1, ..., unless they say
    otherwise."""
    pd.DataFrame([ROW | {"layer": f"l{i}"} | row for i, row in enumerate(rows)]).to_csv(
        path, index=False
    )
    return str(path)


@pytest.fixture
def sweeps(tmp_path, capsys):
    """sweeps(base rows, head rows) -> (exit status, output) of their comparison."""

    def run(base, head):
        return compare.main(
            [write(tmp_path / "base.csv", base), write(tmp_path / "head.csv", head)]
        ), capsys.readouterr().out

    return run


def table(out, title):
    """The lines of one of the two tables, blanks squeezed."""
    blocks = [block.splitlines() for block in out.split("\n\n")]
    return [
        " ".join(line.split())
        for block in blocks
        if f"{title}:" in block
        for line in block[block.index(f"{title}:") + 2 :]
    ]


def test_verdicts_of_two_sweeps(sweeps):
    wide = {"ms_q1": 0.9, "ms_q3": 1.15}
    base = [
        {},
        {},
        wide,
        {},
        {},
        {"failure": "OutOfMemory"},
        {"layer": "lost"},
        {"provider": "cudnn"},
    ]
    head = [
        exact(0.8),
        exact(1.25),
        {"ms": 1.1} | wide,
        {"failure": "CompilationError: no"},
        {"error": 0.02},
        {},
        {"layer": "new"},
        {"provider": "cudnn"} | exact(9.0),
    ]
    status, out = sweeps(base, head)
    assert status == 1
    assert table(out, "worse") == [
        "net l1 fprop float16 nhwc tridil ms 1 1.25 +25.0%",
        "net l3 fprop float16 nhwc tridil failure CompilationError: no",
        "net l4 fprop float16 nhwc tridil failure error 0.02 > budget 0.01",
    ]
    assert table(out, "better") == [
        "net l0 fprop float16 nhwc tridil ms 1 0.8 -20.0%",
        "net l5 fprop float16 nhwc tridil failure OutOfMemory",
    ]
    assert (
        "only in BASE: net lost fprop float16 nhwc tridil\nonly in HEAD: net new fprop float16 nhwc tridil\n6 rows compared\n"
        in out
    )
    assert (
        f"time of HEAD / time of BASE: {(0.8 * 1.25 * 1.1) ** (1 / 3):.3f} (geometric mean of 3 rows"
        in out
    )
    assert out.endswith("verdict: REGRESSION (3 worse, 2 better)\n")


@pytest.mark.parametrize(
    "change, worse, better",
    [
        (exact(1.029), 0, 0),
        (exact(1.031), 1, 0),
        (exact(0.971), 0, 0),
        (exact(0.969), 0, 1),
        ({"ms": 1.2, "ms_q1": 1.001, "ms_q3": 1.3}, 0, 0),
        ({"ms": 1.2, "ms_q1": 1.002, "ms_q3": 1.3}, 1, 0),
        ({"ms": 0.8, "ms_q1": 0.7, "ms_q3": 0.999}, 0, 0),
        ({"ms": 0.8, "ms_q1": 0.7, "ms_q3": 0.998}, 0, 1),
        ({"spills": 1}, 1, 0),
        ({"registers": 101}, 1, 0),
        ({"registers": 99}, 0, 1),
        ({"overhead": 2.001}, 1, 0),
        ({"executed_macs": 1001}, 1, 0),
        ({"executed_macs": 999}, 0, 1),
        ({"extra_mib": 4.1}, 1, 0),
        ({"extra_mib": 3.9}, 0, 1),
        ({"error": 1e-2}, 0, 0),
        ({"error": 1.01e-2}, 1, 0),
        ({"error": float("inf")}, 1, 0),
        ({"error": None}, 1, 0),
        ({"error": None, "budget": None}, 0, 0),
        # what counts got better
        (exact(0.9) | {"registers": 120, "executed_macs": 1100, "spills": 4, "overhead": 3}, 0, 1),
        (exact(0.9) | {"extra_mib": 5.0}, 1, 1),
        (exact(0.99) | {"registers": 120}, 1, 0),
        (dict.fromkeys(("ms", "ms_q1", "ms_q3")), 0, 0),
    ],
)
def test_what_counts_in_a_row(sweeps, change, worse, better):
    status, out = sweeps([{}], [change])
    assert (status, len(table(out, "worse")), len(table(out, "better"))) == (
        int(worse > 0),
        worse,
        better,
    ), out
    assert (
        f"verdict: {'REGRESSION' if worse else 'no regression'} ({worse} worse, {better} better)"
        in out
    )


def test_a_lost_row_alone_is_told(sweeps):
    status, out = sweeps([{}, {"layer": "lost"}], [{}])
    assert status == 0 and "only in BASE: net lost fprop" in out and "only in HEAD" not in out


def test_rows_are_paired_by_layout_and_the_last_of_a_key_counts(sweeps):
    twice = [{"layer": "l", "layout": "nchw"}, {"layer": "l"}, {"layer": "l"} | exact(2.0)]
    assert sweeps(twice, [{"layer": "l", "layout": "nchw"}, {"layer": "l"} | exact(2.0)])[0] == 0
    assert (
        sweeps([{"layer": "l", "layout": None}], [{"layer": "l", "layout": None} | exact(1.1)])[0]
        == 1
    )


@pytest.mark.parametrize(
    "head, message",
    [
        ([{"layer": "other"}], "no row of tridil is in both"),
        ([{"target": "cuda:80"}], "different GPU architectures (cuda:80, cuda:90)"),
        ([{"ms": "fast"}], "head.csv: could not convert string to float: 'fast'"),
    ],
)
def test_sweeps_that_cannot_be_compared(sweeps, head, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweeps([{}], head)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_files_that_cannot_be_compared(tmp_path, capsys):
    good, short, empty = (
        write(tmp_path / "good.csv", [{}]),
        tmp_path / "short.csv",
        tmp_path / "empty.csv",
    )
    pd.read_csv(good).drop(columns=["layout", "ms_q1"]).to_csv(short, index=False)
    empty.write_text("")
    for head, message in (
        (tmp_path / "absent.csv", "absent.csv"),
        (empty, "empty.csv"),
        (short, "lacks the columns layout, ms_q1"),
        (ROOT, ROOT),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main([good, str(head)])
        assert stopped.value.code == 2 and str(message) in capsys.readouterr().err


class Runner:
    """Stands in for the commands run in trees: writes made-up results, keeps (tree, command);
    `rows[side]` are the results of a tree."""

    def __init__(self, **rows):
        self.rows, self.calls, self.status, self.sweeps = rows, [], 0, {"BASE": 0, "HEAD": 0}

    def __call__(self, command, cwd, env):
        side = (cwd / "side.txt").read_text()
        assert (
            command[0] == sys.executable
            and env["PYTHONPATH"].split(os.pathsep)[0] == str(cwd)
            and "TRITON_INTERPRET" not in env
        )
        self.calls.append((side, cwd, command[1:]))
        if "pytest" in command:
            return SimpleNamespace(returncode=self.status, stdout="many lines\n1 failed", stderr="")
        name = next(
            name
            for name in ("sweep", "aot", "host", "cold")
            if any(name in word for word in command[1:4])
        )
        found = self.rows[side].get(name)
        if isinstance(found, BaseException):
            raise found
        if found is not None and name == "sweep":
            out = Path(command[command.index("--out") + 1])
            out.mkdir()
            write(out / "results.csv", found[self.sweeps[side]])
            self.sweeps[side] += 1
        elif found is not None:
            Path(command[command.index("--json") + 1]).write_text(json.dumps(found))
        return SimpleNamespace(
            returncode=int(found is None),
            stdout="",
            stderr="" if found is not None else "no such option --json",
        )


def side(aot=(KERNEL,), ratio=2.0, kernels=10, **more):
    """What the commands find in a tree."""
    return {
        "aot": list(aot),
        "host": [{"target": "cuda:80", "call": "no grad", "ratio": ratio}],
        "cold": [{"layers": "all", "target": "cuda:80", "kernels": kernels}],
    } | more


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits, tagged base and head, whose file says which; the working
    directory."""
    folder = tmp_path / "repository"
    (folder / "tridil").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "nobody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "nobody@example.org")
    git("init", "-q")
    for name in ("BASE", "HEAD"):
        Path("side.txt").write_text(name)
        Path("tridil", "code.py").write_text(f"# {name}\n")
        git("add", ".")
        git("commit", "-q", "-m", name)
        git("tag", name.lower())
    return folder


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def gone(runner):
    """Whether the trees the runner saw are gone, on disk and in git's list."""
    trees = {tree for _, tree, _ in runner.calls if tree != Path.cwd()}
    return (
        bool(trees)
        and not any(tree.exists() for tree in trees)
        and len(git("worktree", "list").splitlines()) == 1
    )


def static(head, *arguments, base=None):
    """(exit status, runner) of the comparison without times of two trees."""
    runner = Runner(BASE=base or side(), HEAD=head)
    return compare.main(
        ["base", "head", "--no-tests", "--targets", "cuda:80", *arguments], runner
    ), runner


def test_revisions_are_compared_in_worktrees_that_are_removed(repository, capsys):
    status, runner = static(side())
    assert status == 0 and gone(runner)
    assert [(side, command[2 if "-m" in command else 0]) for side, _, command in runner.calls] == [
        ("BASE", "aot"),
        ("HEAD", "aot"),
        *((side, "perf/host_overhead.py") for side in ("BASE", "HEAD", "HEAD", "BASE")),
        ("BASE", "perf/cold_start.py"),
        ("HEAD", "perf/cold_start.py"),
    ]
    assert capsys.readouterr().out.endswith("verdict: no regression (0 worse, 0 better)\n")


@pytest.mark.parametrize("error", [RuntimeError("broken runner"), KeyboardInterrupt()])
def test_worktrees_are_removed_when_a_command_raises(repository, error):
    runner = Runner(BASE=side(), HEAD=side(aot=()) | {"aot": error})
    arguments = ["base", "head", "--no-tests"]
    if isinstance(error, KeyboardInterrupt):
        assert compare.main(arguments, runner) == 130
    else:
        with pytest.raises(RuntimeError, match="broken runner"):
            compare.main(arguments, runner)
    assert gone(runner)


def test_an_interrupted_command_ends_with_all_it_started(tmp_path):
    """What the command started holds a FIFO open; Ctrl-C comes when the FIFO says that it runs."""
    os.mkfifo(fifo := tmp_path / "fifo")
    child = f"import time; file = open({str(fifo)!r}, 'wb', buffering=0); file.write(b'x'); time.sleep(100)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    read, opened = [], []

    def interrupt():
        opened.append(file := open(fifo, "rb", buffering=0))
        read.append(file.read(1))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # a shell's background jobs ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compare.execute([sys.executable, "-c", code], tmp_path, dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)
    (file,) = opened
    with file:
        # its last holder is gone
        assert read == [b"x"] and select.select([file], [], [], 20)[0] and file.read(1) == b""


def test_red_tests_refuse(repository, capsys):
    runner = Runner(BASE=side(), HEAD=side())
    runner.status = 1
    assert compare.main(
        ["base", "head", "--tests", "tests/test_a.py -k 'a or b'"], runner
    ) == 1 and gone(runner)
    assert [(side, command) for side, _, command in runner.calls] == [
        ("HEAD", ["-m", "pytest", "-q", "tests/test_a.py", "-k", "a or b"])
    ]
    out = capsys.readouterr().out
    assert (
        "1 failed\nnothing is compared: HEAD's tests fail" in out
        and "pytest ended with status 1" in out
    )
    runner.status = 0
    assert compare.main(["base", "head"], runner) == 0 and len(runner.calls) > 3


def test_with_a_gpu_sweeps_take_turns(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: True)
    # l0 within the spread of rounds, l1 slower in both, l2 faster in both though its quartiles
    # overlap, l3 fails in one round of head
    rounds = {
        "BASE": [
            [exact(1.0), exact(1.0), exact(1.0) | {"ms_q1": 0.7}, {}],
            [exact(1.2), exact(1.02), exact(1.02), {}],
        ],
        "HEAD": [
            [exact(1.15), exact(1.2), exact(0.8), {}],
            [exact(1.25), exact(1.22), exact(0.82), {"failure": "OutOfResources"}],
        ],
    }
    runner = Runner(**{name: {"sweep": found} for name, found in rounds.items()})
    assert compare.main(
        ["base", "head", "--no-tests", "--args=--filter net"], runner
    ) == 1 and gone(runner)
    assert [side for side, *_ in runner.calls] == ["BASE", "HEAD", "HEAD", "BASE"]
    for _, _, command in runner.calls:
        assert command[:6] == [
            "perf/sweep.py",
            "--fresh",
            "--suite",
            "quick",
            "--providers",
            "tridil",
        ] and command[-2:] == ["--filter", "net"]
    out = capsys.readouterr().out
    assert table(out, "worse") == [
        "net l1 fprop float16 nhwc tridil ms 1.01 1.21 +19.8%",
        "net l3 fprop float16 nhwc tridil failure OutOfResources",
    ]
    assert table(out, "better") == ["net l2 fprop float16 nhwc tridil ms 1.01 0.81 -19.8%"]
    runner = Runner(BASE=side(), HEAD=side())
    assert compare.main(["base", "head", "--no-tests", "--static"], runner) == 0
    assert not any("perf/sweep.py" in command for *_, command in runner.calls)


@pytest.mark.parametrize(
    "change, worse, better",
    [
        ({"spills": 1}, ["spills 0 1"], []),
        ({"overhead": 2.039}, [], []),
        ({"overhead": 2.041}, ["overhead 2 2.041 +2.0%"], []),
        ({"overhead": 1.961}, [], []),
        ({"overhead": 1.959}, [], ["overhead 2 1.959 -2.0%"]),
        ({"overhead": None}, [], []),
        ({"per_fma": 4.07}, [], []),
        ({"per_fma": 4.09}, ["per_fma 4 4.09 +2.2%"], []),
        ({"executed_macs": 1005}, [], []),
        ({"executed_macs": 1006}, ["executed_macs 1000 1006 +0.6%"], []),
        ({"executed_macs": 994}, [], ["executed_macs 1000 994 -0.6%"]),
        ({"registers": 150}, [], []),
        ({"registers": 50}, [], []),
        ({"registers": 150, "ctas_per_sm": 2}, ["registers 100 150 +50.0%"], []),
        ({"registers": 50, "ctas_per_sm": 4}, [], ["registers 100 50 -50.0%"]),
        ({"registers": 150, "spills": 2}, ["spills 0 2", "registers 100 150 +50.0%"], []),
        ({"shared_bytes": 8192}, [], []),
        ({"shared_bytes": 8192, "ctas_per_sm": 2}, ["shared_bytes 4096 8192 +100.0%"], []),
        ({"failure": "PTXASError"}, ["failure PTXASError"], []),
        (
            {
                "config": {"BLOCK_N": 128},
                "registers": 150,
                "shared_bytes": 8192,
                "ctas_per_sm": 2,
                "overhead": 1.5,
            },
            [],
            ["overhead 2 1.5 -25.0%"],
        ),
        ({"kernel": "correlate_tma", "spills": 3}, ["spills 0 3"], []),
    ],
)
def test_what_counts_in_a_kernel(repository, change, worse, better, capsys):
    status, _ = static(side([KERNEL | change]))
    out = capsys.readouterr().out
    assert status == int(bool(worse))
    for title, expected in (("worse", worse), ("better", better)):
        found = table(out, title)
        assert len(found) == len(expected) and all(
            line.startswith("net l fprop cuda:80 correlate") for line in found
        ), out
        assert all(line.endswith(" " + end) for line, end in zip(found, expected)), out


def test_other_kernels_of_a_pass_are_compared_as_a_whole(repository, capsys):
    sum_splits = KERNEL | {"kernel": "sum_splits", "registers": 180, "spills": 2, "overhead": 9.0}
    # a second kernel: sum of spills, largest registers, the first one's overhead
    status, _ = static(side([KERNEL | {"spills": 1}, sum_splits]))
    assert status == 1
    out = capsys.readouterr().out
    what = "net l fprop cuda:80 correlate -> correlate+sum_splits"
    assert table(out, "worse") == [f"{what} spills 0 3", f"{what} registers 100 180 +80.0%"]
    assert "1 passes of layers compared, 1 with other kernels or tiles" in out
    status, _ = static(
        side([KERNEL | {"layer": "net new"}, KERNEL]),
        base=side([KERNEL | {"layer": "net lost"}, KERNEL]),
    )
    out = capsys.readouterr().out
    assert (
        status == 0
        and "only in BASE: net lost fprop cuda:80\nonly in HEAD: net new fprop cuda:80\n" in out
    )


@pytest.mark.parametrize(
    "change, worse, better",
    [
        ({"ratio": 2.29}, 0, 0),
        ({"ratio": 2.31}, 1, 0),
        ({"ratio": 1.71}, 0, 0),
        ({"ratio": 1.69}, 0, 1),
        ({"kernels": 11}, 1, 0),
        ({"kernels": 9}, 0, 1),
    ],
)
def test_host_time_and_kernels_of_a_cold_start(repository, change, worse, better, capsys):
    status, _ = static(side(**change))
    out = capsys.readouterr().out
    assert (status, len(table(out, "worse")), len(table(out, "better"))) == (worse, worse, better)


def test_a_tree_that_lacks_a_script_is_told(repository, capsys):
    status, runner = static(side(kernels=11), base=side(host=None))
    out = capsys.readouterr().out
    assert status == 1 and gone(runner)
    assert (
        "not compared. BASE: python perf/host_overhead.py ended with status 1 and no result:\nno such option"
        in out
    )
    # without the kernels there is nothing to compare
    with pytest.raises(SystemExit) as stopped:
        static(side(aot=()) | {"aot": None})
    assert (
        stopped.value.code == 2
        and "HEAD: python -m tridil aot ended with status 1 and no result"
        in capsys.readouterr().err
    )


def test_revisions_that_cannot_be_compared(repository, monkeypatch, capsys):
    def refused(*arguments):
        runner = Runner()
        with pytest.raises(SystemExit) as stopped:
            compare.main(arguments, runner)
        assert stopped.value.code == 2 and not runner.calls
        return capsys.readouterr().err

    assert "HEAD 'no-such-branch' is no revision" in refused("base", "no-such-branch")
    assert "BASE 'v9' is no revision" in refused("v9", "head")
    Path("tridil", "code.py").write_text("changed")
    assert (
        "HEAD 'head' is checked out with changes that are not committed, in tridil/code.py"
        in refused("base", "head")
    )
    Path("side.txt").write_text("HEAD")
    runner = Runner(BASE=side(), HEAD=side())
    # the tree as it is
    assert compare.main(["base", ".", "--no-tests"], runner) == 0
    assert {tree for name, tree, _ in runner.calls if name == "HEAD"} == {
        repository
    } and repository.exists()
    assert compare.main(["head", "base", "--no-tests"], Runner(BASE=side(), HEAD=side())) == 0
    (repository.parent / "elsewhere").mkdir()
    monkeypatch.chdir(repository.parent / "elsewhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    assert "not a git repository" in refused("base", "head")


@pytest.mark.slow
def test_the_compilers_part_for_real(repository, capsys):
    """A copy of this package as HEAD and as the working tree; the host's times, which depend on the
    machine, are taken once."""
    pytest.importorskip("triton")
    for name in ("tridil", "perf"):
        shutil.copytree(
            ROOT / name,
            repository / name,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "results"),
        )
    git("add", ".")
    git("commit", "-q", "-m", "the package")
    host, counts = [], []

    def run(command, cwd, env):
        out, name = Path(command[command.index("--json") + 1]), command[1]
        if name != "perf/host_overhead.py" or not host:
            done = compare.execute(["20" if word == "500" else word for word in command], cwd, env)
            assert done.returncode == 0, done.stderr
            counts.append(len(rows := json.loads(out.read_text())))
            if name != "perf/host_overhead.py":
                return done
            assert all(row["ratio"] > 0 for row in rows)
            host.extend(rows)
        out.write_text(json.dumps(host))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    shape = "n=1 c=32 h=12 w=12 k=32 d=2"
    assert (
        compare.main(
            [
                "HEAD",
                ".",
                "--no-tests",
                "--targets",
                "cuda:80",
                f"--args=--shape '{shape}' --passes fprop,wgrad",
            ],
            run,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "kernels: 2 passes of layers compared, 0 with other kernels or tiles (static)" in out
    assert "only in" not in out and "not compared" not in out
    assert "kernels of a cold start: compared" in out and out.endswith(
        "verdict: no regression (0 worse, 0 better)\n"
    )
    assert len(counts) == 5 and min(counts) >= 2


def test_picks_that_differ(tmp_path):
    """A form that changes must change no pick; what one side alone has is said."""
    import picks

    base = {"cuda:80 fprop a": ["gather b64", 10, [["correlate", 4, 1, 1]]], "cuda:80 fprop b": [1]}
    head = {"cuda:80 fprop a": ["gather b64", 11, [["correlate", 4, 1, 1]]], "cuda:80 fprop c": [1]}
    findings, lines = compare.compare_picks(base, head)
    assert [f["what"] for f in findings] == ["cuda:80 fprop a"] and findings[0]["worse"]
    assert lines[-1] == "1 picks compared, 1 differ" and len(lines) == 3
    assert compare.compare_picks(base, base)[0] == []
    found = picks.picks(["cuda:80"])
    assert len(found) == len({*found}) > 1200 and all(len(value) == 3 for value in found.values())


def test_picks_of_two_revisions(repository, capsys):
    """Both sides run this checkout's script in their own tree."""
    calls = []

    def run(command, cwd, env):
        calls.append((Path(command[1]).name, str(cwd), command[command.index("--targets") + 1]))
        out = Path(command[command.index("--json") + 1])
        out.write_text(json.dumps({"cuda:80 fprop a": [len(calls)]}))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    assert compare.main(["HEAD~1", "HEAD", "--picks", "--targets", "cuda:80"], run) == 1
    assert [call[0] for call in calls] == ["picks.py"] * 2 and len({call[1] for call in calls}) == 2
    assert "1 picks compared, 1 differ" in capsys.readouterr().out
