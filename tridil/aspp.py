"""The heads of known networks whose parallel branches run in one launch: ASPP of torchvision and of
segmentation_models_pytorch. `convert(model, branches=True)` is what users call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from .module import DilatedConv2d
from .multi_rate import multi_rate_conv2d, why_apart

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


def dense(module: Any) -> list[nn.Sequential]:
    """The branches that one launch runs: those that begin with a convolution of all channels."""
    return [
        branch
        for branch in module.convs
        if isinstance(branch, nn.Sequential)
        and type(branch).forward is nn.Sequential.forward
        and type(branch[0]) in (nn.Conv2d, DilatedConv2d)
    ]


def reason(module: nn.Module) -> str | None:
    """Why the branches of a head cannot be joined."""
    branches = dense(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if len(branches) < 2:
        return "its branches are not dense convolutions"
    convs: list[Any] = [branch[0] for branch in branches]
    return why_apart(convs, branches, ("stride", "groups", "in_channels"))


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
        branches = dense(self)
        convs: list[Any] = [branch[0] for branch in branches]
        y = multi_rate_conv2d(
            x,
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            padding=[conv.padding for conv in convs],
            dilation=[conv.dilation for conv in convs],
            stride=convs[0].stride,
            groups=convs[0].groups,
            backend=self.backend,
        )
        parts = dict(zip(branches, y.split([conv.out_channels for conv in convs], 1)))
        results = []
        for branch in self.convs:
            if branch in parts:
                result = parts[branch]
                for layer in list(branch)[1:]:
                    result = layer(result)
                results.append(result)
            else:
                results.append(branch(x))
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
