"""The placement actor: starts the workers, decides who owns what, and ends them when nobody needs them.

Ray calls carry lifecycle and configuration; what happens per step arrives on a ZeroMQ socket: residency, and forecasts
that become prefetch orders to the workers. A restart loses nothing that the workers and the engine do not know: it asks
the workers what they own, and the engine, which notices with its next renewal, joins again and tells the owners and the
settings in force.

The settings of scheduling are this actor's: those of the configuration until they are changed at run time. A worker
gets them when it is created and at every start of an engine; an engine adopts them when it starts.

Ray imports an actor's class wherever the actor is looked up, in the ingress for example, so this module must be light
to import: torch and all that stands on it comes in within methods.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ray

from raymoe.actors.crew import REPORT_TIMEOUT_S, Crew
from raymoe.actors.membership import Membership
from raymoe.actors.names import NAMESPACE, Life, placement_name
from raymoe.actors.overview import Overview
from raymoe.actors.repairs import Repairs
from raymoe.actors.shadow_keeper import ShadowKeeper
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out, spreads
from raymoe.actors.views import ClusterView
from raymoe.config import ClusterConfig, SchedulingConfig
from raymoe.errors import CheckpointError
from raymoe.observe.metrics import PLACEMENT, Values, of_record
from raymoe.observe.ray_metrics import Publisher, RayExporter
from raymoe.observe.stats import ClusterStats, EngineStats
from raymoe.placement.ownership import (
    Capacity,
    Ownership,
    check_fits,
    every_expert,
    primary_owners,
    replication_factor,
)
from raymoe.placement.repair import Target
from raymoe.placement.state import ClusterState, Holders
from raymoe.types import DeviceName, ExpertKey, LayerSize

if TYPE_CHECKING:
    from raymoe.actors.worker import WorkerInfo
    from raymoe.experts.report import ResidencyMap
    from raymoe.transport.frames import Limits
    from raymoe.transport.placement import OrderDesk, PlacementServer
    from raymoe.transport.sockets import Endpoint

log = logging.getLogger(__name__)

SHADOW_START_S = 300.0  # to open the checkpoint and quantise; then the model starts without
WATCH_S = 1.0
FIRST_PONG_S = 5.0  # for the first heartbeats of workers that have just answered by Ray; a view lists who was heard
REPAIR_WAIT_S = 60.0  # an engine that comes back to a cluster being repaired starts without the rest after that
WAIT_STEP_S = 0.02


class PlacementShell:
    """One application's placement actor."""

    def __init__(self, app: str, config: dict[str, Any], sizes: tuple[LayerSize, ...], limits: "Limits") -> None:
        self._app = app
        self._config = ClusterConfig.model_validate(config)
        self._sizes = sizes
        self._limits = limits
        self._state = ClusterState()
        self._holders = Holders(created_s=time.monotonic())
        self._crew = Crew(app, self._config, sizes, limits)
        self._members = Membership(DeviceName(device.name) for device in self._config.devices)
        self._repairs = Repairs(
            self._crew,
            self._members,
            sizes,
            wanted=self._wanted_owners,
            hand_out=lambda capacities, owners, held: hand_out(self._config, sizes, capacities, owners, held),
            welcome=self._welcome,
            on_version=self._on_version,
        )
        self._clients: set[bytes] = set()
        self._server: PlacementServer | None = None
        self._engine: tuple[str, EngineStats] | None = None
        self._shadow = ShadowKeeper(app, self._config, limits) if self._config.predictor_kind == "shadow" else None
        self._overview = Overview(app, self._config, self._crew, self._members, self._repairs, self._shadow)
        self._shadow_version = 0  # of the ownership that the shadow was told
        self._missing: tuple[int, frozenset[ExpertKey]] = -1, frozenset()  # a version, and what it lists nowhere
        self._first_target: Target | None = None
        self._life = Life(actor=ray.get_runtime_context().get_actor_id() or "", start=uuid.uuid4().hex)
        self._start_lock = threading.Lock()
        self._rebuild()
        Publisher(RayExporter(app), self._values).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @cached_property
    def _desk(self) -> "OrderDesk":
        """Made when it is first needed: workers start while this imports torch."""
        from raymoe.transport.placement import OrderDesk

        return OrderDesk(self._state, self._limits)

    # --- lifecycle --------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """The configuration this cluster was started with, whatever was changed at run time."""
        return self._config.model_dump(mode="json")

    def renew(
        self,
        holder: str,
        engine: EngineStats | None = None,
        *,
        adopted: int | None = None,
        suspects: tuple[DeviceName, ...] = (),
    ) -> Life:
        """``holder`` keeps the cluster alive for a while; an engine tells its counts.

        Args:
            adopted: the version of the view that an engine works with, 0 before it has one; None: it is no engine.
            suspects: devices that the engine waits for in vain.
        """
        self._holders.renew(holder, time.monotonic())
        if engine is not None:
            self._engine = (holder, engine)
        with self._members.lock:
            roster = self._members.roster
            if adopted is not None:
                roster.tell(holder, adopted)
            version = roster.version
        self._members.suspect(suspects)
        return replace(
            self._life,
            version=version,
            settled=self._is_settled(),
            shadow=self._shadow.endpoint if self._shadow is not None else None,
        )

    def release(self, holder: str) -> None:
        """``holder`` is leaving; the last one ends the cluster (the watch does, so that this call returns)."""
        self._holders.release(holder)

    def start(self, local: dict[DeviceName, int], client_key: bytes, holder: str, weights: str) -> ClusterView:
        """Start or find the workers, hand out experts, admit a client. Safe to call again.

        Where the workers run already, those that are down are not waited for where others can hold what they held.

        Args:
            local: host memory in bytes of devices that live in the engine's process.
            client_key: CURVE public key of the engine.
            holder: the engine, as it calls itself when it renews its hold.
            weights: fingerprint of the checkpoint that it serves.

        Raises StartError, CapacityError or CheckpointError; workers that this call started are ended then.
        """
        with self._start_lock:
            self._know_weights(weights)
            with self._members.lock:
                self._members.roster.join(holder)
                runs = self._repairs.has_started or bool(self._members.serving())
            if self._shadow is not None:  # it quantises its experts while the workers read theirs
                self._shadow.create()
            if runs:
                self._start_again(local)
            else:
                try:
                    self._start_first(local)
                except BaseException:
                    self._kill_workers()
                    raise
            self._admit(client_key)
            self._members.roster.publish()
            self._on_version()
            self._connect_shadow(wait_s=SHADOW_START_S)
            self._repairs.start(self._first_target)
            return self.view()

    def _know_weights(self, weights: str) -> None:
        """Workers that have other weights open end here: those that are started next open what is there now."""
        self._crew.weights = weights
        try:
            self._crew.check_weights()
        except CheckpointError:
            self._kill_workers()
            raise

    def _start_first(self, local: dict[DeviceName, int]) -> None:
        crew = self._crew
        crew.start()
        capacities = crew.capacities(local)
        wanted = self._wanted_owners(capacities)
        if len(capacities) < len(self._config.devices):  # without the optional ones there may be fewer copies
            wanted = min(wanted, len(capacities))
        check_fits(self._sizes, capacities, wanted)
        current = {name: info.owned for name, info in crew.infos.items() if info.owned}
        ownership = hand_out(self._config, self._sizes, capacities, wanted, current or None)
        self._first_target = Target(ownership=ownership, replication=wanted)
        crew.load(ownership)
        crew.tell()
        crew.admit((*self._clients, self._desk.keys.public))
        self._members.listen(self._desk.keys, self._limits)
        for name in local:
            self._members.settle(name, ownership[name])
        for name, info in crew.infos.items():
            held = {*info.owned, *ownership[name]}  # it may have more of an earlier start
            self._members.join(name, info.incarnation, held, crew.endpoints[name])
        self._wait_until(lambda: all(self._members.roster.health[name].serves for name in crew.infos), FIRST_PONG_S)

    def _start_again(self, local: dict[DeviceName, int]) -> None:
        """An engine comes back to workers that run: those that are down are the repairs' business."""
        with self._members.lock:
            roster = self._members.roster
            unknown = [name for name in local if not roster.held(name)]
            for name in unknown:
                self._members.settle(name, ())
        if unknown:  # this actor was restarted as well, so that nobody knows what the lost engine's devices held
            share = self._repairs.plan(tuple(local), local).ownership
            for name in unknown:
                self._members.settle(name, share[name])
        self._repairs.start()
        self._wait_until(self._is_settled, REPAIR_WAIT_S)
        self._crew.look(self._members.serving())

    def rejoin(self, holder: str, client_key: bytes, ownership: Ownership, scheduling: dict[str, Any]) -> "Endpoint":
        """An engine that started this cluster found this actor restarted: take from it what it knows.

        Returns where it shall send forecasts and residency from now on.
        """
        with self._start_lock:
            self._members.roster.join(holder)
            for device in self._config.devices:
                if device.transport == "local":
                    self._members.settle(DeviceName(device.name), ownership.get(DeviceName(device.name), ()))
            self._crew.scheduling = SchedulingConfig.model_validate(scheduling)
            self._crew.tell(self._members.serving())
            endpoint = self._admit(client_key)
            self._connect_shadow(wait_s=REPORT_TIMEOUT_S)
            self._repairs.start()
            return endpoint

    def view(self) -> ClusterView:
        """Who owns what now, and where the workers listen. An engine has been admitted before."""
        with self._members.lock:
            roster, crew = self._members.roster, self._crew
            serving = [name for name in roster.serving if name in crew.endpoints]
            assert self._server is not None, "an engine starts, or joins, before it looks"
            return ClusterView(
                version=roster.version,
                ownership=dict(roster.ownership),
                health={name: health.state for name, health in roster.health.items()},
                endpoints={name: crew.endpoints[name] for name in serving},
                placement=self._server.endpoint,
                replication=self._repairs.replication or 1,
                nodes={name: crew.infos[name].address for name in serving},
                resident={name: crew.infos[name].resident for name in serving},
                scheduling=crew.scheduling,
                shadow=self._shadow.endpoint if self._shadow is not None else None,
            )

    def reconfigure(self, scheduling: dict[str, Any]) -> tuple[DeviceName, ...]:
        """Put other settings in force on all workers, and on those that are started later.

        Returns the workers that did not confirm in time; they get the settings when they are taken in again.
        """
        self._crew.scheduling = SchedulingConfig.model_validate(scheduling)
        return self._crew.tell()

    def _admit(self, client_key: bytes) -> "Endpoint":
        """Let a client in here and at the workers, which also take this actor's own orders and heartbeats."""
        from raymoe.transport.placement import PlacementServer

        self._clients.add(client_key)
        self._crew.admit_soon((client_key,), self._members.serving())
        if self._server is None:
            own_address = self._crew.binding()(ray.util.get_node_ip_address())
            self._server = PlacementServer(self._state, own_address, self._limits, self._desk.forecast)
        self._server.clients.keys.add(client_key)
        return self._server.endpoint

    def _welcome(self, name: DeviceName, info: "WorkerInfo") -> "Endpoint":
        """Let everybody in at a new process, and put the settings in force there."""
        keys = [*self._clients, self._desk.keys.public]
        if self._shadow is not None and self._shadow.public_key is not None:
            keys.append(self._shadow.public_key)
        self._crew.tell([name])
        self._crew.admit(keys, [name])
        return self._crew.endpoints[name]

    def _on_version(self) -> None:
        """Owners or endpoints are others: orders follow them. The shadow is told by the watch, which may wait."""
        with self._members.lock:
            ownership = dict(self._members.roster.ownership)
            serving = self._members.roster.serving
        self._state.primary = primary_owners(self._sizes, ownership, spreads(self._config, self._sizes))
        self._state.ownership = ownership
        bounded = bounded_devices(self._config)
        endpoints = {name: self._crew.endpoints[name] for name in serving if name in bounded}
        self._desk.connect(endpoints)

    def _connect_shadow(self, wait_s: float) -> None:
        """Let the shadow hear the clients and reach the workers; whatever fails is told by the stats."""
        if self._shadow is None:
            return
        with self._members.lock:
            ownership, version = dict(self._members.roster.ownership), self._members.roster.version
            serving = [name for name in self._members.roster.serving if name in self._crew.endpoints]
        fleet = cluster_fleet(self._config, self._sizes, ownership)
        info = self._shadow.find(wait_s)
        if info is not None:
            self._crew.admit_soon((info.public_key,), serving)
            address = self._crew.binding()(info.address)
            workers = {name: self._crew.endpoints[name] for name in serving}
            self._shadow.connect(address, tuple(self._clients), fleet, workers)
            self._shadow_version = version

    def _wanted_owners(self, capacities: list[Capacity]) -> int:
        """Owners per expert, as configured, or as there is room for."""
        total = sum(size.experts * size.expert_bytes for size in self._sizes)
        return replication_factor(self._config.replication, total, capacities)

    def _wait_until(self, holds: Callable[[], bool], most_s: float) -> bool:
        """Wait for heartbeats or repairs; whether ``holds()`` in time."""
        end_s = time.monotonic() + most_s
        while not holds() and time.monotonic() < end_s:
            time.sleep(WAIT_STEP_S)
        return holds()

    def _is_settled(self) -> bool:
        """Whether nothing is known in a moment that is not known now: a suspect's fate, experts being read again."""
        target = self._repairs.target
        with self._members.lock:
            roster = self._members.roster
            if self._missing[0] != roster.version:
                self._missing = roster.version, frozenset(roster.missing(every_expert(self._sizes)))
            return not roster.has_suspects and self._missing[1] <= set(target.lost if target is not None else ())

    def progress(self) -> tuple[int, int]:
        """(experts in host memory, experts to be there) over all workers, while ``start`` runs."""
        target = self._repairs.target or self._first_target
        ownership = target.ownership if target is not None else {}
        wanted = sum(len(keys) for name, keys in ownership.items() if name in self._crew.infos)
        return sum(self._crew.ask("progress", names=list(self._crew.infos)).values()), wanted

    def shutdown(self) -> None:
        """End the workers and this actor."""
        self._repairs.end()
        self._members.end()
        self._kill_workers()
        ray.kill(ray.get_actor(placement_name(self._app), NAMESPACE), no_restart=True)

    # --- looking ----------------------------------------------------------------------------------------

    def stats(self, names: bool = True) -> ClusterStats:
        """Every device's state and report, and what the engine said a moment ago.

        Args:
            names: also of the resident experts, of which there may be ten thousands.
        """
        engine = self._engine
        told = engine[1] if engine is not None and engine[0] in self._holders.seen_s else None
        stats, server = self._overview.stats(told, names), self._server
        if server is None:
            return stats
        return replace(stats, dropped_messages=server.dropped, refused_clients=server.refused)

    def residency(self) -> "dict[str, ResidencyMap]":
        """Every worker's map; the last one of a worker that is busy, or silent for a moment."""
        return self._overview.residency()

    def _values(self) -> Values:
        """Metrics of what this actor alone sees."""
        values = self._overview.values()
        return values if self._server is None else values + of_record(self._server, PLACEMENT)

    # --- within -----------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Where workers run already, this actor was restarted: ask them what they own and where they listen."""
        self._crew.rebuild()
        whole = [name for name, info in self._crew.infos.items() if info.owned and info.endpoint is not None]
        if not whole:
            return
        self._crew.admit_soon((self._desk.keys.public,), whole)
        self._members.listen(self._desk.keys, self._limits)
        for name in whole:
            info = self._crew.infos[name]
            self._members.join(name, info.incarnation, info.owned, self._crew.endpoints[name])
        self._wait_until(lambda: len(self._members.serving()) == len(whole), FIRST_PONG_S)

    def _kill_workers(self) -> None:
        self._members.forget()
        self._crew.end()
        if self._shadow is not None:
            self._shadow.end()
        self._desk.connect({})

    def _watch(self) -> None:
        while not self._holders.is_abandoned(time.monotonic()):
            time.sleep(WATCH_S)
            with self._members.lock:
                self._members.roster.forget_engines(set(self._holders.seen_s))
            self._watch_shadow()
        log.info("nobody holds application %s any more; ending its workers", self._app)
        self.shutdown()

    def _watch_shadow(self) -> None:
        """A shadow that Ray has started again is connected again; meanwhile engines are told that there is none.

        So is one whose workers have changed.
        """
        if self._shadow is None or not self._clients or not self._start_lock.acquire(blocking=False):
            return
        try:
            if not self._shadow.is_well() or self._shadow_version != self._members.roster.version:
                self._connect_shadow(wait_s=REPORT_TIMEOUT_S)
        except Exception:  # a predictor is worth no more than time; the watch has workers to end one day
            log.exception("the shadow could not be connected")
        finally:
            self._start_lock.release()
