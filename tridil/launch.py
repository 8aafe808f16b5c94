"""From a problem and an explicit config to kernel launches. `plan` needs no tensors, so ahead-of-time compilation shares it."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import torch

from . import config as cfg
from .dispatch import interpreted, target
from .kernels import gather
from .problem import DTYPE_BYTES, Axis, Problem

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Launch:
    """One kernel launch but for its pointers; options are num_warps and the like."""
    kernel: str
    grid: tuple[int]
    scalars: tuple[tuple[str, int], ...]
    constexprs: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def fn(self):
        return getattr(gather, self.kernel)

    def __call__(self, *pointers):
        self.fn[self.grid](*pointers, **dict(self.scalars), **_constexprs(self.constexprs), **dict(self.options))


@lru_cache(maxsize=4096)
def _constexprs(items) -> dict:
    import triton.language as tl
    return {k: {"float32": tl.float32, "float64": tl.float64}[v] if k == "ACC" else v for k, v in items}


def plan(problem: Problem, pass_: str, config: dict, out_stride: tuple[int, int, int, int], precision: str = "ieee",
         has_bias: bool = False) -> list[Launch]:
    """The launches of one pass. out_stride: the result's strides in PyTorch's order (dw: (k, c, r, s)); precision: "ieee" or "tf32".

    With SPLIT_K > 1, wgrad's first launch writes fp32 partials (SPLIT_K, K, R, S, C) and the second sums them.
    """
    return list(_plan(problem, pass_, tuple(config.items()), tuple(out_stride), precision, has_bias))


@lru_cache(maxsize=4096)
def _plan(problem, pass_, config, out_stride, precision, has_bias):
    p, config = problem, dict(config)
    c, k = p.c // p.groups, p.k // p.groups
    acc = "float64" if p.dtype == "float64" else "float32"
    flat = config["kernel"] == "gather_flat"
    if p.dtype == "bfloat16" and interpreted():
        precision = "upcast"
    common = {"PRECISION": precision, "ACC": acc, "CLAMP": config["CLAMP"],
              # flat offsets are relative to the first live tap's pixel, which may lie before the tensor
              "INT64": max(map(prod, (p.x_shape, p.w_shape, p.y_shape))) >= (2**30 if flat else 2**31)}
    common |= {name: value for name, value in config.items() if name.startswith("BLOCK_")}
    vector = 16 // DTYPE_BYTES[p.dtype]
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if config[name] is not None}
    if pass_ == "wgrad":
        h, w = p.fprop_axes
        split = config["SPLIT_K"]
        strides = dict(zip(("sw_k", "sw_c", "sw_r", "sw_s"), out_stride))
        partial = {"sw_k": p.r * p.s * c, "sw_c": 1, "sw_r": p.s * c, "sw_s": c}
        scalars = dict(N=p.n, H=h.size, W=w.size, P=h.out, Q=w.out, K=k, G=p.groups, **_geometry(h, w), sw_split=prod(p.w_shape),
                       **(partial if split > 1 else strides))
        constexprs = dict(common, C=c, R=p.r, S=p.s, FLAT=flat, ALIGN_C=gcd(c, vector), ALIGN_K=gcd(k, vector), SPLIT_K=split)
        launches = [_launch("wgrad", cfg.tiles(p, pass_, config, (h, w)), scalars, constexprs, options)]
        if split > 1:
            total = prod(p.w_shape)
            launches.append(_launch("sum_splits", -(-total // 256), dict(R=p.r, S=p.s, C=c, total=total, **strides),
                                  dict(SPLIT_K=split, BLOCK=256), {}))
        return tuple(launches)
    source, out = (c, k) if pass_ == "fprop" else (k, c)
    launches = []
    for h, w in cfg.passes_axes(p, pass_):
        scalars = dict(N=p.n, H=h.size, W=w.size, P=h.out, Q=w.out, K=out, G=p.groups, **_geometry(h, w), tap_r=h.tap0, tap_s=w.tap0,
                       step_r=h.tap_step, step_s=w.tap_step, sy_n=out_stride[0], sy_p=out_stride[2] * h.out_step,
                       sy_q=out_stride[3] * w.out_step, sy_k=out_stride[1], y0=h.out0 * out_stride[2] + w.out0 * out_stride[3])
        constexprs = dict(common, C=source, CW=c, R=h.taps, S=w.taps, FILTER_R=p.r, FILTER_S=p.s, TRANSPOSED=pass_ == "dgrad",
                          HAS_BIAS=has_bias, ALIGN=gcd(source, vector), ALIGN_W=gcd(c, vector),
                          ALIGN_Y=gcd(out, vector) if out_stride[1] == 1 else 1)
        launches.append(_launch("correlate_flat" if flat else "correlate", cfg.tiles(p, pass_, config, (h, w)), scalars, constexprs, options))
    return tuple(launches)


def _geometry(h: Axis, w: Axis) -> dict:
    return dict(stride_h=h.stride, stride_w=w.stride, off_h=h.offset, off_w=w.offset, dil_h=h.dilation, dil_w=w.dilation)


def _launch(kernel, programs, scalars, constexprs, options) -> Launch:
    return Launch(kernel, (programs,), tuple(scalars.items()), tuple(constexprs.items()), tuple(options.items()))


def _nhwc(t: torch.Tensor) -> torch.Tensor:
    """Dense NHWC (KRSC) memory: a view of channels_last tensors, a copy of others."""
    return t.detach().contiguous(memory_format=torch.channels_last)


def fprop(problem: Problem, x, w, bias, config: dict, precision: str = "ieee") -> torch.Tensor:
    """y (N, K, P, Q) of x (N, C, H, W), w (K, C/G, R, S) and bias (K,) or None, in problem.layout. Raises ValueError when config does not fit."""
    _check(problem, "fprop", config)
    y = torch.empty(problem.y_shape, dtype=x.dtype, device=x.device, memory_format=FORMATS[problem.layout])
    x, w = _nhwc(x), _nhwc(w)
    for launch in plan(problem, "fprop", config, y.stride(), precision, bias is not None):
        launch(x, w, w if bias is None else bias.contiguous(), y)
    return y


def dgrad(problem: Problem, dy, w, config: dict, precision: str = "ieee") -> torch.Tensor:
    """dx (N, C, H, W) of dy (N, K, P, Q) and w (K, C/G, R, S), in problem.layout. Raises ValueError when config does not fit."""
    _check(problem, "dgrad", config)
    dx = torch.empty(problem.x_shape, dtype=dy.dtype, device=dy.device, memory_format=FORMATS[problem.layout])
    if not problem.dgrad_covers:
        dx.zero_()
    dy, w = _nhwc(dy), _nhwc(w)
    for launch in plan(problem, "dgrad", config, dx.stride(), precision):
        launch(dy, w, w, dx)
    return dx


def wgrad(problem: Problem, dy, x, config: dict, precision: str = "ieee") -> torch.Tensor:
    """dw (K, C/G, R, S) of dy (N, K, P, Q) and x (N, C, H, W), in problem.layout. Raises ValueError when config does not fit."""
    _check(problem, "wgrad", config)
    dw = torch.empty(problem.w_shape, dtype=x.dtype, device=x.device, memory_format=FORMATS[problem.layout])
    dy, x = _nhwc(dy), _nhwc(x)
    first, *second = plan(problem, "wgrad", config, dw.stride(), precision)
    if not second:
        first(x, dy, dw)
        return dw
    partials = torch.empty(config["SPLIT_K"], dw.numel(), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    first(x, dy, partials)
    second[0](partials, dw)
    return dw


def _check(problem, pass_, config):
    reason = _fits(problem, pass_, tuple(config.items()), tuple(map(type, config.values())), target())
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {problem.key()}: {reason}")


@lru_cache(maxsize=4096)
def _fits(problem, pass_, config, types, target):          # types: 1 == True == 1.0 as keys
    return cfg.fits(dict(config), problem, pass_, target)
