"""A copy stream whose copies end when a link of given rate and latency would have moved them. Emulated, for comparison
with the real link: nothing else differs, the loader and its decisions are those of a GPU."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from raymoe.experts.cuda_loader import CudaLoader
from raymoe.experts.cuda_stream import Mark
from raymoe.experts.packing import PackedExpert

COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
Fill = Callable[[int, int], object]
"""Puts something into a slot: address, bytes; in far less time than the link that is imitated."""


@dataclass(frozen=True, slots=True)
class EmulatedMark:
    """Passed at a time known beforehand."""

    at_s: float
    clock: Callable[[], float]

    def query(self) -> bool:
        """Whether it is time."""
        return self.clock() >= self.at_s

    def elapsed_time(self, end: "EmulatedMark") -> float:
        """Milliseconds."""
        return 1e3 * (end.at_s - self.at_s)


class EmulatedStream:
    """``CopyStream`` over a link that is imitated: it moves one copy at a time, for as long as its bytes take."""

    def __init__(
        self, bytes_per_s: float, latency_s: float, fill: Fill, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._fill = fill
        self._clock = clock
        self._free_s = 0.0
        self._own_copy = COPY(self._copy)

    @property
    def native(self) -> tuple[int, int] | None:
        """A function of this object's."""
        return ctypes.cast(self._own_copy, ctypes.c_void_p).value or 0, 0

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self._fill(target, nbytes)
        self._move(nbytes)
        return 0

    def _move(self, nbytes: int) -> None:
        self._free_s = max(self._clock(), self._free_s) + self._latency_s + nbytes / self._bytes_per_s

    def copy(self, source: PackedExpert, target: PackedExpert, start: int, end: int) -> None:
        """Begins when the one before has ended."""
        nbytes = (end - start) * source.itemsize
        self._fill(target.address + start * source.itemsize, nbytes)
        self._move(nbytes)

    def mark(self) -> EmulatedMark:
        """The end of what was enqueued so far."""
        return EmulatedMark(max(self._clock(), self._free_s), self._clock)

    def after_compute(self) -> None:
        """Nothing: whoever measures has captured steps, in which the host has seen the end of computing."""

    def compute_after(self, mark: Mark) -> None:
        """The host waits, as nothing on the device could."""
        while not mark.query():
            pass

    def synchronize(self) -> None:
        """Until all copies have ended."""
        self.compute_after(self.mark())


def emulated_loader(bytes_per_s: float, latency_s: float, expert_elements: int, device: torch.device) -> CudaLoader:
    """As a GPU's, over an imitated link; what arrives comes from the device's own memory (bfloat16)."""
    stream = torch.cuda.Stream(device)
    anything = torch.zeros(expert_elements, dtype=torch.bfloat16, device=device)
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]

    def fill(target: int, nbytes: int) -> None:
        if copy(target, anything.data_ptr(), nbytes, stream.cuda_stream):
            raise RuntimeError("a copy within the device failed")

    return CudaLoader(EmulatedStream(bytes_per_s, latency_s, fill))
