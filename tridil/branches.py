"""The domain model of several convolutions in one launch: parallel branches as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from .problem import DTYPE_BYTES, Problem

MOST = 8  # branches of one launch, whose filters are arguments of the kernel
MOST_CLASSES = 9  # launches of a strided dgrad, each compiled


@dataclass(frozen=True)
class Branches:
    """Parallel convolutions of one stride, number of groups, dtype, layout, and size of both maps.

    shared_input: all read the same channels of x, else each a slice of its own. reduce: "cat" puts
    the results side by side as channels of y, "sum" adds them. Raises ValueError, with the values,
    where branches do not go together.
    """

    problems: tuple[Problem, ...]
    shared_input: bool = True
    reduce: str = "cat"

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError("there must be at least one branch, got none")
        if self.reduce not in ("cat", "sum"):
            raise ValueError(f"reduce must be 'cat' or 'sum', got {self.reduce!r}")
        # of cached properties Dynamo takes none before Python 3.12
        sizes = [(problem.out_size(0), problem.out_size(1)) for problem in self.problems]
        if any(size != sizes[0] for size in sizes[1:]):
            raise ValueError(f"all branches must have one output size, got {sizes}")
        names = {name: name for name in ("n", "h", "w", "stride", "groups", "dtype", "layout")}
        if self.shared_input:
            names["c"] = "number of input channels"
        if self.reduce == "sum":
            names["k"] = "number of output channels"
        for name, words in names.items():
            values = [getattr(problem, name) for problem in self.problems]
            if any(value != values[0] for value in values[1:]):  # no set: symbols have no hash
                raise ValueError(f"all branches must have one {words}, got {values}")

    @property
    def first(self) -> Problem:
        return self.problems[0]

    @property
    def dtype(self) -> str:
        return self.first.dtype

    @property
    def x_channels(self) -> tuple[int, ...]:
        """The first channel of x that each branch reads, and the number of them all."""
        return _begins([problem.c for problem in self.problems], self.shared_input)

    @property
    def y_channels(self) -> tuple[int, ...]:
        """The first channel of y that each branch writes, and the number of them all."""
        return _begins([problem.k for problem in self.problems], self.reduce == "sum")

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.first.n, self.x_channels[-1], self.first.h, self.first.w

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.first.n, self.y_channels[-1], self.first.p, self.first.q

    @property
    def w_shapes(self) -> list[tuple[int, int, int, int]]:
        return [problem.w_shape for problem in self.problems]

    def adds(self, pass_: str) -> bool:
        """Whether the results of the branches are added up."""
        return {"fprop": self.reduce == "sum", "dgrad": self.shared_input, "wgrad": False}[pass_]

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(prod, (self.x_shape, self.y_shape, *self.w_shapes)))

    def apart(self, pass_: str) -> str | None:
        """Why no launch runs a pass of all branches together, with the values."""
        if len(self.problems) > MOST:
            return f"a launch runs at most {MOST} branches, got {len(self.problems)}"
        if pass_ == "dgrad" and (count := prod(self.first.stride)) > MOST_CLASSES:
            return (
                f"dgrad of branches launches one kernel per residue class of the stride, of which there are {count}: "
                f"at most {MOST_CLASSES}"
            )
        for problem in self.problems:
            # a step between pixels is one over all channels
            whole = replace(problem, c=self.x_channels[-1], k=self.y_channels[-1])
            if whole.beyond_int32:
                return whole.beyond_int32
        return None

    # ---- work
    @property
    def useful_macs(self) -> int:
        return sum(problem.useful_macs for problem in self.problems)

    @property
    def bytes(self) -> int:
        """Compulsory traffic of any pass: x, all w and y once."""
        shapes = self.x_shape, self.y_shape, *self.w_shapes
        return DTYPE_BYTES[self.first.dtype] * sum(map(prod, shapes))

    @property
    def bytes_around(self) -> dict[str, int]:
        """Of each pass the traffic that branches one by one have beside that of their convolutions:
        slices of channels that are copied before, results that are added or put side by side."""
        nbytes, count = DTYPE_BYTES[self.first.dtype], len(self.problems)
        x, y = nbytes * prod(self.x_shape), nbytes * prod(self.y_shape)
        # a slice is read and written; each sum reads two and writes one
        cut_x, cut_y = (0 if self.shared_input else 2 * x), (0 if self.reduce == "sum" else 2 * y)
        if count == 1:
            return dict.fromkeys(("fprop", "dgrad", "wgrad"), 0)
        return {
            "fprop": cut_x + (cut_y if self.reduce == "cat" else 3 * (count - 1) * y),
            "dgrad": cut_y + (3 * (count - 1) * x if self.shared_input else cut_x),
            "wgrad": cut_x + cut_y,
        }

    def key(self) -> str:
        """Readable identity: how the branches are joined, and the key of each."""
        how = f"{'shared' if self.shared_input else 'sliced'} {self.reduce}"
        return f"{how}: " + " | ".join(problem.key() for problem in self.problems)


def _begins(sizes: list[int], same: bool) -> tuple[int, ...]:
    if same:
        return *(0 for _ in sizes), sizes[0]
    return tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))
