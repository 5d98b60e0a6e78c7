"""An engine's session with its cluster: everything from a configuration to a model that answers.

Used by ``raymoe.launch`` inside the caller's process and by the Serve deployment inside its replica.
"""

import logging
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymoe.actors.crew import HOST_SHARE
from raymoe.actors.lease import Lease
from raymoe.actors.names import NAMESPACE, Life, placement_name
from raymoe.actors.observing import Observer
from raymoe.actors.placement import PlacementShell
from raymoe.actors.reports import device_stats, settings_stats
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out, spreads
from raymoe.actors.tracing import ClusterTrace
from raymoe.actors.views import ClusterView
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.fingerprint import fingerprint
from raymoe.checkpoint.opening import open_configured
from raymoe.config import ClusterConfig, DeviceConfig, SchedulingConfig
from raymoe.engine.directory import View
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.errors import ExpertUnavailableError, RaymoeError, StartError
from raymoe.experts.build import make_worker
from raymoe.experts.host_memory import available_bytes
from raymoe.experts.worker import ExpertWorker
from raymoe.observe.metrics import requests_by_device
from raymoe.observe.stats import ClusterStats, DeviceStats, EngineStats, PredictorStats
from raymoe.placement.assignment import Fleet
from raymoe.placement.ownership import Capacity, Ownership, check_fits, primary_owners
from raymoe.transport.client import WorkerClient
from raymoe.transport.frames import Limits
from raymoe.transport.placement import PlacementClient
from raymoe.transport.shadow import ShadowClient
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

OnStage = Callable[[str], None]
"""Told of each stage of a start, in words."""

STATS_TIMEOUT_S = 15.0
PROGRESS_S = 1.0
REJOIN_TIMEOUT_S = 8.0  # the lease is not renewed meanwhile, and lapses after 15 s


class Session:
    """A model that answers, on workers found or started for application ``app``.

    The constructor blocks until everything is ready. Raises RaymoeError of the fitting kind where it can't be;
    nothing that it started is left running then.

    Attributes:
        scheduling: the settings in force: the configuration's, unless they were changed while the workers ran.
        refused_settings: why the last change of settings by Serve's ``user_config`` was not made; for the stats.
    """

    def __init__(self, config: ClusterConfig, app: str, on_stage: OnStage = lambda stage: None) -> None:
        self.config = config
        self.app = app
        self.scheduling = config.scheduling
        self.refused_settings: str | None = None
        self._changing = threading.Lock()
        on_stage(f"opening {config.model.source}")
        self.checkpoint = open_configured(config.model)
        self._placement: ActorHandle | None = None
        self._lease: Lease | None = None
        self._client: WorkerClient | None = None
        self._link: ShadowClient | None = None
        self._news: PlacementClient | None = None
        self._local: dict[DeviceName, ExpertWorker] = {}
        self._keys = KeyPair.create()
        self._holder = f"engine-{uuid.uuid4().hex}"
        self._ownership: Ownership = {}
        self._version = 0
        self._stale = False
        self.replication = 1
        try:
            dispatcher = self._connect(on_stage)
            on_stage("building the trunk")
            forecast = self._news.forecast if self._news is not None and bounded_devices(config) else None
            self.service = ModelService(self.checkpoint, config, dispatcher, on_forecast=forecast, link=self._link)
            self._adopt()
            if self._lease is not None:
                self.service.on_suspect = self._lease.hurry  # told at once, and what comes of it is heard soon
            self.observer = Observer(app, config, self.service, self._local, self._placement, self._engine_stats)
        except BaseException:
            self.close()
            raise
        on_stage("ready")

    # --- starting ---------------------------------------------------------------------------------------

    def _connect(self, on_stage: OnStage) -> Dispatcher:
        local = [device for device in self.config.devices if device.transport == "local"]
        remote = [device for device in self.config.devices if device.transport == "zmq"]
        check_promised_memory(self.config, self.checkpoint)
        set_threads(self.config, len(remote))
        self._local = {
            DeviceName(device.name): make_worker(self.checkpoint, device, self.config.scheduling) for device in local
        }
        memory = local_memory(local)
        has_shadow = self.config.predictor_kind == "shadow"
        if remote or has_shadow:
            on_stage(f"starting {len(remote)} expert workers{' and the shadow' if has_shadow else ''}")
            limits = message_limits(self.checkpoint)
            view = self._start_remote(memory, limits, on_stage)
            self._client = WorkerClient(view.endpoints, self._keys, limits)
            self._news = PlacementClient(view.placement, self._keys, limits)
            if has_shadow:
                self._link = ShadowClient(view.shadow, self._keys, limits, len(self.config.devices))
            ownership, self.replication, self.scheduling = view.ownership, view.replication, view.scheduling
            resident, self._version = view.resident, view.version
        else:
            ownership, resident = own_locally(self.checkpoint, self.config, memory), {}
        self._ownership = ownership
        for name, worker in self._local.items():
            on_stage(f"reading {len(ownership[name])} experts for {name}")
            worker.own(ownership[name])
            if self.config.scheduling.policy == "all_resident":
                worker.load_all()
        sizes = self.checkpoint.sizes()
        dispatcher = Dispatcher(
            sizes,
            primary_owners(sizes, ownership, spreads(self.config, sizes)),
            ownership=ownership,
            local=self._local,
            remote=self._client,
            timeout_s=self.config.scheduling.call_timeout_s,
            on_changes=self._news.publish if self._news is not None else None,
            bounded=bounded_devices(self.config),
            fleet=self._fleet(ownership),
            devices=[DeviceName(device.name) for device in self.config.devices],
        )
        for name, identifiers in resident.items():
            dispatcher.assume_resident(name, identifiers)
        return dispatcher

    def _fleet(self, ownership: Ownership) -> Fleet | None:
        if not self.config.scheduling.follows_orders:
            return None
        return cluster_fleet(self.config, self.checkpoint.sizes(), ownership)

    def _start_remote(self, memory: dict[DeviceName, int], limits: Limits, on_stage: OnStage) -> ClusterView:
        self._placement = find_or_create_placement(self.config, self.app, self.checkpoint, limits)
        self._lease = Lease(
            self.app,
            self._holder,
            tell=self._tell,
            standing=self._standing,
            on_restart=self._rejoin,
            on_life=self._on_life,
        )
        weights = fingerprint(self.checkpoint)
        reference: Any = self._placement.start.remote(memory, self._keys.public, self._holder, weights)
        while not ray.wait([reference], timeout=PROGRESS_S)[0]:
            try:
                done, wanted = ray.get(self._placement.progress.remote(), timeout=STATS_TIMEOUT_S)
            except RayError:
                continue
            if wanted:
                on_stage(f"reading experts into host memory: {done} of {wanted}")
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RaymoeError):
                raise error.cause from None
            raise StartError(f"the workers of {self.app} could not be started: {error}") from error
        except RayError as error:
            raise StartError(f"the workers of {self.app} could not be started: {error}") from error

    def _adopt(self) -> None:
        """Take over settings that were changed before this engine started."""
        if self.scheduling != self.config.scheduling:
            self.service.reconfigure(self.scheduling)
            for worker in self._local.values():
                worker.reconfigure(self.scheduling)

    # --- while it runs ----------------------------------------------------------------------------------

    def reconfigure(self, **changes: Any) -> None:
        """Change some settings of scheduling, such as ``alpha=0.3``; the others stay, and nothing is restarted.

        Raises ConfigError that names the field and what is allowed, and ExpertUnavailableError where the placement
        actor does not answer; nothing is changed then. Requests under way keep an alpha of their own.
        """
        with self._changing:
            self._schedule(self.scheduling.changed(changes))

    def schedule(self, scheduling: SchedulingConfig) -> None:
        """Put these settings in force as a whole. Raises ExpertUnavailableError as ``reconfigure`` does."""
        with self._changing:
            self._schedule(scheduling)

    def _schedule(self, scheduling: SchedulingConfig) -> None:
        if scheduling == self.scheduling:
            return
        self.service.reconfigure(scheduling)  # first, for it may refuse a profile
        try:
            self._tell_placement(scheduling)
        except BaseException:
            self.service.reconfigure(self.scheduling)
            raise
        for worker in self._local.values():
            worker.reconfigure(scheduling)
        self.scheduling = scheduling

    def _tell_placement(self, scheduling: SchedulingConfig) -> None:
        if self._placement is None:
            return
        reference: Any = self._placement.reconfigure.remote(scheduling.model_dump(mode="json"))
        try:
            silent: Any = ray.get(reference, timeout=STATS_TIMEOUT_S)
        except RayError as error:
            raise ExpertUnavailableError(
                f"the placement actor did not take the new settings, nothing was changed; try again: {error}"
            ) from error
        if silent:
            log.warning("%s: no answer to new settings; they come with the next start", ", ".join(silent))

    def _rejoin(self, placement: Any) -> None:
        """The placement actor was restarted: tell it owners and settings, and use its new socket."""
        self._stale = True  # its versions have nothing to do with those of its life before
        if self._news is not None:
            settings = self.scheduling.model_dump(mode="json")
            reference = placement.rejoin.remote(self._holder, self._keys.public, self._ownership, settings)
            self._news.move(ray.get(reference, timeout=REJOIN_TIMEOUT_S))

    def _on_life(self, life: Life) -> None:
        """The shadow may have come, gone, or moved; and so may workers."""
        if self._link is not None:
            self._link.move(life.shadow)
        if hasattr(self, "service") and (self._stale or life.version != self._version):
            self._take_view()

    def _take_view(self) -> None:
        """Let the engine go by the owners that there are now. On the lease's thread."""
        assert self._placement is not None, "a lease is on a placement actor"
        reference: Any = self._placement.view.remote()
        view: Any = ray.get(reference, timeout=STATS_TIMEOUT_S)
        primary = primary_owners(self.checkpoint.sizes(), view.ownership, spreads(self.config, self.checkpoint.sizes()))
        self.service.adopt(View(ownership=view.ownership, primary=primary, endpoints=view.endpoints))
        self._ownership, self._version, self._stale = view.ownership, view.version, False
        self.replication = view.replication

    def _standing(self) -> tuple[int | None, tuple[DeviceName, ...]]:
        """The version that the engine works with, and whom it waits for in vain."""
        if not hasattr(self, "service"):
            return 0, ()
        return self._version, self.service.suspects

    def _tell(self) -> EngineStats | None:
        """The engine's counts, once there is one."""
        return self._engine_stats() if hasattr(self, "service") else None

    # --- looking ----------------------------------------------------------------------------------------

    def stats(self, names: bool = True) -> ClusterStats:
        """Devices, local and remote, and the engine.

        Args:
            names: also of the resident experts, of which there may be ten thousands.
        """
        devices: dict[str, DeviceStats] = {}
        kind = self.config.predictor_kind
        predictor = PredictorStats(kind=kind, state="healthy") if kind is not None else None
        seen = ClusterStats(app=self.app, devices={})
        if self._placement is not None:
            answered: Any = ray.get(self._placement.stats.remote(names), timeout=STATS_TIMEOUT_S)
            seen = answered
            devices |= seen.devices
            predictor = seen.predictor or predictor
        for device in self.config.devices:
            worker = self._local.get(DeviceName(device.name))
            if worker is not None:
                report = worker.report(names=names)
                devices[device.name] = device_stats(device, report, node="local", pid=os.getpid())
        substituted = self.service.substituted
        bad_outputs = requests_by_device(self.service.report().faults)
        devices = {
            name: replace(stats, substituted=substituted.get(DeviceName(name), 0), bad_outputs=bad_outputs[name])
            for name, stats in devices.items()
        }
        return replace(
            seen,
            devices={device.name: devices[device.name] for device in self.config.devices if device.name in devices},
            engine=self._engine_stats(),
            replication=self.replication,
            policy=self.config.scheduling.policy,
            predictor=predictor,
            settings=settings_stats(self.scheduling),
        )

    def trace(self) -> ClusterTrace:
        """Records what all processes do while it is entered."""
        return ClusterTrace(self.app, self.config, self.service, self._local)

    def _engine_stats(self) -> EngineStats:
        card, report = self.service.card, self.service.report()
        routing = report.routing
        return EngineStats(
            model=card.name,
            architecture=card.architecture,
            dtype=card.dtype,
            hits=routing.hits,
            misses=routing.misses,
            hosted=routing.hosted,
            substituted=routing.substituted,
            substituted_gate_mass=routing.substituted_gate_mass,
            loads=routing.loads,
            bytes_loaded=routing.bytes_loaded,
            refused_settings=self.refused_settings,
            recall=routing.recall,
            lead_s=self.service.lead_s,
            degraded=routing.degraded,
            drafted=routing.drafted,
            accepted=routing.accepted,
            **{name: getattr(report, name) for name in report.__slots__ if name != "routing"},
        )

    def close(self) -> None:
        """Stop the engine and let go of the workers; they end when nobody else holds them."""
        observer, service = getattr(self, "observer", None), getattr(self, "service", None)
        if observer is not None:
            observer.close()
        if service is not None:
            service.close()
        for worker in self._local.values():
            worker.close()
        for part in (self._client, self._news, self._link, self._lease):
            if part is not None:
                part.close()


def check_promised_memory(config: ClusterConfig, checkpoint: Checkpoint) -> None:
    """Where every device names its host memory, the arithmetic needs no node: raise CapacityError before any starts."""
    promised = [
        Capacity(device=DeviceName(device.name), host_bytes=device.host_memory)
        for device in config.devices
        if device.host_memory is not None
    ]
    if len(promised) == len(config.devices):
        check_fits(checkpoint.sizes(), promised, config.replication if isinstance(config.replication, int) else 1)


def find_or_create_placement(config: ClusterConfig, app: str, checkpoint: Checkpoint, limits: Limits) -> ActorHandle:
    """The placement actor of ``app``. One that runs another configuration is ended first, with its workers."""
    name = placement_name(app)
    wanted = config.model_dump(mode="json")
    try:
        existing = ray.get_actor(name, NAMESPACE)
        if ray.get(existing.fingerprint.remote(), timeout=STATS_TIMEOUT_S) == wanted:
            return existing
        existing.shutdown.remote()
        wait_until_gone(name)
    except (ValueError, RayError):
        pass  # none there, or one that is on its way out
    remote_class: Any = ray.remote(PlacementShell)
    return remote_class.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=8,
        # on the engine's node: one that is lost must not take both the device on it and whoever repairs that. Not soft,
        # which Ray does not keep to where no CPU is asked for; where the node is gone, a new engine makes a new actor
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    ).remote(app, wanted, checkpoint.sizes(), limits)


def wait_until_gone(name: str, timeout_s: float = 30.0) -> None:
    """Wait until a named actor no longer exists. Raises StartError where it stays."""
    step_s, waited = 0.1, threading.Event()
    for _ in range(int(timeout_s / step_s)):
        try:
            ray.get_actor(name, NAMESPACE)
        except ValueError:
            return
        waited.wait(step_s)
    raise StartError(f"the actor {name} of an earlier start does not end; see `ray list actors`")


def cluster_status(app: str, names: bool = True) -> ClusterStats:
    """Stats of the workers of a running application, from any driver of its Ray cluster.

    With ``names``, also those of the resident experts.

    Raises StartError where no such application runs.
    """
    try:
        placement = ray.get_actor(placement_name(app), NAMESPACE)
        stats: Any = ray.get(placement.stats.remote(names), timeout=STATS_TIMEOUT_S)
        return stats
    except ValueError as error:
        raise StartError(f'no application "{app}" with remote workers runs on this Ray cluster') from error
    except RayError as error:
        raise StartError(f'the placement actor of "{app}" does not answer: {error}') from error


def own_locally(checkpoint: Checkpoint, config: ClusterConfig, memory: dict[DeviceName, int]) -> Ownership:
    """Owners where every device lives in this process; there is one copy of everything."""
    capacities = [Capacity(device=DeviceName(d.name), host_bytes=memory[DeviceName(d.name)]) for d in config.devices]
    replication = config.replication if isinstance(config.replication, int) else 1
    sizes = checkpoint.sizes()
    return hand_out(config, sizes, capacities, replication)


def local_memory(devices: list[DeviceConfig]) -> dict[DeviceName, int]:
    """Host memory for devices of this process: as configured, else an equal part of what is free."""
    share = int(HOST_SHARE * available_bytes()) // max(1, len(devices))
    return {DeviceName(device.name): device.host_memory or share for device in devices}


def set_threads(config: ClusterConfig, remote_workers: int) -> None:
    """Threads of the trunk: as configured, else every core that no worker needs, assuming they share the machine."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.trunk.threads or max(1, cores - remote_workers))


def message_limits(checkpoint: Checkpoint) -> Limits:
    """Bounds of messages for this model, with some room: hidden sizes of experts may differ from the config's."""
    sizes = checkpoint.sizes()
    hidden = max(shape[-1] for layer in checkpoint.layers for shape in layer.shapes.values())
    hidden = max(hidden, *(shape[0] for layer in checkpoint.layers for shape in layer.shapes.values()))
    top_k = max(size.top_k for size in sizes)
    defaults = Limits()
    rows = 2048
    return replace(
        defaults,
        layers=len(sizes),
        rows=rows,
        pairs=rows * max(top_k, 16),
        hidden=hidden,
        experts=max(size.experts for size in sizes),
        body_bytes=rows * max(top_k, 16) * hidden * 4 + (1 << 20),
    )
