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


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_hub_folder_has_a_build_and_its_source(name, tmp_path):
    """.github/hub.py: Python alone, all of the package, nothing twice."""
    hub = tmp_path / "hub"
    command = [sys.executable, str(ROOT / ".github" / "hub.py"), str(hub), "MIT"]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    files = {path.name for path in (hub / "build" / f"torch-{name}").rglob("*") if path.is_file()}
    assert files >= {"metadata.json", "__init__.py", "workloads.csv", "gather.py", "layers.py"}
    assert not any(path.suffix == ".pyc" for path in hub.rglob("*"))
    assert "[torch-noarch]" in (hub / "build.toml").read_text(encoding="utf-8")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode and "is not empty" in again.stderr


def test_the_hub_loads_it_from_a_folder(tmp_path):
    """Under a name of its own, where no tridil can be imported: operators, kernels, layers."""
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    hub = tmp_path / "hub"
    subprocess.run([sys.executable, str(ROOT / ".github" / "hub.py"), str(hub), "MIT"], check=True)
    code = f"""
import sys
from pathlib import Path
sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
sys.modules["tridil"] = None
import torch
from torch import nn
from kernels import (
    LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping,
)
hub = get_local_kernel(Path({str(hub)!r}))
x, w = torch.randn(1, 4, 5, 6, requires_grad=True), torch.randn(4, 4, 3, 3)
for backend in ("aten", "triton"):
    y = hub.dilated_conv2d(x, w, None, 1, 2, 2, backend=backend)
    torch.testing.assert_close(y, torch.conv2d(x, w, None, 1, 2, 2), rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape

class Conv(nn.Conv2d):
    pass

replace_kernel_forward_from_hub(Conv, "DilatedConv2d")
model = nn.Sequential(Conv(4, 6, 3, padding=2, dilation=2), Conv(6, 4, 3, padding=1, padding_mode="reflect"))
expected = model(x)
where = LocalLayerRepository(repo_path=Path({str(hub)!r}), layer_name="DilatedConv2d")
with use_kernel_mapping({{"DilatedConv2d": {{"cpu": where}}}}):
    model = kernelize(model, mode=Mode.TRAINING, device="cpu")
assert model[0].forward.__func__.__module__ == hub.__name__ + ".layers"
torch.testing.assert_close(model(x), expected)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
