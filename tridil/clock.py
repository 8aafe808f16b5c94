"""How long calls take on a GPU: the clock of the tuner and of the sweep. Needs Triton's driver."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch

TURNS = 64                 # calls in one CUDA graph, at most


def turns(nbytes: int, l2_bytes: int) -> int:
    """How many sets of tensors of `nbytes` take turns, so that none is found in an L2 cache of `l2_bytes`."""
    return max(1, min(-(-2 * l2_bytes // max(nbytes, 1)), TURNS))


def eager(calls: Sequence[Callable], rep: float = 50) -> tuple[float, float, float]:
    """Milliseconds of a call: first quartile, median, third quartile. Calls take turns, each with tensors of its own.

    CUDA events around every call, after the L2 cache was flushed, for about `rep` milliseconds. The host's time shows where it is longer than the
    flush: what one call costs that waits for nothing else.
    """
    from triton.testing import do_bench
    order = cycle(calls)
    return tuple(do_bench(lambda: next(order)(), warmup=rep / 5, rep=rep, quantiles=(0.25, 0.5, 0.75)))


def graph(calls: Sequence[Callable], rep: float = 50) -> tuple[float, float, float]:
    """The same by replays of one CUDA graph of all calls: the device's time alone. Raises RuntimeError where a call cannot be captured."""
    from triton.testing import do_bench
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                             # compiled and warmed up outside of the capture
        for call in calls:
            call()
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):          # other threads may compile
        for call in calls:
            call()
    return tuple(ms / len(calls) for ms in do_bench(captured.replay, warmup=rep / 5, rep=rep, quantiles=(0.25, 0.5, 0.75)))


def device(calls: Sequence[Callable], rep: float = 50) -> tuple[tuple[float, float, float], str]:
    """(quartiles, "graph"), or by events, "events", where the calls cannot be captured."""
    try:
        return graph(calls, rep), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return eager(calls, rep), "events"
