"""Direct kernels for one channel per group, without matrix products: kernels/depthwise.py.

The box BLOCK_IMG x BLOCK_P x BLOCK_Q counts lanes, each with COLS outputs along its row; BLOCK_N
channels; TAPS filter columns at a time, in wgrad of ROWS filter rows. SPLIT_K is wgrad's alone.
Figures of many configs are arrays, as in gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import gcd, prod
from typing import Any

import numpy as np

from .. import assumed, devices
from ..branches import Branches
from ..devices import Device
from ..problem import DTYPE_BYTES, Axis, Problem
from .base import (
    UNITS,
    Config,
    Family,
    Launch,
    Prediction,
    accumulator,
    aligned,
    bad_maxnreg,
    branch_axes,
    branch_filters,
    branch_geometry,
    branch_sizes,
    columns,
    elements,
    filters,
    heaviest_first,
    launch,
    no_power_of_two,
    not_positive,
    pixels,
    result_shape,
    steps,
    strides,
)


@dataclass(frozen=True)
class Correlation(Config):
    """fprop and dgrad."""

    BLOCK_IMG: int
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_N: int
    COLS: int
    TAPS: int


@dataclass(frozen=True)
class Reduction(Correlation):
    """wgrad."""

    ROWS: int


def is_depthwise(problem: Problem) -> bool:
    """Whether the direct kernels run: one channel per group, and a multiplier that would not fill a
    tile of a matrix product."""
    return problem.groups == problem.c and 0 < problem.k < 16 * problem.c


def grid_step(axis: Axis) -> int:
    """Distance of the outputs that read the same positions through different taps."""
    return axis.dilation // gcd(axis.stride, axis.dilation)


def shift_of(axis: Axis) -> int:
    """Columns between neighbouring outputs of a lane."""
    return axis.stride // gcd(axis.stride, axis.dilation)


def fill(problem: Problem) -> tuple[int, int] | None:
    """Rows and columns of dx that dgrad's direct kernel writes per pixel of its residue class,
    zeros but for the first; None where it cannot."""
    sides = [
        1
        if sum(axis.out for axis in axes) == size
        else axes[0].out_step
        if len(axes) == 1 and axes[0].out0 == 0
        else 0
        for axes, size in zip(problem.dgrad_axes, (problem.h, problem.w))
    ]
    return (sides[0], sides[1]) if all(sides) else None


def warp(target: str) -> int:
    """Threads of a warp."""
    return 64 if target.startswith("hip:gfx9") else 32


# ---- lanes of an axis: anchor a of `cols` outputs has its first at a // step * step * cols + a %
# step, the others `step` apart
@lru_cache(maxsize=16384)
def anchors(axis: Axis, cols: int) -> int:
    """How many lanes with `cols` outputs each there are along an axis."""
    run = grid_step(axis) * cols
    return axis.out // run * grid_step(axis) + min(axis.out % run, grid_step(axis))


def anchors_until(axis: Axis, cols: int, output: np.ndarray) -> np.ndarray:
    """Lanes whose first output is at most `output` (an array)."""
    step, run = grid_step(axis), grid_step(axis) * cols
    return np.where(output < 0, 0, output // run * step + np.minimum(output % run, step - 1) + 1)


def spans_of(axis: Axis, count: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) for taps or columns first .. first + count - 1: outputs that are at least
    `least` and at most `most` read the image through them."""
    shifts = axis.offset + (first + np.arange(count)) * axis.dilation
    return np.maximum(-(shifts // axis.stride), 0), np.minimum(
        (axis.size - 1 - shifts) // axis.stride, axis.out - 1
    )


@lru_cache(maxsize=16384)
def row_walk(axis: Axis, block: int) -> tuple[int, int]:
    """(boxes of `block` rows, live filter rows summed over them): their rows lie on the grid."""
    step, count = grid_step(axis), anchors(axis, block)
    a = np.arange(count)
    first = a // step * (step * block) + a % step
    last = first + np.minimum(block - 1, (axis.out - 1 - first) // step) * step
    least, most = spans_of(axis, axis.taps, 0)
    return count, int(((last[:, None] >= least) & (first[:, None] <= most)).sum())


@lru_cache(maxsize=16384)
def column_walk(
    axis: Axis, cols: int, taps: int, blocks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For boxes of each of `blocks` lanes along a row: (boxes, live columns and live (column,
    output) pairs, summed over boxes and over the chunks of `taps` taps)."""
    count, total, step, run = (
        (cols - 1) * shift_of(axis) + taps,
        anchors(axis, cols),
        grid_step(axis),
        grid_step(axis) * cols,
    )
    sizes, offsets = np.array(blocks)[:, None], np.arange(count)
    found = -(-total // sizes)
    pairs = sum(
        (0 <= offsets - j * shift_of(axis)) & (offsets - j * shift_of(axis) < taps)
        for j in range(cols)
    )
    end = total - 1
    # first output of the last lane
    final = end // step * run + end % step
    columns_, products = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
    for s0 in range(0, axis.taps, taps):
        shifts = axis.offset + (s0 + offsets) * axis.dilation
        least, most = -(shifts // axis.stride), (axis.size - 1 - shifts) // axis.stride
        # boxes that begin at an output of at most `most`, without those whose last lane lies before
        # `least`
        begun = np.where(
            most < 0, 0, (anchors_until(axis, cols, np.minimum(most, final)) - 1) // sizes + 1
        )
        over = np.where(least > final, found, anchors_until(axis, cols, least - 1) // sizes)
        live = np.maximum(begun - over, 0)
        columns_ += live.sum(1)
        products += (live * pairs).sum(1)
    return found[:, 0], columns_, products


@lru_cache(maxsize=16384)
def tap_row_walk(axis: Axis, block: int, rows: int) -> tuple[int, int]:
    """(boxes, live (box, filter row) pairs) of wgrad's programs, each of `rows` filter rows, over
    `block` adjacent rows of dy."""
    boxes, live, spans = 0, 0, live_rows(axis)
    for r0 in range(0, axis.taps, rows):
        group = spans[r0 : r0 + rows]
        # larger taps begin and end earlier
        first, end = group[-1][0], group[0][1]
        if end <= first:
            continue
        count = -(-(end - first) // block)
        boxes += count
        for lo, hi in group:
            last = min((hi - 1 - first) // block, count - 1)
            live += max(last - max(lo - first, 0) // block + 1, 0)
    return boxes, live


@lru_cache(maxsize=16384)
def live_rows(axis: Axis) -> list[tuple[int, int]]:
    """Of each tap the outputs that read the image through it, as `Axis.live_outputs` says it."""
    return [axis.live_outputs(r) for r in range(axis.taps)]


class Depthwise(Family):
    kernels: tuple[str, ...] = ("depthwise",)

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        # in the result's format neighbours read and write neighbours
        return problem.layout, 1

    def has_partials(self, config: Config, pass_: str) -> bool:
        return pass_ == "wgrad"

    def covers(self, problem: Problem, pass_: str) -> bool:
        return pass_ != "dgrad" or problem.dgrad_covers or fill(problem) is not None

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        if problem.groups != problem.c:
            return f"{config.kernel} needs one channel per group, got {problem.c} channels in {problem.groups} groups"
        sizes = [name for name in config.names() if name not in ("kernel", "maxnreg")]
        reason = (
            bad_maxnreg(config, target)
            or not_positive(config, sizes)
            or no_power_of_two(config, ("BLOCK_N", "num_warps"))
        )
        if reason:
            return reason
        if pixels(config) > 1024:
            return f"a box has at most 1024 lanes, got {config.BLOCK_IMG}x{config.BLOCK_P}x{config.BLOCK_Q}"
        if pass_ != "wgrad" and config.SPLIT_K > 1:
            return (
                f"{config.kernel} does not split {pass_}'s reduction, got SPLIT_K={config.SPLIT_K}"
            )
        shift = max((shift_of(w) for _, w in problem.axes(pass_)), default=1) if problem.q else 1
        held = int(registers(vars(config), pixels(config), problem, shift, target))
        if config.num_warps > 16 or held > 255:
            return (
                f"a lane would hold {held} registers with COLS={config.COLS}, TAPS={config.TAPS}, num_warps={config.num_warps} "
                f"(at most 255 registers, 16 warps)"
            )
        if (
            programs := max(
                (self.programs(problem, pass_, config, axes) for axes in problem.axes(pass_)),
                default=0,
            )
        ) >= 2**31:
            return f"the grid of {programs} programs exceeds 2**31 - 1: use larger tiles"
        return None

    # ---- candidates
    def options(self, problem: Problem, pass_: str, target: str, precision: str) -> list[Config]:
        """Boxes of lanes that fill their warps with vectors of 16 bytes along the contiguous axis,
        as many outputs per lane as its grid has; of the boxes of one kernel the one that is
        predicted to be the fastest."""
        seconds, config = self.search(problem, pass_, devices.of_target(target), precision)
        return [config(i) for i in range(len(seconds))]

    def search(
        self, problem: Problem, pass_: str, device: Device, precision: str
    ) -> tuple[np.ndarray, Callable[[int], Config]]:
        kernels, shapes = (
            self._kernels(problem, pass_, device.target)
            if is_depthwise(problem) and problem.axes(pass_)
            else ({}, [])
        )
        if not shapes:
            return np.zeros(0), [].__getitem__
        counts = [len(boxes) for boxes in shapes]
        c = {name: np.repeat(values, counts) for name, values in kernels.items()}
        c |= zip(("BLOCK_IMG", "BLOCK_P", "BLOCK_Q"), np.concatenate(shapes).T)
        c["SPLIT_K"] = (
            self._shares(problem, c, device) if pass_ == "wgrad" else np.ones_like(c["COLS"])
        )
        seconds = self._times(problem, pass_, c, device)["seconds"]
        # the first of the fastest boxes of each kernel
        begins = np.cumsum([0, *counts[:-1]])
        fastest = np.repeat(np.minimum.reduceat(seconds, begins), counts)
        least = np.flatnonzero(seconds == fastest)
        picks = least[np.searchsorted(least, begins)]
        fixed, build = (
            dict(
                kernel="depthwise",
                num_stages=1,
                maxnreg=255 if device.target.startswith("cuda") else None,
            ),
            self.config_class(pass_),
        )
        return seconds[picks], lambda i: build(
            **fixed, **{name: int(values[picks[i]]) for name, values in c.items()}
        )

    def _kernels(
        self, problem: Problem, pass_: str, target: str
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """(what kernels are compiled for, by field, and for each the boxes that it may have)."""
        nbytes, is_wgrad = DTYPE_BYTES[problem.dtype], pass_ == "wgrad"
        h, w = max(problem.axes(pass_), key=lambda hw: (hw[0].out * hw[1].out, hw[1].taps))
        shift, out = shift_of(w), problem.c if pass_ == "dgrad" else problem.k
        # a sector of L2 is 32 bytes
        vector, least = (16 // nbytes, 32 // nbytes) if problem.layout == "nhwc" else (1, 1)
        sizes = [
            n
            for n in ((128, 64, 32, 16, 8, 4, 1) if problem.layout == "nhwc" else (1,))
            if n == least or least < n < 2 * out
        ]
        # masks of more columns would spill scalar registers
        unrolled, most_columns = (8, 9) if target.startswith("hip") else (11, 64)
        # outputs of a lane that share columns
        most = -(-w.out // grid_step(w)) if shift < w.taps else 1
        counts = sorted({-(-most // -(-most // cols)) for cols in (2, 4, 6, 8)} | {1})
        unrolls = (
            unrolled_taps(h.taps, w.taps, unrolled) if is_wgrad else [(min(w.taps, unrolled), 1)]
        )
        names = ("BLOCK_N", "num_warps", "COLS", "TAPS", "ROWS")[: 5 if is_wgrad else 4]
        c = dict(zip(names, products_of(tuple(sizes), tuple(counts), tuple(unrolls))))
        lanes = warp(target) * c["num_warps"] * vector // c["BLOCK_N"]
        kept = (lanes > 0) & ((c["COLS"] - 1) * shift + c["TAPS"] <= most_columns)
        kept &= registers(c, lanes, problem, shift, target) <= (170 if is_wgrad else 180)
        c, rows = (
            {name: values[kept] for name, values in c.items()},
            h.out if is_wgrad else -(-h.out // grid_step(h)),
        )
        along = {cols: anchors(w, cols) for cols in counts}
        return c, [
            lane_shapes(count, max(problem.n, 1), rows, along[cols])
            for count, cols in zip(lanes[kept].tolist(), c["COLS"].tolist())
        ]

    def _shares(self, problem: Problem, c: dict, device: Device) -> np.ndarray:
        """Of wgrad the shares of the boxes of dy for about four programs of four warps per SM: at
        most one box each, 64 MiB of partial results."""
        (h, w), most = (
            problem.fprop_axes,
            2**26 // (max(DTYPE_BYTES[problem.dtype], 4) * prod(problem.w_shape)),
        )
        lanes = np.array([anchors(w, cols) for cols in range(1, c["COLS"].max() + 1)])[
            c["COLS"] - 1
        ]
        boxes = (
            -(-max(problem.n, 1) // c["BLOCK_IMG"])
            * -(-h.out // c["BLOCK_P"])
            * -(-lanes // c["BLOCK_Q"])
        )
        programs = -(-problem.k // c["BLOCK_N"]) * -(-h.taps // c["ROWS"]) * -(-w.taps // c["TAPS"])
        shares = np.maximum(
            1, np.minimum(16 * device.sms // (c["num_warps"] * programs), np.minimum(boxes, most))
        )
        return -(-boxes // -(-boxes // shares))

    # ---- work
    def tile(self, config: Config, pass_: str) -> tuple[int, int, int]:
        """Outputs, channels and 1."""
        return pixels(config) * config.COLS, config.BLOCK_N, 1

    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        (h, w), out = axes, problem.c if pass_ == "dgrad" else problem.k
        if pass_ == "wgrad":
            return (
                -(-out // config.BLOCK_N)
                * -(-h.taps // config.ROWS)
                * -(-w.taps // config.TAPS)
                * config.SPLIT_K
            )
        return (
            -(-out // config.BLOCK_N)
            * -(-problem.n // config.BLOCK_IMG)
            * anchors(h, config.BLOCK_P)
            * -(-anchors(w, config.COLS) // config.BLOCK_Q)
        )

    def _walk(
        self, problem: Problem, pass_: str, c: dict, axes: tuple[Axis, Axis]
    ) -> tuple[np.ndarray, ...]:
        """(multiply-accumulates over all lanes and channels, live columns, walked columns,
        iterations, programs) of a launch."""
        (h, w), out = axes, problem.c if pass_ == "dgrad" else problem.k
        n_tiles, images, chunks = (
            -(-out // c["BLOCK_N"]),
            -(-problem.n // c["BLOCK_IMG"]),
            -(-w.taps // c["TAPS"]),
        )
        found = boxes, live, products = np.zeros((3, len(n_tiles)), np.int64)
        base = int(c["TAPS"].max()) + 1
        pairs, which = distinct(c["COLS"] * base + c["TAPS"])
        for i, pair in enumerate(pairs.tolist()):
            some = which == i
            sizes, at = distinct(c["BLOCK_Q"][some])
            walk = np.array(column_walk(w, *divmod(pair, base), tuple(sizes.tolist())))
            found[:, some] = walk[:, at]
        count = (c["COLS"] - 1) * shift_of(w) + c["TAPS"]
        if pass_ == "wgrad":
            both, at = distinct(c["BLOCK_P"] * (h.taps + 1) + np.minimum(c["ROWS"], h.taps))
            iterations, rows = np.array(
                [tap_row_walk(h, *divmod(pair, h.taps + 1)) for pair in both.tolist()]
            ).T[:, at]
            programs = n_tiles * -(-h.taps // c["ROWS"]) * chunks * c["SPLIT_K"]
        else:
            sizes, at = distinct(c["BLOCK_P"])
            row_boxes, rows = np.array([row_walk(h, block) for block in sizes.tolist()]).T[:, at]
            rows = iterations = rows * (problem.k // problem.c if pass_ == "dgrad" else 1)
            programs = n_tiles * images * row_boxes * boxes
        tiles = images * n_tiles
        return (
            tiles * rows * products * lanes_of(c) * c["BLOCK_N"],
            tiles * rows * live,
            tiles * rows * boxes * chunks * count,
            tiles * iterations * boxes * chunks,
            programs,
        )

    def executed_macs(self, problem: Problem, pass_: str, config: Config) -> int:
        return sum(
            int(self._walk(problem, pass_, columns([config]), axes)[0][0])
            for axes in problem.axes(pass_)
        )

    def requested_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        """Exact. Zeros that dgrad writes between the pixels of its residue class are counted."""
        nbytes, result, total = DTYPE_BYTES[problem.dtype], result_shape(problem, pass_), 0
        if pass_ == "dgrad" and fill(problem) and not problem.dgrad_covers:
            total += prod(result) - prod(result[:2]) * sum(
                h.out * w.out for h, w in problem.axes(pass_)
            )
        for axes in problem.axes(pass_):
            stored = (
                prod(result)
                if pass_ == "wgrad"
                else problem.n * axes[0].out * axes[1].out * result[1]
            )
            total += loads(problem, pass_, config, axes) + stored
        return total * nbytes

    # ---- time
    def seconds(
        self,
        problem: Problem,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        return self._times(problem, pass_, columns(configs), device)["seconds"]

    def _work(
        self, problem: Problem, pass_: str, c: dict, axes: tuple[Axis, Axis], device: Device
    ) -> tuple[np.ndarray, ...]:
        """Of a launch (clocks of all SMs to issue its instructions, and to bring its operands from L2,
        programs, how many of them an SM holds). From static counts."""
        nbytes, is_wgrad = DTYPE_BYTES[problem.dtype], pass_ == "wgrad"
        lanes, warps, sms, threads = lanes_of(c), c["num_warps"], device.sms, warp(device.target)
        per = np.maximum(lanes * c["BLOCK_N"] / (threads * warps), 1)
        wide = (
            gcd(problem.c, problem.k, 16 // nbytes)
            if problem.layout == "nhwc" and problem.k == problem.c
            else 1
        )
        # of one element of every thread
        move = np.maximum(per / wide, 1) * assumed.DIRECT_ADDRESS
        macs, live, walked, iterations, programs = self._walk(problem, pass_, c, axes)
        programs = np.maximum(programs, 1)
        slots = macs / threads + warps * (
            live * (per * assumed.DIRECT_COLUMN + assumed.DIRECT_COLUMN_MASK)
            + walked * move
            + programs * assumed.DIRECT_PROGRAM
        )
        if is_wgrad:
            slots = slots + warps * iterations * (
                c["COLS"] * (per + move) + assumed.DIRECT_WGRAD_ITERATION
            )
            slots = slots + warps * programs * c["TAPS"] * c["ROWS"] * (
                per * assumed.DIRECT_SUM + assumed.DIRECT_SUM_STORE
            )
        else:
            slots = slots + warps * iterations * (
                c["TAPS"] * per * assumed.DIRECT_WEIGHT + assumed.DIRECT_ITERATION
            )
            slots = slots + warps * programs * c["COLS"] * (per + move)
        rows_read = (
            axes[0].taps / c["ROWS"] + 1
            if is_wgrad
            else (c["BLOCK_P"] + axes[0].taps - 1) / c["BLOCK_P"]
        )
        halo = 1 + (axes[1].taps - 1) * np.minimum(grid_step(axes[1]), c["BLOCK_Q"]) / (
            c["BLOCK_Q"] * c["COLS"]
        )
        moved = problem.n * axes[0].out * axes[1].out * problem.k * nbytes * (1 + rows_read * halo)
        held = np.minimum(
            registers(c, lanes, problem, shift_of(axes[1]), device.target)
            + assumed.DIRECT_REGISTERS,
            255,
        )
        resident = np.maximum(1, np.minimum(65536 // (threads * warps * held).astype(np.int64), 32))
        return (
            slots / (sms * 4 * assumed.ISSUED),
            moved / (sms * assumed.DIRECT_L2 * device.l2_clock),
            programs,
            resident,
        )

    def _waves(self, slots, moved, programs, resident, warps, sms: int) -> np.ndarray:
        """Clocks of a launch: of issue and L2 the longer, with the SMs that idle."""
        full = sms * resident
        filled = np.where(
            programs > full,
            -(-programs // full) * full / programs,
            -(-programs // sms) * sms / programs,
        )
        unfilled = np.maximum(
            1.0, assumed.BUSY_WARPS / (np.minimum(resident, programs / sms) * warps)
        )
        least = np.full_like(moved, assumed.DIRECT_LEAST)
        return np.maximum.reduce([slots * filled, moved, least]) * unfilled

    def _times(self, problem: Problem, pass_: str, c: dict, device: Device) -> dict:
        """Seconds, whole and by part: issue and l2 alone, waves with the idle SMs of both, dram,
        launches."""
        issue: Any = 0.0
        l2: Any = 0.0
        waves: Any = 0.0
        for axes in problem.axes(pass_):
            slots, moved, programs, resident = self._work(problem, pass_, c, axes, device)
            issue, l2 = issue + slots, l2 + moved
            waves = waves + self._waves(
                slots, moved, programs, resident, c["num_warps"], device.sms
            )
        launches = (2 if pass_ == "wgrad" else 1) * len(problem.axes(pass_)) + (
            not self.covers(problem, pass_)
        )
        weights = prod(problem.w_shape) if pass_ == "wgrad" else 0
        return self._sum(issue, l2, waves, problem.bytes, weights, launches, c, device)

    def _sum(self, issue, l2, waves, nbytes, weights, launches, c: dict, device: Device) -> dict:
        """`_times` of clocks, compulsory bytes and (wgrad) elements of filters."""
        dram = nbytes / (device.dram * assumed.DRAM / device.clock)
        if weights:
            dram = dram + 8 * c["SPLIT_K"] * weights / (
                device.sms * assumed.DIRECT_L2 * device.l2_clock
            )
        parts = {
            name: value / (device.clock * 1e9)
            for name, value in dict(issue=issue, l2=l2, waves=waves, dram=dram).items()
        }
        launching = launches * assumed.LAUNCH
        # of waves and memory the slower, and some of the other, which never overlaps fully
        seconds = (
            np.maximum(parts["waves"], parts["dram"])
            + assumed.OVERLAP * np.minimum(parts["waves"], parts["dram"])
            + launching
        )
        if weights:
            seconds = seconds * np.where(c["ROWS"] > 1, assumed.DIRECT_ROWS, 1)
        return parts | dict(launches=launching, seconds=seconds)

    def predict(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> Prediction:
        t = {
            name: float(np.ravel(value)[0])
            for name, value in self._times(problem, pass_, columns([config]), device).items()
        }
        parts = {
            UNITS["issue"]: t["issue"],
            UNITS["l2"]: t["l2"],
            "waves of programs": t["waves"],
            "DRAM bandwidth": t["dram"],
            "launches": t["launches"],
        }
        if t["launches"] > t["seconds"] / 2:
            limiter = "launches"
        elif t["dram"] >= t["waves"]:
            limiter = "DRAM bandwidth"
        else:
            limiter = (
                UNITS["issue" if t["issue"] >= t["l2"] else "l2"]
                if max(t["issue"], t["l2"]) >= 0.6 * t["waves"]
                else "too few programs"
            )
        return Prediction(t["seconds"], limiter, parts)

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        return (
            "one channel per group: a direct kernel, since a matrix product would be mostly zeros"
        )

    # ---- launches
    def plan(
        self, p: Problem, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        """x, dy and the result are all in p.layout."""
        mult, nhwc = p.k // p.c, p.layout == "nhwc"
        align = aligned(p, p.c, config.BLOCK_N) if nhwc and mult == 1 else 1
        constexprs = config.constexprs() | dict(
            PIXELS=pixels(config),
            MULT=mult,
            CHANNELS_LAST=nhwc,
            ALIGN=align,
            ACC=accumulator(p),
            INT64=elements(p) >= 2**31,
        )
        source, result = (p.y_shape, p.x_shape) if pass_ == "dgrad" else (p.x_shape, p.y_shape)
        steps_of = stride_scalars(source, result, p.layout, align)
        found = []
        for h, w in p.axes(pass_):
            scalars = dict(
                N=p.n,
                P=h.out,
                Q=w.out,
                K=result[1],
                R=h.taps,
                stride_h=h.stride,
                stride_w=w.stride,
                **steps(h, w),
                grid_w=grid_step(w),
                **steps_of,
            )
            sizes = dict(constexprs, S=w.taps, SHIFT=shift_of(w))
            programs = self.programs(p, pass_, config, (h, w))
            if pass_ == "wgrad":
                split, total = config.SPLIT_K, prod(p.w_shape)
                scalars["splits"] = split
                tensors = (
                    ("x_ptr", "b", None),
                    ("dy_ptr", "a", None),
                    ("part_ptr", "partials", None),
                )
                found.append(
                    launch(
                        "depthwise:wgrad_depthwise",
                        programs,
                        tensors,
                        scalars,
                        sizes,
                        config.options(),
                        split * total,
                    )
                )
                found.append(
                    launch(
                        "depthwise:sum_partials",
                        -(-total // 32),
                        (("part_ptr", "partials", None), ("dw_ptr", "out", None)),
                        dict(K=p.k, total=total, splits=split),
                        dict(TAPS=p.r * p.s, BLOCK=32, BLOCK_Z=32),
                        {},
                    )
                )
                continue
            fill_h, fill_w = pass_ == "dgrad" and fill(p) or (1, 1)
            scalars |= dict(
                size_h=result[2],
                size_w=result[3],
                step_p=h.out_step,
                step_q=w.out_step,
                grid_h=grid_step(h),
                tap_r=h.tap0,
                tap_s=w.tap0,
                step_r=h.tap_step,
                y0=h.out0 * steps_of["sy_p"] + w.out0 * steps_of["sy_q"],
            )
            sizes |= dict(
                FILL_H=fill_h,
                FILL_W=fill_w,
                STEP_S=w.tap_step,
                FILTER_R=p.r,
                FILTER_S=p.s,
                TRANSPOSED=pass_ == "dgrad",
                EPILOGUE=epilogue,
            )
            found.append(
                launch(
                    "depthwise:correlate_depthwise",
                    programs,
                    (
                        ("x_ptr", "a", None),
                        ("w_ptr", "b", None),
                        ("bias_ptr", "bias", None),
                        ("y_ptr", "out", None),
                    ),
                    scalars,
                    sizes,
                    config.options(),
                )
            )
        return found

    # ---- several convolutions in one launch: one config, of which every branch takes as many TAPS
    # as it has
    def branch_options(
        self, branches: Branches, pass_: str, target: str, precision: str
    ) -> list[Config]:
        if not all(map(is_depthwise, branches.problems)) or branches.apart(pass_):
            return []
        found: list[Any] = [
            config
            for problem in branches.problems
            for config in self.options(problem, pass_, target, precision)
        ]
        taps = max((config.TAPS for config in found), default=1)
        found = [replace(config, TAPS=taps) for config in found]
        if pass_ == "wgrad":
            # alone each branch would have as many parts as fill the machine
            found += [
                replace(config, SPLIT_K=max(1, config.SPLIT_K // len(branches.problems)))
                for config in found
            ]
        return self.fitting(found, branches, pass_, target)

    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        if branches.adds(pass_) and config.COLS > 1:
            return f"branches that are added own one output a lane, got COLS={config.COLS}"
        reasons = (
            self.fits(share_of(config, w), problem, pass_, target)
            for axes in branch_axes(branches, pass_)
            for problem, (_, w) in zip(branches.problems, axes)
        )
        return branches.apart(pass_) or next(filter(None, reasons), None)

    def branch_programs(
        self, branches: Branches, pass_: str, config: Config, axes: list[tuple[Axis, Axis]]
    ) -> int:
        """Programs of a launch, in which each branch runs its correlation of `axes`."""
        p = branches.first
        if branches.adds(pass_):
            h, w = axes[0]
            out = p.c if pass_ == "dgrad" else p.k
            sizes = (p.n, config.BLOCK_IMG), (h.out, config.BLOCK_P), (w.out, config.BLOCK_Q)
            return prod(-(-size // block) for size, block in (*sizes, (out, config.BLOCK_N)))
        return sum(
            self.programs(problem, pass_, share_of(config, w), (h, w))
            for problem, (h, w) in zip(branches.problems, axes)
        )

    def branch_seconds(
        self,
        branches: Branches,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        whole = columns(configs)
        issue: Any = 0.0
        l2: Any = 0.0
        waves: Any = 0.0
        launched = branch_axes(branches, pass_)
        for axes in launched:
            rows = []
            for problem, (h, w) in zip(branches.problems, axes):
                if h.taps and w.taps:
                    c = columns([share_of(config, w) for config in configs])
                    rows.append(self._work(problem, pass_, c, (h, w), device))
            if not rows:
                continue
            slots, moved, programs, resident = (np.array(column) for column in zip(*rows))
            count = programs.max(0) if branches.adds(pass_) else programs.sum(0)
            issue, l2 = issue + slots.sum(0), l2 + moved.sum(0)
            waves = waves + self._waves(
                slots.sum(0), moved.sum(0), count, resident.min(0), whole["num_warps"], device.sms
            )
        weights = sum(map(prod, branches.w_shapes)) if pass_ == "wgrad" else 0
        launches = 2 if weights else len(launched)
        return self._sum(issue, l2, waves, branches.bytes, weights, launches, whole, device)[
            "seconds"
        ]

    def branch_plan(
        self, branches: Branches, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        p, order = branches.first, heaviest_first(branches, pass_)
        nhwc = p.layout == "nhwc"
        align = 1
        if nhwc and all(problem.k == problem.c for problem in branches.problems):
            align = aligned(p, *branches.x_channels, *branches.y_channels, config.BLOCK_N)
        source, result = branches.x_shape, branches.y_shape
        if pass_ == "dgrad":
            source, result = result, source
        steps_of = stride_scalars(source, result, p.layout, align)
        constexprs = config.constexprs() | dict(
            COUNT=len(order),
            PIXELS=pixels(config),
            CHANNELS_LAST=nhwc,
            ALIGN=align,
            ACC=accumulator(p),
            INT64=branches.largest >= 2**31,
        )
        found = []
        for axes in branch_axes(branches, pass_):
            h, w = axes[0]
            scalars = branch_sizes(branches, axes) | dict(
                steps_of, stride_h=h.stride, stride_w=w.stride
            )
            geometry: dict[str, object] = dict(
                BRANCHES=branch_geometry(branches, pass_, order, axes),
                GRIDS=tuple(
                    step
                    for h, w in (axes[i] for i in order)
                    for step in (grid_step(h), grid_step(w), shift_of(w))
                ),
            )
            programs = self.branch_programs(branches, pass_, config, axes)
            if pass_ == "wgrad":
                return self._wgrad_branches(
                    branches, config, order, programs, scalars, constexprs | geometry
                )
            scalars |= dict(
                sy_p=steps_of["sy_p"] * h.out_step,
                sy_q=steps_of["sy_q"] * w.out_step,
                y0=h.out0 * steps_of["sy_p"] + w.out0 * steps_of["sy_q"],
            )
            geometry |= dict(
                FILTERS=branch_filters(branches, order, axes),
                SUM=branches.adds(pass_),
                TRANSPOSED=pass_ == "dgrad",
                EPILOGUE=epilogue,
            )
            found.append(
                launch(
                    "depthwise:correlate_depthwise_branches",
                    programs,
                    (
                        ("x_ptr", "a", None),
                        *filters("w", "b", order),
                        ("bias_ptr", "bias", None),
                        ("y_ptr", "out", None),
                    ),
                    scalars,
                    constexprs | geometry,
                    config.options(),
                )
            )
        return found

    def _wgrad_branches(
        self, branches, config, order, programs, scalars, constexprs
    ) -> list[Launch]:
        splits, totals = config.SPLIT_K, [prod(shape) for shape in branches.w_shapes]
        return [
            launch(
                "depthwise:wgrad_depthwise_branches",
                programs,
                (("x_ptr", "b", None), ("dy_ptr", "a", None), ("part_ptr", "partials", None)),
                scalars | {"splits": splits},
                constexprs,
                config.options(),
                splits * sum(totals),
            ),
            launch(
                "depthwise:sum_partials_branches",
                sum(-(-total // 32) for total in totals),
                (("part_ptr", "partials", None), *filters("dw", "out", order)),
                dict(G=branches.first.groups, splits=splits),
                dict(BRANCHES=constexprs["BRANCHES"], COUNT=len(order), BLOCK=32, BLOCK_Z=32),
                {},
            ),
        ]


def stride_scalars(
    source: Sequence[int], result: Sequence[int], layout: str, align: int
) -> dict[str, int]:
    """How the kernels name the strides of a pass's source and result, of these shapes: all but those
    of channels in units of `align`."""
    (x_n, x_k, x_h, x_w), (y_n, y_k, y_p, y_q) = strides(source, layout), strides(result, layout)
    units = dict(sx_n=x_n, sx_h=x_h, sx_w=x_w, sy_n=y_n, sy_p=y_p, sy_q=y_q)
    return {name: value // align for name, value in units.items()} | dict(sx_k=x_k, sy_k=y_k)


def share_of(config: Any, axis: Axis) -> Any:
    """What of a config for several branches one of them runs: as many TAPS as it has along the
    rows."""
    most = max(axis.taps, 1)
    return config if config.TAPS <= most else replace(config, TAPS=most)


@lru_cache(maxsize=1024)
def products_of(sizes: tuple, counts: tuple, unrolls: tuple) -> np.ndarray:
    """(5, configs): each of `sizes` channels with each number of warps, of `counts` columns, and of
    `unrolls` (taps, rows)."""
    found = product(sizes, (4, 2, 1), counts, unrolls)
    return np.array([(n, warps, cols, *unroll) for n, warps, cols, unroll in found]).T


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique with return_inverse, for small integers: faster, since it does not sort."""
    found = np.bincount(values) > 0
    return np.flatnonzero(found), (np.cumsum(found) - 1)[values]


def lanes_of(c: dict[str, np.ndarray]) -> np.ndarray:
    """`pixels` of many configs."""
    return 1 << np.ceil(np.log2(c["BLOCK_IMG"] * c["BLOCK_P"] * c["BLOCK_Q"])).astype(np.int64)


def registers(
    c: dict[str, Any], lanes: np.ndarray | int, problem: Problem, shift: int, target: str
) -> np.ndarray | np.int64:
    """Registers of a thread that hold sums, weights and columns; c: fields of a config, or columns
    of many."""
    nbytes = DTYPE_BYTES[problem.dtype]
    per = np.maximum(lanes * c["BLOCK_N"] // (warp(target) * c["num_warps"]), 1) * (
        2 if nbytes == 8 else 1
    )
    count = (c["COLS"] - 1) * shift + c["TAPS"]
    sums, others = (c["TAPS"] * c["ROWS"], c["COLS"]) if "ROWS" in c else (c["COLS"], c["TAPS"])
    return per * (sums + others) + -(-per * count * min(nbytes, 4) // 4)


@lru_cache(maxsize=4096)
def even(size: int, most: int) -> set[int]:
    """Sizes of at most `most` and its halves in which `size` is shared out evenly."""
    return {-(-size // -(-size // min(size, most >> e))) for e in range(most.bit_length())}


@lru_cache(maxsize=4096)
def lane_shapes(count: int, images: int, rows: int, lanes: int) -> np.ndarray:
    """Boxes of `count` lanes, or of as many as there are: all of nearly one size along each side."""
    shapes = set()
    for q in even(lanes, count):
        for p in even(rows, count // q):
            most = count // (p * q)
            shapes.add((images if most >= images else -(-images // -(-images // most)), p, q))
    full = [shape for shape in shapes if 2 * shape[0] * shape[1] * shape[2] > count]
    return np.array(full or [(count // 2 // (rows * lanes) + 1, rows, lanes)])


def unrolled_taps(r: int, s: int, most: int) -> list[tuple[int, int]]:
    """(TAPS, ROWS) whose sums stay in registers."""
    taps = s if s <= most else 8
    return [(taps, rows) for rows in (1, 2, 3) if rows <= r and taps * rows <= 11]


def loads(problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]) -> int:
    """Elements of both operands that the lanes of a launch load."""
    (h, w), taps, cols = axes, config.TAPS, config.COLS
    # columns in the image, over the lanes along a row
    found, live, _ = (int(figure[0]) for figure in column_walk(w, cols, taps, (1,)))
    source = problem.n * h.useful * live * problem.k
    if pass_ == "wgrad":
        groups = [(r0, min(r0 + config.ROWS, h.taps) - 1) for r0 in range(0, h.taps, config.ROWS)]
        return source + problem.n * sum(
            h.live_out_any(*group) for group in groups
        ) * w.out * problem.k * -(-w.taps // taps)
    boxes = -(-problem.n // config.BLOCK_IMG) * -(-found // config.BLOCK_Q)
    return source + boxes * row_walk(h, config.BLOCK_P)[1] * pixels(config) * problem.k * w.taps


FAMILY = Depthwise()
