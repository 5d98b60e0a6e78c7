"""One plan from both methods: what of a forecast layer is loaded by whom, what is replaced, and what stays.

OD-MoE (arXiv 2512.03927) knows ahead which experts a layer will need, and loads them all. SMoE (arXiv 2508.18983)
replaces experts that score low by what is at hand, but decides so when the layer has come. A forecast of *scores* says
beforehand which of the experts to come score low: these need no way over a link at all.

**Objective.** Of all plans that alpha permits, the one that serves the most gate mass on time per byte that it moves;
among those that move nothing, the one that serves the most. The mass of a plan is the sum over tokens of the gate
scores of the experts that the token ends with, as far as these are in a slot when the layer comes.

**Greedy solution.** Per token (by ``route``) replace chosen experts that no slot holds, the lowest-scored first, each
by the best-scored permitted expert that a slot holds, as long as alpha permits; what is in a slot already stays where
it is; the rest is loaded, best worth first, by whom it is done earliest (by ``assign``).

All loads that are done before the layer comes are equally early. Of these, workers get as many that they all compute
about as many experts, whatever their slots hold: a layer takes as long as its busiest worker. For the same reason an
expert may be loaded by one worker though another one holds it, where that link has the time: these bytes cost nothing.

For one token, experts of equal size and workers that own the same this is the optimum. With j replacements no plan
serves more than the one that gives up the j lowest-scored experts for the j best substitutes; and the load that a
replacement saves carried the least mass of all, so no more than the mean per load: taking it out never lowers the mass
per byte. Fewer loads are done earlier, and the best-scored ones come first; so that holds whatever "on time" is. Where
memory differs between workers, the loads are still done as early as any assignment can have them, but who scores best
need not come first. tests/unit/test_joint.py compares with brute force.

At alpha 0 and with nothing in a slot this is the plan of policy on_demand_shadow, load for load. The plan moves
weights only: what is computed is decided by the router when the layer has come, with substitution on its true scores.

What stays in slots that no plan needs is not decided here but by the worker, which alone knows its slots: what is
worth least by ``keeping`` goes first.

T tokens, K experts per token, E experts, N experts of a plan, W workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from raymoe.placement.assignment import Fleet, assign, in_order_of_need
from raymoe.placement.grouping import worker_groups
from raymoe.placement.routing import route
from raymoe.placement.similarity import Similarity

# Of alpha, in plans. A forecast is not the router: an expert that was to be replaced by the forecast's scores and may
# not be by the true ones is loaded while everything waits, a load too many costs only the link.
CAUTION = 0.8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPlan:
    """What a layer of a step to come shall find in slots, and where.

    Attributes:
        experts_N: int32, each expert once, those needed most first.
        workers_N: int64, who shall have it.
        loads_N: bool, True where it has to be loaded for that; the others are kept until they were used.
        replaced: (token, expert) pairs that are planned to be replaced by experts in slots.
    """

    experts_N: np.ndarray
    workers_N: np.ndarray
    loads_N: np.ndarray
    replaced: int


def plan_layer(
    layer: int,
    scores_TE: np.ndarray,
    chosen_TK: np.ndarray,
    fleet: Fleet,
    *,
    held_WE: np.ndarray | None = None,
    ordered: Mapping[int, int] | None = None,
    alpha_T: np.ndarray | float = 0.0,
    busy_s_W: np.ndarray | None = None,
    due_s_W: np.ndarray | None = None,
    permitted_TE: np.ndarray | None = None,
    similarity: Similarity | None = None,
) -> LayerPlan:
    """The plan for one layer of a step, see the module's head.

    Args:
        scores_TE: forecast gate scores of all experts, as ``route`` takes them.
        chosen_TK: the experts that the router is expected to choose.
        held_WE: bool, the experts of this layer that will be in a worker's slots anyway when it comes; None: none.
        ordered: expert -> its worker, of what was ordered for other tokens of this step: it will be in a slot as well.
        alpha_T: threshold per token, or one for all.
        busy_s_W: seconds until each worker's link is free, in the unit of the fleet's loads; None: as soon as it has
            loaded what was ordered.
        due_s_W: seconds until the layer comes, in the same unit; None: nobody knows.
        permitted_TE: bool, the experts that the router may choose for a token; None: all.
        similarity: ranks substitutes; None: by score.

    Raises:
        ExpertUnavailableError: an expert that has to be loaded has no owner.
    """
    ordered = ordered or {}
    if ordered:
        held_WE = _with_ordered(held_WE, ordered, scores_TE.shape[1], fleet)
    if busy_s_W is None:
        busy_s_W = np.bincount(list(ordered.values()), minlength=fleet.workers) * np.array(fleet.loads_s)
    chosen_TK, replaced = _replace(layer, scores_TE, chosen_TK, held_WE, alpha_T, permitted_TE, similarity)
    experts_N = in_order_of_need(chosen_TK)
    wanted = set(experts_N.tolist())
    others_W = np.bincount([w for expert, w in ordered.items() if expert not in wanted], minlength=fleet.workers)
    workers_N = _stay(layer, experts_N, held_WE, others_W, fleet)
    loads_N = workers_N < 0
    tasks_W = others_W + np.bincount(workers_N[~loads_N], minlength=fleet.workers)
    workers_N[loads_N] = assign(experts_N[loads_N], layer, fleet, busy_s_W, tasks_W=tasks_W, due_s_W=due_s_W)
    if due_s_W is not None:
        fixed_N = np.array([expert in ordered for expert in experts_N.tolist()])
        _relieve(layer, experts_N, workers_N, loads_N, fixed_N, others_W, fleet, busy_s_W, due_s_W)
    return LayerPlan(experts_N=experts_N, workers_N=workers_N, loads_N=loads_N, replaced=replaced)


def _with_ordered(held_WE: np.ndarray | None, ordered: Mapping[int, int], experts: int, fleet: Fleet) -> np.ndarray:
    """What will be in slots, where what was ordered is with whom it was ordered of."""
    held_WE = np.zeros((fleet.workers, experts), dtype=bool) if held_WE is None else held_WE.copy()
    held_WE[:, list(ordered)] = False
    held_WE[list(ordered.values()), list(ordered)] = True
    return held_WE


def _replace(
    layer: int,
    scores_TE: np.ndarray,
    chosen_TK: np.ndarray,
    held_WE: np.ndarray | None,
    alpha_T: np.ndarray | float,
    permitted_TE: np.ndarray | None,
    similarity: Similarity | None,
) -> tuple[np.ndarray, int]:
    """What the tokens are expected to end with, and how many of their experts are replaced for that."""
    if held_WE is None or not np.count_nonzero(alpha_T):
        return chosen_TK, 0
    routed = route(
        scores_TE,
        chosen_TK,
        np.asarray(held_WE.any(axis=0)),
        CAUTION * alpha_T,
        permitted_TE=permitted_TE,
        similarity=similarity,
        layer=layer,
    )
    return routed.experts_TK, int(np.count_nonzero(routed.replaced_TK))


def _stay(
    layer: int, experts_N: np.ndarray, held_WE: np.ndarray | None, others_W: np.ndarray, fleet: Fleet
) -> np.ndarray:
    """Who holds each expert, -1 where nobody does. Of several the layer's group comes first, then who has least to do.

    Args:
        others_W: how many other experts of the layer each worker computes.
    """
    workers_N = np.full(len(experts_N), -1, dtype=np.int64)
    if held_WE is None:
        return workers_N
    group, tasks_W = set(fleet.group_of(layer)), others_W.tolist()
    for place, expert in enumerate(experts_N.tolist()):
        holders = np.flatnonzero(held_WE[:, expert]).tolist()
        if holders:
            worker = min(holders, key=lambda holder: (holder not in group, tasks_W[holder], holder))
            workers_N[place] = worker
            tasks_W[worker] += 1
    return workers_N


def _relieve(
    layer: int,
    experts_N: np.ndarray,
    workers_N: np.ndarray,
    loads_N: np.ndarray,
    fixed_N: np.ndarray,
    others_W: np.ndarray,
    fleet: Fleet,
    busy_s_W: np.ndarray,
    due_s_W: np.ndarray,
) -> None:
    """Let others load what the busiest worker holds, in place, as long as they are done before the layer comes.

    Those needed least go first: if a load is late all the same, it is the one that may best be replaced.

    Args:
        fixed_N: bool, experts that have to stay where they are.
    """
    load_s_W, group = np.array(fleet.loads_s), fleet.group_of(layer)
    owners_N = fleet.permitted(layer, experts_N.tolist())
    while True:
        tasks_W = others_W + np.bincount(workers_N, minlength=fleet.workers)
        done_s_W = busy_s_W + (1 + np.bincount(workers_N[loads_N], minlength=fleet.workers)) * load_s_W
        busiest = int(tasks_W.argmax())
        places = np.flatnonzero((workers_N == busiest) & ~loads_N & ~fixed_N).tolist()
        able = [
            (tasks_W[worker], done_s_W[worker], -place, worker)
            for worker in group
            if tasks_W[worker] + 1 < tasks_W[busiest] and done_s_W[worker] <= due_s_W[worker]
            for place in places
            if owners_N[place] >> worker & 1
        ]
        if not able:
            return
        *_, negative, worker = min(able)
        workers_N[-negative], loads_N[-negative] = worker, True


def spare_slots(fleet: Fleet, top_k: int) -> np.ndarray:
    """Bool [W]: whether a worker has more slots than pass through: its loads of one layer, and one to load meanwhile.

    Where it has not, what its slots hold now is gone before its layer comes again.
    """
    if fleet.slots_W is None:
        return np.ones(fleet.workers, dtype=bool)
    return np.array(fleet.slots_W) > passing_slots(fleet.workers, fleet.group_size, top_k)


def passing_slots(workers: int, group_size: int, top_k: int) -> int:
    """Slots of each worker that experts pass through: its loads of one layer, and one to load into meanwhile."""
    smallest = min(map(len, worker_groups(workers, group_size)))
    return -(-top_k // smallest) + 1
