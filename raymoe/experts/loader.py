"""Loads in flight: a thread that moves experts over the link, the urgent ones first.

On a CPU (and an emulated link) the loader is a thread of its own, so that computing goes on meanwhile; compute
waits for its own experts only. ``CudaLoader`` is the same on a copy stream with events.
"""

import itertools
import queue
import threading
from dataclasses import dataclass, field
from typing import Protocol

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.link import Link

ON_DEMAND, PREFETCH = 0, 1


class Ticket(Protocol):
    """One load in flight; ``error`` says why it failed, once it is done."""

    error: BaseException | None

    def is_done(self) -> bool:
        """Whether the load has ended, well or not, without waiting."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when the load has ended. Raises TimeoutError where it takes too long."""
        ...


class Loader(Protocol):
    """Starts loads; they finish by themselves."""

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> Ticket:
        """Begin to move ``source`` into ``target``."""
        ...

    def close(self) -> None:
        """Stop after the load in hand."""
        ...


@dataclass(slots=True)
class ThreadTicket:
    """A load on the loader's thread."""

    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether the thread is through with it."""
        return self.done.is_set()

    def wait(self, timeout_s: float) -> None:
        """Wait until loaded."""
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"an expert was not loaded within {timeout_s:g} s")


class ThreadLoader:
    """One thread, one link, a queue by priority then arrival."""

    def __init__(self, link: Link, name: str) -> None:
        self._link = link
        self._order = itertools.count()
        self._queue: queue.PriorityQueue = queue.PriorityQueue()
        self._thread = threading.Thread(target=self._run, name=f"loader-{name}", daemon=True)
        self._thread.start()

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> ThreadTicket:
        """Queue one load."""
        ticket = ThreadTicket()
        self._queue.put((priority, next(self._order), (source, target, nbytes, ticket)))
        return ticket

    def close(self) -> None:
        """Stop the thread after what is queued now."""
        self._queue.put((PREFETCH + 1, next(self._order), None))
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while (item := self._queue.get()[2]) is not None:
            source, target, nbytes, ticket = item
            try:
                self._link.transfer(source, target, nbytes)
            except BaseException as error:  # handed to whoever waits for this expert
                ticket.error = error
            ticket.done.set()


@dataclass(slots=True)
class CudaTicket:
    """A load on the copy stream: computing waits on the device, the host does not."""

    event: torch.cuda.Event
    stream_of: torch.device
    error: BaseException | None = None

    def is_done(self) -> bool:
        """Whether the copy has happened on the device."""
        return self.event.query()

    def wait(self, timeout_s: float) -> None:
        """Make the current stream wait for the copy."""
        torch.cuda.current_stream(self.stream_of).wait_event(self.event)


class CudaLoader:
    """Copies from pinned host memory on streams of its own; on-demand loads go before prefetches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self._streams = {
            ON_DEMAND: torch.cuda.Stream(device, priority=greatest),
            PREFETCH: torch.cuda.Stream(device, priority=least),
        }

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> CudaTicket:
        """Enqueue one load after whatever still computes in the slot."""
        stream = self._streams[priority]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for name, tensor in target.items():
                tensor.copy_(source[name], non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return CudaTicket(event, self._device)

    def close(self) -> None:
        """Wait for copies in flight."""
        for stream in self._streams.values():
            stream.synchronize()
