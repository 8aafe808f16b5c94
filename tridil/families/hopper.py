"""Tiles of matrix products in warp-specialised, persistent programs for sm_90: kernels/hopper.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import assumed
from ..branches import Branches
from ..devices import Device
from ..problem import DTYPE_BYTES, Axis, Problem
from .base import (
    Box,
    Config,
    Launch,
    aligned,
    branch_axes,
    branch_geometry,
    branch_sizes,
    filters,
    heaviest_first,
    launch,
    strides,
)
from .gemm import (
    Fields,
    Gemm,
    Tiles,
    channels,
)
from .persistent import (
    NO_EDGE,
    WIDTH,
    Edge,
    Persistent,
    Shares,
    grouped,
    rings,
    steps_in_order,
    steps_of_taps,
)
from .tma import box_of, nhwc_strides, reads_others, source_box, stores_in_branch

TARGET = "cuda:90"
# of a thread as compiled; the consumers' warpgroups then take 232 or 240 each, the producer's gives
# most of its own away
REGISTERS = 168
# (M, N, PINGPONG)
TILES = ((128, 256, False), (256, 128, False), (128, 128, True), (64, 256, True), (128, 64, True))


@dataclass(frozen=True)
class Hopper(Shares):
    """PINGPONG: the consumers take turns at tiles, else they share them."""

    PINGPONG: bool


@dataclass(frozen=True)
class Correlation(Edge, Hopper):
    """fprop and dgrad. GROUP: channel tiles that are walked together for the same pixels."""

    BLOCK_K: int
    GROUP: int


@dataclass(frozen=True)
class Reduction(Hopper):
    """wgrad."""

    BLOCK_M: int


@lru_cache(maxsize=1024)
def tiles(
    nbytes: int, rows: int | None, cols: int, reduced: int | None
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(boxes, fields) of the tiles for so many channels: gemm.as_fields."""
    shapes = [(m, n, {"PINGPONG": pingpong}) for m, n, pingpong in TILES]
    return rings(TARGET, shapes, nbytes, rows, cols, reduced)


class HopperFamily(Persistent):
    kernels: tuple[str, ...] = ("hopper",)
    name, target = "hopper", TARGET
    switches = ("PINGPONG", "STREAM")
    joins = True
    fixed = {"maxnreg": REGISTERS}
    shapes = staticmethod(tiles)

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def _no_tile(self, config: Config, problem: Problem, pass_: str) -> str | None:
        (m, n, k), rows, nbytes = (
            self.tile(config, pass_),
            self.rows(config, pass_),
            DTYPE_BYTES[problem.dtype],
        )
        if reason := self.wrong_dtype(problem, pass_):
            return reason
        if (
            rows not in (64, 128)
            or n not in (64, 128, 256)
            or rows * n > 64 * 256
            or k * nbytes not in (WIDTH, 2 * WIDTH)
        ):
            return (
                f"a consumer multiplies 64 or 128 rows, 64 to 256 columns, at most 64x256 or 128x128, and {WIDTH} or {2 * WIDTH} bytes of the "
                f"reduction, got {rows} rows of {m}x{n}x{k} with PINGPONG={config.PINGPONG}"
            )
        return self.no_ring(config, problem, pass_)

    def rows(self, config: Config, pass_: str) -> int:
        """Those that one consumer multiplies."""
        return self.tile(config, pass_)[0] // (1 if config.PINGPONG else 2)

    # ---- time
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
        (m, n, k), nbytes = tile, DTYPE_BYTES[problem.dtype]
        fma, moved, read = m * n * k, (m + n) * k * nbytes, (m + m // 64 * n) * k * nbytes
        return {
            "tensor": fma / device.mma_rate(problem.dtype, precision),
            "issue": (fma / 2**16 + assumed.HOPPER_STEP) / 4,
            "shared": (moved + read) / 128,
            "l2": moved / device.l2_clock / assumed.L2,
        }

    def tile_clocks(self, c: dict[str, Any], m: int, n: int) -> float:
        return assumed.HOPPER_TILE[c["PINGPONG"]]

    # ---- several convolutions in one launch
    def branch_tiles(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Config]:
        return list(self._whole(problem, pass_, target, precision) or [])

    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        if reason := super().unfit(config, branches, pass_, target):
            return reason
        if config.STREAM or branches.first.stride != (1, 1):
            return f"kernel hopper joins branches of stride 1, without STREAM, got {branches.first.stride} and STREAM={config.STREAM}"
        if pass_ != "wgrad" and config.EDGE_IMG:
            return f"kernel hopper joins branches without an edge, got EDGE_IMG={config.EDGE_IMG}"
        if branches.largest >= 2**31:
            return f"kernel hopper counts elements in 32 bits, got a tensor of {branches.largest}"
        return reads_others(config, branches, pass_)

    def branch_programs(
        self, branches: Branches, pass_: str, config: Config, axes: list[tuple[Axis, Axis]]
    ) -> int:
        counts = [
            Gemm.programs(self, problem, pass_, config, axes[i])
            for i, problem in enumerate(branches.problems)
        ]
        return min(config.PROGRAMS, counts[0] if branches.adds(pass_) else sum(counts))

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
        """Programs take the tiles to and fro, in the kernel's order."""
        found = []
        for config, clocks in zip(configs, step.tolist()):
            walks = self._walks(branches, pass_, config)
            walk = np.sum(walks, 0) if branches.adds(pass_) else np.concatenate(walks)
            turn, place = np.divmod(np.arange(len(walk)), config.PROGRAMS)
            program = np.where(turn % 2, config.PROGRAMS - 1 - place, place)
            tile = assumed.HOPPER_TILE[config.PINGPONG]
            found.append(np.bincount(program, walk * clocks + tile).max() + assumed.PROGRAM)
        return np.array(found)

    def _walks(self, branches: Branches, pass_: str, config: Config) -> list[np.ndarray]:
        """Steps of the tiles in the kernels' order: of each branch, of wgrad of each tap."""
        if pass_ == "wgrad":
            tiles = [
                p.groups
                * -(-(p.k // p.groups) // config.BLOCK_M)
                * -(-(p.c // p.groups) // config.BLOCK_N)
                for p in branches.problems
            ]
            return [np.full(tiles[i], much) for i, _, much in taps_in_order(branches, config)]
        walks = []
        for i in heaviest_first(branches, pass_):
            p = branches.problems[i]
            sides = zip(p.axes(pass_)[0], (config.BLOCK_P, config.BLOCK_Q))
            walked = np.outer(*(steps_in_order(axis, side) for axis, side in sides)).ravel()
            blocks = -(-channels(p, pass_)[2] // config.BLOCK_K)
            walks.append(grouped(walked, p, pass_, vars(config)) * blocks)
        return walks

    def branch_plan(
        self, branches: Branches, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        if branches.first.dtype == "float32" and precision != "tf32":
            raise ValueError(
                f"kernel hopper multiplies float32 in tf32 only, got precision={precision!r}"
            )
        p, order = branches.first, heaviest_first(branches, pass_)
        [axes] = branch_axes(branches, pass_)  # of stride 1
        h, w = axes[0]
        scalars = branch_sizes(branches, axes)
        constexprs = self.constants(config) | dict(
            BRANCHES=branch_geometry(branches, pass_, order, axes), COUNT=len(order)
        )
        for name in ("STREAM", *NO_EDGE):
            constexprs.pop(name, None)
        programs = self.branch_programs(branches, pass_, config, axes)
        if pass_ == "wgrad":
            return self._wgrad_branches(branches, config, order, programs, scalars, constexprs)
        result, begins, source = (
            (branches.y_shape, branches.y_channels, branches.x_channels[-1])
            if pass_ == "fprop"
            else (branches.x_shape, branches.x_channels, branches.y_channels[-1])
        )
        x, _, _ = source_box(p.n, source, h, w, config, config.BLOCK_K)
        s_n, s_k, s_p, s_q = strides(result, p.layout)
        out = [channels(problem, pass_)[1] for problem in branches.problems]
        store = stores_in_branch(config, branches, pass_)
        box = self.stored(config, p, pass_)
        y = Box((p.n, h.out, w.out, result[1]), (s_n, s_p, s_q, 1), box, 0, WIDTH)
        weights = tuple(
            (name, role, self._filters(branches.problems[i], pass_, config))
            for i, (name, role, _) in zip(order, filters("w", "b", order))
        )
        tensors = (
            ("x", "a", replace(x, swizzle=WIDTH)),
            *weights,
            ("bias_ptr", "bias", None),
            ("y", "out", y if store else None),
        )
        scalars |= dict(GROUP=config.GROUP, sy_n=s_n, sy_p=s_p, sy_q=s_q, sy_k=s_k)
        constexprs |= dict(
            SUM=branches.adds(pass_),
            TRANSPOSED=pass_ == "dgrad",
            EPILOGUE=epilogue,
            TMA_STORE=store,
            ROWS_FIRST=p.layout != "nhwc",
            ALIGN_Y=aligned(p, *out, *begins) if p.layout == "nhwc" else 1,
        )
        return [
            launch(
                "hopper:correlate_hopper_branches",
                programs,
                tensors,
                scalars,
                constexprs,
                config.options(),
            )
        ]

    def _wgrad_branches(
        self, branches, config: Config, order, programs, scalars, constexprs
    ) -> list[Launch]:
        p, store = branches.first, branches.first.layout == "nhwc"
        h, w = p.fprop_axes
        x, _, _ = source_box(p.n, branches.x_channels[-1], h, w, config, config.BLOCK_N)
        k = branches.y_channels[-1]
        size = box_of(config, config.BLOCK_M)
        dy = Box((p.n, h.out, w.out, k), nhwc_strides(h.out, w.out, k), size, 0, WIDTH)
        out = []
        for i, (name, role, _) in zip(order, filters("dw", "out", order)):
            q = branches.problems[i]
            shape, to = (q.k, q.r, q.s, q.c // q.groups), strides(q.w_shape, q.layout)
            box = self.stored(config, q, "wgrad")
            dw = Box(shape, (to[0], to[2], to[3], to[1]), box, 0, WIDTH)
            out.append((name, role, dw if store else None))
        place = {i: at for at, i in enumerate(order)}
        sequence = [(place[i], tap) for i, tap, _ in taps_in_order(branches, config)]
        return [
            launch(
                "hopper:wgrad_hopper_branches",
                programs,
                (("x", "b", replace(x, swizzle=WIDTH)), ("dy", "a", dy), *out),
                scalars,
                constexprs
                | dict(
                    CHANNELS_LAST=store,
                    TMA_STORE=store,
                    SEQUENCE=tuple(value for pair in sequence for value in pair),
                    TAPS=len(sequence),
                ),
                config.options(),
            )
        ]


def taps_in_order(branches: Branches, config: Config) -> list[tuple[int, int, int]]:
    """(branch, tap, steps of its tiles) of all filters, the longest first."""
    found = []
    for i, p in enumerate(branches.problems):
        sides, images = (config.BLOCK_P, config.BLOCK_Q), -(-p.n // config.BLOCK_IMG)
        steps = steps_of_taps(p.fprop_axes, sides, images).tolist()
        found += [(i, tap, much) for tap, much in enumerate(steps)]
    return sorted(found, key=lambda item: -item[2])


FAMILY = HopperFamily()
