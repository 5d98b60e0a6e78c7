"""Time per output token of every policy, in closed form where there is one. Pure.

With t_M the trunk's share of a layer, t_W that of the workers and their messages, all resident, t_L one load:

- *all_resident*: ``layers·(t_M + t_W) + head``.
- *on_demand*: slots hold a share c of a layer's experts, each of k is missing with 1 - h(c). A layer waits for the
  worker that has most to load: the mean over all ways in which k experts fall on n workers, missing or not. The first
  one is computed when it is there, while the others are on their way.
- *importance*: the same with fewer misses, h by scores and substitutes. Beside a host that may compute, misses are
  split by the function that the workers use; else prefetches hide ``PREFETCHED`` of a layer's resident time.
  Deciding costs.
- *on_demand_shadow*: ``placement.pipelining`` follows the loads layer by layer. A wrong guess of the shadow, as often
  as its tokens differ, costs its lead: such steps take what they take with a shadow that departs late.
- *joint*: the same, but what scores high stays in the slots that loads leave free, and alpha substitutes as under
  importance: a share h(c) of the loads falls away. Free are those beyond the loads of two layers, one computed and one
  under way; c is their share of all experts, h that of a cache of such a size (assumed: whatever order loads come in).
- *with drafts*: one pass reads a token and d drafts. It loads and computes the union of their experts, each once, and
  yields ``1 + a + ... + a^d`` tokens, a being how often a guess is right. The shadow has to make d + 1 tokens in the
  meantime. The depth is the best one, up to the limit. What does not fit the slots is loaded when the layer has begun.

What the model leaves out: jitter, hand-outs of owners that miss the even spread, and rows of other requests.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, comb, inf

import numpy as np

from raymoe.placement.grouping import group_count
from raymoe.placement.host_assist import fastest_split
from raymoe.placement.pipelining import DecodePipeline, missed_share, predicted_tpot_s
from raymoe.planning import rates
from raymoe.planning.costs import Costs
from raymoe.planning.layout import holds_everything, kept_share, resident_share, rooms, spread

POLICIES = ("all_resident", "on_demand", "importance", "on_demand_shadow", "joint")
DRAFTED = {"on_demand_shadow": "on_demand_shadow + drafts", "joint": "joint + drafts"}
RUN_AHEAD = 2  # steps that a shadow may be ahead, as predictor.shadow has it
DEPTHS = (1, 2, 3, 4, 6, 8)
PREFETCHED = 0.45  # of a layer's resident time: what prefetches saved in docs/benchmarks.md, "importance" (13% to 24%)
GATE_RECALL = 0.77  # of the gates one layer ahead, docs/benchmarks.md, "predictor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a policy is run with: workers per group, and drafts per pass. Of policies that have neither: 0."""

    group_size: int = 0
    drafts: int = 0


def hit_rate(costs: Costs, kind: str, share: float) -> float:
    """Of slots that hold this share of a layer's experts, by "lru" or "substituted" (with the file's alpha)."""
    given = costs.cluster.hit_rates
    if kind == "lru":
        return rates.interpolated(given.lru or rates.LRU, share)
    if given.substituted is not None:
        return rates.interpolated(given.substituted, share)
    if given.score is not None:
        gained = rates.substituted(share, costs.cluster.alpha) - rates.substituted(share, 0.0)
        return min(1.0, rates.interpolated(given.score, share) + gained)
    return rates.substituted(share, costs.cluster.alpha)


def tpot_s(policy: str, costs: Costs, choice: Choice) -> float:
    """Seconds per output token of a policy, a name of ``POLICIES``; infinite where it can't be run."""
    if policy == "all_resident":
        return resident_s(costs) if holds_everything(costs.facts, costs.cluster) else inf
    if policy in ("on_demand", "importance"):
        return cached_s(costs, policy)
    return pipelined_s(costs, choice, keeps=policy == "joint")


def resident_s(costs: Costs) -> float:
    """With every expert in a slot."""
    wide = spread(costs.facts, costs.cluster)
    layer_s = costs.main_s() + costs.call_s(wide) + ceil(costs.facts.top_k / wide) * costs.expert_s()
    return costs.facts.layers * layer_s + costs.head_s()


# --- with a cache ---------------------------------------------------------------------------------------


def cached_s(costs: Costs, policy: str) -> float:
    """Policies on_demand and importance: what is missing is loaded when the router has spoken."""
    facts, cluster = costs.facts, costs.cluster
    wide, share = spread(facts, cluster), resident_share(facts, cluster)
    clever = policy == "importance"
    hits = hit_rate(costs, "substituted" if clever else "lru", share)
    chance_M = most_missing(facts.top_k, wide, 1.0 - hits)
    load_s, expert_s, host_s = costs.load_s(), costs.expert_s(), costs.host_s() if clever else None
    computed_s = ceil(facts.top_k / wide) * expert_s
    fetched_s = np.array([fastest_split(np.zeros(m), load_s, host_s).finish_s for m in range(len(chance_M))])
    workers_s = np.maximum(computed_s, fetched_s + expert_s * (np.arange(len(chance_M)) > 0))
    layer_s = costs.main_s() + costs.call_s(wide) + float(chance_M @ workers_s)
    if clever:
        waited_s = float(chance_M @ (workers_s - computed_s))
        hidden_s = min(GATE_RECALL * waited_s, PREFETCHED * (layer_s - waited_s)) if host_s is None else 0.0
        layer_s = max(layer_s + costs.deciding_s - hidden_s, float(chance_M @ fetched_s))  # links are busy at least
    return facts.layers * layer_s + costs.head_s()


def most_missing(top_k: int, workers: int, missing: float) -> np.ndarray:
    """How many of a token's experts the worker misses that misses most: the chance of each number, from 0 to top_k.

    Each expert falls on each of ``workers`` workers alike and is missing with a chance of ``missing``, on its own.
    """
    at_most_M = []
    for most in range(top_k + 1):
        # ways to have at most so many misses everywhere, as a polynomial in the number of misses placed so far
        ways_K = np.zeros(top_k + 1)
        ways_K[0] = 1.0
        for _ in range(workers):
            ways_K = np.array(
                [
                    sum(ways_K[total - own] * comb(total, own) for own in range(min(most, total) + 1))
                    for total in range(top_k + 1)
                ]
            )
        misses_K = np.array([comb(top_k, k) * missing**k * (1 - missing) ** (top_k - k) for k in range(top_k + 1)])
        at_most_M.append(float(misses_K @ (ways_K / float(workers) ** np.arange(top_k + 1))))
    return np.diff(np.array(at_most_M), prepend=0.0)


# --- without a cache ------------------------------------------------------------------------------------


def pipelined_s(costs: Costs, choice: Choice, *, keeps: bool) -> float:
    """Policies on_demand_shadow and joint, with or without drafts."""
    cluster, bits = costs.cluster, costs.cluster.predictor.bits
    agreement = cluster.predictor.agreement
    right = rates.AGREEMENT[bits] if agreement is None else agreement
    late_s = pass_s(costs, choice, keeps=keeps, steps_ahead=0)
    if costs.shadow_s() is None:
        return late_s
    tokens = drafted_tokens(choice.drafts, right)
    if not cluster.predictor.run_ahead:
        return late_s / tokens
    ahead_s = pass_s(costs, choice, keeps=keeps, steps_ahead=RUN_AHEAD)
    kept = right ** (choice.drafts + 1)
    return (kept * ahead_s + (1.0 - kept) * max(ahead_s, late_s)) / tokens


def drafted_tokens(drafts: int, right: float) -> float:
    """Tokens that a pass yields in the mean: the model's own, and drafts up to the first wrong one."""
    return sum(right**depth for depth in range(drafts + 1))


def pass_s(costs: Costs, choice: Choice, *, keeps: bool, steps_ahead: int) -> float:
    """One pass over a token and its drafts, if the shadow's lead is never lost (or never had, with no steps ahead)."""
    facts, cluster, rows = costs.facts, costs.cluster, choice.drafts + 1
    union = united_experts(costs, rows)
    loads, loaded_s = costs.group_loads(choice.group_size, ceil(union - 1e-9))
    slots = least_slots(costs)
    hits = 0.0
    if keeps:
        hits = hit_rate(costs, "substituted", kept_share(facts, cluster, 2 * loads))
    needed = union / ceil(union - 1e-9) * (1.0 - hits)
    per_worker = ceil(facts.top_k / choice.group_size) if rows == 1 else max(1.0, union / choice.group_size)
    worker_s = costs.call_s(choice.group_size, rows) + per_worker * costs.expert_s(rows * facts.top_k / union)
    shadow_s = costs.shadow_s()
    main_s = costs.main_s(rows) + (costs.deciding_s if keeps else 0.0)
    if shadow_s is not None and cluster.shadow_name == cluster.trunk_name:
        main_s += shadow_s * rows  # they take turns
    load_s = loaded_s / loads * needed
    at_once = min(loads, slots)
    pipeline = DecodePipeline(
        layers=facts.layers,
        groups=group_count(len(cluster.workers), choice.group_size),
        main_s=main_s,
        worker_s=worker_s + (loads - at_once) * load_s,
        load_s=load_s,
        loads=at_once,
        spare_slots=min(slots - at_once, loads) if keeps else slots - at_once,
        head_s=costs.head_s(rows),
        shadow_s=None if shadow_s is None else shadow_s * rows,
        steps_ahead=steps_ahead,
        missed=0.0 if shadow_s is None else missing_share(costs, union) * (1.0 - hits),
    )
    return followed_s(pipeline)


def united_experts(costs: Costs, rows: int) -> float:
    """Distinct experts per layer of a pass over so many positions, in the mean."""
    facts, given = costs.facts, costs.cluster.hit_rates
    return rates.union(rows, facts.top_k, facts.experts, given.lru or rates.LRU)


def passing_slots(costs: Costs, choice: Choice) -> int:
    """Slots of a worker that its loads of two layers take, as ``pass_s`` counts them."""
    union = united_experts(costs, choice.drafts + 1)
    return 2 * costs.group_loads(choice.group_size, ceil(union - 1e-9))[0]


@lru_cache(maxsize=8192)
def followed_s(pipeline: DecodePipeline) -> float:
    """``predicted_tpot_s``, remembered: a plan asks for the same pipeline again and again."""
    return predicted_tpot_s(pipeline)


def missing_share(costs: Costs, union: float) -> float:
    """How often some expert of a layer was not foretold."""
    recall = costs.cluster.predictor.recall
    return missed_share(rates.RECALL[costs.cluster.predictor.bits] if recall is None else recall, round(union))


def least_slots(costs: Costs) -> int:
    """Slots of the worker that has fewest, at least one; as many as experts where shards are resident."""
    places = [room for room in rooms(costs.facts, costs.cluster) if room.device.serves_experts]
    return max(1, min(room.slot_bytes // costs.facts.expert_bytes for room in places))


def group_sizes(costs: Costs) -> tuple[int, ...]:
    """Group sizes worth trying: the one that is asked for, else powers of two and the number of experts of a token."""
    workers, top_k = len(costs.cluster.workers), costs.facts.top_k
    if costs.cluster.group_size is not None:
        return (min(costs.cluster.group_size, workers),)
    sizes = {2**power for power in range(top_k.bit_length())} | {top_k}
    return tuple(sorted(size for size in sizes if size <= min(workers, top_k))) or (1,)


def best_choice(policy: str, costs: Costs, *, drafts: bool = False) -> Choice:
    """The fastest way to run a policy; ties go to smaller groups and fewer drafts."""
    if policy not in DRAFTED:
        return Choice()
    plain = min((Choice(group_size=size) for size in group_sizes(costs)), key=lambda one: tpot_s(policy, costs, one))
    if not drafts or costs.shadow_s() is None or not costs.cluster.predictor.run_ahead:
        return plain
    depths = [depth for depth in DEPTHS if depth <= costs.cluster.predictor.drafts]
    deep = [plain, *(Choice(group_size=plain.group_size, drafts=depth) for depth in depths)]
    return min(deep, key=lambda one: tpot_s(policy, costs, one))
