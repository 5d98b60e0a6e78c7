"""A model service with one worker in this process: no Ray, no sockets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.build import make_worker
from raymoe.types import DeviceName, ExpertKey


@contextmanager
def local_service(
    path: Path, slot_memory: int | None = None, trunk: dict[str, Any] | None = None, **scheduling: Any
) -> Iterator[ModelService]:
    """A float32 model on one local CPU device."""
    config = ClusterConfig.parse(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "devices": [{"name": "cpu-0", "transport": "local", "slot_memory": slot_memory}],
            "scheduling": scheduling,
            "trunk": trunk or {},
        }
    )
    checkpoint = open_checkpoint(path, "float32")
    sizes = checkpoint.sizes()
    keys = [ExpertKey(layer=i, expert=e) for i, size in enumerate(sizes) for e in range(size.experts)]
    worker = make_worker(checkpoint, config.devices[0], config.scheduling)
    worker.own(keys)
    name = DeviceName("cpu-0")
    dispatcher = Dispatcher(sizes, dict.fromkeys(keys, name), local={name: worker}, remote=None, timeout_s=60.0)
    service = ModelService(checkpoint, config, dispatcher)
    try:
        yield service
    finally:
        service.close()
        worker.close()
