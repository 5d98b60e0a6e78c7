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

import contextlib
import logging
import threading
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from raymoe.actors.crew import REPORT_TIMEOUT_S, Crew
from raymoe.actors.heartbeats import Heartbeats
from raymoe.actors.names import NAMESPACE, Life, placement_name
from raymoe.actors.reports import device_stats, down_stats, settings_stats
from raymoe.actors.shadow_keeper import ShadowKeeper
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out, spreads
from raymoe.actors.views import ClusterView
from raymoe.config import ClusterConfig, SchedulingConfig
from raymoe.observe.metrics import Values, of_predictor
from raymoe.observe.ray_metrics import Publisher, RayExporter
from raymoe.observe.stats import ClusterStats, EngineStats, PredictorStats
from raymoe.placement.ownership import Ownership, check_fits, primary_owners, replication_factor
from raymoe.placement.state import ClusterState, Holders
from raymoe.types import DeviceName, LayerSize

if TYPE_CHECKING:
    from raymoe.experts.usage import ResidencyMap
    from raymoe.transport.frames import Limits
    from raymoe.transport.placement import OrderDesk, PlacementServer
    from raymoe.transport.sockets import Endpoint

log = logging.getLogger(__name__)

SHADOW_START_S = 300.0  # to open the checkpoint and quantise; then the model starts without
WATCH_S = 1.0


class PlacementShell:
    """One application's placement actor."""

    def __init__(self, app: str, config: dict[str, Any], sizes: tuple[LayerSize, ...], limits: "Limits") -> None:
        self._app = app
        self._config = ClusterConfig.model_validate(config)
        self._scheduling = self._config.scheduling
        self._sizes = sizes
        self._limits = limits
        self._state = ClusterState()
        self._holders = Holders(created_s=time.monotonic())
        self._crew = Crew(app, self._config, sizes, limits)
        self._clients: set[bytes] = set()
        self._server: PlacementServer | None = None
        self._desk: OrderDesk | None = None
        self._engine: tuple[str, EngineStats] | None = None
        self._shadow = ShadowKeeper(app, self._config, limits) if self._config.predictor_kind == "shadow" else None
        self._life = Life(actor=ray.get_runtime_context().get_actor_id() or "", start=uuid.uuid4().hex)
        self._replication = 1
        self._start_lock = threading.Lock()
        self._heartbeats = Heartbeats()
        self._crew.rebuild()
        self._state.ownership = {name: info.owned for name, info in self._crew.infos.items()}
        Publisher(RayExporter(app), self._values).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    # --- lifecycle --------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """The configuration this cluster was started with, whatever was changed at run time."""
        return self._config.model_dump(mode="json")

    def renew(self, holder: str, engine: EngineStats | None = None) -> Life:
        """``holder`` keeps the cluster alive for a while; an engine tells its counts."""
        self._holders.renew(holder, time.monotonic())
        if engine is not None:
            self._engine = (holder, engine)
        return replace(self._life, shadow=self._shadow.endpoint if self._shadow is not None else None)

    def release(self, holder: str) -> None:
        """``holder`` is leaving; the last one ends the cluster (the watch does, so that this call returns)."""
        self._holders.release(holder)

    def start(self, local: dict[DeviceName, int], client_key: bytes) -> ClusterView:
        """Start or find the workers, hand out experts, admit a client. Safe to call again.

        Args:
            local: host memory in bytes of devices that live in the engine's process.
            client_key: CURVE public key of the engine.

        Raises StartError, CapacityError or CheckpointError; all workers are ended then.
        """
        with self._start_lock:
            try:
                return self._start(local, client_key)
            except BaseException:
                self._kill_workers()
                raise

    def _start(self, local: dict[DeviceName, int], client_key: bytes) -> ClusterView:
        crew = self._crew
        if self._shadow is not None:  # it quantises its experts while the workers read theirs
            self._shadow.create()
        crew.start(self._scheduling)
        capacities = crew.capacities(local)
        total = sum(size.experts * size.expert_bytes for size in self._sizes)
        self._replication = replication_factor(self._config.replication, total, capacities)
        check_fits(self._sizes, capacities, self._replication)
        current = {name: info.owned for name, info in crew.infos.items() if info.owned}
        self._state.ownership = hand_out(self._config, self._sizes, capacities, self._replication, current or None)
        self._state.primary = primary_owners(self._sizes, self._state.ownership, spreads(self._config, self._sizes))
        crew.load(self._state.ownership)
        crew.tell(self._scheduling)
        endpoint = self._admit(client_key)
        return ClusterView(
            ownership=self._state.ownership,
            endpoints=dict(crew.endpoints),
            placement=endpoint,
            replication=self._replication,
            nodes={name: info.address for name, info in crew.infos.items()},
            resident={name: info.resident for name, info in crew.infos.items()},
            scheduling=self._scheduling,
            shadow=self._connect_shadow(wait_s=SHADOW_START_S),
        )

    def rejoin(self, client_key: bytes, ownership: Ownership, scheduling: dict[str, Any]) -> "Endpoint":
        """An engine that started this cluster found this actor restarted: take from it what it knows.

        Returns where it shall send forecasts and residency from now on.
        """
        with self._start_lock:
            self._state.ownership = ownership
            self._state.primary = primary_owners(self._sizes, ownership, spreads(self._config, self._sizes))
            self._scheduling = SchedulingConfig.model_validate(scheduling)
            self._crew.tell(self._scheduling)
            endpoint = self._admit(client_key)
            self._connect_shadow(wait_s=REPORT_TIMEOUT_S)
            return endpoint

    def reconfigure(self, scheduling: dict[str, Any]) -> tuple[DeviceName, ...]:
        """Put other settings in force on all workers, and on those that are started later.

        Returns the workers that did not confirm in time; they get the settings when an engine starts again.
        """
        self._scheduling = SchedulingConfig.model_validate(scheduling)
        return self._crew.tell(self._scheduling)

    def _admit(self, client_key: bytes) -> "Endpoint":
        """Let a client in here and at the workers, which also take this actor's own orders."""
        from raymoe.transport.placement import OrderDesk, PlacementServer

        if self._desk is None:
            self._desk = OrderDesk(self._state, self._limits)
        self._clients.add(client_key)
        self._crew.admit((*self._clients, self._desk.keys.public))
        bounded = bounded_devices(self._config)
        self._desk.connect({name: endpoint for name, endpoint in self._crew.endpoints.items() if name in bounded})
        if self._server is None:
            own_address = self._crew.binding()(ray.util.get_node_ip_address())
            self._server = PlacementServer(self._state, own_address, self._limits, self._desk.forecast)
        self._server.clients.keys.add(client_key)
        return self._server.endpoint

    def _connect_shadow(self, wait_s: float) -> "Endpoint | None":
        """Let the shadow hear the clients and reach the workers; whatever fails is told by the stats."""
        if self._shadow is None:
            return None
        fleet = cluster_fleet(self._config, self._sizes, self._state.ownership)
        info = self._shadow.find(wait_s)
        if info is not None:
            self._crew.admit_soon(info.public_key)
            address = self._crew.binding()(info.address)
            self._shadow.connect(address, tuple(self._clients), fleet, dict(self._crew.endpoints))
        return self._shadow.endpoint

    def progress(self) -> tuple[int, int]:
        """(experts in host memory, experts to be there) over all workers, while ``start`` runs."""
        wanted = sum(len(keys) for name, keys in self._state.ownership.items() if name in self._crew.handles)
        return self._crew.progress(), wanted

    def shutdown(self) -> None:
        """End the workers and this actor."""
        self._kill_workers()
        ray.kill(ray.get_actor(placement_name(self._app), NAMESPACE), no_restart=True)

    # --- looking ----------------------------------------------------------------------------------------

    def stats(self, names: bool = True) -> ClusterStats:
        """Every worker's report, one that does not answer is "down", and what the engine said a moment ago.

        Args:
            names: also of the resident experts, of which there may be ten thousands.
        """
        asked: dict[DeviceName, Any] = {
            name: handle.report.remote(names) for name, handle in self._crew.handles.items()
        }
        kinds = {DeviceName(device.name): device for device in self._config.devices}
        devices = {}
        for name, reference in asked.items():
            try:
                report, dropped = ray.get(reference, timeout=REPORT_TIMEOUT_S)
            except RayError:
                info, age_s = self._crew.infos[name], self._heartbeats.age_s(name)
                devices[str(name)] = down_stats(kinds[name], node=info.node, pid=info.pid, heartbeat_age_s=age_s)
                continue
            self._heartbeats.heard(name)
            info = self._crew.infos[name]
            devices[str(name)] = device_stats(
                kinds[name], report, node=info.node, pid=info.pid, dropped_messages=dropped, heartbeat_age_s=0.0
            )
        engine = self._engine
        return ClusterStats(
            app=self._app,
            devices=devices,
            engine=engine[1] if engine is not None and engine[0] in self._holders.seen_s else None,
            replication=self._replication,
            policy=self._scheduling.policy,
            predictor=self._predictor_stats(),
            settings=settings_stats(self._scheduling),
        )

    def residency(self) -> "dict[str, ResidencyMap]":
        """Every worker's map; those that do not answer are left out."""
        asked: dict[DeviceName, Any] = {name: handle.residency.remote() for name, handle in self._crew.handles.items()}
        maps: dict[str, ResidencyMap] = {}
        for name, reference in asked.items():
            with contextlib.suppress(RayError):
                maps[str(name)] = ray.get(reference, timeout=REPORT_TIMEOUT_S)
        return maps

    def _values(self) -> Values:
        """Metrics of what this actor alone sees."""
        return of_predictor(self._predictor_stats()) + self._heartbeats.values(list(self._crew.handles))

    def _predictor_stats(self) -> PredictorStats | None:
        """The shadow's; other kinds are part of the engine, and well while that is."""
        kind = self._config.predictor_kind
        if self._shadow is not None:
            return self._shadow.stats()
        return None if kind is None else PredictorStats(kind=kind, state="healthy")

    # --- within -----------------------------------------------------------------------------------------

    def _kill_workers(self) -> None:
        self._crew.end()
        if self._shadow is not None:
            self._shadow.end()
        if self._desk is not None:
            self._desk.connect({})

    def _watch(self) -> None:
        while not self._holders.is_abandoned(time.monotonic()):
            time.sleep(WATCH_S)
            self._watch_shadow()
            self._heartbeats.listen(dict(self._crew.handles), WATCH_S)
        log.info("nobody holds application %s any more; ending its workers", self._app)
        self.shutdown()

    def _watch_shadow(self) -> None:
        """A shadow that Ray has started again is connected again; meanwhile engines are told that there is none."""
        if self._shadow is None or not self._clients or not self._start_lock.acquire(blocking=False):
            return
        try:
            if not self._shadow.is_well():
                self._connect_shadow(wait_s=REPORT_TIMEOUT_S)
        except Exception:  # a predictor is worth no more than time; the watch has workers to end one day
            log.exception("the shadow could not be connected")
        finally:
            self._start_lock.release()
