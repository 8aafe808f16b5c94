"""Whole models: convert their convolutions to tridil's layers and back, and list what they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from . import aspp, functional
from .drivers import BACKENDS
from .module import DilatedConv1d, DilatedConv2d, _Dilated, mark_leaf, run
from .problem import DTYPE_BYTES, Problem, pair, single, to_int
from .transposed import DilatedConvTranspose1d, DilatedConvTranspose2d

LAYERS: dict[type[nn.Conv2d | nn.Conv1d], type[DilatedConv2d | DilatedConv1d]] = {
    nn.Conv2d: DilatedConv2d,
    nn.Conv1d: DilatedConv1d,
}
# on request
TRANSPOSED: dict[
    type[nn.ConvTranspose2d | nn.ConvTranspose1d],
    type[DilatedConvTranspose2d | DilatedConvTranspose1d],
] = {
    nn.ConvTranspose2d: DilatedConvTranspose2d,
    nn.ConvTranspose1d: DilatedConvTranspose1d,
}
FUNCTIONS: dict[
    type[nn.Conv2d | nn.Conv1d], tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]
] = {
    nn.Conv2d: (functional.dilated_conv2d, torch.conv2d),
    nn.Conv1d: (functional.dilated_conv1d, torch.conv1d),
}


@dataclass
class Report:
    """What `convert` did: names of the replaced layers, of heads whose branches were joined, and for
    every other convolution layer, and head where branches were asked for, the reason. print() shows
    what was done and counts the reasons; `details` has a line for each layer."""

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = [("layer", "tridil"), *((name, "yes") for name in self.replaced)]
        reasons = Counter(self.skipped.values())
        running = len(self.replaced) + sum(" already" in why for why in self.skipped.values())
        total = len(self.replaced) + len(self.skipped)
        return "\n".join(
            [
                *_table([*done, *self.joined.items()] if len(done) > 1 or self.joined else []),
                *(f"{count} not: {why}" for why, count in reasons.most_common()),
                f"{running} of {total} convolution layers run as tridil's; what that gains: tridil.explain(model, *inputs)",
            ]
        )

    def details(self) -> str:
        """A line per layer, converted or not, and why."""
        return "\n".join(
            _table(
                [
                    ("layer", "tridil"),
                    *((name, "yes") for name in self.replaced),
                    *self.joined.items(),
                    *((name, f"no: {why}") for name, why in self.skipped.items()),
                ]
            )
        )


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {what}" for name, what in rows]


def convert(
    model: nn.Module,
    *,
    min_dilation: int = 2,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    backend: str = "auto",
    branches: bool = False,
    transposed: bool = False,
) -> Report:
    """Turn, in place, the `nn.Conv2d` and `nn.Conv1d` layers of `model` (itself included) into
    `DilatedConv2d` and `DilatedConv1d`.

    It takes layers with more than one tap whose dilation reaches `min_dilation` along an axis with
    more than one tap, and for which `predicate(name, module)`, if given, is true. Each stays the
    same object: parameters, buffers, hooks, parametrisations, train/eval state, optimizers and
    state_dict keys are untouched; a layer that the model uses several times is reported under its
    first name. Subclasses of nn.Conv2d and nn.Conv1d stay what they are and become `DilatedConv2d`
    or `DilatedConv1d` in addition, where their forward comes to the convolution of nn.Conv2d or
    nn.Conv1d; others are left alone but for those that `predicate` names: they keep their code,
    whose calls of F.conv2d or F.conv1d run as `dilated_conv2d` or `dilated_conv1d`. backend is that
    of the layers, also of those converted before.

    branches=True also joins the parallel branches of the ASPP heads of torchvision and
    segmentation_models_pytorch: their convolutions run in one launch a pass (`multi_rate_conv2d`),
    separable ones in one for the depthwise and one for the 1x1 convolutions, what follows in each
    branch as before. Parameters and state_dict stay what they are.
    transposed=True also takes `nn.ConvTranspose2d` and `nn.ConvTranspose1d` of more than one tap,
    whatever their dilation.

    Raises TypeError and ValueError for arguments that are none of these, before anything is
    changed.
    """
    _check_model(model)
    if to_int(min_dilation, "min_dilation") < 1:
        raise ValueError(f"min_dilation must be positive, got {min_dilation}")
    if predicate is not None and not callable(predicate):
        raise TypeError(
            f"predicate must be a function of a layer's name and the layer, got {predicate!r}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    report, chosen = Report(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or getattr(
            module, "original_name", None
        ) in ("Conv1d", "Conv2d"):
            reason = _reason(name, module, min_dilation, predicate, transposed)
            if reason is None:
                chosen.append(module)
                if "_converted" in module.__dict__:
                    before = (
                        ""
                        if module.backend == backend
                        else f": its backend was {module.backend!r} and is {backend!r} now"
                    )
                    reason = f"is a {_plain_class(module).__name__} already{before}"
            if reason is None:
                report.replaced.append(name)
            else:
                report.skipped[name] = reason
    for module in chosen:
        if "_converted" not in module.__dict__:
            _tridil_class(_plain_class(module))  # raises before any layer has changed
    for module in chosen:
        _turn(module, backend)
    if branches:
        for name, module in model.named_modules():
            if aspp.is_known(module):
                reason = None if aspp.is_joined(module) else aspp.reason(module)
                if reason is None:
                    aspp.join(module, backend)
                    report.joined[name] = aspp.summary(module)
                else:
                    report.skipped[name] = f"branches stay apart: {reason}"
    return report


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`, in place; names of the layers and heads that are plain again. Layers built as
    DilatedConv2d or DilatedConv1d stay.

    Raises ValueError, before anything is changed, where something derived a class from that of a
    converted layer (FSDP's fully_shard).
    """
    _check_model(model)
    plain = {tridil: plain for plain, tridil in (LAYERS | TRANSPOSED).items()}
    joined = {name: module for name, module in model.named_modules() if aspp.is_joined(module)}
    converted = {
        name: module for name, module in model.named_modules() if "_converted" in module.__dict__
    }
    classes = [
        plain.get(cls) or vars(cls).get("_plain") for cls in map(_plain_class, converted.values())
    ]
    wrapped = {
        f"layer {name}": module
        for (name, module), cls in zip(converted.items(), classes)
        if cls is None
    } | {f"head {name}": module for name, module in joined.items() if aspp.is_derived(module)}
    for what, module in wrapped.items():
        raise ValueError(f"{what} is a {type(module).__name__}: revert before the model is wrapped")
    for module, cls in zip(converted.values(), classes):
        for attribute in ("backend", "_converted", "__module__"):
            module.__dict__.pop(attribute, None)
        _become(module, cls)
    for module in joined.values():
        aspp.part(module)
    return [*converted, *joined]


def scan(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Counter[Problem]:
    """The problems that one forward pass of `model` runs, and how often each, in the order of their
    first call.

    Every call of `F.conv2d`, `F.conv1d`, `dilated_conv2d` and `dilated_conv1d` counts, from layers
    and functions, converted or not, with the dtype (autocast's) and the layout in which
    `dilated_conv2d` would run it. The model runs once, without gradients, through ATen and outside
    of torch.compile; buffers (BatchNorm's averages) keep their values. Tensors may be on the meta
    device or fake: nothing is then computed. TorchScript hides its convolutions, they are not
    counted.
    """
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function, got {type(model).__name__}")
    recorder = _Recorder()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorder:
        if isinstance(model, nn.Module):
            torch.func.functional_call(
                model, {name: b.clone() for name, b in model.named_buffers()}, inputs, kwargs
            )
        else:
            model(*inputs, **kwargs)
    return recorder.problems


class _Recorder(TorchFunctionMode):
    """Counts the Problems of convolutions that return."""

    knows_tridil = True
    aten = torch.ops.aten
    functions = {
        2: (
            torch.conv2d,
            aten.conv2d,
            aten.conv2d.default,
            aten.conv2d.padding,
            functional.dilated_conv2d,
        ),
        1: (
            torch.conv1d,
            aten.conv1d,
            aten.conv1d.default,
            aten.conv1d.padding,
            functional.dilated_conv1d,
        ),
    }
    dims = {f: d for d, fs in functions.items() for f in fs}

    def __init__(self):
        super().__init__()
        self.problems = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, dim = kwargs or {}, self.dims.get(func)
        # ATen has meta and fake tensors, and compiles nothing
        if "backend" in kwargs and dim:
            kwargs = kwargs | {"backend": "aten"}
        # the mode is off in here: dilated_conv2d is counted, not its F.conv2d
        result = func(*args, **kwargs)
        if dim:
            problem = _problem_of(dim, *args, **kwargs)
            if problem.dtype in DTYPE_BYTES and not problem.is_empty:
                self.problems[problem] += 1
        return result


def _problem_of(
    dim,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    causal=False,
    backend="auto",
) -> Problem:
    if dim == 2:
        return functional.problem_of_tensors(input, weight, bias, stride, padding, dilation, groups)
    dtype, _ = functional._dtype(input, weight, bias)
    return functional._problem_1d(
        input, weight, bias, stride, padding, dilation, groups, causal, dtype
    )


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _plain_class(module) -> type:
    """The class of a layer, without the one that torch.nn.utils.parametrize derives from it per
    object."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module, cls):
    """Change the class of a layer, below the class that parametrize derived from it."""
    if parametrize.is_parametrized(module):
        own = {
            k: v
            for k, v in vars(type(module)).items()
            if k not in ("__dict__", "__weakref__", "__doc__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _reason(name, module, min_dilation, predicate, transposed) -> str | None:
    """Why `convert` leaves a convolution layer alone."""
    cls = _plain_class(module)
    base = next((base for base in LAYERS if issubclass(cls, base)), None)
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript: convert the model before torch.jit.script"
    if isinstance(module, _Dilated) and "_converted" not in module.__dict__:
        return f"is a {cls.__name__} already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "is not initialised: run the model once before convert"
    if any(issubclass(cls, plain) for plain in TRANSPOSED):
        return _reason_transposed(name, module, cls, predicate, transposed)
    if base is None:
        return f"{cls.__module__}.{cls.__qualname__} is neither nn.Conv2d nor nn.Conv1d"
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced on the object"
    try:
        taps, dilations = (
            (single(value, name),) if base is nn.Conv1d else pair(value, name)
            for name, value in (("kernel_size", module.kernel_size), ("dilation", module.dilation))
        )
    except (TypeError, ValueError) as e:
        return f"PyTorch does not run it: {e}"
    kernel = "x".join(map(str, taps))
    dilation = max((d for d, t in zip(dilations, taps) if t > 1), default=0)
    if not dilation:
        return f"kernel {kernel} has one tap"
    if dilation < min_dilation:
        return f"dilation {dilation} of kernel {kernel} is below min_dilation={min_dilation}"
    if not isinstance(module, _Dilated) and cls is not base:
        subclass = f"{cls.__module__}.{cls.__qualname__} is a subclass of nn.{base.__name__} "
        if hasattr(module, "backend"):
            return subclass + "with a backend of its own"
        if predicate is None and not _comes_to_nn_conv(cls):
            return (
                subclass + "and may compute something else: a predicate that names it converts it"
            )
    if predicate is not None and not predicate(name, module):
        return "predicate is false"
    return None


def _reason_transposed(name, module, cls, predicate, transposed) -> str | None:
    """Why `convert` leaves a transposed layer alone."""
    if cls not in TRANSPOSED and not isinstance(module, _Dilated):
        return f"{cls.__module__}.{cls.__qualname__} is a subclass of a transposed layer"
    if not transposed:
        return "is transposed: convert(model, transposed=True) takes it"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if all(size == 1 for size in module.kernel_size):
        return f"kernel {'x'.join(map(str, module.kernel_size))} has one tap"
    return None if predicate is None or predicate(name, module) else "predicate is false"


@cache
def _comes_to_nn_conv(cls) -> bool:
    """Whether a subclass convolves by nn.Conv's own `_conv_forward`, as far as its code shows: by
    nn.Conv's forward, or one that calls it."""
    base = next(base for base in LAYERS if issubclass(cls, base))
    if cls._conv_forward is not base._conv_forward:
        return False
    methods = [
        unwrap(value)
        for c in cls.__mro__[: cls.__mro__.index(base)]
        for value in vars(c).values()
        if callable(value)
    ]
    return cls.forward is base.forward or any(
        {"forward", "_conv_forward"} & set(m.__code__.co_names)
        for m in methods
        if hasattr(m, "__code__")
    )


@cache
def _tridil_class(cls) -> type:
    """The class of a converted layer of class `cls`, of users' classes one that derives from both."""
    if cls in TRANSPOSED:
        return TRANSPOSED[cls]
    base = next(base for base in LAYERS if issubclass(cls, base))
    if cls is base:
        return LAYERS[base]
    function, plain = FUNCTIONS[base]

    @wraps(cls.forward)
    def forward(self, *args, **kwargs):
        with functional.Reroute(function, plain, {"backend": self.backend}):
            return cls.forward(self, *args, **kwargs)

    # a `causal` that the class may have is its own concern
    def conv_forward(self, input, weight, bias):
        return run(function, self, input, weight, bias)

    has_reduce = (
        cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__
    )

    def reduce_ex(self, protocol):
        make, args, *rest = cls.__reduce_ex__(self, protocol)
        return (_make, (make, args, self.backend), *rest) if has_reduce else (_new, (cls,), *rest)

    own = (
        {"_conv_forward": conv_forward}
        if _comes_to_nn_conv(cls)
        else {"forward": forward, "_conv_forward": cls._conv_forward}
    )
    return type(cls)(
        f"Dilated{cls.__name__}",
        (LAYERS[base], cls),
        own
        | {
            "_plain": cls,
            "__module__": cls.__module__,
            "__doc__": cls.__doc__,
            "__init__": cls.__init__,
            "extra_repr": _Dilated.extra_repr,
            "__reduce_ex__": reduce_ex,
        },
    )


def _turn(layer, backend):
    """Makes a layer one of tridil's."""
    if "_converted" not in layer.__dict__:
        _become(layer, _tridil_class(_plain_class(layer)))
        layer._converted = True
        mark_leaf(layer)
    layer.backend = backend


def _make(make, args, backend):
    """A converted layer whose class says itself how it is made, for pickle and copy."""
    layer = make(*args)
    _turn(layer, backend)
    return layer


def _new(cls):
    """An object of `_tridil_class`, for pickle and copy."""
    return object.__new__(_tridil_class(cls))
