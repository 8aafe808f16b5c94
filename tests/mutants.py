"""Breaks the code on purpose, one place at a time, and says which quick tests notice: `python
tests/mutants.py [NUMBER...]`. Exit status 1 when one of them survives.

Each mutant is a copy of the repository with one text replaced. The tests named beside it run until
the first failure; none of them is marked slow, so that the default run catches every mutant, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS, CONFIG = "test_kernels.py", "test_config.py test_problem.py"
BRANCHES = "test_multi_rate.py"
# (file, text, what replaces it, tests)
MUTANTS = [
    ("kernels/common.py", "tl.maximum(hi - lo, 0)", "tl.maximum(hi - lo - 1, 0)", KERNELS),
    ("kernels/common.py", "offset - t * dilation, stride), out)\n    return",
     "offset - t * dilation, stride), out - 1)\n    return", KERNELS),
    ("kernels/common.py", "tl.minimum(per_split, steps - first)", "per_split - 1", KERNELS),
    ("kernels/common.py", "bias_ptr + g * K + n0, n", "bias_ptr + n0, n", KERNELS),
    ("kernels/common.py", "m - row * BLOCK_Q", "m - i * BLOCK_Q", KERNELS),
    ("kernels/common.py", "tl.range(1, SPLIT_K,", "tl.range(2, SPLIT_K,", KERNELS),
    ("kernels/common.py", "acc += bias", "acc -= bias", KERNELS),
    ("kernels/gather.py", "(ns - 1) * dil_w).to", "ns * dil_w).to", KERNELS),
    ("kernels/gather.py", "bits >> (r_lo * S + s_lo)", "bits >> (r_lo * S)", KERNELS),
    ("kernels/gather.py", "((1 << 20) + ns - 1) // ns", "((1 << 20) + ns) // (ns + 1)", KERNELS),
    ("kernels/tma.py", "v_lo = q0 + off_w + s_lo * dil_w", "v_lo = q0 + off_w", KERNELS),
    ("kernels/depthwise.py", "(bp < p_hi - p0)", "(bp <= p_hi - p0)", KERNELS),
    ("families/base.py", 'pass_ != "dgrad" or problem.dgrad_covers', "True", KERNELS),
    ("families/base.py", '(h * w * c, 1, w * c, c) if', '(h * w * c, 1, h * c, c) if', KERNELS),
    ("families/gemm.py", "if need > limit:", "if need > 2 * limit:", CONFIG),
    ("launch.py", "t.data_ptr() % alignment", "t.data_ptr() % 1", KERNELS),
    ("launch.py", "tensor.storage_offset() + box.offset", "tensor.storage_offset()", KERNELS),
    ("problem.py", "lo = min(max(0, -(shift // self.stride)), self.out)",
     "lo = min(max(0, 1 - (shift // self.stride)), self.out)", CONFIG),
    ("ops.py", "grad.sum((0, *range(2, grad.dim())))", "grad.sum((0, *range(3, grad.dim())))",
     "test_ops.py test_functional.py"),
    ("cost_model.py", "sorted(found, key=itemgetter(0))", "sorted(found, key=itemgetter(0))[::-1]",
     "test_cost_model.py"),
    ("kernels/gather.py", " & (s < S)\n            bits", "\n            bits", BRANCHES),
    ("kernels/gather.py", "        branch += 1\n", "", BRANCHES),
    ("kernels/common.py", "part = tl.where(pid >= before, parts, part)", "part = parts", BRANCHES),
    ("kernels/tma.py", "w.load([c - x0, col])", "w.load([c, col])", BRANCHES),
    ("kernels/depthwise.py", "x_ptr + BRANCHES[10 * B + 4] * sx_k, w_ptr", "x_ptr, w_ptr", BRANCHES),
    ("kernels/depthwise.py", "y_ptr + FIRST * sy_k, bias_ptr", "y_ptr, bias_ptr", BRANCHES),
    ("kernels/depthwise.py", "part += splits.to(tl.int64) * total", "part += total", BRANCHES),
    ("kernels/gather.py", "        rows -= group * (C // BUNDLE * sw_c)\n", "", KERNELS),
    ("kernels/tma.py", "(img * G + g) * K + k0, q", "img * K + k0, q", "test_contiguous.py"),
    ("kernels/tma.py", "[img, first + n0, p0, q0]", "[img, n0, p0, q0]", "test_contiguous.py"),
    ("families/contiguous.py", "w.size * h_step, 1)", "w.size, 1)", "test_contiguous.py"),
    ("kernels/hopper.py", "box % steps, steps - count)", "box % steps, 0)", "test_hopper.py"),
    ("kernels/hopper.py", "first - tl.cdiv(first - begin, much)", "first - (first - begin) // much", "test_hopper.py"),
]  # fmt: skip


def caught(number: int) -> str:
    """The first failure that a mutant causes, "" when it survives."""
    file, text, other, tests = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tridil", "tests", "perf", ".github", "pyproject.toml", "README.md"):
            source, to = ROOT / part, Path(folder, part)
            if source.is_dir():
                shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, to)
        path = Path(folder, "tridil", file)
        code = path.read_text(encoding="utf-8")
        assert code.count(text) == 1, f"{file} has {code.count(text)} times {text!r}, not once"
        path.write_text(code.replace(text, other), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in tests.split())],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else "" if done.returncode == 0 else done.stdout[-300:]


def main(numbers: list[int]) -> int:
    survived = 0
    for number in numbers or range(len(MUTANTS)):
        file, _, other, _ = MUTANTS[number]
        found = caught(number)
        survived += not found
        print(f"{number} {file} {other!r}: {found or 'SURVIVED'}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(list(map(int, sys.argv[1:]))))
