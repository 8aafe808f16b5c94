"""Tiles of matrix products in warp-specialised, persistent programs for sm_90: kernels/hopper.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from .. import assumed, devices
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
    elements,
    filters,
    heaviest_first,
    launch,
    steps,
    strides,
)
from .depthwise import is_depthwise
from .gemm import (
    Fields,
    Gemm,
    GemmConfig,
    Options,
    Tiles,
    as_fields,
    channels,
    correlation_result,
    has_mma,
    is_flat,
    suits,
)
from .tma import box_of, nhwc_strides, no_descriptors, reads_others, source_box, stores_in_branch

TARGET = "cuda:90"
# of a thread as compiled; the consumers' warpgroups then take 240 each, the producer's gives most
# of its own away
REGISTERS = 168
# (M, N, PINGPONG)
TILES = ((128, 256, False), (256, 128, False), (128, 128, True), (64, 256, True), (128, 64, True))
# bytes of a row of boxes in shared memory, and of what is stored at once
WIDTH = 128
# bytes of shared memory beside the ring: what is being stored, barriers
EXTRA = 2 * 128 * WIDTH + 512


@dataclass(frozen=True)
class Hopper(GemmConfig):
    """PINGPONG: the consumers take turns at tiles, else they share them. STREAM: programs take
    equally many steps, else tiles. PROGRAMS: how many there are, about one for each SM."""

    PINGPONG: bool
    STREAM: bool
    PROGRAMS: int


@dataclass(frozen=True)
class Correlation(Hopper):
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
    device, found = devices.of_target(TARGET), []
    for m, n, pingpong in TILES:
        if not suits(m, n, rows, cols, 2):
            continue
        for k in (WIDTH // nbytes, 2 * WIDTH // nbytes):
            stages = int((device.limits[1] - EXTRA) // ((m + n) * k * nbytes))
            if stages < 3 or reduced and -(-reduced // k) * k > 1.1 * -(-reduced // 32) * 32:
                continue
            tile: dict[str, int] = dict(BLOCK_M=m) if rows else dict(BLOCK_K=k, GROUP=8)
            tile |= dict(
                SPLIT_K=1,
                num_warps=4,
                num_stages=stages,
                BLOCK_N=n,
                PINGPONG=pingpong,
                STREAM=False,
                PROGRAMS=device.sms,
            )
            found.append(((k if rows else m, True), tile))
    return as_fields(found)


@lru_cache
def lacks() -> str | None:
    """What Triton lacks that the kernels need."""
    try:
        import_module(f"{__package__.rpartition('.')[0]}.kernels.hopper")
    except Exception as e:  # whatever one of another version raises
        return f"kernel hopper needs a Triton with Gluon for sm_90 ({e})"
    return None


def unavailable(target: str) -> str | None:
    """Why the kernels cannot run on a target; for any other than sm_90 they must never be compiled,
    which ends the process."""
    from .. import drivers  # which imports torch

    if target != TARGET:
        return f"kernel hopper needs {TARGET}, got {target}"
    return (
        "Triton does not interpret Gluon, which kernel hopper is written in"
        if drivers.interpreted()
        else lacks()
    )


class HopperFamily(Gemm):
    kernels: tuple[str, ...] = ("hopper",)
    least = 1
    joins = True

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        return "nhwc", 16

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        if reason := unavailable(target):
            return reason
        for name in ("PINGPONG", "STREAM"):
            if not isinstance(getattr(config, name), bool):
                return f"{name} must be True or False, got {getattr(config, name)!r}"
        return (
            self.illegal(
                config,
                pass_,
                target,
                16,
                [name for name in config.names() if name.startswith("BLOCK_")],
            )
            or self._no_tile(config, problem, pass_)
            or no_descriptors(problem, pass_)
            or self._no_share(config, problem, pass_)
            or self.too_large(config, problem, pass_, target)
        )

    def _no_tile(self, config: Config, problem: Problem, pass_: str) -> str | None:
        (m, n, k), rows, nbytes = (
            self.tile(config, pass_),
            self.rows(config, pass_),
            DTYPE_BYTES[problem.dtype],
        )
        if reason := wrong_dtype(problem, pass_):
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
        if (
            pass_ == "wgrad"
            and config.BLOCK_M > 256
            or max(config.BLOCK_IMG, config.BLOCK_P, config.BLOCK_Q) > 256
        ):
            return f"box sides must be at most 256, got {config}"
        if (config.num_warps, config.maxnreg, config.SPLIT_K) != (4, REGISTERS, 1):
            return (
                f"kernel hopper has num_warps=4, maxnreg={REGISTERS} and SPLIT_K=1 (STREAM splits), "
                f"got {config.num_warps}, {config.maxnreg} and {config.SPLIT_K}"
            )
        if config.num_stages < 2:
            return f"a ring needs num_stages of at least 2, got {config.num_stages}"
        if elements(problem) >= 2**31:
            return f"kernel hopper counts elements in 32 bits, got a tensor of {elements(problem)}"
        return None

    def _no_share(self, config: Config, problem: Problem, pass_: str) -> str | None:
        """What is wrong with how programs share the work."""
        names = ["PROGRAMS"] if pass_ == "wgrad" else ["PROGRAMS", "GROUP"]
        for name in names:
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
                return f"{name} must be an int from 1 to 4096, got {value!r}"
        reduced, block = (
            problem.c if pass_ == "fprop" else problem.k,
            "BLOCK_M" if pass_ == "wgrad" else "BLOCK_K",
        )
        if problem.groups > 1 and reduced // problem.groups % getattr(config, block):
            return (
                f"with groups={problem.groups}, {block} (={getattr(config, block)}) must divide the {reduced // problem.groups} channels of a "
                "group"
            )
        if config.STREAM and self.executed_macs(problem, pass_, config) >= 2**31 * prod(
            self.tile(config, pass_)
        ):
            return f"STREAM counts steps in 32 bits, {problem.key()} has more"
        if (
            config.STREAM
            and pass_ != "wgrad"
            and any(
                (axis.live_blocks([side])[:1].sum() < -(-axis.out // side))
                for axes in problem.axes(pass_)
                for axis, side in zip(axes, (config.BLOCK_P, config.BLOCK_Q))
            )
        ):
            return f"STREAM needs a live tap in every tile, {problem.key()} has tiles without"
        return None

    def rows(self, config: Config, pass_: str) -> int:
        """Rows that one consumer multiplies."""
        return self.tile(config, pass_)[0] // (1 if config.PINGPONG else 2)

    # ---- candidates
    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        whole = self._whole(problem, pass_, target, precision)
        if whole is None:
            return []
        tile, sms = self._tiles(whole.c, pass_), devices.of_target(TARGET).sms
        total = sum(
            self._steps(problem, pass_, whole.c, tile, axes, False)[0]
            for axes in problem.axes(pass_)
        )
        # a program takes eight steps or four, so that it multiplies more than it adds up
        programs = np.where(total >= 8 * sms, sms, np.minimum(sms, total // 4))
        tiles_, streams = np.nonzero(np.array([total >= 0, total >= 8]).T)
        found = whole.some(tiles_)
        programs = np.where(streams, programs[tiles_], found.c["PROGRAMS"])
        return [found.but(STREAM=streams > 0, PROGRAMS=programs)]

    def _whole(self, problem: Problem, pass_: str, target: str, precision: str) -> Options | None:
        """Those whose tiles programs do not share."""
        if (
            target != TARGET
            or not has_mma(problem, precision)
            or is_flat(problem, pass_)
            or is_depthwise(problem)
            or unavailable(target)
            or wrong_dtype(problem, pass_)
            or no_descriptors(problem, pass_)
        ):
            return None
        found = tiles(DTYPE_BYTES[problem.dtype], *channels(problem, pass_))
        return self.whole(problem, pass_, found, kernel="hopper", maxnreg=REGISTERS)

    def why_not(self, problem: Problem, pass_: str, target: str, precision: str) -> str | None:
        if (
            target != TARGET
            or is_flat(problem, pass_)
            or is_depthwise(problem)
            or not has_mma(problem, precision)
        ):
            return None
        return lacks() or wrong_dtype(problem, pass_) or no_descriptors(problem, pass_)

    def adapt(self, options: Options, device: Device) -> Options:
        return options.but(PROGRAMS=np.minimum(options.c["PROGRAMS"], device.sms))

    # ---- time
    def shared_bytes(
        self,
        problem: Problem,
        pass_: str,
        c: dict[str, Any],
        tile: tuple[Any, Any, Any],
        target: str,
    ) -> np.ndarray:
        m, n, k = tile
        return c["num_stages"] * (m + n) * k * DTYPE_BYTES[problem.dtype] + EXTRA

    def resident(
        self, problem: Problem, pass_: str, c: Fields, tile: Tiles, device: Device
    ) -> np.ndarray:
        return np.ones_like(c["PROGRAMS"])

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

    def waves(
        self,
        problem: Problem,
        pass_: str,
        c: Fields,
        axes: tuple[Axis, Axis],
        count: np.ndarray,
        total: np.ndarray,
        most: np.ndarray,
        fit: np.ndarray,
        alone: np.ndarray,
        device: Device,
    ) -> np.ndarray:
        rows = zip(*(values.tolist() for values in c.values()))
        found = []
        for row, most, tiles in zip(rows, total.tolist(), count.tolist()):
            one = dict(zip(c, row))
            programs = one["PROGRAMS"]
            if one["STREAM"]:
                most, tiles = most / programs, tiles / programs + 1
            else:
                programs = min(programs, tiles)
                share, tiles = self.busiest(problem, pass_, one, axes, tiles)
                most *= share
            each = most + tiles * assumed.HOPPER_TILE[one["PINGPONG"]]
            found.append(-(-programs // device.sms) * each + assumed.PROGRAM)
        return np.array(found)

    def busiest(
        self,
        problem: Problem,
        pass_: str,
        c: dict[str, Any],
        axes: tuple[Axis, Axis],
        tiles: int,
    ) -> tuple[float, int]:
        """(share of all steps, tiles) of the program with the most steps, when programs take every
        PROGRAMS-th of `tiles`; c: fields of a config."""
        by_tap = pass_ == "wgrad"
        h, w = (
            steps_in_order(axis, c[side], by_tap)
            for axis, side in zip(axes, ("BLOCK_P", "BLOCK_Q"))
        )
        walked = (h[:, None] * w).ravel()
        total = max(int(walked.sum()) * (tiles // len(walked)), 1)
        if tiles <= c["PROGRAMS"]:
            return walked.max() / total, 1
        walked = (
            np.repeat(walked, tiles // len(walked))
            if by_tap
            else grouped(walked, problem, pass_, c)
        )
        loads = np.bincount(np.arange(tiles) % c["PROGRAMS"], walked)
        return loads.max() / total, -(-tiles // c["PROGRAMS"])

    def sums(self, problem: Problem, pass_: str, c: Fields, tile: Tiles) -> np.ndarray:
        m, n, _ = tile
        # a part of all programs but one, in fp32, written and read
        return np.where(c["STREAM"], c["PROGRAMS"] - 1, 0) * m * n * 8

    def partial_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        m, n, _ = self.tile(config, pass_)
        return 8 * (config.PROGRAMS - 1) * m * n * len(problem.axes(pass_)) if config.STREAM else 0

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        return f"persistent programs of {device.target} load boxes of the image while they multiply"

    # ---- launches
    def plan(
        self, problem: Problem, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        if problem.dtype == "float32" and precision != "tf32":
            raise ValueError(
                f"kernel hopper multiplies float32 in tf32 only, got precision={precision!r}"
            )
        if pass_ == "wgrad":
            return self._wgrad(problem, config)
        return [
            item
            for h, w in problem.axes(pass_)
            for item in self._correlation(problem, pass_, h, w, config, epilogue)
        ]

    def _correlation(
        self, p: Problem, pass_: str, h: Axis, w: Axis, config: Config, epilogue: str
    ) -> list[Launch]:
        """fprop, or one residue class of dgrad; axes h, w."""
        c, k = p.c // p.groups, p.k // p.groups
        source, out = (c, k) if pass_ == "fprop" else (k, c)
        tiles = self.programs(p, pass_, config, (h, w))
        scalars, known, _, _, _ = correlation_result(p, pass_, h, w, config, epilogue)
        scalars = {name: scalars[name] for name in scalars if name not in ("SPLIT_K", "sy_split")}
        walked = [
            int(axis.steps([side])[0]) for axis, side in ((h, config.BLOCK_P), (w, config.BLOCK_Q))
        ]
        # of all tiles of BLOCK_N channels
        many = prod(walked) * self.images(p, config) * -(-source // config.BLOCK_K)
        tiles_n, many = -(-out // config.BLOCK_N), many if config.STREAM else 0
        group = min(config.GROUP, tiles_n)
        sizes, ends = (
            (p.n, h.out, w.out, out * p.groups),
            [scalars[name] for name in ("sy_n", "sy_p", "sy_q")],
        )
        store = stores_boxes(config, p, pass_)
        x, h, w = source_box(p.n, source * p.groups, h, w, config, config.BLOCK_K)
        y = Box(sizes, (*ends, 1), self.stored(config, p, pass_), scalars["y0"], WIDTH)
        weights = self._filters(p, pass_, config)
        scalars |= dict(
            C=source,
            R=h.taps,
            S=w.taps,
            FILTER_S=p.s,
            **steps(h, w),
            sum_w=walked[1],
            group_steps=group * many,
            total=tiles_n * many,
            GROUP=group,
        )
        tensors = (
            ("x", "a", replace(x, swizzle=WIDTH)),
            ("w", "b", weights),
            ("bias_ptr", "bias", None),
            ("y", "out", y if store else None),
            ("part_ptr", "partials" if config.STREAM else "out", None),
        )
        constexprs = dict(
            TRANSPOSED=pass_ == "dgrad",
            EPILOGUE=epilogue,
            TMA_STORE=store,
            ROWS_FIRST=p.layout != "nhwc",
            ALIGN_Y=known["ALIGN_Y"],
        ) | self.constants(config)
        return self.launches("correlate", tiles, tensors, scalars, constexprs, config, pass_)

    def _wgrad(self, p: Problem, config: Config) -> list[Launch]:
        c, (h, w) = p.c // p.groups, p.fprop_axes
        tiles = self.programs(p, "wgrad", config, (h, w))
        walked = [
            int(np.maximum(axis.steps_out([side]), 1).sum())
            for axis, side in ((h, config.BLOCK_P), (w, config.BLOCK_Q))
        ]
        many = prod(walked) * self.images(p, config)
        many *= -(-(p.k // p.groups) // config.BLOCK_M) * -(-c // config.BLOCK_N)
        s_k, s_c, s_r, s_s = strides(p.w_shape, p.layout)
        x, h, w = source_box(p.n, p.c, h, w, config, config.BLOCK_N)
        dy = Box(
            (p.n, h.out, w.out, p.k),
            nhwc_strides(h.out, w.out, p.k),
            box_of(config, config.BLOCK_M),
            0,
            WIDTH,
        )
        dw = Box(
            (p.k, p.r, p.s, c), (s_k, s_r, s_s, s_c), self.stored(config, p, "wgrad"), 0, WIDTH
        )
        store = p.layout == "nhwc"
        scalars = dict(
            N=p.n,
            P=p.p,
            Q=p.q,
            C=c,
            K=p.k // p.groups,
            G=p.groups,
            R=p.r,
            S=p.s,
            **steps(h, w),
            sum_w=walked[1],
            total=many if config.STREAM else 0,
            sw_k=s_k,
            sw_c=s_c,
            sw_r=s_r,
            sw_s=s_s,
        )
        tensors = (
            ("x", "b", replace(x, swizzle=WIDTH)),
            ("dy", "a", dy),
            ("dw", "out", dw if store else None),
            ("part_ptr", "partials" if config.STREAM else "out", None),
        )
        return self.launches(
            "wgrad",
            tiles,
            tensors,
            scalars,
            dict(TMA_STORE=store) | self.constants(config),
            config,
            "wgrad",
        )

    def launches(
        self,
        name: str,
        programs: int,
        tensors: tuple[tuple[str, str, Box | None], ...],
        scalars: dict[str, int],
        constexprs: dict[str, object],
        config: Config,
        pass_: str,
    ) -> list[Launch]:
        m, n, _ = self.tile(config, pass_)
        # of each program a part of a tile and two flags
        shared = (programs * (m * n + 2), 2 * programs) if config.STREAM else (0, 0)
        return [
            launch(
                f"hopper:{name}_hopper",
                programs,
                tensors,
                scalars,
                constexprs,
                config.options(),
                *shared,
            )
        ]

    def images(self, problem: Problem, config: Config) -> int:
        """Blocks of images, of all groups."""
        return -(-problem.n // config.BLOCK_IMG) * problem.groups

    def constants(self, config: Config) -> dict[str, object]:
        values = config.constexprs()
        return {name: values[name] for name in values if name not in ("PROGRAMS", "GROUP")} | {
            "STAGES": config.num_stages
        }

    def stored(self, config: Config, problem: Problem, pass_: str) -> tuple[int, ...]:
        """The box of one store by descriptor: a consumer's rows, WIDTH bytes of columns."""
        rows, columns = self.rows(config, pass_), WIDTH // DTYPE_BYTES[problem.dtype]
        if pass_ == "wgrad":
            return rows, 1, 1, columns
        q = min(rows, config.BLOCK_Q)
        p = min(rows // q, config.BLOCK_P)
        return rows // q // p, p, q, columns

    # ---- work
    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        return (
            config.PROGRAMS
            if config.STREAM
            else min(config.PROGRAMS, super().programs(problem, pass_, config, axes))
        )

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
            walked = np.outer(*(steps_in_order(axis, side, False) for axis, side in sides)).ravel()
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
        constexprs.pop("STREAM")
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

    def _filters(self, p: Problem, pass_: str, config: Config) -> Box:
        """The descriptor of w (K, R*S, C) for fprop or dgrad."""
        c, n, k = p.c // p.groups, config.BLOCK_N, config.BLOCK_K
        tile = (n, 1, k) if pass_ == "fprop" else (k, 1, n)
        return Box((p.k, p.r * p.s, c), (p.r * p.s * c, c, 1), tile, 0, WIDTH)


def wrong_dtype(problem: Problem, pass_: str) -> str | None:
    if problem.dtype == "float64" or problem.dtype == "float32" and pass_ != "fprop":
        return (
            "kernel hopper takes float16, bfloat16 and, in fprop, float32: wgmma takes tf32 only where the reduction is innermost in memory, "
            f"got {problem.dtype} in {pass_}"
        )
    return None


def taps_in_order(branches: Branches, config: Config) -> list[tuple[int, int, int]]:
    """(branch, tap, steps of its tiles) of all filters, the longest first."""
    found = []
    for i, p in enumerate(branches.problems):
        sides = zip(p.fprop_axes, (config.BLOCK_P, config.BLOCK_Q))
        steps = np.outer(*(steps_in_order(axis, side, True) for axis, side in sides)).ravel()
        images = -(-p.n // config.BLOCK_IMG)
        found += [(i, tap, int(much) * images) for tap, much in enumerate(steps)]
    return sorted(found, key=lambda item: -item[2])


def stores_boxes(config: Config, problem: Problem, pass_: str) -> bool:
    """Whether results are stored by descriptor: NHWC, in multiples of 16 bytes per pixel."""
    _, out, _ = channels(problem, pass_)
    return (
        problem.layout == "nhwc"
        and out * DTYPE_BYTES[problem.dtype] % 16 == 0
        and (problem.groups == 1 or out % config.BLOCK_N == 0)
    )


@lru_cache(maxsize=1024)
def steps_in_order(axis: Axis, side: int, by_tap: bool) -> np.ndarray:
    """Steps of the walks along an axis, in the kernels' order: of each tap, or of each block of
    `side` outputs, the middle ones first."""
    if by_tap:
        return np.maximum(axis.steps_out([side])[:, 0], 1)
    blocks = np.arange(-(-axis.out // side))
    first, last = axis._spans[..., None] // side
    live = ((first <= blocks) & (blocks <= last)).sum(0)
    return live[(len(blocks) - 1) // 2 + np.where(blocks % 2, blocks // 2 + 1, -(blocks // 2))]


def grouped(steps: np.ndarray, problem: Problem, pass_: str, c: dict[str, Any]) -> np.ndarray:
    """The steps of all tiles in their order, of those of all pixel boxes of an image; c: fields of a
    config."""
    tiles_n = -(-channels(problem, pass_)[1] // c["BLOCK_N"])
    images = -(-problem.n // c["BLOCK_IMG"]) * problem.groups
    return np.concatenate(
        [
            np.repeat(steps, images * min(c["GROUP"], tiles_n - first))
            for first in range(0, tiles_n, c["GROUP"])
        ]
    )


FAMILY = HopperFamily()
