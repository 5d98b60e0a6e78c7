"""Remote workers that fell silent, and whether they are back.

A worker whose answer is late is asked whether it lives, on a socket that a thread of its own answers even while it
computes. Without an answer in time, or when its connection closes, it is *suspect*: nobody waits for it, and it is
asked again and again, until it answers. One that answers pings but no calls, which were lost on their way or pass no
more, is suspect for a while too. Nothing here waits.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from raymoe.types import DeviceName

log = logging.getLogger(__name__)

PONG_S = 0.12  # a living process answers within milliseconds; a busy small machine takes some tens of them
AGAIN_S = 0.1  # between pings of a suspect
SURE_S = 0.3  # after a connection closed: a process that is gone does not answer; time for news of another owner
MUTE_S = 1.0  # for which signs of life say nothing of a worker that leaves calls unanswered, until it is tried again
UNSURE_S = 2.0  # of silence: a paused process or stalled link may come back, and giving up costs reading a prompt anew


class Signs(Protocol):
    """Signs of life."""

    def probe(self, device: DeviceName) -> None:
        """Ask whether a worker lives; never waits."""
        ...

    def signs(self) -> tuple[set[DeviceName], set[DeviceName]]:
        """Who has answered pings, and whose connection has closed, since the last time; never waits."""
        ...


@dataclass(slots=True)
class _Silence:
    since_s: float
    is_sure: bool
    pinged_s: float
    mute_until_s: float


class Suspects:
    """Who is not to be asked. Used by one thread; ``names`` may be read by any.

    Args:
        clock: seconds.

    Attributes:
        names: of the suspects.
        on_change: called when somebody becomes one, or is none any more.
        on_suspect: called as well when somebody becomes one.
        count: how often somebody did.
    """

    def __init__(self, signs: Signs | None, clock: Callable[[], float]) -> None:
        self.names: frozenset[DeviceName] = frozenset()
        self.on_change: Callable[[], None] = lambda: None
        self.on_suspect: Callable[[], None] = lambda: None
        self.count = 0
        self._signs = signs
        self._clock = clock
        self._silent: dict[DeviceName, _Silence] = {}
        self._doubted_s: dict[DeviceName, float] = {}

    def doubt(self, device: DeviceName) -> None:
        """An answer is late: ask whether its worker lives, unless that was asked already."""
        if self._signs is not None and device not in self._silent and device not in self._doubted_s:
            self._doubted_s[device] = self._clock()
            self._signs.probe(device)

    def suspect(self, device: DeviceName, *, is_sure: bool, why: str, mute_s: float = 0.0) -> None:
        """A worker is silent; with ``is_sure`` its connection is gone. For ``mute_s`` its pongs do not count."""
        now_s = self._clock()
        self._doubted_s.pop(device, None)
        silence = self._silent.get(device)
        if silence is not None:
            silence.is_sure |= is_sure
            return
        log.warning("%s %s: other owners are asked", device, why)
        self._silent[device] = _Silence(now_s, is_sure, now_s - AGAIN_S, now_s + mute_s)
        self.count += 1
        self._changed()
        self.on_suspect()

    def forget(self, devices: Collection[DeviceName]) -> None:
        """These have new connections, or none."""
        for device in devices:
            self._doubted_s.pop(device, None)
            self._silent.pop(device, None)
        self._changed()

    def look(self) -> set[DeviceName]:
        """Take in signs of life, and ask for more where they are due. Returns those whose connection has closed."""
        if self._signs is None:
            return set()
        now_s = self._clock()
        answered, closed = self._signs.signs()
        for device in closed:
            self.suspect(device, is_sure=True, why="has closed its connection")
        for device in answered - closed:
            self._doubted_s.pop(device, None)
            if device in self._silent and now_s >= self._silent[device].mute_until_s:
                del self._silent[device]
                log.warning("%s answers again", device)
                self._changed()
        for device, asked_s in list(self._doubted_s.items()):
            if now_s - asked_s > PONG_S:
                self.suspect(device, is_sure=False, why="is silent")
        for device, silence in self._silent.items():
            if now_s - silence.pinged_s >= AGAIN_S:
                silence.pinged_s = now_s
                self._signs.probe(device)
        return closed

    def hope_until_s(self, devices: Collection[DeviceName]) -> float:
        """How long these suspects may still be waited for, where nobody else can do it."""
        silences = [self._silent[device] for device in devices if device in self._silent]
        return max((s.since_s + (SURE_S if s.is_sure else UNSURE_S) for s in silences), default=float("-inf"))

    def _changed(self) -> None:
        names = frozenset(self._silent)
        if names != self.names:
            self.names = names
            self.on_change()
