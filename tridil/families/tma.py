"""Tiles of matrix products whose operands are boxes that the hardware loads by descriptor (TMA),
sm_90 and sm_100: kernels/tma.py. Box sides are powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
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
    elements,
    filters,
    heaviest_first,
    launch,
    steps,
    strides,
    triton_version,
    vector,
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
    reduction_steps,
    search,
    suits,
    sum_branches,
    wgrad_result,
)

TILES = (
    (128, 128, 4),
    (128, 256, 8),
    (256, 128, 8),
    (64, 256, 4),
    (256, 64, 4),
    (64, 128, 4),
    (128, 64, 4),
    (64, 64, 4),
    (128, 32, 4),
    (32, 128, 4),
)  # (M, N, num_warps)


@dataclass(frozen=True)
class Correlation(GemmConfig):
    """fprop and dgrad. WEIGHT_FIRST: the weight tile is the first operand of the product.
    WARP_SPECIALIZE: loads and products have warps of their own."""

    BLOCK_K: int
    WEIGHT_FIRST: bool
    WARP_SPECIALIZE: bool


@dataclass(frozen=True)
class Reduction(GemmConfig):
    """wgrad."""

    BLOCK_M: int
    WARP_SPECIALIZE: bool


def architecture(target: str) -> int:
    """90, 100, ... of a CUDA target, else 0."""
    return int(target[5:]) if target.startswith("cuda") else 0


@lru_cache(maxsize=1024)
def tiles(
    pass_: str,
    target: str,
    nbytes: int,
    rows: int | None,
    cols: int,
    reduced: int | None,
    version: tuple[int, ...],
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(boxes, fields) of the tiles for so many channels, by Triton's version: gemm.as_fields."""
    specialize = architecture(target) // 10 == 10 and not (pass_ == "wgrad" and nbytes == 4)
    found = []
    for m, n, warps in TILES:
        # Triton 3.6 waits for each of fprop's products when 8 warps share a tile
        waits = warps == 8 and pass_ == "fprop" and target == "cuda:90" and version == (3, 6)
        if waits or not suits(m, n, rows, cols, nbytes):
            continue
        for step in reduction_steps(pass_, reduced, nbytes)[: 1 if rows else 2]:
            # tcgen05 runs at full rate from 128 rows on
            tile: dict[str, int] = (
                dict(BLOCK_M=m)
                if rows
                else dict(BLOCK_K=step, WEIGHT_FIRST=n >= 64 and (not specialize or m < 128))
            )
            tile |= dict(
                SPLIT_K=1,
                num_warps=warps,
                num_stages=3,
                BLOCK_N=n,
                WARP_SPECIALIZE=specialize,
            )
            found.append(((step if rows else m, True), tile))
    return as_fields(found)


class Tma(Gemm):
    """planes: whether fprop and dgrad read and write contiguous tensors (contiguous.py)."""

    kernels: tuple[str, ...] = ("tma",)
    joins = True
    planes = False

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        return "nhwc", 16

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        for name in (
            ("WARP_SPECIALIZE",) if pass_ == "wgrad" else ("WEIGHT_FIRST", "WARP_SPECIALIZE")
        ):
            if not isinstance(getattr(config, name), bool):
                return f"{name} must be True or False, got {getattr(config, name)!r}"
        blocks = [name for name in config.names() if name.startswith("BLOCK_")]
        return (
            self.illegal(config, pass_, target, 16, blocks)
            or self._no_descriptors(config, problem, pass_, target)
            or self.too_large(config, problem, pass_, target)
        )

    def _no_descriptors(
        self, config: Config, problem: Problem, pass_: str, target: str
    ) -> str | None:
        """Why tensor descriptors cannot describe the tensors or the tiles. Limits: CUDA driver API,
        cuTensorMapEncodeTiled."""
        if architecture(target) < 90:
            return f"kernel {config.kernel!r} needs sm_90 or later, got {target}"
        if config.WARP_SPECIALIZE and architecture(target) // 10 != 10:
            return f"WARP_SPECIALIZE is for sm_100, got {target}"
        if config.WARP_SPECIALIZE and pass_ == "wgrad" and problem.dtype == "float32":
            return "WARP_SPECIALIZE crashes the compiler for wgrad in float32"
        sides = [getattr(config, name) for name in config.names() if name.startswith("BLOCK_")]
        return no_descriptors(problem, pass_) or self._no_boxes(config, problem, pass_, sides)

    def _no_boxes(
        self, config: Config, problem: Problem, pass_: str, sides: list[int]
    ) -> str | None:
        if max(sides) > 256:
            return f"box sides must be at most 256, got {sides}"
        return reaches_over_groups(config, problem, pass_)

    # ---- candidates
    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        is_meant = architecture(target) // 10 in (9, 10) and has_mma(problem, precision)
        if (
            not is_meant
            or is_flat(problem, pass_)
            or is_depthwise(problem)
            or no_descriptors(problem, pass_)
        ):
            return []
        version, sizes = triton_version(), channels(problem, pass_)
        found = tiles(pass_, target, DTYPE_BYTES[problem.dtype], *sizes, version)
        whole = self.whole(problem, pass_, found, kernel="tma", maxnreg=None)
        if whole is None:
            return []
        options = self.splits(whole, search(problem, pass_), target)
        if pass_ == "wgrad" or architecture(target) // 10 != 10:
            return [options]
        # else the addresses of the store would spill
        stored = stores_boxes(options.c, problem, pass_)
        return [options.some((self._tiles(options.c, pass_)[0] <= 128) | stored)]

    def why_not(self, problem: Problem, pass_: str, target: str, precision: str) -> str | None:
        if is_flat(problem, pass_) or is_depthwise(problem) or not has_mma(problem, precision):
            return None
        return (
            no_descriptors(problem, pass_)
            if architecture(target) // 10 in (9, 10)
            else f"{target} has no descriptors that pay"
        )

    # ---- time
    def writes_partials(self, c: dict[str, Any], pass_: str) -> np.ndarray:
        # the epilogue of wgrad is as wide
        return (c["SPLIT_K"] > 1) | (pass_ == "wgrad")

    def alone(self, c: Fields) -> np.ndarray:
        return np.where(c["WARP_SPECIALIZE"], assumed.ALONE_SPECIALIZED, super().alone(c))

    def resident(
        self, problem: Problem, pass_: str, c: Fields, tile: Tiles, device: Device
    ) -> np.ndarray:
        # its warps take all registers
        return np.where(c["WARP_SPECIALIZE"], 1, super().resident(problem, pass_, c, tile, device))

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
        fma, moved = m * n * k, (m + n) * k * nbytes
        fixed, _ = assumed.LOOP["tma", pass_]
        specialized = c["WARP_SPECIALIZE"]
        products = np.where(specialized, fma / 2048 * (nbytes / 2), fma / 2**16)
        other = np.where(specialized, assumed.SPECIALIZED, c["num_warps"] * fixed)
        # operands stay in shared memory; a warpgroup reads its 64 rows and all columns
        read = (m + (-(-m // 64) if device.target == "cuda:90" else 1) * n) * k * nbytes
        return {
            "tensor": fma / device.mma_rate(problem.dtype, precision),
            "issue": (products + other) / 4,
            "shared": (moved + read) / 128,
            "l2": moved / device.l2_clock / assumed.L2,
        }

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        return f"{device.target} loads boxes of the image by descriptor"

    # ---- launches
    def plan(
        self, problem: Problem, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        if pass_ == "wgrad":
            return self._wgrad(problem, config, precision)
        return [
            item
            for h, w in problem.axes(pass_)
            for item in self._correlation(problem, pass_, h, w, config, precision, epilogue)
        ]

    def _correlation(
        self,
        p: Problem,
        pass_: str,
        h: Axis,
        w: Axis,
        config: Config,
        precision: str,
        epilogue: str,
    ) -> list[Launch]:
        """fprop, or one residue class of dgrad; axes h, w."""
        c, k = p.c // p.groups, p.k // p.groups
        source, out = (c, k) if pass_ == "fprop" else (k, c)
        programs = self.programs(p, pass_, config, (h, w))
        scalars, constexprs, result, total, sums = correlation_result(
            p, pass_, h, w, config, epilogue
        )
        store = self.planes or bool(stores_boxes(vars(config), p, pass_))
        y = self.result_box(config, h, w, out * p.groups, scalars)
        x, h, w = self.source_box(p.n, source * p.groups, h, w, config, config.BLOCK_K)
        ragged = pass_ == "fprop" and c % config.BLOCK_K != 0
        tensors = (
            ("x", "a", x),
            ("w", "b", weight_box(p, pass_, config, ragged)),
            ("bias_ptr", "bias", None),
            ("y", result, y if store else None),
        )
        scalars |= dict(C=source, CW=c, R=h.taps, S=w.taps, FILTER_S=p.s, **steps(h, w))
        constexprs |= config.constexprs() | dict(
            PRECISION=precision,
            TMA_STORE=store,
            INT64=not store and elements(p) >= 2**31,
            RAGGED=ragged,
            PLANES=self.planes,
        )
        return [
            launch(
                "tma:correlate_tma", programs, tensors, scalars, constexprs, config.options(), total
            ),
            *sums,
        ]

    def source_box(
        self, n: int, size: int, h: Axis, w: Axis, config: Config, block: int
    ) -> tuple[Box, Axis, Axis]:
        """The descriptor of what taps read; see the function `source_box`."""
        return source_box(n, size, h, w, config, block)

    def dy_box(self, p: Problem, config: Config) -> Box:
        """The descriptor of dy for wgrad."""
        sizes = p.n, p.p, p.q, p.k
        return Box(sizes, nhwc_strides(*sizes[1:]), box_of(config, config.BLOCK_M))

    def result_box(
        self, config: Config, h: Axis, w: Axis, size: int, scalars: dict[str, int]
    ) -> Box:
        """The descriptor of the result of fprop or dgrad, of `size` channels: through the strides that
        the kernel is given, or of partial sums."""
        sizes = config.SPLIT_K, scalars["N"], h.out, w.out, size
        ends = [scalars[name] for name in ("sy_n", "sy_p", "sy_q")]
        block = 1, *box_of(config, config.BLOCK_N)
        return Box(sizes, (prod(sizes[1:]), *ends, 1), block, scalars["y0"])

    def _wgrad(self, p: Problem, config: Config, precision: str) -> list[Launch]:
        c, (h, w) = p.c // p.groups, p.fprop_axes
        programs = self.programs(p, "wgrad", config, (h, w))
        # the descriptor stores channels last
        partial = config.SPLIT_K > 1 or p.layout != "nhwc"
        scalars, _, result, total, sums = wgrad_result(p, config, partial)
        x, h, w = self.source_box(p.n, p.c, h, w, config, config.BLOCK_N)
        dy = self.dy_box(p, config)
        whole = prod(p.w_shape), p.r * p.s * c, c, 1
        dw = Box((config.SPLIT_K, p.k, p.r * p.s, c), whole, (1, config.BLOCK_M, 1, config.BLOCK_N))
        tensors = (("x", "b", x), ("dy", "a", dy), ("dw", result, dw))
        scalars |= dict(C=c, R=p.r, S=p.s, **steps(h, w))
        constexprs = config.constexprs() | dict(PRECISION=precision, PLANES=self.planes)
        return [
            launch(
                "tma:wgrad_tma", programs, tensors, scalars, constexprs, config.options(), total
            ),
            *sums,
        ]

    # ---- several convolutions in one launch
    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        if reason := super().unfit(config, branches, pass_, target):
            return reason
        if branches.first.stride != (1, 1):
            return f"kernel tma joins branches of stride 1, got {branches.first.stride}"
        if reason := reads_others(config, branches, pass_):
            return reason
        if (
            pass_ != "wgrad"
            and config.WARP_SPECIALIZE
            and prod(box_of(config, 1)) > 128
            and not stores_in_branch(config, branches, pass_)
        ):
            return "the store's addresses would spill: tiles of 256 pixels need results in multiples of BLOCK_N channels"
        return None

    def branch_plan(
        self, branches: Branches, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        p, order = branches.first, heaviest_first(branches, pass_)
        [axes] = branch_axes(branches, pass_)  # of stride 1
        h, w = axes[0]
        scalars = branch_sizes(branches, axes)
        constexprs = config.constexprs() | dict(
            BRANCHES=branch_geometry(branches, pass_, order, axes),
            COUNT=len(order),
            PRECISION=precision,
        )
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
        sizes = (1, p.n, h.out, w.out, result[1])
        store = stores_in_branch(config, branches, pass_)
        y = Box(sizes, (prod(sizes[1:]), s_n, s_p, s_q, 1), (1, *box_of(config, config.BLOCK_N)))
        out = [channels(problem, pass_)[1] for problem in branches.problems]
        ragged = pass_ == "fprop" and any(
            problem.c // p.groups % config.BLOCK_K for problem in branches.problems
        )
        weights = tuple(
            (name, role, weight_box(branches.problems[i], pass_, config, ragged))
            for i, (name, role, _) in zip(order, filters("w", "b", order))
        )
        tensors = (
            ("x", "a", x),
            *weights,
            ("bias_ptr", "bias", None),
            ("y", "out", y if store else None),
        )
        scalars |= dict(sy_n=s_n, sy_p=s_p, sy_q=s_q, sy_k=s_k)
        constexprs |= dict(
            SUM=branches.adds(pass_),
            TRANSPOSED=pass_ == "dgrad",
            EPILOGUE=epilogue,
            ALIGN_Y=aligned(p, *out, *begins) if p.layout == "nhwc" else 1,
            TMA_STORE=store,
            INT64=not store and branches.largest >= 2**31,
            RAGGED=ragged,
        )
        return [
            launch(
                "tma:correlate_tma_branches",
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
        p, split = branches.first, config.SPLIT_K
        h, w = p.fprop_axes
        last = p.layout == "nhwc"
        # the descriptor stores channels last
        partial = split > 1 or not last
        x, _, _ = source_box(p.n, branches.x_channels[-1], h, w, config, config.BLOCK_N)
        k = branches.y_channels[-1]
        dy = Box(
            (p.n, h.out, w.out, k), nhwc_strides(h.out, w.out, k), box_of(config, config.BLOCK_M)
        )
        out, begin = [], 0
        for i, (name, role, _) in zip(order, filters("dw", "out", order)):
            q = branches.problems[i]
            taps, c = q.r * q.s, q.c // q.groups
            box = Box(
                (split, q.k, taps, c),
                (prod(q.w_shape), taps * c, c, 1),
                (1, config.BLOCK_M, 1, config.BLOCK_N),
                begin,
            )
            out.append((name, "partials" if partial else role, box))
            begin += split * prod(q.w_shape) if partial else 0
        found = [
            launch(
                "tma:wgrad_tma_branches",
                programs,
                (("x", "b", x), ("dy", "a", dy), *out),
                scalars | {"SPLIT_K": split},
                constexprs,
                config.options(),
                begin,
            )
        ]
        return found + sum_branches(branches, order, split, constexprs) if partial else found


def reaches_over_groups(config: Config, problem: Problem, pass_: str) -> str | None:
    """Why a block of channels would reach from a group into the next one."""
    reduced, block = (
        problem.c if pass_ == "fprop" else problem.k,
        "BLOCK_M" if pass_ == "wgrad" else "BLOCK_K",
    )
    if problem.groups > 1 and reduced // problem.groups % getattr(config, block):
        return (
            f"with groups={problem.groups}, {block} (={getattr(config, block)}) must divide the {reduced // problem.groups} channels of a "
            "group"
        )
    return None


def reads_others(config: Config, branches: Branches, pass_: str) -> str | None:
    """Why a block of channels would reach from a branch's slice into the next one's."""
    sliced = {"fprop": not branches.shared_input, "dgrad": branches.reduce == "cat"}
    sizes = [channels(problem, pass_)[2] for problem in branches.problems]
    if sliced.get(pass_) and any(size % config.BLOCK_K for size in sizes):
        return f"BLOCK_K (={config.BLOCK_K}) must divide the channels that each branch reads, got {sizes}"
    return None


def stores_in_branch(config: Config, branches: Branches, pass_: str) -> bool:
    """Whether fprop or dgrad stores by descriptor: whether a box of the result stays in its branch
    and its group."""
    p = branches.first
    out = [channels(problem, pass_)[1] for problem in branches.problems]
    begins = branches.y_channels if pass_ == "fprop" else branches.x_channels
    alone = (branches.adds(pass_) or len(out) == 1) and p.groups == 1
    return (
        p.layout == "nhwc"
        and (alone or all(size % config.BLOCK_N == 0 for size in out))
        and aligned(p, *out, *begins) == vector(p)
    )


def weight_box(p: Problem, pass_: str, config: Config, ragged: bool) -> Box:
    """The descriptor of w for fprop or dgrad."""
    c, taps = p.c // p.groups, p.r * p.s
    tile = (
        (config.BLOCK_N, config.BLOCK_K) if pass_ == "fprop" else (config.BLOCK_K, config.BLOCK_N)
    )
    if ragged:
        return Box((p.k, taps, c), (taps * c, c, 1), (tile[0], 1, tile[1]))
    return Box((p.k, taps * c), (taps * c, 1), tile)


def no_descriptors(problem: Problem, pass_: str) -> str | None:
    """Why the tensors of a pass cannot be described."""
    c, k = problem.c // problem.groups, problem.k // problem.groups
    if (
        problem.dtype == "float64"
        or c % vector(problem)
        or pass_ != "fprop"
        and k % vector(problem)
    ):
        return f"descriptors need channels in multiples of 16 bytes and at most 4 bytes each, got {c} and {k} of {problem.dtype} per group"
    if any(axis.subsampled is None for axes in problem.axes(pass_) for axis in axes):
        return f"descriptors need a dilation that is a multiple of the stride, got stride {problem.stride}, dilation {problem.dilation}"
    return None


def outdoes_pointers(problem: Problem, pass_: str, target: str) -> bool:
    """Whether kernels that load by descriptor are so clearly faster that no others are tried: in
    none of the workloads in 16 bits is it predicted otherwise (half of what a new shape costs)."""
    return (
        architecture(target) // 10 in (9, 10)
        and DTYPE_BYTES[problem.dtype] == 2
        and problem.groups == 1
        and min(problem.c, problem.k) >= (128 if pass_ == "wgrad" else 64)
        and problem.useful_macs >= 4e9
        and no_descriptors(problem, pass_) is None
    )


def stores_boxes(c: dict[str, Any], problem: Problem, pass_: str) -> Any:
    """Whether fprop or dgrad stores its result by descriptor: fp32 partial sums, or NHWC, in
    multiples of 16 bytes per pixel. c: fields of a config, or of many."""
    _, out, _ = channels(problem, pass_)
    split, n = np.asarray(c["SPLIT_K"]) > 1, np.asarray(c["BLOCK_N"])
    bytes_ = out * np.where(split, 4, DTYPE_BYTES[problem.dtype])
    whole = (problem.groups == 1) | (out % n == 0)
    return (split | (problem.layout == "nhwc")) & (bytes_ % 16 == 0) & whole


def source_box(
    n: int, size: int, h: Axis, w: Axis, config: Config, block: int
) -> tuple[Box, Axis, Axis]:
    """The descriptor of the source of a correlation (NHWC, `size` channels), strided axes seen as
    views of stride 1, and the axes of that view."""
    assert h.subsampled and w.subsampled  # `no_descriptors` refuses others
    (h_view, h0, h_step), (w_view, w0, w_step) = h.subsampled, w.subsampled
    s_n, s_h, s_w, _ = nhwc_strides(h.size, w.size, size)
    return (
        Box(
            (n, h_view.size, w_view.size, size),
            (s_n, s_h * h_step, s_w * w_step, 1),
            box_of(config, block),
            h0 * s_h + w0 * s_w,
        ),
        h_view,
        w_view,
    )


def box_of(config: Config, size: int) -> tuple[int, ...]:
    return config.BLOCK_IMG, config.BLOCK_P, config.BLOCK_Q, size


def nhwc_strides(h: int, w: int, c: int) -> tuple[int, ...]:
    return h * w * c, w * c, c, 1


FAMILY = Tma()
