"""Direct kernels, one channel per group: their tile configurations and the work of each. See config.py, which asks this module."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import gcd, prod

from . import assumed, devices
from .problem import DTYPE_BYTES, Axis, Problem


def is_depthwise(problem: Problem) -> bool:
    """Whether the direct kernels run: one channel per group, and a multiplier that would not fill a tile of a matrix product."""
    return problem.groups == problem.c and 0 < problem.k < 16 * problem.c


def grid_step(axis: Axis) -> int:
    """Distance of the outputs that read the same positions through different taps."""
    return axis.dilation // gcd(axis.stride, axis.dilation)


def fill(problem: Problem) -> tuple[int, int] | None:
    """Rows and columns of dx that dgrad's direct kernel writes per pixel of its residue class, zeros but for the first; None where it cannot."""
    sides = [1 if sum(axis.out for axis in axes) == size else axes[0].out_step if len(axes) == 1 and axes[0].out0 == 0 else 0
             for axes, size in zip(problem.dgrad_axes, (problem.h, problem.w))]
    return tuple(sides) if all(sides) else None


def pixels(config: dict) -> int:
    """Rows of a tile that hold its pixel box, a power of two; of a direct kernel its lanes."""
    return 1 << max(config["BLOCK_IMG"] * config["BLOCK_P"] * config["BLOCK_Q"] - 1, 0).bit_length()


def fits(config: dict, problem: Problem, pass_: str, target: str) -> str | None:
    """`fits` of a direct kernel."""
    rows = ("ROWS",) if pass_ == "wgrad" else ()
    sizes = ("BLOCK_IMG", "BLOCK_P", "BLOCK_Q", "BLOCK_N", "COLS", "TAPS", *rows, "SPLIT_K", "num_warps", "num_stages")
    needed = ("kernel", *sizes, "maxnreg")
    if set(config) != set(needed):
        return f"a {pass_} config of depthwise has exactly the entries {sorted(needed)}, got {sorted(config)}"
    if problem.groups != problem.c:
        return f"depthwise needs one channel per group, got {problem.c} channels in {problem.groups} groups"
    if config["maxnreg"] is not None and (target.startswith("hip") or config["maxnreg"] not in range(24, 256)):
        return f"maxnreg must be None, or on CUDA targets 24 to 255, got {config['maxnreg']!r} for {target}"
    for name in sizes:
        if isinstance(config[name], bool) or not isinstance(config[name], int) or config[name] < 1:
            return f"{name} must be a positive int, got {config[name]!r}"
    for name in ("BLOCK_N", "num_warps"):
        if config[name] & (config[name] - 1):
            return f"{name} must be a power of two, got {config[name]}"
    if pixels(config) > 1024:
        return f"a box has at most 1024 lanes, got {config['BLOCK_IMG']}x{config['BLOCK_P']}x{config['BLOCK_Q']}"
    if pass_ != "wgrad" and config["SPLIT_K"] > 1:
        return f"depthwise does not split {pass_}'s reduction, got SPLIT_K={config['SPLIT_K']}"
    shift = max(w.stride // gcd(w.stride, w.dilation) for _, w in problem.axes(pass_)) if problem.q else 1
    held = registers(config, problem, shift, target)
    if config["num_warps"] > 16 or held > 255:
        return (f"a lane would hold {held} registers with COLS={config['COLS']}, TAPS={config['TAPS']}, num_warps={config['num_warps']} "
                f"(at most 255 registers, 16 warps)")
    if (programs := max((tiles(problem, pass_, config, axes) for axes in problem.axes(pass_)), default=0)) >= 2**31:
        return f"the grid of {programs} programs exceeds 2**31 - 1: use larger tiles"
    return None


def _warp(target: str) -> int:
    """Threads of a warp."""
    return 64 if target.startswith("hip:gfx9") else 32


def registers(config: dict, problem: Problem, shift: int, target: str) -> int:
    """Registers of a thread that hold sums, weights and columns."""
    nbytes = DTYPE_BYTES[problem.dtype]
    per = max(pixels(config) * config["BLOCK_N"] // (_warp(target) * config["num_warps"]), 1) * (2 if nbytes == 8 else 1)
    count = (config["COLS"] - 1) * shift + config["TAPS"]
    sums = config["TAPS"] * config["ROWS"] if "ROWS" in config else config["COLS"]
    return per * (sums + (config["COLS"] if "ROWS" in config else config["TAPS"])) + -(-per * count * min(nbytes, 4) // 4)


@lru_cache(maxsize=16384)
def _lane_boxes(axis: Axis, cols: int, block: int) -> tuple[tuple[int, int], ...]:
    """First and last base output of each box of `block` lanes with `cols` outputs each."""
    step = grid_step(axis)
    run = step * cols
    count = axis.out // run * step + min(axis.out % run, step)
    return tuple((a // step * run + a % step, b // step * run + b % step) for a in range(0, count, block) for b in (min(a + block, count) - 1,))


@lru_cache(maxsize=16384)
def _row_walk(axis: Axis, block: int) -> tuple[int, int]:
    """(boxes of rows, live filter rows summed over them): their rows lie on the grid."""
    step, firsts = grid_step(axis), _lane_boxes(axis, block, 1)
    spans = [axis.live(first, first + min(block - 1, (axis.out - 1 - first) // step) * step) for first, _ in firsts]
    return len(firsts), sum(hi - lo for lo, hi in spans)


@lru_cache(maxsize=16384)
def _column_walk(axis: Axis, cols: int, taps: int, block: int) -> tuple[int, int, int]:
    """(boxes of lanes along a row, live columns and live (column, output) pairs summed over them and over the chunks of `taps` taps)."""
    shift = axis.stride // gcd(axis.stride, axis.dilation)
    count, boxes, columns, products = (cols - 1) * shift + taps, _lane_boxes(axis, cols, block), 0, 0
    pairs = [sum(0 <= u - j * shift < taps for j in range(cols)) for u in range(count)]
    for s0 in range(0, axis.taps, taps):
        chunk = replace(axis, taps=count, offset=axis.offset + s0 * axis.dilation)
        for lo, hi in (chunk.live(*box) for box in boxes):
            columns += hi - lo
            products += sum(pairs[lo:hi])
    return len(boxes), columns, products


@lru_cache(maxsize=16384)
def _tap_row_walk(axis: Axis, block: int, rows: int) -> tuple[int, int]:
    """(boxes, live (box, filter row) pairs) of wgrad's programs, each of `rows` filter rows, over `block` adjacent rows of dy."""
    boxes = live = 0
    for r0 in range(0, axis.taps, rows):
        group = range(r0, min(r0 + rows, axis.taps))
        first = axis.live_outputs(group[-1])[0]
        starts = range(first, first + axis.live_out_any(group[0], group[-1]), block)
        boxes += len(starts)
        live += sum(p < hi and p + block > lo for p in starts for lo, hi in map(axis.live_outputs, group))
    return boxes, live


def tiles(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> int:
    (h, w), out = axes, problem.c if pass_ == "dgrad" else problem.k
    channels = -(-out // config["BLOCK_N"])
    if pass_ == "wgrad":
        return channels * -(-h.taps // config["ROWS"]) * -(-w.taps // config["TAPS"]) * config["SPLIT_K"]
    images = -(-problem.n // config["BLOCK_IMG"])
    return channels * images * len(_lane_boxes(h, config["BLOCK_P"], 1)) * len(_lane_boxes(w, config["COLS"], config["BLOCK_Q"]))


def walk(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> tuple[int, int, int, int]:
    """(multiply-accumulates, live columns, walked columns, iterations) of a launch, the first over all lanes and channels, the others per tile."""
    (h, w), out = axes, problem.c if pass_ == "dgrad" else problem.k
    tiles_n, images, chunks = -(-out // config["BLOCK_N"]), -(-problem.n // config["BLOCK_IMG"]), -(-w.taps // config["TAPS"])
    boxes, columns, products = _column_walk(w, config["COLS"], config["TAPS"], config["BLOCK_Q"])
    count = (config["COLS"] - 1) * (w.stride // gcd(w.stride, w.dilation)) + config["TAPS"]
    if pass_ == "wgrad":
        iterations, rows = _tap_row_walk(h, config["BLOCK_P"], config["ROWS"])
    else:
        rows = iterations = _row_walk(h, config["BLOCK_P"])[1] * (problem.k // problem.c if pass_ == "dgrad" else 1)
    all_tiles = images * tiles_n
    return (all_tiles * rows * products * pixels(config) * config["BLOCK_N"], all_tiles * rows * columns, all_tiles * rows * boxes * chunks * count,
            all_tiles * iterations * boxes * chunks)


def clocks(problem: Problem, pass_: str, config: dict, device: devices.Device) -> dict[str, float]:
    """Clocks of a pass's launches by what takes them: issue and l2 alone, waves with the idle SMs of both, dram. From static counts."""
    nbytes, warps, sms, target = DTYPE_BYTES[problem.dtype], config["num_warps"], device.sms, device.target
    per = max(pixels(config) * config["BLOCK_N"] / (_warp(target) * warps), 1)
    wide = gcd(problem.c, problem.k, 16 // nbytes) if problem.layout == "nhwc" and problem.k == problem.c else 1
    moves = max(per / wide, 1)
    is_wgrad = pass_ == "wgrad"
    parts = dict(issue=0.0, l2=0.0, waves=0.0)
    for axes in problem.axes(pass_):
        macs, live, walked, iterations = walk(problem, pass_, config, axes)
        programs = max(tiles(problem, pass_, config, axes), 1)
        shift = axes[1].stride // gcd(axes[1].stride, axes[1].dilation)
        move = moves * assumed.DIRECT_ADDRESS                             # of one element of every thread
        issue = macs / _warp(target) + warps * (live * (per * assumed.DIRECT_COLUMN + 6) + walked * move + programs * assumed.DIRECT_PROGRAM)
        if is_wgrad:
            issue += warps * iterations * (config["COLS"] * (per + move) + assumed.DIRECT_WGRAD_ITERATION)
            issue += warps * programs * config["TAPS"] * config["ROWS"] * (per * 12 + 20)
        else:
            issue += warps * iterations * (config["TAPS"] * per * assumed.DIRECT_WEIGHT + assumed.DIRECT_ITERATION)
            issue += warps * programs * config["COLS"] * (per + move)
        resident = max(1, min(65536 // (_warp(target) * warps * min(registers(config, problem, shift, target) + 50, 255)), 32))
        slots = sms * resident
        waves = -(-programs // slots) * slots / programs if programs > slots else -(-programs // sms) * sms / programs
        unfilled = max(1.0, assumed.BUSY_WARPS / (min(resident, programs / sms) * warps))
        rows_read = (config["BLOCK_P"] + axes[0].taps - 1) / config["BLOCK_P"] if not is_wgrad else axes[0].taps / config["ROWS"] + 1
        halo = 1 + (axes[1].taps - 1) * min(grid_step(axes[1]), config["BLOCK_Q"]) / (config["BLOCK_Q"] * config["COLS"])
        moved = problem.n * axes[0].out * axes[1].out * problem.k * nbytes * (1 + rows_read * halo)
        issue, l2 = issue / (sms * 4 * assumed.ISSUED), moved / (sms * assumed.DIRECT_L2 * device.l2_clock)
        waves = max(issue * waves, l2, assumed.DIRECT_LEAST) * unfilled
        parts = dict(issue=parts["issue"] + issue, l2=parts["l2"] + l2, waves=parts["waves"] + waves)
    dram = problem.bytes / (device.dram * assumed.DRAM / device.clock)
    if is_wgrad:
        dram += 8 * config["SPLIT_K"] * prod(problem.w_shape) / (sms * assumed.DIRECT_L2 * device.l2_clock)
    return parts | {"dram": dram}


def cost(problem: Problem, pass_: str, config: dict, target: str) -> float:
    """Orders the boxes of one kernel: the slower of its waves and of memory, and some of the other, which never overlaps fully."""
    parts = clocks(problem, pass_, config, devices.of_target(target))
    return max(parts["waves"], parts["dram"]) + assumed.OVERLAP * min(parts["waves"], parts["dram"])


def options(problem: Problem, pass_: str, target: str):
    """Boxes of lanes that fill their warps with vectors of 16 bytes along the contiguous axis, as many outputs per lane as its grid has."""
    nbytes, is_wgrad = DTYPE_BYTES[problem.dtype], pass_ == "wgrad"
    axes = problem.axes(pass_)
    if not axes:
        return
    h, w = max(axes, key=lambda hw: (hw[0].out * hw[1].out, hw[1].taps))
    shift, out = w.stride // gcd(w.stride, w.dilation), problem.c if pass_ == "dgrad" else problem.k
    vector, least = (16 // nbytes, 32 // nbytes) if problem.layout == "nhwc" else (1, 1)        # a sector of L2 is 32 bytes
    sides = (max(problem.n, 1), h.out if is_wgrad else -(-h.out // grid_step(h)), 0)
    unrolled, columns = (8, 9) if target.startswith("hip") else (11, 64)       # masks of more columns would spill scalar registers
    most = -(-w.out // grid_step(w)) if shift < w.taps else 1                 # outputs of a lane that share columns
    for n in (128, 64, 32, 16, 8, 4, 1) if problem.layout == "nhwc" else (1,):
        if n > least and n >= 2 * out or n < least:
            continue
        for warps, cols in product((4, 2, 1), sorted({-(-most // -(-most // cols)) for cols in (2, 4, 6, 8)} | {1})):
            lanes, anchors = _warp(target) * warps * vector // n, len(_lane_boxes(w, cols, 1))
            for taps, rows in _unrolled(h.taps, w.taps, unrolled) if is_wgrad else [(min(w.taps, unrolled), 1)]:
                if not lanes or (cols - 1) * shift + taps > columns:
                    continue
                option = dict(kernel="depthwise", BLOCK_N=n, COLS=cols, TAPS=taps, SPLIT_K=1, num_warps=warps, num_stages=1,
                              maxnreg=255 if target.startswith("cuda") else None)
                if is_wgrad:
                    option["ROWS"] = rows
                boxes = [dict(option, BLOCK_IMG=b, BLOCK_P=p, BLOCK_Q=q) for b, p, q in _lane_shapes(lanes, sides[0], sides[1], anchors)]
                if registers(boxes[0], problem, shift, target) <= (170 if is_wgrad else 180):
                    filled = (split(box, problem, target) for box in boxes) if is_wgrad else boxes
                    yield min(filled, key=lambda cfg: cost(problem, pass_, cfg, target))


def _lane_shapes(count: int, images: int, rows: int, anchors: int) -> list[tuple[int, int, int]]:
    """Boxes of `count` lanes, or of as many as there are: all of nearly one size along each side."""
    def even(size, most):
        return -(-size // -(-size // max(min(size, most), 1)))
    shapes = set()
    for q in {even(anchors, count >> e) for e in range(count.bit_length())}:
        for p in {even(rows, count // q >> e) for e in range((count // q).bit_length())}:
            shapes.add((even(images, count // (p * q)), p, q))
    full = [shape for shape in shapes if 2 * prod(shape) > count]
    return full or [(count // 2 // (rows * anchors) + 1, rows, anchors)]


def _unrolled(r: int, s: int, most: int) -> list[tuple[int, int]]:
    """(TAPS, ROWS) whose sums stay in registers."""
    taps = s if s <= most else 8
    return [(taps, rows) for rows in (1, 2, 3) if rows <= r and taps * rows <= 11]


def split(option: dict, problem: Problem, target: str) -> dict:
    """option with shares of the boxes of dy for about four programs of four warps per SM: at most one box each, 64 MiB of partial results."""
    h, w = problem.fprop_axes
    boxes = -(-max(problem.n, 1) // option["BLOCK_IMG"]) * -(-h.out // option["BLOCK_P"]) * len(_lane_boxes(w, option["COLS"], option["BLOCK_Q"]))
    most = min(boxes, 2**26 // (max(DTYPE_BYTES[problem.dtype], 4) * prod(problem.w_shape)))
    shares = max(1, min(16 * devices.of_target(target).sms // (option["num_warps"] * tiles(problem, "wgrad", option, (h, w))), most))
    return dict(option, SPLIT_K=-(-boxes // -(-boxes // shares)))


def loads(problem: Problem, pass_: str, config: dict, axes: tuple[Axis, Axis]) -> int:
    """Elements of both operands that the lanes of a launch load."""
    (h, w), taps, cols = axes, config["TAPS"], config["COLS"]
    count = (cols - 1) * (w.stride // gcd(w.stride, w.dilation)) + taps
    columns = 0                                                # in the image, over the lanes along a row
    for s0 in range(0, w.taps, taps):
        chunk = replace(w, taps=count, offset=w.offset + s0 * w.dilation)
        columns += sum(hi - lo for lo, hi in (chunk.live(q, q) for q, _ in _lane_boxes(w, cols, 1)))
    source = problem.n * h.useful * columns * problem.k
    if pass_ == "wgrad":
        groups = [(r0, min(r0 + config["ROWS"], h.taps) - 1) for r0 in range(0, h.taps, config["ROWS"])]
        return source + problem.n * sum(h.live_out_any(*group) for group in groups) * w.out * problem.k * -(-w.taps // taps)
    boxes = -(-problem.n // config["BLOCK_IMG"]) * len(_lane_boxes(w, cols, config["BLOCK_Q"]))
    return source + boxes * _row_walk(h, config["BLOCK_P"])[1] * pixels(config) * problem.k * w.taps
