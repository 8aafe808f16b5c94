"""The files of measured configs: format, merging, damage, two writers."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tridil import cache, config, cost_model
from tridil.branches import Branches
from tridil.problem import PASSES, Problem

P = Problem(1, 16, 9, 9, 16, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
KEY, GPU = cache.key(P, "fprop"), "NVIDIA H100 80GB HBM3"


def record(date="2026-01-01T00:00:00+00:00", ms=1.0, **change):
    return {
        "config": {"kernel": "gather"},
        "ms": ms,
        "aten_ms": 2.0,
        "date": date,
        "triton": cache.triton(),
    } | change


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIDIL_CACHE", str(tmp_path / "cache"))
    cache._memory.clear()
    yield tmp_path / "cache"
    cache._memory.clear()


def test_the_key_holds_everything_that_changes_the_choice():
    changes = [
        dict(dilation=(3, 3)),
        dict(padding=((2, 2), (2, 3))),
        dict(stride=(2, 2)),
        dict(n=2),
        dict(groups=2),
        dict(dtype="bfloat16"),
        dict(layout="nchw"),
        dict(operands="nchw"),
        dict(h=10),
        dict(r=1),
    ]
    keys = {cache.key(replace(P, **change), "fprop") for change in changes} | {
        KEY,
        cache.key(P, "dgrad"),
    }
    f32 = replace(P, dtype="float32")
    keys |= {cache.key(f32, "fprop", "tf32"), cache.key(f32, "fprop", "ieee")}
    assert len(keys) == len(changes) + 4


def test_what_is_added_is_read_back(folder):
    assert cache.user("cuda:90") == {} and cache.add("cuda:90", {KEY: {GPU: record()}})
    assert cache.user("cuda:90") == {KEY: {GPU: record()}} and cache.user("cuda:80") == {}
    text = cache.path("cuda:90").read_text()
    assert (
        cache.path("cuda:90") == folder / "cuda-90.json" and json.loads(text)["target"] == "cuda:90"
    )
    assert any(
        GPU in line and '"ms": 1.0' in line and KEY in before
        for before, line in zip(text.splitlines(), text.splitlines()[1:])
    )
    assert not [p for p in folder.iterdir() if p.suffix not in (".json", ".lock")]


def test_fresh_wins_then_the_latest():
    old, new = record("2026-01-01T00:00:00+00:00"), record("2026-02-01T00:00:00+00:00", ms=3.0)
    stale = record("2026-03-01T00:00:00+00:00", triton="another")
    for tables in ((old, new, stale), (stale, new, old), (new, stale, old)):
        assert cache.merge(*({KEY: {GPU: r}} for r in tables)) == {KEY: {GPU: new}}
    assert cache.merge({KEY: {GPU: old}}, {KEY: {"NVIDIA H200": new}}) == {
        KEY: {GPU: old, "NVIDIA H200": new}
    }
    assert (
        not cache.is_fresh(stale)
        and not cache.is_fresh(record(triton="0.0"))
        and cache.is_fresh(old)
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 99, "target": "cuda:90", "entries": {}}',
        '{"format": 1, "target": "cuda:90", "entries": {"a": {"b": {"ms": "fast"}}}}',
    ],
)
def test_a_corrupt_file_is_set_aside_and_nothing_is_lost(folder, content, caplog):
    file = cache.path("cuda:90")
    folder.mkdir()
    file.write_text(content)
    assert cache.user("cuda:90") == {} and "set aside as cuda-90.json.corrupt-0" in caplog.text
    assert (folder / "cuda-90.json.corrupt-0").read_text() == content
    file.write_text(content)  # again, and at once followed by a write
    cache.add("cuda:90", {KEY: {GPU: record()}})
    assert (folder / "cuda-90.json.corrupt-1").read_text() == content and cache.user("cuda:90") == {
        KEY: {GPU: record()}
    }


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """This process keeps what it measured, and warns once."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIDIL_CACHE", str(tmp_path / "file" / "cache"))
    assert not cache.add("cuda:90", {KEY: {GPU: record()}}) and not cache.add(
        "cuda:90", {"other": {GPU: record()}}
    )
    assert cache.user("cuda:90") == {KEY: {GPU: record()}, "other": {GPU: record()}}
    assert caplog.text.count("cannot write") == 1 and "TRIDIL_CACHE" in caplog.text


def test_an_interrupted_write_leaves_the_old_file(folder, monkeypatch):
    cache.add("cuda:90", {KEY: {GPU: record()}})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache.add("cuda:90", {"other": {GPU: record()}})
    assert cache.user("cuda:90") == {KEY: {GPU: record()}} and not list(folder.glob("*.part"))


def test_two_processes_that_write_at_once_lose_nothing(folder):
    code = (
        "import sys; from tridil import cache; r = {'config': {}, 'ms': 1.0, 'date': '2026', 'triton': cache.triton()}\n"
        "for i in range(40): assert cache.add('cuda:90', {f'{sys.argv[1]} {i}': {'gpu': r}})"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [child.wait() for child in children] == [0, 0]
    assert set(cache.user("cuda:90")) == {f"{name} {i}" for name in "ab" for i in range(40)}


def test_a_file_changed_by_another_process_is_read_again():
    cache.add("cuda:90", {KEY: {GPU: record()}})
    assert cache.user("cuda:90")[KEY][GPU]["ms"] == 1.0
    code = f"from tridil import cache; cache.add('cuda:90', {{{KEY!r}: {{{GPU!r}: {record('2026-05-01', ms=7.0)!r}}}}})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cache.user("cuda:90")[KEY][GPU]["ms"] == 7.0


def tridil(*args):
    return subprocess.run(
        [sys.executable, "-m", "tridil", "cache", *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.slow
def test_command_line(tmp_path):
    tile = {
        "kernel": "gather",
        "BLOCK_IMG": 1,
        "BLOCK_P": 4,
        "BLOCK_Q": 8,
        "BLOCK_N": 64,
        "num_warps": 4,
        "num_stages": 3,
    }
    cache.add("cuda:90", {KEY: {GPU: record(config=tile)}})
    out = tridil("--target", "cuda:90")
    assert (
        out.returncode == 0
        and KEY in out.stdout
        and GPU in out.stdout
        and "1.0000 ms" in out.stdout
        and "stale" not in out.stdout
    )
    assert tridil("export", tmp_path / "table.json", "--target", "cuda:90").returncode == 0
    other = tmp_path / "other.json"  # of another machine, of another target
    cache.write(other, "cuda:80", {KEY: {"NVIDIA A100": record(triton="another", config=tile)}})
    out = tridil("merge", tmp_path / "table.json", other)
    assert out.returncode == 0 and "1 entries for cuda:80 merged" in out.stdout, (
        out.stdout + out.stderr
    )
    assert "stale: a hint only" in tridil("--target", "cuda:80").stdout
    (tmp_path / "bad.json").write_text("{")
    for wrong in (("merge", tmp_path / "none.json"), ("merge", tmp_path / "bad.json"), ("export",)):
        out = tridil(*wrong)
        assert out.returncode == 2 and "error" in out.stderr and "Traceback" not in out.stderr
    assert (tmp_path / "bad.json").exists(), "a user's file is refused, not moved"


# ---- tables that come with the package
SHIPPED = sorted(Path(cache.__file__).parent.joinpath("configs").glob("*.json"))
PROBLEM = re.compile(
    r"n(\d+) c(\d+) h(\d+) w(\d+) k(\d+) (\d+)x(\d+) stride(\S+) pad(\S+) dil(\S+) g(\d+) (\w+) (\w+)(?: of (\w+))?"
)


def problem_of(text: str) -> Problem:
    """The problem that has this key."""
    *sizes, stride, pad, dilation, groups, dtype, layout, operands = PROBLEM.fullmatch(
        text
    ).groups()

    def pair(values, mark=","):
        both = tuple(map(int, values.split(mark)))
        return both * (3 - len(both))

    sides = pad.split(",") * 2
    found = Problem(
        *map(int, sizes),
        pair(stride),
        (pair(sides[0], ":"), pair(sides[1], ":")),
        pair(dilation),
        int(groups),
        dtype,
        layout,
        operands or "",
    )
    assert found.key() == text
    return found


def faults(file: Path) -> list[str]:
    """What keeps a table from being shipped."""
    found = []
    try:
        target, entries = cache.load(file)
    except ValueError as e:
        return [str(e)]
    if file.name != target.replace(":", "-") + ".json":
        found.append(f"{file.name} holds what was measured on {target}")
    for key, records in entries.items():
        how, joined, rest = key.partition(": ")
        *texts, last = (rest or key).split(" | ")
        pass_, problems = last.split()[0], tuple(map(problem_of, texts))
        shared, _, reduce = how.partition(" ")
        subject = Branches(problems, shared == "shared", reduce) if joined else problems[0]
        for device, record in records.items():
            made = config.from_json(record["config"], pass_)
            reason = config.fits(made, subject, pass_, target)
            found += [f"{key} on {device}: {reason}"] if reason else []
            lacking = {"ms", "aten_ms", "code", "triton", "date"} - record.keys()
            found += [f"{key} on {device} lacks {sorted(lacking)}"] if lacking else []
    return found


def test_a_table_is_checked_before_it_is_shipped(tmp_path):
    good, several = {}, replace(P, padding=((1, 2), (0, 3)), stride=(1, 2), dilation=(2, 1))
    for p in (P, several, replace(P, operands="nchw", dtype="float32")):
        for pass_ in PASSES:
            if p.operands and pass_ != "wgrad":
                continue
            best = config.to_json(cost_model.best(p, pass_, "cuda:90"))
            good[cache.key(p, pass_, "tf32")] = {GPU: record(config=best, code="0" * 12)}
    file = tmp_path / "cuda-90.json"
    cache.write(file, "cuda:90", good)
    assert faults(file) == []
    wrong = json.loads(json.dumps(good))
    wrong[KEY][GPU]["config"]["num_warps"] = 3
    del wrong[KEY][GPU]["aten_ms"]
    cache.write(tmp_path / "cuda-80.json", "cuda:90", wrong)
    told = " ".join(faults(tmp_path / "cuda-80.json"))
    assert [faults(shipped) for shipped in SHIPPED] == [[]] * len(SHIPPED)
    assert "measured on cuda:90" in told and "power of two" in told and "lacks ['aten_ms']" in told
