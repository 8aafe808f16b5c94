"""Tiles of matrix products whose operands are loaded through pointers, on every GPU:
kernels/gather.py. "gather_flat" is the form for few channels, whose reduction runs over flattened
(tap, channel) pairs; in wgrad its column tiles hold several taps.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, prod
from typing import Any

import numpy as np

from .. import assumed
from ..branches import Branches
from ..devices import Device
from ..problem import DTYPE_BYTES, Axis, Problem
from .base import (
    Config,
    Launch,
    accumulator,
    aligned,
    branch_axes,
    branch_filters,
    branch_geometry,
    branch_sizes,
    elements,
    filters,
    heaviest_first,
    launch,
    not_positive,
    pixels,
    steps,
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
    channels_of,
    correlation_result,
    has_mma,
    is_flat,
    reduction_steps,
    search,
    stored,
    suits,
    sum_branches,
    wgrad_result,
)
from .tma import outdoes_pointers

# tiles (M, N, num_warps); on the smallest one more warps would repeat each other's work
TILES = (
    (128, 128, 4),
    (128, 256, 8),
    (256, 128, 8),
    (64, 128, 4),
    (128, 64, 4),
    (64, 64, 4),
    (128, 32, 4),
    (64, 32, 4),
    (128, 16, 4),
    (64, 16, 4),
    (128, 8, 2),
    (64, 8, 2),
    (32, 128, 4),
    (32, 64, 4),
    (16, 128, 4),
    (16, 64, 4),
    (16, 32, 4),
    (16, 16, 2),
    (8, 128, 2),
    (8, 64, 2),
    (8, 32, 2),
    (8, 16, 2),
)
# without tensor cores: fp64, ieee fp32
SIMT_TILES = (
    (64, 64, 4),
    (64, 32, 4),
    (64, 16, 4),
    (64, 8, 2),
    (32, 32, 4),
    (32, 16, 4),
    (32, 8, 2),
    (16, 64, 4),
    (16, 16, 4),
    (8, 64, 2),
    (8, 16, 2),
)
FLAT = "gather_flat"


@dataclass(frozen=True)
class Correlation(GemmConfig):
    """fprop and dgrad. CLAMP keeps the addresses of masked lanes inside the tensor."""

    BLOCK_K: int
    CLAMP: bool


@dataclass(frozen=True)
class Reduction(GemmConfig):
    """wgrad. BUNDLE: groups that are multiplied as one, whose filters are the blocks on the
    diagonal (not so in fprop and dgrad: NaN times a zero beside the diagonal is NaN)."""

    BLOCK_M: int
    CLAMP: bool
    BUNDLE: int = 1


@lru_cache(maxsize=1024)
def bundled(problem: Problem, groups: int) -> Problem:
    """The convolution that multiplies so many groups as one; its filters are `groups` times as
    large."""
    return replace(problem, groups=problem.groups // groups) if groups > 1 else problem


def bundles(problem: Problem) -> list[int]:
    """How many groups of few channels a tile may take as one: up to 64 channels."""
    most = max(problem.c, problem.k) // problem.groups
    return [n for n in (2, 4, 8) if most * n <= 64 and not _no_bundle(problem, n)]


def bundle_of(config: Config) -> int:
    return getattr(config, "BUNDLE", 1)


def bundled_in(problem: Problem, c: Fields) -> Problem:
    """`bundled`, as in configs of one BUNDLE (c: fields, arrays)."""
    return bundled(problem, int(c["BUNDLE"][0])) if len(c.get("BUNDLE", ())) else problem


def _no_bundle(problem: Problem, groups: int) -> str | None:
    nbytes = DTYPE_BYTES[problem.dtype]
    each = problem.c // problem.groups, problem.k // problem.groups
    if groups > 1 and (problem.groups % groups or any(size * nbytes % 16 for size in each)):
        return (
            f"BUNDLE (={groups}) must divide groups (={problem.groups}), whose channels are multiples of 16 bytes, got "
            f"{each[0]} and {each[1]} of {problem.dtype}"
        )
    return None


def least_channels(target: str) -> int:
    """Output channels of a tile, at least: columns of a matrix product."""
    return 8 if target.startswith("cuda") else 16


@lru_cache(maxsize=1024)
def tiles(
    pass_: str, target: str, nbytes: int, mma: bool, c: int, k: int, taps: int, flat: bool
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(boxes, fields) of the tiles for so many channels of a group: gemm.as_fields."""
    rows, cols, reduced = channels_of(pass_, c, k, taps)
    clamp = target.startswith("cuda") and int(target[5:]) >= 100
    # operands whose aligned runs are too short for cp.async (4 bytes) are loaded through registers,
    # an element at a time; flattened or clamped, each run of channels has an address of its own
    scattered = {
        size: 1 / gcd(size, 16 // nbytes) if flat or clamp else gcd(size, 4) * nbytes < 4
        for size in (c, k)
    }
    m_scattered = gcd(k, 4) * nbytes < 4 if rows else scattered[c if pass_ == "fprop" else k]
    n_scattered = scattered[c]
    found = []
    for m, n, warps in TILES if mma else SIMT_TILES:
        if not suits(m, n, rows, cols, nbytes, least_channels(target)):
            continue
        # addresses: 16 a thread, without tensor cores 512 a program
        most = 512 * (warps if mma else 1)
        sizes = [
            step
            for step in (reduction_steps(pass_, reduced, nbytes) if mma else [16])
            if max(m * m_scattered, n * n_scattered) * step <= most
        ]
        # its accumulator leaves few registers: below is what would spill
        large = m * n >= 128 * 128
        if large and pass_ == "wgrad" and (cols % n or rows % m):
            continue
        if large and (pass_ != "wgrad" and cols % n or pass_ == "wgrad" and clamp):
            sizes = [step for step in sizes if step * nbytes < 128]
        for step in sizes[: 1 if rows else 2]:
            powers, spills = large and bool(rows), large and not rows
            box = (
                step if rows else m,
                powers,
                spills,
                (step, n if rows else 0) if flat else None,
            )
            tile: dict[str, int] = dict(BLOCK_M=m, BUNDLE=1) if rows else dict(BLOCK_K=step)
            tile |= dict(SPLIT_K=1, num_warps=warps, num_stages=3, BLOCK_N=n, CLAMP=clamp)
            found.append((box, tile))
    return as_fields(found)


class Gather(Gemm):
    kernels: tuple[str, ...] = ("gather", FLAT)
    joins = True

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def flat(self, kernel: str) -> bool:
        return kernel == FLAT

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        return "nhwc", 1

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        if not isinstance(config.CLAMP, bool):
            return f"CLAMP must be True or False, got {config.CLAMP!r}"
        reason = self.illegal(
            config,
            pass_,
            target,
            least_channels(target),
            ("BLOCK_N", "BLOCK_M" if pass_ == "wgrad" else "BLOCK_K"),
        )
        if reason:
            return reason
        if pass_ == "wgrad":
            if reason := not_positive(config, ["BUNDLE"]) or _no_bundle(problem, config.BUNDLE):
                return reason
        if self.flat(config.kernel) and pass_ != "wgrad" and config.SPLIT_K > 1:
            return f"{FLAT} does not split {pass_}'s reduction, got SPLIT_K={config.SPLIT_K}"
        return self.too_large(config, problem, pass_, target)

    # ---- candidates
    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        # of a dgrad that no tap reaches nothing is launched, but something must be chosen
        if is_depthwise(problem) and problem.axes(pass_):
            return []
        flat = is_flat(problem, pass_)
        found = self._tiles_of(problem, pass_, target, precision, flat)
        if (
            pass_ == "wgrad"
            and not flat
            and problem.r * problem.s > 1
            and problem.c < 128 * problem.groups
        ):
            # dy is read once for several taps
            for options in self._tiles_of(problem, pass_, target, precision, True):
                found.append(options.some(options.c["BLOCK_N"] * problem.groups > problem.c))
        return found

    def candidates(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        # of one convolution: a set of branches may have one that descriptors cannot take
        if outdoes_pointers(problem, pass_, target):
            return []
        found = super().candidates(problem, pass_, target, precision)
        if pass_ == "wgrad" and has_mma(problem, precision) and not is_depthwise(problem):
            for groups in bundles(problem):
                one, taps = bundled(problem, groups), problem.r * problem.s > 1
                for options in self._tiles_of(one, pass_, target, precision, taps):
                    found.append(options.but(BUNDLE=np.full(len(options), groups)))
        return found

    def _tiles_of(
        self, problem: Problem, pass_: str, target: str, precision: str, flat: bool
    ) -> list[Options]:
        c, k = problem.c // problem.groups, problem.k // problem.groups
        taps = problem.r * problem.s if flat else 1
        mma, known = has_mma(problem, precision), search(problem, pass_)
        found = tiles(pass_, target, DTYPE_BYTES[problem.dtype], mma, c, k, taps, flat)
        kernel, registers = FLAT if flat else "gather", 255 if target.startswith("cuda") else None
        whole = self.whole(problem, pass_, found, kernel=kernel, maxnreg=registers)
        if whole is None:
            return []
        if pass_ == "wgrad":
            return [self.splits(whole, known, target)]
        # larger accumulators and a split would spill
        m, n, _ = self._tiles(whole.c, pass_)
        return [whole if flat else self.splits(whole, known, target, m * n <= 128 * 128)]

    def sort(self, config: Config) -> Hashable:
        return config.kernel, bundle_of(config)

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
        (m, n, k), nbytes, warps = tile, DTYPE_BYTES[problem.dtype], c["num_warps"]
        fma, moved = m * n * k, (m + n) * k * nbytes
        products = fma / 2048 * (nbytes / 2) if has_mma(problem, precision) else fma / 32
        fixed, per_copy = assumed.LOOP["gather", pass_]
        # bytes of one copy of each operand: x or dy, and (innermost channels C) w or (wgrad) x
        c_align, k_align = (
            gcd(size // problem.groups * nbytes, 16) for size in (problem.c, problem.k)
        )
        widths = c_align if pass_ == "fprop" else k_align, c_align
        each = [per_copy / width if width >= 4 else assumed.SCATTERED / nbytes for width in widths]
        if flat:
            # which operand is the one that taps shift
            image = pass_ == "wgrad"
            each[image] = assumed.FLAT / widths[image]
        other = warps * fixed + sum(
            cost * size * k * nbytes / 32 for size, cost in zip((m, n), each)
        )
        # warps in a grid, each reads its rows and columns
        in_rows = np.where(
            m >= n,
            np.maximum(1, np.minimum(warps, m // 32)),
            np.maximum(1, warps // np.maximum(1, np.minimum(warps, n // 32))),
        )
        read = (warps // in_rows * m + in_rows * n) * k * nbytes
        clocks = {
            "tensor": fma / device.mma_rate(problem.dtype, precision),
            "issue": (products + other) / 4,
            "shared": (moved + read) / 128,
            "l2": moved / device.l2_clock / assumed.L2,
        }
        fewest = min(problem.c, problem.k) // problem.groups * nbytes
        slower = assumed.GATHER_FEW[pass_] if fewest < 64 else 1
        return {unit: slower * value for unit, value in clocks.items()}

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        if self.flat(config.kernel):
            count = (problem.k if pass_ == "dgrad" else problem.c) // problem.groups
            if not is_flat(problem, pass_):
                return f"{count} channels: a tile of several taps reads dy once for all of them"
            return f"{count} channels: blocks of (tap, channel) pairs waste less than blocks of channels"
        return (
            "pointer loads"
            if has_mma(problem, precision)
            else f"pointer loads: {problem.dtype} does not run on tensor cores here"
        )

    # ---- work and time of bundled groups: those of the convolution that multiplies them as one
    def _times(self, problem, pass_, c, kernel, device, precision):
        return super()._times(bundled_in(problem, c), pass_, c, kernel, device, precision)

    def _executed(self, problem, pass_, c, kernel):
        return super()._executed(bundled_in(problem, c), pass_, c, kernel)

    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        return super().programs(bundled(problem, bundle_of(config)), pass_, config, axes)

    def requested_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        return super().requested_bytes(bundled(problem, bundle_of(config)), pass_, config)

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

    def _constexprs(self, problem: Problem, config: Config, precision: str) -> dict:
        # flat offsets are relative to the first live tap's pixel, which may lie before the tensor
        most = 2**30 if self.flat(config.kernel) else 2**31
        return config.constexprs() | dict(
            PRECISION=precision,
            ACC=accumulator(problem),
            PIXELS=pixels(config),
            INT64=elements(problem) >= most,
        )

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
        c, source = p.c // p.groups, (p.k if pass_ == "dgrad" else p.c) // p.groups
        scalars, constexprs, result, total, sums = correlation_result(
            p, pass_, h, w, config, epilogue
        )
        constexprs |= self._constexprs(p, config, precision)
        tensors = (
            ("x_ptr", "a", None),
            ("w_ptr", "b", None),
            ("bias_ptr", "bias", None),
            ("y_ptr", result, None),
        )
        scalars |= dict(stride_h=h.stride, stride_w=w.stride, **steps(h, w))
        constexprs |= dict(
            C=source,
            CW=c,
            R=h.taps,
            S=w.taps,
            FILTER_R=p.r,
            FILTER_S=p.s,
            ALIGN=aligned(p, source),
            ALIGN_W=aligned(p, c),
        )
        flat = self.flat(config.kernel)
        if not flat:
            constexprs["EVEN_N"] = channels(p, pass_)[1] % config.BLOCK_N == 0
        kernel, programs = (
            "gather:correlate_flat" if flat else "gather:correlate",
            self.programs(p, pass_, config, (h, w)),
        )
        return [
            launch(kernel, programs, tensors, scalars, constexprs, config.options(), total),
            *sums,
        ]

    def _wgrad(self, p: Problem, config: Config, precision: str) -> list[Launch]:
        one, split, (h, w) = bundled(p, config.BUNDLE), config.SPLIT_K, p.fprop_axes
        c, k = one.c // one.groups, one.k // one.groups
        scalars, to, result, total, sums = wgrad_result(p, config, split > 1)
        tensors = (("x_ptr", "b", None), ("dy_ptr", "a", None), ("dw_ptr", result, None))
        scalars |= dict(
            stride_h=h.stride,
            stride_w=w.stride,
            **steps(h, w),
            C=c,
            K=k,
            G=one.groups,
            sw_split=prod(p.w_shape),
            **dict(zip(("sw_k", "sw_c", "sw_r", "sw_s"), to)),
        )
        flat = self.flat(config.kernel)
        constexprs = self._constexprs(p, config, precision) | dict(
            R=p.r,
            S=p.s,
            FLAT=flat,
            ALIGN_C=aligned(p, c),
            ALIGN_K=aligned(p, k),
            # where channels are contiguous, taps are multiples of them
            ALIGN_W=aligned(p, c) if to[1] == 1 and not flat else 1,
        )
        return [
            launch(
                "gather:wgrad",
                self.programs(p, "wgrad", config, (h, w)),
                tensors,
                scalars,
                constexprs,
                config.options(),
                total,
            ),
            *sums,
        ]

    # ---- several convolutions in one launch
    def branch_tiles(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Config]:
        if pass_ == "wgrad" or is_depthwise(problem):
            return super().branch_tiles(problem, pass_, target, precision)
        found = self._tiles_of(problem, pass_, target, precision, False)
        whole = [config for options in found for config in options if config.SPLIT_K == 1]
        # the longest programs of a small launch run alone in the end, and keep an SM busy with more
        # warps, of which it holds two programs
        more = [
            replace(config, num_warps=8, maxnreg=config.maxnreg and 128)
            for config in whole
            if config.num_warps == 4
        ]
        return whole + more

    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        if pass_ != "wgrad" and self.flat(config.kernel):
            return f"{FLAT} does not join branches of {pass_}"
        if bundle_of(config) > 1:
            return f"branches in one launch bundle no groups, got BUNDLE={bundle_of(config)}"
        return super().unfit(config, branches, pass_, target)

    def branch_plan(
        self, branches: Branches, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        p, order = branches.first, heaviest_first(branches, pass_)
        c, k = (
            [getattr(problem, name) // p.groups for problem in branches.problems] for name in "ck"
        )
        align_c, align_k = (
            aligned(p, *sizes, *begins)
            for sizes, begins in ((c, branches.x_channels), (k, branches.y_channels))
        )
        constexprs = {name: v for name, v in config.constexprs().items() if name != "BUNDLE"}
        constexprs |= dict(
            COUNT=len(order),
            PRECISION=precision,
            ACC=accumulator(p),
            PIXELS=pixels(config),
            INT64=branches.largest >= (2**30 if self.flat(config.kernel) else 2**31),
        )
        if pass_ == "wgrad":
            return self._wgrad_branches(branches, config, order, constexprs, align_c, align_k)
        result, source, rows, cols, align, align_w = (
            (branches.y_shape, branches.x_channels[-1], c, k, align_c, align_c)
            if pass_ == "fprop"
            else (branches.x_shape, branches.y_channels[-1], k, c, align_k, align_c)
        )
        align_y = align_k if pass_ == "fprop" else align_c
        constexprs |= dict(
            SUM=branches.adds(pass_),
            CHANNELS=source,
            MOST_R=max(problem.r for problem in branches.problems),
            MOST_S=max(problem.s for problem in branches.problems),
            TRANSPOSED=pass_ == "dgrad",
            EPILOGUE=epilogue,
            ALIGN=align,
            ALIGN_W=align_w,
            ALIGN_Y=align_y if p.layout == "nhwc" else 1,
            EVEN_C=all(size % config.BLOCK_K == 0 for size in rows),
            EVEN_N=all(size % config.BLOCK_N == 0 for size in cols),
        )
        tensors = (
            ("x_ptr", "a", None),
            *filters("w", "b", order),
            ("bias_ptr", "bias", None),
            ("y_ptr", "out", None),
        )
        found = []
        for axes in branch_axes(branches, pass_):
            h, w = axes[0]
            scalars = branch_sizes(branches, axes) | dict(stride_h=h.stride, stride_w=w.stride)
            scalars |= stored(result, p.layout, h, w)
            geometry = dict(
                BRANCHES=branch_geometry(branches, pass_, order, axes),
                FILTERS=branch_filters(branches, order, axes),
            )
            programs = self.branch_programs(branches, pass_, config, axes)
            found.append(
                launch(
                    "gather:correlate_branches",
                    programs,
                    tensors,
                    scalars,
                    geometry | constexprs,
                    config.options(),
                )
            )
        return found

    def _wgrad_branches(
        self, branches, config, order, constexprs, align_c, align_k
    ) -> list[Launch]:
        [axes] = branch_axes(branches, "wgrad")
        h, w = axes[0]
        programs = self.branch_programs(branches, "wgrad", config, axes)
        scalars = branch_sizes(branches, axes) | dict(stride_h=h.stride, stride_w=w.stride)
        geometry = branch_geometry(branches, "wgrad", order, axes)
        constexprs = dict(BRANCHES=geometry) | constexprs
        last, split = branches.first.layout == "nhwc", config.SPLIT_K
        flat = self.flat(config.kernel)
        out = filters("dw", "out", order)
        part = ("part_ptr", "partials" if split > 1 else "a", None)
        constexprs |= dict(
            CHANNELS=branches.x_channels[-1],
            CHANNELS_Y=branches.y_channels[-1],
            CHANNELS_LAST=last,
            IS_SPLIT=split > 1,
            FLAT=flat,
            ALIGN_C=align_c,
            ALIGN_K=align_k,
            ALIGN_W=align_c if (last or split > 1) and not flat else 1,
        )
        total = [prod(shape) for shape in branches.w_shapes]
        found = [
            launch(
                "gather:wgrad_branches",
                programs,
                (("x_ptr", "b", None), ("dy_ptr", "a", None), *out, part),
                scalars | {"SPLIT_K": split},
                constexprs,
                config.options(),
                split * sum(total) if split > 1 else 0,
            )
        ]
        return found + sum_branches(branches, order, split, constexprs) if split > 1 else found


FAMILY = Gather()
