"""Workers and a shadow behind real sockets without Ray: each in a thread of this process, on loopback, with CURVE."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from predictor.forecast import LayerForecast
from raymoe.actors.session import message_limits
from raymoe.actors.shares import bounded_devices, cluster_fleet, hand_out
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.engine.shadow_host import ShadowHost, alignment_of, build_shadow_model
from raymoe.experts.build import make_worker
from raymoe.experts.worker import ExpertWorker
from raymoe.placement.ownership import Capacity, primary_owners
from raymoe.transport.client import WorkerClient
from raymoe.transport.server import WorkerServer
from raymoe.transport.shadow import ShadowClient, ShadowServer
from raymoe.transport.sockets import KeyPair
from raymoe.types import DeviceName

Lie = Callable[[LayerForecast], LayerForecast]
"""Turns a forecast into a wrong one."""


@contextmanager
def service_with_shadow(
    path: Path,
    devices: int = 4,
    slots: int | None = 2,
    *,
    group_size: int | None = None,
    predictor: dict[str, Any] | None = None,
    lie: Lie | None = None,
    link: dict[str, Any] | None = None,
    scheduling: dict[str, Any] | None = None,
) -> Iterator[tuple[ModelService, list[ExpertWorker], ShadowHost | None]]:
    """A float32 model without a cache, unless ``scheduling`` says otherwise. ``predictor`` None: nothing foretells."""
    checkpoint = open_checkpoint(path, "float32")
    sizes = checkpoint.sizes()
    largest = max(size.expert_bytes for size in sizes)
    slot_memory = None if slots is None else slots * largest
    config = ClusterConfig.parse(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [{"name": f"d{i}", "slot_memory": slot_memory, "link": link} for i in range(devices)],
            "scheduling": {"policy": "on_demand_shadow", "group_size": group_size, **(scheduling or {})},
            "predictor": predictor,
        }
    )
    names = [DeviceName(device.name) for device in config.devices]
    ownership = hand_out(config, sizes, [Capacity(device=name, host_bytes=1 << 33) for name in names], 1)
    fleet = cluster_fleet(config, sizes, ownership)
    engine_keys, shadow_keys, limits = KeyPair.create(), KeyPair.create(), message_limits(checkpoint)
    with ExitStack() as stack:
        workers, endpoints = [], {}
        for device, name in zip(config.devices, names, strict=True):
            worker = make_worker(checkpoint, device, config.scheduling)
            worker.own(ownership[name])
            stack.callback(worker.close)
            server = WorkerServer(worker, "127.0.0.1", limits, {engine_keys.public, shadow_keys.public})
            stack.callback(server.close)
            workers.append(worker)
            endpoints[name] = server.endpoint
        host, shadow_link = None, None
        if config.predictor_kind == "shadow":
            assert config.predictor is not None
            shadow_server = ShadowServer("127.0.0.1", limits)
            stack.callback(shadow_server.close)
            shadow_server.clients.keys.add(engine_keys.public)
            model = build_shadow_model(config.model, config.predictor)
            decides = config.scheduling.policy != "joint"
            host = ShadowHost(model, alignment_of(config.predictor), shadow_server, decides=decides)
            if lie is not None:
                tell, liar = host.shadow.on_forecast, lie
                host.shadow.on_forecast = lambda forecast: tell(liar(forecast))
            host.connect(endpoints, lambda: WorkerClient(endpoints, shadow_keys, limits), fleet, names)
            thread = threading.Thread(target=host.run, name="shadow", daemon=True)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(host.stop)
            shadow_link = ShadowClient(shadow_server.endpoint, engine_keys, limits, devices)
            stack.callback(shadow_link.close)
        client = WorkerClient(endpoints, engine_keys, limits)
        stack.callback(client.close)
        owners = primary_owners(sizes, ownership, [1] * len(sizes))
        dispatcher = Dispatcher(
            sizes,
            owners,
            local={},
            remote=client,
            timeout_s=60.0,
            bounded=bounded_devices(config),
            fleet=fleet,
            devices=names,
        )
        service = ModelService(checkpoint, config, dispatcher, link=shadow_link)
        stack.callback(service.close)
        yield service, workers, host
