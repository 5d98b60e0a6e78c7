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
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raymoe.actors.heartbeats import Heartbeats
from raymoe.actors.names import NAMESPACE, Life, placement_name, worker_name
from raymoe.actors.options import on_device
from raymoe.actors.reports import device_stats, down_stats, settings_stats
from raymoe.actors.shadow_keeper import ShadowKeeper
from raymoe.config import ClusterConfig, DeviceConfig, SchedulingConfig
from raymoe.errors import RaymoeError, StartError
from raymoe.observe.metrics import Values, of_predictor
from raymoe.observe.ray_metrics import Publisher, RayExporter
from raymoe.observe.stats import ClusterStats, EngineStats, PredictorStats
from raymoe.placement.assignment import Fleet, fleet_of
from raymoe.placement.digest_book import DigestBook, check_same_weights
from raymoe.placement.grouping import grouped_ownership
from raymoe.placement.ownership import (
    BYTES_PER_S,
    Capacity,
    Ownership,
    assign,
    check_fits,
    layer_spread,
    primary_owners,
    replication_factor,
)
from raymoe.placement.state import ClusterState, Holders
from raymoe.types import DeviceName, ExpertKey, LayerSize

if TYPE_CHECKING:
    from raymoe.actors.worker import WorkerInfo
    from raymoe.experts.usage import ResidencyMap
    from raymoe.transport.frames import Limits
    from raymoe.transport.placement import OrderDesk, PlacementServer
    from raymoe.transport.sockets import Endpoint

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # to schedule a worker and open the checkpoint there
LOAD_TIMEOUT_S = 3600.0  # to read a shard from disk
REPORT_TIMEOUT_S = 5.0
SHADOW_START_S = 300.0  # to open the checkpoint and quantise; then the model starts without
WATCH_S = 1.0
HOST_SHARE = 0.8  # of the free memory of a node, for all shards on it


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What an engine needs: owners, where the workers listen, and the placement actor's own socket.

    Attributes:
        resident: ids of the experts in each worker's slots.
        scheduling: the settings in force, which may have been changed since the configuration was read.
        shadow: where the shadow predictor listens; None where there is none, or it could not be started.
    """

    ownership: Ownership
    endpoints: "dict[DeviceName, Endpoint]"
    placement: "Endpoint"
    replication: int
    nodes: dict[DeviceName, str]
    resident: dict[DeviceName, tuple[int, ...]]
    scheduling: SchedulingConfig
    shadow: "Endpoint | None" = None


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
        self._workers: dict[DeviceName, ActorHandle] = {}
        self._infos: dict[DeviceName, WorkerInfo] = {}
        self._endpoints: dict[DeviceName, Endpoint] = {}
        self._clients: set[bytes] = set()
        self._server: PlacementServer | None = None
        self._desk: OrderDesk | None = None
        self._engine: tuple[str, EngineStats] | None = None
        self._shadow = ShadowKeeper(app, self._config, limits) if self._config.predictor_kind == "shadow" else None
        self._life = Life(actor=ray.get_runtime_context().get_actor_id() or "", start=uuid.uuid4().hex)
        self._replication = 1
        self._start_lock = threading.Lock()
        self._heartbeats = Heartbeats()
        self._digests = DigestBook()
        self._rebuild()
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

    def start(self, local: dict[DeviceName, int], client_key: bytes, fingerprint: str) -> ClusterView:
        """Start or find the workers, hand out experts, admit a client. Safe to call again.

        Args:
            local: host memory in bytes of devices that live in the engine's process.
            client_key: CURVE public key of the engine.
            fingerprint: of the engine's weights.

        Raises StartError, CapacityError or CheckpointError; all workers are ended then.
        """
        with self._start_lock:
            try:
                return self._start(local, client_key, fingerprint)
            except BaseException:
                self._kill_workers()
                raise

    def _start(self, local: dict[DeviceName, int], client_key: bytes, fingerprint: str) -> ClusterView:
        remote = [device for device in self._config.devices if device.transport == "zmq"]
        if self._shadow is not None:  # it quantises its experts while the workers read theirs
            self._shadow.create()
        self._workers = {DeviceName(device.name): self._find_or_create(device) for device in remote}
        self._infos = {name: self._describe(name, handle) for name, handle in self._workers.items()}
        check_same_weights(fingerprint, [(name, info.address, info.fingerprint) for name, info in self._infos.items()])
        capacities = self._capacities(remote, local)
        total = sum(size.experts * size.expert_bytes for size in self._sizes)
        self._replication = replication_factor(self._config.replication, total, capacities)
        check_fits(self._sizes, capacities, self._replication)
        current = {name: info.owned for name, info in self._infos.items() if info.owned}
        self._state.ownership = hand_out(self._config, self._sizes, capacities, self._replication, current or None)
        self._state.primary = primary_owners(self._sizes, self._state.ownership, spreads(self._config, self._sizes))
        self._load()
        self._tell_workers()
        endpoint = self._admit(client_key)
        return ClusterView(
            ownership=self._state.ownership,
            endpoints=dict(self._endpoints),
            placement=endpoint,
            replication=self._replication,
            nodes={name: info.address for name, info in self._infos.items()},
            resident={name: info.resident for name, info in self._infos.items()},
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
            self._tell_workers()
            endpoint = self._admit(client_key)
            self._connect_shadow(wait_s=REPORT_TIMEOUT_S)
            return endpoint

    def reconfigure(self, scheduling: dict[str, Any]) -> tuple[DeviceName, ...]:
        """Put other settings in force on all workers, and on those that are started later.

        Returns the workers that did not confirm in time; they get the settings when an engine starts again.
        """
        self._scheduling = SchedulingConfig.model_validate(scheduling)
        return self._tell_workers()

    def _tell_workers(self) -> tuple[DeviceName, ...]:
        settings = self._scheduling.model_dump(mode="json")
        asked: dict[Any, DeviceName] = {
            handle.reconfigure.remote(settings): name for name, handle in self._workers.items()
        }
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=REPORT_TIMEOUT_S) if asked else ([], [])
        failed = [reference for reference in done if not _succeeds(reference)]
        return tuple(asked[reference] for reference in (*silent, *failed))

    def _admit(self, client_key: bytes) -> "Endpoint":
        """Let a client in here and at the workers, which also take this actor's own orders."""
        from raymoe.transport.placement import OrderDesk, PlacementServer

        if self._desk is None:
            self._desk = OrderDesk(self._state, self._limits)
        self._clients.add(client_key)
        binding = self._binding()
        for name, handle in self._workers.items():
            address = binding(self._infos[name].address)
            keys = (*self._clients, self._desk.keys.public)
            self._endpoints[name] = _get(handle.serve.remote(address, keys), REPORT_TIMEOUT_S * 6)
        bounded = bounded_devices(self._config)
        self._desk.connect({name: endpoint for name, endpoint in self._endpoints.items() if name in bounded})
        if self._server is None:
            own_address = binding(ray.util.get_node_ip_address())
            self._server = PlacementServer(self._state, own_address, self._limits, self._desk.forecast)
        self._server.clients.keys.add(client_key)
        return self._server.endpoint

    def _binding(self) -> Callable[[str], str]:
        """What to bind on a node, by its address: loopback while there is no other node. Ray is asked once."""
        addresses = {info.address for info in self._infos.values()} | {ray.util.get_node_ip_address()}
        nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        alone = len(addresses) == 1 == len(nodes)
        return lambda node_address: self._config.bind or ("127.0.0.1" if alone else node_address)

    def _connect_shadow(self, wait_s: float) -> "Endpoint | None":
        """Let the shadow hear the clients and reach the workers; whatever fails is told by the stats."""
        if self._shadow is None:
            return None
        fleet = cluster_fleet(self._config, self._sizes, self._state.ownership)
        info = self._shadow.find(wait_s)
        if info is not None:
            keys, binding = (info.public_key,), self._binding()
            admitted: list[Any] = [
                handle.serve.remote(binding(self._infos[name].address), keys) for name, handle in self._workers.items()
            ]
            if admitted:
                ray.wait(admitted, num_returns=len(admitted), timeout=REPORT_TIMEOUT_S)
            self._shadow.connect(binding(info.address), tuple(self._clients), fleet, dict(self._endpoints))
        return self._shadow.endpoint

    def progress(self) -> tuple[int, int]:
        """(experts in host memory, experts to be there) over all workers, while ``start`` runs."""
        handles = list(self._workers.values())
        wanted = sum(len(keys) for name, keys in self._state.ownership.items() if name in self._workers)
        try:
            return sum(ray.get([handle.progress.remote() for handle in handles], timeout=REPORT_TIMEOUT_S)), wanted
        except RayError:
            return 0, wanted

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
        asked: dict[DeviceName, Any] = {name: handle.report.remote(names) for name, handle in self._workers.items()}
        kinds = {DeviceName(device.name): device for device in self._config.devices}
        devices = {}
        for name, reference in asked.items():
            try:
                report, dropped = ray.get(reference, timeout=REPORT_TIMEOUT_S)
            except RayError:
                info, age_s = self._infos[name], self._heartbeats.age_s(name)
                devices[str(name)] = down_stats(kinds[name], node=info.node, pid=info.pid, heartbeat_age_s=age_s)
                continue
            self._heartbeats.heard(name)
            info = self._infos[name]
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
        asked: dict[DeviceName, Any] = {name: handle.residency.remote() for name, handle in self._workers.items()}
        maps: dict[str, ResidencyMap] = {}
        for name, reference in asked.items():
            with contextlib.suppress(RayError):
                maps[str(name)] = ray.get(reference, timeout=REPORT_TIMEOUT_S)
        return maps

    def _values(self) -> Values:
        """Metrics of what this actor alone sees."""
        return of_predictor(self._predictor_stats()) + self._heartbeats.values(list(self._workers))

    def _predictor_stats(self) -> PredictorStats | None:
        """The shadow's; other kinds are part of the engine, and well while that is."""
        kind = self._config.predictor_kind
        if self._shadow is not None:
            return self._shadow.stats()
        return None if kind is None else PredictorStats(kind=kind, state="healthy")

    # --- within -----------------------------------------------------------------------------------------

    def _rebuild(self) -> None:
        """Where workers run already, this actor was restarted: ask them what they own and where they listen."""
        for device in self._config.devices:
            name = DeviceName(device.name)
            with contextlib.suppress(ValueError, RayError):
                handle = ray.get_actor(worker_name(self._app, device.name), NAMESPACE)
                info: Any = ray.get(handle.describe.remote(), timeout=REPORT_TIMEOUT_S)
                self._workers[name], self._infos[name] = handle, info
                self._state.ownership[name] = info.owned
                if info.endpoint is not None:
                    self._endpoints[name] = info.endpoint
                self._digests.add(name, _get(handle.digests.remote(), REPORT_TIMEOUT_S))

    def _find_or_create(self, device: DeviceConfig) -> ActorHandle:
        from raymoe.actors.worker import WorkerShell

        name = worker_name(self._app, device.name)
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError:
            pass
        options = on_device(name, device.kind, device.resources, device.node_labels)
        model = self._config.model.model_dump(mode="json")
        remote_class: Any = ray.remote(WorkerShell)
        settings = self._scheduling.model_dump(mode="json")
        return remote_class.options(**options).remote(
            self._app, model, device.model_dump(mode="json"), self._limits, settings
        )

    def _describe(self, name: DeviceName, handle: ActorHandle) -> "WorkerInfo":
        try:
            return _get(handle.describe.remote(), START_TIMEOUT_S)
        except GetTimeoutError as error:
            device = next(device for device in self._config.devices if device.name == name)
            wanted = {**device.node_labels, **device.resources} or "any node"
            raise StartError(
                f'device "{name}" was not scheduled within {START_TIMEOUT_S:g} s; no alive node offers {wanted}? '
                "see `ray status`"
            ) from error

    def _capacities(self, remote: list[DeviceConfig], local: dict[DeviceName, int]) -> list[Capacity]:
        """Host memory per device: as configured, else an equal part of what is free on its node."""
        sharing: dict[str, int] = {}
        for device in remote:
            node = self._infos[DeviceName(device.name)].node
            sharing[node] = sharing.get(node, 0) + 1
        capacities = []
        for device in self._config.devices:
            name = DeviceName(device.name)
            if name in local:
                capacities.append(Capacity(device=name, host_bytes=local[name]))
                continue
            info = self._infos[name]
            held = sum(self._sizes[key.layer].expert_bytes for key in info.owned)
            free = int(HOST_SHARE * info.free_host_bytes) // sharing[info.node] + held
            capacities.append(Capacity(device=name, host_bytes=device.host_memory or free))
        return capacities

    def _load(self) -> None:
        everything = self._config.scheduling.policy == "all_resident"
        loads: dict[DeviceName, Any] = {}
        for name, handle in self._workers.items():
            here = set(self._infos[name].owned)
            missing: tuple[ExpertKey, ...] = tuple(key for key in self._state.ownership[name] if key not in here)
            loads[name] = handle.own.remote(missing, everything, self._digests.of(missing))
        for name, reference in loads.items():
            self._digests.add(name, _get(reference, LOAD_TIMEOUT_S))

    def _kill_workers(self) -> None:
        for device in self._config.devices:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(worker_name(self._app, device.name), NAMESPACE), no_restart=True)
        self._workers, self._infos, self._endpoints, self._digests = {}, {}, {}, DigestBook()
        if self._shadow is not None:
            self._shadow.end()
        if self._desk is not None:
            self._desk.connect({})

    def _watch(self) -> None:
        while not self._holders.is_abandoned(time.monotonic()):
            time.sleep(WATCH_S)
            self._watch_shadow()
            self._heartbeats.listen(dict(self._workers), WATCH_S)
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


def hand_out(
    config: ClusterConfig,
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    replication: int,
    current: Ownership | None = None,
) -> Ownership:
    """Who owns what, by policy: without a cache any worker of a group must be able to load its layers' experts."""
    if config.scheduling.follows_orders:
        return grouped_ownership(sizes, capacities, group_size(config, sizes), current)
    return assign(sizes, capacities, replication, spreads(config, sizes), current)


def cluster_fleet(config: ClusterConfig, sizes: tuple[LayerSize, ...], ownership: Ownership) -> Fleet:
    """The workers as the cacheless policy sees them, in the configuration's order."""
    largest = max(size.expert_bytes for size in sizes)
    most = max(size.experts for size in sizes)
    slots = tuple(max(1, device.slot_memory // largest) if device.slot_memory else most for device in config.devices)
    rates = [device.link.bytes_per_s if device.link is not None else None for device in config.devices]
    load_s_W = np.array([math.nan if rate is None else largest / rate for rate in rates])
    devices = [DeviceName(device.name) for device in config.devices]
    return fleet_of(devices, ownership, sizes, group_size(config, sizes), load_s_W, slots)


def group_size(config: ClusterConfig, sizes: tuple[LayerSize, ...]) -> int:
    """Workers that serve one layer: as configured, else one per expert of a token."""
    return config.scheduling.group_size or max(size.top_k for size in sizes)


def bounded_devices(config: ClusterConfig) -> frozenset[DeviceName]:
    """Remote devices whose experts come and go; the others hold all that they own ready for good."""
    if config.scheduling.policy == "all_resident":
        return frozenset()
    return frozenset(
        DeviceName(device.name) for device in config.devices if device.transport == "zmq" and device.has_slots
    )


def spreads(config: ClusterConfig, sizes: tuple[LayerSize, ...]) -> list[int]:
    """Over how many workers each layer is spread, given the slowest link that is known."""
    rate = min((float(device.link.bytes_per_s) for device in config.devices if device.link), default=BYTES_PER_S)
    return [layer_spread(size, len(config.devices), rate) for size in sizes]


def _succeeds(reference: Any) -> bool:
    try:
        ray.get(reference)
        return True
    except RayError as error:
        log.warning("a worker did not take its settings: %s", error)
        return False


def _get(reference: Any, timeout_s: float) -> Any:
    """``ray.get`` with our own errors unwrapped."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RaymoeError):
            raise error.cause from None
        raise
