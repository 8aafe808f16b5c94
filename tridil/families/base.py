"""What every kernel family says of itself: the rest of the package asks it through `Family`, and
knows no kernel by name.

Imports neither torch nor Triton. Sizes in elements, times in seconds, clocks of an SM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import gcd, prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..branches import Branches
from ..devices import Device
from ..problem import DTYPE_BYTES, ROLES, Axis, Problem

UNITS = {
    "tensor": "tensor cores",
    "issue": "instruction issue",
    "shared": "shared memory",
    "l2": "L2 bandwidth",
}


@dataclass(frozen=True)
class Config:
    """One way to run one pass: the kernel's compile-time sizes and options, by their names in the
    kernel. Each family derives its own.

    kernel names it on disk. num_warps, num_stages, maxnreg: options of Triton's compiler; maxnreg
    is the registers that a thread may have (None: the compiler decides, and ptxas may spill for
    occupancy). SPLIT_K: parts of the reduction that are summed afterwards.
    """

    kernel: str
    SPLIT_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None

    if TYPE_CHECKING:  # sizes that families and passes have of their own

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    @lru_cache
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def constexprs(self) -> dict[str, object]:
        """What the kernel is compiled with."""
        return {
            name: getattr(self, name)
            for name in self.names()
            if name.isupper() and name != "SPLIT_K"
        }

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        return {
            name: getattr(self, name)
            for name in ("num_warps", "num_stages", "maxnreg")
            if getattr(self, name) is not None
        }


def columns(configs: Sequence[Config]) -> dict[str, np.ndarray]:
    """Field -> its values in all configs, which are of one class; maxnreg where all limit it."""
    without = {"kernel"} if all(config.maxnreg for config in configs) else {"kernel", "maxnreg"}
    names = [name for name in configs[0].names() if name not in without]
    return dict(zip(names, np.array(list(map(attrgetter(*names), configs)), np.int64).T))


@dataclass(frozen=True)
class Box:
    """How a tensor descriptor sees a tensor: sizes and strides in elements, where it begins, and
    the sizes of its boxes. swizzle: bytes of the swizzle in shared memory, which Gluon kernels
    choose themselves."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    offset: int = 0
    swizzle: int | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch but for its tensors.

    kernel: "module:function". tensors: (argument, role, Box or None for a pointer), roles being "a"
    and "b" (the pass's operands), "bias", "out" and "partials" (fp32, or fp64 for fp64; `workspace`
    elements). constexprs: Triton's types by their names. options are num_warps and the like.
    """

    kernel: str
    grid: tuple[int, int, int]
    tensors: tuple[tuple[str, str, Box | None], ...]
    scalars: tuple[tuple[str, int], ...]
    constexprs: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]
    workspace: int = 0

    @property
    def name(self) -> str:
        """The kernel's function."""
        return self.kernel.partition(":")[2]


def launch(
    kernel: str,
    programs: int,
    tensors: tuple[tuple[str, str, Box | None], ...],
    scalars: Mapping[str, int],
    constexprs: Mapping[str, object],
    options: Mapping[str, int],
    workspace: int = 0,
) -> Launch:
    """The Launch of a kernel of this package, "module:function" in tridil.kernels."""
    return Launch(
        f"{__package__.rpartition('.')[0]}.kernels.{kernel}",
        (programs, 1, 1),
        tensors,
        tuple(scalars.items()),
        tuple(constexprs.items()),
        tuple(options.items()),
        workspace,
    )


@dataclass(frozen=True)
class Prediction:
    """seconds of a pass, what limits it in words, and the seconds that its parts would take alone
    (they overlap)."""

    seconds: float
    limiter: str
    parts: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1e6 * seconds:.3g}" for name, seconds in self.parts.items())
        return f"{1e6 * self.seconds:.4g} us predicted, limited by {self.limiter} (alone, in us: {parts})"


class Family:
    """One kind of kernel: which configs are legal and sensible, the work of each, its time, its
    launches, and why it runs.

    kernels: its names in configs on disk and in reports. experimental: no GPU has timed it, so that
    only a measurement, or TRIDIL_EXPERIMENTAL=1, makes it the default.
    """

    kernels: tuple[str, ...] = ()
    experimental = False

    def config_class(self, pass_: str) -> type[Any]:
        """The class of a pass's configs."""
        raise NotImplementedError

    def fits(self, config: Config, problem: Problem, pass_: str, target: str) -> str | None:
        """None when `config` is legal for this pass of `problem` on `target`, else the reason, with
        the values."""
        raise NotImplementedError

    def options(self, problem: Problem, pass_: str, target: str, precision: str) -> list[Config]:
        """Sensible configs, of which `fits` may refuse some; none for what the family is not meant
        for. precision ("tf32" or "ieee") matters for float32."""
        raise NotImplementedError

    def why_not(self, problem: Problem, pass_: str, target: str, precision: str) -> str | None:
        """Why there are no options, where one would expect some."""
        return None

    def seconds(
        self,
        problem: Problem,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        """Predicted time of each config, on channels_last tensors."""
        raise NotImplementedError

    def search(
        self, problem: Problem, pass_: str, device: Device, precision: str
    ) -> tuple[np.ndarray, Callable[[int], Config]]:
        """(predicted time of each option, function that gives the option of an index): what every
        new shape costs the host."""
        configs = self.options(problem, pass_, device.target, precision)
        seconds = (
            self.seconds(problem, pass_, configs, device, precision) if configs else np.zeros(0)
        )
        return seconds, configs.__getitem__

    def predict(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> Prediction:
        """The same for one, with what limits it."""
        raise NotImplementedError

    def why(
        self, problem: Problem, pass_: str, config: Config, device: Device, precision: str
    ) -> str:
        """Why this kernel, in words."""
        raise NotImplementedError

    def tile(self, config: Config, pass_: str) -> tuple[int, int, int]:
        """(M, N, K) of the tile product of one step."""
        raise NotImplementedError

    def programs(
        self, problem: Problem, pass_: str, config: Config, axes: tuple[Axis, Axis]
    ) -> int:
        """Programs of one launch, which runs the correlations `axes`."""
        raise NotImplementedError

    def executed_macs(self, problem: Problem, pass_: str, config: Config) -> int:
        """Multiply-accumulates that the tiles execute: live taps only, overhang of every tile side
        included."""
        raise NotImplementedError

    def requested_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        """Bytes that the programs load from operands and store to the result, re-reads in L1 and L2
        included."""
        raise NotImplementedError

    def has_partials(self, config: Config, pass_: str) -> bool:
        """Whether partial results are written and summed."""
        return config.SPLIT_K > 1

    def partial_bytes(self, problem: Problem, pass_: str, config: Config) -> int:
        """Bytes of the partial results, written and read."""
        partials = (
            config.SPLIT_K * prod(result_shape(problem, pass_))
            if self.has_partials(config, pass_)
            else 0
        )
        return 2 * max(DTYPE_BYTES[problem.dtype], 4) * partials

    def covers(self, problem: Problem, pass_: str) -> bool:
        """Whether the launches write every element of the result; else it begins as zeros."""
        return pass_ != "dgrad" or problem.dgrad_covers

    def operand_format(self, problem: Problem, tensor: str) -> tuple[str, int]:
        """(memory format, alignment of the base in bytes) in which the launches read an
        operand: "x", "w" or "y" (dy)."""
        raise NotImplementedError

    def copies(self, problem: Problem, pass_: str) -> list[int]:
        """Elements of each operand that is copied into the format in which the launches read it."""
        shapes = {"x": problem.x_shape, "w": problem.w_shape, "y": problem.y_shape}
        return [
            prod(shapes[tensor])
            for tensor in ROLES[pass_][:2]
            if self.operand_format(problem, tensor)[0] != problem.operand_layout
        ]

    def plan(
        self, problem: Problem, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        """The launches of one pass, whose result has problem.layout; precision: "ieee", "tf32" or
        (interpreter) "upcast"; epilogue: its name in kernels/common.py, "" for none."""
        raise NotImplementedError

    # ---- several convolutions in one launch
    def branch_options(
        self, branches: Branches, pass_: str, target: str, precision: str
    ) -> list[Config]:
        """Sensible, legal configs that run a pass of all branches in one launch; none for what the
        family cannot join."""
        return []

    def fitting(
        self, configs: Iterable[Config], branches: Branches, pass_: str, target: str
    ) -> list[Config]:
        """Those of the configs, each once, that are legal for a pass of all branches."""
        return [
            config
            for config in dict.fromkeys(configs)
            if not self.unfit(config, branches, pass_, target)
        ]

    def unfit(self, config: Config, branches: Branches, pass_: str, target: str) -> str | None:
        """None when `config` is legal for a pass of all branches in one launch, else the reason."""
        return f"kernel {config.kernel!r} does not join branches"

    def branch_seconds(
        self,
        branches: Branches,
        pass_: str,
        configs: Sequence[Config],
        device: Device,
        precision: str,
    ) -> np.ndarray:
        """Predicted time of each of them, on channels_last tensors."""
        raise NotImplementedError

    def branch_plan(
        self, branches: Branches, pass_: str, config: Config, precision: str, epilogue: str
    ) -> list[Launch]:
        """The launches of a pass of all branches. Roles: "a" is x, or dy; "b" is x in wgrad, else
        "b0", "b1", ... are the filters; "out" is the result, in wgrad "out0", "out1", ..."""
        raise NotImplementedError


# ---- what several families need
@lru_cache
def triton_version() -> tuple[int, ...]:
    """Of the installed Triton, like (3, 7), without importing it; () where it is unknown."""
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except (PackageNotFoundError, ValueError):  # wheels of other names
        return ()


def up(x: int) -> int:
    """The next power of two."""
    return 1 << max(x - 1, 0).bit_length()


def pixels(config: Config) -> int:
    """Rows of a tile that hold its pixel box, a power of two; of a direct kernel its lanes."""
    return up(config.BLOCK_IMG * config.BLOCK_P * config.BLOCK_Q)


def result_shape(problem: Problem, pass_: str) -> tuple[int, int, int, int]:
    return {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_]


def elements(problem: Problem) -> int:
    """Of the largest tensor."""
    return max(map(prod, (problem.x_shape, problem.w_shape, problem.y_shape)))


def strides(shape: Sequence[int], layout: str) -> tuple[int, int, int, int]:
    """Strides, in PyTorch's order (N, C, H, W), of a tensor of that order's shape in memory format
    `layout`."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c) if layout == "nhwc" else (c * h * w, h * w, w, 1)


def steps(h: Axis, w: Axis) -> dict[str, int]:
    """How the kernels name what both axes of a correlation walk."""
    return dict(
        H=h.size, W=w.size, off_h=h.offset, off_w=w.offset, dil_h=h.dilation, dil_w=w.dilation
    )


def accumulator(problem: Problem) -> str:
    return "float64" if problem.dtype == "float64" else "float32"


def vector(problem: Problem) -> int:
    """Elements of 16 bytes."""
    return 16 // DTYPE_BYTES[problem.dtype]


def aligned(problem: Problem, *sizes: int) -> int:
    """Elements of the longest vector of at most 16 bytes that all sizes are multiples of."""
    return gcd(vector(problem), *sizes)


def not_positive(config: Config, names: Sequence[str]) -> str | None:
    """Which of these entries is no positive int."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"{name} must be a positive int, got {value!r}"
    return None


def no_power_of_two(config: Config, names: Sequence[str]) -> str | None:
    for name in names:
        if getattr(config, name) & (getattr(config, name) - 1):
            return f"{name} must be a power of two, got {getattr(config, name)}"
    return None


def bad_maxnreg(config: Config, target: str) -> str | None:
    if config.maxnreg is not None and (
        target.startswith("hip") or config.maxnreg not in range(24, 256)
    ):
        return f"maxnreg must be None, or on CUDA targets 24 to 255, got {config.maxnreg!r} for {target}"
    return None


# ---- several convolutions in one launch
def heaviest_first(branches: Branches, pass_: str) -> list[int]:
    """The branches, those whose tiles have the most steps first: so that light ones fill the end."""
    weight = {
        "fprop": lambda problem: problem.useful_macs / problem.k,
        "dgrad": lambda problem: problem.useful_macs / problem.c,
        "wgrad": lambda problem: problem.useful_macs / prod(problem.w_shape),
    }[pass_]
    return sorted(range(len(branches.problems)), key=lambda i: -weight(branches.problems[i]))


def branch_axes(branches: Branches, pass_: str) -> list[list[tuple[Axis, Axis]]]:
    """Of each launch of a pass the (h, w) correlations of its branches: of one, or of one per pair of
    residue classes of a strided dgrad, where a branch that reaches none of a class has no taps."""
    if pass_ != "dgrad":
        return [[problem.fprop_axes for problem in branches.problems]]
    p = branches.first
    pairs = product(*(range(min(stride, size)) for stride, size in zip(p.stride, (p.h, p.w))))

    def axis(classes: Sequence[Axis], place: int, dx: int, dy: int, stride: int) -> Axis:
        none = Axis(
            size=dy,
            out=-(-(dx - place) // stride),
            stride=1,
            offset=0,
            dilation=1,
            taps=0,
            out0=place,
            out_step=stride,
        )
        return next((found for found in classes if found.out0 == place), none)

    return [
        [
            (
                axis(problem.dgrad_axes[0], h, p.h, p.p, p.stride[0]),
                axis(problem.dgrad_axes[1], w, p.w, p.q, p.stride[1]),
            )
            for problem in branches.problems
        ]
        for h, w in pairs
    ]


def branch_sizes(branches: Branches, axes: list[tuple[Axis, Axis]]) -> dict[str, int]:
    """The sizes that all branches of a launch have in common, as the kernels name them."""
    (h, w), p = axes[0], branches.first
    return dict(N=p.n, H=h.size, W=w.size, P=h.out, Q=w.out, G=p.groups)


def branch_geometry(
    branches: Branches, pass_: str, order: list[int], axes: list[tuple[Axis, Axis]]
) -> tuple[int, ...]:
    """BRANCHES of the kernels: of each branch, in this order, the channels per group of its source
    and its result, taps, the first channels that it reads and writes, offsets and dilations. wgrad:
    source and result are x and y."""
    found: list[int] = []
    for i in order:
        p = branches.problems[i]
        h, w = axes[i]
        ends = (p.c // p.groups, branches.x_channels[i]), (p.k // p.groups, branches.y_channels[i])
        (source, x0), (result, y0) = ends[::-1] if pass_ == "dgrad" else ends
        found += [
            source,
            result,
            h.taps,
            w.taps,
            x0,
            y0,
            h.offset,
            w.offset,
            h.dilation,
            w.dilation,
        ]
    return tuple(found)


def branch_filters(
    branches: Branches, order: list[int], axes: list[tuple[Axis, Axis]]
) -> tuple[int, ...]:
    """FILTERS of the kernels: of each branch, in this order, the first taps of its filter, the steps
    between them, and the filter's sizes."""
    return tuple(
        value
        for i in order
        for h, w in (axes[i],)
        for value in (
            h.tap0,
            w.tap0,
            h.tap_step,
            w.tap_step,
            branches.problems[i].r,
            branches.problems[i].s,
        )
    )


def filters(name: str, role: str, order: list[int]) -> tuple[tuple[str, str, None], ...]:
    """Tensors of a launch: the filters of the branches in this order."""
    return tuple((f"{name}_{place}", f"{role}{i}", None) for place, i in enumerate(order))
