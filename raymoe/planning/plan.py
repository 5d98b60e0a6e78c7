"""A whole plan: does a model fit a cluster, how fast is each policy, what holds it up, and what to add. Pure."""

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from raymoe.planning.bounds import floor_s, ttft_s
from raymoe.planning.costs import Costs
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import Cluster, Room, kept_slots, ownership, problems, resident_share, rooms
from raymoe.planning.tpot import DRAFTED, POLICIES, Choice, best_choice, passing_slots, tpot_s
from raymoe.types import DeviceName

PARTS = {
    "link": "links into slots",
    "network": "network",
    "trunk": "the trunk's device",
    "experts": "the workers' computing",
    "shadow": "the shadow's device",
    "software": "software per layer",
}
"""What a step is made of, and what each part is called."""

MOST_ADDED = 256  # devices that are tried where the model does not fit
WORTH_SAYING = 0.01  # gains below a hundredth are not listed: the model is not that good


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPlan:
    """What to expect of one policy.

    Attributes:
        tpot_s, ttft_s: time per output token, and to the first one; None where the policy can't be run.
        floor_s: the roofline of the time per token.
        bottleneck: the part that would gain most if it were twice as fast, a key of ``PARTS``; None: nothing would.
        choice: how it is run.
    """

    policy: str
    tpot_s: float | None
    ttft_s: float | None
    floor_s: float | None
    bottleneck: str | None
    choice: Choice

    @property
    def of_floor(self) -> float | None:
        """The fraction of the roofline that is reached."""
        return self.floor_s / self.tpot_s if self.tpot_s and self.floor_s is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something to add, and the fastest policy with it. ``gain``: share of the time per token that it saves."""

    what: str
    policy: str
    tpot_s: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole plan.

    Attributes:
        problems: why the model can't run there; empty where it can.
        devices_lacking: how many more devices like the last worker would do; None where none are lacking, or none help.
        owned: experts in each worker's shard, copies included; None where the workers are too many to list.
        keeps: slots of each worker in which policy joint keeps experts, run as it is planned; None where it can't run.
        resident: share of the experts that lie in slots at once.
        policies: in the order of ``POLICIES``, those with drafts last; empty where the model can't run.
    """

    facts: ModelFacts
    cluster: Cluster
    prompt_tokens: int
    problems: tuple[str, ...]
    devices_lacking: int | None
    rooms: tuple[Room, ...]
    owned: dict[DeviceName, int] | None
    keeps: dict[DeviceName, int] | None
    resident: float
    policies: tuple[PolicyPlan, ...]
    changes: tuple[Change, ...]

    @property
    def best(self) -> PolicyPlan | None:
        """The fastest policy; None where none can be run."""
        able = [one for one in self.policies if one.tpot_s is not None]
        return min(able, key=lambda one: one.tpot_s or inf, default=None)

    def within(self, budget_s: float) -> tuple[PolicyPlan, ...]:
        """The policies that meet a time per token."""
        return tuple(one for one in self.policies if one.tpot_s is not None and one.tpot_s <= budget_s)


def make_plan(facts: ModelFacts, cluster: Cluster, *, prompt_tokens: int = 128) -> Plan:
    """Plan a model on a cluster."""
    found = problems(facts, cluster)
    costs = Costs(facts=facts, cluster=cluster)
    policies = () if found else every_policy(costs, prompt_tokens)
    best = min((one for one in policies if one.tpot_s is not None), key=lambda one: one.tpot_s or inf, default=None)
    group_size = best.choice.group_size if best is not None else 0
    owners = None if found else ownership(facts, cluster, group_size or None)
    return Plan(
        facts=facts,
        cluster=cluster,
        prompt_tokens=prompt_tokens,
        problems=found,
        devices_lacking=devices_lacking(facts, cluster) if found else None,
        rooms=rooms(facts, cluster),
        owned=None if owners is None else {name: len(keys) for name, keys in owners.items()},
        keeps=kept_by_joint(costs, policies),
        resident=resident_share(facts, cluster),
        policies=policies,
        changes=() if best is None or best.tpot_s is None else worthwhile(costs, best.tpot_s),
    )


def every_policy(costs: Costs, prompt_tokens: int) -> tuple[PolicyPlan, ...]:
    """What to expect of each policy, and of those with a shadow with drafts."""
    plain = [policy_plan(policy, costs, best_choice(policy, costs), prompt_tokens) for policy in POLICIES]
    drafted = []
    for policy, title in DRAFTED.items():
        choice = best_choice(policy, costs, drafts=True)
        if choice.drafts:
            drafted.append(replace(policy_plan(policy, costs, choice, prompt_tokens), policy=title))
    return (*plain, *drafted)


def kept_by_joint(costs: Costs, policies: tuple[PolicyPlan, ...]) -> dict[DeviceName, int] | None:
    """Slots that policy joint leaves for keeping, per worker, with the group size that it is planned with."""
    joint = next((one for one in policies if one.policy == "joint" and one.tpot_s is not None), None)
    if joint is None:
        return None
    in_use = passing_slots(costs, joint.choice)
    workers = (room for room in rooms(costs.facts, costs.cluster) if room.device.serves_experts)
    return {room.device.name: kept_slots(costs.facts, room, in_use) for room in workers}


def policy_plan(policy: str, costs: Costs, choice: Choice, prompt_tokens: int) -> PolicyPlan:
    """What to expect of one policy, run as ``choice`` says."""
    seconds = tpot_s(policy, costs, choice)
    if not isfinite(seconds):
        return PolicyPlan(policy=policy, tpot_s=None, ttft_s=None, floor_s=None, bottleneck=None, choice=choice)
    return PolicyPlan(
        policy=policy,
        tpot_s=seconds,
        ttft_s=ttft_s(policy, costs, choice, prompt_tokens),
        floor_s=floor_s(policy, costs, choice),
        bottleneck=bottleneck(policy, costs, choice, seconds),
        choice=choice,
    )


def bottleneck(policy: str, costs: Costs, choice: Choice, seconds: float) -> str | None:
    """The part whose doubled speed would save most; None where no part would save a hundredth."""
    saved = {part: seconds - tpot_s(policy, scaled(costs, part), choice) for part in PARTS}
    most = max(saved, key=lambda part: saved[part])
    return most if saved[most] > WORTH_SAYING * seconds else None


def scaled(costs: Costs, part: str, factor: float = 0.5) -> Costs:
    """The same with one part's times scaled."""
    return replace(costs, scales=(*costs.scales, (part, factor * costs.scale(part))))


# --- what to add ----------------------------------------------------------------------------------------


def worthwhile(costs: Costs, seconds: float) -> tuple[Change, ...]:
    """Changes that save something, each by planning anew with it alone, best first."""
    found = []
    for what, changed in changes(costs).items():
        policy, after_s = fastest(changed)
        gain = 1.0 - after_s / seconds
        if gain > WORTH_SAYING:
            found.append(Change(what=what, policy=policy, tpot_s=after_s, gain=gain))
    return tuple(sorted(found, key=lambda change: -change.gain))


def changes(costs: Costs) -> dict[str, Costs]:
    """What could be added, and the costs with it."""
    cluster = costs.cluster
    more = {
        "one more worker": replace(costs, cluster=with_more(cluster, 1)),
        "twice the slot memory": replace(costs, cluster=with_slots(costs.facts, cluster)),
    }
    more |= {f"{name}, twice as fast": scaled(costs, part) for part, name in PARTS.items() if part != "software"}
    more["software per layer halved"] = scaled(costs, "software")
    if cluster.shadow is None:
        held = costs.facts.shadow_bytes(cluster.predictor.bits) / 1e9
        what = f"a shadow on a device as fast as the trunk's, with {held:.3g} GB for it"
        more[what] = replace(costs, cluster=with_shadow(cluster))
        more.pop(f"{PARTS['shadow']}, twice as fast")
    elif cluster.predictor.bits > 4 and cluster.shadow.times.shadow_layer_s is None:
        narrow = cluster.predictor.model_copy(update={"bits": 4, "recall": None, "agreement": None})
        more["a shadow of 4 bits"] = replace(costs, cluster=replace(cluster, predictor=narrow))
    return {what: changed for what, changed in more.items() if not problems(changed.facts, changed.cluster)}


def fastest(costs: Costs) -> tuple[str, float]:
    """The fastest policy, drafts included, and its time per token."""
    times = {policy: tpot_s(policy, costs, best_choice(policy, costs)) for policy in POLICIES}
    for policy, title in DRAFTED.items():
        times[title] = tpot_s(policy, costs, best_choice(policy, costs, drafts=True))
    policy = min(times, key=lambda name: times[name])
    return policy, times[policy]


def with_more(cluster: Cluster, count: int) -> Cluster:
    """The cluster with more workers like its last one."""
    last = cluster.workers[-1]
    new = tuple(replace(last, name=DeviceName(f"{last.name}+{number + 1}")) for number in range(count))
    return replace(cluster, devices=(*cluster.devices, *new))


def with_slots(facts: ModelFacts, cluster: Cluster, factor: int = 2) -> Cluster:
    """The cluster with more slot memory at every worker that has slots."""
    devices = []
    for room in rooms(facts, cluster):
        device, more = room.device, (factor - 1) * room.slot_bytes
        if device.serves_experts and not device.is_unified:
            device = replace(device, slot_bytes=factor * room.slot_bytes, memory_bytes=2 * device.memory_bytes + more)
        devices.append(device)
    return replace(cluster, devices=tuple(devices))


def with_shadow(cluster: Cluster) -> Cluster:
    """The cluster with a shadow on a new device like the trunk's, with as much memory as it takes."""
    name = DeviceName(f"{cluster.trunk_name}+shadow")
    device = replace(cluster.trunk, name=name, serves_experts=False, memory_bytes=1 << 62, slot_bytes=None)
    return replace(cluster, devices=(*cluster.devices, device), shadow_name=name)


def devices_lacking(facts: ModelFacts, cluster: Cluster) -> int | None:
    """The least number of further workers like the last one with which the model fits; None where none help."""
    count = 1
    while count <= MOST_ADDED:
        if not problems(facts, with_more(cluster, count)):
            break
        count *= 2
    else:
        return None
    low, high = count // 2 + 1, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if not problems(facts, with_more(cluster, middle)) else (middle + 1, high)
    return high


# --- as data --------------------------------------------------------------------------------------------


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; times in seconds, sizes in bytes."""
    facts = plan.facts
    return {
        "model": {
            "name": facts.name,
            "model_type": facts.model_type,
            "dtype": facts.dtype,
            "known_from": facts.known_from,
            "moe_layers": facts.layers,
            "experts_per_layer": facts.experts,
            "top_k": facts.top_k,
            "expert_bytes": facts.expert_bytes,
            "trunk_bytes": facts.trunk_bytes,
            "routed_bytes": facts.routed_bytes,
            "kv_bytes_per_token": facts.kv_bytes,
        },
        "fits": not plan.problems,
        "problems": list(plan.problems),
        "devices_lacking": plan.devices_lacking,
        "prompt_tokens": plan.prompt_tokens,
        "resident": plan.resident,
        "devices": [_device(plan, room) for room in plan.rooms],
        "policies": [_policy(one) for one in plan.policies],
        "best": plan.best.policy if plan.best else None,
        "changes": [
            {"what": change.what, "policy": change.policy, "tpot_s": change.tpot_s, "gain": change.gain}
            for change in plan.changes
        ],
    }


def _device(plan: Plan, room: Room) -> dict[str, Any]:
    device = room.device
    slots = min(room.slot_bytes // plan.facts.expert_bytes, sum(size.experts for size in plan.facts.sizes))
    return {
        "name": device.name,
        "hardware": device.hardware,
        "emulated": device.emulated,
        "trunk": device.name == plan.cluster.trunk_name,
        "shadow": device.name == plan.cluster.shadow_name,
        "fixed_bytes": room.fixed_bytes,
        "slots": slots,
        "slot_bytes": slots * plan.facts.expert_bytes,
        "owned": None if plan.owned is None else plan.owned.get(device.name, 0),
        "keeps": None if plan.keeps is None else plan.keeps.get(device.name, 0),
    }


def _policy(one: PolicyPlan) -> dict[str, Any]:
    return {
        "policy": one.policy,
        "tpot_s": one.tpot_s,
        "tokens_per_s": 1 / one.tpot_s if one.tpot_s else None,
        "ttft_s": one.ttft_s,
        "roofline_tpot_s": one.floor_s,
        "of_roofline": one.of_floor,
        "bottleneck": one.bottleneck,
        "group_size": one.choice.group_size or None,
        "drafts": one.choice.drafts,
    }
