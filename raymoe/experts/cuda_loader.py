"""Loads on a GPU: whole experts over one copy stream, urgent ones at once, prefetches in pieces that these overtake.

A copy that has been enqueued can't be overtaken, whatever priority its stream has: copy engines serve in order. So of
prefetches only a few pieces are enqueued at a time, and the others follow as those are done. Nobody is woken up for it:
whoever waits for the device calls ``pump`` meanwhile, and so does every question about a load.

To enqueue a copy takes the host some 5 microseconds, an event 4 to 7. So only some loads are timed, and computing waits
for the last of several.

Most is asked by the engine's thread, but whoever looks at a worker, or takes experts from it, asks as well.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.errors import LoadCancelledError
from raymoe.experts.cuda_stream import Clock, CopyStream, Mark, read_clock
from raymoe.experts.loader import ON_DEMAND
from raymoe.experts.packing import PackedExpert

PIECE_BYTES = 5 << 20  # of a prefetch: 97% of a PCIe 5 link's peak, and 0.1 ms that an urgent load may have to wait
WINDOW = 2  # pieces enqueued: 0.2 ms of that link, longer than whoever pumps does anything else
TIMED_EVERY = 32  # loads; all of them while somebody looks


@dataclass(slots=True, eq=False)
class CudaTicket:
    """A load: computing waits for it on the device, or, with ``land``, the host.

    Attributes:
        is_timed: whether its beginning is marked.
        offset: elements enqueued so far; None before it began.
        began, ended: where its copies lie in the stream, once they are enqueued; place: the number of its end there.
    """

    loader: "CudaLoader"
    source: PackedExpert
    target: PackedExpert
    is_timed: bool
    offset: int | None = None
    began: Mark | None = None
    ended: Mark | None = None
    place: int = 0
    error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether the device has done all of it, or it was given up."""
        self.loader.pump()
        return self.error is not None or (self.ended is not None and self.ended.query())

    def wait(self, timeout_s: float) -> None:
        """Make computing enqueued from now on wait for it."""
        self.hurry()
        if self.ended is not None:
            self.loader.let_wait(self.ended, self.place)

    def land(self, timeout_s: float) -> None:
        """Wait on the host, and let prefetches follow meanwhile."""
        self.hurry()
        deadline_s = time.monotonic() + timeout_s
        while not self.is_done():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"an expert was not loaded within {timeout_s:g} s")

    def hurry(self) -> None:
        """Enqueue what is left of it before all other prefetches."""
        self.loader.enqueue(self)

    def cancel(self) -> None:
        """Enqueue no more of it. Its slot is free at once: later copies come after those under way."""
        self.loader.give_up(self)

    def link_s(self) -> float | None:
        """Seconds between its first copy's beginning and its last one's end on the device."""
        if self.began is None or self.ended is None or not self.ended.query():
            return None
        return self.began.elapsed_time(self.ended) / 1e3

    def span_s(self) -> tuple[float, float] | None:
        """When that was by the host's clock; None where clocks were not compared before."""
        clock, link_s = self.loader.clock, self.link_s()
        if clock is None or link_s is None or self.began is None:
            return None
        begin_s = clock.at_s + clock.mark.elapsed_time(self.began) / 1e3
        return begin_s, begin_s + link_s


class CudaLoader:
    """A ``Loader`` over a copy stream.

    Attributes:
        follows_host: the host has seen the end of whatever computed in the slots that it gives to loads, so copies need
            not wait for computing under way. Otherwise they do, on the device.
        clock: relates the device's time to the host's; None where nobody looks.
    """

    prefetches = 4

    def __init__(self, stream: CopyStream, piece_bytes: int = PIECE_BYTES) -> None:
        self.stream = stream
        self.on_idle: Callable[[], None] = lambda: None
        self.follows_host = False
        self.clock: Clock | None = None
        self._piece_bytes = piece_bytes
        self._queue: deque[CudaTicket] = deque()
        self._under_way: deque[Mark] = deque()
        self._untimed = TIMED_EVERY - 1  # loads since one was timed
        self._lock = threading.RLock()
        self._places = 0
        self._waited = 0  # the place in the stream that computing waits for already

    def follow_host(self, on: bool) -> None:
        """Set ``follows_host``. Of a step that is enqueued afterwards no copy waits any more, whoever enqueues it."""
        with self._lock:
            self.follows_host = on

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> CudaTicket:
        """Begin a load: all of it now, or, ahead of need, when the link has room for it."""
        assert isinstance(source, PackedExpert) and isinstance(target, PackedExpert), "experts move in one piece"
        with self._lock:
            timed = self.clock is not None or self._is_timing_due
            self._untimed = 0 if timed else self._untimed + 1
            ticket = CudaTicket(self, source, target, timed)
            if priority == ON_DEMAND:
                self.enqueue(ticket)
            else:
                self._queue.append(ticket)
                self.pump()
            return ticket

    @property
    def _is_timing_due(self) -> bool:
        return self._untimed >= TIMED_EVERY - 1

    @property
    def native(self) -> tuple[int, int] | None:
        """As the stream's, while the next load need not be timed, nor wait for computing."""
        if self.clock is not None or self._is_timing_due or not self.follows_host:
            return None
        return self.stream.native

    def adopt(self, source: PackedExpert, target: PackedExpert) -> CudaTicket:
        """A load whose copy somebody else has just enqueued."""
        with self._lock:
            self._untimed += 1
            ticket = CudaTicket(self, source, target, is_timed=False, offset=source.numel)
            self._end(ticket)
            return ticket

    def pump(self) -> None:
        """Enqueue pieces of prefetches as far as there is room. Never waits."""
        with self._lock:
            while self._under_way and self._under_way[0].query():
                self._under_way.popleft()
            while self._queue and len(self._under_way) < WINDOW:
                ticket = self._queue[0]
                self._advance(ticket, max(1, self._piece_bytes // ticket.source.itemsize))
                mark = ticket.ended
                if mark is not None:
                    self._queue.popleft()
                self._under_way.append(mark or self.stream.mark())

    def enqueue(self, ticket: CudaTicket) -> None:
        """All that is left of a load, now."""
        with self._lock:
            if ticket.ended is None and ticket.error is None:
                self._forget(ticket)
                self._advance(ticket, ticket.source.numel)

    def give_up(self, ticket: CudaTicket) -> None:
        """Enqueue no more of a load."""
        with self._lock:
            if ticket.ended is None and ticket.error is None:
                ticket.error = LoadCancelledError("the load was cancelled")
                self._forget(ticket)

    def _forget(self, ticket: CudaTicket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)

    def let_wait(self, mark: Mark, place: int) -> None:
        """Computing waits for this place in the stream, unless it waits for a later one already."""
        with self._lock:
            if place > self._waited:
                self._waited = place
                self.stream.compute_after(mark)

    def _advance(self, ticket: CudaTicket, elements: int) -> None:
        """Enqueue so many more elements of a load."""
        size = ticket.source.numel
        if ticket.offset is None:
            if not self.follows_host:
                self.stream.after_compute()
            ticket.offset = 0
            if ticket.is_timed:
                ticket.began = self.stream.mark()
        start, end = ticket.offset, min(size, ticket.offset + elements)
        self.stream.copy(ticket.source, ticket.target, start, end)
        ticket.offset = end
        if end == size:
            self._end(ticket)

    def _end(self, ticket: CudaTicket) -> None:
        """The last copy of a load is enqueued."""
        ticket.ended = self.stream.mark()
        self._places += 1
        ticket.place = self._places

    def watch(self, on: bool) -> None:
        """While on, every load is timed, and the device's time related to the host's."""
        self.clock = read_clock(self.stream) if on else None  # outside the lock, for it waits for the stream

    def close(self) -> None:
        """Wait for copies in flight."""
        with self._lock:
            self._queue.clear()
        self.stream.synchronize()
