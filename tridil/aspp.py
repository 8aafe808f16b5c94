"""The heads of known networks whose parallel branches run in one launch: ASPP of torchvision and of
segmentation_models_pytorch, separable ones in two. `convert(model, branches=True)` is what users call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from .branches import MOST
from .multi_rate import go_together, in_common, is_plain, multi_rate_conv2d, runs

# module and name of classes with `convs`, whose results `forward` puts side by side and gives to
# `project`
KNOWN = {
    ("torchvision.models.segmentation.deeplabv3", "ASPP"),
    ("segmentation_models_pytorch.decoders.deeplabv3.decoder", "ASPP"),
}


def is_known(module: nn.Module) -> bool:
    """Whether a module is such a head, joined or not, or one of a class derived from it."""
    return any((cls.__module__, cls.__qualname__) in KNOWN for cls in type(module).__mro__)


def is_joined(module: nn.Module) -> bool:
    return "_joined" in module.__dict__


def is_derived(module: nn.Module) -> bool:
    """Whether the class is neither a head's nor one that `join` made."""
    cls = vars(type(module)).get("_plain", type(module))
    return (cls.__module__, cls.__qualname__) not in KNOWN


def layers(branch: nn.Module) -> list[Any]:
    """What a branch calls one after another: each nn.Sequential that has nothing of its own opened."""
    if isinstance(branch, nn.Sequential) and runs(branch, nn.Sequential):
        return [layer for part in branch for layer in layers(part)]
    return [branch]


def together(module: Any) -> dict[int, list[Any]]:
    """Layers of the branches that one launch runs, by their place in the head: the most whose
    first convolutions go together (of all channels, or of one each in a separable head)."""
    sets: dict[tuple, dict[int, list[Any]]] = {}
    for place, branch in enumerate(module.convs):
        first, *rest = layers(branch) or [None]
        if is_plain(first):
            found = sets.setdefault((first.in_channels, *in_common(first)), {})
            if len(found) < MOST:
                found[place] = [first, *rest]
    most: dict[int, list[Any]] = {}
    for found in sets.values():  # Dynamo knows no max with a key and a default
        most = found if len(found) > len(most) else most
    return most


def convolutions(branches: dict[int, list[Any]], depth: int) -> list[Any]:
    """The layers of all branches at a depth, where one launch runs them."""
    convs = [found[depth] for found in branches.values() if len(found) > depth]
    return convs if len(convs) == len(branches) and go_together(convs) else []


def reason(module: nn.Module) -> str | None:
    """Why no two branches of a head can be joined."""
    if is_derived(module):
        return f"{type(module).__name__} is derived from the head: convert it before it is wrapped"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if len(together(module)) < 2:
        return "its branches do not begin with plain convolutions that go together, or have hooks"
    return None


def summary(module: nn.Module) -> str:
    """What a joined head runs, in words."""
    branches, launches = together(module), 0
    while convolutions(branches, launches):
        launches += 1
    how = "one launch" if launches == 1 else f"{launches} launches, one after another"
    return f"{len(branches)} of {len(module.convs)} branches in {how}"  # type: ignore[arg-type]


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
        branches, depth, y = together(self), 0, x
        if len(branches) < 2:  # what was added since: hooks, say
            return plain_forward(self, x)
        sizes: list[int] = []
        while convs := convolutions(branches, depth):
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
            sizes, depth = [conv.weight.shape[0] for conv in convs], depth + 1
        # not split: what follows may work in place, which autograd forbids on several views
        slices = torch.unsafe_split_with_sizes(y, sizes, 1)
        parts = {place: slices[i] for i, place in enumerate(branches)}
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
