"""The torch boundary: operators tridil::fprop, dgrad and wgrad, and the autograd Functions that
call each other. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from . import batching, late, passes, private
from .passes import Geometry, empty, has_channels_last, map_shape
from .problem import ROLES, Problem

# tensors are 4D (N, C, H, W), or 3D (N, C, L): maps of height 1, whose results are 3D, too, and no
# views
_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool channels_last, bool auto=False"
# the module runs again (importlib.reload): a process defines operators once
_IS_DEFINED = hasattr(torch.ops.tridil, "fprop")
if not _IS_DEFINED:
    lib: torch.library.Library = torch.library.Library("tridil", "DEF")
    lib.define(f"fprop(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor")
    lib.define(f"dgrad(Tensor dy, Tensor w, SymInt[] x_shape, {_GEOMETRY}) -> Tensor")
    lib.define(f"wgrad(Tensor dy, Tensor x, SymInt[] w_shape, {_GEOMETRY}) -> Tensor")


def is_plain(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether nothing but autograd may watch an eager call on these tensors, so that no operator
    needs to be dispatched: no compiler, tracer, transform, mode, profiler or dual level is active,
    and the tensors are ordinary."""
    return (
        not torch.compiler.is_compiling()
        and type(a) in ORDINARY
        and type(b) in ORDINARY
        and (bias is None or type(bias) in ORDINARY)
        and not (
            a.is_neg()
            or b.is_neg()
            or bias is not None
            and bias.is_neg()
            or private.is_wrapped(a)
            or private.is_wrapped(b)
        )
        and not private.is_watched()
    )


ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _below(pass_, a, b, third, geometry, channels_last, auto):
    """The operator for whoever watches below autograd: modes, subclasses, and the derivatives of an
    enclosing transform."""
    with (
        private.below_autograd(),
        torch.enable_grad(),
        private.forward_mode(True),
    ):
        return getattr(torch.ops.tridil, pass_)(a, b, third, *geometry, channels_last, auto)


def _apply(plain, pass_, a, b, third, geometry, channels_last, auto):
    """One pass that a derivative needs, differentiable; plain: whether nobody watches."""
    if not plain:
        return getattr(torch.ops.tridil, pass_)(a, b, third, *geometry, channels_last, auto)
    function = FUNCTIONS[pass_]
    if torch.is_grad_enabled():
        return function.apply(a, b, third, geometry, channels_last, auto, True)
    return function.run(a, b, third, geometry, channels_last, auto)


def is_plain_backward(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bool:
    """`is_plain` of what a derivative sees, and no batch of torch.func over it."""
    return is_plain(a, b, c) and not (
        private.is_batched(a) or private.is_batched(b) or private.is_batched(c)
    )


def _wanted(ctx):
    """For each input whether its gradient is used: `needs_input_grad`, without what
    torch.autograd.grad was not asked for."""
    needs = ctx.needs_input_grad
    # compiled autograd, which asks no engine
    if torch.compiler.is_compiling() or not isinstance(ctx, BackwardCFunction):
        return needs
    # of a bias that is None
    return [
        need and private.will_run(node) for need, (node, _) in zip(needs, ctx.next_functions)
    ] + [False]


class _Pass(private.Function):
    """A pass: linear in its two tensors a and b, so that its derivatives are the other two passes.
    `pass_` is its name. `third` is the bias of fprop, and else the shape of the result; geometry is
    (stride, padding (h_lo, h_hi, w_lo, w_hi), dilation, groups), channels_last the format of the
    result, auto whether ATen may run it, plain whether nobody watches. `op` is the operator, for whoever watches: its autograd kernel applies the
    Function, which is the only one that knows derivatives."""

    pass_: ClassVar[str]
    op: ClassVar[Any]
    run: ClassVar[Callable[..., torch.Tensor]]
    apply: ClassVar[Callable[..., torch.Tensor]]

    @classmethod
    def forward(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        third: torch.Tensor | tuple[int, ...] | None,
        geometry: Geometry,
        channels_last: bool,
        auto: bool,
        plain: bool,
    ) -> torch.Tensor:
        return (cls.run if plain else partial(_below, cls.pass_))(
            a, b, third, geometry, channels_last, auto
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        a, b, _, ctx.geometry, ctx.channels_last, ctx.auto, _ = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        ctx.shape = output.shape

    @staticmethod
    def _compiled_autograd_key(ctx):
        return (ctx._autograd_function_id,)

    @classmethod
    def jvp(
        cls,
        ctx: Any,
        da: torch.Tensor | None,
        db: torch.Tensor | None,
        dbias: torch.Tensor | None,
        *_: Any,
    ) -> torch.Tensor:
        shape, rest = (
            None if cls is Fprop else ctx.shape,
            (*ctx.geometry, ctx.channels_last, ctx.auto),
        )
        # off here by default, which makes forward-over-forward lose terms in silence
        with private.forward_mode(True):
            a, b = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            terms = [] if da is None else [cls.op(da, b, dbias if shape is None else shape, *rest)]
            if db is not None:
                terms.append(cls.op(a, db, shape, *rest))
            if da is None and dbias is not None:
                terms.append(dbias.view(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape))
            return reduce(torch.add, terms)


def _backward(pass_, ctx, grad):
    """What all three Functions do backward; each has a plain function of its own, since Dynamo of
    torch 2.11 takes no class method."""
    if grad is None:
        return (None,) * 7
    (a, b), needs = ctx.saved_tensors, _wanted(ctx)
    tensors, plain = dict(zip(ROLES[pass_], (a, b, grad))), is_plain_backward(a, b, grad)
    with passes.one_copy_of(grad) if plain and all(needs[:2]) else nullcontext():
        grads = [
            _derivative(pass_, ctx, role, tensors, plain) if need else None
            for role, need in zip(ROLES[pass_][:2], needs)
        ]
    dbias = grad.sum((0, *range(2, grad.dim()))) if pass_ == "fprop" and needs[2] else None
    return *grads, dbias, None, None, None, None


def _derivative(pass_, ctx, role, tensors, plain):
    """The gradient of the operand in this role: the pass whose result it is, of the other operand
    and the incoming gradient."""
    other = next(name for name, roles in ROLES.items() if roles[2] == role)
    a, b = (tensors[role] for role in ROLES[other][:2])
    operand = tensors[role]
    # x and y have one format, which wgrad, whose channels_last is that of w, is not told
    channels_last = (
        has_channels_last(operand) if role == "w" or pass_ == "wgrad" else ctx.channels_last
    )
    return _apply(
        plain,
        other,
        a,
        b,
        None if role == "y" else operand.shape,
        ctx.geometry,
        channels_last,
        ctx.auto,
    )


class Fprop(_Pass):
    """y of (x, w, bias)."""

    pass_ = "fprop"

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward("fprop", ctx, grad)

    @staticmethod
    def fake(
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
        auto: bool = False,
    ) -> torch.Tensor:
        sizes = [
            (size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (taps - 1) - 1) // stride[i]
            + 1
            for i, size, taps in zip((0, 1), map_shape(x.shape)[2:], map_shape(w.shape)[2:])
        ]
        return empty(x, (x.shape[0], w.shape[0], *sizes[4 - x.dim() :]), channels_last)

    @staticmethod
    def run(
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        channels_last: bool,
        auto: bool,
    ) -> torch.Tensor:
        return passes.run("fprop", x, w, bias, x.shape, w.shape, geometry, channels_last, auto)


class Dgrad(_Pass):
    """dx of (dy, w)."""

    pass_ = "dgrad"

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward("dgrad", ctx, grad)

    @staticmethod
    def fake(
        dy: torch.Tensor,
        w: torch.Tensor,
        x_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
        auto: bool = False,
    ) -> torch.Tensor:
        return empty(dy, (dy.shape[0], *x_shape[1:]), channels_last)

    @staticmethod
    def run(
        dy: torch.Tensor,
        w: torch.Tensor,
        x_shape: tuple[int, ...],
        geometry: Geometry,
        channels_last: bool,
        auto: bool,
    ) -> torch.Tensor:
        return passes.run("dgrad", dy, w, None, x_shape, w.shape, geometry, channels_last, auto)


class Wgrad(_Pass):
    """dw of (dy, x)."""

    pass_ = "wgrad"

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _backward("wgrad", ctx, grad)

    @staticmethod
    def fake(
        dy: torch.Tensor,
        x: torch.Tensor,
        w_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
        auto: bool = False,
    ) -> torch.Tensor:
        return empty(x, w_shape, channels_last)

    @staticmethod
    def run(
        dy: torch.Tensor,
        x: torch.Tensor,
        w_shape: tuple[int, ...],
        geometry: Geometry,
        channels_last: bool,
        auto: bool,
    ) -> torch.Tensor:
        if w_shape[1] > 1:
            return passes.run("wgrad", dy, x, None, x.shape, w_shape, geometry, channels_last, auto)
        # with one channel per group both formats of dw are one memory: that of x says how x and dy
        # are read
        dw = passes.run(
            "wgrad", dy, x, None, x.shape, w_shape, geometry, has_channels_last(x), auto
        )
        return passes.formatted(dw, channels_last)


def _register(name):
    """What runs the operator, its shape, its derivatives (also those that a transform takes) and
    its rule under vmap. All ask `op.function`, the Function of the module that was executed last.
    """
    op = getattr(torch.ops.tridil, name).default

    def arguments(a, b, third, stride, padding, dilation, groups, channels_last, auto=False):
        # of a DTensor, x_shape has the images of all processes
        if name == "dgrad":
            third = a.shape[0], *third[1:]
        return (
            a,
            b,
            tuple(third) if isinstance(third, list) else third,
            (tuple(stride), tuple(padding), tuple(dilation), groups),
            channels_last,
            auto,
        )

    def derive(*args):
        with private.single_level():
            return op.function.apply(*arguments(*args), False)

    lib.impl(name, lambda *args: op.function.run(*arguments(*args)), "CompositeExplicitAutograd")
    lib.impl(name, derive, "Autograd")
    torch.library.register_fake(
        f"tridil::{name}", lambda *args, **kwargs: op.function.fake(*args, **kwargs), lib=lib
    )
    torch.library.register_vmap(
        f"tridil::{name}", lambda *args: batching.rule(op.function, *args), lib=lib
    )


FUNCTIONS: dict[str, Any] = {function.pass_: function for function in (Fprop, Dgrad, Wgrad)}
for _name, _function in FUNCTIONS.items():
    _function.op = getattr(torch.ops.tridil, _name).default
    _function.op.function = _function
    if not _IS_DEFINED:
        _register(_name)
late.install()


def convolve(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    problem: Problem,
    auto: bool = False,
) -> torch.Tensor:
    """y (N, K, P, Q) or (N, K, L) of 4D or 3D tensors that `problem` describes, differentiable
    twice: through the Triton kernels, with auto also through ATen."""
    geometry, nhwc = (
        (
            problem.stride,
            (*problem.padding[0], *problem.padding[1]),
            problem.dilation,
            problem.groups,
        ),
        problem.layout == "nhwc",
    )
    if is_plain(x, w, bias):
        if not (
            torch.is_grad_enabled()
            and (x.requires_grad or w.requires_grad or bias is not None and bias.requires_grad)
        ):
            return passes.run("fprop", x, w, bias, x.shape, w.shape, geometry, nhwc, auto)
        if auto and passes.is_all_aten(x, w, bias, geometry, nhwc):
            axes = slice(2) if x.dim() == 4 else slice(1, 2)
            aten_conv: Any = torch.conv2d if x.dim() == 4 else torch.conv1d
            padding: Any = problem.padding[axes]
            return aten_conv(
                x,
                w,
                bias,
                problem.stride[axes],
                [lo for lo, _ in padding],
                problem.dilation[axes],
                problem.groups,
            )
        return Fprop.apply(x, w, bias, geometry, nhwc, auto, True)
    return torch.ops.tridil.fprop(x, w, bias, *geometry, nhwc, auto)


def transpose(
    dy: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    problem: Problem,
    auto: bool = False,
) -> torch.Tensor:
    """x (N, C, H, W) or (N, C, L) of the convolution that `problem` describes, from its y and w: the
    transposed convolution, + bias (C,) or None; differentiable twice."""
    geometry = (
        problem.stride,
        (*problem.padding[0], *problem.padding[1]),
        problem.dilation,
        problem.groups,
    )
    nhwc = problem.layout == "nhwc"
    shape = problem.x_shape if dy.dim() == 4 else (problem.n, problem.c, problem.w)
    x = _apply(is_plain(dy, w, bias), "dgrad", dy, w, shape, geometry, nhwc, auto)
    return x if bias is None else x + bias[(..., *[None] * (x.dim() - 2))]
