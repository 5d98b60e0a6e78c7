"""How long everything takes on a cluster that is simulated: seconds, from a devices file and a model's sizes.

What was measured (``times`` of a device) counts; the rest follows from sizes. Weights are read once per call, so that
computing takes ``max(bytes / memory bandwidth, 2 · weights · rows / operations per second)`` and the device's overhead.

W workers.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from raymoe.errors import ConfigError
from raymoe.placement.assignment import Fleet, fleet_of
from raymoe.placement.grouping import grouped_ownership
from raymoe.placement.joint import passing_slots
from raymoe.placement.ownership import Capacity, Ownership, assign, layer_spread, primary_owners
from raymoe.planning.cluster import Device, DevicesFile
from raymoe.simulation.shape import ModelShape
from raymoe.types import DeviceName, ExpertKey


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTimes:
    """One worker.

    Attributes:
        call_s: of every call, whatever it asks for.
        expert_s: computing one expert for one row; row_s: for each row more.
        load_s: one load.
        slots: experts that it holds at once; None: all that it owns, for good.
        host_s: computing one expert on the host beside it; None: it never does.
        is_local: whether it sits in the main node, so that nothing travels.
        capacity_bytes: of its shard.
    """

    name: DeviceName
    call_s: float = 0.0
    expert_s: float = 0.0
    row_s: float = 0.0
    load_s: float = 0.0
    slots: int | None = None
    host_s: float | None = None
    is_local: bool = False
    capacity_bytes: int = 1 << 50

    def compute_s(self, rows: int) -> float:
        """Computing one expert for some rows."""
        return self.expert_s + (rows - 1) * self.row_s


@dataclass(frozen=True, slots=True, kw_only=True)
class MainTimes:
    """The trunk: one layer for one row, each row more, and what lies outside of the layers."""

    layer_s: float
    row_s: float = 0.0
    head_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowTimes:
    """The shadow: one layer, what lies outside of them, and how many steps it may begin before their token is known."""

    layer_s: float
    head_s: float = 0.0
    run_ahead: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTimes:
    """One port per device into a switch that is no limit."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def takes_s(self, nbytes: float) -> float:
        """Seconds on a port."""
        return nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A cluster and a model, ready to be simulated.

    Attributes:
        group_size: workers that serve one layer without a cache; None: one per expert of a token.
        emulated: whether some figure imitates a device; reports say so.
    """

    shape: ModelShape
    workers: tuple[WorkerTimes, ...]
    main: MainTimes
    shadow: ShadowTimes | None = None
    network: NetworkTimes = NetworkTimes()
    group_size: int | None = None
    emulated: bool = False

    @property
    def names(self) -> tuple[DeviceName, ...]:
        """The workers', in the order of the file."""
        return tuple(worker.name for worker in self.workers)

    @property
    def experts_per_group(self) -> int:
        """Workers of a group, as configured or one per expert of a token."""
        return self.group_size or self.shape.top_k

    def fleet(self) -> Fleet:
        """Who may load what without a cache, by the rules of ``placement``.

        Raises CapacityError where the experts don't fit.
        """
        owned = grouped_ownership(self.shape.sizes, self._capacities(), self.experts_per_group, spare=self._has_room)
        load_s_W = np.array([worker.load_s for worker in self.workers])
        slots = tuple(worker.slots or self.shape.experts for worker in self.workers)
        known_W = load_s_W if load_s_W.any() else None
        return fleet_of(self.names, owned, self.shape.sizes, self.experts_per_group, known_W, slots)

    def owners(self) -> tuple[Ownership, dict[ExpertKey, DeviceName]]:
        """Who owns what, and who is asked for it, where slots cache. Raises CapacityError where nothing fits."""
        sizes = self.shape.sizes
        slowest = max((worker.load_s for worker in self.workers), default=0.0)
        rates = (self.shape.expert_bytes / slowest,) if slowest else ()
        spreads = [layer_spread(size, len(self.workers), *rates) for size in sizes]
        owned = assign(sizes, self._capacities(), 1, spreads)
        return owned, primary_owners(sizes, owned, spreads)

    def with_spare_slots(self, count: int) -> "Setting":
        """The same with so many slots per worker beyond those that experts pass through; who has none gets none."""
        slots = passing_slots(len(self.workers), self.experts_per_group, self.shape.top_k) + count
        workers = (worker if worker.slots is None else replace(worker, slots=slots) for worker in self.workers)
        return replace(self, workers=tuple(workers))

    @property
    def _has_room(self) -> bool:
        """Whether everybody can own everything, so that a prompt may be spread over all without a long search."""
        everything = self.shape.layers * self.shape.experts * self.shape.expert_bytes
        return all(worker.capacity_bytes >= everything for worker in self.workers)

    def _capacities(self) -> list[Capacity]:
        return [Capacity(device=worker.name, host_bytes=worker.capacity_bytes) for worker in self.workers]


def setting_of(devices: DevicesFile, shape: ModelShape, group_size: int | None = None) -> Setting:
    """What a devices file and a model make of each other.

    Raises:
        ConfigError: a device whose slots don't hold an expert.
    """
    resolved = {device.name: device for device in devices.devices_resolved()}
    trunk = resolved[DeviceName(devices.trunk_device)]
    shadow = resolved[DeviceName(devices.shadow)] if devices.shadow is not None else None
    at_trunk = {trunk.name: shape.trunk_bytes} | (
        {} if shadow is None else {shadow.name: _shadow_bytes(devices, shape)}
    )
    workers = tuple(
        _worker(device, shape, is_local=device.name == trunk.name, taken_bytes=at_trunk.get(device.name, 0))
        for device in resolved.values()
        if device.serves_experts
    )
    together = next((device.times.layer_s for device in resolved.values() if device.times.layer_s is not None), None)
    network = NetworkTimes(latency_s=devices.network.latency_s, bytes_per_s=devices.network.bytes_per_s)
    if together is not None:  # measured with messages
        network = NetworkTimes()
        loads = -(-shape.top_k // (group_size or devices.group_size or shape.top_k))
        workers = tuple(replace(worker, call_s=0.0, expert_s=together / loads) for worker in workers)
    return Setting(
        shape=shape,
        workers=workers,
        main=_main(trunk, shape),
        shadow=None if shadow is None else _shadow(shadow, shape, devices),
        network=network,
        group_size=group_size or devices.group_size,
        emulated=any(device.emulated for device in resolved.values()),
    )


def _worker(device: Device, shape: ModelShape, *, is_local: bool, taken_bytes: int) -> WorkerTimes:
    expert_s, row_s = _product(device, shape.expert_bytes, shape)
    slots: int | None = None
    if not device.is_unified:
        room = device.slot_bytes if device.slot_bytes is not None else int(0.9 * device.memory_bytes) - taken_bytes
        slots = room // shape.expert_bytes
        if slots < 1:
            raise ConfigError(
                f'device "{device.name}": {room:,} bytes for slots hold no expert of {shape.expert_bytes:,}; give it '
                "more slot_memory, or a smaller precision to the model"
            )
    return WorkerTimes(
        name=device.name,
        call_s=device.overhead_s,
        expert_s=expert_s if device.times.expert_s is None else device.times.expert_s,
        row_s=row_s,
        load_s=device.load_s(shape.expert_bytes),
        slots=slots,
        host_s=device.times.host_expert_s,
        is_local=is_local,
        capacity_bytes=device.host_bytes,
    )


def _main(device: Device, shape: ModelShape) -> MainTimes:
    layer_s, row_s = _product(device, shape.trunk_bytes // (shape.layers + 1), shape)
    measured = device.times
    return MainTimes(
        layer_s=layer_s + device.overhead_s if measured.main_layer_s is None else measured.main_layer_s,
        row_s=row_s,
        head_s=layer_s if measured.head_s is None else measured.head_s,
    )


def _shadow(device: Device, shape: ModelShape, devices: DevicesFile) -> ShadowTimes:
    """Trunk and experts one after the other on one device."""
    trunk_s, _ = _product(device, shape.trunk_bytes // (shape.layers + 1), shape)
    share = devices.predictor.bits / (8 * shape.weight_bytes)
    experts_s = shape.top_k * shape.expert_bytes * share / device.memory_bytes_per_s
    computed_s = trunk_s + experts_s + device.overhead_s
    return ShadowTimes(
        layer_s=computed_s if device.times.shadow_layer_s is None else device.times.shadow_layer_s,
        head_s=trunk_s if device.times.shadow_layer_s is None else 0.0,
        run_ahead=2 if devices.predictor.run_ahead else 0,
    )


def _shadow_bytes(devices: DevicesFile, shape: ModelShape) -> int:
    share = devices.predictor.bits / (8 * shape.weight_bytes)
    return shape.trunk_bytes + int(shape.layers * shape.experts * shape.expert_bytes * share)


def _product(device: Device, nbytes: int, shape: ModelShape) -> tuple[float, float]:
    """Seconds of a product with so many bytes of weights: for one row, and at most for each row more."""
    read_s = nbytes / device.memory_bytes_per_s
    row_s = 2 * nbytes / shape.weight_bytes / device.flops
    return max(read_s, row_s), row_s
