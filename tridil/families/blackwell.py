"""Tiles of matrix products in warp-specialised, persistent programs for sm_100:
kernels/blackwell.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .. import assumed
from ..devices import Device
from ..problem import DTYPE_BYTES, Problem
from .base import Config
from .gemm import Fields, Tiles
from .persistent import WIDTH, Edge, Persistent, Shares, rings

TARGET = "cuda:100"
# (M, N)
TILES = ((256, 256), (128, 256), (256, 128), (128, 128), (128, 64))
TENSOR_COLUMNS = 512  # of tensor memory, 128 rows of fp32 each


@dataclass(frozen=True)
class Correlation(Edge, Shares):
    """fprop and dgrad. GROUP: channel tiles that are walked together for the same pixels."""

    BLOCK_K: int
    GROUP: int


@dataclass(frozen=True)
class Reduction(Shares):
    """wgrad."""

    BLOCK_M: int


@lru_cache(maxsize=1024)
def tiles(
    nbytes: int, rows: int | None, cols: int, reduced: int | None
) -> tuple[list[tuple[Any, ...]], dict[str, np.ndarray]]:
    """(boxes, fields) of the tiles for so many channels: gemm.as_fields."""
    return rings(TARGET, [(m, n, {}) for m, n in TILES], nbytes, rows, cols, reduced)


class Blackwell(Persistent):
    kernels: tuple[str, ...] = ("blackwell",)
    name, target = "blackwell", TARGET
    experimental = True
    sums_in_registers = False  # but in tensor memory
    fixed = {"maxnreg": None}
    shapes = staticmethod(tiles)

    def config_class(self, pass_: str) -> type[Any]:
        return Reduction if pass_ == "wgrad" else Correlation

    def _no_tile(self, config: Config, problem: Problem, pass_: str) -> str | None:
        (m, n, k), nbytes = self.tile(config, pass_), DTYPE_BYTES[problem.dtype]
        if reason := self.wrong_dtype(problem, pass_):
            return reason
        if m not in (128, 256) or n not in (64, 128, 256) or k * nbytes not in (WIDTH, 2 * WIDTH):
            return (
                f"kernel blackwell multiplies 128 or 256 rows, 64 to 256 columns and {WIDTH} or {2 * WIDTH} bytes of the reduction, "
                f"got {m}x{n}x{k}"
            )
        return self.no_ring(config, problem, pass_)

    def rows(self, config: Config, pass_: str) -> int:
        return 128

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
        # each 128 rows are multiplied with all columns
        moved, read = (m + n) * k * nbytes, (m + m // 128 * n) * k * nbytes
        return {
            "tensor": m * n * k / device.mma_rate(problem.dtype, precision),
            "issue": np.full_like(m, assumed.BLACKWELL_STEP / 4, float),
            "shared": (moved + read) / 128,
            "l2": moved / device.l2_clock / assumed.L2,
        }

    def tile_clocks(self, c: dict[str, Any], m: int, n: int) -> float:
        """Less where the sums of the next tile have tensor memory of their own."""
        return assumed.BLACKWELL_TILE[2 * (m // 128) * n <= TENSOR_COLUMNS]


FAMILY = Blackwell()
