"""Groups of workers that take turns with the layers, and who owns what so that they can.

Worker i is in group i mod n_groups, MoE layer l is served by group l mod n_groups in decode. Any worker of a group
should be able to load any expert of the group's layers: only then can whatever experts a router chooses be loaded one
per worker. So ownership here means as many copies as memory holds, the useful ones first.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raymoe.placement.ownership import Capacity, Ownership, assign, check_fits, every_expert
from raymoe.types import ExpertKey, LayerSize


def group_count(workers: int, group_size: int) -> int:
    """How many groups take turns: as many full ones as there are workers for, at least one."""
    return max(1, workers // group_size)


def worker_groups(workers: int, group_size: int) -> tuple[tuple[int, ...], ...]:
    """The workers of each group, by their place in the configuration. Groups differ by one worker at most."""
    count = group_count(workers, group_size)
    return tuple(tuple(range(group, workers, count)) for group in range(count))


def grouped_ownership(
    sizes: tuple[LayerSize, ...],
    capacities: list[Capacity],
    group_size: int,
    current: Ownership | None = None,
    *,
    spare: bool = True,
) -> Ownership:
    """Hand every expert to as many workers as memory allows, those first that load it in decode.

    In this order, each as far as the workers' memory goes:

    1. one owner per expert within its layer's group, a layer's experts spread evenly over it; an expert for which the
       group has no room goes to any worker that has some;
    2. further owners within the group, until each worker of it owns all of the group's layers;
    3. with ``spare``, further owners outside of it, for prefill, which spreads a layer over all workers. It may mean
       that every worker reads everything when it starts.

    In each of them those are preferred who own an expert by ``current``, so that little has to be read again. Where
    keeping one owner there leaves no room for another expert in its group, ``current`` counts for nothing.

    Raises CapacityError with the arithmetic where not even one copy of everything fits.
    """
    check_fits(sizes, capacities, 1)
    groups = worker_groups(len(capacities), group_size)
    wanted_N = _masks(sizes, capacities, current or {})
    books = _Books.empty(sizes, capacities)
    homeless = _one_each(books, groups, wanted_N)
    if homeless and any(wanted_N):
        books = _Books.empty(sizes, capacities)
        homeless = _one_each(books, groups, [0] * len(wanted_N))
    if _place(books, homeless, range(len(capacities)), wanted_N):
        # the pieces are too large for what is left anywhere: memory comes first, groups second
        spreads = [len(groups[layer % len(groups)]) for layer in range(len(sizes))]
        owners_N = _masks(sizes, capacities, assign(sizes, capacities, 1, spreads))
        books = _Books.empty(sizes, capacities)
        for n, owners in enumerate(owners_N):
            books.give(n, owners.bit_length() - 1)
    for group, experts in zip(groups, _by_group(books, groups), strict=True):
        _copy(books, experts, group, wanted_N)
    if spare:
        _copy(books, books.in_order(range(len(books.keys))), range(len(capacities)), wanted_N)
    return {
        capacity.device: tuple(key for key, owners in zip(books.keys, books.owners_N, strict=True) if owners >> w & 1)
        for w, capacity in enumerate(capacities)
    }


@dataclass(slots=True, kw_only=True)
class _Books:
    """Who owns what and has how much room. Mutable, and used within one call of ``grouped_ownership`` only.

    Attributes:
        keys, bytes_N: every expert, by layer and index, and its size.
        owners_N: the workers that own it.
        limit_W, room_W: bytes that a worker's shard may take, and what is left of them.
        held_WL: how many experts of each layer a worker owns.
    """

    keys: tuple[ExpertKey, ...]
    bytes_N: tuple[int, ...]
    owners_N: list[int]
    limit_W: tuple[int, ...]
    room_W: list[int]
    held_WL: list[list[int]]

    @classmethod
    def empty(cls, sizes: tuple[LayerSize, ...], capacities: list[Capacity]) -> "_Books":
        keys = every_expert(sizes)
        limit_W = tuple(capacity.host_bytes for capacity in capacities)
        return cls(
            keys=keys,
            bytes_N=tuple(sizes[key.layer].expert_bytes for key in keys),
            owners_N=[0] * len(keys),
            limit_W=limit_W,
            room_W=list(limit_W),
            held_WL=[[0] * len(sizes) for _ in limit_W],
        )

    def give(self, n: int, worker: int) -> None:
        """``worker`` gets an expert that it does not own."""
        self.owners_N[n] |= 1 << worker
        self.room_W[worker] -= self.bytes_N[n]
        self.held_WL[worker][self.keys[n].layer] += 1

    def in_order(self, experts: Iterable[int]) -> list[int]:
        """Large experts first, for they find room last; else every layer's first, then every layer's second, ..."""
        return sorted(experts, key=lambda n: (-self.bytes_N[n], self.keys[n].expert, self.keys[n].layer))


def _masks(sizes: tuple[LayerSize, ...], capacities: list[Capacity], ownership: Ownership) -> list[int]:
    """The owners of each expert among the workers that there are."""
    place = {key: n for n, key in enumerate(every_expert(sizes))}
    owners_N = [0] * len(place)
    for worker, capacity in enumerate(capacities):
        for key in ownership.get(capacity.device, ()):
            if key in place:  # what another model had is nobody's concern
                owners_N[place[key]] |= 1 << worker
    return owners_N


def _by_group(books: _Books, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The experts of each group's layers."""
    members: list[list[int]] = [[] for _ in groups]
    for n, key in enumerate(books.keys):
        members[key.layer % len(groups)].append(n)
    return [books.in_order(experts) for experts in members]


def _one_each(books: _Books, groups: Sequence[Sequence[int]], wanted_N: list[int]) -> list[int]:
    """One owner per expert in its group; returns the experts for which it has no room."""
    homeless: list[int] = []
    for group, experts in zip(groups, _by_group(books, groups), strict=True):
        bits = sum(1 << worker for worker in group)
        stay = [wanted & bits for wanted in wanted_N]
        # whoever has few places to stay at comes first, whoever has none comes last
        experts.sort(key=lambda n: stay[n].bit_count() or len(group) + 1)
        homeless += _place(books, experts, group, wanted_N)
    return homeless


def _copy(books: _Books, experts: list[int], workers: Sequence[int], wanted_N: list[int]) -> None:
    """Copies on all of ``workers``, as far as they have room: first what was there before, then the rarest."""
    short: list[int] = []
    for worker in workers:
        lacking = [n for n in experts if not books.owners_N[n] >> worker & 1]
        if sum(books.bytes_N[n] for n in lacking) <= books.room_W[worker]:
            for n in lacking:
                books.give(n, worker)
        else:
            short.append(worker)
    bits = sum(1 << worker for worker in workers)
    for kept_only in (True, False):
        for copies in range(1, len(workers)):
            rare = [n for n in experts if (books.owners_N[n] & bits).bit_count() <= copies]
            _place(books, rare, short, wanted_N, kept_only=kept_only)


def _place(
    books: _Books, experts: list[int], workers: Sequence[int], wanted_N: list[int], *, kept_only: bool = False
) -> list[int]:
    """One more owner for each expert among ``workers``; returns the experts for which nobody has room.

    Who owned it before comes first, then who has least of its layer in proportion to memory, then who is least full.
    With ``kept_only`` nobody else comes into question.
    """
    unplaced: list[int] = []
    least = min(books.bytes_N, default=0)
    for n in experts:
        size, layer = books.bytes_N[n], books.keys[n].layer
        best, chosen = (True, math.inf, math.inf), -1
        workers = [worker for worker in workers if books.room_W[worker] >= least]
        for worker in workers:
            new = not wanted_N[n] >> worker & 1
            if books.room_W[worker] < size or books.owners_N[n] >> worker & 1 or (kept_only and new):
                continue
            limit = books.limit_W[worker]
            rank = (new, (books.held_WL[worker][layer] + 1) / limit, -books.room_W[worker] / limit)
            if rank < best:
                best, chosen = rank, worker
        if chosen < 0:
            unplaced.append(n)
        else:
            books.give(n, chosen)
    return unplaced
