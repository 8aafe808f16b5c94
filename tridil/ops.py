"""The torch boundary: operators tridil::fprop, dgrad and wgrad, and the autograd Functions that call each other. Imports no Triton."""
from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from copy import copy
from functools import lru_cache, partial, reduce
from importlib.abc import MetaPathFinder

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad, profiler
from torch.autograd.function import BackwardCFunction

from . import choice, drivers
from .problem import Problem

# tensors are 4D (N, C, H, W), or 3D (N, C, L): maps of height 1, whose results are 3D, too, and no views
_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool channels_last, bool auto=False"
_IS_DEFINED = hasattr(torch.ops.tridil, "fprop")         # the module runs again (importlib.reload): a process defines operators once
if not _IS_DEFINED:
    lib = torch.library.Library("tridil", "DEF")
    lib.define(f"fprop(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor")
    lib.define(f"dgrad(Tensor dy, Tensor w, SymInt[] x_shape, {_GEOMETRY}) -> Tensor")
    lib.define(f"wgrad(Tensor dy, Tensor x, SymInt[] w_shape, {_GEOMETRY}) -> Tensor")


def is_channels_last(shape, strides) -> bool:
    """Whether ATen takes 4D strides for channels_last (c10's `is_channels_last_strides_2d`); ambiguous ones are contiguous."""
    (_, c, h, w), (s_n, s_c, s_h, s_w) = shape, strides
    return s_c != 0 and 0 not in shape and c * s_c <= s_w and w * s_w <= s_h and h * s_h <= s_n and h * s_h != s_c


def has_channels_last(t) -> bool:
    """`is_channels_last` of a tensor, 4D or 3D."""
    shape, strides = t.shape, t.stride()
    return is_channels_last(_map(shape), strides if len(shape) == 4 else (*strides[:2], shape[2] * strides[2], strides[2]))


def _map(shape):
    """The 4D shape of a tensor, 4D or 3D."""
    return shape if len(shape) == 4 else (*shape[:2], 1, shape[2])


# what runs a pass: (pass, shapes, geometry, dtype, device, switches) -> function of (a, b, bias); forgotten when a config may have changed
_runs: dict = {}
choice.listeners.append(_runs.clear)


@lru_cache(maxsize=1)
def _launch():                                            # imports Triton
    from . import launch
    return launch


def driver_device(device):
    """The device of Triton's driver, where tensors are not on a GPU that says it. Raises where Triton is missing or has no driver."""
    return None if device.type == "cuda" else _launch().device()


def _run(pass_, a, b, bias, x_shape, w_shape, geometry, channels_last, auto):
    """One pass on its two tensors, under their device; channels_last is the format of the result, auto whether ATen may run it."""
    if len(x_shape) == 3:
        with _without_views():
            return _run(pass_, a.unsqueeze(2), b.unsqueeze(2), bias, _map(x_shape), _map(w_shape), geometry, channels_last, auto).squeeze(2)
    run = _lookup(pass_, a, bias, x_shape, w_shape, geometry, channels_last, auto)
    if a.is_cuda and a.device.index != torch.cuda.current_device():
        with torch.cuda.device(a.device):
            return run(a, b, bias)
    return run(a, b, bias)


def _lookup(pass_, a, bias, x_shape, w_shape, geometry, channels_last, auto):
    dtype, device, cudnn = a.dtype, a.device, torch.backends.cudnn
    key = (pass_, x_shape, w_shape, geometry, channels_last, auto, bias is None, dtype, device, driver_device(device),
           os.environ.get("TRIDIL_TARGET"), cudnn.benchmark, dtype is torch.float32 and cudnn.conv.fp32_precision)
    run = _runs.get(key)
    if run is None:
        with torch.cuda.device(device) if a.is_cuda else nullcontext():
            run = _prepare(pass_, bias is not None, x_shape, w_shape, geometry, channels_last, auto, dtype, device)
        if len(_runs) >= 4096:
            _runs.clear()
        _runs[key] = run
    return run


def _prepare(pass_, has_bias, x_shape, w_shape, geometry, channels_last, auto, dtype, device):
    stride, padding, dilation, groups = geometry
    problem = Problem(*x_shape, w_shape[0], *w_shape[2:], stride, (padding[:2], padding[2:]), dilation, groups, str(dtype).removeprefix("torch."),
                      "nhwc" if channels_last else "nchw")
    if problem.is_empty:
        return partial(_without_products, {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_], channels_last)
    target = drivers.target()                              # of this device, not of the one that was current
    precision = drivers.fp32_precision(target) if dtype == torch.float32 else "ieee"
    allow_aten, unfit = auto and all(lo == hi for lo, hi in problem.padding), problem.beyond_int32
    if unfit and not allow_aten:
        raise NotImplementedError(f"the Triton kernels cannot run this convolution: {unfit}")
    config = None if unfit else choice.resolve(problem, pass_, target, precision, device, allow_aten)
    if config is None:
        return partial(aten, problem, pass_)
    return _launch().prepare(problem, pass_, config, precision, has_bias)


def _all_aten(x, w, bias, geometry, channels_last) -> bool:
    """Whether ATen runs every pass that a call on these tensors may need."""
    wgrad_last = has_channels_last(x if w.shape[1] == 1 else w)
    needed = ("fprop", True, channels_last), ("dgrad", x.requires_grad, channels_last), ("wgrad", w.requires_grad, wgrad_last)
    return all(getattr(_lookup(pass_, x, bias if pass_ == "fprop" else None, _map(x.shape), _map(w.shape), geometry, nhwc, True), "func", None)
               is aten for pass_, need, nhwc in needed if need)


def _without_products(shape, channels_last, a, b, bias=None):
    """Without images or pixels there is nothing to launch: the result is zero, or the bias."""
    out = _empty(a, shape, channels_last).zero_()
    return out if bias is None else out.add_(bias.view(1, -1, 1, 1))


def _without_views():
    """Where another shape or other strides of a tensor make a tensor that autograd does not take for a view."""
    return torch._C._ExcludeDispatchKeyGuard(_VIEWS)


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def _formatted(t, channels_last):
    """t in a memory format, strides of sides of length 1 included: ATen reads the format off them."""
    wanted = _strides(t.shape, channels_last)
    if t.stride() == wanted:
        return t
    if t.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format):
        with _without_views():
            return t.as_strided(t.shape, wanted)
    return torch.empty_strided(t.shape, wanted, dtype=t.dtype, device=t.device).copy_(t)


def _strides(shape, channels_last):
    _, c, h, w = _map(shape)
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return strides if len(shape) == 4 else (*strides[:2], strides[3])


def aten(problem: Problem, pass_: str, a, b, bias=None) -> torch.Tensor:
    """One pass through ATen, in problem.layout. Raises NotImplementedError for padding that differs on both sides, which ATen does not have."""
    if any(lo != hi for lo, hi in problem.padding):
        raise NotImplementedError(f"ATen's convolution has no padding {problem.padding}")
    geometry = problem.stride, [lo for lo, _ in problem.padding], problem.dilation, False, [0, 0], problem.groups
    nhwc = problem.layout == "nhwc"
    with torch._C._AutoDispatchBelowAutograd():
        if pass_ == "fprop":
            return _formatted(torch.ops.aten.convolution(a, _formatted(b, nhwc), bias, *geometry), nhwc)
        if pass_ == "dgrad":
            x, w = _empty(a, problem.x_shape, nhwc), _formatted(b, nhwc)       # of x only sizes and format are read: ATen copies dy into its format
        else:
            x, w = b, _empty(b, problem.w_shape, nhwc)
        mask = [pass_ == "dgrad", pass_ == "wgrad", False]
        return _formatted(torch.ops.aten.convolution_backward(a, x, w, None, *geometry, mask)[mask.index(True)], nhwc)


def _empty(like, shape, channels_last):
    if len(shape) == 3 and channels_last:
        return torch.empty_strided(shape, _strides(shape, True), dtype=like.dtype, device=like.device)
    return torch.empty(shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def is_plain(a, b, bias=None) -> bool:
    """Whether nothing but autograd may watch an eager call on these tensors, so that no operator needs to be dispatched: no compiler, tracer,
    transform, mode, profiler or dual level is active, and the tensors are ordinary."""
    return (not torch.compiler.is_compiling() and type(a) in ORDINARY and type(b) in ORDINARY and (bias is None or type(bias) in ORDINARY)
            and not (a.is_neg() or b.is_neg() or bias is not None and bias.is_neg() or _is_wrapped(a) or _is_wrapped(b))
            and not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._are_functorch_transforms_active()
                     or torch._C._get_tracing_state() or profiler._is_profiler_enabled or forward_ad._current_level >= 0))


ORDINARY = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor          # left over from a transform
_is_batched = torch._C._functorch.is_legacy_batchedtensor              # of torch.autograd.grad(is_grads_batched=True)


def _below(pass_, a, b, third, geometry, channels_last, auto):
    """The operator for whoever watches below autograd: modes, subclasses, and the derivatives of an enclosing transform."""
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return getattr(torch.ops.tridil, pass_)(a, b, third, *geometry, channels_last, auto)


def _apply(plain, pass_, a, b, third, geometry, channels_last, auto):
    """One pass that a derivative needs, differentiable; plain: whether nobody watches."""
    if not plain:
        return getattr(torch.ops.tridil, pass_)(a, b, third, *geometry, channels_last, auto)
    function = FUNCTIONS[pass_]
    if torch.is_grad_enabled():
        return super(torch.autograd.Function, function).apply(a, b, third, geometry, channels_last, auto, True)
    return function.run(a, b, third, geometry, channels_last, auto)


def _is_plain_backward(a, b, c) -> bool:
    return is_plain(a, b, c) and not (_is_batched(a) or _is_batched(b) or _is_batched(c))


def _wanted(ctx):
    """For each input whether its gradient is used: `needs_input_grad`, without what torch.autograd.grad was not asked for."""
    needs = ctx.needs_input_grad
    if torch.compiler.is_compiling() or not isinstance(ctx, BackwardCFunction):        # compiled autograd, which asks no engine
        return needs
    return [need and _will_run(node) for need, (node, _) in zip(needs, ctx.next_functions)] + [False]       # of a bias that is None


def _will_run(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:                                    # of leaves that it was asked for
        return True


class _Pass(torch.autograd.Function):
    """What the passes have in common: each is linear in its two tensors a and b. `roles` names a, b and the result; `run` computes, `op` is the
    operator, for whoever watches: its autograd kernel applies the Function, which is the only one that knows derivatives."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, ctx.geometry, ctx.channels_last, ctx.auto, _ = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        ctx.shape = output.shape

    @staticmethod
    def jvp(ctx, da, db, dbias, *_):
        op, shape, rest = ctx._forward_cls.op, None if ctx._forward_cls is Fprop else ctx.shape, (*ctx.geometry, ctx.channels_last, ctx.auto)
        with forward_ad._set_fwd_grad_enabled(True):        # off here by default, which makes forward-over-forward lose terms in silence
            a, b = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            terms = [] if da is None else [op(da, b, dbias if shape is None else shape, *rest)]
            if db is not None:
                terms.append(op(a, db, shape, *rest))
            if da is None and dbias is not None:
                terms.append(dbias.view(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape))
            return reduce(torch.add, terms)


class Fprop(_Pass):
    """y of (x, w, bias); geometry is (stride, padding (h_lo, h_hi, w_lo, w_hi), dilation, groups), channels_last the format of y and dx, auto whether
    ATen may run it, plain whether nobody watches."""
    roles = "xwy"

    @staticmethod
    def fake(x, w, bias, stride, padding, dilation, groups, channels_last, auto=False):
        sizes = [(size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (taps - 1) - 1) // stride[i] + 1
                 for i, size, taps in zip((0, 1), _map(x.shape)[2:], _map(w.shape)[2:])]
        return _empty(x, (x.shape[0], w.shape[0], *sizes[4 - x.dim():]), channels_last)

    @staticmethod
    def run(x, w, bias, geometry, channels_last, auto):
        return _run("fprop", x, w, bias, x.shape, w.shape, geometry, channels_last, auto)

    @staticmethod
    def forward(x, w, bias, geometry, channels_last, auto, plain):
        return (Fprop.run if plain else partial(_below, "fprop"))(x, w, bias, geometry, channels_last, auto)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 7
        x, w = ctx.saved_tensors
        (need_x, need_w, need_bias, *_), plain = _wanted(ctx), _is_plain_backward(x, w, dy)
        dx = _apply(plain, "dgrad", dy, w, x.shape, ctx.geometry, ctx.channels_last, ctx.auto) if need_x else None
        dw = _apply(plain, "wgrad", dy, x, w.shape, ctx.geometry, has_channels_last(w), ctx.auto) if need_w else None
        db = dy.sum((0, *range(2, dy.dim()))) if need_bias else None
        return dx, dw, db, None, None, None, None


class Dgrad(_Pass):
    """dx of (dy, w); channels_last is the format of dx."""
    roles = "ywx"

    @staticmethod
    def fake(dy, w, x_shape, stride, padding, dilation, groups, channels_last, auto=False):
        return _empty(dy, (dy.shape[0], *x_shape[1:]), channels_last)

    @staticmethod
    def run(dy, w, x_shape, geometry, channels_last, auto):
        return _run("dgrad", dy, w, None, x_shape, w.shape, geometry, channels_last, auto)

    @staticmethod
    def forward(dy, w, x_shape, geometry, channels_last, auto, plain):
        return (Dgrad.run if plain else partial(_below, "dgrad"))(dy, w, x_shape, geometry, channels_last, auto)

    @staticmethod
    def backward(ctx, ddx):
        if ddx is None:
            return (None,) * 7
        dy, w = ctx.saved_tensors
        (need_dy, need_w, *_), plain = _wanted(ctx), _is_plain_backward(dy, w, ddx)
        ddy = _apply(plain, "fprop", ddx, w, None, ctx.geometry, ctx.channels_last, ctx.auto) if need_dy else None
        dw = _apply(plain, "wgrad", dy, ddx, w.shape, ctx.geometry, has_channels_last(w), ctx.auto) if need_w else None
        return ddy, dw, None, None, None, None, None


class Wgrad(_Pass):
    """dw of (dy, x); channels_last is the format of dw."""
    roles = "yxw"

    @staticmethod
    def fake(dy, x, w_shape, stride, padding, dilation, groups, channels_last, auto=False):
        return _empty(x, w_shape, channels_last)

    @staticmethod
    def run(dy, x, w_shape, geometry, channels_last, auto):
        if w_shape[1] > 1:
            return _run("wgrad", dy, x, None, x.shape, w_shape, geometry, channels_last, auto)
        # with one channel per group both formats of dw are one memory: that of x says how x and dy are read
        dw = _run("wgrad", dy, x, None, x.shape, w_shape, geometry, has_channels_last(x), auto)
        return _formatted(dw, channels_last)

    @staticmethod
    def forward(dy, x, w_shape, geometry, channels_last, auto, plain):
        return (Wgrad.run if plain else partial(_below, "wgrad"))(dy, x, w_shape, geometry, channels_last, auto)

    @staticmethod
    def backward(ctx, ddw):
        if ddw is None:
            return (None,) * 7
        dy, x = ctx.saved_tensors
        (need_dy, need_x, *_), plain = _wanted(ctx), _is_plain_backward(dy, x, ddw)
        ddy = _apply(plain, "fprop", x, ddw, None, ctx.geometry, has_channels_last(dy), ctx.auto) if need_dy else None
        dx = _apply(plain, "dgrad", dy, ddw, x.shape, ctx.geometry, has_channels_last(x), ctx.auto) if need_x else None
        return ddy, dx, None, None, None, None, None


# The operand that has no vmap batch, if any -> the axis of each other tensor that takes the batch, so that one convolution computes all: images of x
# and y, output channels of each group, input channels of each group, or groups.
_PLACES = {"w": {"x": 0, "y": 0}, "x": {"w": 0, "y": 1}, "y": {"w": 1, "x": 1}, "": {"x": 1, "w": 0, "y": 1}}


def _vmap(function, info, in_dims, a, b, third, stride, padding, dilation, groups, channels_last, auto=False):
    """(result, its batch axis) of an operator under vmap."""
    size, roles, bias, bias_dim = info.batch_size, function.roles, None, in_dims[2]
    unbatched = "".join(role for role, dim in zip(roles, in_dims[:2]) if dim is None)
    places = _PLACES.get(unbatched, {})

    def parts(role):                                        # an axis of all channels consists of those of each group
        return groups if unbatched in ("x", "y") and (role, places[role]) != ("w", 1) else 1

    a, b = (t if dim is None else _fold(t, dim, places[role], parts(role)) for role, dim, t in zip(roles, in_dims, (a, b)))
    at = places.get(roles[2], 0)
    if roles != Fprop.roles:
        third = [n * size if i == at else n for i, n in enumerate(third)]
    elif third is not None and (unbatched != "w" or bias_dim is not None):
        bias, third = third, None
    out = function.op(a, b, third, stride, padding, dilation, groups if unbatched else groups * size, channels_last, auto)
    if places:
        out = _unfold(out, at, size, parts(roles[2]))
    if bias is not None:                                    # (B, N, K, P, Q), or (N, B, K, P, Q)
        out = out + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1 - at))[(..., *[None] * (a.dim() - 2))]
    return out, at


def _fold(t, dim, at, groups):
    """t without axis `dim`, which its axis `at` takes in, within each of so many groups."""
    t = t.movedim(dim, at)
    return t.flatten(at, at + 1) if groups == 1 else t.unflatten(at + 1, (groups, -1)).transpose(at, at + 1).flatten(at, at + 2)


def _unfold(t, at, size, groups):
    """The inverse: the batch becomes axis `at`."""
    return t.unflatten(at, (size, -1)) if groups == 1 else t.unflatten(at, (groups, size, -1)).transpose(at, at + 1).flatten(at + 1, at + 2)


def _register(name):
    """What runs the operator, its shape, its derivatives (also those that a transform takes) and its rule under vmap. All ask `op.function`, the
    Function of the module that was executed last."""
    op = getattr(torch.ops.tridil, name).default

    def arguments(a, b, third, stride, padding, dilation, groups, channels_last, auto=False):
        if name == "dgrad":                                 # of a DTensor, x_shape has the images of all processes
            third = a.shape[0], *third[1:]
        return a, b, tuple(third) if isinstance(third, list) else third, (tuple(stride), tuple(padding), tuple(dilation), groups), channels_last, auto

    def derive(*args):
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, op.function).apply(*arguments(*args), False)
    lib.impl(name, lambda *args: op.function.run(*arguments(*args)), "CompositeExplicitAutograd")
    lib.impl(name, derive, "Autograd")
    torch.library.register_fake(f"tridil::{name}", lambda *args, **kwargs: op.function.fake(*args, **kwargs), lib=lib)
    torch.library.register_vmap(f"tridil::{name}", lambda *args: _vmap(op.function, *args), lib=lib)


FUNCTIONS = {"fprop": Fprop, "dgrad": Dgrad, "wgrad": Wgrad}
for _name, _function in FUNCTIONS.items():
    _function.op = getattr(torch.ops.tridil, _name).default
    _function.op.function = _function
    if not _IS_DEFINED:
        _register(_name)


def convolve(x, w, bias, problem: Problem, auto: bool = False) -> torch.Tensor:
    """y (N, K, P, Q) or (N, K, L) of 4D or 3D tensors that `problem` describes, differentiable twice: through the Triton kernels, with auto also
    through ATen."""
    geometry, nhwc = (problem.stride, (*problem.padding[0], *problem.padding[1]), problem.dilation, problem.groups), problem.layout == "nhwc"
    if is_plain(x, w, bias):
        if not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or bias is not None and bias.requires_grad)):
            return _run("fprop", x, w, bias, x.shape, w.shape, geometry, nhwc, auto)
        if auto and _all_aten(x, w, bias, geometry, nhwc):
            aten_conv, axes = (torch.conv2d, slice(2)) if x.dim() == 4 else (torch.conv1d, slice(1, 2))
            return aten_conv(x, w, bias, problem.stride[axes], [lo for lo, _ in problem.padding[axes]], problem.dilation[axes], problem.groups)
        # Function.apply without its look at the signature of forward, which takes longer than a launch
        return super(torch.autograd.Function, Fprop).apply(x, w, bias, geometry, nhwc, auto, True)
    return torch.ops.tridil.fprop(x, w, bias, *geometry, nhwc, auto)


def _register_flops(flop_counter):
    """The dense FLOPs that torch.utils.flop_counter gives F.conv2d."""
    def backward(dy, x_shape, w_shape, groups, mask):
        return flop_counter.conv_backward_flop(dy, x_shape, w_shape, None, None, None, None, False, None, groups, mask, out_val=(x_shape, w_shape))
    for packet, formula in ((torch.ops.tridil.fprop, lambda x, w, *rest, out_shape, **_: flop_counter.conv_flop_count(x, w, out_shape)),
                            (torch.ops.tridil.dgrad, lambda dy, w, x, *geometry, **_: backward(dy, x, w, geometry[3], (True, False, False))),
                            (torch.ops.tridil.wgrad, lambda dy, x, w, *geometry, **_: backward(dy, x, w, geometry[3], (False, True, False)))):
        flop_counter.flop_registry.pop(packet, None)        # of a module that runs again
        flop_counter.register_flop_formula(packet)(formula)


def _register_sharding(_):
    """How DTensors are split over processes: by images, with whole weights, whose gradients are then summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding
    propagator = DTensor._op_dispatcher.sharding_propagator

    def register(op, *split):
        def rule(a, b, third, *rest):
            bias = None if third is None or isinstance(third, (list, tuple)) else Replicate()
            return [([y], [a, b, bias, *(None for _ in rest)]) for y, a, b in (split, (Replicate(),) * 3)]
        register_sharding(op)(rule)
        # what is not a tensor belongs to the key of DTensor's cache, too: the shape of the result depends on it
        propagator.register_op_strategy(op, propagator.op_strategy_funcs[op], RuntimeSchemaInfo(2, needs_pytree=True))
    register(Fprop.op, Shard(0), Shard(0), Replicate())
    register(Dgrad.op, Shard(0), Shard(0), Replicate())
    register(Wgrad.op, Partial(), Shard(0), Shard(0))


class _Late(MetaPathFinder):
    """Registers whenever a module is executed that `import tridil` leaves out: it takes long, or imports Triton, which is left to be configured."""
    modules = {"torch.utils.flop_counter": _register_flops, "torch.distributed.tensor": _register_sharding}

    def register(self, name, module):
        with suppress(ImportError, AttributeError):         # parts are private to PyTorch: without them FLOPs are 0, and DTensors find no rule
            self.modules[name](module)

    def find_spec(self, name, path, target=None):
        if name not in self.modules:
            return None
        finders = iter(sys.meta_path)
        any(finder is self for finder in finders)           # those behind this one are left
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders if hasattr(finder, "find_spec"))), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run, spec.loader = spec.loader.exec_module, copy(spec.loader)
            spec.loader.exec_module = lambda module: (run(module), self.register(name, module))
        return spec


sys.meta_path[:] = [_Late(), *(finder for finder in sys.meta_path if (type(finder).__module__, type(finder).__name__) != (__name__, "_Late"))]
for _name in _Late.modules.keys() & sys.modules.keys():
    sys.meta_path[0].register(_name, sys.modules[_name])
