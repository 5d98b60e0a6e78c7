"""The expert worker as a Ray actor: a thin shell that says where it lives and hands calls on."""

import os
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import torch

from raymoe.actors.reports import device_stats
from raymoe.config import DeviceConfig, ModelConfig, SchedulingConfig
from raymoe.errors import ConfigError
from raymoe.observe import metrics
from raymoe.observe.ray_metrics import Publisher, RayExporter
from raymoe.observe.trace import Recording
from raymoe.transport.frames import Limits
from raymoe.transport.sockets import Endpoint
from raymoe.types import ExpertDigests, ExpertKey

if TYPE_CHECKING:
    from raymoe.experts.report import ResidencyMap, WorkerReport
    from raymoe.transport.server import WorkerServer


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """Where a worker lives, what its node can hold, and how it schedules.

    Attributes:
        incarnation: names this process; another one has another.
        owned: its shard, empty for a fresh one.
        resident: ids of the experts in its slots; empty where it has none.
        fingerprint: of the weights that it has open.
    """

    incarnation: str
    node: str
    address: str
    pid: int
    free_host_bytes: int
    owned: tuple[ExpertKey, ...]
    resident: tuple[int, ...]
    endpoint: Endpoint | None
    scheduling: SchedulingConfig
    fingerprint: str


class WorkerShell:
    """One expert worker. Raises CheckpointError where the checkpoint can't be opened on this node."""

    def __init__(
        self, app: str, model: dict[str, Any], device: dict[str, Any], limits: Limits, scheduling: dict[str, Any]
    ) -> None:
        # here and not above: transformers takes seconds to import, and the placement actor needs only the class
        from raymoe.checkpoint.fingerprint import fingerprint
        from raymoe.checkpoint.opening import open_configured
        from raymoe.experts.build import default_threads, make_worker

        self._device = DeviceConfig.model_validate(device)
        self._limits = limits
        torch.set_num_threads(self._device.threads or default_threads(self._device))
        self._checkpoint = open_configured(ModelConfig.model_validate(model))
        self._fingerprint = fingerprint(self._checkpoint)
        self._scheduling = SchedulingConfig.model_validate(scheduling)
        self._worker = make_worker(self._checkpoint, self._device, self._scheduling)
        self._incarnation = uuid.uuid4().hex
        self._server: WorkerServer | None = None
        self._publisher = Publisher(RayExporter(app), self._values).start()

    def describe(self) -> WorkerInfo:
        """Node, address, free memory, shard, residency, endpoint and settings."""
        from raymoe.experts.call import expert_id
        from raymoe.experts.host_memory import available_bytes

        resident = self._worker.report().resident if self._worker.has_slots else ()
        return WorkerInfo(
            incarnation=self._incarnation,
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            free_host_bytes=available_bytes(),
            owned=self._worker.owned,
            resident=tuple(expert_id(layer, expert) for layer, expert in resident),
            endpoint=self._server.endpoint if self._server else None,
            scheduling=self._scheduling,
            fingerprint=self._fingerprint,
        )

    def own(self, keys: tuple[ExpertKey, ...], load_all: bool, known: ExpertDigests | None = None) -> ExpertDigests:
        """Read experts into host memory, and with ``load_all`` into slots. Returns the digests of what was read.

        Args:
            known: of those that other workers have read.

        Raises CheckpointError where an expert can't be read or is not what others have read, and CapacityError where
        memory is short; what was read before is owned.
        """
        self._checkpoint.expect_experts(known or {})
        self._worker.own(keys)
        if load_all:
            self._worker.load_all()
        return self._checkpoint.expert_digests(keys)

    def digests(self) -> ExpertDigests:
        """Of all experts in its shard, as they were read."""
        return self._checkpoint.expert_digests(self._worker.owned)

    def disown(self, keys: tuple[ExpertKey, ...]) -> None:
        """Give experts up, and their memory."""
        self._worker.disown(keys)

    def reconfigure(self, scheduling: dict[str, Any]) -> None:
        """Evict, prefetch and assist by other settings from the next call on."""
        self._scheduling = SchedulingConfig.model_validate(scheduling)
        self._worker.reconfigure(self._scheduling)

    def progress(self) -> int:
        """How many experts are in host memory now."""
        return len(self._worker.store.experts)

    def serve(self, address: str, clients: tuple[bytes, ...]) -> Endpoint:
        """Open the data plane on ``address`` for the given client keys; a second call only admits more clients."""
        from raymoe.transport.server import WorkerServer

        if self._server is None:
            try:
                self._server = WorkerServer(
                    self._worker,
                    address,
                    self._limits,
                    set(clients),
                    ports=self._device.ports,
                    advertise=self._device.advertise,
                )
            except OSError as error:
                raise ConfigError(f'device "{self._device.name}" can\'t bind {error}') from error
        self._server.clients.keys.update(clients)
        return self._server.endpoint

    def trace(self, on: bool) -> Recording | None:
        """Begin to record; or end it, which returns what was recorded."""
        return self._worker.trace(on)

    def report(self, names: bool = True) -> "tuple[WorkerReport, int]":
        """The worker's own report, and how many malformed messages were dropped.

        Args:
            names: also of the resident experts.
        """
        report = self._worker.report(names=names)
        if self._server is None:
            return report, 0
        return replace(report, refused_clients=self._server.refused), self._server.dropped

    def residency(self) -> "ResidencyMap":
        """Where every expert is, and how much it is used."""
        return self._worker.residency()

    def _values(self) -> metrics.Values:
        report, dropped = self.report(names=False)
        return metrics.of_device(device_stats(self._device, report, node="", pid=0, dropped_messages=dropped))
