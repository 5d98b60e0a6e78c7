"""Models and clusters for tests of planning: exact numbers, no files."""

from typing import Any

from raymoe.planning.cluster import DevicesFile
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import Cluster, cluster_of
from raymoe.types import LayerSize

EXPERT_BYTES = 196_608


def embedded(**changes: Any) -> ModelFacts:
    """Sizes of the embedded model in float32."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "model_type": "qwen2_moe",
        "dtype": "float32",
        "known_from": "headers",
        "element_bytes": 4,
        "sizes": (LayerSize(experts=32, expert_bytes=EXPERT_BYTES, top_k=4),) * 8,
        "hidden": 256,
        "trunk_bytes": 14_000_000,
        "head_bytes": 4096 * 256 * 4,
        "table_bytes": 0,
        "kv_bytes": 8192,
    }
    return ModelFacts(**{**fields, **changes})


def mixtral() -> ModelFacts:
    """Mixtral-8x7B in float32."""
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    table = 32_000 * 4096 * 4
    return embedded(
        name="mixtral-8x7b",
        model_type="mixtral",
        sizes=(LayerSize(experts=8, expert_bytes=3 * 4096 * 14336 * 4, top_k=2),) * 32,
        hidden=4096,
        trunk_bytes=32 * attention * 4 + 2 * table,
        head_bytes=table,
        table_bytes=table,
        kv_bytes=262_144,
    )


def device(name: str = "worker", **changes: Any) -> dict[str, Any]:
    """A device with every time measured, for the embedded model: a layer's trunk takes 2 ms, an expert 0.1 ms."""
    fields: dict[str, Any] = {
        "name": name,
        "memory": "1GB",
        "host_memory": "1GB",
        "slot_memory": 64 * EXPERT_BYTES,
        "link": {"bytes_per_s": "50MB"},
        "compute": {"flops": 1e10, "bytes_per_s": "10GB"},
        "overhead_s": 1e-3,
        "times": {"main_layer_s": 2e-3, "head_s": 1e-3, "expert_s": 1e-4, "load_s": 4e-3, "shadow_layer_s": 1e-3},
    }
    return {**fields, **changes}


def cluster(*devices: dict[str, Any], **more: Any) -> Cluster:
    """A cluster of these devices, on a network that costs nothing."""
    network = {"network": {"bytes_per_s": 10**15, "latency_s": 0.0}}
    return cluster_of(DevicesFile.parse({"devices": list(devices), **network, **more}))
