"""Parallel convolutions of one map in one launch a pass: `multi_rate_conv2d`, `multi_rate_conv1d`
and the layer `MultiRateConv2d`; operators tridil::branches_fprop, branches_dgrad, branches_wgrad.

Where something watches the call (transforms, modes, subclasses, forward mode), or no launch can run
all, the branches run one by one, through `dilated_conv2d`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from . import batching, choice, drivers, functional, ops, passes, private
from .branches import Branches
from .functional import dilated_conv1d, dilated_conv2d
from .module import DilatedConv2d
from .problem import Problem, pair, to_int


def multi_rate_conv2d(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    padding: Sequence[Any],
    dilation: Sequence[Any],
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    shared_input: bool = True,
    reduce: str = "cat",
    backend: str = "auto",
) -> torch.Tensor:
    """Several convolutions of one input, of different rates or filters, in one launch a pass (dgrad
    with a stride: in one per residue class of it).

    input (N, C, H, W) or (C, H, W); weights: of each branch (K_i, C_i/groups, R_i, S_i). padding and
    dilation: a value per branch, each as in `dilated_conv2d`. stride and groups are those of all
    branches, whose outputs have one size P x Q. bias: None, a tensor of all output channels, or for
    each branch (K_i,) or None.

    shared_input: every branch reads all channels (C_i = C), else branch i the next C_i of them.
    reduce="cat" returns (N, sum of K_i, P, Q), what ``torch.cat([F.conv2d(...), ...], 1)`` returns,
    without the copy; "sum" adds the branches, of one K: (N, K, P, Q). Differentiable twice. backend
    and autocast as in `dilated_conv2d`; "auto" also decides for each pass whether the branches run
    together. Raises TypeError and ValueError, with the values, where `F.conv2d` of a branch raises
    and where branches do not go together.
    """
    return _run(
        2, input, weights, bias, padding, dilation, stride, groups, shared_input, reduce, backend
    )


def multi_rate_conv1d(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    padding: Sequence[Any],
    dilation: Sequence[Any],
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    shared_input: bool = True,
    reduce: str = "cat",
    backend: str = "auto",
) -> torch.Tensor:
    """`multi_rate_conv2d` of input (N, C, L) or (C, L) and weights (K_i, C_i/groups, S_i): returns
    (N, sum of K_i, Q), or (N, K, Q) where branches are added."""
    return _run(
        1, input, weights, bias, padding, dilation, stride, groups, shared_input, reduce, backend
    )


# ---- arguments
def _run(
    dims, input, weights, bias, padding, dilation, stride, groups, shared_input, how, backend
) -> torch.Tensor:
    weights = _sequence(weights, "weights", "a tensor")
    given = (bias,) if bias is None or isinstance(bias, torch.Tensor) else tuple(bias)
    tensors = (input, *weights, *given)
    if has_torch_function(tensors) and any(isinstance(t, torch.fx.Proxy) for t in tensors):
        return handle_torch_function(
            multi_rate_conv2d if dims == 2 else multi_rate_conv1d,
            tensors,
            input,
            weights,
            bias,
            padding=padding,
            dilation=dilation,
            stride=stride,
            groups=groups,
            shared_input=shared_input,
            reduce=how,
            backend=backend,
        )
    padding = _sequence(padding, "padding", "a value", len(weights))
    if dims == 2:
        padding = [pad if isinstance(pad, str) else pair(pad, "padding") for pad in padding]
    dilation = _sequence(dilation, "dilation", "a value", len(weights))
    for t in (input, *weights):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"input and weights must be tensors, got {type(t).__name__}")
    parts = _parts(input, weights, dims, to_int(groups, "groups"), shared_input)
    biases = _biases(bias, weights, how)
    dtype, autocast = functional._dtype(input, weights[0], biases[0])
    problems = [
        _problem(dims, x, w, b, stride, pad, rate, groups)
        for x, w, b, pad, rate in zip(parts, weights, biases, padding, dilation)
    ]
    layout = min(problem.layout for problem in problems)  # nhwc where all are, as torch.cat has it
    branches = Branches(
        tuple(replace(problem, layout=layout) for problem in problems), bool(shared_input), how
    )
    if not _can_join(input, weights, biases, branches, backend):
        conv = dilated_conv2d if dims == 2 else dilated_conv1d
        results = [
            conv(x, w, b, stride, pad, rate, groups, backend=backend)
            for x, w, b, pad, rate in zip(parts, weights, biases, padding, dilation)
        ]
        return reduce(torch.add, results) if how == "sum" else torch.cat(results, -1 - dims)
    total = _total(biases, weights, how)
    auto = (os.environ.get("TRIDIL_BACKEND", "auto") if backend == "auto" else backend) == "auto"
    if autocast:
        input, weights = (
            functional._cast(input, dtype),
            [functional._cast(w, dtype) for w in weights],
        )
        total = total if total is None else total.to(dtype)
    without = private.without_autocast(input.device.type) if autocast else nullcontext()
    x = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if dims == 1:
        x, weights = x.unsqueeze(2), [w.unsqueeze(2) for w in weights]
    with without:
        y = torch.ops.tridil.branches_fprop(x, weights, total, *_geometry(branches), auto)
    y = y.squeeze(2) if dims == 1 else y
    return y if input.dim() == dims + 2 else y.squeeze(0)


def _sequence(values, name: str, what: str, count: int | None = None) -> list:
    """A list of what is given for each branch."""
    if isinstance(values, (str, torch.Tensor)) or not isinstance(
        values, Sequence | nn.ParameterList
    ):
        raise TypeError(f"{name} must be a sequence with {what} per branch, got {values!r:.100}")
    if not len(values) or count not in (None, len(values)):
        raise ValueError(
            f"{name} must have {what} per branch, got {len(values)}"
            + (f" for {count} branches" if count else "")
        )
    return list(values)


def _parts(input, weights, dims, groups, shared_input) -> Sequence[torch.Tensor]:
    """What each branch reads."""
    if shared_input:
        return [input] * len(weights)
    sizes = [w.shape[1] * groups if w.dim() > 1 else 0 for w in weights]
    if input.dim() not in (dims + 1, dims + 2) or sum(sizes) != input.shape[-1 - dims]:
        raise ValueError(
            f"with shared_input=False the branches read {sizes} channels, one after another, which must be all of input's: "
            f"got input of shape {tuple(input.shape)}"
        )
    return input.split(sizes, -1 - dims)


def _biases(bias, weights, how) -> list:
    """A bias or None per branch."""
    if bias is None:
        return [None] * len(weights)
    if not isinstance(bias, torch.Tensor):
        return _sequence(bias, "bias", "a tensor or None", len(weights))
    sizes = [w.shape[0] for w in weights]
    wanted = sizes[0] if how == "sum" else sum(sizes)
    if tuple(bias.shape) != (wanted,):
        raise ValueError(
            f"bias must have shape ({wanted},), one element per output channel, or be one per branch, got {tuple(bias.shape)}"
        )
    return [bias, *[None] * (len(sizes) - 1)] if how == "sum" else list(bias.split(sizes))


def _total(biases, weights, how) -> torch.Tensor | None:
    """The bias of the result."""
    if all(b is None for b in biases):
        return None
    if how == "sum":
        return reduce(torch.add, [b for b in biases if b is not None])
    return torch.cat(
        [w.new_zeros(w.shape[:1]) if b is None else b for b, w in zip(biases, weights)]
    )


def _problem(dims, x, w, bias, stride, padding, dilation, groups) -> Problem:
    if dims == 2:
        return functional.problem_of_tensors(x, w, bias, stride, padding, dilation, groups)
    dtype, _ = functional._dtype(x, w, bias)
    return functional._problem_1d(x, w, bias, stride, padding, dilation, groups, False, dtype)


def _can_join(input, weights, biases, branches: Branches, backend) -> bool:
    """Whether one operator may run all branches."""
    compiling, tensors = torch.compiler.is_compiling(), (input, *weights)
    if any(t.layout != torch.strided or functional._is_foreign(t) for t in tensors):
        return False
    if has_torch_function((*tensors, *biases)) or compiling and functional._foreign_modes():
        return False
    if compiling and functional._to_onnx():
        return False
    if not compiling and not all(ops.is_plain(input, w, b) for w, b in zip(weights, biases)):
        return False
    chosen = {functional._choose(problem, input, backend)[0] for problem in branches.problems}
    if chosen != {"triton"}:
        return False
    if compiling or branches.first.is_symbolic:  # the operator asks
        return True
    return not (branches.first.is_empty or branches.apart("fprop"))


# ---- operators: x (N, C, H, W); padding (h_lo, h_hi, w_lo, w_hi) and dilation (h, w) of all
# branches one after another; w_shapes likewise
_GEOMETRY = (
    "SymInt[2] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool shared_input, bool sum, "
    "bool channels_last, bool auto"
)
_IS_DEFINED = hasattr(torch.ops.tridil, "branches_fprop")
if not _IS_DEFINED:
    lib: torch.library.Library = torch.library.Library("tridil", "FRAGMENT")
    lib.define(f"branches_fprop(Tensor x, Tensor[] w, Tensor? bias, {_GEOMETRY}) -> Tensor")
    lib.define(f"branches_dgrad(Tensor dy, Tensor[] w, SymInt[] x_shape, {_GEOMETRY}) -> Tensor")
    lib.define(f"branches_wgrad(Tensor dy, Tensor x, SymInt[] w_shapes, {_GEOMETRY}) -> Tensor[]")


def _geometry(branches: Branches) -> tuple:
    p = branches.first
    return (
        p.stride,
        [side for problem in branches.problems for axis in problem.padding for side in axis],
        [rate for problem in branches.problems for rate in problem.dilation],
        p.groups,
        branches.shared_input,
        branches.reduce == "sum",
        p.layout == "nhwc",
    )


def _four(values) -> list:
    return [tuple(values[i : i + 4]) for i in range(0, len(values), 4)]


@lru_cache(maxsize=1024)
def _branches(
    x_shape, w_shapes, stride, padding, dilation, groups, shared, summed, nhwc, dtype
) -> Branches:
    n, c, h, w = x_shape
    problems = (
        Problem(
            n,
            c if shared else shape[1] * groups,
            h,
            w,
            shape[0],
            shape[2],
            shape[3],
            stride,
            (pad[:2], pad[2:]),
            dilation[2 * i : 2 * i + 2],
            groups,
            str(dtype).removeprefix("torch."),
            "nhwc" if nhwc else "nchw",
        )
        for i, (shape, pad) in enumerate(zip(w_shapes, _four(padding)))
    )
    return Branches(tuple(problems), shared, "sum" if summed else "cat")


def run(
    pass_: str,
    a: torch.Tensor,
    b: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    x_shape: Sequence[int],
    w_shapes: Sequence[Sequence[int]],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int, bool, bool, bool, bool],
) -> torch.Tensor | list[torch.Tensor]:
    """One pass of all branches: y of (x, filters), dx of (dy, filters), the list of dw of (dy, x)."""
    stride, padding, dilation, groups, shared, summed, nhwc, auto = geometry
    branches = _branches(
        tuple(x_shape),
        tuple(map(tuple, w_shapes)),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        shared,
        summed,
        nhwc,
        a.dtype,
    )
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        config = None if branches.first.is_empty else _config(branches, pass_, a, auto)
        if config is None:
            return one_by_one(branches, pass_, a, b, bias, partial(_of_branch, pass_, auto))
        from . import launch  # imports Triton

        precision = _precision(a)
        epilogue = "bias" if bias is not None else ""
        prepared = launch.prepare_branches(branches, pass_, config, precision, epilogue)
        return prepared(a, b, bias)


def _precision(a) -> str:
    return drivers.fp32_precision(drivers.target()) if a.dtype == torch.float32 else "ieee"


_configs: dict = {}
choice.listeners.append(_configs.clear)


def _config(branches: Branches, pass_, a, auto):
    """The config that runs the branches together, None where they run one by one."""
    key = (
        branches,
        pass_,
        auto,
        a.device,
        passes.driver_device(a.device),
        drivers.target(),
        _precision(a),
    )
    if key not in _configs:
        if len(_configs) >= 4096:
            _configs.clear()
        _configs[key] = choice.resolve_branches(
            branches, pass_, drivers.target(), _precision(a), a.device, auto
        )
    return _configs[key]


def _of_branch(pass_, auto, p: Problem, a, b, bias):
    geometry = p.stride, (*p.padding[0], *p.padding[1]), p.dilation, p.groups
    nhwc = p.layout == "nhwc"
    return passes.run(pass_, a, b, bias, p.x_shape, p.w_shape, geometry, nhwc, auto)


def one_by_one(
    branches: Branches,
    pass_: str,
    a: torch.Tensor,
    b: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    one: Callable[[Problem, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor | list[torch.Tensor]:
    """The same by one(problem, a, b, bias), the pass of a branch."""
    count, problems = len(branches.problems), branches.problems

    def cut(t, begins, shared):
        sizes = [end - begin for begin, end in zip(begins, begins[1:])]
        return [t] * count if shared else t.split(sizes, 1)

    def join(results, adds):
        return reduce(torch.add, results) if adds else torch.cat(results, 1)

    adds = branches.adds("fprop")
    if pass_ == "fprop":
        xs = cut(a, branches.x_channels, branches.shared_input)
        biases: Sequence[torch.Tensor | None] = [None] * count
        if bias is not None:
            biases = [bias, *biases[1:]] if adds else bias.split([p.k for p in problems])
        return join([one(p, *rest) for p, *rest in zip(problems, xs, b, biases)], adds)
    dys = cut(a, branches.y_channels, adds)
    if pass_ == "dgrad":
        results = [one(p, dy, w, None) for p, dy, w in zip(problems, dys, b)]
        return join(results, branches.shared_input)
    xs = cut(b, branches.x_channels, branches.shared_input)
    return [one(p, dy, x, None) for p, dy, x in zip(problems, dys, xs)]


def _fprop(x, w, bias, *geometry):
    return run("fprop", x, w, bias, x.shape, [t.shape for t in w], geometry)


def _dgrad(dy, w, x_shape, *geometry):
    return run("dgrad", dy, w, None, x_shape, [t.shape for t in w], geometry)


def _wgrad(dy, x, w_shapes, *geometry):
    return run("wgrad", dy, x, None, x.shape, _four(w_shapes), geometry)


def _fake_fprop(
    x, w, bias, stride, padding, dilation, groups, shared_input, sum, channels_last, auto
):
    sizes = [
        (
            x.shape[2 + i]
            + padding[2 * i]
            + padding[2 * i + 1]
            - dilation[i] * (w[0].shape[2 + i] - 1)
            - 1
        )
        // stride[i]
        + 1
        for i in (0, 1)
    ]
    k = w[0].shape[0]
    for t in [] if sum else w[1:]:
        k = k + t.shape[0]
    return passes.empty(x, (x.shape[0], k, *sizes), channels_last)


def _fake_dgrad(
    dy, w, x_shape, stride, padding, dilation, groups, shared_input, sum, channels_last, auto
):
    return passes.empty(dy, (dy.shape[0], *x_shape[1:]), channels_last)


def _fake_wgrad(
    dy, x, w_shapes, stride, padding, dilation, groups, shared_input, sum, channels_last, auto
):
    return [passes.empty(x, shape, channels_last) for shape in _four(w_shapes)]


# ---- derivatives: each operator is linear in its tensors, and the other two are its derivatives
def _save(ctx, inputs, output):
    a, b, _, *ctx.geometry = inputs
    ctx.save_for_backward(a, *(b if isinstance(b, (list, tuple)) else (b,)))


def _of_filters(w, dy, x, geometry):
    """Gradients of the filters w, in their format."""
    *geometry, _, auto = geometry
    nhwc = any(passes.has_channels_last(t) for t in w)
    shapes = [size for t in w for size in t.shape]
    return torch.ops.tridil.branches_wgrad(dy, x, shapes, *geometry, nhwc, auto)


def _back_fprop(ctx, grad):
    x, *w = ctx.saved_tensors
    needs_x, needs_w, needs_bias, *_ = ctx.needs_input_grad
    with passes.one_copy_of(grad) if ops.is_plain_backward(x, w[0], grad) else nullcontext():
        dx = torch.ops.tridil.branches_dgrad(grad, w, x.shape, *ctx.geometry) if needs_x else None
        dw = _of_filters(w, grad, x, ctx.geometry) if _any(needs_w) else [None] * len(w)
    dbias = grad.sum((0, 2, 3)) if needs_bias else None
    return dx, dw, dbias, *[None] * len(ctx.geometry)


def _back_dgrad(ctx, grad):
    dy, *w = ctx.saved_tensors
    needs_dy, needs_w, *_ = ctx.needs_input_grad
    ddy = torch.ops.tridil.branches_fprop(grad, w, None, *ctx.geometry) if needs_dy else None
    dw = _of_filters(w, dy, grad, ctx.geometry) if _any(needs_w) else [None] * len(w)
    return ddy, dw, None, *[None] * len(ctx.geometry)


def _back_wgrad(ctx, grads):
    dy, x = ctx.saved_tensors
    needs_dy, needs_x, *_ = ctx.needs_input_grad
    *geometry, _, auto = ctx.geometry
    geometry = *geometry, passes.has_channels_last(x), auto
    ddy = torch.ops.tridil.branches_fprop(x, grads, None, *geometry) if needs_dy else None
    dx = torch.ops.tridil.branches_dgrad(dy, grads, x.shape, *geometry) if needs_x else None
    return ddy, dx, None, *[None] * len(geometry)


def _any(needs) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _register(name, function, fake, backward):
    lib.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tridil::{name}", fake, lib=lib)
    torch.library.register_autograd(f"tridil::{name}", backward, setup_context=_save, lib=lib)
    op = getattr(torch.ops.tridil, name).default
    torch.library.register_vmap(f"tridil::{name}", partial(_vmap, op), lib=lib)


def _vmap(op, info, in_dims, *args):
    """A batch of calls, one after another: every tensor's batch axis is unbound."""

    def at(value, dim, i):
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [at(v, d, i) for v, d in zip(value, dims)]
        return value if dim is None or not isinstance(value, torch.Tensor) else value.select(dim, i)

    if info.batch_size == 0:  # nothing says how large its items are: the shape of one
        out, dims = _vmap(
            op, info._replace(batch_size=1), in_dims, *batching.one_each(in_dims, args)
        )
        is_list = isinstance(out, list)
        return [t[:0] for t in out] if is_list else out[:0], dims
    results = [
        op(*(at(value, dim, i) for value, dim in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], (list, tuple)):
        return [torch.stack(parts) for parts in zip(*results)], [0] * len(results[0])
    return torch.stack(results), 0


if not _IS_DEFINED:
    _register("branches_fprop", _fprop, _fake_fprop, _back_fprop)
    _register("branches_dgrad", _dgrad, _fake_dgrad, _back_dgrad)
    _register("branches_wgrad", _wgrad, _fake_wgrad, _back_wgrad)


# ---- layers
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether to call a module is to run `cls.forward`, and nothing else: no hook, no other code."""
    kind: Any = type(module)
    return (
        isinstance(module, cls)
        and kind.forward is cls.forward
        and kind.__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and not any(getattr(module, name) for name in _HOOKS)
        and not private.has_global_hooks()
    )


def is_plain(conv: Any) -> bool:
    """Whether to call a layer is to convolve with its weight: an nn.Conv2d or DilatedConv2d (or
    parametrised) with zero padding, without hooks and code of its own."""
    return (
        runs(conv, nn.Conv2d)
        and type(conv)._conv_forward in (nn.Conv2d._conv_forward, DilatedConv2d._conv_forward)
        and "_conv_forward" not in conv.__dict__
        and conv.padding_mode == "zeros"
    )


def in_common(conv: Any) -> tuple[Any, ...]:
    """What layers have in common that one launch runs: stride, groups, and by how much the map
    shrinks."""
    zeros = {"same": None, "valid": (0, 0)}.get(conv.padding, conv.padding)
    reach = [d * (t - 1) for d, t in zip(conv.dilation, conv.kernel_size)]
    shrinks = tuple(0 if zeros is None else r - 2 * z for r, z in zip(reach, zeros or reach))
    return conv.stride, conv.groups, shrinks


def go_together(convs: Sequence[Any]) -> bool:
    """Whether one launch may run these layers in the place of their calls."""
    return all(map(is_plain, convs)) and len(set(map(in_common, convs))) == 1


class MultiRateConv2d(nn.ModuleList):
    """Parallel dilated convolutions of one input in one launch a pass, their results side by side:
    a ModuleList of `DilatedConv2d`, of which it has the state_dict.

    out_channels: of each branch, or an int for all. rates: the dilation of each branch. kernel_size:
    an int or a pair for all branches, or a list with one for each. Padding keeps the size of the
    map at stride 1: rate*(kernel_size-1)/2 zeros on each side, so kernel sizes are odd. input (N,
    in_channels, H, W) or (in_channels, H, W); returns (N, sum of out_channels, P, Q).
    shared_input=False: in_channels is a list, and branch i reads its own slice of the channels.
    reduce, backend: as in `multi_rate_conv2d`. Layers that have hooks (pruning, old weight_norm) or
    were replaced by others run one by one. Raises ValueError for lists of other lengths than
    that of rates, and for even kernel sizes.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        kernel_size: int | tuple[int, int] | list[int | tuple[int, int]],
        rates: Sequence[int | tuple[int, int]],
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        shared_input: bool = True,
        reduce: str = "cat",
        device: torch.types.Device = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        rates = _sequence(rates, "rates", "a dilation")

        def each(value, name, of_pairs=False):
            is_one = hasattr(value, "__index__") or of_pairs and isinstance(value, tuple)
            values = [value] * len(rates) if is_one else value
            return _sequence(values, name, "a value", len(rates))

        sizes = each(kernel_size, "kernel_size", of_pairs=True)
        layers = []
        for c, k, size, rate in zip(
            (to_int(c, "in_channels") for c in each(in_channels, "in_channels")),
            (to_int(k, "out_channels") for k in each(out_channels, "out_channels")),
            (pair(size, "kernel_size") for size in sizes),
            (pair(rate, "rates") for rate in rates),
        ):
            if not (size[0] % 2 and size[1] % 2):
                raise ValueError(
                    f"kernel_size must be odd, so that padding keeps the size, got {size}"
                )
            padding = rate[0] * (size[0] - 1) // 2, rate[1] * (size[1] - 1) // 2
            layers.append(
                DilatedConv2d(
                    c,
                    k,
                    size,
                    stride,
                    padding,
                    rate,
                    groups,
                    bias,
                    "zeros",
                    device,
                    dtype,
                    backend=backend,
                )
            )
        super().__init__(layers)
        self.shared_input: bool = shared_input
        self.reduce: str = reduce
        self.backend: str = backend

    def __getitem__(self, index: Any) -> Any:
        """Of a slice a ModuleList: its layers have no launch of their own."""
        if isinstance(index, slice):
            return nn.ModuleList(list(self)[index])
        return super().__getitem__(index)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first: Any = self[0]
        if not go_together(list(self)):
            sizes = [layer.in_channels for layer in self]  # type: ignore[misc]
            parts = [input] * len(self) if self.shared_input else input.split(sizes, -3)
            results = [layer(part) for layer, part in zip(self, parts)]
            return reduce(torch.add, results) if self.reduce == "sum" else torch.cat(results, -3)
        return multi_rate_conv2d(
            input,
            [layer.weight for layer in self],  # type: ignore[misc]
            [layer.bias for layer in self],  # type: ignore[misc]
            padding=[layer.padding for layer in self],
            dilation=[layer.dilation for layer in self],
            stride=first.stride,
            groups=first.groups,
            shared_input=self.shared_input,
            reduce=self.reduce,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"shared_input={self.shared_input}, reduce={self.reduce!r}"
