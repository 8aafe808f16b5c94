"""Kernel families: all that the host knows of each kind of kernel. A new one is a file here, its
kernels in kernels/, and a line in FAMILIES."""

from __future__ import annotations

from . import blackwell, contiguous, depthwise, gather, hopper, tma
from .base import Box, Config, Family, Launch, Prediction

FAMILIES: list[Family] = [
    depthwise.FAMILY,
    gather.FAMILY,
    tma.FAMILY,
    contiguous.FAMILY,
    hopper.FAMILY,
    blackwell.FAMILY,
]


def of(kernel: str) -> Family:
    """The family of a config's kernel. Raises ValueError for an unknown name."""
    for family in FAMILIES:
        if kernel in family.kernels:
            return family
    raise ValueError(
        f"unknown kernel {kernel!r}: use one of {[name for family in FAMILIES for name in family.kernels]}"
    )


__all__ = ["FAMILIES", "Box", "Config", "Family", "Launch", "Prediction", "of"]
