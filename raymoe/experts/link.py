"""The way from host memory to slots.

A link moves one expert at a time, in pieces, so that an urgent load can overtake a prefetch between two of them.
``MemoryLink`` is a plain copy; ``EmulatedLink`` makes each transfer last as long as a slow bus would, without burning
CPU. Emulation is for tests and benchmarks only and is reported as such wherever a device is described.
"""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors

PIECE_BYTES = 1 << 20  # of a copy; at 10 GB/s an urgent load waits 0.1 ms for the piece in hand
EMULATED_PIECES = 2  # of an imitated transfer; more would measure how fast threads wake up


class Link(Protocol):
    """Moves an expert's tensors into a slot's."""

    emulated: bool

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        """Copy ``source`` into ``target`` (same names and shapes), a piece per step; exhausted when it is usable."""
        ...


class MemoryLink:
    """A copy at the speed of memory."""

    emulated = False

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        """Copy ``source`` into ``target``."""
        parts = [part for name, tensor in target.items() for part in in_parts(source[name], tensor)]
        for number, (piece, place) in enumerate(parts):
            if number:
                yield
            place.copy_(piece)


def in_parts(source: torch.Tensor, target: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in matching pieces of at most about ``PIECE_BYTES``."""
    if target.nbytes <= PIECE_BYTES or target.dim() == 0:
        return [(source, target)]
    rows = max(1, target.shape[0] * PIECE_BYTES // target.nbytes)
    return list(zip(source.split(rows), target.split(rows), strict=True))


class EmulatedLink:
    """A copy that takes ``latency_s + nbytes / bytes_per_s``, one transfer at a time.

    The bus goes on by itself: a transfer begins when it was asked for or when the one before ended, however late
    the thread that imitates it wakes up.

    Args:
        host_s: imitated seconds of computing one expert on the host; None where the host never does.
        clock, sleep: injected for tests.
        move: copies one tensor to where it belongs; a GPU's needs a stream of its own.
    """

    emulated = True

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float,
        host_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
        move: Callable[[torch.Tensor, torch.Tensor], object] = lambda source, target: target.copy_(source),
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.host_s = host_s
        self._clock = clock
        self._sleep = sleep
        self._move = move
        self._free_at = 0.0

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        """Copy ``source`` into ``target``; exhausted when an imitated bus would have finished."""
        return self._pieces(source, target, nbytes, self._clock())

    def _pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, asked_s: float) -> Iterator[None]:
        piece_s = (self.latency_s + nbytes / self.bytes_per_s) / EMULATED_PIECES
        for number in range(EMULATED_PIECES):
            if number:
                yield
            self._free_at = max(asked_s, self._free_at) + piece_s
            if number == 0:
                for name, tensor in target.items():
                    self._move(source[name], tensor)
            self.until(self._free_at)

    def until(self, time_s: float) -> None:
        """Sleep until the clock shows ``time_s``."""
        remaining = time_s - self._clock()
        if remaining > 0:
            self._sleep(remaining)
