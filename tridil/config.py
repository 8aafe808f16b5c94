"""Tile configurations over all kernel families: which are legal (`fits`), which are sensible
(`candidates`), how much work each one is, and how they are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

from . import families
from .branches import Branches
from .families import Config
from .families.base import result_shape
from .problem import DTYPE_BYTES, PASSES, Problem


def fits(config: Config, problem: Problem | Branches, pass_: str, target: str) -> str | None:
    """None when `config` is legal for this pass of `problem`, or of all branches in one launch, on
    `target`, else the reason, with the values."""
    if pass_ not in PASSES:
        return f"unknown pass {pass_!r}: use one of {PASSES}"
    try:
        family = families.of(config.kernel)
    except ValueError as e:
        return str(e)
    wanted = family.config_class(pass_)
    if type(config) is not wanted:
        return f"a {pass_} config of {config.kernel} has exactly the entries {sorted(wanted.names())}, got {sorted(config.names())}"
    if isinstance(problem, Branches):
        return family.unfit(config, problem, pass_, target)
    return family.fits(config, problem, pass_, target)


def candidates(problem: Problem, pass_: str, target: str, precision: str = "tf32") -> list[Config]:
    """Legal, sensible configs, tens of them: every kernel and tile shape, each with the box that
    executes the fewest MACs.

    precision ("tf32" or "ieee") matters for float32: ieee products do not run on tensor cores and
    take smaller tiles.
    """
    options = (
        config
        for family in families.FAMILIES
        for config in family.options(problem, pass_, target, precision)
    )
    return [config for config in options if fits(config, problem, pass_, target) is None]


def tile(config: Config, pass_: str) -> tuple[int, int, int]:
    """(M, N, K) of the tile product; of a direct kernel its outputs, channels and 1."""
    return families.of(config.kernel).tile(config, pass_)


def grid(problem: Problem, pass_: str, config: Config) -> int:
    """Programs of the largest launch of a pass."""
    return max(
        (
            families.of(config.kernel).programs(problem, pass_, config, axes)
            for axes in problem.axes(pass_)
        ),
        default=0,
    )


def executed_macs(problem: Problem, pass_: str, config: Config) -> int:
    """Multiply-accumulates that the tiles execute: live taps only, overhang of every tile side
    included."""
    return families.of(config.kernel).executed_macs(problem, pass_, config)


def moved_bytes(problem: Problem, pass_: str, config: Config) -> tuple[int, int]:
    """(bytes from and to memory, bytes that the programs load and store) of a pass without bias, in
    problem.layout.

    The first counts operands and result once, operands that are copied into another memory format
    twice more, zeros that are written first, partial sums written and read: what stays where L2
    serves every re-read. The second counts each element that a lane loads or stores, re-reads in L1
    and L2 included; exact for direct kernels, for tiles of matrix products an upper bound, since it
    counts masked elements.
    """
    family, nbytes, result = (
        families.of(config.kernel),
        DTYPE_BYTES[problem.dtype],
        prod(result_shape(problem, pass_)),
    )
    sums = family.partial_bytes(problem, pass_, config)
    zeros = 0 if family.covers(problem, pass_) else nbytes * result
    copied = 2 * nbytes * sum(family.copies(problem, pass_))
    requested = family.requested_bytes(problem, pass_, config)
    return problem.bytes + copied + zeros + sums, copied + zeros + sums + requested


def describe(config: Config) -> str:
    """A config in one word: pixel box and the edge's, channel tile(s), reduction step or split,
    warps, stages, switches that are on."""
    values = vars(config)
    box, edge = (
        "x".join(str(values[f"{name}_{side}"]) for side in ("IMG", "P", "Q"))
        if values.get(f"{name}_IMG")
        else ""
        for name in ("BLOCK", "EDGE")
    )
    names = (
        ("m", "BLOCK_M"),
        ("n", "BLOCK_N"),
        ("k", "BLOCK_K"),
        ("cols", "COLS"),
        ("taps", "TAPS"),
        ("rows", "ROWS"),
        ("split", "SPLIT_K"),
        ("bundle", "BUNDLE"),
    )
    sizes = " ".join(
        f"{short}{values[name]}"
        for short, name in names
        if name in values and (name, values[name]) != ("BUNDLE", 1)
    )
    switches = "".join(f" {name.lower()}" for name in config.names() if values[name] is True)
    boxes = (f"box {box} " if box else "") + (f"edge {edge} " if edge else "")
    return f"{boxes}{sizes} warps{config.num_warps} stages{config.num_stages}{switches}"


def to_json(config: Config) -> dict[str, Any]:
    """A config as it is written in files."""
    return asdict(config)


def from_json(values: Mapping[str, Any], pass_: str) -> Config:
    """The config of a pass that `to_json` wrote. Raises ValueError when it is none."""
    wanted = families.of(values.get("kernel")).config_class(pass_)  # type: ignore[arg-type]
    if set(values) != set(wanted.names()):
        raise ValueError(
            f"a {pass_} config of {values['kernel']} has exactly the entries {sorted(wanted.names())}, got {sorted(values)}"
        )
    return wanted(**values)
