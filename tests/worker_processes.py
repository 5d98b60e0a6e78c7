"""Expert workers as processes of their own behind real sockets, without Ray, for tests that kill and stop them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from raymoe.actors.session import message_limits
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out, spreads
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.directory import View
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.build import make_worker
from raymoe.experts.call import ExpertCall
from raymoe.placement.ownership import Capacity, Ownership, assign, primary_owners
from raymoe.transport.client import WorkerClient
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import Endpoint, KeyPair
from raymoe.types import DeviceName, ExpertKey

START_S = 120.0  # to fork, open a small checkpoint and read a shard on a busy machine
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.worker_processes"])


def serve(config: ClusterConfig, name: str, keys: tuple[ExpertKey, ...], client: bytes, pipe: Connection) -> None:
    """A worker's process: tells its endpoint, and serves until the other end of the pipe is closed."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(config.model.source, config.model.dtype)
    device = next(device for device in config.devices if device.name == name)
    worker = make_worker(checkpoint, device, config.scheduling)
    worker.own(keys)
    if config.scheduling.policy == "all_resident":
        worker.load_all()
    server = WorkerServer(worker, "127.0.0.1", message_limits(checkpoint), {client})
    pipe.send(server.endpoint)
    try:
        pipe.recv()
    except EOFError:
        os._exit(0)


class Hooked(WorkerClient):
    """A client that tells of each call sent.

    Attributes:
        on_sent: told of device and call.
        calls: how many each device was sent since somebody cleared it.
        sent_s: when each was sent, and for which layer.
    """

    on_sent: Callable[[DeviceName, ExpertCall], None] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        self.calls: dict[DeviceName, int] = {}
        self.sent_s: list[tuple[float, int]] = []
        super().__init__(*args, **options)

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        request = super().send(device, call)
        self.sent_s.append((time.monotonic(), call.layer))
        self.calls[device] = self.calls.get(device, 0) + 1
        if self.on_sent is not None:
            self.on_sent(device, call)
        return request


@dataclass
class Processes:
    """Workers, one process each.

    Attributes:
        ownership: of each while it is up.
    """

    config: ClusterConfig
    ownership: Ownership
    client: bytes
    endpoints: dict[DeviceName, Endpoint] = field(default_factory=dict)
    _running: dict[DeviceName, tuple[BaseProcess, Connection]] = field(default_factory=dict)

    def begin(self, name: DeviceName) -> None:
        """Start a worker; ``ready`` waits for it."""
        here, there = FORKS.Pipe()
        arguments = (self.config, name, self.ownership[name], self.client, there)
        process = FORKS.Process(target=serve, args=arguments, daemon=True)
        process.start()
        there.close()
        self._running[name] = process, here

    def ready(self, name: DeviceName) -> None:
        """Wait until it serves."""
        pipe = self._running[name][1]
        assert pipe.poll(START_S), f"{name} did not start"
        self.endpoints[name] = pipe.recv()

    def signal(self, name: DeviceName, number: int) -> None:
        """Send its process a signal; one that was killed is gone for good."""
        process, _ = self._running[name]
        assert process.pid is not None
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            self.endpoints.pop(name)

    def again(self, name: DeviceName) -> None:
        """A new process in the place of one that was killed."""
        process, pipe = self._running.pop(name)
        process.join(START_S)
        pipe.close()
        self.begin(name)
        self.ready(name)

    def close(self) -> None:
        """End all of them."""
        for process, pipe in self._running.values():
            pipe.close()
            process.kill()
            process.join(START_S)


@dataclass
class Running:
    """A model on such workers."""

    service: ModelService
    client: Hooked
    processes: Processes
    per_layer: list[int]

    def adopt(self) -> None:
        """Tell the engine who is up, and what these own."""
        up = self.processes.endpoints
        ownership = {name: keys for name, keys in self.processes.ownership.items() if name in up}
        primary = primary_owners(self.service.checkpoint.sizes(), ownership, self.per_layer)
        self.service.adopt(View(ownership=ownership, primary=primary, endpoints=dict(up)))


@contextmanager
def service_over_processes(
    path: Path,
    devices: int = 2,
    replication: int = 2,
    slot_memory: int | None = None,
    scheduling: dict[str, Any] | None = None,
    predictor: dict[str, Any] | None = None,
    trunk: dict[str, Any] | None = None,
    spread: int | None = None,
) -> Iterator[Running]:
    """A float32 model whose workers are processes; ``spread`` is over how many of them each layer's experts lie."""
    config = ClusterConfig.parse(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [{"name": f"d{i}", "slot_memory": slot_memory} for i in range(devices)],
            "scheduling": scheduling or {},
            "predictor": predictor,
            "trunk": trunk or {},
        }
    )
    checkpoint = open_checkpoint(path, "float32")
    sizes, names = checkpoint.sizes(), [DeviceName(device.name) for device in config.devices]
    per_layer = spreads(config, sizes) if spread is None else [spread] * len(sizes)
    capacities = [Capacity(device=name, host_bytes=1 << 33) for name in names]
    if spread is None:
        ownership = hand_out(config, sizes, capacities, replication)
    else:
        ownership = assign(sizes, capacities, replication, per_layer)
    keys = KeyPair.create()
    processes = Processes(config, ownership, keys.public)
    try:
        for name in names:
            processes.begin(name)
        for name in names:
            processes.ready(name)
        client = Hooked(processes.endpoints, keys, message_limits(checkpoint))
        dispatcher = Dispatcher(
            sizes,
            primary_owners(sizes, ownership, per_layer),
            ownership=ownership,
            local={},
            remote=client,
            timeout_s=60.0,
            bounded=bounded_devices(config),
            fleet=cluster_fleet(config, sizes, ownership) if config.scheduling.follows_orders else None,
            devices=names,
        )
        service = ModelService(checkpoint, config, dispatcher)
        try:
            yield Running(service, client, processes, per_layer)
        finally:
            service.close()
            client.close()
    finally:
        processes.close()
