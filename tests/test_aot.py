"""Static evidence for the default kernels of every target, compiled without a GPU in processes that do not interpret."""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tridil import aot, config, dispatch
from tridil.problem import Problem

P = Problem(4, 256, 60, 60, 256, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
MMA = {"cuda:80": "HMMA", "cuda:86": "HMMA", "cuda:89": "HMMA", "cuda:90": "HGMMA", "cuda:100": "UTCHMMA", "cuda:120": "HMMA", "hip:gfx942": "v_mfma"}


def tridil_aot(tmp_path, *args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = tmp_path / "rows.json"
    out = subprocess.run([sys.executable, "-m", "tridil", "aot", *args, "--json", path], capture_output=True, text=True, env=env)
    return out, json.loads(path.read_text()) if out.returncode < 2 else None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", config.TARGETS)
def test_default_kernels(tmp_path, target, dtype):
    """No spills, within shared memory, tensor cores, and 16-byte loads that go straight to shared memory."""
    out, rows = tridil_aot(tmp_path, "--shape", "n=4 c=256 h=60 w=60 k=256 r=3 d=2", "--target", target, "--dtype", dtype)
    assert out.returncode == 0, out.stdout + out.stderr
    main = [row for row in rows if row["kernel"] != "sum_splits"]
    assert {row["pass"] for row in main} == {"fprop", "dgrad", "wgrad"}
    for row in main:
        assert row["spills"] == 0 and 0 < row["registers"] <= (512 if "hip" in target else 255)
        assert row["shared_bytes"] <= config.device_limits(target)[1]
        assert row["mma"].startswith(MMA[target])
        loads = {width for width in row["loads"] if width.startswith(("LDGSTS", "global_load", "buffer_load"))}
        # tf32 wgmma and tcgen05 read operands with the reduction innermost: elsewhere they are transposed on the way to shared memory
        narrow = {"LDGSTS.32"} if dtype == "float32" and target in ("cuda:90", "cuda:100") and row["pass"] != "fprop" else set()
        if "hip" in target and row["pass"] == "fprop":
            narrow = {"buffer_load_dwordx2"}                                # the bias
        assert loads and loads <= {"LDGSTS.128", "global_load_dwordx4", "buffer_load_dwordx4"} | narrow


def test_spill_is_reported(tmp_path, monkeypatch):
    """A tile that cannot fit into registers: status 1."""
    code = ("from tridil import config; good = config.default; "
            "config.default = lambda *a: dict(good(*a), num_warps=4, BLOCK_IMG=1, BLOCK_P=16, BLOCK_Q=8, BLOCK_N=256, BLOCK_K=32); "
            "from tridil.__main__ import main; "
            "raise SystemExit(main(['aot', '--shape', 'c=256 h=60 w=60 k=256 d=2', '--target', 'cuda:80', '--passes', 'fprop']))")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 1 and "1 with spills" in out.stdout, out.stdout + out.stderr


def test_illegal_config_and_interpreter():
    if not dispatch.interpreted():
        with pytest.raises(ValueError, match="does not fit"):
            aot.resources(P, "fprop", dict(config.default(P, "fprop", "cuda:80"), BLOCK_N=24), "cuda:80")
    else:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            aot.resources(P, "fprop", None, "cuda:80")
