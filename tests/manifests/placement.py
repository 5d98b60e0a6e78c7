"""Whether the RayService can do what its embedded configuration says: a pod for each device, with memory, GPU, files
and keys, and the traps of KubeRay kept away from.
"""

from collections.abc import Iterator
from typing import Any

import click
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.scripts.scripts import start

from deployments.app import BuildArgs
from raymoe.config import ClusterConfig, DeviceConfig
from raymoe.planning.pods import GPU, OBJECT_STORE_BYTES
from tests.manifests.pods import Pod, application, pods, serve_config, service
from tests.manifests.references import has
from tests.manifests.rendering import Document

AGENT_PORT = 52365  # of Ray's agent, whose health a pod without replicas is asked for
SERVE_PORT = 8000
LISTENING = {"host": "0.0.0.0", "port": SERVE_PORT}  # of the pod: the Service and policies lead there
START_OPTIONS = {name.lstrip("-") for one in start.params if isinstance(one, click.Option) for name in one.opts}


def problems(documents: list[Document]) -> list[str]:
    """What can't be done as it is said."""
    cluster = [pod for pod in pods(documents) if pod.group is not None]
    app = application(documents)
    config = BuildArgs.model_validate(app.get("args") or {}).cluster_config()
    found = list(traps(service(documents)["spec"], cluster))
    if app.get("route_prefix") != "/" or serve_config(documents).get("http_options") != LISTENING:
        found.append(
            f"OpenAI's paths are not at the front door: {app.get('route_prefix')}, port {SERVE_PORT} of the pod"
        )
    homes = replica_homes(app, config, cluster)
    found += [f"no pod offers what {name} asks for" for name, home in homes.items() if not home]
    front = [pod for home in homes.values() for pod in home]
    found += front_door(front, cluster)
    found += placed(config, cluster)
    found += files(config, homes, documents, cluster)
    return found


# --- KubeRay --------------------------------------------------------------------------------------------


def traps(spec: Document, cluster: list[Pod]) -> Iterator[str]:
    """Of KubeRay; k8s/base/rayservice.yaml says why each of these is as it is."""
    if (spec.get("upgradeStrategy") or {}).get("type") != "None":
        yield "upgradeStrategy: a second cluster would be started beside the first"
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "the head is asked for a proxy"
    if (spec["rayClusterConfig"].get("authOptions") or {}).get("mode") != "token":
        yield "Ray's ports ask for no token"
    if cluster[0].start.get("num-cpus") != "0":
        yield "the head takes work"
    for pod in cluster:
        unknown = set(pod.start) - START_OPTIONS
        if unknown:
            yield f"{pod.where}: `ray start` has no options {unknown}"
        if pod.start.get("object-store-memory") != str(OBJECT_STORE_BYTES):
            yield f"{pod.where}: its object store is not the planned one, {OBJECT_STORE_BYTES} bytes"
        if pod.labels.get("component") != pod.group:
            yield f"{pod.where}: component is {pod.labels.get('component')}"
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        if len({group.get(field) for field in ("replicas", "minReplicas", "maxReplicas")}) > 1:
            yield f"group {group['groupName']} is not of a fixed size"


def replica_homes(app: Document, config: ClusterConfig, cluster: list[Pod]) -> dict[str, list[Pod]]:
    """Pods on which Serve's replicas may run."""
    options = {one["name"]: one.get("ray_actor_options") or {} for one in app.get("deployments") or ()}
    selector, resources = config.trunk.node_labels, config.trunk.resources
    asked = {
        "engine": (selector, resources),
        "ingress": (options.get("ingress", {}).get("label_selector") or {}, {}),
    }
    return {name: [pod for pod in cluster if selector and offers(pod, *wants)] for name, wants in asked.items()}


def front_door(front: list[Pod], cluster: list[Pod]) -> Iterator[str]:
    """Replicas are on one group; its pods are asked for their proxy, all others for their raylet only."""
    if len({pod.group for pod in front}) > 1:
        yield f"ingress and engine may be on {sorted({str(pod.group) for pod in front})}"
    for pod in cluster:
        if pod.group == "head":
            continue
        probe = pod.containers[0].get("readinessProbe")
        if pod in front:
            if probe is not None:
                yield f"{pod.where}: its readiness must be the operator's own, which asks for Serve's proxy"
            if SERVE_PORT not in pod.ports.values():
                yield f"{pod.where}: Serve's port is not among its own"
        else:
            asked = (probe or {}).get("httpGet") or {}
            if asked.get("port") != AGENT_PORT or asked.get("path") not in PUBLIC_EXACT_PATHS:
                yield f"{pod.where}: without a readinessProbe of its own it never gets ready"


# --- devices --------------------------------------------------------------------------------------------


def offers(pod: Pod, labels: dict[str, str], resources: dict[str, float]) -> bool:
    """Whether a pod's Ray node has labels and, in all, resources."""
    enough = all(pod.ray_resources.get(name, 0) >= amount for name, amount in resources.items())
    return enough and labels.items() <= pod.ray_labels.items()


def placed(config: ClusterConfig, cluster: list[Pod]) -> Iterator[str]:
    """Each device gets a pod of its own, with a GPU and memory for it; no pod that offers room is left without."""
    free = {pod.where: pod.replicas for pod in cluster}
    for device in config.devices:
        if not device.resources or not device.node_labels:
            yield f"device {device.name}: without labels and resources two workers may come to one pod"
        homes = [pod for pod in cluster if free[pod.where] and offers(pod, device.node_labels, device.resources)]
        if len(homes) != 1:
            yield f"device {device.name}: {len(homes)} groups of pods have room for it"
            continue
        (home,) = homes
        free[home.where] -= 1
        yield from (f"device {device.name} on {home.where}: {lack}" for lack in lacking(device, home))
    asked = {name for device in config.devices for name in device.resources}
    for pod in cluster:
        if set(pod.ray_resources) - asked or not all(pod.ray_resources.values()):
            yield f"{pod.where}: no device asks for {pod.ray_resources}"
        if pod.ray_resources and free[pod.where] and "trunk" not in pod.ray_labels.values():
            yield f"{pod.where}: {free[pod.where]} pods have no device"


def lacking(device: DeviceConfig, home: Pod) -> Iterator[str]:
    """What a pod lacks for a device."""
    has_card = home.limit(GPU) != "0"
    if device.kind != "cpu" and not has_card and home.start.get("num-gpus") != "1":
        yield "it has no GPU"
    if home.start.get("num-gpus") and home.spec.get("runtimeClassName") != "nvidia":
        yield "its GPU is not brought in"
    if device.host_memory is None:
        yield "its host_memory is not set, so that it would take what the node has free"
    slots = 0 if has_card else device.slot_memory or 0
    if (device.host_memory or 0) + slots + OBJECT_STORE_BYTES > home.memory_bytes:
        yield f"its memory, {home.memory_bytes:,} bytes, is too small"


def files(
    config: ClusterConfig, homes: dict[str, list[Pod]], documents: list[Document], cluster: list[Pod]
) -> Iterator[str]:
    """Keys lie where the ingress is, in a Secret that has them; the model where the engine and each worker is."""
    keys = config.serving.keys_file
    if keys is None:
        yield "no API keys are asked for"
    for pod in homes["ingress"] if keys else ():
        if file_of_secret(pod, str(keys), documents) is None:
            yield f"{pod.where}: no Secret is mounted as {keys}"
    path = config.model.path
    for pod in cluster[1:] if path else ():
        mounted = [mount for one in pod.containers for mount in one.get("volumeMounts") or ()]
        if not any(str(path).startswith(f"{mount['mountPath']}/") for mount in mounted):
            yield f"{pod.where}: no volume is mounted where {path} is"


def file_of_secret(pod: Pod, path: str, documents: list[Document]) -> Any:
    """The content that a pod finds under a path, if it comes out of a Secret."""
    directory, _, key = path.rpartition("/")
    mounts = [mount for one in pod.containers for mount in one.get("volumeMounts") or ()]
    names = {mount["name"] for mount in mounts if mount["mountPath"] == directory}
    volumes = [volume for volume in pod.spec.get("volumes") or () if volume["name"] in names]
    secrets = [has(documents, "Secret", volume.get("secret", {}).get("secretName")) for volume in volumes]
    return next(filter(None, (secret.get("data", {}).get(key) for secret in secrets)), None)
