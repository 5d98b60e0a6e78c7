"""The copy stream of a GPU: one queue of transfers beside the computing, ordered against it by events alone."""

import contextlib
import ctypes
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from raymoe.experts.packing import PackedExpert

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

    def copy(self, source: PackedExpert, target: PackedExpert, start: int, end: int) -> None:
        """Enqueue a copy of these elements from host memory."""
        ...

    @property
    def native(self) -> tuple[int, int] | None:
        """For who enqueues copies without Python: the address of a function (target, source, bytes, stream) that
        returns 0, and the stream's; None where there is none."""
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
    """``CopyStream`` of a CUDA device. Sources in pinned memory are read by the device; others pass a pinned ring.

    Copies from pinned memory go to the driver as they are: through torch each would cost the host three times as much,
    most of it to make this stream the current one and back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._handle = self._stream.cuda_stream
        self._driver = CudaDriver()
        self._ring: list[torch.Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._next = 0

    def copy(self, source: PackedExpert, target: PackedExpert, start: int, end: int) -> None:
        """Enqueue one copy."""
        if source.is_pinned:
            offset, size = start * source.itemsize, (end - start) * source.itemsize
            if self._driver.copy(target.address + offset, source.address + offset, size, self._handle):
                return
        with torch.cuda.stream(self._stream):
            if source.is_pinned:  # the driver refuses what torch prepares: another device, or a thread new to this one
                target.flat[start:end].copy_(source.flat[start:end], non_blocking=True)
            else:
                self._through_ring(source.flat[start:end].view(torch.uint8), target.flat[start:end].view(torch.uint8))

    @property
    def native(self) -> tuple[int, int] | None:
        """The driver's own."""
        address = self._driver.address
        return None if address is None else (address, self._handle)

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
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def compute_after(self, mark: Any) -> None:
        """Let the stream that computes wait."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def synchronize(self) -> None:
        """Wait on the host."""
        self._stream.synchronize()


class CudaDriver:
    """The one call of CUDA's driver that torch has no short way to."""

    def __init__(self) -> None:
        self._copy: Any = None
        with contextlib.suppress(OSError):
            self._copy = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuMemcpyHtoDAsync_v2
            self._copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    @property
    def address(self) -> int | None:
        """Of the copying function."""
        return None if self._copy is None else ctypes.cast(self._copy, ctypes.c_void_p).value

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> bool:
        """Enqueue a copy from pinned host memory; whether the driver took it. It does for the thread's own device."""
        return self._copy is not None and self._copy(target, source, nbytes, stream) == 0


def read_clock(stream: CopyStream) -> Clock:
    """Relate a device's time to the host's; waits for copies in flight."""
    stream.synchronize()
    mark = stream.mark()
    stream.synchronize()
    return Clock(mark, time.perf_counter())
