"""Which config runs a pass of a problem, and where that choice comes from."""
from __future__ import annotations

from .config import default
from .problem import Problem

# called with no arguments whenever an answer of `resolve` may have changed: those who keep answers forget them
listeners: list = []


def resolve(problem: Problem, pass_: str, target: str, precision: str, device=None, allow_aten: bool = False) -> dict | None:
    """The config that runs one pass, or None where ATen is known to be faster (only with allow_aten).

    device: the tensors' torch.device, where a first use may be measured.
    """
    return default(problem, pass_, target, precision)
