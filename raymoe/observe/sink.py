"""What the engine tells of its work while it works. Knows no Ray: who listens is the affair of whoever wires it up.

Called on the hot path, so a call costs a dictionary look-up or less; sums and rates are made by whoever reads.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

Number = TypeVar("Number", int, float)
MOST_REMEMBERED = 4096  # observations between two takes: some minutes' worth where nobody takes them


class Sink(Protocol):
    """Told by the engine's thread, but for ``submitted``, which comes from any."""

    def submitted(self, request: int) -> None:
        """A request was queued."""
        ...

    def admitted(self, request: int) -> None:
        """It has left the queue."""
        ...

    def token(self, request: int) -> None:
        """It has one more token."""
        ...

    def ended(self, request: int) -> None:
        """It is over, in whatever way. Unknown ones are ignored."""
        ...

    def step(self, rows: int) -> None:
        """A decode step of so many requests is about to begin."""
        ...


class Silent:
    """Nobody listens."""

    def submitted(self, request: int) -> None:
        """Nothing."""

    def admitted(self, request: int) -> None:
        """Nothing."""

    def token(self, request: int) -> None:
        """Nothing."""

    def ended(self, request: int) -> None:
        """Nothing."""

    def step(self, rows: int) -> None:
        """Nothing."""


@dataclass(slots=True)
class _Times:
    """Of one request; None for what has not happened yet."""

    submitted_s: float
    admitted_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What was observed since the last take.

    Attributes:
        queue_s: from being queued to being admitted; ttft_s: to the first token; duration_s: to the end.
        tpot_s: mean time between the tokens of one request, for those of two or more.
        rows: of each decode step.
    """

    queue_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()
    duration_s: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()


class Meter:
    """A sink in memory: times of requests and sizes of steps, until they are taken. Of too many, the last are kept."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: dict[int, _Times] = {}
        self._seen: dict[str, deque[float]] = {
            name: deque(maxlen=MOST_REMEMBERED) for name in ("queue_s", "ttft_s", "tpot_s", "duration_s")
        }
        self._rows: deque[int] = deque(maxlen=MOST_REMEMBERED)

    def submitted(self, request: int) -> None:
        """A request was queued."""
        self._open[request] = _Times(self._clock())

    def admitted(self, request: int) -> None:
        """It has left the queue."""
        times = self._open.get(request)
        if times is not None and times.admitted_s is None:
            times.admitted_s = self._clock()
            self._seen["queue_s"].append(times.admitted_s - times.submitted_s)

    def token(self, request: int) -> None:
        """It has one more token."""
        times = self._open.get(request)
        if times is None:
            return
        times.last_s = self._clock()
        times.tokens += 1
        if times.first_s is None:
            times.first_s = times.last_s
            self._seen["ttft_s"].append(times.first_s - times.submitted_s)

    def ended(self, request: int) -> None:
        """It is over."""
        times = self._open.pop(request, None)
        if times is None:
            return
        self._seen["duration_s"].append(self._clock() - times.submitted_s)
        if times.first_s is not None and times.tokens > 1:
            self._seen["tpot_s"].append((times.last_s - times.first_s) / (times.tokens - 1))

    def step(self, rows: int) -> None:
        """A decode step of so many requests."""
        self._rows.append(rows)

    def take(self) -> Observations:
        """What was observed since the last take."""
        seen = {name: tuple(_drained(values)) for name, values in self._seen.items()}
        return Observations(**seen, rows=tuple(_drained(self._rows)))


def _drained(values: deque[Number]) -> list[Number]:
    """Everything that is in a deque now; what another thread adds meanwhile stays."""
    return [values.popleft() for _ in range(len(values))]
