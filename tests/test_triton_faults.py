"""Faults of Triton versions that the kernels keep clear of.

3.6 to 3.9 lose a variable from what a loop carries when it enters the loop as the same value as another variable and is assigned that other variable
in the loop: `prev = stage` before it and `prev = stage` again inside leave prev at its first value. 3.6 waits for each product of fprop's tma tiles
with 8 warps on sm_90 before it begins the next.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tridil import config
from tridil.families import tma
from tridil.problem import PASSES, Problem

P = Problem(4, 256, 64, 64, 256, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
# watches the code generator's search for carried variables: what is assigned in a loop, not
# carried, and entered it as the same value as a variable that is carried
WATCH = """
import ast, json, sys
from triton.compiler import code_generator
found, loops = [], 0
search = code_generator.CodeGenerator._find_carries

def watched(self, node, liveins, *args, **kwargs):
    global loops
    loops += 1
    before = {name: code_generator.flatten_values_to_ir([value]) for name, value in liveins.items() if code_generator._is_triton_value(value)}
    result = search(self, node, liveins, *args, **kwargs)
    carried = set(result[0])
    stored = {n.id for statement in node.body for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found.extend((self.jit_fn.__name__, lost, kept) for lost in stored & set(before) - carried for kept in carried & set(before)
                 if before[lost] == before[kept])
    return result

code_generator.CodeGenerator._find_carries = watched
"""
EVERY_KERNEL = (
    WATCH
    + """
from dataclasses import replace
from tridil import aot, config, families
from tridil.families import persistent
from tridil.problem import PASSES, Problem
even = Problem(2, 128, 20, 20, 128, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
seen = set()
for p, target in ((even, "cuda:90"), (replace(even, c=136, layout="nchw"), "cuda:90"), (even, "cuda:80"), (replace(even, c=3), "cuda:80"),
                  (replace(even, groups=128), "cuda:80"), (even, "cuda:100")):
    for pass_ in PASSES:
        chosen = {}
        for cfg in config.candidates(p, pass_, target):
            if p.groups == 1 or cfg.kernel == "depthwise":
                chosen[cfg.kernel, getattr(cfg, "STREAM", False), getattr(cfg, "PINGPONG", False), cfg.SPLIT_K > 1] = cfg
        for key, cfg in chosen.items():
            names = [(item.name, target, key[1:3]) for item in families.of(cfg.kernel).plan(p, pass_, cfg, "ieee", "bias")]
            if not set(names) <= seen or p is not even:
                aot.compile_pass(p, pass_, cfg, target, "ieee")
                seen |= set(names)
print(json.dumps(dict(found=found, loops=loops, kernels=sorted({name for name, *_ in seen}), gluon=[name for name, target in (("hopper", "cuda:90"), ("blackwell", "cuda:100")) if not persistent.unavailable(name, target, target)])))
"""
)
LOST = """
import triton, triton.language as tl

@triton.jit
def lost(out, n):
    stage = tl.load(out)
    prev = stage
    for _ in range(n):
        tl.store(out + stage, prev)
        prev = stage
        stage += 1

@triton.jit
def kept(out, n):
    stage = tl.load(out)
    prev = stage - 1
    for _ in range(n):
        tl.store(out + stage, prev)
        prev = stage
        stage += 1
"""
BAD = (
    WATCH
    + """
import bad
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
compile(ASTSource(bad.kept, {"out": "*i32", "n": "i32"}), target=GPUTarget("cuda", 90, 32))
assert not found and loops == 1
compile(ASTSource(bad.lost, {"out": "*i32", "n": "i32"}), target=GPUTarget("cuda", 90, 32))
print(json.dumps(found))
"""
)


def run(code, path=None):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_ALWAYS_COMPILE": "1"
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path or ""), *sys.path]))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_kernel_loses_a_variable():
    row = run(EVERY_KERNEL)
    assert not row["found"] and row["loops"] > 50
    wanted = {
        "correlate",
        "correlate_flat",
        "wgrad",
        "correlate_tma",
        "wgrad_tma",
        "sum_splits",
        "correlate_depthwise",
        "wgrad_depthwise",
    }
    gluon = {f"{name}_{family}" for name in ("correlate", "wgrad") for family in row["gluon"]}
    assert set(row["kernels"]) >= wanted | gluon


def test_the_watch_sees_it(tmp_path):
    (tmp_path / "bad.py").write_text(LOST)
    assert ast.parse(LOST) and run(BAD, tmp_path) == [["lost", "prev", "stage"]]


def test_no_tile_of_eight_warps_where_it_is_serialised(monkeypatch):
    def warps(pass_, target="cuda:90"):
        return {cfg.num_warps for cfg in config.candidates(P, pass_, target) if cfg.kernel == "tma"}

    for version, fprop in (((3, 6), {4}), ((3, 7), {4, 8}), ((), {4, 8})):
        monkeypatch.setattr(tma, "triton_version", lambda version=version: version)
        assert warps("fprop") == fprop and warps("dgrad") == warps("wgrad") == warps(
            "fprop", "cuda:100"
        ) == {4, 8}


@pytest.mark.slow
def test_products_of_offered_tiles_overlap():
    """Each large tma tile of sm_90 has one product in flight while the next boxes arrive, in this
    version of Triton."""
    rows = run("""
import json
from tridil import aot, config, sass
from tridil.problem import Problem
p = Problem(4, 256, 64, 64, 256, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
found = []
for pass_ in ("fprop", "dgrad", "wgrad"):
    tiles = {config.tile(cfg, pass_): cfg for cfg in config.candidates(p, pass_, "cuda:90") if cfg.kernel == "tma" and cfg.SPLIT_K == 1}
    for tile, cfg in tiles.items():
        if tile[0] * tile[1] >= 128 * 128 and tile[2] == 64:
            (_, kernel), = aot.compile_pass(p, pass_, cfg, "cuda:90")
            (hot, *_), _ = sass.main_loops(sass.parse(aot._read_cubin(kernel, 90, tile, cfg.num_warps, 2)["sass"]))
            found.append((pass_, tile, [ins.arguments for ins in hot if "DEPBAR" in ins.opcode]))
print(json.dumps(found))
""")
    assert {pass_ for pass_, *_ in rows} == set(PASSES) and len(rows) >= 7
    assert all(waits == ["gsb0, 0x1"] for *_, waits in rows), rows
