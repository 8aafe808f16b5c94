"""From a problem and an explicit config to kernel launches. `plan` needs no tensors, so ahead-of-time compilation shares it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd, prod

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config as cfg
from . import direct
from .dispatch import interpreted, target
from .kernels import common, depthwise, gather, tma
from .problem import DTYPE_BYTES, Axis, Problem

_interpreted = interpreted()                             # decided when the kernels are imported
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@dataclass(frozen=True)
class Box:
    """How a tensor descriptor sees a tensor: sizes and strides in elements, where it begins, and the sizes of its boxes."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    offset: int = 0

    def describe(self, t: torch.Tensor) -> TensorDescriptor:
        """The TensorDescriptor of t; Triton checks sizes and strides once, the base's alignment is `_nhwc`'s concern."""
        base = torch.as_strided(t, self.shape, self.strides, t.storage_offset() + self.offset) if self.offset else t
        fields = self.__dict__.get("_fields")
        if fields is None:
            first = TensorDescriptor(base, list(self.shape), list(self.strides), list(self.block))
            self.__dict__["_fields"] = {name: value for name, value in vars(first).items() if name != "base"}       # at once: other threads read it
            return first
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__.update(fields, base=base)
        return descriptor


@dataclass(frozen=True)
class Launch:
    """One kernel launch but for its tensors.

    tensors: (argument, role, Box or None for a pointer), roles being "a" and "b" (the pass's operands), "bias", "out" and "partials" (fp32, or fp64
    for fp64; `workspace` elements). options are num_warps and the like.
    """
    kernel: str
    grid: tuple[int, int, int]
    tensors: tuple[tuple[str, str, Box | None], ...]
    scalars: tuple[tuple[str, int], ...]
    constexprs: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]
    workspace: int = 0

    @cached_property
    def fn(self):
        return next(getattr(module, self.kernel) for module in (gather, tma, depthwise, common) if hasattr(module, self.kernel))

    @cached_property
    def _signature(self) -> tuple[list, list]:
        """All arguments in their order, None for tensors; (index, role, Box or None) of tensors."""
        values = dict(self.scalars) | _constexprs(self.constexprs)
        return [values.get(name) for name in self.fn.arg_names], [(self.fn.arg_names.index(name), role, box) for name, role, box in self.tensors]

    @cached_property
    def _kernels(self) -> dict:
        """(device, which pointers are 16-byte aligned) -> the kernel that Triton's JIT compiled: what it specialises on beyond this launch."""
        return {}

    def arguments(self, tensors: dict) -> list:
        """The kernel's arguments, in order."""
        values, places = self._signature
        values = values.copy()
        for i, role, box in places:
            values[i] = tensors[role] if box is None else box.describe(tensors[role])
        return values

    def __call__(self, tensors: dict):
        """Launch on the current device and stream: through the JIT once, afterwards through its compiled kernel, which binds no arguments."""
        arguments, aligned = self.arguments(tensors), 0
        for i, _, box in self._signature[1]:
            aligned += aligned + (box is None and arguments[i].data_ptr() & 15 == 0)
        key = device(), aligned
        kernel = self._kernels.get(key)
        if kernel is not None:
            kernel[self.grid](*arguments)
        else:
            kernel = self.fn[self.grid](*arguments, **dict(self.options))
            if isinstance(kernel, CompiledKernel):              # neither interpreted nor compiled in the background
                self._kernels[key] = kernel


def device():
    """The device of Triton's active driver that is current; None in the interpreter."""
    return None if _interpreted else driver.active.get_current_device()


@lru_cache(maxsize=4096)
def _constexprs(items) -> dict:
    import triton.language as tl
    return {k: {"float32": tl.float32, "float64": tl.float64}[v] if k == "ACC" else v for k, v in items}


def plan(problem: Problem, pass_: str, config: dict, precision: str = "ieee", has_bias: bool = False) -> list[Launch]:
    """The launches of one pass, whose result has problem.layout. precision: "ieee" or "tf32".

    With SPLIT_K > 1 a launch writes fp32 partial results (SPLIT_K, N, P, Q, K) or (SPLIT_K, K, R, S, C) and the next one sums them.
    """
    return list(_plan(problem, pass_, tuple(config.items()), precision, has_bias))


@lru_cache(maxsize=4096)
def _plan(problem, pass_, config, precision, has_bias):
    config = dict(config)
    if problem.dtype == "bfloat16" and interpreted():
        precision = "upcast"
    constexprs = {"PRECISION": precision} | {name: value for name, value in config.items() if name.isupper() and name != "SPLIT_K"}
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if config[name] is not None}
    if config["kernel"] == "depthwise":
        return tuple(_depthwise_plan(problem, pass_, config, options, has_bias))
    if config["kernel"] != "tma":
        flat = config["kernel"] == "gather_flat"
        constexprs |= {"ACC": "float64" if problem.dtype == "float64" else "float32", "PIXELS": cfg.pixels(config),
                       # flat offsets are relative to the first live tap's pixel, which may lie before the tensor
                       "INT64": _elements(problem) >= (2**30 if flat else 2**31)}
    if pass_ == "wgrad":
        return _wgrad_plan(problem, config, constexprs, options)
    return tuple(launch for h, w in problem.axes(pass_)
                 for launch in _correlation_plan(problem, pass_, h, w, config, constexprs, options, has_bias))


def _elements(problem: Problem) -> int:
    return max(map(prod, (problem.x_shape, problem.w_shape, problem.y_shape)))


def _correlation_plan(p: Problem, pass_, h: Axis, w: Axis, config, constexprs, options, has_bias):
    """fprop, or one residue class of dgrad; axes h, w."""
    c, k, split = p.c // p.groups, p.k // p.groups, config["SPLIT_K"]
    source, out = (c, k) if pass_ == "fprop" else (k, c)
    vector = 16 // DTYPE_BYTES[p.dtype]
    # strides of the result, and of its pixels that this correlation writes
    s_n, s_k, s_p, s_q = _strides(p.y_shape if pass_ == "fprop" else p.x_shape, p.layout)
    y0 = h.out0 * s_p + w.out0 * s_q
    strides = dict(sy_n=s_n, sy_p=s_p * h.out_step, sy_q=s_q * w.out_step, sy_k=s_k, y0=y0)
    if split > 1:
        total = p.n * h.out * w.out * out * p.groups
        n_, k_, p_, q_ = _strides((p.n, out * p.groups, h.out, w.out), "nhwc")
        scalars = dict(sy_n=n_, sy_p=p_, sy_q=q_, sy_k=k_, y0=0)
    else:
        total, scalars = 0, dict(strides)
    align_y = gcd(out, vector) if split > 1 or p.layout == "nhwc" else 1
    constexprs = dict(constexprs, TRANSPOSED=pass_ == "dgrad", HAS_BIAS=has_bias and split == 1, IS_SPLIT=split > 1, ALIGN_Y=align_y)
    result = "partials" if split > 1 else "out"
    programs = cfg.tiles(p, pass_, config, (h, w))
    scalars |= dict(SPLIT_K=split, sy_split=total, N=p.n, P=h.out, Q=w.out, K=out, G=p.groups)
    scalars |= dict(tap_r=h.tap0, tap_s=w.tap0, step_r=h.tap_step, step_s=w.tap_step)
    if config["kernel"] == "tma":
        x, h, w = _source_box(p.n, source * p.groups, h, w, config, config["BLOCK_K"])
        store = cfg.stores_boxes(config, p, pass_)
        sizes, steps = (split, p.n, h.out, w.out, out * p.groups), [scalars[name] for name in ("sy_n", "sy_p", "sy_q")]
        y = Box(sizes, (prod(sizes[1:]), *steps, 1), (1, *_block(config, config["BLOCK_N"])), scalars["y0"])
        ragged = pass_ == "fprop" and c % config["BLOCK_K"] != 0
        taps, tile = p.r * p.s, (config["BLOCK_N"], config["BLOCK_K"]) if pass_ == "fprop" else (config["BLOCK_K"], config["BLOCK_N"])
        weights = Box((p.k, taps, c), (taps * c, c, 1), (tile[0], 1, tile[1])) if ragged else Box((p.k, taps * c), (taps * c, 1), tile)
        tensors = (("x", "a", x), ("w", "b", weights), ("bias_ptr", "bias", None), ("y", result, y if store else None))
        scalars |= dict(C=source, CW=c, R=h.taps, S=w.taps, FILTER_S=p.s, **_steps(h, w))
        constexprs |= dict(TMA_STORE=store, INT64=not store and _elements(p) >= 2**31, RAGGED=ragged)
        first = _launch("correlate_tma", programs, tensors, scalars, constexprs, options, split * total)
    else:
        tensors = (("x_ptr", "a", None), ("w_ptr", "b", None), ("bias_ptr", "bias", None), ("y_ptr", result, None))
        scalars |= dict(stride_h=h.stride, stride_w=w.stride, **_steps(h, w))
        constexprs |= dict(C=source, CW=c, R=h.taps, S=w.taps, FILTER_R=p.r, FILTER_S=p.s, ALIGN=gcd(source, vector), ALIGN_W=gcd(c, vector))
        flat = config["kernel"] == "gather_flat"
        if not flat:
            constexprs["EVEN_N"] = out % config["BLOCK_N"] == 0
        first = _launch("correlate_flat" if flat else "correlate", programs, tensors, scalars, constexprs, options, split * total)
    if split == 1:
        return [first]
    return [first, _sum(split, total, strides, dict(P=h.out, Q=w.out, K=out * p.groups), has_bias)]


def _wgrad_plan(p: Problem, config, constexprs, options):
    c, k, split = p.c // p.groups, p.k // p.groups, config["SPLIT_K"]
    h, w = p.fprop_axes
    vector, total = 16 // DTYPE_BYTES[p.dtype], prod(p.w_shape)
    s_k, s_c, s_r, s_s = _strides(p.w_shape, p.layout)
    programs = cfg.tiles(p, "wgrad", config, (h, w))
    scalars = dict(SPLIT_K=split, N=p.n, P=h.out, Q=w.out, K=k, G=p.groups)
    if config["kernel"] == "tma":
        split_up = split > 1 or p.layout != "nhwc"              # the descriptor stores channels last
        x, h, w = _source_box(p.n, p.c, h, w, config, config["BLOCK_N"])
        dy = Box((p.n, h.out, w.out, p.k), _strides_nhwc(h.out, w.out, p.k), _block(config, config["BLOCK_M"]))
        dw = Box((split, p.k, p.r * p.s, c), (total, p.r * p.s * c, c, 1), (1, config["BLOCK_M"], 1, config["BLOCK_N"]))
        tensors = (("x", "b", x), ("dy", "a", dy), ("dw", "partials" if split_up else "out", dw))
        scalars |= dict(H=h.size, W=w.size, C=c, R=p.r, S=p.s, off_h=h.offset, off_w=w.offset, dil_h=h.dilation, dil_w=w.dilation)
        first = _launch("wgrad_tma", programs, tensors, scalars, constexprs, options, split * total * split_up)
    else:
        split_up = split > 1
        to = (p.r * p.s * c, 1, p.s * c, c) if split_up else (s_k, s_c, s_r, s_s)
        tensors = (("x_ptr", "b", None), ("dy_ptr", "a", None), ("dw_ptr", "partials" if split_up else "out", None))
        scalars |= dict(stride_h=h.stride, stride_w=w.stride, **_steps(h, w), sw_split=total, **dict(zip(("sw_k", "sw_c", "sw_r", "sw_s"), to)))
        flat = config["kernel"] == "gather_flat"
        scalars["C"] = c
        constexprs |= dict(R=p.r, S=p.s, FLAT=flat, ALIGN_C=gcd(c, vector), ALIGN_K=gcd(k, vector),
                           ALIGN_W=gcd(c, vector) if to[1] == 1 and not flat else 1)      # where channels are contiguous, taps are multiples of them
        first = _launch("wgrad", programs, tensors, scalars, constexprs, options, split * total * split_up)
    if not split_up:
        return (first,)
    return first, _sum(split, total, dict(sy_n=s_k, sy_p=s_r, sy_q=s_s, sy_k=s_c, y0=0), dict(P=p.r, Q=p.s, K=c), False)


def _depthwise_plan(p: Problem, pass_, config, options, has_bias):
    """Launches of the direct kernels; x, dy and the result are all in p.layout."""
    mult, vector, nhwc = p.k // p.c, 16 // DTYPE_BYTES[p.dtype], p.layout == "nhwc"
    blocks = {name: config[name] for name in config if name.isupper() and name != "SPLIT_K"}
    align = gcd(p.c, vector, config["BLOCK_N"]) if nhwc and mult == 1 else 1
    constexprs = dict(blocks, PIXELS=cfg.pixels(config), MULT=mult, CHANNELS_LAST=nhwc, ALIGN=align,
                      ACC="float64" if p.dtype == "float64" else "float32", INT64=_elements(p) >= 2**31)
    shapes = (p.y_shape, p.x_shape) if pass_ == "dgrad" else (p.x_shape, p.y_shape)
    (x_n, x_k, x_h, x_w), (y_n, y_k, y_p, y_q) = (_strides(shape, p.layout) for shape in shapes)
    for h, w in p.axes(pass_):
        scalars = dict(N=p.n, P=h.out, Q=w.out, K=shapes[1][1], R=h.taps, stride_h=h.stride, stride_w=w.stride, **_steps(h, w),
                       grid_w=direct.grid_step(w), sx_n=x_n // align, sx_h=x_h // align, sx_w=x_w // align, sx_k=x_k)
        sizes = dict(constexprs, S=w.taps, SHIFT=w.stride // gcd(w.stride, w.dilation))
        programs = cfg.tiles(p, pass_, config, (h, w))
        if pass_ == "wgrad":
            splits, total = config["SPLIT_K"], prod(p.w_shape)
            scalars |= dict(sy_n=y_n // align, sy_p=y_p // align, sy_q=y_q // align, sy_k=y_k, splits=splits)
            tensors = (("x_ptr", "b", None), ("dy_ptr", "a", None), ("part_ptr", "partials", None))
            yield _launch("wgrad_depthwise", programs, tensors, scalars, sizes, options, splits * total)
            yield _launch("sum_partials", -(-total // 32), (("part_ptr", "partials", None), ("dw_ptr", "out", None)),
                          dict(K=p.k, total=total, splits=splits), dict(TAPS=p.r * p.s, BLOCK=32, BLOCK_Z=32), {})
        else:
            fill_h, fill_w = pass_ == "dgrad" and direct.fill(p) or (1, 1)
            scalars |= dict(size_h=shapes[1][2], size_w=shapes[1][3], step_p=h.out_step, step_q=w.out_step)
            sizes |= dict(FILL_H=fill_h, FILL_W=fill_w)
            scalars |= dict(grid_h=direct.grid_step(h), tap_r=h.tap0, tap_s=w.tap0, step_r=h.tap_step, sy_n=y_n // align,
                            sy_p=y_p // align, sy_q=y_q // align, sy_k=y_k, y0=(h.out0 * y_p + w.out0 * y_q) // align)
            sizes |= dict(STEP_S=w.tap_step, FILTER_R=p.r, FILTER_S=p.s, TRANSPOSED=pass_ == "dgrad", HAS_BIAS=has_bias)
            tensors = (("x_ptr", "a", None), ("w_ptr", "b", None), ("bias_ptr", "bias", None), ("y_ptr", "out", None))
            yield _launch("correlate_depthwise", programs, tensors, scalars, sizes, options)


def _sum(split, total, strides, sizes, has_bias) -> Launch:
    tensors = (("part_ptr", "partials", None), ("bias_ptr", "bias", None), ("y_ptr", "out", None))
    scalars = dict(total=total, SPLIT_K=split, **sizes, **strides)
    return _launch("sum_splits", -(-total // 256), tensors, scalars, dict(HAS_BIAS=has_bias, BLOCK=256), {})


def _steps(h: Axis, w: Axis) -> dict:
    return dict(H=h.size, W=w.size, off_h=h.offset, off_w=w.offset, dil_h=h.dilation, dil_w=w.dilation)


def _source_box(n: int, channels: int, h: Axis, w: Axis, config, block: int) -> tuple[Box, Axis, Axis]:
    """The descriptor of the source of a correlation (NHWC), strided axes seen as views of stride 1, and the axes of that view."""
    (h_view, h0, h_step), (w_view, w0, w_step) = h.subsampled, w.subsampled
    s_n, s_h, s_w, _ = _strides_nhwc(h.size, w.size, channels)
    strides = (s_n, s_h * h_step, s_w * w_step, 1)
    return Box((n, h_view.size, w_view.size, channels), strides, _block(config, block), h0 * s_h + w0 * s_w), h_view, w_view


def _block(config, channels: int) -> tuple[int, ...]:
    return config["BLOCK_IMG"], config["BLOCK_P"], config["BLOCK_Q"], channels


def _strides_nhwc(h: int, w: int, c: int) -> tuple[int, ...]:
    return h * w * c, w * c, c, 1


def _strides(shape, layout: str) -> tuple[int, int, int, int]:
    """Strides, in PyTorch's order (N, C, H, W), of a tensor of that order's shape in memory format `layout`."""
    n, c, h, w = shape
    return (h * w * c, 1, w * c, c) if layout == "nhwc" else (c * h * w, h * w, w, 1)


def _launch(kernel, programs, tensors, scalars, constexprs, options, workspace=0) -> Launch:
    return Launch(kernel, (programs, 1, 1), tensors, tuple(scalars.items()), tuple(constexprs.items()), tuple(options.items()), workspace)


def _nhwc(t: torch.Tensor, aligned: bool) -> torch.Tensor:
    """Dense NHWC (KRSC) memory: channels_last tensors themselves, copies of others, and of those whose base descriptors cannot take."""
    if not t.is_contiguous(memory_format=torch.channels_last):
        t = t.detach().contiguous(memory_format=torch.channels_last)
    return t.detach().clone(memory_format=torch.channels_last) if aligned and t.data_ptr() % 16 else t


def fprop(problem: Problem, x, w, bias, config: dict, precision: str = "ieee") -> torch.Tensor:
    """y (N, K, P, Q) of x (N, C, H, W), w (K, C/G, R, S) and bias (K,) or None, in problem.layout. Raises ValueError when config does not fit."""
    return prepare(problem, "fprop", config, precision, bias is not None)(x, w, bias)


def dgrad(problem: Problem, dy, w, config: dict, precision: str = "ieee") -> torch.Tensor:
    """dx (N, C, H, W) of dy (N, K, P, Q) and w (K, C/G, R, S), in problem.layout. Raises ValueError when config does not fit."""
    return prepare(problem, "dgrad", config, precision)(dy, w)


def wgrad(problem: Problem, dy, x, config: dict, precision: str = "ieee") -> torch.Tensor:
    """dw (K, C/G, R, S) of dy (N, K, P, Q) and x (N, C, H, W), in problem.layout. Raises ValueError when config does not fit."""
    return prepare(problem, "wgrad", config, precision)(dy, x)


def prepare(problem: Problem, pass_: str, config: dict, precision: str = "ieee", has_bias: bool = False) -> Callable[..., torch.Tensor]:
    """run(a, b, bias=None), which allocates and launches one pass on the current device. Raises ValueError when config does not fit the target."""
    return _prepare(problem, pass_, tuple(config.items()), tuple(map(type, config.values())), precision, has_bias, target())


@lru_cache(maxsize=4096)
def _prepare(problem, pass_, config, types, precision, has_bias, target):          # types: 1 == True == 1.0 as keys
    config = dict(config)
    reason = cfg.fits(config, problem, pass_, target)
    if reason:
        raise ValueError(f"config {config} does not fit {pass_} of {problem.key()}: {reason}")
    launches = plan(problem, pass_, config, precision, has_bias)
    shape = {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[pass_]
    memory_format, kernel = FORMATS[problem.layout], config["kernel"]
    covers = pass_ != "dgrad" or problem.dgrad_covers or kernel == "depthwise" and direct.fill(problem)
    workspace = max((launch.workspace for launch in launches), default=0)
    partials = torch.float64 if problem.dtype == "float64" else torch.float32

    def operand(t):
        """Direct kernels read either format, in the result's they read and write neighbours alike; the others read NHWC."""
        return t.detach().contiguous(memory_format=memory_format) if kernel == "depthwise" else _nhwc(t, kernel == "tma")

    def run(a, b, bias=None):
        out = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format)
        if not covers:
            out.zero_()
        a, b = operand(a), operand(b)
        tensors = {"a": a, "b": b, "bias": b if bias is None else bias.contiguous(), "out": out}
        if workspace:
            tensors["partials"] = torch.empty(workspace, dtype=partials, device=a.device)
        for launch in launches:
            launch(tensors)
        return out
    return run
