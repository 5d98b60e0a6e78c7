"""Brings back what devices took along when they died, and takes in those that come: a thread of the placement actor.

It decides nothing itself: ``placement`` says who should own what, and what to read and give up for that. Each device is
worked on by a thread of its own, one thing at a time, so that none waits for another.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError

from raymoe.actors.crew import Crew
from raymoe.actors.membership import Membership
from raymoe.actors.nodes import is_offered, wishes
from raymoe.config import DeviceConfig
from raymoe.errors import RaymoeError
from raymoe.placement.health import HealthState
from raymoe.placement.ownership import Capacity, Ownership
from raymoe.placement.repair import Target, find_target, moves_towards
from raymoe.types import DeviceName, ExpertKey, LayerSize

if TYPE_CHECKING:
    from raymoe.actors.worker import WorkerInfo

log = logging.getLogger(__name__)

ROUND_S = 0.25  # between looks, where nothing wakes it
ASK_EVERY_S = 0.5  # a device that is not there, whether a process of it has come; Ray takes seconds to start one
REFUSING_S = 60.0  # for which a device that could not read experts is given no others: they go elsewhere meanwhile
RETRY_S = 5.0  # after something failed that will hardly succeed at once
READ_BYTES = 256 << 20  # at a time, about what a small board's storage reads in a second: what is read serves at once

HandOut = Callable[[list[Capacity], int, Ownership], Ownership]


class Repairs:
    """Ownership of one cluster, whole again after every change.

    Args:
        wanted: owners per expert that some workers should give, by their capacities.
        hand_out: the policy's ownership.
        welcome: puts settings in force at a new process and opens its sockets; gives its endpoint.
        on_version: told, on this thread, that the roster has a new version.

    Attributes:
        target: who should own what, as far as is known.
        most: the most owners that every expert had at a time.
        done: how many times experts were read again, or shared anew, until all was as it should be.
    """

    def __init__(
        self,
        crew: Crew,
        members: Membership,
        sizes: tuple[LayerSize, ...],
        *,
        wanted: Callable[[list[Capacity]], int],
        hand_out: HandOut,
        welcome: Callable[[DeviceName, "WorkerInfo"], Any],
        on_version: Callable[[], None],
    ) -> None:
        self.target: Target | None = None
        self.most = 0
        self.done = 0
        self.has_started = False
        self._crew = crew
        self._members = members
        self._sizes = sizes
        self._wanted = wanted
        self._hand_out = hand_out
        self._welcome = welcome
        self._on_version = on_version
        self._devices = {DeviceName(device.name): device for device in crew.remote}
        self._pinned = frozenset(members.roster.health) - frozenset(self._devices)
        self._planned_for: tuple[Any, ...] | None = None
        self._reading = False
        self._at_rest: tuple[Any, ...] | None = None  # in which there was nothing to mend
        self._busy: dict[DeviceName, threading.Thread] = {}
        self._asked: dict[DeviceName, tuple[Any, float]] = {}
        self._not_before_s: dict[DeviceName, float] = {}
        self._refusing_until_s: dict[DeviceName, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repairs", daemon=True)

    def start(self, target: Target | None = None) -> None:
        """Begin. A second call does nothing.

        Args:
            target: who owns what already, by a start that has just succeeded.
        """
        if self.has_started or self._stop.is_set():
            return
        self.has_started = True
        if target is not None:
            self._take(target)
            self._planned_for = self._situation()
        self._thread.start()

    def end(self) -> None:
        """Begin nothing any more."""
        self._stop.set()
        self._members.changed.set()

    @property
    def replication(self) -> int | None:
        """Owners that every expert has at least, once all is read; None while nothing is known."""
        return None if self.target is None else self.target.replication

    def plan(self, newcomers: tuple[DeviceName, ...] = (), local: Mapping[DeviceName, int] | None = None) -> Target:
        """Who of those that are there, or just coming, should own what.

        Args:
            local: host memory of the engine's own devices, where their shard is not settled yet.
        """
        fixed = self._pinned - (local or {}).keys()
        with self._members.lock:
            roster = self._members.roster
            there = [name for name in roster.health if name in newcomers or name in roster.serving]
            limits = {**{name: self._limit(name) for name in there}, **(local or {})}
            capacities = [Capacity(device=name, host_bytes=limits[name]) for name in there]
            held = {name: roster.held(name) for name in there}
        wanted = self._wanted(capacities)
        target = find_target(self._sizes, capacities, held, wanted, self._hand_out, fixed & set(there))
        if target.lost:
            log.warning("no room for %d experts on the devices that are there", len(target.lost))
        return target

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.round()
            except Exception:  # whatever Ray came up with: the next round looks again
                log.exception("a round of repairs failed")
            self._members.changed.wait(ROUND_S)
            self._members.changed.clear()

    def round(self) -> None:
        """Look once, and begin what can begin. Waits for no device."""
        self._busy = {name: thread for name, thread in self._busy.items() if thread.is_alive()}
        for name, device in self._devices.items():
            if name not in self._busy and not self._stop.is_set():
                self._look_for(name, device)
        self._publish()
        self._mend()
        self._give_up()

    def _publish(self) -> bool:
        """Tell of a new version, if there is one."""
        with self._members.lock:
            is_new = self._members.roster.publish()
        if is_new:
            self._on_version()
        return is_new

    # --- processes --------------------------------------------------------------------------------------

    def _look_for(self, name: DeviceName, device: DeviceConfig) -> None:
        """See whether a process of a device that is not well has come, and take it in."""
        now_s = self._members.clock()
        health = self._members.roster.health[name]
        if health.state is HealthState.HEALTHY or now_s < self._not_before_s.get(name, 0.0):
            return
        if name not in self._asked:
            self._not_before_s[name] = now_s + ASK_EVERY_S
            self._ask(name, device, now_s)
            return
        reference, since_s = self._asked[name]
        if not ray.wait([reference], timeout=0)[0]:
            if now_s - since_s > RETRY_S:
                del self._asked[name]
            return
        del self._asked[name]
        self._take_answer(name, reference, now_s)

    def _ask(self, name: DeviceName, device: DeviceConfig, now_s: float) -> None:
        nodes = ray.nodes()
        offered = is_offered(device, nodes)
        health = self._members.roster.health[name]
        info = self._crew.infos.get(name)
        if info is not None and not any(node["Alive"] and node["NodeID"] == info.node for node in nodes):
            self._died(name, health.incarnation, "its node is gone", now_s)
        if health.incarnation is None and not offered:
            with self._members.lock:
                health.missing(f"no node offers {wishes(device)}", now_s)
                self._members.changed.set()
            if name not in self._crew.handles:
                return
        handle: Any = self._crew.find_or_create(device)
        self._asked[name] = handle.describe.remote(), now_s

    def _take_answer(self, name: DeviceName, reference: Any, now_s: float) -> None:
        health = self._members.roster.health[name]
        try:
            info: Any = ray.get(reference)
        except ActorDiedError as error:  # Ray does not start it again: another one is made
            reason = f"its process is gone: {last_line(error)}"
            self._crew.handles.pop(name, None)
            self._died(name, health.incarnation, reason, now_s)
            with self._members.lock:
                health.missing(reason, now_s)
            self._not_before_s[name] = now_s + RETRY_S
            return
        except RayError:  # it is on its way
            return
        if info.incarnation == health.incarnation and health.complete:
            return  # it is there and whole, and its heartbeats say the rest
        with self._members.lock:
            self._died(name, health.incarnation, "another process has taken its place", now_s)
            self._members.roster.appeared(name, info.incarnation, info.owned, now_s)
            self._crew.arrived(name, info)
        self._work(name, self._take_in, info)

    def _died(self, name: DeviceName, incarnation: str | None, reason: str, now_s: float) -> None:
        with self._members.lock:
            self._members.roster.died(name, incarnation, reason, now_s)
            self._members.changed.set()

    def _take_in(self, name: DeviceName, info: "WorkerInfo") -> None:
        """Give a new process its settings, clients and share. On the device's thread."""
        endpoint = self._welcome(name, info)
        self._members.watch(name, info.incarnation, endpoint)
        share = self.plan((name,)).ownership[name]
        here = set(info.owned)
        self._crew.read(name, tuple(key for key in share if key not in here), fresh=not here)
        with self._members.lock:
            self._members.roster.gained(name, share)
            self._members.roster.health[name].completed(info.incarnation)
        self._not_before_s.pop(name, None)

    # --- experts ----------------------------------------------------------------------------------------

    def _mend(self) -> None:
        """Begin to read what is missing, and withdraw what is too much."""
        situation = self._situation()
        if self._planned_for != situation:
            self._take(self.plan())
            self._planned_for = situation
        if self.target is None:
            return
        with self._members.lock:
            roster = self._members.roster
            now = situation, roster.state
            if self._at_rest == now:
                return
            capacities = [Capacity(device=name, host_bytes=self._limit(name)) for name in roster.serving]
            held = {name: roster.held(name) for name in roster.serving}
            moves = moves_towards(self._sizes, capacities, held, self.target.ownership)
            for name in roster.serving:
                if name not in self._busy:
                    roster.keep(name, self.target.ownership.get(name, ()))
            for name, keys in moves.drop.items():
                if name not in self._pinned:
                    roster.withdraw(name, keys)
        if self._publish():
            self._members.changed.set()
        now_s = self._members.clock()
        for name, keys in moves.load.items():
            if name not in self._busy and name not in self._pinned and now_s >= self._not_before_s.get(name, 0.0):
                self._work(name, self._read, self._piece(keys))
        was_reading, self._reading = self._reading, bool(moves.load)
        self.done += was_reading and not self._reading
        self._at_rest = None if moves or self._busy else now

    def _take(self, target: Target) -> None:
        self.target, self.most = target, max(self.most, target.replication)

    def _read(self, name: DeviceName, keys: tuple[ExpertKey, ...]) -> None:
        try:
            self._crew.read(name, keys, fresh=False)
        except (RayError, RaymoeError):
            self._refusing_until_s[name] = self._members.clock() + REFUSING_S
            raise
        with self._members.lock:
            self._members.roster.gained(name, keys)

    def _give_up(self) -> None:
        with self._members.lock:
            droppable = self._members.roster.droppable()
            serving = self._members.roster.serving
            free = {name: keys for name, keys in droppable.items() if name in serving and name not in self._busy}
            for name, keys in free.items():
                self._members.roster.dropped(name, keys)
        for name, keys in free.items():
            self._work(name, self._crew.give_up, keys)

    def _piece(self, keys: tuple[ExpertKey, ...]) -> tuple[ExpertKey, ...]:
        """The first of some experts, at most about ``READ_BYTES`` and at least one."""
        total, count = 0, 0
        for key in keys:
            total += self._sizes[key.layer].expert_bytes
            if count and total > READ_BYTES:
                break
            count += 1
        return keys[:count]

    # --- within -----------------------------------------------------------------------------------------

    def _work(self, name: DeviceName, what: Callable[..., None], argument: Any) -> None:
        """Do something with one device, on a thread of its own. The device is busy until it is done."""
        thread = threading.Thread(target=self._try, args=(name, what, argument), name=f"repair-{name}", daemon=True)
        self._busy[name] = thread
        thread.start()

    def _try(self, name: DeviceName, what: Callable[..., None], argument: Any) -> None:
        health = self._members.roster.health[name]
        incarnation = health.incarnation
        try:
            what(name, argument)
        except (RayError, RaymoeError) as error:
            log.warning("device %s: %s", name, error)
            self._not_before_s[name] = self._members.clock() + RETRY_S
            if not health.complete:  # it is of no use like this: it is taken in once more, later
                self._died(name, incarnation, f"it could not be taken in: {last_line(error)}", self._members.clock())
        finally:
            self._members.changed.set()

    def _situation(self) -> tuple[Any, ...]:
        """What a plan depends on: who serves, by which process, and who takes experts."""
        with self._members.lock:
            roster = self._members.roster
            return tuple((name, roster.health[name].incarnation, self._refuses(name)) for name in roster.serving)

    def _refuses(self, name: DeviceName) -> bool:
        return name in self._pinned or self._members.clock() < self._refusing_until_s.get(name, 0.0)

    def _limit(self, name: DeviceName) -> int:
        """Host memory for a device's shard; one that takes no more experts has as much as it holds."""
        if self._refuses(name):
            return sum(self._sizes[key.layer].expert_bytes for key in self._members.roster.held(name))
        return self._crew.limits[name]


def last_line(error: BaseException) -> str:
    """An error in one line: what an actor fails with when it is made comes as a traceback, whose end says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
