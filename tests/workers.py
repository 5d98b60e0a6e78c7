"""Workers behind real sockets without Ray: each in a thread of this process, on loopback, with CURVE."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from raymoe.actors.session import message_limits
from raymoe.actors.shares import bounded_devices, spreads
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.build import make_worker
from raymoe.experts.worker import ExpertWorker
from raymoe.placement.ownership import Capacity, assign, primary_owners
from raymoe.placement.state import ClusterState
from raymoe.transport.client import WorkerClient
from raymoe.transport.placement import OrderDesk, PlacementClient, PlacementServer
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName


@contextmanager
def service_over_sockets(
    path: Path,
    devices: int,
    slot_memory: int | None,
    spread: int | None = None,
    scheduling: dict[str, Any] | None = None,
) -> Iterator[tuple[ModelService, list[ExpertWorker]]]:
    """A float32 model whose ``devices`` workers are reached through ZeroMQ, as is the placement's socket."""
    config = ClusterConfig.model_validate(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [{"name": f"d{i}", "slot_memory": slot_memory} for i in range(devices)],
            "scheduling": scheduling or {},
        }
    )
    checkpoint = open_checkpoint(path, "float32")
    sizes = checkpoint.sizes()
    per_layer = spreads(config, sizes) if spread is None else [spread] * len(sizes)
    capacities = [Capacity(device=DeviceName(device.name), host_bytes=1 << 33) for device in config.devices]
    ownership = assign(sizes, capacities, 1, per_layer)
    owners = primary_owners(sizes, ownership, per_layer)
    keys, limits = KeyPair.create(), message_limits(checkpoint)
    state = ClusterState(ownership=ownership, primary=owners)
    with ExitStack() as stack:
        desk = OrderDesk(state, limits)
        stack.callback(desk.close)
        workers, endpoints = [], {}
        for device in config.devices:
            worker = make_worker(checkpoint, device, config.scheduling)
            worker.own(ownership[DeviceName(device.name)])
            stack.callback(worker.close)
            server = WorkerServer(worker, "127.0.0.1", limits, {keys.public, desk.keys.public})
            stack.callback(server.close)
            workers.append(worker)
            endpoints[DeviceName(device.name)] = server.endpoint
        client = WorkerClient(endpoints, keys, limits)
        stack.callback(client.close)
        desk.connect(endpoints)
        placement = PlacementServer(state, "127.0.0.1", limits, desk.forecast)
        stack.callback(placement.close)
        placement.clients.keys.add(keys.public)
        news = PlacementClient(placement.endpoint, keys, limits)
        stack.callback(news.close)
        dispatcher = Dispatcher(sizes, owners, local={}, remote=client, timeout_s=60.0, bounded=bounded_devices(config))
        service = ModelService(checkpoint, config, dispatcher, on_forecast=news.forecast)
        stack.callback(service.close)
        yield service, workers
