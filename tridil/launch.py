"""Runs plans: allocates results and partial sums, brings operands into the format that a family
reads, launches. The explicit path: problem, pass, config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config as cfg
from . import families
from .branches import Branches
from .drivers import FORMATS, interpreted, target
from .families import Box, Config, Launch
from .families.base import accumulator, result_shape
from .problem import ROLES, Problem

if TYPE_CHECKING:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

_interpreted = interpreted()  # decided when the kernels are imported


def kernel_of(launch: Launch) -> JITFunction[Any] | InterpretedFunction[Any]:
    """The @triton.jit function of a launch."""
    module, _, name = launch.kernel.partition(":")
    return getattr(import_module(module), name)


@lru_cache(maxsize=4096)
def constexprs(items: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Constexprs of a launch, as its kernel takes them."""
    return {
        name: {"float32": tl.float32, "float64": tl.float64}[value] if name == "ACC" else value
        for name, value in items
    }


def describe(
    box: Box, tensor: torch.Tensor, known: dict[Box, tuple[type[Any], dict[str, Any]]]
) -> TensorDescriptor:
    """The TensorDescriptor of a tensor; Triton checks sizes and strides once, `known` keeps them.
    The base's alignment is `_operand`'s concern."""
    base = (
        torch.as_strided(tensor, box.shape, box.strides, tensor.storage_offset() + box.offset)
        if box.offset
        else tensor
    )
    found = known.get(box)
    if found is None:
        sizes = base, list(box.shape), list(box.strides), list(box.block)
        first = (
            TensorDescriptor(*sizes)
            if box.swizzle is None
            else gluon_descriptor()(*sizes, shared_layout(box, 8 * tensor.element_size()))
        )
        # at once: other threads read it
        known[box] = (
            type(first),
            {name: value for name, value in vars(first).items() if name != "base"},
        )
        return first
    class_, fields = found
    descriptor = object.__new__(class_)
    descriptor.__dict__.update(fields, base=base)
    return descriptor


def gluon_descriptor() -> type:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor


def shared_layout(box: Box, bits: int) -> NVMMASharedLayout:
    """Gluon's layout of a box of elements of so many bits in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(box.swizzle, bits, len(box.block))


class Ready:
    """A launch whose kernel and arguments are at hand."""

    launch: Launch
    fn: JITFunction[Any] | InterpretedFunction[Any]
    grid: tuple[int, int, int]
    workspace: int

    def __init__(self, launch: Launch) -> None:
        self.launch, self.fn, self.grid, self.workspace = (
            launch,
            kernel_of(launch),
            launch.grid,
            launch.workspace,
        )
        values = dict(launch.scalars) | constexprs(launch.constexprs)
        names = self.fn.arg_names
        # of all arguments in their order, None for tensors
        self.values: list[Any] = [values.get(name) for name in names]
        self.places: list[tuple[int, str, Box | None]] = [
            (names.index(name), role, box) for name, role, box in launch.tensors
        ]
        self.options: dict[str, int] = dict(launch.options)
        self.boxes: dict[Box, tuple[type[Any], dict[str, Any]]] = {}
        # (device, which pointers are 16-byte aligned) -> the kernel that Triton's JIT compiled:
        # what it specialises on beyond this launch
        self.compiled: dict[tuple[int | None, int], CompiledKernel] = {}

    def arguments(self, tensors: dict[str, torch.Tensor]) -> list[Any]:
        """The kernel's arguments, in order."""
        values = self.values.copy()
        for i, role, box in self.places:
            values[i] = tensors[role] if box is None else describe(box, tensors[role], self.boxes)
        return values

    def __call__(self, tensors: dict[str, torch.Tensor]) -> None:
        """Launch on the current device and stream: through the JIT once, afterwards through its
        compiled kernel, which binds no arguments."""
        arguments, aligned = self.arguments(tensors), 0
        for i, _, box in self.places:
            aligned += aligned + (box is None and arguments[i].data_ptr() & 15 == 0)
        key = device(), aligned
        kernel = self.compiled.get(key)
        if kernel is not None:
            kernel[self.grid](*arguments)
        else:
            kernel = self.fn[self.grid](*arguments, **self.options)
            # neither interpreted nor compiled in the background
            if isinstance(kernel, CompiledKernel):
                self.compiled[key] = kernel


def device() -> int | None:
    """The device of Triton's active driver that is current; None in the interpreter."""
    return None if _interpreted else driver.active.get_current_device()


def plan(
    problem: Problem | Branches,
    pass_: str,
    config: Config,
    precision: str = "ieee",
    epilogue: str = "",
) -> list[Launch]:
    """The launches of one pass, whose result has problem.layout. precision: "ieee" or "tf32"."""
    if problem.dtype == "bfloat16" and interpreted():
        precision = "upcast"
    family = families.of(config.kernel)
    if isinstance(problem, Branches):
        return family.branch_plan(problem, pass_, config, precision, epilogue)
    return family.plan(problem, pass_, config, precision, epilogue)


# of the tensor that `one_copy_of` is about: its address, and its copies so far
_shared: ContextVar[tuple[int, dict[Any, torch.Tensor]] | None] = ContextVar(
    "_shared", default=None
)


@contextmanager
def one_copy_of(t: torch.Tensor) -> Iterator[None]:
    """Within the context, passes that read t in the same format share one copy; nobody may write t
    meanwhile."""
    token = _shared.set((t.data_ptr(), {}))
    try:
        yield
    finally:
        _shared.reset(token)  # hooks may run a backward within another


def _operand(layout: str, alignment: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives a tensor dense memory in a format: those that have it themselves, copies of
    others, and of those whose base is not aligned."""
    memory_format = FORMATS[layout]

    def operand(t):
        if t.is_contiguous(memory_format=memory_format) and (
            alignment == 1 or t.data_ptr() % alignment == 0
        ):
            return t
        address, copies = _shared.get() or (None, {})
        if t.data_ptr() != address:
            return _copy(t, memory_format)
        key = layout, t.shape, t.stride()
        if key not in copies:
            copies[key] = _copy(t, memory_format)
        return copies[key]

    return operand


def _copy(t, memory_format):
    """Newly allocated, so that its base is aligned."""
    return t.detach().clone(memory_format=memory_format)


def fprop(
    problem: Problem,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    config: Config,
    precision: str = "ieee",
) -> torch.Tensor:
    """y (N, K, P, Q) of x (N, C, H, W), w (K, C/G, R, S) and bias (K,) or None, in problem.layout.
    Raises ValueError when config does not fit."""
    return prepare(problem, "fprop", config, precision, "" if bias is None else "bias")(x, w, bias)


def dgrad(
    problem: Problem, dy: torch.Tensor, w: torch.Tensor, config: Config, precision: str = "ieee"
) -> torch.Tensor:
    """dx (N, C, H, W) of dy (N, K, P, Q) and w (K, C/G, R, S), in problem.layout. Raises ValueError
    when config does not fit."""
    return prepare(problem, "dgrad", config, precision)(dy, w)


def wgrad(
    problem: Problem, dy: torch.Tensor, x: torch.Tensor, config: Config, precision: str = "ieee"
) -> torch.Tensor:
    """dw (K, C/G, R, S) of dy (N, K, P, Q) and x (N, C, H, W), in problem.layout. Raises ValueError
    when config does not fit."""
    return prepare(problem, "wgrad", config, precision)(dy, x)


def prepare(
    problem: Problem, pass_: str, config: Config, precision: str = "ieee", epilogue: str = ""
) -> Callable[..., torch.Tensor]:
    """run(a, b, bias=None), which allocates and launches one pass on the current device. Raises
    ValueError when config does not fit the target."""
    return _prepare(problem, pass_, config, precision, epilogue, target())


@lru_cache(maxsize=4096)
def _prepare(problem, pass_, config, precision, epilogue, target):
    reason = cfg.fits(config, problem, pass_, target)
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {problem.key()}: {reason}")
    family, shape, memory_format = (
        families.of(config.kernel),
        result_shape(problem, pass_),
        FORMATS[problem.layout],
    )
    launches = [Ready(launch) for launch in plan(problem, pass_, config, precision, epilogue)]
    covers = family.covers(problem, pass_)
    operand_a, operand_b = (
        _operand(*family.operand_format(problem, tensor)) for tensor in ROLES[pass_][:2]
    )
    workspace = max((launch.workspace for launch in launches), default=0)
    partials = getattr(torch, accumulator(problem))

    def run(a, b, bias=None):
        out = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format)
        if not covers:
            out.zero_()
        a, b = operand_a(a), operand_b(b)
        tensors = {"a": a, "b": b, "bias": b if bias is None else bias.contiguous(), "out": out}
        if workspace:
            tensors["partials"] = torch.empty(workspace, dtype=partials, device=a.device)
        for launch in launches:
            launch(tensors)
        return out

    return run


def prepare_branches(
    branches: Branches, pass_: str, config: Config, precision: str = "ieee", epilogue: str = ""
) -> Callable[..., torch.Tensor | list[torch.Tensor]]:
    """run(a, b, bias=None), one pass of all branches in one launch: y of x, filters and the bias of
    y; dx of dy and filters; a list of dw of dy and x. Raises ValueError when config does not fit."""
    return _prepare_branches(branches, pass_, config, precision, epilogue, target())


@lru_cache(maxsize=1024)
def _prepare_branches(branches, pass_, config, precision, epilogue, target):
    family, problem = families.of(config.kernel), branches.first
    reason = cfg.fits(config, branches, pass_, target)
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {branches.key()}: {reason}")
    launches = [Ready(launch) for launch in plan(branches, pass_, config, precision, epilogue)]
    operand, memory_format = _operand(*family.operand_format(problem, "x")), FORMATS[problem.layout]
    workspace = max((launch.workspace for launch in launches), default=0)
    partials = getattr(torch, accumulator(problem))
    shapes = (
        branches.w_shapes
        if pass_ == "wgrad"
        else [branches.y_shape if pass_ == "fprop" else branches.x_shape]
    )

    def run(a, b, bias=None):
        results = [
            torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format)
            for shape in shapes
        ]
        tensors = {"a": operand(a)}
        if pass_ == "wgrad":
            tensors |= {"b": operand(b)} | {f"out{i}": dw for i, dw in enumerate(results)}
        else:
            tensors |= {f"b{i}": operand(w) for i, w in enumerate(b)}
            tensors |= {"bias": a if bias is None else bias.contiguous(), "out": results[0]}
        if workspace:
            tensors["partials"] = torch.empty(workspace, dtype=partials, device=a.device)
        for launch in launches:
            launch(tensors)
        return results if pass_ == "wgrad" else results[0]

    return run
