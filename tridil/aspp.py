"""The heads of known networks whose parallel branches run in one launch: ASPP of torchvision and of
segmentation_models_pytorch, separable ones in two. `convert(model, branches=True)` is what users call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from .multi_rate import go_together, has_hooks, multi_rate_conv2d

# module and name of classes with `convs`, whose results `forward` puts side by side and gives to
# `project`
KNOWN = {
    ("torchvision.models.segmentation.deeplabv3", "ASPP"),
    ("segmentation_models_pytorch.decoders.deeplabv3.decoder", "ASPP"),
}


def is_known(module: nn.Module) -> bool:
    """Whether a module is such a head, joined or not."""
    cls = getattr(type(module), "_plain", type(module))
    return (cls.__module__, cls.__qualname__) in KNOWN


def is_joined(module: nn.Module) -> bool:
    return "_joined" in module.__dict__


def layers(branch: nn.Module) -> list[Any]:
    """What a branch calls one after another: each nn.Sequential that has nothing of its own opened."""
    if (
        isinstance(branch, nn.Sequential)
        and type(branch).forward is nn.Sequential.forward
        and "forward" not in branch.__dict__
        and not has_hooks(branch)
    ):
        return [layer for part in branch for layer in layers(part)]
    return [branch]


def together(module: Any) -> dict[int, list[Any]]:
    """Layers of the branches that one launch runs, by their place in the head: the most whose
    first convolutions go together (of all channels, or of one each in a separable head)."""
    sets: dict[tuple, dict[int, list[Any]]] = {}
    for place, branch in enumerate(module.convs):
        first, *rest = layers(branch) or [None]
        if go_together([first]):
            shared = first.groups, first.stride, first.in_channels
            sets.setdefault(shared, {})[place] = [first, *rest]
    most: dict[int, list[Any]] = {}
    for found in sets.values():  # Dynamo knows no max with a key and a default
        most = found if len(found) > len(most) else most
    return most


def _convolutions(branches: dict[int, list[Any]], depth: int) -> list[Any]:
    """The layers of all branches at a depth, where one launch runs them."""
    convs = [found[depth] for found in branches.values() if len(found) > depth]
    return convs if len(convs) == len(branches) and go_together(convs) else []


def reason(module: nn.Module) -> str | None:
    """Why no two branches of a head can be joined."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if len(together(module)) < 2:
        return "its branches do not begin with plain convolutions that go together, or have hooks"
    return None


def join(module: Any, backend: str) -> None:
    """Makes the branches of a head run in one launch, in place."""
    if not is_joined(module):
        cls: Any = type(module)
        module.__class__ = _joined_class(cls)
        module._joined = True
    module.backend = backend


def part(module: Any) -> None:
    """Undoes `join`."""
    for attribute in ("_joined", "backend"):
        module.__dict__.pop(attribute, None)
    module.__class__ = type(module)._plain


@cache
def _joined_class(cls: Any) -> type:
    plain_forward = cls.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if reason(self):  # what was added since: hooks, say
            return plain_forward(self, x)
        branches, depth, y = together(self), 0, x
        sizes: list[int] = []
        while convs := _convolutions(branches, depth):
            y = multi_rate_conv2d(
                y,
                [conv.weight for conv in convs],
                [conv.bias for conv in convs],
                padding=[conv.padding for conv in convs],
                dilation=[conv.dilation for conv in convs],
                stride=convs[0].stride,
                groups=convs[0].groups,
                shared_input=depth == 0,
                backend=self.backend,
            )
            sizes, depth = [conv.out_channels for conv in convs], depth + 1
        parts = dict(zip(branches, y.split(sizes, 1)))
        results = []
        for place, branch in enumerate(self.convs):
            if place not in parts:
                results.append(branch(x))
                continue
            result = parts[place]
            for layer in branches[place][depth:]:
                result = layer(result)
            results.append(result)
        return self.project(torch.cat(results, 1))

    own = {
        "forward": forward,
        "_plain": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, protocol: (
            _new,
            (cls,),
            *cls.__reduce_ex__(self, protocol)[2:],  # type: ignore[call-arg]
        ),
    }
    return type(cls)(f"Joined{cls.__name__}", (cls,), own)


def _new(cls: type) -> nn.Module:
    """An object of `_joined_class`, for pickle and copy."""
    return object.__new__(_joined_class(cls))
