"""Tile configurations: which are legal (`fits`), which are sensible (`candidates`), and how much work each one is.

A config is a plain dict: ``kernel`` ("gather", "gather_flat" or "tma"), the kernel's constexpr tile sizes, num_warps, num_stages, maxnreg.
fprop and dgrad: the pixel box BLOCK_IMG x BLOCK_P x BLOCK_Q is the tile's M, rounded up to a power of two, BLOCK_N output channels, BLOCK_K
reduced channels (gather_flat: flattened (tap, channel) pairs). wgrad: BLOCK_M output channels, BLOCK_N input channels (gather_flat: flattened
pairs), the box is the reduction step. SPLIT_K partial sums. Gather kernels: CLAMP keeps the addresses of masked lanes inside the tensor.
depthwise (groups == C): the box counts lanes, each with COLS outputs along its row; BLOCK_N channels; TAPS filter columns at a time, in wgrad of
ROWS filter rows; SPLIT_K is wgrad's alone.
tma: WEIGHT_FIRST (fprop, dgrad) and WARP_SPECIALIZE as in kernels/tma.py. maxnreg is the registers a thread may have (None: the compiler
decides, and ptxas may spill for occupancy).
"""
from __future__ import annotations

from functools import lru_cache
from math import gcd, prod

from . import devices, direct
from .direct import pixels
from .problem import DTYPE_BYTES, PASSES, Axis, Problem

KERNELS = ("gather", "gather_flat", "tma", "depthwise")
# tiles (M, N, num_warps); on the smallest one more warps would repeat each other's work
TILES = ((128, 128, 4), (128, 256, 8), (256, 128, 8), (64, 128, 4), (128, 64, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4), (128, 16, 4),
         (64, 16, 4), (128, 8, 2), (64, 8, 2), (32, 128, 4), (32, 64, 4), (16, 128, 4), (16, 64, 4), (16, 32, 4), (16, 16, 2), (8, 128, 2),
         (8, 64, 2), (8, 32, 2), (8, 16, 2))
TMA_TILES = ((128, 128, 4), (128, 256, 8), (256, 128, 8), (64, 256, 4), (256, 64, 4), (64, 128, 4), (128, 64, 4), (64, 64, 4), (128, 32, 4),
             (32, 128, 4))
# without tensor cores: fp64, ieee fp32
SIMT_TILES = ((64, 64, 4), (64, 32, 4), (64, 16, 4), (64, 8, 2), (32, 32, 4), (32, 16, 4), (32, 8, 2), (16, 64, 4), (16, 16, 4), (8, 64, 2),
              (8, 16, 2))


def device_limits(target: str) -> tuple[int, int]:
    """(SMs, bytes of shared memory one program may use) of a target such as "cuda:90"."""
    device = devices.of_target(target)
    return device.sms, device.limits[1]


def _up(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def tile(config: dict, pass_: str) -> tuple[int, int, int]:
    """(M, N, K) of the tile product; of a direct kernel its outputs, channels and 1."""
    if config["kernel"] == "depthwise":
        return pixels(config) * config["COLS"], config["BLOCK_N"], 1
    return (config["BLOCK_M"], config["BLOCK_N"], pixels(config)) if pass_ == "wgrad" else (pixels(config), config["BLOCK_N"], config["BLOCK_K"])


def shared_bytes(config: dict, problem: Problem, pass_: str, target: str) -> int:
    """Shared memory of the pipelined operand tiles; below sm_90 the last stage waits in registers."""
    m, n, k = tile(config, pass_)
    stages = config["num_stages"] - (not target.startswith("cuda") or int(target[5:]) < 90)
    nbytes = DTYPE_BYTES[problem.dtype]
    is_partial = config["SPLIT_K"] > 1 or config["kernel"] == "tma" and pass_ == "wgrad"
    return max(stages * (m + n) * k * nbytes, m * n * (max(nbytes, 4) if is_partial else nbytes))                # the epilogue's layout change


def fits(config: dict, problem: Problem, pass_: str, target: str) -> str | None:
    """None when `config` is legal for this pass of `problem` on `target`, else the reason, with the values."""
    if pass_ not in PASSES:
        return f"unknown pass {pass_!r}: use one of {PASSES}"
    kernel = config.get("kernel")
    if kernel not in KERNELS:
        return f"unknown kernel {kernel!r}: use one of {KERNELS}"
    if kernel == "depthwise":
        return direct.fits(config, problem, pass_, target)
    switches = ("CLAMP",) if kernel != "tma" else ("WARP_SPECIALIZE",) if pass_ == "wgrad" else ("WEIGHT_FIRST", "WARP_SPECIALIZE")
    blocks = ("BLOCK_IMG", "BLOCK_P", "BLOCK_Q", "BLOCK_N", "BLOCK_M" if pass_ == "wgrad" else "BLOCK_K")
    needed = ("kernel", *blocks, "SPLIT_K", *switches, "num_warps", "num_stages", "maxnreg")
    if set(config) != set(needed):
        return f"a {pass_} config of {kernel} has exactly the entries {sorted(needed)}, got {sorted(config)}"
    for name in switches:
        if not isinstance(config[name], bool):
            return f"{name} must be True or False, got {config[name]!r}"
    if config["maxnreg"] is not None and (target.startswith("hip") or config["maxnreg"] not in range(24, 256)):
        return f"maxnreg must be None, or on CUDA targets 24 to 255, got {config['maxnreg']!r} for {target}"
    for name in (*blocks, "SPLIT_K", "num_warps", "num_stages"):
        if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
            return f"{name} must be a positive int, got {config[name]!r}"
    for name in ("num_warps", *(blocks if kernel == "tma" else blocks[3:])):
        if config[name] & (config[name] - 1):
            return f"{name} must be a power of two, got {config[name]}"
    m, n, k = tile(config, pass_)
    channels, others = (m, min(n, k)) if pass_ == "wgrad" else (n, min(m, k))
    least = 16 if kernel == "tma" else _least_channels(target)
    if others < 16 or channels < least:
        return f"tl.dot needs tile sides of at least 16, of output channels {least} with {kernel} on {target}, got {m}x{n}x{k}"
    if channels < 16 and config["num_warps"] > 2:            # for wgmma of 8 columns Triton 3.8 and 3.9 write descriptors that nothing could check
        return f"tiles of {channels} output channels take at most 2 warps, got num_warps={config['num_warps']}"
    if pixels(config) > 1024:
        return f"a pixel box has at most 1024 pixels, got {config['BLOCK_IMG']}x{config['BLOCK_P']}x{config['BLOCK_Q']}"
    if config["num_warps"] > 16 or m * n > 256 * 32 * config["num_warps"]:
        return f"an accumulator of {m}x{n} spills with num_warps={config['num_warps']} (at most 16 warps, 256 registers a thread)"
    if 32 * config["num_warps"] * (config["maxnreg"] or 0) > 65536:
        return f"maxnreg={config['maxnreg']} with num_warps={config['num_warps']} exceeds the 65536 registers of an SM"
    if config["SPLIT_K"] > 65535:
        return f"SPLIT_K (={config['SPLIT_K']}) must be at most 65535"
    if kernel == "gather_flat" and pass_ != "wgrad" and config["SPLIT_K"] > 1:
        return f"gather_flat does not split {pass_}'s reduction, got SPLIT_K={config['SPLIT_K']}"
    if kernel == "tma" and (reason := _no_descriptors(config, problem, pass_, target)):
        return reason
    programs = grid(problem, pass_, config)
    if programs >= 2**31:
        return f"the grid of {programs} programs exceeds 2**31 - 1: use larger tiles"
    need, (_, limit) = shared_bytes(config, problem, pass_, target), device_limits(target)
    if need > limit:
        return f"tiles of {m}x{n}x{k} with num_stages={config['num_stages']} need {need} bytes of shared memory; {target} has {limit}"
    return None


def _no_descriptors(config: dict, problem: Problem, pass_: str, target: str) -> str | None:
    """Why tensor descriptors cannot describe the tensors or the tiles. Limits: CUDA driver API, cuTensorMapEncodeTiled."""
    if not has_tma(target):
        return f"kernel 'tma' needs sm_90 or later, got {target}"
    if config["WARP_SPECIALIZE"] and int(target[5:]) // 10 != 10:
        return f"WARP_SPECIALIZE is for sm_100, got {target}"
    if config["WARP_SPECIALIZE"] and pass_ == "wgrad" and problem.dtype == "float32":
        return "WARP_SPECIALIZE crashes the compiler for wgrad in float32"
    vector, c, k = 16 // DTYPE_BYTES[problem.dtype], problem.c // problem.groups, problem.k // problem.groups
    if problem.dtype == "float64" or c % vector or pass_ != "fprop" and k % vector:
        return f"descriptors need channels in multiples of 16 bytes and at most 4 bytes each, got {c} and {k} of {problem.dtype} per group"
    if any(axis.subsampled is None for axes in problem.axes(pass_) for axis in axes):
        return f"descriptors need a dilation that is a multiple of the stride, got stride {problem.stride}, dilation {problem.dilation}"
    sides = [config[name] for name in config if name.startswith("BLOCK_")]
    if max(sides) > 256:
        return f"box sides must be at most 256, got {sides}"
    reduced, block = {"fprop": (c, "BLOCK_K"), "dgrad": (k, "BLOCK_K"), "wgrad": (k, "BLOCK_M")}[pass_]
    if problem.groups > 1 and reduced % config[block]:
        return f"with groups={problem.groups}, {block} (={config[block]}) must divide the {reduced} channels of a group"
    return None


def tiles(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> int:
    """Programs of one launch."""
    if config["kernel"] == "depthwise":
        return direct.tiles(problem, pass_, config, axes)
    c, k = problem.c // problem.groups, problem.k // problem.groups
    if pass_ == "wgrad":
        columns = _columns(problem, config["BLOCK_N"], config["kernel"] == "gather_flat")
        return -(-k // config["BLOCK_M"]) * columns * problem.groups * config["SPLIT_K"]
    boxes = -(-problem.n // config["BLOCK_IMG"]) * -(-axes[0].out // config["BLOCK_P"]) * -(-axes[1].out // config["BLOCK_Q"])
    return boxes * -(-(k if pass_ == "fprop" else c) // config["BLOCK_N"]) * problem.groups * config["SPLIT_K"]


def _columns(problem: Problem, n: int, flat: bool) -> int:
    """Column tiles of wgrad: of flattened (tap, channel) pairs, or of the channels of each tap."""
    c, taps = problem.c // problem.groups, problem.r * problem.s
    return -(-taps * c // n) if flat else taps * -(-c // n)


def grid(problem: Problem, pass_: str, config: dict) -> int:
    """Programs of the largest launch of a pass."""
    return max((tiles(problem, pass_, config, axes) for axes in problem.axes(pass_)), default=0)


def executed_macs(problem: Problem, pass_: str, config: dict) -> int:
    """Multiply-accumulates that the tiles execute: live taps only, overhang of every tile side included."""
    if config["kernel"] == "depthwise":
        return sum(direct.walk(problem, pass_, config, axes)[0] for axes in problem.axes(pass_))
    c, k, flat = problem.c // problem.groups, problem.k // problem.groups, config["kernel"] == "gather_flat"
    (m, n, step), bp, bq, total = tile(config, pass_), config["BLOCK_P"], config["BLOCK_Q"], 0
    images = -(-problem.n // config["BLOCK_IMG"]) * problem.groups
    if pass_ == "wgrad":
        h, w = problem.fprop_axes
        boxes = _flat_wgrad_boxes(problem, n, bp, bq) if flat else -(-c // n) * h.steps_out(bp)[0] * w.steps_out(bq)[0]
        return images * boxes * -(-k // m) * m * n * step
    reduced, cols = (c, k) if pass_ == "fprop" else (k, c)
    for h, w in problem.axes(pass_):
        total += _flat_steps(h, w, bp, bq, reduced, step) if flat else h.steps(bp)[0] * w.steps(bq)[0] * -(-reduced // step)
    return images * total * m * -(-cols // n) * n * step


@lru_cache(maxsize=4096)
def _flat_steps(h: Axis, w: Axis, bp: int, bq: int, reduced: int, step: int) -> int:
    """Steps of `step` flattened (tap, channel) pairs, summed over boxes."""
    def counts(axis, block):
        out: dict[int, int] = {}
        for i in range(0, axis.out, block):
            lo, hi = axis.live(i, min(i + block, axis.out) - 1)
            out[hi - lo] = out.get(hi - lo, 0) + 1
        return out
    return sum(nh * nw * -(-th * tw * reduced // step) for th, nh in counts(h, bp).items() for tw, nw in counts(w, bq).items())


@lru_cache(maxsize=4096)
def _flat_wgrad_boxes(problem: Problem, n: int, bp: int, bq: int) -> int:
    """Boxes of the united live rectangle, summed over column tiles."""
    c, (h, w) = problem.c // problem.groups, problem.fprop_axes
    total = 0
    for n0 in range(0, problem.r * problem.s * c, n):
        first, last = n0 // c, (min(n0 + n, problem.r * problem.s * c) - 1) // c
        (r0, s0), (r1, s1) = divmod(first, problem.s), divmod(last, problem.s)
        s0, s1 = (s0, s1) if r0 == r1 else (0, problem.s - 1)
        total += -(-h.live_out_any(r0, r1) // bp) * -(-w.live_out_any(s0, s1) // bq)
    return total


def is_flat(problem: Problem, pass_: str) -> bool:
    """Whether the reduction over flattened (tap, channel) pairs wastes less than blocks of channels do: few channels."""
    channels = (problem.k if pass_ == "dgrad" else problem.c) // problem.groups
    taps = problem.r * problem.s
    block = 16 if channels <= 16 else 32
    return channels < 32 and taps > 1 and -(-channels // block) * block * taps >= 1.2 * -(-channels * taps // block) * block


def has_mma(problem: Problem, precision: str) -> bool:
    """Whether the products run on tensor cores."""
    return problem.dtype in ("float16", "bfloat16") or problem.dtype == "float32" and precision == "tf32"


def has_tma(target: str) -> bool:
    """Whether tensor descriptors are hardware (sm_90 and later), not scalar loads."""
    return target.startswith("cuda") and int(target[5:]) >= 90


def stores_boxes(config: dict, problem: Problem, pass_: str) -> bool:
    """Whether fprop or dgrad of the tma kernel stores its result by descriptor: fp32 partial sums, or NHWC, in multiples of 16 bytes per pixel."""
    out = (problem.k if pass_ == "fprop" else problem.c) // problem.groups
    nbytes = 4 if config["SPLIT_K"] > 1 else DTYPE_BYTES[problem.dtype]
    return (config["SPLIT_K"] > 1 or problem.layout == "nhwc") and out * nbytes % 16 == 0 and (problem.groups == 1 or out % config["BLOCK_N"] == 0)


def _boxes(count: int, sides: tuple[int, int, int], powers: bool) -> list[tuple[int, int, int]]:
    """Pixel boxes for a tile of `count` rows on maps of `sides` (images, height, width): of powers of two, or any that need as many rows."""
    def up_to(n):
        return [1 << e for e in range(n.bit_length())] if powers else range(1, n + 1)
    images, height, width = (min(_up(side) if powers else side, count) for side in sides)
    found = []
    for b in up_to(images):
        for p in up_to(min(height, count // b)):
            most = min(width, count // (b * p))
            even = most if powers else -(-width // -(-width // most))              # the same number of boxes, all of nearly one width
            found += [(b, p, q) for q in {most, even} if _up(b * p * q) == count]
    return found or [(count // height // width, height, width) if powers else (images, height, -(-(count // 2 + 1) // (images * height)))]


def _best_box(problem: Problem, pass_: str, option: dict, boxes) -> dict:
    """option with the box that executes the fewest MACs; ties: long rows, which are neighbours in memory."""
    filled = (dict(option, BLOCK_IMG=b, BLOCK_P=p, BLOCK_Q=q) for b, p, q in boxes)
    return min(filled, key=lambda cfg: (executed_macs(problem, pass_, cfg), -cfg["BLOCK_Q"], cfg["BLOCK_IMG"]))


def candidates(problem: Problem, pass_: str, target: str, precision: str = "tf32") -> list[dict]:
    """Legal, sensible configs, tens of them: every kernel and tile shape, each with the box that executes the fewest MACs.

    precision ("tf32" or "ieee") matters for float32: ieee products do not run on tensor cores and take smaller tiles.
    """
    if direct.is_depthwise(problem):
        return [cfg for cfg in direct.options(problem, pass_, target) if fits(cfg, problem, pass_, target) is None]
    flat = is_flat(problem, pass_)
    options = [*_gather_options(problem, pass_, target, precision, flat), *tma_options(problem, pass_, target, precision)]
    if pass_ == "wgrad" and not flat and problem.r * problem.s > 1 and problem.c < 128 * problem.groups:
        tiles_of_taps = _gather_options(problem, pass_, target, precision, True)    # dy is read once for several taps
        options += [cfg for cfg in tiles_of_taps if cfg["BLOCK_N"] * problem.groups > problem.c]
    options = [cfg for cfg in options if fits(cfg, problem, pass_, target) is None]
    if problem.groups > 1 and options:                        # tiles that are mostly masked: only where none is much better
        executed = [executed_macs(problem, pass_, cfg) for cfg in options]
        most = max((2 if min(problem.c, problem.k) >= 16 * problem.groups else 4) * problem.useful_macs, 1.25 * min(executed))
        options = [cfg for cfg, macs in zip(options, executed) if macs <= most]
    return options


def _gather_options(problem: Problem, pass_: str, target: str, precision: str, flat: bool):
    mma, nbytes = has_mma(problem, precision), DTYPE_BYTES[problem.dtype]
    c, k = problem.c // problem.groups, problem.k // problem.groups
    rows, cols, reduced = _channels(problem, pass_, problem.r * problem.s if flat else 1)
    base = {"kernel": "gather_flat" if flat else "gather", "CLAMP": target.startswith("cuda") and int(target[5:]) >= 100, "num_stages": 3,
            "maxnreg": 255 if target.startswith("cuda") else None}
    # operands whose aligned runs are too short for cp.async (4 bytes) are loaded through registers, an element at a time; flattened or clamped, each
    # run of channels has an address of its own
    scattered = {channels: 1 / gcd(channels, 16 // nbytes) if flat or base["CLAMP"] else gcd(channels, 4) * nbytes < 4 for channels in (c, k)}
    m_scattered = gcd(k, 4) * nbytes < 4 if rows else scattered[c if pass_ == "fprop" else k]
    n_scattered = scattered[c]
    for m, n, warps in TILES if mma else SIMT_TILES:
        if not _suits(m, n, rows, cols, nbytes, _least_channels(target)):
            continue
        most = 512 * (warps if mma else 1)                             # addresses: 16 a thread, without tensor cores 512 a program
        steps = [step for step in (_reduction_steps(pass_, reduced, nbytes) if mma else [16])
                 if max(m * m_scattered, n * n_scattered) * step <= most]
        large = m * n >= 128 * 128                                     # its accumulator leaves few registers: below is what would spill
        if large and pass_ == "wgrad" and (cols % n or rows % m):
            continue
        if large and (pass_ != "wgrad" and cols % n or pass_ == "wgrad" and base["CLAMP"]):
            steps = [step for step in steps if step * nbytes < 128]
        for step in steps[:1 if rows else 2]:
            option = dict(base, BLOCK_N=n, num_warps=warps, SPLIT_K=1, **{"BLOCK_M" if rows else "BLOCK_K": m if rows else step})
            boxes = _boxes(step if rows else m, _map(problem, pass_), powers=large and bool(rows))
            if large and not rows:
                # rows of a thread lie 16 apart: with such sides their offsets are multiples of one value, which the compiler keeps in registers
                boxes = [(b, p, q) for b, p, q in boxes if q != 16 and (p, q) != (2, 8)] or boxes
            option = _best_box(problem, pass_, option, boxes)
            if not rows and (flat or m * n > 128 * 128):               # larger accumulators and a split would spill
                yield option
            else:
                yield from _split(option, problem, pass_, target)


def tma_options(problem: Problem, pass_: str, target: str, precision: str):
    """Sensible configs of the tma kernel, legal or not."""
    if target not in ("cuda:90", "cuda:100") or not has_mma(problem, precision) or is_flat(problem, pass_):
        return
    nbytes = DTYPE_BYTES[problem.dtype]
    specialize = int(target[5:]) // 10 == 10 and not (pass_ == "wgrad" and nbytes == 4)
    rows, cols, reduced = _channels(problem, pass_, 1)
    for m, n, warps in TMA_TILES:
        if not _suits(m, n, rows, cols, nbytes):
            continue
        for step in _reduction_steps(pass_, reduced, nbytes)[:1 if rows else 2]:
            option = {"kernel": "tma", "BLOCK_N": n, "BLOCK_M" if rows else "BLOCK_K": m if rows else step, "WARP_SPECIALIZE": specialize,
                      "num_warps": warps, "num_stages": 3, "maxnreg": None, "SPLIT_K": 1}
            if not rows:
                option["WEIGHT_FIRST"] = n >= 64 and (not specialize or m < 128)       # tcgen05 runs at full rate from 128 rows on
            option = _best_box(problem, pass_, option, _boxes(step if rows else m, _map(problem, pass_), powers=True))
            for cfg in _split(option, problem, pass_, target):
                if rows or m <= 128 or not specialize or stores_boxes(cfg, problem, pass_):          # else the store's addresses would spill
                    yield cfg


def _channels(problem: Problem, pass_: str, taps: int) -> tuple[int | None, int, int | None]:
    """(channels of tile rows, of tile columns, of the reduction): None where these are pixels."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    return {"fprop": (None, k, c * taps), "dgrad": (None, c, k * taps), "wgrad": (k, c * taps, None)}[pass_]


def _map(problem: Problem, pass_: str) -> tuple[int, int, int]:
    """(images, height, width) of the largest map that boxes of the pass cover."""
    axes = problem.axes(pass_)
    return max(problem.n, 1), max((h.out for h, _ in axes), default=1), max((w.out for _, w in axes), default=1)


def _suits(m: int, n: int, rows: int | None, cols: int, nbytes: int, least: int = 16) -> bool:
    """Whether no half of a tile is idle, nor its accumulator too large for wide dtypes. least: the fewest output channels of a tile."""
    def fills(side, count, least):
        return side == least or least < side < 2 * count
    few = least if (rows or cols) <= 8 else 16
    wanted = fills(m, rows, few) and fills(n, cols, 16) if rows else m >= 32 and fills(n, cols, few)
    return wanted and not (nbytes == 4 and m * n > 128 * 128)


def _least_channels(target: str) -> int:
    """Output channels of a tile, at least, in the gather kernels: columns of a matrix product."""
    return 8 if target.startswith("cuda") else 16


def _reduction_steps(pass_: str, reduced: int | None, nbytes: int) -> list[int]:
    """BLOCK_K, or pixels of wgrad's box, the largest first; channels are not padded much."""
    if pass_ == "wgrad":
        return [64, 32, 16] if nbytes == 2 else [32, 16]
    steps = [step for step in ((64, 32) if nbytes == 2 else (32,)) if step < 2 * reduced] + [16]
    least = min(-(-reduced // step) * step for step in steps)
    return [step for step in steps if -(-reduced // step) * step <= 1.1 * least]


def _split(option: dict, problem: Problem, pass_: str, target: str) -> list[dict]:
    """option, and the same with the reduction split so that the programs fill about half of the target's SMs, all and twice: splits of at least eight
    steps each, at most 64 MiB of partial results."""
    c, k, step = problem.c // problem.groups, problem.k // problem.groups, tile(option, pass_)[2]
    result = {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_]
    taps = 1 if pass_ == "wgrad" else problem.r * problem.s
    steps = taps * -(-{"fprop": c, "dgrad": k, "wgrad": problem.n * problem.p * problem.q}[pass_] // step)
    most = min(128, steps // 8, 2**26 // (max(DTYPE_BYTES[problem.dtype], 4) * max(prod(result), 1)))
    programs, sms = max(grid(problem, pass_, option), 1), device_limits(target)[0]
    splits = {min(most, max(2, sms * waves // (2 * programs))) for waves in (1, 2, 4)} if programs < 2 * sms else set()
    return [option] + [dict(option, SPLIT_K=split) for split in sorted(splits) if 1 < split <= most]


def launch_steps(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> tuple[float, float]:
    """(sum, maximum) over tiles of their reduction steps, all splits together."""
    (m, n, step), (h, w) = tile(config, pass_), axes
    images = -(-problem.n // config["BLOCK_IMG"])
    if config["kernel"] == "gather_flat":
        total = executed_macs(problem, pass_, config) / (m * n * step) / max(len(problem.axes(pass_)), 1)
        return total, total * config["SPLIT_K"] / max(tiles(problem, pass_, config, axes), 1)
    rows, cols, reduced = _channels(problem, pass_, 1)
    count = h.steps_out if pass_ == "wgrad" else h.steps, w.steps_out if pass_ == "wgrad" else w.steps
    (h_sum, h_most), (w_sum, w_most) = count[0](config["BLOCK_P"]), count[1](config["BLOCK_Q"])
    if pass_ == "wgrad":
        return images * h_sum * w_sum * -(-rows // m) * -(-cols // n) * problem.groups, images * h_most * w_most
    blocks = -(-reduced // step)
    return images * h_sum * w_sum * blocks * -(-cols // n) * problem.groups, h_most * w_most * blocks


def describe(config: dict) -> str:
    """A config in one word: pixel box, channel tile(s), reduction step or split, warps, stages."""
    box = "x".join(str(config[f"BLOCK_{side}"]) for side in ("IMG", "P", "Q"))
    names = (("m", "BLOCK_M"), ("n", "BLOCK_N"), ("k", "BLOCK_K"), ("cols", "COLS"), ("taps", "TAPS"), ("rows", "ROWS"), ("split", "SPLIT_K"))
    sizes = " ".join(f"{short}{config[name]}" for short, name in names if name in config)
    switches = "".join(f" {name.lower()}" for name in ("CLAMP", "WEIGHT_FIRST", "WARP_SPECIALIZE") if config.get(name))
    return f"box {box} {sizes} warps{config['num_warps']} stages{config['num_stages']}{switches}"


def moved_bytes(problem: Problem, pass_: str, config: dict) -> tuple[int, int]:
    """(bytes from and to memory, bytes that the programs load and store) of a pass without bias, in problem.layout.

    The first counts operands and result once, zeros that are written first, partial sums written and read: what stays where L2 serves every
    re-read. The second counts each element that a lane loads or stores, re-reads in L1 and L2 included; exact for direct kernels, for tiles of
    matrix products an upper bound, since it counts masked elements.
    """
    nbytes, result = DTYPE_BYTES[problem.dtype], {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_]
    partial, split = max(nbytes, 4), config["SPLIT_K"]
    sums = 2 * partial * split * prod(result) if split > 1 or config["kernel"] == "depthwise" and pass_ == "wgrad" else 0
    filled = config["kernel"] == "depthwise" and pass_ == "dgrad" and direct.fill(problem)
    zeros = nbytes * prod(result) if pass_ == "dgrad" and not problem.dgrad_covers and not filled else 0
    memory, programs = problem.bytes + zeros + sums, zeros + sums
    if filled and not problem.dgrad_covers:
        programs += nbytes * (prod(result) - prod(result[:2]) * sum(h.out * w.out for h, w in problem.axes(pass_)))
    for axes in problem.axes(pass_):
        stored = prod(result) if pass_ == "wgrad" else problem.n * axes[0].out * axes[1].out * result[1]
        if config["kernel"] == "depthwise":
            programs += nbytes * (direct.loads(problem, pass_, config, axes) + stored)
        else:
            m, n, step = tile(config, pass_)
            programs += nbytes * (round(launch_steps(problem, pass_, config, axes)[0]) * (m + n) * step + stored)
    return memory, programs


