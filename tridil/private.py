"""Every name that PyTorch keeps to itself and the convolutions use, each here once: what stands for
it where a PyTorch lacks it, or an ImportError that names it. (What DTensor and the FLOP counter keep
to themselves stands in late.py, which registers nothing without it.)"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import forward_ad, profiler

if TYPE_CHECKING:
    from torch.autograd.function import _SingleLevelFunction as Function
    from torch.autograd.graph import Node
    from torch.overrides import TorchFunctionMode

_F = TypeVar("_F", bound=Callable[..., Any])

# "module:name" -> whether something stands for it
NAMES: dict[str, bool] = {}
_NOTHING = object()


def _find(name: str, without: Any = _NOTHING) -> Any:
    """The object called "module:name"; `without`, if given, where there is none. Raises ImportError
    where nothing stands for it."""
    NAMES[name] = without is not _NOTHING
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(import_module(module))
    except (ImportError, AttributeError):
        if without is not _NOTHING:
            return without
        raise ImportError(
            f"tridil needs {name.replace(':', '.')}, which torch {torch.__version__} lacks: install a torch "
            "from 2.11 to 2.15, or a newer tridil"
        ) from None


# who may watch an eager call; without one of these every call is taken for watched, so that an
# operator is dispatched, which is slower
_dispatch_modes = _find("torch._C:_len_torch_dispatch_stack", lambda: 1)
_function_modes = _find("torch._C:_len_torch_function_stack", lambda: 1)
_in_transform = _find("torch._C:_are_functorch_transforms_active", lambda: True)
_tracing_state = _find("torch._C:_get_tracing_state", torch.jit.is_tracing)
# whether a transform left its wrapper around a tensor
is_wrapped: Callable[[torch.Tensor], bool] = _find(
    "torch._C._functorch:is_functorch_wrapped_tensor", lambda t: True
)
# whether a tensor is a batch of torch.autograd.grad(is_grads_batched=True)
is_batched: Callable[[torch.Tensor], bool] = _find(
    "torch._C._functorch:is_legacy_batchedtensor", lambda t: True
)


# whether hooks of all modules are there; without it every layer is called
has_global_hooks: Callable[[], bool] = _find(
    "torch.nn.modules.module:_has_any_global_hook", lambda: True
)


def is_watched() -> bool:
    """Whether a mode, a transform, a tracer, a profiler or a dual level may watch this call."""
    return bool(
        _dispatch_modes()
        or _function_modes()
        or _in_transform()
        or _tracing_state()
        or getattr(profiler, "_is_profiler_enabled", True)
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def is_tracing() -> bool:
    """Whether torch.jit.trace, or the exporter to ONNX that is built on it, records this call."""
    return bool(_tracing_state())


# torch.autograd.Function without its rules under transforms, and without its look at the signature
# of forward, which takes longer than a launch; within `single_level` a transform takes its derivative
if not TYPE_CHECKING:
    Function = _find("torch.autograd.function:_SingleLevelFunction")
single_level: Callable[[], AbstractContextManager[object]] = _find(
    "torch._functorch.utils:enable_single_level_autograd_function"
)
# guards
below_autograd: Callable[[], AbstractContextManager[object]] = _find(
    "torch._C:_AutoDispatchBelowAutograd"
)
forward_mode: Callable[[bool], AbstractContextManager[object]] = _find(
    "torch.autograd.forward_ad:_set_fwd_grad_enabled"
)
_without_keys = _find("torch._C:_ExcludeDispatchKeyGuard")
_VIEWS = _find("torch._C:DispatchKeySet")(_find("torch._C:DispatchKey").ADInplaceOrView)
_DisableAutocast = _find("torch._C:_DisableAutocast", None)


def without_views() -> AbstractContextManager[object]:
    """Where another shape or other strides of a tensor make a tensor that autograd does not take
    for a view."""
    return _without_keys(_VIEWS)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """torch.autocast(enabled=False), by a guard that costs less where it is there and Dynamo does
    not look on."""
    if _DisableAutocast is None or torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)
    return _DisableAutocast()


_will_run = _find("torch._C:_will_engine_execute_node", lambda node: True)


def will_run(node: Node | None) -> bool:
    """Whether the running backward asks for what a node of the graph computes. Without the name:
    True, and gradients are computed that nobody asked for."""
    try:
        return _will_run(node)
    except RuntimeError:  # of leaves that it was asked for
        return True


# modes and subclasses that watch torch functions
function_modes: Callable[[], list[TorchFunctionMode]] = _find(
    "torch.overrides:_get_current_function_mode_stack"
)
overloaded_args: Callable[[Iterable[Any]], list[Any]] = _find(
    "torch.overrides:_get_overloaded_args"
)
push_mode: Callable[[TorchFunctionMode], None] = _find("torch.overrides:_push_mode")
pop_mode: Callable[[], TorchFunctionMode] = _find("torch.overrides:_pop_mode")
# torch.set_default_device's mode; without the name it counts among the modes that watch
DeviceContext: type[TorchFunctionMode] | tuple[()] = _find("torch.utils._device:DeviceContext", ())
# tensors of PyTorch's own tracers; without the names they run through ATen, as foreign classes do
FakeTensor: type[torch.Tensor] | tuple[()] = _find("torch._subclasses:FakeTensor", ())
FunctionalTensor: type[torch.Tensor] | tuple[()] = _find(
    "torch._subclasses.functional_tensor:FunctionalTensor", ()
)

_keeps_saved = _find("torch._C:_autograd._saved_tensors_hooks_is_enabled", lambda: False)
_proxy_mode = _find("torch.fx.experimental.proxy_tensor:get_proxy_mode", lambda: True)


def autocast_copy(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The copy in dtype that autocast keeps of a parameter for F.conv2d, as a convolution of no
    images saves it. None where it keeps none: a plain copy will do, made anew each time."""
    if (
        t._base is not None
        or not torch.is_autocast_cache_enabled()
        or not _keeps_saved()
        or torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or _in_transform()
        or _proxy_mode()
    ):
        return None
    # its saving is nobody's concern
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        y = (torch.conv2d if t.dim() == 4 else torch.conv1d)(
            t.new_empty((0, *t.shape[1:]), dtype=dtype), t
        )
    return getattr(y.grad_fn, "_saved_weight", None)


def mark_constant(function: _F) -> _F:
    """Dynamo calls the function once and keeps what it returns: torch.compiler's
    assume_constant_result, which imports all of Dynamo. Without it Dynamo looks into the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_builtin_table = _find("torch.jit._builtins:_get_builtin_table", None)


def script_as(function: Callable[..., Any], operator: str) -> None:
    """TorchScript compiles calls of a Python function, as long as it lives, as those of an operator.
    Without the name it cannot compile them."""
    if _builtin_table is not None:
        table = _builtin_table()
        table[id(function)] = operator
        weakref.finalize(function, table.pop, id(function), None)


tree_map: Callable[..., Any] = _find("torch.utils._pytree:tree_map")
