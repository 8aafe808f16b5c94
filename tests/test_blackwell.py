"""The family blackwell: Gluon has no interpreter, so its kernels run here on compiled code only, on a
GPU or a driver that runs it on CPU tensors. Its steps are those of test_hopper.py."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from test_aot import child
from test_hopper import (  # noqa: F401
    BOXES,
    P,
    available,
    check_shares,
    launched,
    mutant,
    run_geometries,
    survive,
)

pytest.importorskip("triton.experimental.gluon")

from tridil import config, cost_model, devices, drivers
from tridil.families import blackwell
from tridil.families.persistent import NO_EDGE
from tridil.kernels import blackwell as kernels
from tridil.problem import PASSES, Problem

compiled = pytest.mark.skipif(
    drivers.interpreted() or drivers.target() != blackwell.TARGET,
    reason="Gluon has no interpreter: needs compiled code for sm_100",
)
B200 = devices.of_target(blackwell.TARGET)


def make(pass_, **change):
    """A config of the smallest tile."""
    values = dict(
        kernel="blackwell",
        SPLIT_K=1,
        num_warps=4,
        num_stages=3,
        maxnreg=None,
        BLOCK_IMG=1,
        BLOCK_P=4 if pass_ == "wgrad" else 8,
        BLOCK_Q=16,
        BLOCK_N=64,
        STREAM=False,
        PROGRAMS=3,
    )
    values |= dict(BLOCK_M=128) if pass_ == "wgrad" else dict(BLOCK_K=64, GROUP=8) | NO_EDGE
    return config.from_json(values | change, pass_)


def draw_config(p, pass_, rng):
    """A random config that fits."""
    while True:
        m, n = rng.choice(blackwell.TILES)
        k = rng.choice([64, 64, 128]) // (2 if p.dtype == "float32" else 1)
        sides = rng.choice(BOXES[k if pass_ == "wgrad" else m])
        box = dict(zip(("BLOCK_IMG", "BLOCK_P", "BLOCK_Q"), sides))
        tile = dict(BLOCK_M=m) if pass_ == "wgrad" else dict(BLOCK_K=k, GROUP=rng.choice([1, 2, 8]))
        if pass_ != "wgrad":
            edge = rng.choice(BOXES[m]) if rng.random() < 0.5 else (0, 0, 0)
            tile |= dict(zip(NO_EDGE, edge))
        cfg = make(
            pass_,
            **box,
            **tile,
            BLOCK_N=n,
            STREAM=rng.random() < 0.6,
            PROGRAMS=rng.choice([1, 2, 3, 5, 7]),
            num_stages=rng.choice([2, 3, 3]),
        )
        if config.fits(cfg, p, pass_, blackwell.TARGET) is None:
            return cfg


@compiled
def test_random_geometries(device, seed, poisoned, launched):  # noqa: F811
    # wgrad's tiles have 128 channels of a group at least
    legal = lambda p: p.groups == 1 or p.k // p.groups % 128 == 0  # noqa: E731
    count = run_geometries("BLACKWELL", seed, device, draw_config, legal)
    assert set(launched) == {"correlate_blackwell", "wgrad_blackwell"}
    assert launched["correlate_blackwell"] >= 2 * count and launched["wgrad_blackwell"] >= count


@compiled
def test_shares(device, poisoned, launched):  # noqa: F811
    check_shares(make, device)


@pytest.mark.parametrize("pass_", PASSES)
def test_candidates_and_the_default(pass_, available, monkeypatch):  # noqa: F811
    """Offered to the tuner on sm_100 alone; what no GPU has timed runs by prediction where it is
    allowed to."""
    wide = replace(P, c=2048)
    found = [cfg for cfg in config.candidates(wide, pass_, "cuda:100") if cfg.kernel == "blackwell"]
    assert {cfg.STREAM for cfg in found} == {False, True} and len(found) <= 28
    for cfg in found:  # with STREAM as few as take equally many steps
        steps = config.executed_macs(wide, pass_, cfg) // prod(config.tile(cfg, pass_))
        least = [n for n in range(1, 149) if -(-steps // n) == -(-steps // 148)][0]
        assert cfg.PROGRAMS == (least if cfg.STREAM else 148)
    # each class of a strided dgrad is a launch of its own steps
    strided = Problem(4, 256, 49, 64, 128, 3, 3, (2, 2), ((1, 1), (1, 1)))
    for cfg in config.candidates(strided, "dgrad", "cuda:100"):
        if cfg.kernel == "blackwell" and cfg.STREAM:
            tile = prod(config.tile(cfg, "dgrad"))
            steps = config.executed_macs(strided, "dgrad", cfg) // tile
            assert cfg.PROGRAMS == min(148, 148 if steps >= 8 * 148 else steps // 4)
    assert {config.tile(cfg, pass_)[:2] for cfg in found} >= {(256, 256), (128, 256)}
    for target in devices.TARGETS:
        kinds = {cfg.kernel for cfg in config.candidates(wide, pass_, target)}
        assert ("blackwell" in kinds) == (target == "cuda:100")
    tma = cost_model.best(wide, pass_, B200)
    assert tma.kernel == "tma"
    why = cost_model.why(wide, pass_, tma, B200)
    assert "kernel blackwell is predicted to take 0." in why and "experimental" in why
    monkeypatch.setenv("TRIDIL_EXPERIMENTAL", "1")
    assert cost_model.best(wide, pass_, B200).kernel == "blackwell"


@pytest.mark.parametrize(
    "change, pass_, problem, reason",
    [
        ({}, "fprop", P, None),
        ({}, "wgrad", P, None),
        ({"BLOCK_P": 16, "BLOCK_N": 256}, "dgrad", P, None),
        ({"num_warps": 8}, "fprop", P, "num_warps=4"),
        ({"maxnreg": 168}, "fprop", P, "maxnreg=None"),
        ({"SPLIT_K": 2}, "wgrad", P, "STREAM splits"),
        ({"num_stages": 1}, "fprop", P, "num_stages of at least 2"),
        ({"num_stages": 20}, "fprop", P, "bytes of shared memory"),
        ({"STREAM": 1}, "fprop", P, "STREAM must be True or False"),
        ({"BLOCK_P": 4}, "fprop", P, "128 or 256 rows"),
        ({"BLOCK_P": 64}, "fprop", P, "128 or 256 rows"),
        ({"BLOCK_N": 32}, "fprop", P, "64 to 256 columns"),
        ({"BLOCK_K": 32}, "fprop", P, "128 or 256 bytes of the reduction"),
        ({"BLOCK_K": 32}, "fprop", replace(P, dtype="float32"), None),
        ({"BLOCK_K": 32}, "dgrad", replace(P, dtype="float32"), "innermost in memory"),
        ({}, "fprop", replace(P, c=252), "multiples of 16 bytes"),
        ({}, "fprop", replace(P, n=10**4), "32 bits"),
    ],
)
def test_what_is_legal(change, pass_, problem, reason, available):  # noqa: F811
    found = config.fits(make(pass_, **change), problem, pass_, blackwell.TARGET)
    assert found is None if reason is None else reason in found, found


STATIC = """
import json
from tridil import aot, config
from tridil.families import blackwell
from tridil.problem import Problem
p = Problem(4, 256, 64, 68, 256, 3, 3, padding=((2, 2), (2, 2)), dilation=(2, 2))
for pass_ in ("fprop", "dgrad", "wgrad"):
    for m, n in blackwell.TILES:
        for stream in (False, True):
            edge = (1, m // 4, 4) if stream else (0, 0, 0)
            tile = dict(BLOCK_M=m, BLOCK_P=4) if pass_ == "wgrad" else dict(
                BLOCK_K=64, GROUP=8, BLOCK_P=m // 16, EDGE_IMG=edge[0], EDGE_P=edge[1], EDGE_Q=edge[2])
            cfg = config.from_json(dict(kernel="blackwell", SPLIT_K=1, num_warps=4, num_stages=3, maxnreg=None, BLOCK_IMG=1, BLOCK_Q=16,
                                        BLOCK_N=n, PROGRAMS=148, STREAM=stream, **tile), pass_)
            for item, kernel in aot.compile_pass(p, pass_, cfg, "cuda:100"):
                row, ptx = aot._read_cubin(kernel, 100, (m, n, 64), 4, 2), kernel.asm["ptx"]
                before, *after = ptx.split("atom.global.gpu.release")
                print(json.dumps(dict(
                    name=f"{item.name} {pass_} {m}x{n}", overhead=row["overhead"], spills=row["spills"], mma=row["mma"], loads=row["loads"],
                    columns=n, shared_bytes=kernel.metadata.shared,
                    said=int(blackwell.FAMILY.shared_bytes(p, pass_, vars(cfg), (m, n, 64), "cuda:100")), stream=stream,
                    waits_for_parts="atom.global.gpu.acquire" in ptx, says_parts=bool(after) and before.rfind("bar.sync") > before.rfind("st.global"))))
"""


@pytest.mark.slow
def test_machine_code():
    """No spills, operands in shared memory, sums in tensor memory, and no more instructions beside
    the products than in CUTLASS's loop: 0.1 per 2048 FMA at 128 columns and more."""
    out = child("-c", STATIC)
    assert out.returncode == 0, out.stderr
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(rows) == 6 * len(blackwell.TILES)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["mma"].startswith("UTCHMMA"), row
        assert any(name.startswith("UTMALDG") for name in row["loads"]), row
        assert row["overhead"] <= (0.2 if row["columns"] == 64 else 0.1), row
        assert row["waits_for_parts"] == row["says_parts"] == row["stream"], row
        unused = 1024 + (128 * 128 if row["columns"] == 64 else 0)  # a second buffer
        assert row["shared_bytes"] <= row["said"] <= row["shared_bytes"] + unused, row


# ---- mutants: each breaks a rule of the ring or of the sums
MUTANTS = {
    "no wait for a box": [("            mbarrier.wait(full.index(stage), phase)\n", "")],
    "no wait for the sums": [("        mbarrier.wait(ready.index(at), done)\n", "")],
    "sums that are never given back": [("pred=half == HALVES - 1", "pred=half == HALVES")],
    "buffers given back by one half": [("count=HALVES", "count=1")],
    "sums of the tile before": [("use_acc=i > 0", "use_acc=True")],
    "one half twice": [(".slice(128 * half, 128)", ".slice(0, 128)")],
    "the sums of one half": [("sums.index(at * HALVES + half)", "sums.index(at * HALVES)")],
    "one place for the sums of two tiles": [("sums.index(at * HALVES + half)", "sums.index(half)")],
    "the other tile's turn": [("    at = 0\n    done = 0\n", "    at = 0\n    done = 1\n")],
    "columns in one place": [("i3 + i * STORED", "i3")],
    "parts of one half": [("part_ptr + row, share, t", "part_ptr, share, t")],
    "the edge's boxes are the others'": [("y, y_edge, tile >= before, bias", "y, y, False, bias")],
    "no wait for a part": [("            wait_for_parts(flag_ptr, share, parts)\n", "")],
    "one buffer for two stores": [("(half * (BLOCK_N // STORED) + i) % SLOTS", "0")],
    "too many buffers for one part": [("2 if HALVES * N > STORED else 1", "2")],
    "tiles without live taps": [
        ("                    t = gl.where(count > 0, t, 0.0)\n", "                    pass\n")
    ],
}

# caught where the newest box arrives first
NEWEST = "one place for the sums of two tiles"


def test_mutants_change_what_the_kernels_say():
    text = Path(kernels.__file__).read_text(encoding="utf-8")
    for name, changes in MUTANTS.items():
        missing = [before for before, _ in changes if before not in text]
        assert not missing, f"mutant {name!r}: the kernels no longer say {missing}"


@compiled
@pytest.mark.parametrize("name", ["none", *MUTANTS])
def test_mutants(name, device, poisoned, launched, tmp_path, monkeypatch, request):  # noqa: F811
    """The kernels as they are survive, every mutant is caught."""
    late = request.config.getoption("emulate_late", None)
    if late is None or late != "newest" and name == NEWEST:
        pytest.skip("needs a driver that lets asynchronous work complete as late as it may")
    module = mutant(name, tmp_path, kernels, MUTANTS)
    two = dict(BLOCK_P=16, BLOCK_N=128, num_stages=2)
    runs = [
        ("fprop", make("fprop", **two, PROGRAMS=1)),
        ("dgrad", make("dgrad", STREAM=True, PROGRAMS=7)),
        ("dgrad", make("dgrad", PROGRAMS=1)),
        ("dgrad", make("dgrad", **two, STREAM=True)),
        ("fprop", make("fprop", BLOCK_P=16, BLOCK_N=256, PROGRAMS=1)),
        ("wgrad", make("wgrad", BLOCK_M=256, STREAM=True, PROGRAMS=7)),
        ("fprop", make("fprop"), dict(padding=((30, 3), (3, 3)))),
        ("dgrad", make("dgrad", **two | dict(BLOCK_Q=8), EDGE_IMG=1, EDGE_P=32, EDGE_Q=4)),
    ]
    assert survive(module, monkeypatch, device, runs) == (name == "none")
