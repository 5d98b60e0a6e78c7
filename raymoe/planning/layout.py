"""Who has which part of a model on a planned cluster, and whether it fits. Pure.

The trunk and the shadow each sit on one device with their keys and values; what they leave of a worker's memory is for
slots. Host memory holds the shards. A unified device's shard lies where it computes, so that all of it is resident.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from raymoe.errors import CapacityError
from raymoe.placement.grouping import grouped_ownership
from raymoe.placement.ownership import Capacity, Ownership, assign, layer_spread, replication_factor
from raymoe.planning.cluster import (
    RESERVED,
    Device,
    DevicesFile,
    HitRatesSpec,
    NetworkSpec,
    PredictorSpec,
)
from raymoe.planning.facts import ModelFacts
from raymoe.types import DeviceName

LISTED = 64  # workers up to which the plan hands out single experts; with more the table would be of no use


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A planned cluster: the devices file with every figure filled in, open to changes by ``replace``."""

    devices: tuple[Device, ...]
    trunk_name: DeviceName
    shadow_name: DeviceName | None
    network: NetworkSpec
    group_size: int | None
    alpha: float
    predictor: PredictorSpec
    hit_rates: HitRatesSpec
    context_tokens: int

    @cached_property
    def trunk(self) -> Device:
        """The device of everything but the routed experts."""
        return next(device for device in self.devices if device.name == self.trunk_name)

    @cached_property
    def shadow(self) -> Device | None:
        """The device of the shadow."""
        return next((device for device in self.devices if device.name == self.shadow_name), None)

    @cached_property
    def workers(self) -> tuple[Device, ...]:
        """Who owns experts."""
        return tuple(device for device in self.devices if device.serves_experts)

    @property
    def is_remote(self) -> bool:
        """Whether expert calls cross the network."""
        return any(worker.name != self.trunk_name for worker in self.workers)

    def with_workers(self, **changes: object) -> "Cluster":
        """The same with some fields of every worker changed."""
        changed = tuple(
            replace(device, **changes) if device.serves_experts else device  # type: ignore[arg-type]
            for device in self.devices
        )
        return replace(self, devices=changed)


def cluster_of(file: DevicesFile) -> Cluster:
    """A devices file with every figure filled in."""
    return Cluster(
        devices=file.devices_resolved(),
        trunk_name=DeviceName(file.trunk_device),
        shadow_name=DeviceName(file.shadow) if file.shadow is not None else None,
        network=file.network,
        group_size=file.group_size,
        alpha=file.alpha,
        predictor=file.predictor,
        hit_rates=file.hit_rates,
        context_tokens=file.context_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What lies on one device, in bytes.

    Attributes:
        room_bytes: of its memory, without the reserve.
        fixed_bytes: trunk, shadow and their keys and values.
        shard_bytes: the most its shard of experts may take.
        slot_bytes: its slots; of a unified device the shard itself.
    """

    device: Device
    room_bytes: int
    fixed_bytes: int
    shard_bytes: int
    slot_bytes: int


def rooms(facts: ModelFacts, cluster: Cluster) -> tuple[Room, ...]:
    """What lies on every device."""
    return tuple(_room(facts, cluster, device) for device in cluster.devices)


def _room(facts: ModelFacts, cluster: Cluster, device: Device) -> Room:
    kv_bytes = facts.kv_bytes * cluster.context_tokens
    fixed = 0
    if device.name == cluster.trunk_name:
        fixed += facts.trunk_bytes + kv_bytes
    if device.name == cluster.shadow_name:
        fixed += facts.shadow_bytes(cluster.predictor.bits) + kv_bytes
    room = round(device.memory_bytes * (1 - RESERVED))
    left = max(0, room - fixed)
    if not device.serves_experts:
        shard = slots = 0
    elif device.is_unified:
        shard = slots = min(left, device.host_bytes)
    else:
        shard = device.host_bytes
        slots = left if device.slot_bytes is None else device.slot_bytes
    return Room(device=device, room_bytes=room, fixed_bytes=fixed, shard_bytes=shard, slot_bytes=slots)


def problems(facts: ModelFacts, cluster: Cluster) -> tuple[str, ...]:
    """Why the model can't run there, each with the arithmetic and a way out; empty where it can."""
    found = []
    for room in rooms(facts, cluster):
        device = room.device
        given = device.slot_bytes or 0
        if room.fixed_bytes + given > max(room.room_bytes, device.memory_bytes * bool(given)):
            parts = [
                name
                for name, at in (("trunk", cluster.trunk_name), ("shadow", cluster.shadow_name))
                if at == device.name
            ]
            parts += ["slots"] * bool(given)
            found.append(
                f'{" and ".join(parts)} on "{device.name}" take {room.fixed_bytes + given:,} bytes with keys and '
                f"values for {cluster.context_tokens:,} tokens, but it has {room.room_bytes:,} for them; choose a "
                "device with more memory, or lower context_tokens, slot_memory or predictor.bits"
            )
        elif device.serves_experts and room.slot_bytes < facts.expert_bytes:
            found.append(
                f'"{device.name}" has {room.slot_bytes:,} bytes for slots, less than one expert '
                f"({facts.expert_bytes:,}); raise its slot_memory, or let it serve none"
            )
    total = sum(room.shard_bytes for room in rooms(facts, cluster))
    if total < facts.routed_bytes:
        found.append(
            f"the experts take {facts.routed_bytes:,} bytes, but the {len(cluster.workers)} workers have "
            f"{total:,} bytes of host memory for them; add devices or memory, or serve in a smaller precision"
        )
    return tuple(found)


def resident_share(facts: ModelFacts, cluster: Cluster) -> float:
    """Share of all experts that lie in slots at once, when shards are in proportion to memory."""
    places = [room for room in rooms(facts, cluster) if room.device.serves_experts]
    total = sum(room.shard_bytes for room in places)
    if not total:
        return 0.0
    held = sum(min(room.slot_bytes, facts.routed_bytes * room.shard_bytes / total) for room in places)
    return min(1.0, held / facts.routed_bytes)


def kept_share(facts: ModelFacts, cluster: Cluster, slots_in_use: int) -> float:
    """Share of all experts for which slots are left beside ``slots_in_use`` of each worker."""
    used = slots_in_use * facts.expert_bytes
    places = [room for room in rooms(facts, cluster) if room.device.serves_experts]
    return min(1.0, sum(max(0, room.slot_bytes - used) for room in places) / facts.routed_bytes)


def kept_slots(facts: ModelFacts, room: Room, slots_in_use: int) -> int:
    """Slots of a worker that policy joint leaves to experts worth keeping, beside ``slots_in_use`` for what passes."""
    if not room.device.serves_experts:
        return 0
    slots = min(room.slot_bytes // facts.expert_bytes, sum(size.experts for size in facts.sizes))
    return max(0, slots - slots_in_use)


def holds_everything(facts: ModelFacts, cluster: Cluster) -> bool:
    """Whether every expert can stay in a slot, if shards are made as large as slots (by ``host_memory``)."""
    places = [room for room in rooms(facts, cluster) if room.device.serves_experts]
    whole = sum(min(room.slot_bytes, room.shard_bytes) // facts.expert_bytes for room in places)
    return whole >= sum(size.experts for size in facts.sizes)


def spread(facts: ModelFacts, cluster: Cluster) -> int:
    """Over how many workers a layer's experts are spread, where they stay."""
    rates = [worker.link_bytes_per_s or worker.memory_bytes_per_s for worker in cluster.workers]
    return layer_spread(facts.sizes[0], len(cluster.workers), sum(rates) / len(rates))


def shares(facts: ModelFacts, cluster: Cluster) -> np.ndarray:
    """Of every worker, the share of the experts that it owns: in proportion to its host memory. float64 [W]."""
    memory_W = np.array([room.shard_bytes for room in rooms(facts, cluster) if room.device.serves_experts], dtype=float)
    total = memory_W.sum()
    return memory_W / total if total else np.full(len(memory_W), 1.0 / len(memory_W))


def ownership(facts: ModelFacts, cluster: Cluster, group_size: int | None) -> Ownership | None:
    """Who owns what, as the running cluster would hand it out; None where it does not fit, or would fill pages.

    Args:
        group_size: of policies without a cache; None: of the others.
    """
    workers = cluster.workers
    if len(workers) > LISTED:
        return None
    capacities = [
        Capacity(device=room.device.name, host_bytes=room.shard_bytes)
        for room in rooms(facts, cluster)
        if room.device.serves_experts
    ]
    try:
        if group_size is not None:
            return grouped_ownership(facts.sizes, capacities, group_size)
        copies = replication_factor("auto", facts.routed_bytes, capacities)
        wide = spread(facts, cluster)
        return assign(facts.sizes, capacities, copies, [wide] * facts.layers)
    except CapacityError:
        return None
