"""Which worker owns which expert: a pure function of sizes and capacities.

Experts are handed out in groups. A layer is cut into ``spread`` groups, and groups of one layer go to different
workers where that is possible: a wide spread lets the links of several workers load in parallel, a narrow one
needs fewer messages per layer. ``layer_spread`` chooses, from bytes and the cost of a hop.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from raymoe.errors import CapacityError
from raymoe.placement.ledger import Ledger
from raymoe.types import DeviceName, ExpertKey, LayerSize

HOP_S = 0.3e-3  # one round trip and two wake-ups on a small machine, see docs/benchmarks.md
BYTES_PER_S = 8e9  # what one small device moves, memory or PCIe; only the order of magnitude matters
WELL_FILLED = 0.7  # of its share: a worker that holds less is given some; moving for less is not worth the reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """One worker and the host memory its shard may take, in bytes."""

    device: DeviceName
    host_bytes: int


Ownership = dict[DeviceName, tuple[ExpertKey, ...]]
"""The experts in each worker's shard."""


def layer_spread(size: LayerSize, workers: int, link_bytes_per_s: float = BYTES_PER_S) -> int:
    """Over how many workers a layer's experts should be spread.

    Moving or computing a token's experts of one layer takes ``top_k * bytes / rate`` on one worker and an n-th
    of that on n, but every further worker adds a wake-up. The least n with a share below one hop is best.
    """
    alone_s = size.top_k * size.expert_bytes / link_bytes_per_s
    return max(1, min(workers, size.top_k, round(alone_s / HOP_S)))


def replication_factor(wanted: int | Literal["auto"], total_bytes: int, capacities: list[Capacity]) -> int:
    """Owners per expert. "auto": 2 where two copies fit in half of the memory, else 1."""
    if wanted != "auto":
        return wanted
    return 2 if len(capacities) > 1 and 2 * total_bytes <= sum(c.host_bytes for c in capacities) // 2 else 1


def assign(
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    replication: int,
    spreads: list[int],
    current: Ownership | None = None,
) -> Ownership:
    """Hand every expert to ``replication`` different workers, balanced by bytes against capacity.

    Whatever ``current`` already says of workers that still exist is kept as far as memory allows; a worker that
    is much emptier than its share, as a new one is, then gets some of it from the fullest. So little more moves
    than what a leaving worker held, or what a joining one should hold.

    Raises CapacityError with the arithmetic where the experts do not fit.
    """
    check_fits(sizes, capacities, replication)
    limit = {capacity.device: capacity.host_bytes for capacity in capacities}
    ledger = Ledger(sizes, limit, replication)
    _keep(ledger, current or {})
    try:
        _place_missing(ledger, spreads)
    except CapacityError:  # a tight squeeze: forget groups and what was kept
        ledger = Ledger(sizes, limit, replication)
        _place_by_room(ledger)
    if current:
        _fill_up(ledger)
    return {device: tuple(sorted(keys)) for device, keys in ledger.held.items()}


def every_expert(sizes: tuple[LayerSize, ...]) -> tuple[ExpertKey, ...]:
    """All experts of a model, in order."""
    return tuple(ExpertKey(layer=layer, expert=e) for layer, size in enumerate(sizes) for e in range(size.experts))


def owners_of(ownership: Ownership) -> dict[ExpertKey, tuple[DeviceName, ...]]:
    """Expert -> its owners, in the order of ``ownership``."""
    owners: dict[ExpertKey, list[DeviceName]] = {}
    for device, keys in ownership.items():
        for key in keys:
            owners.setdefault(key, []).append(device)
    return {key: tuple(devices) for key, devices in owners.items()}


def primary_owners(
    sizes: tuple[LayerSize, ...], ownership: Ownership, spreads: list[int]
) -> dict[ExpertKey, DeviceName]:
    """Which owner each expert is asked of while all are well.

    The groups of a layer go to different workers, each group as a whole where someone owns all of it: with a
    spread of one a layer costs a single message. Work is balanced over the workers by bytes.
    """
    owned = {device: set(keys) for device, keys in ownership.items()}
    load = dict.fromkeys(ownership, 0)
    primary: dict[ExpertKey, DeviceName] = {}
    for layer, size in enumerate(sizes):
        taken: set[DeviceName] = set()
        for group in _groups(layer, size.experts, spreads[layer]):
            rest = [key for key in group if any(key in keys for keys in owned.values())]
            while rest:
                covered = {device: [key for key in rest if key in keys] for device, keys in owned.items()}
                device = min(owned, key=lambda d: (d in taken, -len(covered[d]), load[d]))
                if not covered[device]:
                    device = min(owned, key=lambda d: (-len(covered[d]), load[d]))
                mine = set(covered[device])
                primary.update(dict.fromkeys(mine, device))
                load[device] += len(mine) * size.expert_bytes
                taken.add(device)
                rest = [key for key in rest if key not in mine]
    return primary


def check_fits(sizes: tuple[LayerSize, ...], capacities: list[Capacity], replication: int) -> None:
    """Raise CapacityError, with the arithmetic, where the experts can't fit into the workers' host memory."""
    total = sum(size.experts * size.expert_bytes for size in sizes)
    room = sum(capacity.host_bytes for capacity in capacities)
    if replication > len(capacities):
        raise CapacityError(f"{replication} owners per expert need as many workers, but there are {len(capacities)}")
    if replication * total > room:
        parts = ", ".join(f"{c.device}: {c.host_bytes:,}" for c in capacities)
        raise CapacityError(
            f"{sum(s.experts for s in sizes):,} experts x {replication} owners take {replication * total:,} bytes, the "
            f"workers' host memory is {room:,} bytes ({parts}); add a device, raise host_memory, or lower replication"
        )


def _keep(ledger: Ledger, current: Ownership) -> None:
    """Take over what is still right; extra copies and what no longer fits are given up where most is held."""
    for device, keys in current.items():
        if device in ledger.limit:
            ledger.give((key for key in keys if key in ledger.owners), device)
    for key, owners in ledger.owners.items():
        while len(owners) > ledger.replication:
            ledger.take([key], max(owners, key=ledger.excess))
    for device, held in ledger.held.items():
        while ledger.room(device) < 0:
            ledger.take([max(held)], device)


def _place_missing(ledger: Ledger, spreads: list[int]) -> None:
    """Give every expert its missing owners, group by group."""
    for copy in range(ledger.replication):
        for layer, size in enumerate(ledger.sizes):
            taken: set[DeviceName] = set()
            for group in _groups(layer, size.experts, spreads[layer]):
                _place([key for key in group if len(ledger.owners[key]) <= copy], ledger, taken)


def _place_by_room(ledger: Ledger) -> None:
    """Give each expert to the workers with most room, large experts first.

    For experts of one size this succeeds whenever anything can: room beyond one copy of everything left to
    place is useless, and otherwise nobody's room may run out before the others'.
    """
    keys = sorted(ledger.owners, key=lambda key: (-ledger.sizes[key.layer].expert_bytes, key))
    for key in keys:
        needed = ledger.sizes[key.layer].expert_bytes
        by_room = sorted(ledger.limit, key=ledger.room, reverse=True)[: ledger.replication]
        if any(ledger.room(device) < needed for device in by_room):
            raise CapacityError(_does_not_fit(ledger, key.layer))
        for device in by_room:
            ledger.give([key], device)


def _does_not_fit(ledger: Ledger, layer: int) -> str:
    rooms = ", ".join(f"{device}: {room:,}" for device, room in ledger.limit.items())
    size = ledger.sizes[layer].expert_bytes
    if ledger.replication == 1:
        return (
            f"the workers' host memory ({rooms} bytes) holds all experts in sum, but not in pieces of whole experts "
            f"({size:,} bytes each in layer {layer}); add a device or raise host_memory"
        )
    return (
        f"the workers' host memory ({rooms} bytes) is too uneven for {ledger.replication} owners per expert on "
        f"different workers ({size:,} bytes each in layer {layer}); lower replication or even it out"
    )


def _fill_up(ledger: Ledger) -> None:
    """Move groups from the fullest worker to those well below their share, as long as that evens them out."""
    hungry = [device for device, used in ledger.used.items() if used < WELL_FILLED * ledger.share[device]]
    while hungry:
        empty = min(hungry, key=ledger.excess)
        full = max(ledger.limit, key=ledger.excess)
        movable: dict[int, list[ExpertKey]] = {}
        for key in ledger.held[full] - ledger.held[empty]:
            movable.setdefault(key.layer, []).append(key)
        most = min(ledger.excess(full) - ledger.excess(empty), ledger.room(empty) + 1)
        parts = [part for part in movable.values() if ledger.bytes_of(part) < most]
        if not parts:
            return
        # a layer in which the receiver has nothing yet keeps its spread
        layers = {key.layer for key in ledger.held[empty]}
        part = min(parts, key=lambda part: (part[0].layer in layers, -part[0].layer))
        ledger.take(part, full)
        ledger.give(part, empty)


def _groups(layer: int, experts: int, spread: int) -> list[list[ExpertKey]]:
    keys = [ExpertKey(layer=layer, expert=expert) for expert in range(experts)]
    bounds = [round(index * experts / spread) for index in range(spread + 1)]
    return [keys[start:end] for start, end in pairwise(bounds)]


def _place(keys: list[ExpertKey], ledger: Ledger, taken: set[DeviceName]) -> None:
    """Put ``keys`` on one worker: not yet an owner, below its share, new to the layer if possible, least full.

    They are split where no worker has room for all. ``taken`` are the workers of the layer's other groups.
    """
    while keys:
        size = ledger.sizes[keys[0].layer].expert_bytes
        whole = len(keys) * size

        def preference(device: DeviceName) -> tuple[bool, bool, bool, float]:
            after = ledger.used[device] + whole  # noqa: B023 - called before the loop goes on
            return (
                any(key in ledger.held[device] for key in keys),  # noqa: B023
                after > ledger.share[device],
                device in taken,
                after / ledger.limit[device] if after <= ledger.limit[device] else 2.0,
            )

        candidates = [
            device
            for device in ledger.limit
            if ledger.room(device) >= size and any(key not in ledger.held[device] for key in keys)
        ]
        if not candidates:
            raise CapacityError(_does_not_fit(ledger, keys[0].layer))
        device = min(candidates, key=preference)
        mine = [key for key in keys if key not in ledger.held[device]][: ledger.room(device) // size]
        ledger.give(mine, device)
        taken.add(device)
        placed = set(mine)  # and not all that the device owns: a key it owned before still lacks another owner
        keys = [key for key in keys if key not in placed]
