"""What other parts of PyTorch are told of the operators once somebody imports them: FLOPs, and how
DTensors are split."""

from __future__ import annotations

import sys
from contextlib import suppress
from copy import copy
from importlib.abc import MetaPathFinder

import torch


def _register_flops(flop_counter):
    """The dense FLOPs that torch.utils.flop_counter gives F.conv2d."""

    def backward(dy, x_shape, w_shape, groups, mask):
        return flop_counter.conv_backward_flop(
            dy,
            x_shape,
            w_shape,
            None,
            None,
            None,
            None,
            False,
            None,
            groups,
            mask,
            out_val=(x_shape, w_shape),
        )

    for packet, formula in (
        (
            torch.ops.tridil.fprop,
            lambda x, w, *rest, out_shape, **_: flop_counter.conv_flop_count(x, w, out_shape),
        ),
        (
            torch.ops.tridil.dgrad,
            lambda dy, w, x, *geometry, **_: backward(dy, x, w, geometry[3], (True, False, False)),
        ),
        (
            torch.ops.tridil.wgrad,
            lambda dy, x, w, *geometry, **_: backward(dy, x, w, geometry[3], (False, True, False)),
        ),
    ):
        flop_counter.flop_registry.pop(packet, None)  # of a module that runs again
        flop_counter.register_flop_formula(packet)(formula)


def _register_sharding(_):
    """How DTensors are split over processes: by images, with whole weights, whose gradients are
    then summed."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator

    def register(op, *split):
        def rule(a, b, third, *rest):
            bias = None if third is None or isinstance(third, (list, tuple)) else Replicate()
            return [
                ([y], [a, b, bias, *(None for _ in rest)])
                for y, a, b in (split, (Replicate(),) * 3)
            ]

        register_sharding(op)(rule)
        # what is not a tensor belongs to the key of DTensor's cache, too: the shape of the result
        # depends on it
        propagator.register_op_strategy(
            op, propagator.op_strategy_funcs[op], RuntimeSchemaInfo(2, needs_pytree=True)
        )

    register(torch.ops.tridil.fprop.default, Shard(0), Shard(0), Replicate())
    register(torch.ops.tridil.dgrad.default, Shard(0), Shard(0), Replicate())
    register(torch.ops.tridil.wgrad.default, Partial(), Shard(0), Shard(0))


class _Late(MetaPathFinder):
    """Registers whenever a module is executed that `import tridil` leaves out: it takes long, or
    imports Triton, which is left to be configured."""

    modules = {
        "torch.utils.flop_counter": _register_flops,
        "torch.distributed.tensor": _register_sharding,
    }

    def register(self, name, module):
        # parts are private to PyTorch: without them FLOPs are 0, and DTensors find no rule
        with suppress(ImportError, AttributeError):
            self.modules[name](module)

    def find_spec(self, name, path, target=None):
        if name not in self.modules:
            return None
        finders = iter(sys.meta_path)
        any(finder is self for finder in finders)  # those behind this one are left
        spec = next(
            filter(
                None,
                (
                    finder.find_spec(name, path, target)
                    for finder in finders
                    if hasattr(finder, "find_spec")
                ),
            ),
            None,
        )
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run, spec.loader = spec.loader.exec_module, copy(spec.loader)
            spec.loader.exec_module = lambda module: (run(module), self.register(name, module))
        return spec


def install() -> None:
    """Once, and anew for a module that runs again; at once for what is imported already."""
    sys.meta_path[:] = [
        _Late(),
        *(
            finder
            for finder in sys.meta_path
            if (type(finder).__module__, type(finder).__name__) != (__name__, "_Late")
        ),
    ]
    for name in _Late.modules.keys() & sys.modules.keys():
        sys.meta_path[0].register(name, sys.modules[name])  # type: ignore[attr-defined]
