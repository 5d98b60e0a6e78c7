"""Who is in the cluster now: the one owner of every device's health. Part of the placement actor.

Heartbeats, engines and the repairs tell it what they see, each on a thread of its own; all of it is under one lock,
which nobody holds while waiting.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from raymoe.placement.health import PING_S, HealthState
from raymoe.placement.roster import Roster
from raymoe.types import DeviceName, ExpertKey

if TYPE_CHECKING:
    from raymoe.transport.frames import Limits
    from raymoe.transport.heartbeats import Heartbeats
    from raymoe.transport.sockets import Endpoint, KeyPair

log = logging.getLogger(__name__)


class Membership:
    """Every device's health, by heartbeats.

    Attributes:
        lock: held by whoever uses ``roster``.
        roster: who is there, and what each holds.
        changed: set when a device has changed its state.
    """

    def __init__(self, devices: Iterable[DeviceName], clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.roster = Roster(devices, clock())
        self.changed = threading.Event()
        self._workers: dict[DeviceName, tuple[str, Endpoint]] = {}
        self._heartbeats: Heartbeats | None = None
        self._round_s: float | None = None

    def listen(self, keys: "KeyPair", limits: "Limits") -> None:
        """Begin to send heartbeats. A second call does nothing."""
        from raymoe.transport.heartbeats import Heartbeats

        if self._heartbeats is None:
            self._heartbeats = Heartbeats(keys, limits, self._on_pong, self._on_round, self.clock)
            self._heartbeats.watch(self._workers)

    def watch(self, device: DeviceName, incarnation: str, endpoint: "Endpoint") -> None:
        """Send heartbeats to a worker from now on, in place of the device's earlier one."""
        with self.lock:
            self._workers[device] = incarnation, endpoint
            self.roster.health[device].asked(self.clock())
            if self._heartbeats is not None:
                self._heartbeats.watch(self._workers)

    def join(self, device: DeviceName, incarnation: str, holds: Iterable[ExpertKey], endpoint: "Endpoint") -> None:
        """A process that has its whole shard is there; it is healthy when its first heartbeat is answered."""
        with self.lock:
            self.roster.appeared(device, incarnation, holds, self.clock())
            self.roster.gained(device, holds)
            self.roster.health[device].completed(incarnation)
            self.watch(device, incarnation, endpoint)

    def settle(self, device: DeviceName, holds: Iterable[ExpertKey]) -> None:
        """A device of the engine's own process holds this."""
        with self.lock:
            self.roster.settle(device, holds)

    def serving(self) -> list[DeviceName]:
        """Devices with a worker that engines may ask."""
        with self.lock:
            return [device for device in self.roster.serving if device in self._workers]

    def reachable(self) -> list[DeviceName]:
        """Devices with a worker that may answer a question."""
        with self.lock:
            return [name for name in self._workers if self.roster.health[name].state is not HealthState.DOWN]

    def forget(self) -> None:
        """All workers are ended."""
        with self.lock:
            self._workers = {}
            for device, health in self.roster.health.items():
                self.roster.died(device, health.incarnation, "it was ended", self.clock())
            if self._heartbeats is not None:
                self._heartbeats.watch({})

    def suspect(self, devices: Iterable[DeviceName]) -> None:
        """An engine waits for these in vain."""
        with self.lock:
            before = self._states()
            for device in devices:
                if device in self.roster.health:
                    self.roster.health[device].suspected("an engine", self.clock())
            self._tell(before)

    def end(self) -> None:
        """Listen to nobody any more."""
        if self._heartbeats is not None:
            self._heartbeats.close()
            self._heartbeats = None

    def _on_pong(self, device: DeviceName, incarnation: str, now_s: float) -> None:
        with self.lock:
            before = self._states()
            self.roster.health[device].heard(incarnation, now_s)
            self._tell(before)

    def _on_round(self, now_s: float) -> None:
        with self.lock:
            before = self._states()
            if self._round_s is not None and now_s - self._round_s > 2 * PING_S:  # this process was paused, or starved
                for health in self.roster.health.values():
                    health.excuse(now_s - self._round_s - PING_S)
            self._round_s = now_s
            for health in self.roster.health.values():
                health.look(now_s)
            self._tell(before)

    def _states(self) -> dict[DeviceName, HealthState]:
        return {device: health.state for device, health in self.roster.health.items()}

    def _tell(self, before: dict[DeviceName, HealthState]) -> None:
        for device, health in self.roster.health.items():
            if health.state is not before[device]:
                reason = f": {health.reason}" if health.reason else ""
                log.warning("device %s was %s, is %s%s", device, before[device], health.state, reason)
                self.changed.set()
