"""What loading and host computing cost lately: means over the last few measurements."""

from collections import deque

REMEMBERED = 16  # measurements; enough to smooth a wake-up that came late, few enough to follow a link that changed


class Cost:
    """Mean seconds of one task; ``known_s`` where nothing was measured yet."""

    def __init__(self, known_s: float | None = None) -> None:
        self._known_s = known_s
        self._measured: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, seconds: float) -> None:
        """One task took so long."""
        self._measured.append(seconds)

    @property
    def mean_s(self) -> float | None:
        """Mean, or None where nothing is known."""
        if not self._measured:
            return self._known_s
        return sum(self._measured) / len(self._measured)
