"""A model whose only device is in this process: no Ray, no sockets."""

from collections.abc import Iterator
from contextlib import contextmanager

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.service import ModelService
from raymoe.experts.build import make_worker
from raymoe.types import DeviceName, ExpertKey


@contextmanager
def local_service(checkpoint: Checkpoint, config: ClusterConfig, *, load_all: bool = False) -> Iterator[ModelService]:
    """The service over the configuration's first device, which owns every expert.

    Args:
        load_all: bring every expert into a slot first.
    """
    sizes = checkpoint.sizes()
    keys = [ExpertKey(layer=i, expert=e) for i, size in enumerate(sizes) for e in range(size.experts)]
    worker = make_worker(checkpoint, config.devices[0], config.scheduling)
    worker.own(keys)
    if load_all:
        worker.load_all()
    name = DeviceName(config.devices[0].name)
    dispatcher = Dispatcher(sizes, dict.fromkeys(keys, name), local={name: worker}, remote=None, timeout_s=60.0)
    service = ModelService(checkpoint, config, dispatcher)
    try:
        yield service
    finally:
        service.close()
        worker.close()
