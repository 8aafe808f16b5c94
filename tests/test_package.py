"""What is built installs and works without the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tridil

ROOT = Path(__file__).resolve().parents[1]


def build(target: str, folder: Path) -> Path:
    """A wheel or an sdist of this checkout."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.mark.slow
def test_a_wheel_works_from_an_empty_folder(tmp_path):
    wheel = build("wheel", tmp_path / "dist")
    assert wheel.name == f"tridil-{tridil.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert "tridil/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = """
import torch, tridil
from tridil import workloads
assert len(workloads.load()) == 297 and "site" in tridil.__file__
x, w = torch.randn(1, 4, 9, 9), torch.randn(4, 4, 3, 3)
assert torch.equal(tridil.dilated_conv2d(x, w, dilation=2), torch.conv2d(x, w, dilation=2))
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for command in (["-c", code], ["-m", "tridil", "info"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "empty",
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_sdist_has_what_builds_and_tests_it(tmp_path):
    with tarfile.open(build("sdist", tmp_path / "dist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "tridil/workloads.csv",
        "tests/conftest.py",
        "perf/sweep.py",
    } <= names
