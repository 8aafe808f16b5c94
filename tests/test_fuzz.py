"""A bounded slice of tests/fuzz.py, and the script's own behaviour: it finds a wrong kernel, and
goes on where it stopped."""

import random
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

import fuzz

from tridil import drivers, launch
from tridil.families.tma import architecture


@pytest.mark.slow
def test_fresh_geometries(device, seed, poisoned):
    state = fuzz.fuzz(
        10 if drivers.interpreted() else 100, seed, 600, ["float16", "float32"], device
    )
    print(state)
    assert not state["failures"] and state["geometries"] >= 10 and 0 < state["most"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype, device, seed, poisoned):
    state = fuzz.fuzz(3 if drivers.interpreted() else 30, seed, 600, [dtype], device)
    assert not state["failures"] and state["geometries"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("half", ["first", "second"])
def test_geometries_of_descriptors(half, device, seed, poisoned, monkeypatch):
    """The tma kernel alone, 300 geometries in two halves (interpreted, 12); every launch is
    counted."""
    if drivers.interpreted():
        monkeypatch.setenv("TRIDIL_TARGET", "cuda:90")
    if architecture(drivers.target()) < 90:
        pytest.skip(f"{drivers.target()} has no tensor descriptors")
    launched, call = Counter(), launch.Ready.__call__
    monkeypatch.setattr(
        launch.Ready,
        "__call__",
        lambda self, tensors: launched.update([self.launch.name]) or call(self, tensors),
    )
    count = 6 if drivers.interpreted() else 150
    state = fuzz.fuzz(count, seed, 1800, ["float16"], device, kernel="tma")
    print(state, launched)
    assert (
        not state["failures"]
        and 0 < state["most"] <= 1
        and set(launched) <= {"correlate_tma", "wgrad_tma", "sum_splits"}
    )
    assert state["geometries"] == count
    assert (
        launched["correlate_tma"] >= 2 * state["geometries"]
        and launched["wgrad_tma"] == state["geometries"] == state["runs"] / 3
    )


@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad"])
def test_a_wrong_result_is_reported(pass_, device, monkeypatch, capsys):
    """One element off by ten per cent of the largest: exit status 1 and a line that repeats the
    case."""
    run = getattr(launch, pass_)

    def wrong(*args):
        out = run(*args)
        out[tuple(map(random.randrange, out.shape))] += 0.1 * out.abs().max() + 0.1
        return out

    monkeypatch.setattr(launch, pass_, wrong)
    assert fuzz.main(["--count", "1", "--seed", "7", "--dtypes", "float32"]) == 1
    out = capsys.readouterr().out
    assert (
        f"FAILED {pass_} of " in out
        and "repeat: python tests/fuzz.py --seed 7 --start 0 --count 1" in out
        and "1 failures" in out
    )


def test_it_resumes(tmp_path, capsys, monkeypatch, device):
    ran = []
    monkeypatch.setattr(
        fuzz, "run_geometry", lambda seed, index, *a, **k: ran.append(index) or (6, 0.5, None)
    )
    state = ["--state", str(tmp_path / "state.json"), "--seed", "3"]
    assert fuzz.main(["--count", "3", *state]) == 0 and fuzz.main(["--count", "25", *state]) == 0
    assert ran == list(range(25)) and "25 of 25 geometries" in capsys.readouterr().out
    assert fuzz.main(["--count", "25", *state]) == 0 and len(ran) == 25
    with pytest.raises(SystemExit):
        fuzz.main(["--count", "25", *state[:2], "--seed", "4"])
    assert (
        fuzz.main(["--count", "5", "--seconds", "0"]) == 0 and "0 of 5" in capsys.readouterr().out
    )


def test_geometries_depend_on_the_seed_only(monkeypatch):
    seen = []
    monkeypatch.setattr(
        fuzz.testing,
        "random_tensors",
        lambda p, *a: seen.append(p) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    for seed, index in ((1, 5), (1, 5), (1, 6), (2, 5)):
        with pytest.raises(KeyboardInterrupt):
            fuzz.run_geometry(seed, index, ["float16"], torch.device("cpu"))
    assert seen[0] == seen[1] and len(set(seen)) == 3
