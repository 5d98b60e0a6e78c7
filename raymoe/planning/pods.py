"""What a planned cluster's pods must ask Kubernetes for, and a kustomize patch that says so. Pure.

Every entry of the devices file is a worker group of the RayService, in the same order; each of its devices is a pod.
Memory is limited to what is requested: what a pod was promised is there, and one that takes more is ended rather than
its neighbours. Processors are requested only, so that nothing slows down while others idle.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Any

from raymoe.planning.cluster import RESERVED, DevicesFile
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import Room, cluster_of, rooms

MIB = 1 << 20
RAY_BYTES = 512 * MIB  # a node's daemons took about 200 MB when they were young; agents grow
OBJECT_STORE_BYTES = 256 * MIB  # weights don't pass through it; k8s/base sets it, instead of Ray's 30% of the memory
PROCESS_BYTES = 256 * MIB  # a process with torch on a CPU, measured at 210 to 230 MB
CUDA_BYTES = 1536 * MIB  # more, for the libraries and the context of a CUDA device; a guess: drivers differ
FRONT_BYTES = 512 * MIB  # Serve's proxy and the ingress beside the engine: two processes without torch, and answers
RAY_CPUS = 0.5  # of a node's daemons
GPU = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """Pods alike, and what one of them asks for."""

    name: str
    replicas: int
    memory_bytes: int
    cpus: float
    gpus: int


def pod_groups(facts: ModelFacts, file: DevicesFile) -> tuple[PodGroup, ...]:
    """One group for each entry of the devices file.

    Pods of a group are alike: where the trunk or the shadow is one of a series, all of it gets what that one needs.
    """
    cluster = cluster_of(file)
    by_name = {room.device.name: room for room in rooms(facts, cluster)}
    groups = []
    names = iter(by_name)
    for entry in file.devices:
        pods = [by_name[next(names)] for _ in range(entry.count)]
        parts = [_parts(room, file) for room in pods]
        needs = [_memory_bytes(room, running) for room, running in zip(pods, parts, strict=True)]
        groups.append(
            PodGroup(
                name=entry.name,
                replicas=entry.count,
                memory_bytes=max(needs),
                cpus=RAY_CPUS + max(running.total() for running in parts),
                gpus=0 if pods[0].device.is_unified else 1,
            )
        )
    return tuple(groups)


def _parts(room: Room, file: DevicesFile) -> Counter[str]:
    """Processes of ours with torch on a device, by kind."""
    name = room.device.name
    return Counter(
        trunk=int(name == file.trunk_device), shadow=int(name == file.shadow), worker=int(room.device.serves_experts)
    )


def _memory_bytes(room: Room, running: Counter[str]) -> int:
    """Host memory of a pod, in whole MiB.

    On a card the trunk and its caches are the card's; what computes straight from host memory has them there.
    """
    unified = room.device.is_unified
    each = PROCESS_BYTES if unified else PROCESS_BYTES + CUDA_BYTES
    content = room.shard_bytes + (room.fixed_bytes if unified else 0)
    processes = RAY_BYTES + OBJECT_STORE_BYTES + FRONT_BYTES * running["trunk"] + each * running.total()
    return ceil((content * (1 + RESERVED) + processes) / MIB) * MIB


# --- as a patch -----------------------------------------------------------------------------------------


def kustomize_patch(groups: tuple[PodGroup, ...]) -> list[dict[str, Any]]:
    """A JSON patch (RFC 6902) of the RayService; it fails where the groups are not those it was made for."""
    found: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        place = f"/spec/rayClusterConfig/workerGroupSpecs/{index}"
        found.append({"op": "test", "path": f"{place}/groupName", "value": group.name})
        values: dict[str, Any] = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), group.replicas)
        values["template/spec/containers/0/resources"] = resources_of(group)
        found += [{"op": "add", "path": f"{place}/{field}", "value": value} for field, value in values.items()]
    return found


def resources_of(group: PodGroup) -> dict[str, dict[str, str]]:
    """A container's ``resources``."""
    memory = f"{group.memory_bytes // MIB}Mi"
    gpus = {GPU: str(group.gpus)} if group.gpus else {}
    return {
        "requests": {"cpu": f"{group.cpus * 1000:.0f}m", "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
