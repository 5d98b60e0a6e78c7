"""Which worker loads and computes which expert of a layer, where nothing stays resident between uses.

Workers form groups; MoE layer l is served by group l mod n_groups in decode (OD-MoE's round robin), so that while one
group computes, the others load for the layers to come. Within the group the experts are handed out so that the last
load is done soonest; with equal links and k experts for k workers that is one each. In prefill nearly every expert
of a layer is needed, and all workers that own an expert may get it.

The exact optimum is cheap. A worker's j-th load of a layer is done at ``busy + j·load``: call that a *place*. Which
sets of places can be filled is a question of ownership alone, and such sets form a matroid (a transversal one); so
taking places in order of time, each if the experts can still be matched to all places taken, ends with the earliest
possible places, one by one: no other assignment has an earlier last load, nor a smaller sum. A worker that could not
be given one more can't later either, so that at most n + W places are looked at.

L MoE layers, W workers, E experts of a layer, N experts to hand out.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import numpy as np

from raymoe.errors import ExpertUnavailableError
from raymoe.placement.grouping import worker_groups
from raymoe.placement.ownership import Ownership
from raymoe.types import DeviceName, LayerSize

WORTHWHILE = 0.01  # of the makespan: exchanges that gain less are not looked for, measured times vary more than that


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fleet:
    """The workers as the assignment sees them. They are known by their place in the configuration, from 0.

    Attributes:
        workers: how many.
        group_size: workers per group; what does not make up a group of its own is dealt out over the groups.
        owners_LWE: bool [W, E] per layer, True where a worker has an expert in its host memory. A worker that is down
            owns nothing.
        load_s_W: seconds that one load takes on each worker's link, NaN where it was not measured yet: the mean of the
            others. None: unknown, all count as 1, and so must what is compared with it.
        slots_W: how many experts each worker can hold at once. It gets more than that of one layer only where nobody
            else can take them, for it would load the rest after the layer has begun. None: no limit.
        loads_s: follows from ``load_s_W``: seconds per load of each worker, with estimates where not measured.
    """

    workers: int
    group_size: int
    owners_LWE: tuple[np.ndarray, ...]
    load_s_W: np.ndarray | None = None
    slots_W: tuple[int, ...] | None = None
    loads_s: tuple[float, ...] = field(init=False)
    _groups: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    _group_masks: tuple[int, ...] = field(init=False, repr=False)
    _owner_masks: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # what every call looks up, as plain integers: with so few elements numpy would take longer to be called
        groups = worker_groups(self.workers, self.group_size)
        object.__setattr__(self, "_groups", groups)
        object.__setattr__(self, "_group_masks", tuple(sum(1 << worker for worker in group) for group in groups))
        object.__setattr__(self, "_owner_masks", tuple(_masks(owners_WE) for owners_WE in self.owners_LWE))
        object.__setattr__(self, "loads_s", _seconds(self.load_s_W, self.workers))

    def group_of(self, layer: int) -> tuple[int, ...]:
        """The workers that serve a layer in decode."""
        return self._groups[layer % len(self._groups)]

    def owners(self, layer: int, expert: int) -> int:
        """Who owns an expert: bit w stands for worker w. Raises ExpertUnavailableError where nobody does."""
        mask = self._owner_masks[layer][expert]
        if not mask:
            raise ExpertUnavailableError(
                f"expert {expert} of layer {layer} has no owner among the {self.workers} workers; "
                f"bring back the worker that held it, or restart with a device in its place"
            )
        return mask

    def owned(self, layer: int, experts_N: np.ndarray) -> np.ndarray:
        """Bool [N]: whether anybody owns each expert."""
        return np.array([self._owner_masks[layer][expert] != 0 for expert in experts_N.tolist()], dtype=bool)

    def permitted(self, layer: int, experts: list[int]) -> list[int]:
        """Who may be given each expert in decode, as bits: its owners in the layer's group; if there are none, all."""
        owners_E, group = self._owner_masks[layer], self._group_masks[layer % len(self._groups)]
        return [owners_E[expert] & group or self.owners(layer, expert) for expert in experts]


def fleet_of(
    devices: Sequence[DeviceName],
    ownership: Ownership,
    sizes: tuple[LayerSize, ...],
    group_size: int,
    load_s_W: np.ndarray | None = None,
    slots_W: tuple[int, ...] | None = None,
) -> Fleet:
    """The fleet of an ownership. ``devices`` gives the workers' order, as in the configuration."""
    owners_LWE = tuple(np.zeros((len(devices), size.experts), dtype=bool) for size in sizes)
    for worker, device in enumerate(devices):
        for key in ownership.get(device, ()):
            owners_LWE[key.layer][worker, key.expert] = True
    return Fleet(workers=len(devices), group_size=group_size, owners_LWE=owners_LWE, load_s_W=load_s_W, slots_W=slots_W)


def assign(
    experts_N: np.ndarray,
    layer: int,
    fleet: Fleet,
    busy_s_W: np.ndarray | None = None,
    *,
    tasks_W: np.ndarray | None = None,
    due_s_W: np.ndarray | None = None,
) -> np.ndarray:
    """A worker for each of a layer's experts, so that the last load is done soonest. Exact.

    Ties go to the worker that has fewer of them, then to the lower one. Where all workers own the same, experts that
    come first also get the places that are done first. Each worker should load its own in the order of ``experts_N``.

    Args:
        experts_N: distinct experts, in order of need or of the forecast's weight.
        busy_s_W: seconds until each worker's link is free; None: all are.
        tasks_W: how many other experts of the layer each worker computes without a load; None: none.
        due_s_W: seconds until the layer comes. Loads that are done sooner are as good as each other, and the worker
            that computes fewest experts gets the next one; None: sooner is always better.

    Returns:
        int64 [N], the worker of each expert: of the layer's group where one of them owns it, else any owner.

    Raises:
        ExpertUnavailableError: an expert has no owner.
    """
    masks = fleet.permitted(layer, experts_N.tolist())
    tasks = None if tasks_W is None else tasks_W.tolist()
    due_s = None if due_s_W is None else due_s_W.tolist()
    return np.array(_earliest(masks, fleet, _listed(busy_s_W, fleet), tasks=tasks, due_s=due_s), dtype=np.int64)


def reassign(
    needed_N: np.ndarray,
    planned: Mapping[int, int],
    layer: int,
    fleet: Fleet,
    busy_s_W: np.ndarray | None = None,
) -> np.ndarray:
    """A worker for each expert that the router really chose, given what was planned by a forecast.

    What was planned stays where it is loaded already. The others go where a wrongly planned expert leaves a free
    place, which costs the others nothing; only then beside the planned ones, which count as loads before theirs.

    Args:
        needed_N: the router's distinct experts.
        planned: planned expert -> its worker. One that does not own its expert any more is ignored.
        busy_s_W: seconds until each worker's link is free of other things than the planned loads; None: it is.

    Returns:
        int64 [N], the worker of each needed expert.

    Raises:
        ExpertUnavailableError: an expert has no owner.
    """
    needed = needed_N.tolist()
    worker_N = [planned.get(expert, -1) for expert in needed]
    for place, expert in enumerate(needed):
        if worker_N[place] >= 0 and not fleet.owners(layer, expert) >> worker_N[place] & 1:
            worker_N[place] = -1
    missing = [place for place, worker in enumerate(worker_N) if worker < 0]
    if missing:
        held, free = [0] * fleet.workers, [0] * fleet.workers
        for worker in worker_N:
            if worker >= 0:
                held[worker] += 1
        for expert in planned.keys() - set(needed):
            free[planned[expert]] += 1
        masks = fleet.permitted(layer, [needed[place] for place in missing])
        found = _earliest(masks, fleet, _listed(busy_s_W, fleet), held, free)
        for place, worker in zip(missing, found, strict=True):
            worker_N[place] = worker
    return np.array(worker_N, dtype=np.int64)


def spread(
    experts_N: np.ndarray, rows_N: np.ndarray, layer: int, fleet: Fleet, row_s_W: np.ndarray | float = 0.0
) -> np.ndarray:
    """A worker for each of a layer's experts in prefill, of all workers that own it, so that the last is done soonest.

    A worker takes the sum over its experts of ``load + rows · seconds per row``. The longest come first, each to who
    is done with it soonest (LPT: at most 4/3 of the optimum where workers are equal and own everything; Graham 1969);
    then experts leave the worker that is done last, or are exchanged, while that gains more than a hundredth.

    Args:
        rows_N: rows that each expert computes.
        row_s_W: seconds per row and expert, of each worker or of all, in the unit of the fleet's seconds per load.

    Returns:
        int64 [N], the worker of each expert.

    Raises:
        ExpertUnavailableError: an expert has no owner.
    """
    load_s_W = np.array(fleet.loads_s)
    masks = [fleet.owners(layer, expert) for expert in experts_N.tolist()]
    owned_NW = np.array([[mask >> worker & 1 for worker in range(fleet.workers)] for mask in masks], dtype=bool)
    owned_NW = owned_NW.reshape(len(masks), fleet.workers)
    cost_NW = np.where(owned_NW, load_s_W + rows_N[:, None] * np.broadcast_to(row_s_W, fleet.workers), np.inf)
    worker_N, total_W = np.zeros(len(masks), dtype=np.int64), np.zeros(fleet.workers)
    for expert in np.argsort(-cost_NW.min(axis=1), kind="stable").tolist():
        worker = int((total_W + cost_NW[expert]).argmin())
        worker_N[expert] = worker
        total_W[worker] += cost_NW[expert, worker]
    while len(masks) and _exchange(worker_N, cost_NW):
        pass
    return worker_N


def in_order_of_need(experts_TK: np.ndarray) -> np.ndarray:
    """Each expert once, int32: first those that tokens rank first."""
    column_first = experts_TK.T.reshape(-1)
    _, first = np.unique(column_first, return_index=True)
    return column_first[np.sort(first)].astype(np.int32)


def _masks(owners_WE: np.ndarray) -> tuple[int, ...]:
    """Each expert's owners as bits of one integer."""
    packed_EB = np.packbits(owners_WE, axis=0, bitorder="little").T
    return tuple(int.from_bytes(packed_B.tobytes(), "little") for packed_B in packed_EB)


def _seconds(load_s_W: np.ndarray | None, workers: int) -> tuple[float, ...]:
    if load_s_W is None or np.isnan(load_s_W).all():
        return (1.0,) * workers
    return tuple(np.where(np.isnan(load_s_W), np.nanmean(load_s_W), load_s_W).tolist())


def _listed(busy_s_W: np.ndarray | None, fleet: Fleet) -> list[float]:
    return [0.0] * fleet.workers if busy_s_W is None else busy_s_W.tolist()


def _earliest(
    masks: list[int],
    fleet: Fleet,
    busy_s: list[float],
    held: list[int] | None = None,
    free: list[int] | None = None,
    tasks: list[int] | None = None,
    due_s: list[float] | None = None,
) -> list[int]:
    """The worker of each expert in the earliest places, see the module's head.

    Args:
        masks: who may take each expert, as bits.
        held: how many experts of this layer each worker has to load before these.
        free: how many places each worker has free beside those; they are taken before all others.
        tasks: how many experts of this layer each worker computes beside these.
        due_s: places before that are as good as each other.
    """
    nothing = [0] * fleet.workers
    held, free, tasks, slots = held or nothing, free or nothing, tasks or nothing, fleet.slots_W
    due_s = due_s or [0.0] * fleet.workers
    load_s, anyone = fleet.loads_s, reduce(or_, masks, 0)

    def place(worker: int, count: int) -> tuple[bool, bool, float, int, float, int, int]:
        load = held[worker] + count
        computed = tasks[worker] + load
        unfit = slots is not None and computed > slots[worker]
        done_s = busy_s[worker] + load * load_s[worker]
        return unfit, count > free[worker], max(0.0, done_s - due_s[worker]), computed, done_s, count, worker

    places = [place(worker, 1) for worker in _workers(anyone)]
    heapq.heapify(places)
    worker_N, missing = [-1] * len(masks), len(masks)
    while missing:
        *_, count, worker = places[0]
        if _give_one(worker, worker_N, masks):
            missing -= 1
            heapq.heapreplace(places, place(worker, count + 1))
        else:
            heapq.heappop(places)
    return worker_N


def _workers(mask: int) -> Iterator[int]:
    """The workers whose bits are set, in their order; of a thousand, a group is a few."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _give_one(worker: int, worker_N: list[int], masks: list[int]) -> bool:
    """Give ``worker`` one expert more without taking one from the others' numbers; False where that can't be.

    An augmenting path: it takes an expert that nobody has yet, or one of somebody who can take another instead.
    """
    for expert, mask in enumerate(masks):  # mostly as easy as that; the search would find the same, only later
        if worker_N[expert] < 0 and mask >> worker & 1:
            worker_N[expert] = worker
            return True
    taker: dict[int, tuple[int, int]] = {}  # worker -> who would take which of its experts
    reached = [worker]
    for who in reached:
        for expert, mask in enumerate(masks):
            if not mask >> who & 1:
                continue
            other = worker_N[expert]
            if other < 0:
                worker_N[expert] = who
                while who != worker:
                    who, expert = taker[who]
                    worker_N[expert] = who
                return True
            if other != worker and other not in taker:
                taker[other] = (who, expert)
                reached.append(other)
    return False


def _exchange(worker_N: np.ndarray, cost_NW: np.ndarray) -> bool:
    """Relieve the worker that is done last by the best single move or swap, in place; False where none is worthwhile.

    I of its experts, J of the others'.
    """
    total_W = np.bincount(worker_N, cost_NW[np.arange(len(worker_N)), worker_N], minlength=cost_NW.shape[1])
    last = int(total_W.argmax())
    goal = total_W[last] * (1 - WORTHWHILE)
    mine_I, theirs_J = (worker_N == last).nonzero()[0], (worker_N != last).nonzero()[0]
    less_I = total_W[last] - cost_NW[mine_I, last]
    after_IW = np.maximum(less_I[:, None], total_W + cost_NW[mine_I])
    after_IW[:, last] = np.inf
    i, worker = divmod(int(after_IW.argmin()), cost_NW.shape[1])
    if after_IW[i, worker] < goal:
        worker_N[mine_I[i]] = worker
        return True
    if not len(theirs_J):
        return False
    whose_J = worker_N[theirs_J]
    without_J = total_W[whose_J] - cost_NW[theirs_J, whose_J]
    mine_after_IJ = less_I[:, None] + cost_NW[theirs_J, last]
    after_IJ = np.maximum(mine_after_IJ, without_J + cost_NW[mine_I[:, None], whose_J])
    i, j = divmod(int(after_IJ.argmin()), len(theirs_J))
    if after_IJ[i, j] >= goal:
        return False
    worker_N[mine_I[i]], worker_N[theirs_J[j]] = whose_J[j], last
    return True
