"""Wires plain classes into a Serve application: an ingress before one engine."""

import os
from typing import Any

from ray import serve
from ray.serve import Application

from raymoe.config import ClusterConfig
from raymoe.serve.engine_deployment import EngineServer
from raymoe.serve.ingress import Ingress
from raymoe.serve.key_source import environment_keys

SHED_ROOM = 256  # requests under way beside those the engine takes, so that it can refuse them itself, in JSON
LOOK_ROOM = 256  # requests that only look, and those that an ingress is about to refuse
CPU_SHARE = 0.1  # of what Ray counts, so that a machine of two cores holds several applications
INGRESS_SHARE = 0.01  # not 0, or it may come to live on a machine that is there for its experts, and be lost with it
START_ATTEMPTS = 1  # what stops an engine at first is told at once; one that has run is restarted for ever
HEALTH_PERIOD_S = 1.0  # the mean time to notice a death is half of it; a check costs about a millisecond
HEALTH_TIMEOUT_S = 30.0  # a long prefill on few cores keeps the interpreter busy


def build_application(config: ClusterConfig) -> Application:
    """The Serve application of a cluster. Starts nothing, and touches no Ray. Raises ConfigError for wrong keys.

    API keys come from ``serving.keys_file``, which the ingress reads, and from this process's environment: what
    travels are hashes.

    Its actors carry the name under which Serve runs it, so that several can run side by side.
    """
    engine = serve.deployment(name="engine", **engine_options(config))(EngineServer)
    ingress = serve.deployment(name="ingress", **ingress_options(config))(serve.ingress()(Ingress))
    return ingress.bind(config, engine.bind(config), environment_keys(os.environ), most_at_once(config))


def engine_options(config: ClusterConfig) -> dict[str, Any]:
    """Serve's options of the engine."""
    actor: dict[str, Any] = {"num_cpus": CPU_SHARE, "resources": dict(config.trunk.resources)}
    if config.trunk.node_labels:
        actor["label_selector"] = dict(config.trunk.node_labels)
    local = [device.kind for device in config.devices if device.transport == "local"]
    if any(kind != "cpu" for kind in [config.trunk.device, *local]):
        # Ray would hide all GPUs from an actor that asks it for none
        actor["runtime_env"] = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    return {
        **_common(config),
        "num_replicas": 1,
        "max_constructor_retry_count": START_ATTEMPTS,
        "user_config": {},  # so that taking it out of a Serve config file undoes what it said
        "ray_actor_options": actor,
    }


def ingress_options(config: ClusterConfig) -> dict[str, Any]:
    """Serve's options of the ingress."""
    most = most_at_once(config) + LOOK_ROOM
    return {**_common(config), "max_ongoing_requests": most, "ray_actor_options": {"num_cpus": INGRESS_SHARE}}


def most_at_once(config: ClusterConfig) -> int:
    """Requests under way that an ingress lets in: what the engine takes, and some that it refuses itself."""
    return config.trunk.max_running + config.trunk.max_waiting + SHED_ROOM


def _common(config: ClusterConfig) -> dict[str, Any]:
    """Serve queues what is beyond ``max_ongoing_requests`` with whoever sends it; that has an end as well."""
    return {
        "max_ongoing_requests": most_at_once(config),
        "max_queued_requests": most_at_once(config),
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.serving.drain_timeout_s,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
    }
