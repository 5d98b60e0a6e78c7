"""Times on a GPU, by its own events."""

from collections.abc import Callable

import torch


def seconds(work: Callable[[int], object], count: int) -> float:
    """Mean of ``count`` enqueued calls, on the current stream."""
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for number in range(count):
        work(number)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count / 1e3


def graphed(work: Callable[[int], object], count: int = 16, replays: int = 10) -> float:
    """The same of calls in one captured graph, so that the host's part in them does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(2):
            work(number)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for number in range(count):
            work(number)
        graph.capture_end()
        graph.replay()
        return seconds(lambda _: graph.replay(), replays) / count
