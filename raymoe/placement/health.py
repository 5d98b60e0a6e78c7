"""How a device is: a state machine over what is heard of its worker. No clock: every event says when it happens.

``healthy``: it answers, and holds its shard. ``suspect``: it is silent for a moment, or an engine waits for it in vain;
it may be asked all the same. ``down``: it is silent for long, or its process is gone; it owns nothing until it is heard
again. ``rejoining``: a new process of it answers, and reads its shard.

A worker's process is its *incarnation*. What is heard of an earlier one means nothing. One that was only paused or cut
off is the same incarnation, still holds its shard, and is healthy with its first answer.
"""

from dataclasses import dataclass
from enum import StrEnum

PING_S = 0.25  # between heartbeats: four of them are missed in a second, and they cost next to nothing
SUSPECT_S = 0.7  # of silence: two missed heartbeats, and some time for a busy machine to answer the third
DOWN_S = 2.0  # of silence: longer than a loaded machine keeps a thread waiting, and experts are read again from then on


class HealthState(StrEnum):
    """What is known of a device."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DOWN = "down"
    REJOINING = "rejoining"


@dataclass(slots=True, kw_only=True)
class DeviceHealth:
    """One device. Times are of one monotonic clock, in seconds.

    Attributes:
        since_s: when it came into this state.
        reason: why it is not healthy; None where it is.
        incarnation: the process that is listened to; None where none is known, or it is certainly gone.
        restarts: how many new processes have followed earlier ones.
        complete: whether this incarnation holds its shard.
        heard_s: when this incarnation was last heard; None where it never was.
        asked_s: since when it is sent heartbeats; its silence before that means nothing.
        last: the incarnation that was known last.
    """

    since_s: float
    state: HealthState = HealthState.DOWN
    reason: str | None = "not started yet"
    incarnation: str | None = None
    restarts: int = 0
    complete: bool = False
    heard_s: float | None = None
    asked_s: float | None = None
    last: str | None = None

    @property
    def serves(self) -> bool:
        """Whether engines may ask it for experts."""
        return self.complete and self.state in (HealthState.HEALTHY, HealthState.SUSPECT)

    def silence_s(self, now_s: float) -> float | None:
        """For how long nothing was heard, though it was asked; None where it is not asked."""
        if self.asked_s is None:
            return None
        return now_s - (self.asked_s if self.heard_s is None else max(self.heard_s, self.asked_s))

    def appeared(self, incarnation: str, now_s: float) -> None:
        """A process of it answers through Ray. The one that is known already changes nothing."""
        if incarnation == self.incarnation:
            return
        self.restarts += self.last not in (None, incarnation)
        self.incarnation = self.last = incarnation
        self.complete = False
        self.heard_s = self.asked_s = None
        self._enter(HealthState.REJOINING, "its process has started and reads its experts", now_s)

    def asked(self, now_s: float) -> None:
        """Heartbeats go to the current incarnation from now on."""
        if self.asked_s is None and self.incarnation is not None:
            self.asked_s = now_s

    def completed(self, incarnation: str) -> None:
        """The shard of an incarnation is complete; its next answer makes the device healthy."""
        if incarnation == self.incarnation:
            self.complete = True

    def heard(self, incarnation: str, now_s: float) -> None:
        """A heartbeat was answered."""
        if incarnation != self.incarnation:
            return
        self.heard_s = now_s
        if self.complete:
            self._enter(HealthState.HEALTHY, None, now_s)
        elif self.state is not HealthState.REJOINING:
            self._enter(HealthState.REJOINING, "it answers again and reads its experts", now_s)

    def suspected(self, who: str, now_s: float) -> None:
        """An engine waits for it in vain. Whatever is heard of it afterwards counts for more."""
        if self.state is HealthState.HEALTHY:
            self._enter(HealthState.SUSPECT, f"{who} waits for it in vain", now_s)

    def died(self, incarnation: str | None, reason: str, now_s: float) -> None:
        """A process is certainly gone, or of no use, and its shard with it."""
        if incarnation != self.incarnation or incarnation is None:
            return
        self.incarnation, self.complete = None, False
        self.heard_s = self.asked_s = None
        self._enter(HealthState.DOWN, reason, now_s)

    def missing(self, reason: str, now_s: float) -> None:
        """Why there is no process of it, where there is none."""
        if self.incarnation is None:
            self._enter(HealthState.DOWN, reason, now_s)

    def look(self, now_s: float) -> None:
        """Time passes: silence makes suspect, and then down."""
        silence_s = self.silence_s(now_s)
        if silence_s is None:
            return
        if self.state in (HealthState.HEALTHY, HealthState.REJOINING) and silence_s > SUSPECT_S:
            self._enter(HealthState.SUSPECT, "it does not answer heartbeats", now_s)
        elif self.state is HealthState.SUSPECT and silence_s > DOWN_S:
            self._enter(HealthState.DOWN, f"it has not answered a heartbeat for {DOWN_S:g} s", now_s)

    def excuse(self, gap_s: float) -> None:
        """Whoever listens was away for so long itself: that was nobody's silence."""
        if self.heard_s is not None:
            self.heard_s += gap_s
        if self.asked_s is not None:
            self.asked_s += gap_s

    def _enter(self, state: HealthState, reason: str | None, now_s: float) -> None:
        if state is not self.state:
            self.since_s = now_s
        self.state, self.reason = state, reason
