"""Which worker owns which expert: a pure function of sizes and capacities.

Experts are handed out in groups. A layer is cut into ``spread`` groups, and groups of one layer go to different
workers where that is possible: a wide spread lets the links of several workers load in parallel, a narrow one
needs fewer messages per layer. ``layer_spread`` chooses, from bytes and the cost of a hop.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from raymoe.errors import CapacityError
from raymoe.types import DeviceName, ExpertKey, LayerSize

HOP_S = 0.3e-3  # one round trip and two wake-ups on a small machine, see docs/benchmarks.md
BYTES_PER_S = 8e9  # what one small device moves, memory or PCIe; only the order of magnitude matters


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

    Whatever ``current`` already says of workers that still exist is kept as far as balance allows, so that a
    worker that joins or leaves moves as little as possible.

    Raises CapacityError with the arithmetic where the experts do not fit.
    """
    check_fits(sizes, capacities, replication)
    kept = {key: list(owners)[:replication] for key, owners in _kept(current, capacities).items()}
    used = {capacity.device: 0 for capacity in capacities}
    owned: dict[DeviceName, list[ExpertKey]] = {capacity.device: [] for capacity in capacities}
    limit = {capacity.device: capacity.host_bytes for capacity in capacities}
    _release_overload(kept, sizes, limit, replication)
    for key, owners in kept.items():
        for device in owners:
            owned[device].append(key)
            used[device] += sizes[key.layer].expert_bytes
    for copy in range(replication):
        for layer, size in enumerate(sizes):
            taken: set[DeviceName] = set()
            for group in _groups(layer, size.experts, spreads[layer]):
                todo = [key for key in group if len(kept.get(key, ())) <= copy]
                _place(todo, size.expert_bytes, kept, owned, used, limit, taken)
    return {device: tuple(sorted(keys)) for device, keys in owned.items()}


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


def _kept(current: Ownership | None, capacities: list[Capacity]) -> dict[ExpertKey, tuple[DeviceName, ...]]:
    alive = {capacity.device for capacity in capacities}
    return owners_of({device: keys for device, keys in (current or {}).items() if device in alive})


def _release_overload(
    kept: dict[ExpertKey, list[DeviceName]],
    sizes: tuple[LayerSize, ...],
    limit: dict[DeviceName, int],
    replication: int,
) -> None:
    """Take experts from workers that hold more than their fair share, so that new workers get some."""
    total = replication * sum(size.experts * size.expert_bytes for size in sizes)
    room = sum(limit.values())
    for device in limit:
        fair = total * limit[device] / room
        held = [key for key, owners in kept.items() if device in owners]
        excess = sum(sizes[key.layer].expert_bytes for key in held) - fair
        for key in reversed(sorted(held)):
            if excess < sizes[key.layer].expert_bytes:
                break
            kept[key].remove(device)
            excess -= sizes[key.layer].expert_bytes


def _groups(layer: int, experts: int, spread: int) -> list[list[ExpertKey]]:
    keys = [ExpertKey(layer=layer, expert=expert) for expert in range(experts)]
    bounds = [round(index * experts / spread) for index in range(spread + 1)]
    return [keys[start:end] for start, end in pairwise(bounds)]


def _place(
    keys: list[ExpertKey],
    expert_bytes: int,
    kept: dict[ExpertKey, list[DeviceName]],
    owned: dict[DeviceName, list[ExpertKey]],
    used: dict[DeviceName, int],
    limit: dict[DeviceName, int],
    taken: set[DeviceName],
) -> None:
    """Put ``keys`` on one worker: not yet an owner, new to the layer if possible, least full; split if need be."""
    while keys:
        candidates = [
            device
            for device in limit
            if used[device] + expert_bytes <= limit[device] and any(device not in kept.get(key, ()) for key in keys)
        ]
        if not candidates:
            raise CapacityError(
                f"experts of layer {keys[0].layer} fit in no worker that does not own them already; "
                "the workers' host memory is too uneven for this replication: lower replication or even it out"
            )
        whole = len(keys) * expert_bytes
        device = min(
            candidates,
            key=lambda d: (
                any(d in kept.get(key, ()) for key in keys),
                d in taken,
                (used[d] + whole) / limit[d] if used[d] + whole <= limit[d] else 2.0,
                list(limit).index(d),
            ),
        )
        room = (limit[device] - used[device]) // expert_bytes
        mine = [key for key in keys if device not in kept.get(key, ())][:room]
        for key in mine:
            kept.setdefault(key, []).append(device)
        owned[device].extend(mine)
        used[device] += len(mine) * expert_bytes
        taken.add(device)
        placed = set(mine)
        keys = [key for key in keys if key not in placed]
