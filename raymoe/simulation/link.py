"""A link of a simulated device: a ``Loader`` whose loads end when simulated time has come.

As the real one it moves one expert at a time, in pieces, the urgent ones first: a load on demand overtakes a prefetch
between two pieces, and so does the end of a load that was cancelled.
"""

import heapq
import math
from collections.abc import Callable
from typing import Any

from raymoe.errors import LoadCancelledError
from raymoe.experts.loader import CANCELLED, ON_DEMAND
from raymoe.simulation.loop import EventLoop

PIECES = 2  # of a transfer, as of an emulated link's; a real one has more, so that urgent loads wait for less
TINY = 1e-12  # of a load; less is no piece but a rounding error


class SimTicket:
    """One load. See ``raymoe.experts.loader.Ticket``."""

    __slots__ = ("_link", "began_s", "cancelled", "done", "ended_s", "error", "left_s", "number", "priority")

    def __init__(self, link: "SimLink", left_s: float, priority: int, number: int) -> None:
        self.error: BaseException | None = None
        self.done = self.cancelled = False
        self.left_s, self.priority, self.number = left_s, priority, number
        self.began_s: float | None = None
        self.ended_s = 0.0
        self._link = link

    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.done

    def wait(self, timeout_s: float) -> None:
        """Let simulated time go on until it has ended. Raises TimeoutError where it never does."""
        if not self._link.loop.run(self.is_done):
            raise TimeoutError("nothing is left to simulate, and a load has not ended")

    def land(self, timeout_s: float) -> None:
        """The same."""
        self.wait(timeout_s)

    def hurry(self) -> None:
        """Overtake prefetches from the next piece on."""
        if self.priority > ON_DEMAND:
            self.priority = ON_DEMAND
            self._link.put(self)

    def cancel(self) -> None:
        """End before the next piece."""
        if not self.cancelled:
            self.cancelled, self.priority = True, CANCELLED
            self._link.put(self)

    def link_s(self) -> float | None:
        """What it would have taken on a link of its own."""
        return self._link.load_s if self.done and self.error is None else None

    def span_s(self) -> tuple[float, float] | None:
        """From its beginning to its end."""
        return (self.began_s, self.ended_s) if self.done and self.began_s is not None else None


class SimLink:
    """Moves experts, each in ``load_s`` seconds. See ``raymoe.experts.loader.Loader``.

    Attributes:
        on_idle: as a loader's; on_ended: called after each load, well ended or not.
        busy_s: seconds in use by loads that are over; loads: how many ended well.
    """

    prefetches = 1

    def __init__(self, loop: EventLoop, load_s: float, pieces: int = PIECES) -> None:
        self.loop = loop
        self.load_s = load_s
        self.busy_s = 0.0
        self.loads = 0
        self.on_idle: Callable[[], None] = lambda: None
        self.on_ended: Callable[[], None] = lambda: None
        self._piece_s = load_s / pieces
        self._queue: list[tuple[int, int, SimTicket]] = []
        self._current: SimTicket | None = None
        self._since_s = 0.0
        self._turn = 0  # events of an earlier turn are void
        self._number = 0

    def start(self, source: Any, target: Any, nbytes: int, priority: int) -> SimTicket:
        """Begin a load."""
        self._number += 1
        ticket = SimTicket(self, self.load_s, priority, self._number)
        self.put(ticket)
        return ticket

    def watch(self, on: bool) -> None:
        """Nothing: there is one clock."""

    def close(self) -> None:
        """Nothing."""

    def used_s(self) -> float:
        """Seconds in use so far, with the load under way."""
        return self.busy_s + (self.loop.now_s - self._since_s if self._current is not None else 0.0)

    def put(self, ticket: SimTicket) -> None:
        """A load waits for its turn, or has become more urgent."""
        if ticket.done:
            return
        if ticket is not self._current:
            heapq.heappush(self._queue, (ticket.priority, ticket.number, ticket))
        if self._current is None:
            self._go_on()
        else:
            self._give_way(self._current)

    def _give_way(self, current: SimTicket) -> None:
        """Stop what is under way at the end of its piece, where something is more urgent or it was cancelled."""
        if not current.cancelled and (not self._queue or self._queue[0][0] >= current.priority):
            return
        done_s = self.load_s - current.left_s
        moved_s = done_s + self.loop.now_s - self._since_s
        pieces = math.ceil(moved_s / self._piece_s - TINY) if self._piece_s else 0
        stop_s = pieces * self._piece_s - done_s
        if stop_s < current.left_s - TINY * self.load_s:  # else it is its last piece
            self._turn += 1
            self.loop.at(self._since_s + stop_s, self._stop, self._turn)

    def _stop(self, turn: int) -> None:
        current = self._current
        if turn != self._turn or current is None:
            return
        self._count(current)
        self._current = None
        heapq.heappush(self._queue, (current.priority, current.number, current))
        self._go_on()

    def _go_on(self) -> None:
        """Begin the most urgent load."""
        stale = False
        while self._queue and self._current is None:
            priority, _, ticket = heapq.heappop(self._queue)
            if ticket.done or ticket.priority != priority:
                stale = True  # queued twice
                continue
            if ticket.cancelled:
                ticket.error = LoadCancelledError("the load was cancelled")
                ticket.done, ticket.ended_s = True, self.loop.now_s
                self.loop.at(self.loop.now_s, self._tell, True)  # whoever asked for this holds a lock
                continue
            self._current, self._since_s = ticket, self.loop.now_s
            if ticket.began_s is None:
                ticket.began_s = self.loop.now_s
            self._turn += 1
            self.loop.at(self.loop.now_s + ticket.left_s, self._arrived, self._turn)
        if stale and self._current is None:
            self.loop.at(self.loop.now_s, self._tell, False)

    def _arrived(self, turn: int) -> None:
        ticket = self._current
        if turn != self._turn or ticket is None:
            return
        self._count(ticket)
        self._current = None
        self.loads += 1
        ticket.done, ticket.ended_s = True, self.loop.now_s
        self._tell(ticket.cancelled)
        self._go_on()

    def _count(self, ticket: SimTicket) -> None:
        spent_s = self.loop.now_s - self._since_s
        ticket.left_s -= spent_s
        self.busy_s += spent_s

    def _tell(self, is_cancelled: bool) -> None:
        """A load has ended."""
        if is_cancelled or not self._queue:
            self.on_idle()
        self.on_ended()
