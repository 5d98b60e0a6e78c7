"""The clock of a simulation: events in order of time, those of one moment in the order in which they were planned."""

import heapq
from collections.abc import Callable
from typing import Any


class EventLoop:
    """Runs what is planned, and nothing else; the same plans give the same run.

    Attributes:
        now_s: simulated seconds since the beginning.
        events: how many were run.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._planned = 0

    def clock(self) -> float:
        """``now_s``, for those who ask for a function."""
        return self.now_s

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call ``action`` at a time that has not passed."""
        self._planned += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._planned, action, arguments))

    def run(self, is_over: Callable[[], bool]) -> bool:
        """Go on until it is over; False where there is nothing left to do before."""
        while not is_over():
            if not self._queue:
                return False
            self.now_s, _, action, arguments = heapq.heappop(self._queue)
            self.events += 1
            action(*arguments)
        return True


class Lane:
    """Something that serves one after the other, as they come: one direction of a network interface, a processor.

    Attributes:
        free_s: when it is done with all it was given.
        busy_s: seconds of work so far.
    """

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = 0.0
        self.busy_s = 0.0

    def take(self, ready_s: float, takes_s: float) -> float:
        """When work is done that can begin at ``ready_s`` and takes so long. Calls come in order of time."""
        self.free_s = max(self.free_s, ready_s) + takes_s
        self.busy_s += takes_s
        return self.free_s
