"""Who is there, what each holds, and what engines have been told of it. No clock, no I/O; one thread at a time.

Engines work with a *version* of the ownership. A copy that is to be given up is first withdrawn: it is no longer
listed, but still there for engines that work with an earlier version. When all have adopted a later one, it may go.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from raymoe.placement.health import DeviceHealth, HealthState
from raymoe.placement.ownership import Ownership
from raymoe.types import DeviceName, ExpertKey


class Roster:
    """The devices of a cluster.

    Attributes:
        health: of each device, in the configuration's order.
        version: of what ``ownership`` says; grows whenever that, or a process behind it, changes.
        ownership: what engines may ask each device for; nothing of those that do not serve.
        adopted: by engine, the version it works with; 0 where it has yet to learn of one.
        changes: how often what is held or withdrawn has changed.
    """

    def __init__(self, devices: Iterable[DeviceName], now_s: float) -> None:
        self.health = {device: DeviceHealth(since_s=now_s) for device in devices}
        self.version = 0
        self.ownership: Ownership = {device: () for device in self.health}
        self.adopted: dict[str, int] = {}
        self.changes = 0
        self._held: dict[DeviceName, set[ExpertKey]] = {device: set() for device in self.health}
        self._withdrawn: dict[DeviceName, dict[ExpertKey, int]] = {device: {} for device in self.health}
        self._joined: set[str] = set()
        self._behind: dict[DeviceName, str | None] = {}
        self._published: tuple[Any, ...] | None = None

    @property
    def serving(self) -> list[DeviceName]:
        """The devices that engines may ask."""
        return [device for device, health in self.health.items() if health.serves]

    @property
    def state(self) -> tuple[Any, ...]:
        """What ``ownership`` follows from, cheap to compare: the same state makes the same one."""
        return self.changes, tuple((health.serves, health.incarnation) for health in self.health.values())

    @property
    def has_suspects(self) -> bool:
        """Whether it will be known in a moment what has become of some device."""
        return any(health.state is HealthState.SUSPECT for health in self.health.values())

    def join(self, engine: str) -> None:
        """An engine will take its view from here. One that has not joined works with what an earlier life told it."""
        self._joined.add(engine)
        self.adopted[engine] = 0

    def tell(self, engine: str, version: int) -> None:
        """An engine works with this version."""
        self.adopted[engine] = version if engine in self._joined else 0

    def forget_engines(self, but: Set[str]) -> None:
        """All other engines are gone."""
        self._joined &= but
        self.adopted = {engine: version for engine, version in self.adopted.items() if engine in but}

    def missing(self, keys: Iterable[ExpertKey]) -> tuple[ExpertKey, ...]:
        """Those of ``keys`` that engines can ask nobody for."""
        listed = {key for owned in self.ownership.values() for key in owned}
        return tuple(key for key in keys if key not in listed)

    def settle(self, device: DeviceName, holds: Iterable[ExpertKey]) -> None:
        """A device of the engine's own process is as well as that is, and holds this."""
        health = self.health[device]
        health.state, health.reason, health.complete, health.incarnation = HealthState.HEALTHY, None, True, "engine"
        self._held[device] = set(holds)
        self.changes += 1

    def held(self, device: DeviceName) -> tuple[ExpertKey, ...]:
        """What a device's current process has in host memory."""
        return tuple(sorted(self._held[device]))

    def appeared(self, device: DeviceName, incarnation: str, holds: Iterable[ExpertKey], now_s: float) -> None:
        """A process answers, and says what it holds."""
        self.health[device].appeared(incarnation, now_s)
        self._held[device] = set(holds)
        self._withdrawn[device].clear()
        self.changes += 1

    def died(self, device: DeviceName, incarnation: str | None, reason: str, now_s: float) -> None:
        """A process is certainly gone, with what it held."""
        self.health[device].died(incarnation, reason, now_s)
        if self.health[device].incarnation is None and self._held[device]:
            self._held[device].clear()
            self._withdrawn[device].clear()
            self.changes += 1

    def gained(self, device: DeviceName, keys: Iterable[ExpertKey]) -> None:
        """Experts are in a device's host memory now."""
        self._held[device].update(keys)
        self.changes += 1

    def keep(self, device: DeviceName, keys: Iterable[ExpertKey]) -> None:
        """What was withdrawn of these is listed again."""
        for key in self._withdrawn[device].keys() & set(keys):
            del self._withdrawn[device][key]
            self.changes += 1

    def withdraw(self, device: DeviceName, keys: Iterable[ExpertKey]) -> None:
        """List these no more from the next version on."""
        for key in keys:
            if key in self._held[device] and key not in self._withdrawn[device]:
                self._withdrawn[device][key] = self.version + 1
                self.changes += 1

    def publish(self) -> bool:
        """Bring ``ownership`` up to date; whether that made a new version."""
        if self.state == self._published:
            return False
        self._published = self.state
        listed: Ownership = {
            device: tuple(sorted(self._held[device] - self._withdrawn[device].keys())) if health.serves else ()
            for device, health in self.health.items()
        }
        behind = {device: self.health[device].incarnation for device in self.serving}
        if listed == self.ownership and behind == self._behind and self.version:
            return False
        self.ownership, self._behind = listed, behind
        self.version += 1
        return True

    def droppable(self) -> dict[DeviceName, tuple[ExpertKey, ...]]:
        """Withdrawn copies that no engine asks for any more."""
        oldest = min(self.adopted.values(), default=self.version)
        found: Mapping[DeviceName, tuple[ExpertKey, ...]] = {
            device: tuple(sorted(key for key, version in keys.items() if version <= oldest))
            for device, keys in self._withdrawn.items()
        }
        return {device: keys for device, keys in found.items() if keys}

    def dropped(self, device: DeviceName, keys: Iterable[ExpertKey]) -> None:
        """A device no longer holds these."""
        for key in keys:
            self._held[device].discard(key)
            self._withdrawn[device].pop(key, None)
        self.changes += 1
