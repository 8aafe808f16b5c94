"""Tiles of matrix products in warp-specialised, persistent programs, whose steps are one sequence:
what the families hopper and blackwell have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from .. import assumed, devices
from ..devices import Device
from ..problem import DTYPE_BYTES, Axis, Problem
from .base import (
    Box,
    Config,
    Launch,
    columns,
    elements,
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
    search,
    split_axis,
    suits,
)
from .tma import box_of, nhwc_strides, no_descriptors, reaches_over_groups, source_box

# bytes of a row of boxes in shared memory, and of what is stored at once
WIDTH = 128
BOX = "BLOCK_IMG", "BLOCK_P", "BLOCK_Q"
NO_EDGE = dict.fromkeys(("EDGE_IMG", "EDGE_P", "EDGE_Q"), 0)
# bytes of shared memory beside the ring: what is being stored, barriers
EXTRA = 2 * 128 * WIDTH + 1024


@dataclass(frozen=True)
class Shares(GemmConfig):
    """STREAM: programs take equally many steps, else tiles. PROGRAMS: how many there are, about one
    for each SM."""

    STREAM: bool
    PROGRAMS: int


@dataclass(frozen=True)
class Edge:
    """Of fprop and dgrad: sides of the boxes of the columns beyond the last whole BLOCK_Q, 0 where
    they have the boxes of the others."""

    EDGE_IMG: int
    EDGE_P: int
    EDGE_Q: int


def rectangles(
    c: Mapping[str, Any], axes: tuple[Axis, Axis]
) -> list[tuple[dict[str, Any], tuple[Axis, Axis]]]:
    """(fields, axes) of the parts of a correlation that have boxes of their own; c: fields of a
    config, or of many with one BLOCK_Q, all or none with an edge."""
    if not np.any(c.get("EDGE_IMG", 0)):
        return [(dict(c), axes)]
    h, w = axes
    main, rest = split_axis(w, int(np.ravel(c["BLOCK_Q"])[0]))
    edge = {name: c[of_edge] for name, of_edge in zip(BOX, NO_EDGE)}
    return [(dict(c) | NO_EDGE, (h, main)), (dict(c) | edge | NO_EDGE, (h, rest))]


@lru_cache
def lacks(kernel: str) -> str | None:
    """What Triton lacks that a module of kernels needs."""
    try:
        import_module(f"{__package__.rpartition('.')[0]}.kernels.{kernel}")
    except Exception as e:  # whatever one of another version raises
        return f"kernel {kernel} needs a Triton with Gluon for its target ({e})"
    return None


def unavailable(kernel: str, meant: str, target: str) -> str | None:
    """Why the kernels, meant for one target, cannot run on another; for that they must never be
    compiled, which ends the process."""
    from .. import drivers  # which imports torch

    if target != meant:
        return f"kernel {kernel} needs {meant}, got {target}"
    return (
        f"Triton does not interpret Gluon, which kernel {kernel} is written in"
        if drivers.interpreted()
        else lacks(kernel)
    )


def rings(
    target: str,
    shapes: Sequence[tuple[int, int, dict[str, bool]]],
    nbytes: int,
    rows: int | None,
    cols: int,
    reduced: int | None,
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(boxes, fields) of the tiles for so many channels, with as many stages as fit: gemm.as_fields.
    shapes: (M, N, further fields)."""
    device, found = devices.of_target(target), []
    for m, n, further in shapes:
        if not suits(m, n, rows, cols, 2):
            continue
        for k in (WIDTH // nbytes, 2 * WIDTH // nbytes):
            stages = int((device.limits[1] - EXTRA) // ((m + n) * k * nbytes))
            if stages < 3 or reduced and -(-reduced // k) * k > 1.1 * -(-reduced // 32) * 32:
                continue
            tile: dict[str, int] = dict(BLOCK_M=m) if rows else dict(BLOCK_K=k, GROUP=8) | NO_EDGE
            tile |= dict(
                SPLIT_K=1,
                num_warps=4,
                num_stages=stages,
                BLOCK_N=n,
                **further,
                STREAM=False,
                PROGRAMS=device.sms,
            )
            found.append(((k if rows else m, True), tile))
    return as_fields(found)


class Persistent(Gemm):
    """What families of persistent programs have in common, whose steps are a sequence. name: of the
    kernels' module; target: the only one that they are for; switches: fields that are bool."""

    name: str
    target: str
    switches: tuple[str, ...] = ("STREAM",)
    fixed: dict[str, int | None]  # fields that are the same in all configs
    shapes: Callable[..., tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]]
    least = 1

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        return "nhwc", 16

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        if reason := unavailable(self.name, self.target, target):
            return reason
        for name in self.switches:
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
        """Why its programs cannot have a tile."""
        raise NotImplementedError

    def no_ring(self, config: Config, problem: Problem, pass_: str) -> str | None:
        """Why a tile has no ring of boxes, or not these warps."""
        wanted = 4, self.fixed["maxnreg"], 1
        if (config.num_warps, config.maxnreg, config.SPLIT_K) != wanted:
            return (
                f"kernel {self.name} has num_warps=4, maxnreg={wanted[1]} and SPLIT_K=1 (STREAM splits), "
                f"got {config.num_warps}, {config.maxnreg} and {config.SPLIT_K}"
            )
        if (
            pass_ == "wgrad"
            and config.BLOCK_M > 256
            or max(config.BLOCK_IMG, config.BLOCK_P, config.BLOCK_Q) > 256
        ):
            return f"box sides must be at most 256, got {config}"
        if config.num_stages < 2:
            return f"a ring needs num_stages of at least 2, got {config.num_stages}"
        if elements(problem) >= 2**31:
            return f"kernel {self.name} counts elements in 32 bits, got a tensor of {elements(problem)}"
        return None

    def _no_share(self, config: Config, problem: Problem, pass_: str) -> str | None:
        """What is wrong with how programs share the work."""
        names = ["PROGRAMS"] if pass_ == "wgrad" else ["PROGRAMS", "GROUP"]
        for name in names:
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
                return f"{name} must be an int from 1 to 4096, got {value!r}"
        if reason := reaches_over_groups(config, problem, pass_):
            return reason
        if pass_ != "wgrad" and (reason := self._no_edge(config, problem, pass_)):
            return reason
        if config.STREAM and self.executed_macs(problem, pass_, config) >= (
            2**31 - config.PROGRAMS
        ) * prod(self.tile(config, pass_)):
            return f"STREAM counts steps in 32 bits, {problem.key()} has more"
        if (
            config.STREAM
            and pass_ != "wgrad"
            and any(
                (axis.live_blocks([side])[:1].sum() < -(-axis.out // side))
                for axes in problem.axes(pass_)
                for c, pair in rectangles(vars(config), axes)
                for axis, side in zip(pair, (c["BLOCK_P"], c["BLOCK_Q"]))
            )
        ):
            return f"STREAM needs a live tap in every tile, {problem.key()} has tiles without"
        return None

    def _no_edge(self, config: Config, problem: Problem, pass_: str) -> str | None:
        """What is wrong with the boxes of the edge."""
        edge = config.EDGE_IMG, config.EDGE_P, config.EDGE_Q
        if edge == (0, 0, 0):
            return None
        if any(
            isinstance(side, bool)
            or not isinstance(side, int)
            or side < 1
            or side & (side - 1)
            or side > 256
            for side in edge
        ):
            return f"sides of the edge's boxes must be 0, or powers of two up to 256, got {edge}"
        if prod(edge) != self.tile(config, pass_)[0]:
            return f"a box of the edge must have the {self.tile(config, pass_)[0]} pixels of a tile, got {edge}"
        for _, w in problem.axes(pass_):
            if w.out < config.BLOCK_Q or w.out % config.BLOCK_Q == 0:
                return (
                    f"an edge needs more columns than whole blocks of {config.BLOCK_Q}, got {w.out}"
                )
        return None

    def rows(self, config: Config, pass_: str) -> int:
        """Rows of a tile that are stored together."""
        raise NotImplementedError

    # ---- candidates
    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        whole = self._whole(problem, pass_, target, precision)
        if whole is None:
            return []
        if pass_ != "wgrad":
            whole = self._with_edges(problem, pass_, whole)
        tile, sms = self._tiles(whole.c, pass_), devices.of_target(self.target).sms
        total = sum(
            self._steps(problem, pass_, whole.c, tile, axes, False)[0]
            for axes in problem.axes(pass_)
        )
        # a program takes eight steps or four, so that it multiplies more than it adds up
        programs = np.where(total >= 8 * sms, sms, np.minimum(sms, total // 4))
        if len(problem.axes(pass_)) == 1:  # as few as take equally many; launches differ
            longest = -(-total // np.maximum(programs, 1))
            programs = -(-total // np.maximum(longest, 1))
        tiles_, streams = np.nonzero(np.array([total >= 0, total >= 8]).T)
        found = whole.some(tiles_)
        programs = np.where(streams, programs[tiles_], found.c["PROGRAMS"])
        return [found.but(STREAM=streams > 0, PROGRAMS=programs)]

    def _with_edges(self, problem: Problem, pass_: str, whole: Options) -> Options:
        """The options, and those with boxes of their own for the edge, where that executes less."""
        pixels = self._tiles(whole.c, pass_)[0]
        found_of = {m: search(problem, pass_).edged(m) for m in np.unique(pixels).tolist()}
        edged = {m: boxes for m, boxes in found_of.items() if boxes}
        more = [i for i, m in enumerate(pixels.tolist()) if m in edged]
        found = whole.some(np.array([*range(len(whole)), *more], np.int64))
        fields = {name: found.c[name].copy() for name in (*BOX, *NO_EDGE)}
        for at, i in enumerate(more, len(whole)):
            box, edge = edged[pixels[i]]
            for name, side in zip(fields, (*box, *edge)):
                fields[name][at] = side
        return found.but(**fields)

    def _whole(self, problem: Problem, pass_: str, target: str, precision: str) -> Options | None:
        """Those whose tiles programs do not share."""
        if (
            target != self.target
            or not has_mma(problem, precision)
            or is_flat(problem, pass_)
            or is_depthwise(problem)
            or unavailable(self.name, self.target, target)
            or self.wrong_dtype(problem, pass_)
            or no_descriptors(problem, pass_)
        ):
            return None
        found = self.shapes(DTYPE_BYTES[problem.dtype], *channels(problem, pass_))
        return self.whole(problem, pass_, found, kernel=self.name, **self.fixed)

    def why_not(self, problem: Problem, pass_: str, target: str, precision: str) -> str | None:
        if (
            target != self.target
            or is_flat(problem, pass_)
            or is_depthwise(problem)
            or not has_mma(problem, precision)
        ):
            return None
        return (
            lacks(self.name) or self.wrong_dtype(problem, pass_) or no_descriptors(problem, pass_)
        )

    def wrong_dtype(self, problem: Problem, pass_: str) -> str | None:
        if problem.dtype == "float64" or problem.dtype == "float32" and pass_ != "fprop":
            return (
                f"kernel {self.name} takes float16, bfloat16 and, in fprop, float32: tensor cores take tf32 only where the reduction is "
                f"innermost in memory, got {problem.dtype} in {pass_}"
            )
        return None

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

    def tile_clocks(self, c: dict[str, Any], m: int, n: int) -> float:
        """Clocks that storing a tile of m x n keeps the tensor cores from working; c: fields of a
        config."""
        raise NotImplementedError

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
        m, n, _ = self._tiles(c, pass_)
        rows = zip(*(values.tolist() for values in c.values()))
        sizes = (values.tolist() for values in (total, step, count, m, n))
        found = []
        for row, total, step, tiles, m, n in zip(rows, *sizes):
            one = dict(zip(c, row))
            programs = one["PROGRAMS"]
            if one["STREAM"]:
                # the parts of a tile are added in a tree, in each level one, which an SM reads
                # through L2; one is counted with the sums
                part = 4 * m * n / (device.l2_clock * assumed.L2)
                levels = max(np.log2(programs / tiles + 1) - 1, 0)
                most = -(-total // programs) * step + levels * part
                tiles = tiles / programs + 1
            else:
                programs = min(programs, tiles)
                share, tiles = self.busiest(problem, pass_, one, axes, tiles)
                most = share * total * step
            each = most + tiles * self.tile_clocks(one, m, n)
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
        if pass_ == "wgrad":
            sides = c["BLOCK_P"], c["BLOCK_Q"]
            walked = steps_of_taps(axes, sides, -(-problem.n // c["BLOCK_IMG"]))
            walked = np.repeat(walked, tiles // len(walked))
        else:
            parts = []
            for one, pair in rectangles(c, axes):
                sides = one["BLOCK_P"], one["BLOCK_Q"]
                h, w = (steps_in_order(axis, side) for axis, side in zip(pair, sides))
                parts.append(grouped((h[:, None] * w).ravel(), problem, pass_, one))
            walked = np.concatenate(parts)
        total = max(int(walked.sum()), 1)
        if tiles <= c["PROGRAMS"]:
            return walked.max(initial=0) / total, 1
        loads = np.bincount(np.arange(tiles) % c["PROGRAMS"], walked)
        return loads.max() / total, -(-tiles // c["PROGRAMS"])

    def sums(self, problem: Problem, pass_: str, c: Fields, tile: Tiles) -> np.ndarray:
        m, n, _ = tile
        # of each launch a part of all programs but one, in fp32, which is read
        shared = np.where(c["STREAM"], c["PROGRAMS"] - 1, 0) * len(problem.axes(pass_))
        return shared * m * n * 4

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
                f"kernel {self.name} multiplies float32 in tf32 only, got precision={precision!r}"
            )
        if pass_ == "wgrad":
            return [self._wgrad(problem, config)]
        return [
            self._correlation(problem, pass_, h, w, config, epilogue)
            for h, w in problem.axes(pass_)
        ]

    def _correlation(
        self, p: Problem, pass_: str, h: Axis, w: Axis, config: Config, epilogue: str
    ) -> Launch:
        """fprop, or one residue class of dgrad; axes h, w."""
        c, k = p.c // p.groups, p.k // p.groups
        source, out = (c, k) if pass_ == "fprop" else (k, c)
        tiles = self.programs(p, pass_, config, (h, w))
        scalars, known, _, _, _ = correlation_result(p, pass_, h, w, config, epilogue)
        scalars = {name: scalars[name] for name in scalars if name not in ("SPLIT_K", "sy_split")}
        tiles_n = -(-out // config.BLOCK_N)
        group = min(config.GROUP, tiles_n)
        parts = [
            (replace(config, **{name: one[name] for name in BOX}), pair)
            for one, pair in rectangles(vars(config), (h, w))
        ]
        widths, many = [], []  # live taps of a row; steps of all tiles of BLOCK_N channels
        for one, pair in parts:
            height, width = (
                int(axis.steps([side])[0]) for axis, side in zip(pair, (one.BLOCK_P, one.BLOCK_Q))
            )
            widths.append(width)
            steps_ = height * width * self.images(p, one) * -(-source // config.BLOCK_K)
            many.append(steps_ if config.STREAM else 0)
        split = parts[0][1][1].out
        sizes, ends = (
            (p.n, h.out, w.out, out * p.groups),
            [scalars[name] for name in ("sy_n", "sy_p", "sy_q")],
        )
        store = stores_boxes(config, p, pass_)
        tensors: list[tuple[str, str, Box | None]] = []
        views = [h, w]
        for (one, _), ending in zip(parts, ("", "_edge")):
            x, *views = source_box(p.n, source * p.groups, h, w, one, config.BLOCK_K)
            y = Box(sizes, (*ends, 1), self.stored(one, p, pass_), scalars["y0"], WIDTH)
            tensors += [
                (f"x{ending}", "a", replace(x, swizzle=WIDTH)),
                (f"y{ending}", "out", y if store else None),
            ]
        h, w = views  # of stride 1
        weights = self._filters(p, pass_, config)
        scalars |= dict(
            C=source,
            R=h.taps,
            S=w.taps,
            FILTER_S=p.s,
            **steps(h, w),
            sum_w=widths[0],
            group_steps=group * many[0],
            main_total=tiles_n * many[0],
            edge_sum_w=widths[-1],
            edge_group_steps=group * many[-1],
            total=tiles_n * sum(many),
            GROUP=group,
            split=split,
        )
        tensors += [("w", "b", weights), ("bias_ptr", "bias", None), part_argument(config)]
        constexprs = dict(
            TRANSPOSED=pass_ == "dgrad",
            EPILOGUE=epilogue,
            TMA_STORE=store,
            ROWS_FIRST=p.layout != "nhwc",
            ALIGN_Y=known["ALIGN_Y"],
        ) | self.constants(config)
        return self._launch("correlate", tiles, tuple(tensors), scalars, constexprs, config, pass_)

    def _wgrad(self, p: Problem, config: Config) -> Launch:
        c, (h, w) = p.c // p.groups, p.fprop_axes
        tiles = self.programs(p, "wgrad", config, (h, w))
        sides = config.BLOCK_P, config.BLOCK_Q
        many = int(steps_of_taps((h, w), sides, -(-p.n // config.BLOCK_IMG)).sum())
        many *= -(-(p.k // p.groups) // config.BLOCK_M) * -(-c // config.BLOCK_N) * p.groups
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
            sum_w=int(w.steps_out([config.BLOCK_Q]).sum()),
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
            part_argument(config),
        )
        return self._launch(
            "wgrad",
            tiles,
            tensors,
            scalars,
            dict(TMA_STORE=store) | self.constants(config),
            config,
            "wgrad",
        )

    def _launch(
        self,
        name: str,
        programs: int,
        tensors: tuple[tuple[str, str, Box | None], ...],
        scalars: dict[str, int],
        constexprs: dict[str, object],
        config: Config,
        pass_: str,
    ) -> Launch:
        m, n, _ = self.tile(config, pass_)
        return launch(
            f"{self.name}:{name}_{self.name}",
            programs,
            tensors,
            scalars,
            constexprs,
            config.options(),
            programs * (m * n + 4) if config.STREAM else 0,
        )

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
    def _programs(self, problem, pass_, c, tile, axes, flat) -> Any:
        count = Gemm._programs(self, problem, pass_, c, tile, axes, flat)
        for some, parts, sides in self._edged(c, tile, axes):
            count[some] = sum(
                Gemm._programs(self, problem, pass_, one, sides, pair, flat) for one, pair in parts
            )
        return count

    def _steps(self, problem, pass_, c, tile, axes, flat) -> tuple[Any, Any]:
        total, most = Gemm._steps(self, problem, pass_, c, tile, axes, flat)
        for some, parts, sides in self._edged(c, tile, axes):
            (main, longest), (rest, longest_rest) = (
                Gemm._steps(self, problem, pass_, one, sides, pair, flat) for one, pair in parts
            )
            total[some], most[some] = main + rest, np.maximum(longest, longest_rest)
        return total, most

    def _edged(self, c: Fields, tile: Tiles, axes: tuple[Axis, Axis]) -> Iterator[Any]:
        """(which, their `rectangles`, tiles) of the configs with an edge, those of one BLOCK_Q at a
        time."""
        edged = np.asarray(c.get("EDGE_IMG", 0)) > 0
        for side in np.unique(c["BLOCK_Q"][edged]).tolist() if edged.any() else ():
            some = edged & (c["BLOCK_Q"] == side)
            of_these = {name: values[some] for name, values in c.items()}
            yield some, rectangles(of_these, axes), [values[some] for values in tile]

    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        if config.STREAM:
            return config.PROGRAMS
        tile = tuple(np.array([side]) for side in self.tile(config, pass_))
        count = self._programs(problem, pass_, columns([config]), tile, axes, False)
        return min(config.PROGRAMS, int(np.ravel(count)[0]))

    def _filters(self, p: Problem, pass_: str, config: Config) -> Box:
        """The descriptor of w (K, R*S, C) for fprop or dgrad."""
        c, n, k = p.c // p.groups, config.BLOCK_N, config.BLOCK_K
        tile = (n, 1, k) if pass_ == "fprop" else (k, 1, n)
        return Box((p.k, p.r * p.s, c), (p.r * p.s * c, c, 1), tile, 0, WIDTH)


def part_argument(config: Config) -> tuple[str, str, None]:
    """The argument of STREAM: of each program a part of a tile and two flags of 64 bits."""
    return "part_ptr", "partials" if config.STREAM else "out", None


def stores_boxes(config: Config, problem: Problem, pass_: str) -> bool:
    """Whether results are stored by descriptor: NHWC, in multiples of 16 bytes per pixel."""
    _, out, _ = channels(problem, pass_)
    return (
        problem.layout == "nhwc"
        and out * DTYPE_BYTES[problem.dtype] % 16 == 0
        and (problem.groups == 1 or out % config.BLOCK_N == 0)
    )


@lru_cache(maxsize=1024)
def steps_of_taps(axes: tuple[Axis, Axis], sides: tuple[int, int], images: int) -> np.ndarray:
    """Steps of a tile of each tap (R, S), flat: through the boxes of its live outputs, whose sides
    these are, or one."""
    h, w = (axis.steps_out([side])[:, 0] for axis, side in zip(axes, sides))
    return np.maximum(images * h[:, None] * w, 1).ravel()


@lru_cache(maxsize=1024)
def steps_in_order(axis: Axis, side: int) -> np.ndarray:
    """Steps of the walks along an axis, in the kernels' order: of each block of `side` outputs, the
    middle ones first."""
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
