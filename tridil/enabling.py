"""Without conversion: `enable` makes F.conv2d and F.conv1d of the whole process run dilated
convolutions as `dilated_conv2d` and `dilated_conv1d`; `disable` and `enabled` undo it.

torch.nn.functional's names are replaced, which nn.Conv2d and nn.Conv1d call, and most code of
models. Taking aten::convolution in the dispatcher would reach torch.conv2d and C++ as well, at the
price of a Python call, tens of microseconds, for every convolution of the process; a replaced name
costs those that are not taken a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from operator import index
from typing import Any

import torch
from torch.nn import functional as F

from . import functional, private, transposed
from .drivers import BACKENDS
from .problem import Problem, to_int

# name in torch.nn.functional -> (what runs, PyTorch's own, place of `dilation` in its arguments)
_TAKEN: dict[str, tuple[Any, Any, int]] = {
    "conv2d": (functional.dilated_conv2d, torch.conv2d, 5),
    "conv1d": (functional.dilated_conv1d, torch.conv1d, 5),
}
_TRANSPOSED: dict[str, tuple[Any, Any, int]] = {
    "conv_transpose2d": (transposed.dilated_conv_transpose2d, torch.conv_transpose2d, 7),
    "conv_transpose1d": (transposed.dilated_conv_transpose1d, torch.conv_transpose1d, 7),
}
# what stood there before
_before: dict[str, Any] = {}


def enable(
    *,
    min_dilation: int = 2,
    predicate: Callable[[Problem], bool] | None = None,
    transposed: bool = False,
    backend: str = "auto",
) -> None:
    """From now on F.conv2d and F.conv1d with a dilation of at least `min_dilation`, and more than one
    tap, run as `dilated_conv2d` and `dilated_conv1d`: for models as they are, nn.Conv2d and nn.Conv1d
    included, everywhere in the process.

    predicate: whether to take a convolution, given as a Problem. transposed: takes F.conv_transpose2d
    and F.conv_transpose1d of more than one tap, too. backend: as in `dilated_conv2d`; "auto" runs
    ATen on CPU tensors. Calling it again replaces the earlier settings. What imported conv2d by name
    before, calls torch.conv2d, was compiled before, or is TorchScript, is not reached. A convolution
    that is not taken costs less than a microsecond more (measured on a CPU). Raises ValueError and
    TypeError for bad arguments, before anything is changed.
    """
    if to_int(min_dilation, "min_dilation") < 1:
        raise ValueError(f"min_dilation must be positive, got {min_dilation}")
    if predicate is not None and not callable(predicate):
        raise TypeError(f"predicate must be a function of a Problem, got {predicate!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    disable()
    for name, taken in (_TAKEN | (_TRANSPOSED if transposed else {})).items():
        least = 1 if name in _TRANSPOSED else min_dilation
        _before[name] = getattr(F, name)
        setattr(F, name, _replacement(*taken, least, predicate, backend))


def disable() -> None:
    """Undoes `enable`; nothing where it was not called."""
    while _before:
        name, function = _before.popitem()
        setattr(F, name, function)


@contextmanager
def enabled(
    *,
    min_dilation: int = 2,
    predicate: Callable[[Problem], bool] | None = None,
    transposed: bool = False,
    backend: str = "auto",
) -> Iterator[None]:
    """`enable` within a context, after which F.conv2d is what it was before, other contexts
    included."""
    outer = {name: getattr(F, name) for name in (*_TAKEN, *_TRANSPOSED)}
    before = dict(_before)
    enable(min_dilation=min_dilation, predicate=predicate, transposed=transposed, backend=backend)
    try:
        yield
    finally:
        for name, function in outer.items():
            setattr(F, name, function)
        _before.clear()
        _before.update(before)


def _replacement(function, plain, place, min_dilation, predicate, backend):
    """What stands for PyTorch's `plain`, whose argument of that place is the dilation."""

    @wraps(plain)
    def conv(input, weight, *args, **kwargs):
        # input and weight are not among args
        dilation = args[place - 2] if len(args) > place - 2 else kwargs.get("dilation", 1)
        rates = (dilation,) if type(dilation) is int else _rates(dilation)
        if max(rates) < min_dilation or not _takes(weight, rates, min_dilation):
            return plain(input, weight, *args, **kwargs)
        if predicate is not None and (
            # a tracer's stand-ins have no sizes
            any(isinstance(t, torch.fx.Proxy) for t in (input, weight))
            or not predicate(_problem(plain, input, weight, *args, **kwargs))
        ):
            return plain(input, weight, *args, **kwargs)
        return function(input, weight, *args, **kwargs, backend=backend)

    # pickle finds it by name; inspect takes it for itself, TorchScript for PyTorch's
    conv.__module__, conv.__qualname__ = F.__name__, conv.__name__
    del conv.__wrapped__
    private.script_as(conv, f"aten::{plain.__name__}")
    return conv


def _rates(dilation) -> tuple[int, ...]:
    """The dilation of each axis; of what PyTorch refuses 0, so that it says why."""
    values = dilation if isinstance(dilation, (tuple, list)) else (dilation,)
    try:
        return tuple(map(index, values)) or (0,)
    except TypeError:
        return (0,)


def _takes(weight, rates, min_dilation) -> bool:
    """Whether the dilation reaches the least one along an axis with more than one tap, as far as a
    tracer tells."""
    if isinstance(weight, torch.fx.Proxy):
        return True
    taps = weight.shape[2:] if isinstance(weight, torch.Tensor) else ()
    if len(rates) == 1:
        rates *= len(taps)
    return any(tap > 1 and rate >= min_dilation for tap, rate in zip(taps, rates))


def _problem(
    plain, input, weight, bias=None, stride: Any = 1, padding: Any = 0, *rest, **kwargs: Any
) -> Problem | None:
    is_transposed = plain in (torch.conv_transpose2d, torch.conv_transpose1d)
    names = ("output_padding", "groups", "dilation") if is_transposed else ("dilation", "groups")
    values = dict(output_padding=0, dilation=1, groups=1) | dict(zip(names, rest)) | kwargs
    dilation, groups = values["dilation"], values["groups"]
    if is_transposed:
        dims, extra = 2 if plain is torch.conv_transpose2d else 1, values["output_padding"]
        return transposed.problem_of(
            dims, input, weight, bias, stride, padding, extra, groups, dilation, input.dtype
        )
    if plain is torch.conv2d:
        return functional.problem_of_tensors(input, weight, bias, stride, padding, dilation, groups)
    return functional._problem_1d(
        input, weight, bias, stride, padding, dilation, groups, False, input.dtype
    )
