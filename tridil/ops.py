"""The torch boundary: operators tridil::fprop, dgrad and wgrad, and the autograd Functions that call each other. Imports no Triton."""
from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import lru_cache
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

import torch

from . import dispatch
from .problem import Problem

_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, bool channels_last"
lib = torch.library.Library("tridil", "DEF")
lib.define(f"fprop(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor")
lib.define(f"dgrad(Tensor dy, Tensor w, SymInt[4] x_shape, {_GEOMETRY}) -> Tensor")
lib.define(f"wgrad(Tensor dy, Tensor x, SymInt[4] w_shape, {_GEOMETRY}) -> Tensor")


def is_channels_last(shape, strides) -> bool:
    """Whether ATen takes 4D strides for channels_last (c10's `is_channels_last_strides_2d`); ambiguous ones are contiguous."""
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or strides[d] < least or d == 0 and least == strides[1]:
            return False
        least = strides[d] * shape[d]
    return True


def fp32_precision(target: str) -> str:
    """"tf32" or "ieee", as torch.backends.cudnn.conv.fp32_precision (and the older allow_tf32) say; of AMD's GPUs only gfx942 has tf32."""
    allowed = target.startswith("cuda") or target == "hip:gfx942"
    return "tf32" if allowed and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@lru_cache(maxsize=4096)
def _problem(x_shape, w_shape, stride, padding, dilation, groups, dtype, channels_last) -> Problem:
    return Problem(*x_shape, w_shape[0], *w_shape[2:], stride, (padding[:2], padding[2:]), dilation, groups,
                   str(dtype).removeprefix("torch."), "nhwc" if channels_last else "nchw")


@lru_cache(maxsize=4096)
def _config(problem, pass_, target, precision):
    from .config import default
    return default(problem, pass_, target, precision)


def _run(pass_, a, b, *rest, x_shape, w_shape, geometry):
    """One pass on its two tensors, under their device. Without images or pixels there is nothing to launch: the result is zero, or the bias."""
    stride, padding, dilation, groups, channels_last = geometry
    # the memory format belongs to the result: for wgrad that is dw
    problem = _problem(tuple(x_shape), tuple(w_shape), tuple(stride), tuple(padding), tuple(dilation), groups, a.dtype, channels_last)
    if problem.is_empty:
        out = _empty(a, {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_], channels_last).zero_()
        return out if not rest or rest[0] is None else out.add_(rest[0].view(1, -1, 1, 1))
    from . import launch
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        target = dispatch.target()                          # of this device, not of the one that was current
        precision = fp32_precision(target) if a.dtype == torch.float32 else "ieee"
        return getattr(launch, pass_)(problem, a, b, *rest, _config(problem, pass_, target, precision), precision)


def _empty(like, shape, channels_last):
    return torch.empty(shape, dtype=like.dtype, device=like.device,
                       memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _fprop(x, w, bias, *geometry):
    return _run("fprop", x, w, bias, x_shape=x.shape, w_shape=w.shape, geometry=geometry)


def _dgrad(dy, w, x_shape, *geometry):
    return _run("dgrad", dy, w, x_shape=x_shape, w_shape=w.shape, geometry=geometry)


def _wgrad(dy, x, w_shape, *geometry):
    return _run("wgrad", dy, x, x_shape=x.shape, w_shape=w_shape, geometry=geometry)


def _fake_fprop(x, w, bias, stride, padding, dilation, groups, channels_last):
    sizes = [(x.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return _empty(x, (x.shape[0], w.shape[0], *sizes), channels_last)


for _name, _impl, _fake in (("fprop", _fprop, _fake_fprop),
                            ("dgrad", _dgrad, lambda dy, w, x_shape, *geometry: _empty(dy, x_shape, geometry[-1])),
                            ("wgrad", _wgrad, lambda dy, x, w_shape, *geometry: _empty(x, w_shape, geometry[-1]))):
    lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tridil::{_name}", _fake, lib=lib)


class Fprop(torch.autograd.Function):
    """y of (x, w, bias); geometry is (stride, padding (h_lo, h_hi, w_lo, w_hi), dilation, groups), channels_last the format of y and dx."""

    @staticmethod
    def forward(x, w, bias, geometry, channels_last):
        return torch.ops.tridil.fprop(x, w, bias, *geometry, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _, ctx.geometry, ctx.channels_last = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = Dgrad.apply(dy, w, x.shape, ctx.geometry, ctx.channels_last) if ctx.needs_input_grad[0] else None
        dw = Wgrad.apply(dy, x, w.shape, ctx.geometry, is_channels_last(w.shape, w.stride())) if ctx.needs_input_grad[1] else None
        db = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


class Dgrad(torch.autograd.Function):
    """dx of (dy, w); channels_last is the format of dx."""

    @staticmethod
    def forward(dy, w, x_shape, geometry, channels_last):
        return torch.ops.tridil.dgrad(dy, w, x_shape, *geometry, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, w, _, ctx.geometry, ctx.channels_last = inputs
        ctx.save_for_backward(dy, w)

    @staticmethod
    def backward(ctx, ddx):
        dy, w = ctx.saved_tensors
        ddy = Fprop.apply(ddx, w, None, ctx.geometry, ctx.channels_last) if ctx.needs_input_grad[0] else None
        dw = Wgrad.apply(dy, ddx, w.shape, ctx.geometry, is_channels_last(w.shape, w.stride())) if ctx.needs_input_grad[1] else None
        return ddy, dw, None, None, None


class Wgrad(torch.autograd.Function):
    """dw of (dy, x); channels_last is the format of dw."""

    @staticmethod
    def forward(dy, x, w_shape, geometry, channels_last):
        return torch.ops.tridil.wgrad(dy, x, w_shape, *geometry, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, _, ctx.geometry, _ = inputs
        ctx.save_for_backward(dy, x)

    @staticmethod
    def backward(ctx, ddw):
        dy, x = ctx.saved_tensors
        ddy = Fprop.apply(x, ddw, None, ctx.geometry, is_channels_last(dy.shape, dy.stride())) if ctx.needs_input_grad[0] else None
        dx = Dgrad.apply(dy, ddw, x.shape, ctx.geometry, is_channels_last(x.shape, x.stride())) if ctx.needs_input_grad[1] else None
        return ddy, dx, None, None, None


def convolve(x, w, bias, problem: Problem) -> torch.Tensor:
    """y (N, K, P, Q) of 4D tensors that `problem` describes, differentiable twice, through the Triton kernels."""
    geometry = (problem.stride, (*problem.padding[0], *problem.padding[1]), problem.dilation, problem.groups)
    return Fprop.apply(x, w, bias, geometry, problem.layout == "nhwc")


def _register_flops():
    """The dense FLOPs that torch.utils.flop_counter gives F.conv2d."""
    from torch.utils import flop_counter

    def backward(dy, x_shape, w_shape, groups, mask):
        return flop_counter.conv_backward_flop(dy, x_shape, w_shape, None, None, None, None, False, None, groups, mask, out_val=(x_shape, w_shape))
    for packet, formula in ((torch.ops.tridil.fprop, lambda x, w, *rest, out_shape, **_: flop_counter.conv_flop_count(x, w, out_shape)),
                            (torch.ops.tridil.dgrad, lambda dy, w, x, *geometry, **_: backward(dy, x, w, geometry[3], (True, False, False))),
                            (torch.ops.tridil.wgrad, lambda dy, x, w, *geometry, **_: backward(dy, x, w, geometry[3], (False, True, False)))):
        flop_counter.register_flop_formula(packet)(formula)


class _AfterFlopCounter(MetaPathFinder):
    """Registers when somebody imports torch.utils.flop_counter: it imports Triton, which `import tridil` must leave to be configured."""

    def find_spec(self, name, path, target=None):
        if name != "torch.utils.flop_counter":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _register_flops())
        return spec


if "torch.utils.flop_counter" in sys.modules:
    _register_flops()
else:
    sys.meta_path.insert(0, _AfterFlopCounter())
