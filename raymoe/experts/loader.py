"""Loads in flight: a thread that moves experts over the link, the urgent ones first.

On a CPU (and an emulated link) the loader is a thread of its own, so that computing goes on meanwhile; compute
waits for its own experts only. On a GPU ``experts.cuda_loader`` does it with a copy stream and events.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.errors import LoadCancelledError
from raymoe.experts.link import Link

log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0  # a guard against a dead loader; deadlines of calls are the client's
ON_DEMAND, PREFETCH = 0, 1
CANCELLED = ON_DEMAND - 1  # before all others, for a slot waits for its end


class Ticket(Protocol):
    """One load in flight; ``error`` says why it failed, once it is done."""

    error: BaseException | None

    def is_done(self) -> bool:
        """Whether the load has ended, well or not, without waiting."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Computing from now on finds the load ended. Raises TimeoutError where it takes too long."""
        ...

    def land(self, timeout_s: float) -> None:
        """Return when the load has ended. Raises TimeoutError where it takes too long."""
        ...

    def hurry(self) -> None:
        """Somebody waits for this load now: treat it as on demand."""
        ...

    def cancel(self) -> None:
        """Give the load up where that is still possible; it then ends with LoadCancelledError."""
        ...

    def link_s(self) -> float | None:
        """Seconds for which the link was busy with it, once done; None where that is not known yet."""
        ...

    def span_s(self) -> tuple[float, float] | None:
        """When it began and ended on the link, by ``time.perf_counter``; None where it never began or is not done."""
        ...


class Loader(Protocol):
    """Starts loads; they finish by themselves.

    Attributes:
        on_idle: to be called when nothing is left to load, or a cancelled load has ended before its time. Loaders that
            can't tell never call it.
        prefetches: loads ahead of need that may be under way at once. 1: and only while there are no others.
    """

    on_idle: Callable[[], None]
    prefetches: int

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> Ticket:
        """Begin to move ``source`` into ``target``."""
        ...

    def watch(self, on: bool) -> None:
        """While on, loads that begin can tell exactly when they took place."""
        ...

    def close(self) -> None:
        """Stop after the load in hand."""
        ...


@dataclass(slots=True, eq=False)
class ThreadTicket:
    """A load on the loader's thread."""

    pieces: Iterator[None]
    priority: int
    requeue: Callable[["ThreadTicket"], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    cancelled: bool = False
    busy_s: float = 0.0
    began_s: float | None = None
    ended_s: float = 0.0

    def is_done(self) -> bool:
        """Whether the thread is through with it."""
        return self.done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until loaded."""
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"an expert was not loaded within {timeout_s:g} s")

    def land(self, timeout_s: float) -> None:
        """The same."""
        self.wait(timeout_s)

    def hurry(self) -> None:
        """Overtake prefetches from the next piece on."""
        if self.priority > ON_DEMAND:
            self.priority = ON_DEMAND
            self.requeue(self)

    def cancel(self) -> None:
        """End it before its next piece, and before that of any other load."""
        if not self.cancelled:
            self.cancelled = True
            self.priority = CANCELLED
            self.requeue(self)

    def link_s(self) -> float | None:
        """Seconds on the link."""
        return self.busy_s if self.done.is_set() and self.error is None else None

    def span_s(self) -> tuple[float, float] | None:
        """From its first piece to its last; urgent loads may have come between."""
        return (self.began_s, self.ended_s) if self.done.is_set() and self.began_s is not None else None

    def advance(self) -> bool:
        """Move the next piece; returns whether that was all. Errors end the load, and are kept."""
        start = time.perf_counter()
        try:
            if self.cancelled:
                raise LoadCancelledError("the load was cancelled")
            if self.began_s is None:
                self.began_s = start
            next(self.pieces)
        except StopIteration:
            pass
        except BaseException as error:  # handed to whoever waits for this expert
            self.error = error
        else:
            self.busy_s += time.perf_counter() - start
            return False
        self.ended_s = time.perf_counter()
        self.busy_s += self.ended_s - start
        self.done.set()
        return True


class ThreadLoader:
    """One thread, one link, a queue by priority then arrival.

    Attributes:
        on_idle: called on the loader's thread when nothing is left to load, and after each cancelled load.
    """

    prefetches = 1

    def __init__(self, link: Link, name: str) -> None:
        self.on_idle: Callable[[], None] = lambda: None
        self._link = link
        self._order = itertools.count()
        self._queue: queue.PriorityQueue[tuple[int, int, ThreadTicket | None]] = queue.PriorityQueue()
        self._thread = threading.Thread(target=self._run, name=f"loader-{name}", daemon=True)
        self._thread.start()

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> ThreadTicket:
        """Queue one load."""
        ticket = ThreadTicket(self._link.pieces(source, target, nbytes), priority, self._put)
        self._put(ticket)
        return ticket

    def watch(self, on: bool) -> None:
        """Nothing: the thread reads the clock itself."""

    def close(self) -> None:
        """Stop the thread after what is queued now."""
        self._queue.put((PREFETCH + 1, next(self._order), None))
        self._thread.join(timeout=5)

    def _put(self, ticket: ThreadTicket) -> None:
        self._queue.put((ticket.priority, next(self._order), ticket))

    def _run(self) -> None:
        while True:
            _, order, ticket = self._queue.get()
            if ticket is None:
                return
            # one that had to hurry was queued twice, and may be done by now
            if not ticket.is_done() and not ticket.advance():
                self._queue.put((ticket.priority, order, ticket))  # after each piece, so that urgent loads overtake
            elif ticket.cancelled or self._queue.empty():
                try:
                    self.on_idle()
                except Exception:  # loads must go on
                    log.exception("no prefetch could be begun")
