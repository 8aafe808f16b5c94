"""What a kernel family is to the rest of the package."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import mutants
from toy_family import Pointwise, Tile

import tridil
from tridil import (
    choice,
    config,
    cost_model,
    drivers,
    families,
    launch,
    reference,
    testing,
    verdict,
)
from tridil.problem import PASSES, Problem

P = Problem(2, 24, 5, 6, 20, 1, 1)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def toy(monkeypatch):
    """The toy is registered, and nothing else is changed."""
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, Pointwise()])
    cost_model._best.cache_clear()
    yield
    cost_model._best.cache_clear()


def test_a_family_is_ranked_planned_and_launched(toy, device, seed, poisoned):
    x, w, bias, dy = testing.random_tensors(P, device, seed)
    for pass_, operands in (("fprop", (x, w, bias)), ("dgrad", (dy, w)), ("wgrad", (dy, x))):
        best = cost_model.best(P, pass_, drivers.target())
        assert (best.kernel == "pointwise") == (pass_ != "wgrad") and len(
            cost_model.rank(P, pass_, cost_model.devices.of_target("cuda:90"))
        ) > 1
        result = getattr(launch, pass_)(P, *operands, best)
        error, budget = testing.check(result, getattr(reference, pass_)(P, *operands), P, pass_)
        assert error <= budget
    assert cost_model.best(replace(P, r=3, s=3), "fprop", drivers.target()).kernel != "pointwise"


def test_it_is_explained_and_written_down(toy):
    rows = verdict.rows_of(P, torch.device("cpu"), target="cuda:90")
    assert [row["kernel"] for row in rows[:2]] == ["pointwise"] * 2 and rows[0][
        "kernel_why"
    ].startswith("a toy that claims to be fast")
    assert rows[0]["executed_macs"] >= rows[0][
        "useful_macs"
    ] and "limited by nothing" in verdict.text_of(P, None, target="cuda:90")
    best = cost_model.best(P, "fprop", "cuda:90")
    assert config.from_json(
        json.loads(json.dumps(config.to_json(best))), "fprop"
    ) == best and isinstance(best, Tile)
    assert config.describe(best).startswith("m32 k32 split1") and config.moved_bytes(
        P, "fprop", best
    ) == (P.bytes, P.bytes)
    assert choice.decide(P, "fprop", "cuda:90").backend == "triton"
    with choice.override(fprop=config.to_json(best)):
        assert choice.decide(P, "fprop", "cuda:90").config == best


def test_it_is_compiled_ahead_of_time():
    """In a process that does not interpret; its machine code is read as any other's."""
    code = """
import json
from toy_family import Pointwise
from tridil import aot, families
from tridil.problem import Problem
families.FAMILIES.append(Pointwise())
row, = aot.resources(Problem(2, 24, 5, 6, 20, 1, 1), "fprop", None, "cuda:80")
print(json.dumps({name: row[name] for name in ("kernel", "mma", "spills", "registers")}))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (
        row["kernel"] == "matmul"
        and row["mma"].startswith("HMMA")
        and row["spills"] == 0
        and row["registers"] > 0
    )


def test_without_a_config_of_its_own_nothing_is_known_of_it():
    with pytest.raises(ValueError, match="unknown kernel 'pointwise'"):
        families.of("pointwise")
    assert all(
        cost_model.best(P, pass_, "cuda:90").kernel
        in families.of(cost_model.best(P, pass_, "cuda:90").kernel).kernels
        for pass_ in PASSES
    )


def test_the_package_compares_no_kernels_name():
    """Names of kernels stand in families, kernels and their data; "depthwise" is a kind of layer as
    well."""
    names = [name for family in families.FAMILIES for name in family.kernels]
    for path in Path(tridil.__file__).parent.glob("*.py"):
        if path.name not in ("assumed.py", "cudnn.py", "workloads.py"):
            lines = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if "aten.kind" not in line
            ]
            assert not [name for name in names if any(f'"{name}"' in line for line in lines)], (
                path.name
            )


def test_mutants_change_what_the_code_says():
    """tests/mutants.py finds each of its texts once."""
    package = Path(families.__file__).parents[1]
    for file, text, *_ in mutants.MUTANTS:
        found = (package / file).read_text(encoding="utf-8").count(text)
        assert found == 1, f"{file} has {found} times {text!r}, not once"
