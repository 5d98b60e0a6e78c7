"""What a configuration means for the decisions of ``placement``: who owns what, and how workers form groups."""

import math

import numpy as np

from raymoe.config import ClusterConfig
from raymoe.placement.assignment import Fleet, fleet_of
from raymoe.placement.grouping import grouped_ownership
from raymoe.placement.ownership import BYTES_PER_S, Capacity, Ownership, assign, layer_spread
from raymoe.types import DeviceName, LayerSize


def hand_out(
    config: ClusterConfig,
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    replication: int,
    current: Ownership | None = None,
) -> Ownership:
    """Who owns what, by policy: without a cache any worker of a group must be able to load its layers' experts."""
    if config.scheduling.follows_orders:
        return grouped_ownership(sizes, capacities, group_size(config, sizes), current)
    return assign(sizes, capacities, replication, spreads(config, sizes), current)


def cluster_fleet(config: ClusterConfig, sizes: tuple[LayerSize, ...], ownership: Ownership) -> Fleet:
    """The workers as the cacheless policy sees them, in the configuration's order."""
    largest = max(size.expert_bytes for size in sizes)
    most = max(size.experts for size in sizes)
    slots = tuple(max(1, device.slot_memory // largest) if device.slot_memory else most for device in config.devices)
    rates = [device.link.bytes_per_s if device.link is not None else None for device in config.devices]
    load_s_W = np.array([math.nan if rate is None else largest / rate for rate in rates])
    devices = [DeviceName(device.name) for device in config.devices]
    return fleet_of(devices, ownership, sizes, group_size(config, sizes), load_s_W, slots)


def group_size(config: ClusterConfig, sizes: tuple[LayerSize, ...]) -> int:
    """Workers that serve one layer: as configured, else one per expert of a token."""
    return config.scheduling.group_size or max(size.top_k for size in sizes)


def bounded_devices(config: ClusterConfig) -> frozenset[DeviceName]:
    """Remote devices whose experts come and go; the others hold all that they own ready for good."""
    if config.scheduling.policy == "all_resident":
        return frozenset()
    return frozenset(
        DeviceName(device.name) for device in config.devices if device.transport == "zmq" and device.has_slots
    )


def spreads(config: ClusterConfig, sizes: tuple[LayerSize, ...]) -> list[int]:
    """Over how many workers each layer is spread, given the slowest link that is known."""
    rate = min((float(device.link.bytes_per_s) for device in config.devices if device.link), default=BYTES_PER_S)
    return [layer_spread(size, len(config.devices), rate) for size in sizes]
