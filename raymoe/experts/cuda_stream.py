"""The copy stream of a GPU: one queue of transfers beside the computing, ordered against it by events alone."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

STAGING_BYTES = 8 << 20  # per buffer of the ring: at half the speed of memory, a millisecond of copying by the host
STAGING_BUFFERS = 3  # one is filled while one is sent, and one is waited for


class Mark(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether the device has come by."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to ``end``; both must have been passed."""
        ...


class CopyStream(Protocol):
    """What a loader needs of a device."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue a copy from host memory; both are flat and of one size."""
        ...

    def batch(self) -> AbstractContextManager[None]:
        """While entered, nobody else uses the device from this thread, so that several copies cost less."""
        ...

    def mark(self) -> Mark:
        """Enqueue a mark."""
        ...

    def after_compute(self) -> None:
        """Copies from here on wait for all computing enqueued so far."""
        ...

    def compute_after(self, mark: Mark) -> None:
        """Computing enqueued from here on waits for a mark."""
        ...

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        ...


@dataclass(frozen=True, slots=True)
class Clock:
    """A mark on a device, and when it was passed by ``time.perf_counter``."""

    mark: Mark
    at_s: float


class CudaCopyStream:
    """``CopyStream`` of a CUDA device. Sources in pinned memory are read by the device; others pass a pinned ring."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._computing: torch.cuda.Stream | None = None  # while this is the current stream: the one that was
        self._ring: list[torch.Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._next = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue one copy."""
        if self._computing is None:
            with self.batch():
                self.copy(source, target)
        elif source.is_pinned():
            target.copy_(source, non_blocking=True)
        else:
            self._through_ring(source.view(torch.uint8), target.view(torch.uint8))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make this the current stream; what computes is remembered. May be entered again within itself."""
        if self._computing is not None:
            yield
            return
        self._computing = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._computing = None

    def _through_ring(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not self._ring:
            self._ring = [torch.empty(STAGING_BYTES, dtype=torch.uint8).pin_memory() for _ in range(STAGING_BUFFERS)]
            self._sent = [torch.cuda.Event() for _ in self._ring]
        for part, place in zip(source.split(STAGING_BYTES), target.split(STAGING_BYTES), strict=True):
            buffer, sent = self._ring[self._next], self._sent[self._next]
            self._next = (self._next + 1) % len(self._ring)
            sent.synchronize()
            buffer[: part.numel()].copy_(part)
            place.copy_(buffer[: part.numel()], non_blocking=True)
            sent.record(self._stream)

    def mark(self) -> torch.cuda.Event:
        """Enqueue a mark that can tell its time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def after_compute(self) -> None:
        """Wait, on the device, for the stream that computes."""
        self._stream.wait_stream(self._computing or torch.cuda.current_stream(self._device))

    def compute_after(self, mark: Any) -> None:
        """Let the stream that computes wait."""
        (self._computing or torch.cuda.current_stream(self._device)).wait_event(mark)

    def synchronize(self) -> None:
        """Wait on the host."""
        self._stream.synchronize()


def read_clock(stream: CopyStream) -> Clock:
    """Relate a device's time to the host's; waits for copies in flight."""
    stream.synchronize()
    mark = stream.mark()
    stream.synchronize()
    return Clock(mark, time.perf_counter())
