"""Whether a request that comes now would have its first token in time. Pure but for what it has measured.

While requests wait, one leaves every ``interval_s`` on average, and lets the next one in; so who is let in by the n-th
to leave waits n intervals on average. Where they leave independently of each other, the n-th leaves after a
gamma-distributed time. Its 99th percentile is what counts here: a promise that half of the requests see broken is none.
(Answers whose lengths vary little leave more regularly, so this errs on the safe side.) Then the prompt is read; that
takes its mean time and four mean deviations at most, as TCP takes round trips for its timeouts (RFC 6298). What both
may exceed their means by adds up as what is independent does.
"""

import math
from dataclasses import dataclass

SMOOTHING = 0.02  # weight of the newest interval: about the last fifty count
ERROR = math.sqrt(SMOOTHING / (2 - SMOOTHING))  # standard error of such a mean, of itself, where intervals are random
READ_SMOOTHING = 0.125  # weights of the newest time and deviation, and how many deviations count: RFC 6298
DEVIATION_SMOOTHING = 0.25
DEVIATIONS = 4.0
TAIL = 2.326  # standard normal deviates at the 99th percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Until the first token of a request that comes now: on average, and in all but one of a hundred cases."""

    likely_s: float
    most_s: float


@dataclass(slots=True)
class Pace:
    """How fast requests leave while others wait, and how long prompts take. Not thread safe; times on one clock."""

    _interval_s: float | None = None
    _intervals: int = 0
    _left_s: float | None = None
    _read_s: float | None = None
    _deviation_s: float = 0.0

    def left(self, now_s: float, others_wait: bool) -> None:
        """A request that ran has ended, in whatever way. Intervals count between two at whose end others wait."""
        if others_wait and self._left_s is not None:
            self._intervals += 1
            self._interval_s = self._mixed(now_s - self._left_s, max(SMOOTHING, 1 / self._intervals))
        self._left_s = now_s if others_wait else None

    def read(self, took_s: float) -> None:
        """A request had its first token so long after it was let in."""
        if self._read_s is None:
            self._read_s, self._deviation_s = took_s, took_s / 2
            return
        self._deviation_s += DEVIATION_SMOOTHING * (abs(took_s - self._read_s) - self._deviation_s)
        self._read_s += READ_SMOOTHING * (took_s - self._read_s)

    def wait(self, place: int, now_s: float) -> Wait | None:
        """Of a request that is let in when so many have left. None where that is not 0 and nothing was measured yet."""
        interval_s = self.interval_s(now_s) if place else 0.0
        if interval_s is None:
            return None
        likely_s = place * interval_s + (self._read_s or 0.0)
        late_s = (latest(place) * (1 + ERROR) - place) * interval_s if place else 0.0
        return Wait(likely_s=likely_s, most_s=likely_s + math.hypot(late_s, DEVIATIONS * self._deviation_s))

    def interval_s(self, now_s: float) -> float | None:
        """Between two that leave. The one under way counts as soon as it is longer than the others."""
        if self._interval_s is None or self._left_s is None:
            return self._interval_s
        return max(self._interval_s, self._mixed(now_s - self._left_s, SMOOTHING))

    def _mixed(self, interval_s: float, weight: float) -> float:
        mean_s = interval_s if self._interval_s is None else self._interval_s
        return mean_s + weight * (interval_s - mean_s)


def latest(place: int) -> float:
    """By when the n-th of independent events has come in 99 of 100 cases, in mean intervals.

    By Wilson's and Hilferty's approximation of 1931, which errs by less than 1% here.
    """
    return place * (1 - 1 / (9 * place) + TAIL / (3 * math.sqrt(place))) ** 3
