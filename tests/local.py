"""A model service with one worker in this process: no Ray, no sockets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import benchmarks.local
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ClusterConfig
from raymoe.engine.service import ModelService


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
    with benchmarks.local.local_service(open_checkpoint(path, "float32"), config) as service:
        yield service
