"""The domain model: one 2D convolution as numbers. Imports nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

PASSES = ("fprop", "dgrad", "wgrad")
# of the two operands and the result of a pass
ROLES = {"fprop": "xwy", "dgrad": "ywx", "wgrad": "yxw"}
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a pass as a 1D correlation.

    ``out[i] = sum over t < taps of src[i*stride + offset + t*dilation] * filter[tap0 +
    t*tap_step]``, where `src` has `size` positions and is zero outside; the result is stored at
    position ``out0 + i*out_step``, for i < out.
    """

    size: int
    out: int
    stride: int
    offset: int
    dilation: int
    taps: int
    tap0: int = 0
    tap_step: int = 1
    out0: int = 0
    out_step: int = 1

    def live(self, i0: int, i1: int) -> tuple[int, int]:
        """Half-open range of taps that touch the image for some output i0..i1 (inclusive)."""
        lo = max(0, -((self.offset + i1 * self.stride) // self.dilation))
        hi = min(self.taps, -((self.offset + i0 * self.stride - self.size) // self.dilation))
        return (lo, hi) if lo < hi else (0, 0)

    def live_out(self, t: int) -> tuple[int, int]:
        """Half-open range of outputs for which tap t touches the image."""
        shift = self.offset + t * self.dilation
        lo = max(0, -(shift // self.stride))
        hi = min(self.out, -((shift - self.size) // self.stride))
        return (lo, hi) if lo < hi else (0, 0)

    def live_out_any(self, t0: int, t1: int) -> int:
        """Length of the range that a reduction over taps t0..t1 (inclusive) walks: larger taps
        begin and end earlier."""
        return max(self.live_outputs(t0)[1] - self.live_outputs(t1)[0], 0)

    def live_outputs(self, t: int) -> tuple[int, int]:
        """`live_out` as the kernels compute it: an empty range keeps its place."""
        shift = self.offset + t * self.dilation
        lo = min(max(0, -(shift // self.stride)), self.out)
        return lo, max(lo, min(self.out, -((shift - self.size) // self.stride)))

    @cached_property
    def subsampled(self) -> tuple[Axis, int, int] | None:
        """(axis of stride 1, first, step): the same correlation of the view ``src[first::step]``;
        None where the taps of an output lie in several such views, or in none of them."""
        first = self.offset % self.stride
        if self.dilation % self.stride and self.taps > 1 or first >= self.size:
            return None
        return (
            replace(
                self,
                size=-(-(self.size - first) // self.stride),
                stride=1,
                offset=self.offset // self.stride,
                dilation=max(self.dilation // self.stride, 1),
            ),
            first,
            self.stride,
        )

    @cached_property
    def useful(self) -> int:
        """Number of (output, tap) pairs that read the image."""
        return sum(hi - lo for lo, hi in map(self.live_out, range(self.taps)))

    @cached_property
    def _spans(self) -> np.ndarray:
        """(2, taps): a block of outputs reads the image through a tap when it ends at or after the
        first and begins at or before the last. Without taps that read padding only; both fall from
        tap to tap."""
        shifts = (self.offset + t * self.dilation for t in range(self.taps))
        spans = (
            (
                max(0, -(shift // self.stride)),
                min(self.out - 1, (self.size - 1 - shift) // self.stride),
            )
            for shift in shifts
        )
        return (
            np.array(
                [(first, last) for first, last in spans if first < self.out and last >= 0], np.int64
            )
            .reshape(-1, 2)
            .T
        )

    def steps(self, sizes: ArrayLike) -> np.ndarray:
        """For each of `sizes`: over blocks of so many outputs the sum of the number of taps that
        are live for the block, which is what tiles walk."""
        first, last = self._spans[..., None] // np.asarray(sizes)
        return np.maximum(last - first + 1, 0).sum(0)

    def live_blocks(self, sizes: ArrayLike) -> np.ndarray:
        """(taps, sizes): number of blocks of so many outputs for which at least 1, 2, ... taps are
        live. Their sum is `steps`."""
        first, end = self._spans[..., None] // np.asarray(sizes)
        end, taps = end + 1, len(first)
        # blocks of taps t .. t + c all live begin with those of t and end with those of t + c:
        # without what t - 1 counts already
        before = np.concatenate([end[:1], first[:-1]])
        return np.array(
            [
                np.maximum(np.minimum(end[c:], before[: taps - c]) - first[: taps - c], 0).sum(0)
                for c in range(taps)
            ],
            np.int64,
        ).reshape(taps, *np.shape(sizes))

    def steps_out(self, sizes: ArrayLike) -> np.ndarray:
        """(taps, sizes): number of blocks of so many of the tap's live outputs: what a reduction
        over outputs walks (wgrad)."""
        lengths = np.array([hi - lo for lo, hi in map(self.live_out, range(self.taps))], np.int64)
        return -(-lengths[:, None] // np.asarray(sizes))

    @cached_property
    def walks(self) -> np.ndarray:
        """(2, sizes): `steps` of blocks of 0, 1, 2, ... outputs, and those of the longest block; up
        to 1024, or to where one block holds all outputs and nothing changes any more."""
        live = self.live_blocks(self._sizes)
        return np.array([live.sum(0), (live > 0).sum(0)])

    @cached_property
    def walks_out(self) -> np.ndarray:
        """(taps, sizes): `steps_out` of the same blocks."""
        return self.steps_out(self._sizes)

    @property
    def _sizes(self) -> np.ndarray:
        sizes = np.arange(min(self.out, 1024) + 1)
        sizes[0] = 1
        return sizes


@dataclass(frozen=True)
class Problem:
    """One convolution: input (n, c, h, w), filters (k, c/groups, r, s), padding ((h_lo, h_hi),
    (w_lo, w_hi)).

    dtype is the name of the tensors' dtype; layout ("nchw" or "nhwc") is the memory format of the
    result, and of x and dy but where `operands` says another for wgrad. Raises ValueError for every
    combination that has no output. 1-tap axes are normalised to dilation 1.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "float16"
    layout: str = "nhwc"
    operands: str = ""

    def __post_init__(self) -> None:
        if min(self.stride) < 1:
            raise ValueError(f"stride must be positive, got {self.stride}")
        if min(self.dilation) < 1:
            raise ValueError(f"dilation must be positive, got {self.dilation}")
        if min(map(min, self.padding)) < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")
        if self.groups < 1:
            raise ValueError(f"groups must be positive, got {self.groups}")
        if self.k < self.groups or self.k % self.groups:
            raise ValueError(
                f"the number of output channels (={self.k}) must be a positive multiple of groups (={self.groups})"
            )
        if self.c % self.groups:
            raise ValueError(
                f"the number of input channels (={self.c}) must be divisible by groups (={self.groups})"
            )
        if self.r < 1 or self.s < 1:
            raise ValueError(f"the filter must not be empty, got {self.r}x{self.s}")
        # min() of symbolic sizes adds guards
        if any(size < 0 for size in (self.n, self.c, self.h, self.w)):
            raise ValueError(
                f"sizes must not be negative, got n={self.n}, c={self.c}, h={self.h}, w={self.w}"
            )
        object.__setattr__(
            self,
            "dilation",
            (self.dilation[0] if self.r > 1 else 1, self.dilation[1] if self.s > 1 else 1),
        )
        for size, taps, (lo, hi), dil, name in zip(
            (self.h, self.w), (self.r, self.s), self.padding, self.dilation, ("height", "width")
        ):
            if size + lo + hi < dil * (taps - 1) + 1:
                raise ValueError(
                    f"the filter's {name} extent {dil * (taps - 1) + 1} (={taps} taps at dilation {dil}) is larger than the "
                    f"padded input's {name} {size + lo + hi} (={lo}+{size}+{hi}): pad more or dilate less"
                )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    # hashes of strings differ between processes
    def __reduce__(self) -> tuple[type[Problem], tuple[Any, ...]]:
        return Problem, astuple(self)

    @property
    def operand_layout(self) -> str:
        """The memory format of x and dy."""
        return self.operands or self.layout

    # ---- shapes
    def out_size(self, axis: int) -> int:
        """Outputs along h (0) or w (1)."""
        size, taps = ((self.h, self.r), (self.w, self.s))[axis]
        extent = self.dilation[axis] * (taps - 1) + 1
        return (size + sum(self.padding[axis]) - extent) // self.stride[axis] + 1

    @cached_property
    def p(self) -> int:
        """Output height."""
        return self.out_size(0)

    @cached_property
    def q(self) -> int:
        """Output width."""
        return self.out_size(1)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return (self.k, self.c // self.groups, self.r, self.s)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return (self.n, self.k, self.p, self.q)

    def axes(self, pass_: str) -> list[tuple[Axis, Axis]]:
        """The (h, w) correlations that a pass launches: one, or one per pair of residue classes of
        a strided dgrad."""
        if pass_ == "dgrad":
            hs, ws = self.dgrad_axes
            return [(h, w) for h in hs for w in ws]
        return [self.fprop_axes]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to multiply: no images, channels or pixels."""
        return not (self.n and self.c and self.h and self.w)

    @property
    def is_symbolic(self) -> bool:
        """Whether a tracer's symbols stand for sizes: they have no hash."""
        return any(type(size) is not int for size in (*self.x_shape, *self.w_shape))

    def gemm_shape(self, pass_: str) -> tuple[int, int, int]:
        """(M, N, K) of one group's implicit GEMM, zero padding included, for stride 1."""
        c, k, taps = self.c // self.groups, self.k // self.groups, self.r * self.s
        return {
            "fprop": (self.n * self.p * self.q, k, taps * c),
            "dgrad": (self.n * self.h * self.w, c, taps * k),
            "wgrad": (k, taps * c, self.n * self.p * self.q),
        }[pass_]

    # ---- geometry
    @cached_property
    def fprop_axes(self) -> tuple[Axis, Axis]:
        """The correlation that fprop runs along h and w; wgrad reduces over the same one."""
        h, w = (
            Axis(size, out, st, -lo, dil, taps)
            for size, out, st, (lo, _), dil, taps in zip(
                (self.h, self.w),
                (self.p, self.q),
                self.stride,
                self.padding,
                self.dilation,
                (self.r, self.s),
            )
        )
        return h, w

    @cached_property
    def dgrad_axes(self) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """Residue classes of dx along h and w that any tap reaches: dgrad is one stride-1
        correlation of dy per pair of them.

        With g = gcd(stride, dilation), the taps of a class are ``r0 + t*stride/g`` and its dilation
        is ``dilation/g``.
        """
        hs, ws = (
            tuple(_residue_classes(size, out, st, lo, dil, taps))
            for size, out, st, (lo, _), dil, taps in zip(
                (self.h, self.w),
                (self.p, self.q),
                self.stride,
                self.padding,
                self.dilation,
                (self.r, self.s),
            )
        )
        return hs, ws

    @property
    def dgrad_covers(self) -> bool:
        """Whether the residue classes of `dgrad_axes` write every element of dx (else dx starts as
        zeros)."""
        return all(
            sum(a.out for a in axes) == size
            for axes, size in zip(self.dgrad_axes, (self.h, self.w))
        )

    @cached_property
    def beyond_int32(self) -> str | None:
        """Why the kernels, whose integers have 32 bits, cannot run this geometry, with the numbers;
        None where they can.

        It bounds, for tiles of up to 1024 pixels, coordinates, the steps of the loops between rows,
        pixels and images, and how many elements before a tensor a tile begins: with the tensor's
        own they must fit in 32 bits without a sign, with the flat kernel's (below 2**30 elements)
        in 31.
        """
        elements = max(map(math.prod, (self.x_shape, self.w_shape, self.y_shape)))
        # from then on addresses have 64 bits
        most = 2**30 if elements < 2**30 else 2**31 if elements < 2**31 else math.inf
        for pass_ in ("fprop", "dgrad"):
            hs, ws = self.dgrad_axes if pass_ == "dgrad" else ([axis] for axis in self.fprop_axes)
            if not (hs and ws):
                continue
            far_h, far_w = (max(abs(a.offset) for a in axes) for axes in (hs, ws))
            box_h, box_w = (max(min(1024, 2 * a.out) * a.stride for a in axes) for axes in (hs, ws))
            height, width = (max(*(a.out for a in axes), axes[0].size) for axes in (hs, ws))
            values = (
                (
                    "a coordinate",
                    max(
                        a.size
                        + abs(a.offset)
                        + (a.out + 1024) * a.stride
                        + (a.taps + 1024) * a.dilation
                        for a in (*hs, *ws)
                    ),
                    2**30,
                ),
                (
                    "a step between rows",
                    max(far_h, box_h, hs[0].taps * hs[0].dilation) * width,
                    2**30,
                ),
                ("a step between pixels", max(box_w, ws[0].dilation) * max(self.c, self.k), 2**31),
                (
                    "a step between images",
                    max(min(1024, 2 * self.n) * height, self.n + 1024),
                    2**31,
                ),
                (
                    "a tile's distance before the tensor",
                    (far_h * ws[0].size + far_w) * (self.k if pass_ == "dgrad" else self.c),
                    most,
                ),
            )
            for what, value, limit in values:
                if value >= limit:
                    return f"{what} reaches {value} in {pass_} of {self.key()}, and the kernels count in 32 bits (up to {limit})"
        return None

    # ---- work
    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the definition, zero padding included (what FLOP counters report,
        halved)."""
        return self.n * self.k * self.p * self.q * (self.c // self.groups) * self.r * self.s

    @property
    def useful_macs(self) -> int:
        """Multiply-accumulates that read the image; the same for all three passes."""
        h, w = self.fprop_axes
        return self.n * self.k * (self.c // self.groups) * h.useful * w.useful

    @property
    def bytes(self) -> int:
        """Compulsory traffic of any pass: x, w and y once."""
        return DTYPE_BYTES[self.dtype] * sum(
            map(math.prod, (self.x_shape, self.w_shape, self.y_shape))
        )

    def key(self) -> str:
        """Readable identity, e.g. ``n4 c2048 h60 w60 k256 3x3 stride1 pad12 dil12 g1 float16
        nhwc``."""

        def pair(a, b):
            return f"{a}" if a == b else f"{a},{b}"

        pad = [pair(*p).replace(",", ":") for p in self.padding]
        operands = f" of {self.operands}" if self.operands else ""
        return (
            f"n{self.n} c{self.c} h{self.h} w{self.w} k{self.k} {self.r}x{self.s} stride{pair(*self.stride)} pad{pair(*pad)} "
            f"dil{pair(*self.dilation)} g{self.groups} {self.dtype} {self.layout}{operands}"
        )

    def shape(self) -> str:
        """The sizes as the command line takes them (--shape)."""

        def pair(a, b):
            return f"{a}" if a == b else f"{a},{b}"

        (top, bottom), (left, right) = self.padding
        pad = (
            pair(top, left) if (top, left) == (bottom, right) else f"{top},{bottom},{left},{right}"
        )
        return (
            f"n={self.n} c={self.c} h={self.h} w={self.w} k={self.k} r={self.r} s={self.s} stride={pair(*self.stride)} pad={pad} "
            f"d={pair(*self.dilation)} g={self.groups}"
        )


def _residue_classes(size, out, stride, pad_lo, dilation, taps):
    g = math.gcd(stride, dilation)
    for a in range(min(stride, size)):
        r0 = next(
            (r for r in range(min(taps, stride // g)) if (a + pad_lo - r * dilation) % stride == 0),
            None,
        )
        if r0 is not None:
            n = -(-(taps - r0) // (stride // g))
            # taps are walked from the last to the first, so that the dilation is positive
            yield Axis(
                out,
                -(-(size - a) // stride),
                1,
                (a + pad_lo - r0 * dilation) // stride - (n - 1) * (dilation // g),
                dilation // g,
                n,
                r0 + (n - 1) * (stride // g),
                -(stride // g),
                a,
                stride,
            )


def to_int(value: Any, name: str) -> int:
    """A Python int from what PyTorch takes for one: ints, NumPy's, 0-dimensional integer tensors;
    no bools."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} must be made of ints, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {number}")
    return number


def pair(value: Any, name: str) -> tuple[int, int]:
    """int, or a tuple or list of one or two ints -> (h, w), as `F.conv2d` reads stride, padding and
    dilation."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    return to_int(values[0], name), to_int(values[-1], name)


def single(value: Any, name: str) -> int:
    """int, or a tuple or list of one int -> int, as `F.conv1d` reads stride, padding and dilation."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if len(values) != 1:
        raise ValueError(f"{name} must be an int or a tuple of one int, got {value!r}")
    return to_int(values[0], name)


def pads(
    padding: Any, stride: tuple[int, int], dilation: tuple[int, int], taps: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """int, pair, pair of pairs (lo, hi), "valid" or "same" -> ((h_lo, h_hi), (w_lo, w_hi)); "same"
    puts the odd zero last, as PyTorch does."""
    if type(padding) is tuple and padding and type(padding[0]) is tuple:
        return padding
    if not isinstance(padding, str):
        h, w = pair(padding, "padding")
        return (h, h), (w, w)
    if padding == "valid":
        return ((0, 0), (0, 0))
    if padding != "same":
        raise ValueError(
            f"padding must be an int, a pair of ints, 'valid' or 'same', got {padding!r}"
        )
    if stride != (1, 1):
        raise ValueError(
            f"padding='same' needs stride 1, got stride={stride}: give the padding as numbers"
        )
    sides = [(d * (t - 1) // 2, d * (t - 1) - d * (t - 1) // 2) for d, t in zip(dilation, taps)]
    return sides[0], sides[1]


def problem_of(
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    dtype: str,
    layout: str = "nchw",
) -> Problem:
    """The Problem of `F.conv2d` arguments: x_shape (N, C, H, W) or (C, H, W), bias_shape a shape or
    None, the rest as users give it.

    Raises ValueError or TypeError, with the values, wherever `F.conv2d` raises.
    """
    x_shape, w_shape, groups = tuple(x_shape), tuple(w_shape), to_int(groups, "groups")
    if len(w_shape) != 4:
        raise ValueError(
            f"weight must be 4D (out_channels, in_channels/groups, R, S), got shape {w_shape}"
        )
    if len(x_shape) not in (3, 4):
        raise ValueError(f"input must be 3D (C, H, W) or 4D (N, C, H, W), got shape {x_shape}")
    n, c, h, w = (1, *x_shape)[-4:]
    if groups < 1:
        raise ValueError(f"groups must be positive, got {groups}")
    if c != w_shape[1] * groups:
        raise ValueError(
            f"input {x_shape} has {c} channels, but weight {w_shape} with groups={groups} expects {w_shape[1] * groups}"
        )
    if not (h and w) and n and c:  # last, for a compiler may not know it
        raise ValueError(
            f"only the batch or the channels of input may be empty, got shape {x_shape}"
        )
    if bias_shape is not None and tuple(bias_shape) != w_shape[:1]:
        raise ValueError(
            f"bias must have shape ({w_shape[0]},), one element per output channel, got {tuple(bias_shape)}"
        )
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    for name, v in (("stride", stride), ("dilation", dilation)):
        if v[0] < 1 or v[1] < 1:
            raise ValueError(f"{name} must be positive, got {v}")
    return Problem(
        n,
        c,
        h,
        w,
        w_shape[0],
        *w_shape[2:],
        stride,
        pads(padding, stride, dilation, w_shape[2:]),
        dilation,
        groups,
        dtype,
        layout,
    )
