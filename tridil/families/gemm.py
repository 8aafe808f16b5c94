"""Implicit GEMM: what the families whose kernels multiply tiles of pixels and channels have in
common.

fprop and dgrad: the pixel box BLOCK_IMG x BLOCK_P x BLOCK_Q is the tile's M, rounded up to a power
of two, BLOCK_N output channels, BLOCK_K reduced channels. wgrad: BLOCK_M output channels, BLOCK_N
input channels, the box is the reduction step.

Time: a launch is tiles of unequal numbers of steps (live taps x channel blocks) on SMs that hold a
few programs each. A step costs the clocks of its busiest unit: tensor cores, instruction issue,
shared memory, L2. The launch costs the larger of its waves of programs and its DRAM traffic. What
is assumed stands in assumed.py. Figures of many configs are arrays: the search asks for all of them
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
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
    aligned,
    bad_maxnreg,
    branch_axes,
    columns,
    filters,
    launch,
    no_power_of_two,
    not_positive,
    pixels,
    result_shape,
    strides,
    up,
)

Figure = np.ndarray | float  # of many configs, or of one
Fields = dict[str, np.ndarray]  # of many configs, by name
Tiles = tuple[np.ndarray, np.ndarray, np.ndarray]  # (M, N, K) of many configs


@dataclass(frozen=True)
class GemmConfig(Config):
    """A tile: its pixel box and its channels."""

    BLOCK_IMG: int
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_N: int


@dataclass(frozen=True)
class Options:
    """Configs of one kernel whose fields are arrays: what a search ranks before it makes one.
    fixed: the fields that are the same in all."""

    kind: type[Config]
    fixed: dict[str, Any]
    c: Fields

    @property
    def kernel(self) -> str:
        return self.fixed["kernel"]

    def __len__(self) -> int:
        return len(self.c["SPLIT_K"])

    def __getitem__(self, i: int) -> Config:
        return self.kind(**self.fixed, **{name: value[i].item() for name, value in self.c.items()})

    def __iter__(self) -> Iterator[Config]:
        return map(self.__getitem__, range(len(self)))

    def some(self, kept: np.ndarray) -> Options:
        """Those of an index or a mask."""
        c = {name: values[kept] for name, values in self.c.items()}
        return Options(self.kind, self.fixed, c)

    def but(self, **changes: np.ndarray) -> Options:
        """With these fields changed."""
        return Options(self.kind, self.fixed, self.c | changes)


def as_fields(
    tiles: Sequence[tuple[tuple[Any, ...], dict[str, int]]],
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(arguments of `Search.box` of each tile, the other fields as arrays), of pairs of both."""
    names = tiles[0][1] if tiles else {}
    fields = {name: np.array([tile[name] for _, tile in tiles]) for name in names}
    return [box for box, _ in tiles], fields


def has_mma(problem: Problem, precision: str) -> bool:
    """Whether the products run on tensor cores."""
    return (
        problem.dtype in ("float16", "bfloat16")
        or problem.dtype == "float32"
        and precision == "tf32"
    )


def is_flat(problem: Problem, pass_: str) -> bool:
    """Whether the reduction over flattened (tap, channel) pairs wastes less than blocks of channels
    do: few channels."""
    channels = (problem.k if pass_ == "dgrad" else problem.c) // problem.groups
    taps = problem.r * problem.s
    block = 16 if channels <= 16 else 32
    return (
        channels < 32
        and taps > 1
        and -(-channels // block) * block * taps >= 1.2 * -(-channels * taps // block) * block
    )


def channels(problem: Problem, pass_: str, taps: int = 1) -> tuple[Any, int, Any]:
    """(channels of tile rows, of tile columns, of the reduction), of one group: None where these
    are pixels; taps of a flattened reduction."""
    return channels_of(pass_, problem.c // problem.groups, problem.k // problem.groups, taps)


def channels_of(pass_: str, c: int, k: int, taps: int = 1) -> tuple[Any, int, Any]:
    """The same of groups with c and k channels."""
    if pass_ == "wgrad":
        return k, c * taps, None
    return (None, k, c * taps) if pass_ == "fprop" else (None, c, k * taps)


def suits(m: int, n: int, rows: int | None, cols: int, nbytes: int, least: int = 16) -> bool:
    """Whether no half of a tile is idle, nor its accumulator too large for wide dtypes. least: the
    fewest output channels of a tile."""

    def fills(side, count, least):
        return side == least or least < side < 2 * count

    few = least if (rows or cols) <= 8 else 16
    wanted = fills(m, rows, few) and fills(n, cols, 16) if rows else m >= 32 and fills(n, cols, few)
    return wanted and not (nbytes == 4 and m * n > 128 * 128)


def reduction_steps(pass_: str, reduced: Any, nbytes: int) -> list[int]:
    """BLOCK_K, or pixels of wgrad's box, the largest first; channels are not padded much."""
    if pass_ == "wgrad":
        return [64, 32, 16] if nbytes == 2 else [32, 16]
    sizes = [step for step in ((64, 32) if nbytes == 2 else (32,)) if step < 2 * reduced] + [16]
    least = min(-(-reduced // step) * step for step in sizes)
    return [step for step in sizes if -(-reduced // step) * step <= 1.1 * least]


@lru_cache
def sides_of(count: int, powers: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, height, the greatest width) of the pixel boxes with at most `count` pixels, sides of
    powers of two or any."""
    sizes = [1 << e for e in range(count.bit_length())] if powers else range(1, count + 1)
    b, p = np.array([(b, p) for b in sizes for p in sizes if b * p <= count]).T
    return b, p, count // (b * p)


@lru_cache(maxsize=1024)
def boxes(
    count: int, images: int, height: int, width: int, powers: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, height, width) of pixel boxes for a tile of `count` rows on maps of these sides: of
    powers of two, or any that need as many rows; the widest first, which are neighbours in memory."""
    b, p, most = sides_of(count, powers)
    some = (b <= images) & (p <= height)
    b, p, q = b[some], p[some], np.minimum(most[some], width)
    # also with the same number of boxes, all of nearly one width
    if not powers:
        even = (-(-width // -(-width // np.arange(1, width + 1))))[q - 1]
        b, p, q = np.concatenate([b, b]), np.concatenate([p, p]), np.concatenate([q, even])
    full = 2 * b * p * q > count
    if full.any():
        b, p, q = b[full], p[full], q[full]
        order = np.lexsort((p, b, -q))
        return b[order], p[order], q[order]
    last = (
        (count // height // width, height, width)
        if powers
        else (images, height, -(-(count // 2 + 1) // (images * height)))
    )
    b, p, q = (np.array([side]) for side in last)
    return b, p, q


@lru_cache(maxsize=16)
def search(problem: Problem, pass_: str) -> Search:
    """The Search of a pass, which families share."""
    return Search(problem, pass_)


class Search:
    """Pixel boxes for the tiles of a pass: of all that hold a tile's rows the first that executes
    the fewest multiply-accumulates."""

    problem: Problem
    pass_: str
    sides: tuple[int, int, int]
    axes: list[list[Axis]]

    def __init__(self, problem: Problem, pass_: str) -> None:
        self.problem, self.pass_ = problem, pass_
        axes = problem.axes(pass_)
        self.sides = (
            max(problem.n, 1),
            max((h.out for h, _ in axes), default=1),
            max((w.out for _, w in axes), default=1),
        )
        # residue classes of a strided dgrad
        self.axes = [list(dict.fromkeys(axis)) for axis in zip(*axes)] or [[], []]
        self._found: dict[tuple[Any, ...], tuple[int, int, int]] = {}

    @cached_property
    def steps(self) -> list[np.ndarray]:
        """For h and w the steps of a walk in blocks of 0, 1, 2, ... outputs."""
        found = []
        for axes, side in zip(self.axes, self.sides[1:]):
            sizes, total = np.arange(min(side, 1024) + 1), np.zeros(min(side, 1024) + 1, np.int64)
            for axis in axes:
                steps = axis.walks_out.sum(0) if self.pass_ == "wgrad" else axis.walks[0]
                total += steps[np.minimum(sizes, len(steps) - 1)]
            found.append(total)
        return found

    def sides_of(self, tiles: Iterable[tuple[Any, ...]]) -> dict[str, np.ndarray]:
        """The `box` of each, as fields of configs."""
        sides = np.array([self.box(*tile) for tile in tiles], np.int64).reshape(-1, 3).T
        return dict(zip(("BLOCK_IMG", "BLOCK_P", "BLOCK_Q"), sides))

    def box(
        self, count: int, powers: bool, spills: bool = False, flat: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        """The box of a tile of `count` rows. spills: leave out sides whose addresses would take too
        many registers, if there are others. flat: of a flattened reduction (pairs of a step,
        columns of wgrad's tiles)."""
        key = count, powers, spills, flat
        if key not in self._found:
            self._found[key] = self._best(*key)
        return self._found[key]

    def _best(self, count, powers, spills, flat):
        b, p, q = boxes(
            count, *(min(up(side) if powers else side, count) for side in self.sides), powers
        )
        if spills:
            # rows of a thread lie 16 apart: with such sides their offsets are multiples of one
            # value, which the compiler keeps in registers
            kept = (q != 16) & ~((p == 2) & (q == 8))
            if kept.any():
                b, p, q = b[kept], p[kept], q[kept]
        if not flat:
            h, w = self.steps
            # beyond the map nothing changes
            steps = h[np.minimum(p, len(h) - 1)] * w[np.minimum(q, len(w) - 1)]
        elif self.pass_ == "wgrad":
            h, w = flat_rectangles(self.problem, flat[1])
            steps = (-(-h[:, None] // p) * -(-w[:, None] // q)).sum(0)
        else:
            steps = flat_steps(*self.axes, p, q, channels(self.problem, self.pass_)[2], flat[0])
        work = -(-self.problem.n // b) * steps
        least = work.argmin()
        return int(b[least]), int(p[least]), int(q[least])

    def edged(self, count: int) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
        """The boxes of a tile of `count` rows and of the edge (`split_axis`), at most half a box
        wide, where these execute fewer multiply-accumulates than one does by 3%."""
        if self.pass_ == "wgrad" or any(len(axes) != 1 for axes in self.axes):
            return None
        (w,) = self.axes[1]

        def boxes_of(width: int) -> Sequence[np.ndarray]:
            return boxes(count, *(min(up(side), count) for side in (*self.sides[:2], width)), True)

        def fewest(axis: Axis, sides: Sequence[np.ndarray]) -> tuple[int, tuple[int, int, int]]:
            """(work, box) of the first that executes the fewest."""
            b, p, q = sides
            work = -(-self.problem.n // b) * self.steps[0][np.minimum(p, len(self.steps[0]) - 1)]
            work = work * axis.steps(q)
            least = work.argmin()
            return int(work[least]), (int(b[least]), int(p[least]), int(q[least]))

        options = boxes_of(w.out)
        whole, _ = fewest(w, options)
        found = []
        for side in np.unique(options[2]).tolist():
            if side < w.out and 0 < 2 * (w.out % side) <= side:
                main, rest = split_axis(w, side)
                work, box = fewest(main, [sides[options[2] == side] for sides in options])
                more, edge = fewest(rest, boxes_of(rest.out))
                found.append((work + more, box, edge))
        if not found or min(found)[0] >= 0.97 * whole:
            return None
        return min(found)[1:]

    def most_splits(self, step: np.ndarray) -> np.ndarray:
        """Splits of at least eight steps of `step` pixels or channels each, at most 64 MiB of
        partial results."""
        problem = self.problem
        if self.pass_ == "wgrad":
            count = -(-problem.n * problem.p * problem.q // step)
        else:
            count = problem.r * problem.s * -(-channels(problem, self.pass_)[2] // step)
        nbytes = max(DTYPE_BYTES[problem.dtype], 4) * prod(result_shape(problem, self.pass_))
        return np.minimum(count // 8, min(128, 2**26 // max(nbytes, 1)))


@lru_cache(maxsize=1024)
def split_axis(axis: Axis, side: int) -> tuple[Axis, Axis]:
    """An axis' outputs in whole blocks of `side`, and the others: the edge."""
    main = axis.out // side * side
    rest = replace(axis, out=axis.out - main, offset=axis.offset + main * axis.stride)
    return replace(axis, out=main), rest


def flat_steps(
    h: list[Axis], w: list[Axis], p: np.ndarray, q: np.ndarray, reduced: int, step: int
) -> np.ndarray:
    """Steps of `step` flattened (tap, channel) pairs, summed over the boxes of sides p, q (arrays)
    of all pairs of axes."""
    (rows, at_row), (cols, at_col) = (np.unique(sides, return_inverse=True) for sides in (p, q))
    by_rows, by_cols = exact_blocks(h, rows), exact_blocks(w, cols)
    taps = np.outer(np.arange(1, len(by_rows) + 1), np.arange(1, len(by_cols) + 1))
    return (by_rows.T @ -(-taps * reduced // step) @ by_cols)[at_row, at_col]


def exact_blocks(axes: list[Axis], sizes: np.ndarray) -> np.ndarray:
    """(taps, sizes): number of blocks of so many outputs for which exactly 1, 2, ... taps are live,
    of several axes together."""
    found = np.zeros((max((axis.taps for axis in axes), default=0), len(sizes)), np.int64)
    for axis in axes:
        exactly = -np.diff(axis.live_blocks(sizes), axis=0, append=0)
        found[: len(exactly)] += exactly
    return found


@lru_cache(maxsize=1024)
def flat_rectangles(problem: Problem, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(heights, widths) of the united live rectangles of the taps of each of wgrad's column tiles
    of flattened (tap, channel) pairs."""
    c, (h, w), found = problem.c // problem.groups, problem.fprop_axes, []
    for first in range(0, problem.r * problem.s * c, columns):
        last = min(first + columns, problem.r * problem.s * c) - 1
        (r0, s0), (r1, s1) = divmod(first // c, problem.s), divmod(last // c, problem.s)
        s0, s1 = (s0, s1) if r0 == r1 else (0, problem.s - 1)
        found.append((h.live_out_any(r0, r1), w.live_out_any(s0, s1)))
    heights, widths = np.array(found, np.int64).reshape(-1, 2).T
    return heights, widths


class Gemm(Family):
    """The work and the time of tiles. A family adds what its loop costs (`step_clocks`) and its
    legality, candidates and launches.

    least: steps that wgrad takes for a tap that reads padding only. joins: whether a launch can run
    several branches (`branch_plan`). sums_in_registers: whether those of a tile are.
    """

    least = 0
    joins = False
    sums_in_registers = True

    def flat(self, kernel: str) -> bool:
        """Whether a kernel's reduction is flattened."""
        return False

    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        """Sensible configs, legal or not."""
        raise NotImplementedError

    def whole(
        self,
        problem: Problem,
        pass_: str,
        tiles: tuple[list[tuple[Any, ...]], dict[str, np.ndarray]],
        **fixed: Any,
    ) -> Options | None:
        """The configs of `tiles` (see `as_fields`), each with the best pixel box; None of none."""
        boxes, c = tiles
        if not boxes:
            return None
        sides = search(problem, pass_).sides_of(boxes)
        return Options(self.config_class(pass_), fixed, c | sides)

    def adapt(self, options: Options, device: Device) -> Options:
        """The same for a device, which may have fewer SMs than the one that stands for its target."""
        return options

    def sort(self, config: Config) -> Hashable:
        """Work and time are counted for configs of one sort at a time."""
        return config.kernel

    def step_clocks(
        self,
        problem: Problem,
        pass_: str,
        c: Fields,
        tile: Tiles,
        device: Device,
        precision: str,
        flat: bool,
    ) -> dict[str, np.ndarray]:
        """Clocks of an SM for one step of one program, by unit, each at its peak; c: `columns` of
        configs of one kernel."""
        raise NotImplementedError

    def alone(self, c: Fields) -> np.ndarray:
        """Share of its units that one program on an SM keeps busy, of what enough programs do."""
        return np.minimum(1.0, assumed.ALONE * (c["num_warps"] / 4) ** 0.5)

    # ---- legality
    def illegal(
        self, config: Config, pass_: str, target: str, least: int, powers: Sequence[str]
    ) -> str | None:
        """What is wrong with a tile whatever the problem is. least: output channels of a tile;
        powers: what must be a power of two."""
        sizes = [name for name in config.names() if name.startswith("BLOCK_")]
        reason = (
            bad_maxnreg(config, target)
            or not_positive(config, [*sizes, "SPLIT_K", "num_warps", "num_stages"])
            or no_power_of_two(config, ["num_warps", *powers])
        )
        if reason:
            return reason
        m, n, k = self.tile(config, pass_)
        columns_, others = (m, min(n, k)) if pass_ == "wgrad" else (n, min(m, k))
        if others < 16 or columns_ < least:
            return f"tl.dot needs tile sides of at least 16, of output channels {least} with {config.kernel} on {target}, got {m}x{n}x{k}"
        # for wgmma of 8 columns Triton 3.8 and 3.9 write descriptors that nothing could check
        if columns_ < 16 and config.num_warps > 2:
            return f"tiles of {columns_} output channels take at most 2 warps, got num_warps={config.num_warps}"
        if pixels(config) > 1024:
            return f"a pixel box has at most 1024 pixels, got {config.BLOCK_IMG}x{config.BLOCK_P}x{config.BLOCK_Q}"
        if config.num_warps > 16 or self.sums_in_registers and m * n > 256 * 32 * config.num_warps:
            return f"an accumulator of {m}x{n} spills with num_warps={config.num_warps} (at most 16 warps, 256 registers a thread)"
        if 32 * config.num_warps * (config.maxnreg or 0) > 65536:
            return f"maxnreg={config.maxnreg} with num_warps={config.num_warps} exceeds the 65536 registers of an SM"
        if config.SPLIT_K > 65535:
            return f"SPLIT_K (={config.SPLIT_K}) must be at most 65535"
        return None

    def too_large(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        """Whether the grid or the shared memory is more than there is."""
        programs = self.grid(problem, pass_, config)
        if programs >= 2**31:
            return f"the grid of {programs} programs exceeds 2**31 - 1: use larger tiles"
        m, n, k = tile = self.tile(config, pass_)
        need, limit = (
            int(self.shared_bytes(problem, pass_, vars(config), tile, target)),
            devices.of_target(target).limits[1],
        )
        if need > limit:
            return f"tiles of {m}x{n}x{k} with num_stages={config.num_stages} need {need} bytes of shared memory; {target} has {limit}"
        return None

    # ---- candidates
    def options(self, problem: Problem, pass_: str, target: str, precision: str) -> list[Config]:
        found = self.candidates(problem, pass_, target, precision)
        return [config for options in found for config in options]

    def candidates(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        """`options`, as arrays."""
        found = self.tile_options(problem, pass_, target, precision)
        if problem.groups == 1 or not found:
            return found
        # of groups only the tiles that are not mostly masked, or are near the least masked one
        legal = []
        for options in found:
            fit = [self.fits(config, problem, pass_, target) is None for config in options]
            legal.append(options.some(np.array(fit, bool)))
        executed = [self._executed(problem, pass_, o.c, o.kernel) for o in legal]
        least = np.concatenate([[np.inf], *executed]).min()
        few = min(problem.c, problem.k) < 16 * problem.groups
        most = max((4 if few else 2) * problem.useful_macs, 1.25 * least)
        return [options.some(macs <= most) for options, macs in zip(legal, executed)]

    def search(
        self, problem: Problem, pass_: str, device: Device, precision: str
    ) -> tuple[np.ndarray, Callable[[int], Config]]:
        candidates = self.candidates(problem, pass_, device.target, precision)
        if not candidates:
            return np.zeros(0), [].__getitem__
        found = [self.adapt(options, device) for options in candidates]
        seconds = [
            self._times(problem, pass_, o.c, o.kernel, device, precision)["seconds"] for o in found
        ]

        def config(i: int) -> Config:
            for options in found:
                if i < len(options):
                    return options[i]
                i -= len(options)
            raise IndexError(i)

        return seconds[0] if len(seconds) == 1 else np.concatenate([[], *seconds]), config

    def resident(
        self, problem: Problem, pass_: str, c: Fields, tile: Tiles, device: Device
    ) -> np.ndarray:
        """Programs that one SM holds, by shared memory, registers (accumulator and some more a
        thread) and threads."""
        (m, n, _), threads = tile, 32 * c["num_warps"]
        shared, _, most_threads, most = device.limits
        registers = np.minimum(
            c.get("maxnreg", 255),
            m * n * (2 if problem.dtype == "float64" else 1) // threads + assumed.GEMM_REGISTERS,
        )
        need = self.shared_bytes(problem, pass_, c, tile, device.target) + 1024
        return np.maximum(
            1,
            np.minimum.reduce(
                [
                    shared // need,
                    65536 // (threads * registers),
                    most_threads // threads,
                    np.full_like(threads, most),
                ]
            ),
        )

    # ---- tiles
    def tile(self, config: Config, pass_: str) -> tuple[int, int, int]:
        return (
            (config.BLOCK_M, config.BLOCK_N, pixels(config))
            if pass_ == "wgrad"
            else (pixels(config), config.BLOCK_N, config.BLOCK_K)
        )

    def _tiles(self, c: dict, pass_: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = c["BLOCK_IMG"] * c["BLOCK_P"] * c["BLOCK_Q"]
        box = 1 << np.ceil(np.log2(rows)).astype(np.int64)
        return (
            (c["BLOCK_M"], c["BLOCK_N"], box)
            if pass_ == "wgrad"
            else (box, c["BLOCK_N"], c["BLOCK_K"])
        )

    def shared_bytes(
        self,
        problem: Problem,
        pass_: str,
        c: dict[str, Any],
        tile: tuple[Any, Any, Any],
        target: str,
    ) -> np.ndarray:
        """Shared memory of the pipelined operand tiles; below sm_90 the last stage waits in
        registers."""
        m, n, k = tile
        nbytes = DTYPE_BYTES[problem.dtype]
        stages = c["num_stages"] - (not target.startswith("cuda") or int(target[5:]) < 90)
        wide = np.where(self.writes_partials(c, pass_), max(nbytes, 4), nbytes)
        # the epilogue's layout change
        return np.maximum(stages * (m + n) * k * nbytes, m * n * wide)

    def writes_partials(self, c: dict[str, Any], pass_: str) -> np.ndarray:
        return c["SPLIT_K"] > 1

    def splits(self, whole: Options, search: Search, target: str, may: Any = True) -> Options:
        """The options, whose reduction is whole, each followed by the same with the reduction split
        so that the programs fill about half of the target's SMs, all and twice. may: of which
        (array)."""
        problem, pass_ = search.problem, search.pass_
        tile, flat = self._tiles(whole.c, pass_), self.flat(whole.kernel)
        most, programs = search.most_splits(tile[2]), np.ones_like(tile[2])
        for axes in problem.axes(pass_):
            count = self._programs(problem, pass_, whole.c, tile, axes, flat)
            programs = np.maximum(programs, count)
        sms = devices.of_target(target).sms
        half, all_, twice = (
            np.minimum(most, np.maximum(2, sms * waves // (2 * programs))) for waves in (1, 2, 4)
        )
        fewer = (most >= 2) & (programs < 2 * sms) & may
        ones = np.ones_like(half)
        new = np.array([ones > 0, fewer, fewer & (all_ > half), fewer & (twice > all_)]).T
        splits = np.array([ones, half, all_, twice]).T[new]
        return whole.some(np.nonzero(new)[0]).but(SPLIT_K=splits)

    # ---- work
    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        return int(
            self._programs(
                problem,
                pass_,
                vars(config),
                self.tile(config, pass_),
                axes,
                self.flat(config.kernel),
            )
        )

    def _programs(self, problem, pass_, c, tile, axes, flat) -> Any:
        rows, cols, _ = channels(problem, pass_)
        if pass_ == "wgrad":
            taps = problem.r * problem.s
            column_tiles = -(-taps * cols // tile[1]) if flat else taps * -(-cols // tile[1])
            return -(-rows // tile[0]) * column_tiles * problem.groups * c["SPLIT_K"]
        count = (
            -(-problem.n // c["BLOCK_IMG"])
            * -(-axes[0].out // c["BLOCK_P"])
            * -(-axes[1].out // c["BLOCK_Q"])
        )
        return count * -(-cols // tile[1]) * problem.groups * c["SPLIT_K"]

    def grid(self, problem: Problem, pass_: str, config: Config) -> int:
        """Programs of the largest launch of a pass."""
        return max(
            (self.programs(problem, pass_, config, axes) for axes in problem.axes(pass_)), default=0
        )

    def _steps(self, problem, pass_, c, tile, axes, flat) -> tuple[Any, Any]:
        """(sum, maximum) over tiles of one launch of their reduction steps, all splits together."""
        (h, w), (m, n, step) = axes, tile
        images, p, q = -(-problem.n // c["BLOCK_IMG"]), c["BLOCK_P"], c["BLOCK_Q"]
        rows, cols, reduced = channels(problem, pass_)
        others = images * problem.groups * (-(-rows // m) if pass_ == "wgrad" else -(-cols // n))
        if flat:
            total = np.zeros_like(p)
            for size in np.unique(n if pass_ == "wgrad" else step):
                some = (n if pass_ == "wgrad" else step) == size
                if pass_ == "wgrad":
                    heights, widths = flat_rectangles(problem, int(size))
                    total[some] = (
                        -(-heights[:, None] // p[some]) * -(-widths[:, None] // q[some])
                    ).sum(0)
                else:
                    total[some] = flat_steps([h], [w], p[some], q[some], reduced, size)
            total = total * others
            return total, total * c["SPLIT_K"] / np.maximum(
                self._programs(problem, pass_, c, tile, axes, flat), 1
            )
        # beyond the map nothing changes
        p, q = (np.minimum(sizes, min(axis.out, 1024)) for axis, sizes in ((h, p), (w, q)))
        if pass_ == "wgrad":
            height, width = h.walks_out[:, p], w.walks_out[:, q]
            dead = h.taps * w.taps - (height > 0).sum(0) * (width > 0).sum(0)
            total = images * height.sum(0) * width.sum(0) + self.least * dead
            longest = np.maximum(images * height.max(0) * width.max(0), self.least)
            return total * problem.groups * -(-rows // m) * -(-cols // n), longest
        (height, tallest), (width, widest) = h.walks[:, p], w.walks[:, q]
        blocks = -(-reduced // step)
        return others * height * width * blocks, tallest * widest * blocks

    def _executed(self, problem: Problem, pass_: str, c: dict, kernel: str) -> np.ndarray:
        """`executed_macs` of many configs of one sort."""
        tile, flat = self._tiles(c, pass_), self.flat(kernel)
        steps = (
            self._steps(problem, pass_, c, tile, axes, flat)[0] for axes in problem.axes(pass_)
        )
        return sum(steps, np.zeros_like(tile[0])) * tile[0] * tile[1] * tile[2]

    def executed_macs(self, problem: Problem, pass_: str, config: Config) -> int:
        return int(self._executed(problem, pass_, columns([config]), config.kernel)[0])

    def requested_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        """An upper bound: masked elements are counted, too."""
        c, result = columns([config]), result_shape(problem, pass_)
        tile, total = self._tiles(c, pass_), 0
        m, n, step = self.tile(config, pass_)
        for axes in problem.axes(pass_):
            stored = (
                prod(result)
                if pass_ == "wgrad"
                else problem.n * axes[0].out * axes[1].out * result[1]
            )
            total += (
                round(
                    float(
                        self._steps(problem, pass_, c, tile, axes, self.flat(config.kernel))[0][0]
                    )
                )
                * (m + n)
                * step
                + stored
            )
        return total * DTYPE_BYTES[problem.dtype]

    # ---- time
    def seconds(
        self,
        problem: Problem,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        def times(some):
            c, kernel = columns(some), some[0].kernel
            return self._times(problem, pass_, c, kernel, device, precision)["seconds"]

        return self.by_sort(configs, times)

    def by_sort(
        self, configs: Sequence[Config], figures: Callable[[Sequence[Config]], np.ndarray]
    ) -> np.ndarray:
        """A figure of each config, of which `figures` takes those of one sort at a time."""
        found = np.zeros(len(configs))
        for sort in dict.fromkeys(map(self.sort, configs)):
            some = [i for i, config in enumerate(configs) if self.sort(config) == sort]
            found[some] = figures([configs[i] for i in some])
        return found

    def _times(
        self, problem: Problem, pass_: str, c: dict, kernel: str, device: Device, precision: str
    ) -> dict:
        """Seconds of configs of one sort, whole and by part, and what decides about the limiter."""
        tile, flat = self._tiles(c, pass_), self.flat(kernel)
        clocks, hertz = (
            self.step_clocks(problem, pass_, c, tile, device, precision, flat),
            device.clock * 1e9,
        )
        step = np.maximum.reduce(list(clocks.values())) / assumed.ATTAINED
        fit, alone = self.resident(problem, pass_, c, tile, device), self.alone(c)
        launches: Any
        waves: Any
        work: Any
        splits, launches, waves, work, programs = (
            c["SPLIT_K"],
            0,
            0.0,
            0.0,
            np.zeros_like(tile[0]),
        )
        for axes in problem.axes(pass_):
            count = self._programs(problem, pass_, c, tile, axes, flat)
            total, most = self._steps(problem, pass_, c, tile, axes, flat)
            waves = waves + self.waves(
                problem,
                pass_,
                c,
                axes,
                count,
                total,
                most / splits,
                step,
                fit,
                alone,
                device,
            )
            launches, work, programs = (
                launches + 1,
                work + total * step / device.sms,
                np.maximum(programs, count),
            )
        result, dram_rate = prod(result_shape(problem, pass_)), device.dram * 1e9 * assumed.DRAM
        split, sums = splits > 1, self.sums(problem, pass_, c, tile)
        partial = partial_seconds(sums, device)
        launches = launches * np.where(split, 2, 1)
        # parts of tiles (no splits) are written during the steps
        dram = (problem.bytes + np.where(split, 0, sums)) / dram_rate
        if not self.covers(problem, pass_):  # dx begins as zeros
            launches, dram = launches + 1, dram + result * DTYPE_BYTES[problem.dtype] / dram_rate
        waves, work, launching = waves / hertz, work / hertz, launches * assumed.LAUNCH
        return dict(
            seconds=np.maximum(waves, dram) + partial + launching,
            waves=waves,
            work=work,
            dram=dram,
            partial=partial,
            launches=launching,
            programs=programs,
            clocks=clocks,
            step=step,
        )

    def waves(
        self,
        problem: Problem,
        pass_: str,
        c: Fields,
        axes: tuple[Axis, Axis],
        count: np.ndarray,
        total: np.ndarray,
        most: np.ndarray,
        step: np.ndarray,
        fit: np.ndarray,
        alone: np.ndarray,
        device: Device,
    ) -> np.ndarray:
        """Clocks of one launch of each config: `count` programs with `total` steps of `step` clocks
        in sum and `most` in the longest."""
        return waves_of(count, total * step, most * step, device.sms, fit, alone)

    def sums(self, problem: Problem, pass_: str, c: Fields, tile: Tiles) -> np.ndarray:
        """Bytes that partial results and their sum move after the steps."""
        return np.where(
            c["SPLIT_K"] > 1, 4 * prod(result_shape(problem, pass_)) * (2 * c["SPLIT_K"] + 1), 0
        )

    def predict(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> Prediction:
        t = self._times(problem, pass_, columns([config]), config.kernel, device, precision)
        clocks = {name: float(np.ravel(value)[0]) for name, value in t.pop("clocks").items()}
        seconds, waves, work, dram, partial, launching, programs, step = (
            float(np.ravel(t[name])[0])
            for name in (
                "seconds",
                "waves",
                "work",
                "dram",
                "partial",
                "launches",
                "programs",
                "step",
            )
        )
        units = dict(UNITS)
        if not device.has_tensor_cores(problem.dtype, precision):
            units["tensor"] = "arithmetic units"
        parts = {units[name]: value * work / step for name, value in clocks.items()} | {
            "waves of programs": waves,
            "DRAM bandwidth": dram,
        }
        if partial:
            parts["partial sums"] = partial
        parts["launches"] = launching
        if launching + partial > seconds / 2:
            limiter = "launches" if launching > partial else "partial sums"
        elif dram >= waves:
            limiter = "DRAM bandwidth"
        elif work < 0.6 * waves:
            few = programs < 2 * device.sms
            limiter = (
                f"too few programs ({programs:.0f} on {device.sms} SMs)"
                if few
                else "unequal programs in the last wave"
            )
        else:
            limiter = units[max(clocks, key=clocks.__getitem__)]
        return Prediction(seconds, limiter, parts)

    # ---- several convolutions in one launch
    def branch_options(
        self, branches: Branches, pass_: str, target: str, precision: str
    ) -> list[Config]:
        if not self.joins or branches.apart(pass_):
            return []
        options = (
            config
            for problem in branches.problems
            for config in self.branch_tiles(problem, pass_, target, precision)
        )
        return self.fitting(options, branches, pass_, target)

    def branch_tiles(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Config]:
        """The configs of one branch that may run all."""
        return [
            config
            for options in self.tile_options(problem, pass_, target, precision)
            for config in options
            if pass_ == "wgrad" or config.SPLIT_K == 1
        ]

    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        """Why a config cannot run a pass of all branches in one launch."""
        if not self.joins:
            return super().unfit(config, branches, pass_, target)
        if pass_ != "wgrad" and config.SPLIT_K > 1:
            return f"branches do not split {pass_}'s reduction, got SPLIT_K={config.SPLIT_K}"
        reasons = (self.fits(config, problem, pass_, target) for problem in branches.problems)
        return branches.apart(pass_) or next(filter(None, reasons), None)

    def branch_programs(
        self, branches: Branches, pass_: str, config: Config, axes: list[tuple[Axis, Axis]]
    ) -> int:
        """Programs of a launch, in which each branch runs its correlation of `axes`."""
        counts = [
            self.programs(problem, pass_, config, axes[i])
            for i, problem in enumerate(branches.problems)
        ]
        return counts[0] if branches.adds(pass_) else sum(counts)

    def branch_seconds(
        self,
        branches: Branches,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        return self.by_sort(
            configs, lambda some: self._branch_times(branches, pass_, some, device, precision)
        )

    def _branch_times(
        self,
        branches: Branches,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        c, flat, problem = columns(configs), self.flat(configs[0].kernel), branches.first
        tile = self._tiles(c, pass_)
        clocks = self.step_clocks(problem, pass_, c, tile, device, precision, flat)
        step = np.maximum.reduce(list(clocks.values())) / assumed.ATTAINED
        fit, alone = self.resident(problem, pass_, c, tile, device), self.alone(c)
        launched = branch_axes(branches, pass_)
        waves = sum(
            self.branch_waves(
                branches,
                pass_,
                configs,
                step,
                [
                    self._branch_row(branch, pass_, c, tile, pair, flat, step)
                    for branch, pair in zip(branches.problems, axes)
                ],
                fit,
                alone,
                device,
            )
            for axes in launched
        )
        hertz, dram_rate = device.clock * 1e9, device.dram * 1e9 * assumed.DRAM
        weights = sum(map(prod, branches.w_shapes))
        sums = np.where(c["SPLIT_K"] > 1, 4 * weights * (2 * c["SPLIT_K"] + 1), 0)
        launches = np.where(sums > 0, 2, len(launched))
        partial = partial_seconds(sums, device)
        return (
            np.maximum(waves / hertz, branches.bytes / dram_rate)
            + partial
            + launches * assumed.LAUNCH
        )

    def _branch_row(
        self, branch: Problem, pass_: str, c: dict, tile, axes: tuple[Axis, Axis], flat, step
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A row of `branch_waves`: what a branch adds to a launch."""
        total, most = self._steps(branch, pass_, c, tile, axes, flat)
        count = self._programs(branch, pass_, c, tile, axes, flat)
        latest = (
            total / count
            if pass_ == "wgrad"
            else least_steps(axes[0], c["BLOCK_P"])
            * least_steps(axes[1], c["BLOCK_Q"])
            * -(-channels(branch, pass_)[2] // tile[2])
        )
        return count, total * step, most / c["SPLIT_K"] * step, latest * step

    def branch_waves(
        self,
        branches: Branches,
        pass_: str,
        configs: Sequence[Config],
        step: np.ndarray,
        rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
        fit: np.ndarray,
        alone: np.ndarray,
        device: Device,
    ) -> np.ndarray:
        """`waves` of all branches, of which those with the longest programs come first, and of their
        tiles those in the middle. rows: of each branch (programs, clocks in sum, of the longest, of
        the one that comes last), arrays over configs; step: clocks of one."""
        counts, totals, most, latest = (np.array(column) for column in zip(*rows))
        if branches.adds(pass_):
            return waves_of(
                counts[0], totals.sum(0), most.sum(0), device.sms, fit, alone, latest.sum(0)
            )
        return waves_of(
            counts.sum(0), totals.sum(0), most.max(0), device.sms, fit, alone, latest.min(0)
        )


def partial_seconds(sums: np.ndarray, device: Device) -> np.ndarray:
    """Seconds of so many bytes of partial sums: through L2 where half of it holds them."""
    l2 = device.l2_clock * assumed.L2 * device.sms * device.clock * 1e9
    return sums / np.where(sums < device.l2 * 2**19, l2, device.dram * 1e9 * assumed.DRAM)


def waves_of(
    programs: Figure,
    total: Figure,
    most: Figure,
    sms: int,
    fit: Figure,
    alone: Figure,
    latest: Figure | None = None,
) -> np.ndarray:
    """Clocks of launches of `programs` whose steps take `total` clocks in sum and `most` in the
    longest, `fit` of them at a time on an SM; latest: in the one that begins last, where the order is
    chosen."""

    def rate(together):
        return np.minimum(1.0, alone * together)

    programs = np.maximum(programs, 1)
    equal = most * programs <= 1.05 * total
    most, total = (
        most + assumed.PROGRAM * alone,
        total
        + programs * assumed.PROGRAM * alone / np.maximum(np.minimum(fit, -(-programs // sms)), 1),
    )
    mean, busiest, slots = total / programs, -(-programs // sms), sms * fit
    at_once = np.maximum(most / alone, busiest * mean / rate(busiest))
    # full rounds and a last one
    rounds, rest = programs // slots, programs % slots
    last = -(-rest // sms)
    in_rounds = (
        rounds * fit / rate(fit) + np.where(rest > 0, last / np.maximum(rate(last), 1e-9), 0)
    ) * mean
    # the last program begins at a random moment of another
    tail = most if latest is None else latest + assumed.PROGRAM * alone
    unequal = np.maximum(most / alone, total / sms / rate(fit) + tail / 2)
    return np.where(programs <= slots, at_once, np.where(equal, in_rounds, unequal))


# ---- results of launches, whole or split
def stored(shape: tuple[int, int, int, int], layout: str, h: Axis, w: Axis) -> dict[str, int]:
    """How the kernels name the strides between the pixels of a result that a correlation writes, and
    where the first of them lies."""
    s_n, s_k, s_p, s_q = strides(shape, layout)
    return dict(
        sy_n=s_n,
        sy_p=s_p * h.out_step,
        sy_q=s_q * w.out_step,
        sy_k=s_k,
        y0=h.out0 * s_p + w.out0 * s_q,
    )


def correlation_result(
    p: Problem, pass_: str, h: Axis, w: Axis, config: Config, epilogue: str
) -> tuple[dict[str, int], dict[str, object], str, int, list[Launch]]:
    """(scalars, constexprs, role of the result, elements of partial sums, launches that sum them)
    of fprop or of one residue class of dgrad.

    With SPLIT_K > 1 a launch writes fp32 partial results (SPLIT_K, N, P, Q, K) and the next one
    sums them.
    """
    split, (_, out, _) = config.SPLIT_K, channels(p, pass_)
    to = stored(result_shape(p, pass_), p.layout, h, w)
    sizes = dict(P=h.out, Q=w.out, K=out * p.groups)
    total, sums, written = 0, [], to
    if split > 1:
        total = p.n * h.out * w.out * out * p.groups
        n_, k_, p_, q_ = strides((p.n, out * p.groups, h.out, w.out), "nhwc")
        written = dict(sy_n=n_, sy_p=p_, sy_q=q_, sy_k=k_, y0=0)
        sums = [sum_splits(split, total, to, sizes, epilogue)]
    scalars = dict(
        written, SPLIT_K=split, sy_split=total, N=p.n, P=h.out, Q=w.out, K=out, G=p.groups
    )
    scalars |= dict(tap_r=h.tap0, tap_s=w.tap0, step_r=h.tap_step, step_s=w.tap_step)
    align_y = aligned(p, out) if split > 1 or p.layout == "nhwc" else 1
    constexprs: dict[str, object] = dict(
        TRANSPOSED=pass_ == "dgrad",
        EPILOGUE=epilogue if split == 1 else "",
        IS_SPLIT=split > 1,
        ALIGN_Y=align_y,
    )
    return scalars, constexprs, "partials" if split > 1 else "out", split * total, sums


def wgrad_result(
    p: Problem, config: Config, partial: bool
) -> tuple[dict[str, int], tuple[int, int, int, int], str, int, list[Launch]]:
    """(scalars, strides (k, c, r, s) of what is written, its role, elements of partial sums,
    launches that sum them) of wgrad; partial: whether fp32 sums (SPLIT_K, K, R, S, C) are written
    and added by a second launch."""
    split, c, total = config.SPLIT_K, p.c // p.groups, prod(p.w_shape)
    s_k, s_c, s_r, s_s = strides(p.w_shape, p.layout)
    scalars = dict(SPLIT_K=split, N=p.n, P=p.p, Q=p.q, K=p.k // p.groups, G=p.groups)
    if not partial:
        return scalars, (s_k, s_c, s_r, s_s), "out", 0, []
    sums = [
        sum_splits(
            split,
            total,
            dict(sy_n=s_k, sy_p=s_r, sy_q=s_s, sy_k=s_c, y0=0),
            dict(P=p.r, Q=p.s, K=c),
            "",
        )
    ]
    return scalars, (p.r * p.s * c, 1, p.s * c, c), "partials", split * total, sums


def sum_splits(
    split: int, total: int, to: dict[str, int], sizes: dict[str, int], epilogue: str
) -> Launch:
    """The launch that adds partial results in a fixed order."""
    tensors = (("part_ptr", "partials", None), ("bias_ptr", "bias", None), ("y_ptr", "out", None))
    scalars = dict(total=total, SPLIT_K=split, **sizes, **to)
    return launch(
        "common:sum_splits",
        -(-total // 256),
        tensors,
        scalars,
        dict(EPILOGUE=epilogue, BLOCK=256),
        {},
    )


# ---- several convolutions in one launch
def least_steps(axis: Axis, sizes: np.ndarray) -> np.ndarray:
    """The fewest taps that are live for a block of so many outputs."""
    unique, at = np.unique(sizes, return_inverse=True)
    blocks = axis.live_blocks(unique)
    return (blocks >= -(-axis.out // unique)).sum(0)[at]


def sum_branches(
    branches: Branches, order: list[int], split: int, constexprs: dict[str, object]
) -> list[Launch]:
    """The launch that adds the partial sums (SPLIT_K, K, R, S, C) of all filters, which lie one
    after another."""
    kept = {name: constexprs[name] for name in ("BRANCHES", "COUNT")}
    return [
        launch(
            "gather:sum_branches",
            sum(-(-prod(shape) // 256) for shape in branches.w_shapes),
            (("part_ptr", "partials", None), *filters("dw", "out", order)),
            {"G": branches.first.groups, "SPLIT_K": split},
            kept | {"CHANNELS_LAST": branches.first.layout == "nhwc", "BLOCK": 256},
            {},
        )
    ]
