"""How an application's actors on devices are created."""

from collections.abc import Mapping
from typing import Any

from raymoe.actors.names import NAMESPACE


def on_device(name: str, kind: str, resources: Mapping[str, float], node_labels: Mapping[str, str]) -> dict[str, Any]:
    """Ray's options for a detached actor that Ray starts again whenever it dies.

    Args:
        kind: of the device it computes on, "cpu" or "cuda:N".
        resources, node_labels: what its node must have.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,  # its threads are set by config; Ray's CPU slots would only refuse small machines
        "resources": dict(resources),
        "max_concurrency": 4,  # it answers questions while it is busy
        "scheduling_strategy": "DEFAULT",  # not captured by a placement group around its creator
    }
    if node_labels:
        options["label_selector"] = dict(node_labels)
    if kind != "cpu":  # Ray would hide all GPUs from an actor that asks it for none
        options["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    return options
