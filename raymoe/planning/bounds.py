"""Time to first token, and what no policy can beat: the roofline of a cluster. Pure.

**Prompts** need nearly every expert. Each layer's are spread over all workers, in mini-batches of about an expert, so
that sending, loading, computing and returning overlap: the longest of them counts, and of the others one mini-batch.

**The roofline.** A token can't take less than the longer of

- the resident path: the same layers with every expert at hand and no software, at the rate at which memory is read;
- the bytes that must move, over all links together: without a cache every expert that is used; with one what a
  clairvoyant cache of the same size would load, or what substitution leaves if that is less.

Drafts share one pass among the tokens that it yields, and so does its roofline.
"""

from dataclasses import replace
from math import ceil

from raymoe.planning import rates
from raymoe.planning.costs import Costs
from raymoe.planning.layout import kept_share, resident_share, spread
from raymoe.planning.tpot import Choice, drafted_tokens, hit_rate

CACHED = ("on_demand", "importance")


def ttft_s(policy: str, costs: Costs, choice: Choice, prompt_tokens: int) -> float:
    """Seconds until a prompt of so many tokens has its first answer token, with nothing else going on."""
    facts, cluster = costs.facts, costs.cluster
    union = rates.union(prompt_tokens, facts.top_k, facts.experts, cluster.hit_rates.lru or rates.LRU)
    workers = len(cluster.workers)
    each = max(1.0, union / workers)  # nobody loads a part of an expert
    bytes_per_s = cluster.network.bytes_per_s if cluster.is_remote else float("inf")
    bytes_per_s /= costs.scale("network")
    pairs = prompt_tokens * facts.top_k
    stages_s = (
        prompt_tokens * min(workers, facts.top_k) * facts.row_bytes / bytes_per_s,
        each * costs.load_s() * (1.0 - _held(policy, costs)),
        each * costs.expert_s(pairs / union),
        pairs * facts.row_bytes / bytes_per_s,
    )
    longest_s = max(stages_s)
    layer_s = longest_s + (sum(stages_s) - longest_s) / max(1, ceil(each))
    if cluster.is_remote:
        layer_s += costs.scale("network") * 2 * cluster.network.latency_s
    return facts.layers * (costs.main_s(prompt_tokens) + layer_s) + costs.head_s()


def _held(policy: str, costs: Costs) -> float:
    """Share of the experts that lie in slots when a prompt comes."""
    if policy == "all_resident":
        return 1.0
    if policy in CACHED:
        return resident_share(costs.facts, costs.cluster)
    return kept_share(costs.facts, costs.cluster, 2) if policy == "joint" else 0.0


def _spared(policy: str, costs: Costs) -> float:
    """Share of the experts in use that need not move, at best."""
    held = _held(policy, costs)
    if policy == "importance" and costs.host_s() is not None:
        return 1.0  # the host may compute them where they lie
    if policy not in (*CACHED, "joint"):
        return held
    kind = "lru" if policy == "on_demand" else "substituted"
    return max(rates.interpolated(rates.CLAIRVOYANT, held), hit_rate(costs, kind, held))


def floor_s(policy: str, costs: Costs, choice: Choice) -> float:
    """The roofline: seconds per token that a policy can't go below on this hardware."""
    facts, cluster, rows = costs.facts, costs.cluster, choice.drafts + 1
    union = rates.union(rows, facts.top_k, facts.experts, cluster.hit_rates.lru or rates.LRU)
    bare = replace(costs, scales=(*costs.scales, ("software", 0.0)))
    workers = choice.group_size or spread(facts, cluster)
    layer_s = bare.main_s(rows) + bare.call_s(workers, rows)
    layer_s += max(1.0, union / workers) * bare.expert_s(rows * facts.top_k / union)
    path_s = facts.layers * layer_s + bare.head_s(rows)
    moved = facts.layers * union * facts.expert_bytes * (1.0 - _spared(policy, costs))
    agreement = cluster.predictor.agreement
    right = rates.AGREEMENT[cluster.predictor.bits] if agreement is None else agreement
    return max(path_s, moved / costs.link_bytes_per_s()) / drafted_tokens(choice.drafts, right)
