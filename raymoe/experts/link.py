"""The way from host memory to slots.

A link moves one expert at a time. ``MemoryLink`` is a plain copy; ``EmulatedLink`` makes each transfer last as
long as a slow bus would, without burning CPU. Emulation is for tests and benchmarks only and is reported as
such wherever a device is described.
"""

import time
from collections.abc import Callable
from typing import Protocol

from raymoe.checkpoint.checkpoint import ExpertTensors


class Link(Protocol):
    """Moves an expert's tensors into a slot's; returns when they are usable."""

    emulated: bool

    def transfer(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
        """Copy ``source`` into ``target`` (same names and shapes)."""
        ...


class MemoryLink:
    """A copy at the speed of memory."""

    emulated = False

    def transfer(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
        """Copy ``source`` into ``target``."""
        for name, tensor in target.items():
            tensor.copy_(source[name])


class EmulatedLink:
    """A copy that takes ``latency_s + nbytes / bytes_per_s``, one transfer at a time.

    The deadline counts from the later of "now" and the end of the transfer before, so that sleeping too long
    once does not slow the link down for good.

    Args:
        clock, sleep: injected for tests.
    """

    emulated = True

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0

    def transfer(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
        """Copy ``source`` into ``target`` and return when an imitated bus would have finished."""
        self._free_at = max(self._clock(), self._free_at) + self.latency_s + nbytes / self.bytes_per_s
        for name, tensor in target.items():
            tensor.copy_(source[name])
        remaining = self._free_at - self._clock()
        if remaining > 0:
            self._sleep(remaining)
