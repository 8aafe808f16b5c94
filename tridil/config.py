"""Tile configurations: which are legal (`fits`), which are sensible (`candidates`), and the default one.

A config is a plain dict: ``kernel`` ("gather" or "gather_flat"), the kernel's constexpr tile sizes, num_warps, num_stages, maxnreg.
fprop and dgrad: the pixel box BLOCK_IMG x BLOCK_P x BLOCK_Q is the tile's M, BLOCK_N output channels, BLOCK_K reduced channels
(gather_flat: flattened (tap, channel) pairs). wgrad: BLOCK_M output channels, BLOCK_N input channels (gather_flat: flattened pairs), the
box is the reduction step, SPLIT_K partial sums. CLAMP keeps the addresses of masked lanes inside the tensor. maxnreg is the registers a
thread may have (None: the compiler decides, and ptxas may spill for occupancy).
"""
from __future__ import annotations

from functools import lru_cache
from math import gcd, prod

from .problem import DTYPE_BYTES, PASSES, Axis, Problem

# target -> (SMs of its largest common part, bytes of shared memory one program may use); CUDA programming guide, table "Technical
# specifications per compute capability"; AMD CDNA3 ISA guide for LDS
TARGETS = {"cuda:80": (108, 166912), "cuda:86": (84, 101376), "cuda:89": (128, 101376), "cuda:90": (132, 232448),
           "cuda:100": (148, 232448), "cuda:120": (170, 101376), "hip:gfx942": (304, 65536)}
KERNELS = ("gather", "gather_flat")
# tile (M, N, num_warps) -> relative rate of the main loop: 1 / (1 + instructions that are not MMA per MMA), static counts, fp16, sm_80;
# on the smallest tile more warps would repeat each other's work
TILES = {(128, 128, 4): 1.0, (128, 256, 8): 1.0, (256, 128, 8): 0.98, (64, 128, 4): 0.8, (128, 64, 4): 0.8, (64, 64, 4): 0.65,
         (128, 32, 4): 0.5, (64, 32, 4): 0.42, (128, 16, 4): 0.3, (64, 16, 4): 0.25,
         (32, 128, 4): 0.5, (32, 64, 4): 0.42, (16, 128, 4): 0.3, (16, 64, 4): 0.25, (16, 32, 4): 0.2, (16, 16, 2): 0.15}
# the same without tensor cores: fp64, ieee fp32
SIMT_TILES = {(64, 64, 4): 1.0, (64, 32, 4): 0.8, (64, 16, 4): 0.5, (32, 32, 4): 0.5, (32, 16, 4): 0.3, (16, 64, 4): 0.5, (16, 16, 4): 0.2}


def device_limits(target: str) -> tuple[int, int]:
    """(SMs, shared memory bytes per program) of a target such as "cuda:90"; an unknown one is taken as the smallest."""
    return TARGETS.get(target, (84, 65536 if target.startswith("hip") else 101376))


def pixels(config: dict) -> int:
    return config["BLOCK_IMG"] * config["BLOCK_P"] * config["BLOCK_Q"]


def passes_axes(problem: Problem, pass_: str) -> list[tuple[Axis, Axis]]:
    """The (h, w) correlations that a pass launches: one, or one per pair of residue classes of a strided dgrad."""
    if pass_ == "dgrad":
        hs, ws = problem.dgrad_axes
        return [(h, w) for h in hs for w in ws]
    return [problem.fprop_axes]


def shared_bytes(config: dict, problem: Problem, pass_: str, target: str) -> int:
    """Shared memory of the pipelined operand tiles; below sm_90 the last stage waits in registers."""
    m, n, k = (pixels(config), config["BLOCK_N"], config["BLOCK_K"]) if pass_ != "wgrad" else (config["BLOCK_M"], config["BLOCK_N"], pixels(config))
    stages = config["num_stages"] - (not target.startswith("cuda") or int(target[5:]) < 90)
    nbytes = DTYPE_BYTES[problem.dtype]
    return max(stages * (m + n) * k * nbytes, m * n * (max(nbytes, 4) if config.get("SPLIT_K", 1) > 1 else nbytes))     # the epilogue's layout change


def fits(config: dict, problem: Problem, pass_: str, target: str) -> str | None:
    """None when `config` is legal for this pass of `problem` on `target`, else the reason, with the values."""
    if pass_ not in PASSES:
        return f"unknown pass {pass_!r}: use one of {PASSES}"
    blocks = ("BLOCK_IMG", "BLOCK_P", "BLOCK_Q", "BLOCK_N") + (("BLOCK_M", "SPLIT_K") if pass_ == "wgrad" else ("BLOCK_K",))
    needed = ("kernel", *blocks, "CLAMP", "num_warps", "num_stages", "maxnreg")
    if set(config) != set(needed):
        return f"a {pass_} config has exactly the entries {sorted(needed)}, got {sorted(config)}"
    if config["kernel"] not in KERNELS:
        return f"unknown kernel {config['kernel']!r}: use one of {KERNELS}"
    if not isinstance(config["CLAMP"], bool):
        return f"CLAMP must be True or False, got {config['CLAMP']!r}"
    if config["maxnreg"] is not None and (target.startswith("hip") or config["maxnreg"] not in range(24, 256)):
        return f"maxnreg must be None, or on CUDA targets 24 to 255, got {config['maxnreg']!r} for {target}"
    for name in (*blocks, "num_warps", "num_stages"):
        if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
            return f"{name} must be a positive int, got {config[name]!r}"
    for name in (*blocks, "num_warps"):
        if name != "SPLIT_K" and config[name] & (config[name] - 1):
            return f"{name} must be a power of two, got {config[name]}"
    m, n, k = (pixels(config), config["BLOCK_N"], config["BLOCK_K"]) if pass_ != "wgrad" else (config["BLOCK_M"], config["BLOCK_N"], pixels(config))
    if min(m, n, k) < 16:
        return f"tl.dot needs tile sides of at least 16, got {m}x{n}x{k}"
    if config["num_warps"] > 16 or m * n > 256 * 32 * config["num_warps"]:
        return f"an accumulator of {m}x{n} spills with num_warps={config['num_warps']} (at most 16 warps, 256 registers a thread)"
    if 32 * config["num_warps"] * (config["maxnreg"] or 0) > 65536:
        return f"maxnreg={config['maxnreg']} with num_warps={config['num_warps']} exceeds the 65536 registers of an SM"
    if pass_ == "wgrad" and config["SPLIT_K"] > 65535:
        return f"SPLIT_K (={config['SPLIT_K']}) must be at most 65535"
    programs = grid(problem, pass_, config)
    if programs >= 2**31:
        return f"the grid of {programs} programs exceeds 2**31 - 1: use larger tiles"
    need, (_, limit) = shared_bytes(config, problem, pass_, target), device_limits(target)
    if need > limit:
        return f"tiles of {m}x{n}x{k} with num_stages={config['num_stages']} need {need} bytes of shared memory; {target} has {limit}"
    return None


def tiles(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> int:
    """Programs of one launch."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    if pass_ == "wgrad":
        columns = _columns(problem, config["BLOCK_N"], config["kernel"] == "gather_flat")
        return -(-k // config["BLOCK_M"]) * columns * problem.groups * config["SPLIT_K"]
    boxes = -(-problem.n // config["BLOCK_IMG"]) * -(-axes[0].out // config["BLOCK_P"]) * -(-axes[1].out // config["BLOCK_Q"])
    return boxes * -(-(k if pass_ == "fprop" else c) // config["BLOCK_N"]) * problem.groups


def _columns(problem: Problem, n: int, flat: bool) -> int:
    """Column tiles of wgrad: of flattened (tap, channel) pairs, or of the channels of each tap."""
    c, taps = problem.c // problem.groups, problem.r * problem.s
    return -(-taps * c // n) if flat else taps * -(-c // n)


def grid(problem: Problem, pass_: str, config: dict) -> int:
    """Programs of the largest launch of a pass."""
    return max((tiles(problem, pass_, config, axes) for axes in passes_axes(problem, pass_)), default=0)


def executed_macs(problem: Problem, pass_: str, config: dict) -> int:
    """Multiply-accumulates that the tiles execute: live taps only, overhang of every tile side included."""
    c, k, flat = problem.c // problem.groups, problem.k // problem.groups, config["kernel"] == "gather_flat"
    images = -(-problem.n // config["BLOCK_IMG"]) * config["BLOCK_IMG"]
    n, total = config["BLOCK_N"], 0
    if pass_ == "wgrad":
        rows = -(-k // config["BLOCK_M"]) * config["BLOCK_M"]
        h, w = problem.fprop_axes
        if flat:
            return images * rows * problem.groups * _flat_wgrad_pixels(problem, n, config["BLOCK_P"], config["BLOCK_Q"])
        return images * rows * -(-c // n) * n * problem.groups * h.executed_out(config["BLOCK_P"]) * w.executed_out(config["BLOCK_Q"])
    reduced, cols = (c, k) if pass_ == "fprop" else (k, c)
    for h, w in passes_axes(problem, pass_):
        if flat:
            total += _flat_steps(h, w, config["BLOCK_P"], config["BLOCK_Q"], reduced, config["BLOCK_K"])
        else:
            total += h.executed(config["BLOCK_P"]) * w.executed(config["BLOCK_Q"]) * -(-reduced // config["BLOCK_K"]) * config["BLOCK_K"]
    return total * images * -(-cols // n) * n * problem.groups


@lru_cache(maxsize=4096)
def _flat_steps(h: Axis, w: Axis, bp: int, bq: int, reduced: int, bk: int) -> int:
    """Sum over boxes of pixels * reduction length rounded up to bk."""
    def counts(axis, block):
        out: dict[int, int] = {}
        for i in range(0, axis.out, block):
            lo, hi = axis.live(i, min(i + block, axis.out) - 1)
            out[hi - lo] = out.get(hi - lo, 0) + 1
        return out
    return bp * bq * sum(nh * nw * -(-th * tw * reduced // bk) * bk
                         for th, nh in counts(h, bp).items() for tw, nw in counts(w, bq).items())


@lru_cache(maxsize=4096)
def _flat_wgrad_pixels(problem: Problem, n: int, bp: int, bq: int) -> int:
    """Sum over column tiles of n * (pixels of the united live rectangle, rounded up to boxes)."""
    c, (h, w) = problem.c // problem.groups, problem.fprop_axes
    total = 0
    for n0 in range(0, problem.r * problem.s * c, n):
        first, last = n0 // c, (min(n0 + n, problem.r * problem.s * c) - 1) // c
        (r0, s0), (r1, s1) = divmod(first, problem.s), divmod(last, problem.s)
        s0, s1 = (s0, s1) if r0 == r1 else (0, problem.s - 1)
        rows, cols = h.live_out_any(r0, r1), w.live_out_any(s0, s1)
        total += n * -(-rows // bp) * bp * -(-cols // bq) * bq
    return total


def is_flat(problem: Problem, pass_: str) -> bool:
    """Whether the reduction over flattened (tap, channel) pairs wastes less than blocks of channels do: few channels."""
    channels = (problem.k if pass_ == "dgrad" else problem.c) // problem.groups
    taps = problem.r * problem.s
    block = 16 if channels <= 16 else 32
    return channels < 32 and taps > 1 and -(-channels // block) * block * taps >= 1.2 * -(-channels * taps // block) * block


def _boxes(count: int, images: int, height: int, width: int):
    """Power-of-two boxes of `count` pixels whose sides do not exceed the rounded-up map, unless the whole map is smaller."""
    def up(x):
        return 1 << max(x - 1, 0).bit_length()
    sides = [(b, p, count // b // p) for b in _powers(count) for p in _powers(count // b)]
    small = [s for s in sides if s[0] <= up(images) and s[1] <= up(height) and s[2] <= up(width)]
    return small or [(count // q // p, p, q) for q in [min(up(width), count)] for p in [min(up(height), count // q)]]


def _powers(limit: int):
    return [1 << e for e in range(limit.bit_length())]


def has_mma(problem: Problem, precision: str) -> bool:
    """Whether the products run on tensor cores."""
    return problem.dtype in ("float16", "bfloat16") or problem.dtype == "float32" and precision == "tf32"


def candidates(problem: Problem, pass_: str, target: str, precision: str = "tf32") -> list[dict]:
    """Legal, sensible configs, tens of them: every tile shape, each with the box that executes the fewest MACs.

    precision ("tf32" or "ieee") matters for float32: ieee products do not run on tensor cores and take smaller tiles.
    """
    mma, flat, nbytes = has_mma(problem, precision), is_flat(problem, pass_), DTYPE_BYTES[problem.dtype]
    c, k = problem.c // problem.groups, problem.k // problem.groups
    taps = problem.r * problem.s if flat else 1
    rows, cols, reduced = {"fprop": (None, k, c * taps), "dgrad": (None, c, k * taps), "wgrad": (k, c * taps, None)}[pass_]
    axes = passes_axes(problem, pass_)
    height, width = max((h.out for h, _ in axes), default=1), max((w.out for _, w in axes), default=1)
    base = {"kernel": "gather_flat" if flat else "gather", "CLAMP": target.startswith("cuda") and int(target[5:]) >= 100, "num_stages": 3,
            "maxnreg": 255 if target.startswith("cuda") else None}
    # operands whose aligned runs are too short for cp.async (4 bytes) are loaded through registers, an element at a time
    m_scattered, n_scattered = ((flat or gcd(x, 4) * nbytes < 4) for x in {"fprop": (c, c), "dgrad": (k, c), "wgrad": (k, c)}[pass_])
    if pass_ == "wgrad":
        m_scattered = gcd(k, 4) * nbytes < 4
        steps = [64, 32, 16] if nbytes == 2 else [32, 16]
    else:
        steps = [step for step in ((64, 32) if nbytes == 2 else (32,)) if step < 2 * reduced] + [16]
        least = min(-(-reduced // step) * step for step in steps)
        steps = [step for step in steps if -(-reduced // step) * step <= 1.1 * least]      # do not pad the channels much
    out = []
    for m, n, warps in TILES if mma else SIMT_TILES:
        if n > 16 and n >= 2 * cols or (m > 16 and m >= 2 * rows if rows else m < 32) or nbytes == 4 and m * n > 128 * 128:
            continue
        most = (16 if mma else 4) * 32 * warps                         # scattered elements, a thread at most 16 or 4
        fitting = [step for step in (steps if mma else [16]) if max(m * m_scattered, n * n_scattered) * step <= most]
        if m * n >= 128 * 128 and pass_ == "wgrad" and (cols % n or rows % m):
            continue                                                   # the masks' registers would spill, here and below
        if m * n >= 128 * 128 and (pass_ == "dgrad" and cols % n or pass_ == "wgrad" and (base["CLAMP"] or problem.layout == "nchw")):
            fitting = [step for step in fitting if step * nbytes < 128]
        for step in fitting[:1 if rows else 2]:
            option = dict(base, BLOCK_N=n, num_warps=warps)
            option |= dict(BLOCK_M=m, SPLIT_K=_splits(problem, m, n, flat, step, target)) if rows else dict(BLOCK_K=step)
            boxes = [dict(option, BLOCK_IMG=b, BLOCK_P=p, BLOCK_Q=q) for b, p, q in _boxes(step if rows else m, problem.n, height, width)]
            # ties: long rows, which are neighbours in memory
            best = min(boxes, key=lambda cfg: (executed_macs(problem, pass_, cfg), -cfg["BLOCK_Q"], cfg["BLOCK_IMG"]))
            if fits(best, problem, pass_, target) is None:
                out.append(best)
    return out


def _splits(problem: Problem, m: int, n: int, flat: bool, step: int, target: str) -> int:
    """Enough partial sums for two waves of programs, each with at least eight reduction steps, at most 64 MiB of partials."""
    programs = -(-problem.k // problem.groups // m) * _columns(problem, n, flat) * problem.groups
    steps = max(problem.n * problem.p * problem.q // step, 1)
    partials = 2**26 // (max(DTYPE_BYTES[problem.dtype], 4) * max(prod(problem.w_shape), 1))
    return max(1, min(2 * device_limits(target)[0] // programs, steps // 8, partials, 128))


def cost(problem: Problem, pass_: str, config: dict, target: str, precision: str = "tf32") -> float:
    """Executed MACs over the tile's relative rate, stretched by the idle part of the last wave: orders candidates, has no unit."""
    m = config["BLOCK_M"] if pass_ == "wgrad" else pixels(config)
    rate = (TILES if has_mma(problem, precision) else SIMT_TILES)[m, config["BLOCK_N"], config["num_warps"]]
    step = pixels(config) if pass_ == "wgrad" else config["BLOCK_K"]
    rate *= {16: 0.6, 32: 0.85}.get(step, 1.0)
    slots = device_limits(target)[0] * (2 if m * config["BLOCK_N"] <= 128 * 128 else 1)
    programs = sum(tiles(problem, pass_, config, axes) for axes in passes_axes(problem, pass_))
    waves = -(-programs // slots) * slots / max(programs, 1)
    return executed_macs(problem, pass_, config) / rate * waves


@lru_cache(maxsize=4096)
def _default(problem: Problem, pass_: str, target: str, precision: str) -> tuple:
    options = candidates(problem, pass_, target, precision)
    if not options:
        raise ValueError(f"no tile fits {pass_} of {problem.key()} on {target}")
    return tuple(min(options, key=lambda cfg: cost(problem, pass_, cfg, target, precision)).items())


def default(problem: Problem, pass_: str, target: str, precision: str = "tf32") -> dict:
    """The config that runs when nothing was measured: the candidate of least `cost`. Raises ValueError when none fits."""
    return dict(_default(problem, pass_, target, precision))


def describe(config: dict) -> str:
    """A config in one word: pixel box, channel tile(s), reduction step or split, warps, stages."""
    box = "x".join(str(config[f"BLOCK_{side}"]) for side in ("IMG", "P", "Q"))
    names = (("m", "BLOCK_M"), ("n", "BLOCK_N"), ("k", "BLOCK_K"), ("split", "SPLIT_K"))
    tile = " ".join(f"{short}{config[name]}" for short, name in names if name in config)
    return f"box {box} {tile} warps{config['num_warps']} stages{config['num_stages']}{' clamp' if config['CLAMP'] else ''}"
