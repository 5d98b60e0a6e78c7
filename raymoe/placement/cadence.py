"""When a layer to come will come: an estimate, from when those before it came.

Bookkeeping without a clock of its own.
"""

from collections import deque
from collections.abc import Callable
from itertools import pairwise

REMEMBERED = 32  # calls; enough to smooth a step's beginning, few enough to follow a link that changed


class Cadence:
    """Of one sequence, whose passes come to one MoE layer after the other.

    Args:
        layers: how many MoE layers a pass has.
    """

    def __init__(self, layers: int, clock: Callable[[], float]) -> None:
        self._layers = layers
        self._clock = clock
        self._calls: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)  # when, and how many layers had come before
        self._starts: deque[int] = deque(maxlen=REMEMBERED)  # first positions of passes
        self._passes = 0

    @property
    def last(self) -> tuple[int, int] | None:
        """First position of the pass under way and the layer that it has come to; None before the first one."""
        return (self._starts[-1], self._calls[-1][1] % self._layers) if self._calls else None

    def called(self, position: int, layer: int) -> None:
        """The pass that begins at a position has come to a layer."""
        if not self._starts or position != self._starts[-1]:
            self._starts.append(position)
            self._passes += 1
        self._calls.append((self._clock(), self._passes * self._layers + layer))

    def until_s(self, position: int, layer: int) -> float | None:
        """Seconds until a pass comes to a layer; None where too little came before, or only what lies behind it."""
        if len(self._calls) < self._layers:
            return None
        (first_s, first), (last_s, last) = self._calls[0], self._calls[-1]
        if last <= first:  # a sequence that begins anew
            return None
        layer_s = (last_s - first_s) / (last - first)
        ahead = self._passes_until(position) * self._layers + layer - last % self._layers
        return max(0.0, last_s + ahead * layer_s - self._clock())

    def _passes_until(self, position: int) -> int:
        """How many passes begin until then, by the positions that those before have read."""
        gap = position - self._starts[-1]
        steps = [after - before for before, after in pairwise(self._starts) if after > before]
        each = sum(steps) / len(steps) if steps else 1.0
        return max(1, round(gap / each)) if gap > 0 else 0
