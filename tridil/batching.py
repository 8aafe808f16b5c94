"""vmap: one convolution that computes a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .problem import ROLES

if TYPE_CHECKING:
    import torch

# The operand that has no vmap batch, if any -> the axis of each other tensor that takes the batch,
# so that one convolution computes all: images of x and y, output channels of each group, input
# channels of each group, or groups.
_PLACES = {
    "w": {"x": 0, "y": 0},
    "x": {"w": 0, "y": 1},
    "y": {"w": 1, "x": 1},
    "": {"x": 1, "w": 0, "y": 1},
}


def rule(
    function: Any,
    info: Any,
    in_dims: tuple[Any, ...],
    a: torch.Tensor,
    b: torch.Tensor,
    third: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    auto: bool = False,
) -> tuple[torch.Tensor, int]:
    """(result, its batch axis) of an operator under vmap."""
    size, roles, bias, bias_dim = info.batch_size, ROLES[function.pass_], None, in_dims[2]
    if size == 0:  # nothing says how large its items are: the shape of one
        a, b, third = one_each(in_dims, (a, b, third))
        settings: Any = stride, padding, dilation, groups, channels_last, auto
        out, at = rule(function, info._replace(batch_size=1), in_dims, a, b, third, *settings)
        return out.narrow(at, 0, 0), at
    unbatched = "".join(role for role, dim in zip(roles, in_dims[:2]) if dim is None)
    places = _PLACES.get(unbatched, {})

    # an axis of all channels consists of those of each group
    def parts(role):
        return groups if unbatched in ("x", "y") and (role, places[role]) != ("w", 1) else 1

    a, b = (
        t if dim is None else _fold(t, dim, places[role], parts(role))
        for role, dim, t in zip(roles, in_dims, (a, b))
    )
    at = places.get(roles[2], 0)
    if roles[2] != "y":
        third = [n * size if i == at else n for i, n in enumerate(third)]
    elif third is not None and (unbatched != "w" or bias_dim is not None):
        bias, third = third, None
    out = function.op(
        a,
        b,
        third,
        stride,
        padding,
        dilation,
        groups if unbatched else groups * size,
        channels_last,
        auto,
    )
    if places:
        out = _unfold(out, at, size, parts(roles[2]))
    if bias is not None:  # (B, N, K, P, Q), or (N, B, K, P, Q)
        out = (
            out
            + (bias if bias_dim is None else bias.movedim(bias_dim, 0).unsqueeze(1 - at))[
                (..., *[None] * (a.dim() - 2))
            ]
        )
    return out, at


def one_each(in_dims: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Operands of an empty batch, tensors or lists of them, -> of a batch of one, of zeros; what is
    no tensor stays."""

    def one(t, dim):
        if isinstance(t, (list, tuple)):
            return one_each(dim if isinstance(dim, (list, tuple)) else [dim] * len(t), t)
        if dim is None or not hasattr(t, "new_zeros"):
            return t
        return t.new_zeros([1 if i == dim else n for i, n in enumerate(t.shape)])

    return [one(t, dim) for t, dim in zip(operands, in_dims)]


def _fold(t, dim, at, groups):
    """t without axis `dim`, which its axis `at` takes in, within each of so many groups."""
    t = t.movedim(dim, at)
    return (
        t.flatten(at, at + 1)
        if groups == 1
        else t.unflatten(at + 1, (groups, -1)).transpose(at, at + 1).flatten(at, at + 2)
    )


def _unfold(t, at, size, groups):
    """The inverse: the batch becomes axis `at`."""
    return (
        t.unflatten(at, (size, -1))
        if groups == 1
        else t.unflatten(at, (groups, size, -1)).transpose(at, at + 1).flatten(at + 1, at + 2)
    )
