"""How long calls take on a GPU: the clock of the tuner and of the sweep. Needs Triton's driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import numpy as np
import torch

TURNS = 64  # calls in one CUDA graph, at most


def turns(nbytes: int, l2_bytes: int) -> int:
    """How many sets of tensors of `nbytes` take turns, so that none is found in an L2 cache of
    `l2_bytes`."""
    return max(1, min(-(-2 * l2_bytes // max(nbytes, 1)), TURNS))


def eager(calls: Sequence[Callable[[], object]], rep: float = 50) -> tuple[float, float, float]:
    """Milliseconds of a call: first quartile, median, third quartile. Calls take turns, each with
    tensors of its own.

    CUDA events around every call, after the L2 cache was flushed, for about `rep` milliseconds. The
    host's time shows where it is longer than the flush: what one call costs that waits for nothing
    else.
    """
    from triton.testing import do_bench

    order = cycle(calls)
    return tuple(
        do_bench(lambda: next(order)(), warmup=rep / 5, rep=rep, quantiles=(0.25, 0.5, 0.75))
    )


def graph(calls: Sequence[Callable[[], object]], rep: float = 50) -> tuple[float, float, float]:
    """The same by replays of one CUDA graph of all calls: the device's time alone, since the graph
    itself holds the events and a host that is slow to launch it, as while other threads compile,
    changes nothing. Raises RuntimeError where that cannot be captured."""
    begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # compiled and warmed up outside of the capture
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    captured = torch.cuda.CUDAGraph()
    # other threads may compile
    with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
        begin.record()
        for call in calls:
            call()
        end.record()

    def replays(milliseconds: float) -> list[float]:
        times: list[float] = []
        while len(times) < 3 or sum(times) < milliseconds:
            captured.replay()
            torch.cuda.current_stream().synchronize()
            times.append(begin.elapsed_time(end))
        return times

    replays(rep / 5)  # clocks rise
    return tuple(np.quantile(replays(rep), (0.25, 0.5, 0.75)) / len(calls))


def device(
    calls: Sequence[Callable[[], object]], rep: float = 50
) -> tuple[tuple[float, float, float], str]:
    """(quartiles, "graph"), or by events, "events", where the calls cannot be captured."""
    try:
        return graph(calls, rep), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return eager(calls, rep), "events"
