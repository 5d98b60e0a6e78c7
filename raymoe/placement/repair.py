"""What to do when devices come and go: who should own what now, and which experts to read and to give up for that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raymoe.errors import CapacityError
from raymoe.placement.ownership import Capacity, Ownership, every_expert, owners_of
from raymoe.types import DeviceName, ExpertKey, LayerSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who should own what.

    Attributes:
        replication: owners that every expert has at least; 0 where some have none.
        lost: experts that nobody has room for.
    """

    ownership: Ownership
    replication: int
    lost: tuple[ExpertKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """What leads to a target: what each device reads now, and gives up."""

    load: dict[DeviceName, tuple[ExpertKey, ...]]
    drop: dict[DeviceName, tuple[ExpertKey, ...]]

    def __bool__(self) -> bool:
        return bool(self.load or self.drop)


HandOut = Callable[[list[Capacity], int, Ownership], Ownership]
"""The policy's ownership for some workers, at a replication, near to what they hold. Raises CapacityError."""


def find_target(
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    held: Ownership,
    wanted: int,
    hand_out: HandOut,
    pinned: frozenset[DeviceName] = frozenset(),
) -> Target:
    """Who of the living should own what, as near to what they hold as may be.

    As many owners per expert as wanted and possible; where not even one copy of everything fits, one of as many
    experts as possible.

    Args:
        pinned: devices whose shard can't be changed.
    """
    base: Ownership | None = None
    replication = min(wanted, len(capacities))
    while base is None and replication:
        try:
            base = hand_out(capacities, replication, held)
        except CapacityError:
            replication -= 1
    if base is None:
        base = _one_each(sizes, held, pinned)
    base |= {device: held.get(device, ()) for device in pinned}
    ownership, lost = _cover(sizes, capacities, base, pinned)
    return Target(ownership=ownership, replication=0 if lost else replication, lost=lost)


def moves_towards(
    sizes: tuple[LayerSize, ...], capacities: list[Capacity], held: Ownership, target: Ownership
) -> Moves:
    """What each device should read now, as far as it has room beside what it holds, and what it should give up.

    Experts that nobody holds come first. A copy is given up when all who should own the expert hold it.
    """
    owners = owners_of(held)
    wanted = owners_of(target)
    load: dict[DeviceName, tuple[ExpertKey, ...]] = {}
    drop: dict[DeviceName, tuple[ExpertKey, ...]] = {}
    for capacity in capacities:
        device = capacity.device
        here, goal = set(held.get(device, ())), set(target.get(device, ()))
        room = capacity.host_bytes - sum(sizes[key.layer].expert_bytes for key in here)
        reads: list[ExpertKey] = []
        for key in sorted(goal - here, key=lambda key: (key in owners, key)):
            room -= sizes[key.layer].expert_bytes
            if room < 0:
                break
            reads.append(key)
        spare = [key for key in sorted(here - goal) if set(wanted.get(key, ())) <= set(owners[key])]
        if reads:
            load[device] = tuple(reads)
        if spare:
            drop[device] = tuple(spare)
    return Moves(load=load, drop=drop)


def _one_each(sizes: tuple[LayerSize, ...], held: Ownership, pinned: frozenset[DeviceName]) -> Ownership:
    """One owner of all that is held: who can't give it up, else who holds least so far."""
    used = dict.fromkeys(held, 0)
    kept: dict[DeviceName, list[ExpertKey]] = {device: [] for device in held}
    for key, owners in sorted(owners_of(held).items(), key=lambda item: len(item[1])):
        keeper = min(owners, key=lambda device: (device not in pinned, used[device]))
        kept[keeper].append(key)
        used[keeper] += sizes[key.layer].expert_bytes
    return {device: tuple(sorted(keys)) for device, keys in kept.items()}


def _cover(
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    ownership: Mapping[DeviceName, tuple[ExpertKey, ...]],
    pinned: frozenset[DeviceName],
) -> tuple[Ownership, tuple[ExpertKey, ...]]:
    """Give experts that have no owner to whoever has most room, small ones first; returns those that find none too."""
    owned = {capacity.device: list(ownership.get(capacity.device, ())) for capacity in capacities}
    room = {
        capacity.device: capacity.host_bytes - sum(sizes[key.layer].expert_bytes for key in owned[capacity.device])
        for capacity in capacities
        if capacity.device not in pinned
    }
    covered = {key for keys in owned.values() for key in keys}
    lost = []
    for key in sorted((k for k in every_expert(sizes) if k not in covered), key=lambda k: sizes[k.layer].expert_bytes):
        device = max(room, key=room.__getitem__, default=None)
        if device is None or room[device] < sizes[key.layer].expert_bytes:
            lost.append(key)
            continue
        owned[device].append(key)
        room[device] -= sizes[key.layer].expert_bytes
    return {device: tuple(sorted(keys)) for device, keys in owned.items()}, tuple(sorted(lost))
