"""Tiles of matrix products that read and write contiguous tensors where they are, sm_90 and later:
kernels/tma.py with PLANES.

A box is BLOCK_Q pixels of one row of some planes. Only w is copied to channels_last. A row must be
a multiple of 16 bytes, of the source and of the result. Experimental: boxes begin anywhere in a row,
and what that costs in L2 no GPU has shown.
"""

from __future__ import annotations

import numpy as np

from ..devices import Device
from ..problem import DTYPE_BYTES, Axis, Problem
from .base import Box, Config, triton_version, vector
from .gemm import Options, channels, has_mma, search
from .tma import TILES as TMA_TILES
from .tma import Tma, architecture, no_descriptors, tiles

TILES = [(m, n) for m, n, _ in TMA_TILES if m >= 64]


class Contiguous(Tma):
    kernels: tuple[str, ...] = ("contiguous",)
    experimental = True
    joins = False
    planes = True

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        return "nhwc" if tensor == "w" else "nchw", 16

    # ---- legality
    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        if reason := no_planes(problem, pass_):
            return reason
        if reason := super().fits(config, problem, pass_, target):
            return reason
        if config.BLOCK_IMG > 1 or config.BLOCK_P > 1:
            return f"a box is a part of one row, got {config.BLOCK_IMG}x{config.BLOCK_P}x{config.BLOCK_Q}"
        if pass_ == "wgrad":
            return None
        if (config.BLOCK_Q, config.BLOCK_N) not in TILES:
            return (
                f"(BLOCK_Q, BLOCK_N) must be one of {TILES}, got {(config.BLOCK_Q, config.BLOCK_N)}"
            )
        _, out, _ = channels(problem, pass_)
        if problem.groups > 1 and config.SPLIT_K == 1 and out % config.BLOCK_N:
            return f"with groups={problem.groups}, BLOCK_N (={config.BLOCK_N}) must divide the {out} channels of a group"
        return None

    # ---- candidates
    def tile_options(
        self, problem: Problem, pass_: str, target: str, precision: str
    ) -> list[Options]:
        if problem.operand_layout == "nhwc" or architecture(target) // 10 not in (9, 10):
            return []
        if not has_mma(problem, precision) or no_planes(problem, pass_):
            return []
        sizes, version = channels(problem, pass_), triton_version()
        boxes, c = tiles(pass_, target, DTYPE_BYTES[problem.dtype], *sizes, version)
        kept = [
            i for i, (m, _) in enumerate(boxes) if pass_ == "wgrad" or (m, c["BLOCK_N"][i]) in TILES
        ]
        if not kept:
            return []
        width = np.array([m for m, _ in boxes])[kept]
        c = {name: values[kept] for name, values in c.items()}
        c |= dict(BLOCK_IMG=np.ones_like(width), BLOCK_P=np.ones_like(width), BLOCK_Q=width)
        if pass_ != "wgrad":
            c["WEIGHT_FIRST"] = c["BLOCK_N"] >= 64
        whole = Options(self.config_class(pass_), dict(kernel="contiguous", maxnreg=None), c)
        return [self.splits(whole, search(problem, pass_), target)]

    def why_not(self, problem: Problem, pass_: str, target: str, precision: str) -> str | None:
        if architecture(target) // 10 not in (9, 10) or problem.operand_layout == "nhwc":
            return None
        return no_planes(problem, pass_)

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        return (
            f"{device.target} loads boxes of contiguous tensors by descriptor, which spares copies"
        )

    # ---- launches
    def source_box(
        self, n: int, size: int, h: Axis, w: Axis, config: Config, block: int
    ) -> tuple[Box, Axis, Axis]:
        assert h.subsampled and w.subsampled  # `no_planes` refuses others
        (h_view, h0, h_step), (w_view, _, _) = h.subsampled, w.subsampled
        plane = h.size * w.size
        box = Box(
            (n, size, h_view.size, w.size),
            (size * plane, plane, w.size * h_step, 1),
            (1, block, 1, config.BLOCK_Q),
            h0 * w.size,
        )
        return box, h_view, w_view

    def dy_box(self, p: Problem, config: Config) -> Box:
        return Box((p.n * p.k, p.q), (p.q, 1), (config.BLOCK_M, config.BLOCK_Q))

    def result_box(
        self, config: Config, h: Axis, w: Axis, size: int, scalars: dict[str, int]
    ) -> Box:
        if config.SPLIT_K > 1:  # partial sums, channels last
            return super().result_box(config, h, w, size, scalars)
        return Box(
            (scalars["N"], size, h.out, w.out),
            (scalars["sy_n"], scalars["sy_k"], scalars["sy_p"], 1),
            (1, config.BLOCK_N, 1, config.BLOCK_Q),
            scalars["y0"],
        )


def no_planes(problem: Problem, pass_: str) -> str | None:
    """Why the tensors of a pass cannot be read and written where they are."""
    from .. import drivers  # which imports torch

    layouts, each = {problem.operand_layout}, vector(problem)
    if pass_ != "wgrad":
        layouts.add(problem.layout)
    elif problem.h > 1 or problem.p > 1:
        return f"kernel contiguous runs wgrad of sequences, got a map of {problem.h}x{problem.w}"
    # of 32 bits tensor cores take no operand whose reduction is not innermost
    if layouts != {"nchw"} or DTYPE_BYTES[problem.dtype] > (4 if pass_ == "wgrad" else 2):
        return f"kernel contiguous is for contiguous tensors of 16 bits, in wgrad of 32, got {problem.operand_layout} of {problem.dtype}"
    if reason := no_descriptors(problem, pass_):
        return reason
    if problem.w % each or problem.q % each:
        return f"rows must be multiples of 16 bytes, got {problem.w} and {problem.q} pixels of {problem.dtype}"
    for _, w in problem.axes(pass_):
        if w.stride > 1 or w.out_step > 1:
            return f"kernel contiguous needs neighbouring pixels along a row, got stride {problem.stride}"
        if drivers.interpreted() and (w.offset % each or w.dilation % each):
            return f"Triton's interpreter takes no boxes that begin between 16 bytes, got offset {w.offset} and dilation {w.dilation}"
    return None


FAMILY = Contiguous()
