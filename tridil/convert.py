"""Whole models: convert their convolutions to tridil's layers and back, and list what they run."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from . import functional
from .dispatch import BACKENDS
from .module import DilatedConv1d, DilatedConv2d
from .problem import DTYPE_BYTES, Problem, to_int

LAYERS = {nn.Conv2d: DilatedConv2d, nn.Conv1d: DilatedConv1d}


@dataclass
class Report:
    """What `convert` did: names of the replaced layers, and for every other convolution layer the reason. print() shows a table."""
    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "tridil"), *((name, "yes") for name in self.replaced), *((name, f"no: {why}") for name, why in self.skipped.items())]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows)


def convert(model: nn.Module, *, min_dilation: int = 2, predicate: Callable[[str, nn.Module], bool] | None = None, backend: str = "auto") -> Report:
    """Turn, in place, the `nn.Conv2d` and `nn.Conv1d` layers of `model` (itself included) into `DilatedConv2d` and `DilatedConv1d`.

    It takes layers with more than one tap whose dilation reaches `min_dilation` along an axis with more than one tap, and for which
    `predicate(name, module)`, if given, is true. Each stays the same object: parameters, buffers, hooks, parametrisations, train/eval state,
    optimizers and state_dict keys are untouched; a layer that the model uses several times is reported under its first name.
    Subclasses of nn.Conv2d and nn.Conv1d are left alone, since they may compute something else. backend is that of the layers.

    Raises TypeError and ValueError for arguments that are none of these, before anything is changed.
    """
    _check_model(model)
    if to_int(min_dilation, "min_dilation") < 1:
        raise ValueError(f"min_dilation must be positive, got {min_dilation}")
    if predicate is not None and not callable(predicate):
        raise TypeError(f"predicate must be a function of a layer's name and the layer, got {predicate!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    report, chosen = Report(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or getattr(module, "original_name", None) in ("Conv1d", "Conv2d"):
            reason = _reason(name, module, min_dilation, predicate)
            if reason:
                report.skipped[name] = reason
            else:
                report.replaced.append(name)
                chosen.append(module)
    for module in chosen:
        _become(module, LAYERS[_plain_class(module)])
        module.backend, module._converted = backend, True
    return report


def revert(model: nn.Module) -> list[str]:
    """Undo `convert`, in place; names of the layers that are plain again. Layers built as DilatedConv2d or DilatedConv1d stay.

    Raises ValueError, before anything is changed, where something derived a class from that of a converted layer (FSDP's fully_shard).
    """
    _check_model(model)
    plain = {tridil: plain for plain, tridil in LAYERS.items()}
    converted = {name: module for name, module in model.named_modules() if "_converted" in module.__dict__}
    for name, module in converted.items():
        if _plain_class(module) not in plain:
            raise ValueError(f"layer {name} is a {type(module).__name__}: revert before the model is wrapped")
    for module in converted.values():
        del module.backend, module._converted
        _become(module, plain[_plain_class(module)])
    return list(converted)


def scan(model: Callable, *inputs, **kwargs) -> Counter[Problem]:
    """The problems that one forward pass of `model` runs, and how often each, in the order of their first call.

    Every call of `F.conv2d`, `F.conv1d`, `dilated_conv2d` and `dilated_conv1d` counts, from layers and functions, converted or not, with the
    dtype (autocast's) and the layout in which `dilated_conv2d` would run it. The model runs once, without gradients, through ATen and outside
    of torch.compile; buffers (BatchNorm's averages) keep their values. Tensors may be on the meta device or fake: nothing is then computed.
    TorchScript hides its convolutions, they are not counted.
    """
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function, got {type(model).__name__}")
    recorder = _Recorder()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), recorder:
        if isinstance(model, nn.Module):
            torch.func.functional_call(model, {name: b.clone() for name, b in model.named_buffers()}, inputs, kwargs)
        else:
            model(*inputs, **kwargs)
    return recorder.problems


class _Recorder(TorchFunctionMode):
    """Counts the Problems of convolutions that return."""
    knows_tridil = True
    aten = torch.ops.aten
    functions = {2: (torch.conv2d, aten.conv2d, aten.conv2d.default, aten.conv2d.padding, functional.dilated_conv2d),
                 1: (torch.conv1d, aten.conv1d, aten.conv1d.default, aten.conv1d.padding, functional.dilated_conv1d)}
    dims = {f: d for d, fs in functions.items() for f in fs}

    def __init__(self):
        super().__init__()
        self.problems = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, dim = kwargs or {}, self.dims.get(func)
        if "backend" in kwargs and dim:                  # ATen has meta and fake tensors, and compiles nothing
            kwargs = kwargs | {"backend": "aten"}
        result = func(*args, **kwargs)                   # the mode is off in here: dilated_conv2d is counted, not its F.conv2d
        if dim:
            problem = _problem_of(dim, *args, **kwargs)
            if problem.dtype in DTYPE_BYTES and not problem.is_empty:
                self.problems[problem] += 1
        return result


def _problem_of(dim, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, causal=False, backend="auto") -> Problem:
    if dim == 2:
        return functional.problem_of_tensors(input, weight, bias, stride, padding, dilation, groups)
    dtype, _ = functional._dtype(input, weight, bias)
    return functional._problem_1d(input, weight, bias, stride, padding, dilation, groups, causal, dtype)


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _plain_class(module) -> type:
    """The class of a layer, without the one that torch.nn.utils.parametrize derives from it per object."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module, cls):
    """Change the class of a layer, below the class that parametrize derived from it."""
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _reason(name, module, min_dilation, predicate) -> str | None:
    """Why `convert` leaves a convolution layer alone."""
    cls = _plain_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript: convert the model before torch.jit.script"
    if cls in LAYERS.values():
        return f"is a {cls.__name__} already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "is not initialised: run the model once before convert"
    if cls not in LAYERS:
        base = next((c.__name__ for c in LAYERS if issubclass(cls, c)), None)
        return f"{cls.__module__}.{cls.__qualname__} " + (f"is a subclass of nn.{base} and may compute something else" if base else
                                                          "is neither nn.Conv2d nor nn.Conv1d")
    if {"forward", "_conv_forward"} & module.__dict__.keys():
        return "its forward was replaced on the object"
    kernel = "x".join(map(str, module.kernel_size))
    dilation = max((d for d, taps in zip(module.dilation, module.kernel_size) if taps > 1), default=0)
    if not dilation:
        return f"kernel {kernel} has one tap"
    if dilation < min_dilation:
        return f"dilation {dilation} of kernel {kernel} is below min_dilation={min_dilation}"
    if predicate is not None and not predicate(name, module):
        return "predicate is false"
    return None
