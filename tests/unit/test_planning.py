"""Planning: exact small numbers, closed forms, bounds that no plan may break, and what was measured or published."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.placement.pipelining import DecodePipeline, predicted_tpot_s
from raymoe.planning import rates
from raymoe.planning.bounds import floor_s, ttft_s
from raymoe.planning.cluster import DevicesFile
from raymoe.planning.costs import Costs
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import (
    Cluster,
    cluster_of,
    holds_everything,
    ownership,
    problems,
    resident_share,
    rooms,
)
from raymoe.planning.plan import PARTS, as_dict, devices_lacking, make_plan, scaled, with_more
from raymoe.planning.tpot import (
    POLICIES,
    Choice,
    best_choice,
    cached_s,
    drafted_tokens,
    most_missing,
    pipelined_s,
    resident_s,
    tpot_s,
)
from raymoe.types import LayerSize
from tests.planning import EXPERT_BYTES, cluster, device, embedded, mixtral

SECONDS = pytest.approx
OD_MOE = Path(__file__).parents[2] / "docs" / "planning" / "od-moe.yaml"
CURVES = (rates.LRU, rates.SCORE, rates.CLAIRVOYANT, *rates.SUBSTITUTED.values())
SHARES = st.floats(0, 1)


def costs(*devices: dict, facts: ModelFacts | None = None, **more: object) -> Costs:
    return Costs(facts=facts or embedded(), cluster=cluster(*devices, **more))


# --- rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", CURVES)
def test_curves_pass_through_what_was_measured(curve: rates.Points) -> None:
    assert [rates.interpolated(curve, share) for share, _ in curve] == SECONDS([rate for _, rate in curve])


@given(st.sampled_from(CURVES), SHARES, SHARES)
def test_more_slots_never_hit_less(curve: rates.Points, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= rates.interpolated(curve, low) <= rates.interpolated(curve, high) + 1e-9 <= 1 + 1e-9


@given(SHARES, SHARES, SHARES)
def test_a_wider_window_never_hits_less(share: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert rates.substituted(share, low) <= rates.substituted(share, high) + 1e-9


def test_a_window_between_two_measured_ones_lies_between_them() -> None:
    assert rates.substituted(0.25, 0.3) == SECONDS((0.709 + 0.731) / 2)
    assert rates.substituted(0.25, 1.0) == 0.763


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 300))
def test_a_union_grows_with_every_token_up_to_all_experts(top_k: int, more: int, tokens: int) -> None:
    experts = top_k + more
    found = rates.union(tokens, top_k, experts)
    assert top_k <= found <= min(experts, tokens * top_k) + 1e-9
    assert rates.union(tokens + 1, top_k, experts) >= found - 1e-9


def test_one_token_uses_its_experts_and_a_long_prompt_all() -> None:
    assert rates.union(1, 4, 32) == 4.0
    assert rates.union(2, 4, 32) == SECONDS(4 + 4 * (1 - 0.359))
    assert rates.union(500, 4, 32) == SECONDS(32, rel=0.01)


# --- misses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "workers"), [(1, 1), (4, 1), (3, 2), (4, 3), (2, 5)])
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_the_worst_workers_misses_are_those_of_all_ways_to_fall(top_k: int, workers: int, missing: float) -> None:
    expected_M = np.zeros(top_k + 1)
    for places in itertools.product(range(workers + 1), repeat=top_k):  # the last place: no miss
        counts = [places.count(worker) for worker in range(workers)]
        hits = places.count(workers)
        expected_M[max(counts)] += (missing / workers) ** (top_k - hits) * (1 - missing) ** hits
    assert most_missing(top_k, workers, missing) == SECONDS(expected_M)


# --- policies by hand -----------------------------------------------------------------------------------


def test_resident_is_trunk_and_experts_of_every_layer_and_the_head() -> None:
    alone = costs(device(slot_memory=256 * EXPERT_BYTES))
    assert resident_s(alone) == SECONDS(8 * (2e-3 + 4 * 1e-4) + 1e-3)
    assert tpot_s("all_resident", alone, Choice()) == resident_s(alone)


def test_with_everything_in_slots_on_demand_is_as_fast_as_resident() -> None:
    alone = costs(device(slot_memory=256 * EXPERT_BYTES))
    assert cached_s(alone, "on_demand") == SECONDS(resident_s(alone))


def test_on_demand_waits_for_the_loads_of_what_is_missing() -> None:
    alone = costs(device())  # 64 slots of 256: a quarter, hit rate 0.587
    chance_M = most_missing(4, 1, 1 - 0.587)
    waits_s = sum(chance * (misses * 4e-3 + 1e-4) for misses, chance in enumerate(chance_M) if misses)
    assert cached_s(alone, "on_demand") == SECONDS(8 * (2e-3 + chance_M[0] * 4e-4 + waits_s) + 1e-3)


def test_a_measured_curve_is_used() -> None:
    better = costs(device(), hit_rates={"lru": [(0.25, 1.0)]})
    assert cached_s(better, "on_demand") == SECONDS(resident_s(better))


def shadowed(load_s: float, **predictor: object) -> Costs:
    times = {"main_layer_s": 2e-3, "head_s": 1e-3, "expert_s": 1e-4, "load_s": load_s, "shadow_layer_s": 1e-3}
    worker = device(count=8, slot_memory=2 * EXPERT_BYTES, times=times)
    others = [device(name, serves_experts=False, slot_memory=None, times=times) for name in ("main", "shadow")]
    return costs(*others, worker, trunk="main", shadow="shadow", group_size=4, predictor=predictor)


def test_without_a_cache_it_is_the_pipeline_of_placement() -> None:
    pipeline = DecodePipeline(
        layers=8, groups=2, main_s=2e-3, worker_s=1e-4, load_s=9e-3, spare_slots=1, head_s=1e-3, shadow_s=1e-3
    )
    found = pipelined_s(shadowed(9e-3, recall=1, agreement=1), Choice(group_size=4), keeps=False)
    assert found == SECONDS(predicted_tpot_s(replace(pipeline, steps_ahead=2)))
    late = pipelined_s(shadowed(9e-3, recall=1, run_ahead=False), Choice(group_size=4), keeps=False)
    assert late == SECONDS(predicted_tpot_s(replace(pipeline, steps_ahead=0)))


def test_wrong_guesses_cost_lead() -> None:
    times = [pipelined_s(shadowed(4e-3, agreement=a), Choice(group_size=4), keeps=False) for a in (1.0, 0.9, 0.0)]
    assert times == sorted(times) and times[0] < times[2]


def test_without_a_shadow_loads_begin_when_the_router_has_spoken() -> None:
    foretold = shadowed(4e-3)
    blind = replace(foretold, cluster=replace(foretold.cluster, shadow_name=None))
    assert tpot_s("on_demand_shadow", blind, Choice(group_size=4)) == SECONDS(8 * (2e-3 + 4e-3 + 1e-4) + 1e-3)


def test_joint_with_spare_slots_loads_less_and_without_them_the_same() -> None:
    few = shadowed(9e-3)
    assert few.cluster.alpha == 0.25
    times = {"main_layer_s": 2e-3, "head_s": 1e-3, "expert_s": 1e-4, "load_s": 9e-3}
    many = replace(few, cluster=few.cluster.with_workers(slot_bytes=16 * EXPERT_BYTES))
    assert times["load_s"] == few.load_s()
    plain, joint = (pipelined_s(many, Choice(group_size=4), keeps=keeps) for keeps in (False, True))
    assert joint < plain
    costless = replace(few, scales=(("software", 0.0),))  # deciding apart
    plain, joint = (pipelined_s(costless, Choice(group_size=4), keeps=keeps) for keeps in (False, True))
    assert joint == SECONDS(plain)


def test_drafts_share_a_pass_among_the_tokens_it_yields() -> None:
    assert drafted_tokens(0, 0.9) == 1.0
    assert drafted_tokens(3, 1.0) == 4.0
    assert drafted_tokens(2, 0.5) == 1.75


def test_drafts_are_taken_where_they_help_and_guesses_are_good() -> None:
    good, bad = (shadowed(4e-3, agreement=agreement) for agreement in (1.0, 0.0))
    assert best_choice("on_demand_shadow", bad, drafts=True).drafts == 0
    choice = best_choice("on_demand_shadow", good, drafts=True)
    plain = best_choice("on_demand_shadow", good)
    assert tpot_s("on_demand_shadow", good, choice) <= tpot_s("on_demand_shadow", good, plain)
    assert best_choice("on_demand_shadow", shadowed(4e-3, drafts=0), drafts=True).drafts == 0


def test_a_fast_shadow_and_cheap_loads_make_drafts_pay() -> None:
    quick = replace(shadowed(1e-4, agreement=1.0), scales=(("shadow", 0.05),))
    choice = best_choice("on_demand_shadow", quick, drafts=True)
    assert choice.drafts > 0
    assert tpot_s("on_demand_shadow", quick, choice) < 0.7 * resident_s(quick)


def test_drafts_that_do_not_fit_the_slots_are_loaded_late() -> None:
    many = shadowed(4e-3, agreement=1.0)
    few = replace(many, cluster=many.cluster.with_workers(slot_bytes=EXPERT_BYTES))
    deep = Choice(group_size=4, drafts=8)
    assert pipelined_s(few, deep, keeps=False) > 1.1 * pipelined_s(many, deep, keeps=False)


# --- properties -----------------------------------------------------------------------------------------


@st.composite
def planned(draw: st.DrawFn) -> Costs:
    top_k = draw(st.integers(1, 4))
    sizes = (LayerSize(experts=draw(st.integers(top_k, 16)), expert_bytes=EXPERT_BYTES, top_k=top_k),)
    facts = embedded(sizes=sizes * draw(st.integers(1, 5)))
    worker = device(
        count=draw(st.integers(1, 5)),
        slot_memory=draw(st.integers(1, 80)) * EXPERT_BYTES,
        host_memory="1GB",
        link={"bytes_per_s": draw(st.integers(10**6, 10**10)), "latency_s": draw(st.floats(0, 1e-2))},
        compute={"flops": draw(st.floats(1e8, 1e13)), "bytes_per_s": draw(st.integers(10**8, 10**12))},
        overhead_s=draw(st.floats(0, 1e-2)),
        times={"host_expert_s": draw(st.none() | st.floats(1e-5, 1e-1))},
    )
    trunk = {**worker, "name": "trunk", "count": 1, "serves_experts": False, "slot_memory": None}
    names = {"trunk": "trunk"} | draw(st.sampled_from([{}, {"shadow": "shadow"}, {"shadow": "trunk"}]))
    return costs(
        trunk,
        {**trunk, "name": "shadow"},
        worker,
        facts=facts,
        network={"bytes_per_s": draw(st.integers(10**6, 10**10)), "latency_s": draw(st.floats(0, 1e-3))},
        alpha=draw(st.sampled_from([0.0, 0.25, 0.5])),
        predictor={"agreement": draw(SHARES), "recall": draw(SHARES), "bits": draw(st.sampled_from([16, 8, 4, 2]))},
        **names,
    )


@settings(max_examples=40, deadline=None)
@given(planned(), st.sampled_from(POLICIES), st.integers(0, 3))
def test_nothing_beats_the_roofline(drawn: Costs, policy: str, drafts: int) -> None:
    choice = best_choice(policy, drawn)
    if choice.group_size and drawn.shadow_s() is not None and drawn.cluster.predictor.run_ahead:
        choice = replace(choice, drafts=drafts)
    assert floor_s(policy, drawn, choice) <= tpot_s(policy, drawn, choice) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(planned(), st.sampled_from(POLICIES), st.sampled_from(sorted(PARTS)))
def test_nothing_faster_makes_a_token_slower(drawn: Costs, policy: str, part: str) -> None:
    choice = best_choice(policy, drawn)
    assert tpot_s(policy, scaled(drawn, part), choice) <= tpot_s(policy, drawn, choice) * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(planned(), st.sampled_from(POLICIES), st.integers(1, 200))
def test_a_longer_prompt_takes_longer(drawn: Costs, policy: str, tokens: int) -> None:
    choice = best_choice(policy, drawn)
    shorter, longer = (ttft_s(policy, drawn, choice, count) for count in (tokens, 2 * tokens))
    assert 0 < shorter <= longer * 1.05  # a mini-batch more overlaps a little better


@settings(max_examples=10, deadline=None)
@given(planned())
def test_changes_are_worth_it_and_a_plan_is_json(drawn: Costs) -> None:
    plan = make_plan(drawn.facts, drawn.cluster, prompt_tokens=8)
    json.dumps(as_dict(plan), allow_nan=False)
    if plan.best is not None and plan.best.tpot_s is not None:
        gains = [change.gain for change in plan.changes]
        assert gains == sorted(gains, reverse=True) and all(gain > 0 for gain in gains)
        assert all(change.tpot_s < plan.best.tpot_s for change in plan.changes)


# --- what was measured or published ---------------------------------------------------------------------


def paper() -> Cluster:
    return cluster_of(DevicesFile.load(OD_MOE))


def test_ten_nodes_with_mixtral_are_as_fast_as_published() -> None:
    plan = make_plan(mixtral(), paper(), prompt_tokens=16)
    assert not plan.problems
    cacheless = next(one for one in plan.policies if one.policy == "on_demand_shadow")
    assert cacheless.tpot_s is not None and cacheless.ttft_s is not None
    assert 1 / cacheless.tpot_s == pytest.approx(3.69, rel=0.2)  # OD-MoE, table of decode speeds
    assert cacheless.ttft_s == pytest.approx(1.34, rel=0.35)
    assert cacheless.bottleneck == "link"
    assert plan.policies[0].policy == "all_resident" and plan.policies[0].tpot_s is None


def test_importance_saves_about_what_was_measured() -> None:
    """docs/benchmarks.md, batch 1: 51% less than LRU (44 to 56); without host and prefetch 13% by substitution."""
    times = {"main_layer_s": 1.5e-3, "head_s": 0.0, "expert_s": 1.75e-4, "load_s": 4.2e-3}
    with_host = costs(device(times=times | {"host_expert_s": 1.4e-3}, overhead_s=1.4e-3))
    without = costs(device(times=times, overhead_s=1.4e-3))
    lru_s = cached_s(with_host, "on_demand")
    assert resident_s(with_host) / lru_s == pytest.approx(0.25, abs=0.03)  # "if nothing ever waited": 75% less
    assert 1 - cached_s(with_host, "importance") / lru_s == pytest.approx(0.51, abs=0.08)
    assert 1 - cached_s(without, "importance") / lru_s == pytest.approx(0.24, abs=0.08)


# --- room -----------------------------------------------------------------------------------------------


def test_a_model_that_fits_has_no_problems() -> None:
    assert problems(embedded(), cluster(device())) == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": "10MB", "slot_memory": None}, ["trunk", "30,777,216", "bytes", "context_tokens"]),
        ({"slot_memory": EXPERT_BYTES - 1}, ["slots", "196,608", "slot_memory"]),
        ({"host_memory": "10MB"}, ["50,331,648", "10,000,000", "add devices"]),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(changes: dict, words: list[str]) -> None:
    (problem,) = problems(embedded(), cluster(device(**changes)))
    assert all(word in problem for word in words), problem


def test_devices_lacking_are_counted() -> None:
    small = cluster(device(host_memory="10MB"))
    lacking = devices_lacking(embedded(), small)
    assert lacking == 5  # 50.3 MB in shares of 10 MB
    assert not problems(embedded(), with_more(small, 5)) and problems(embedded(), with_more(small, 4))
    assert devices_lacking(embedded(), cluster(device(memory="10MB", slot_memory=None))) is None


def test_slots_hold_their_share() -> None:
    assert resident_share(embedded(), cluster(device())) == pytest.approx(0.25)
    assert not holds_everything(embedded(), cluster(device()))
    whole = cluster(device(slot_memory=256 * EXPERT_BYTES))
    assert resident_share(embedded(), whole) == 1.0 and holds_everything(embedded(), whole)


def test_a_unified_device_holds_its_shard() -> None:
    unified = {"name": "board", "unified": True, "memory": "1GB", "compute": {"flops": 1e11, "bytes_per_s": "10GB"}}
    both = cluster(device("main", serves_experts=False, slot_memory=None), unified, trunk="main")
    assert resident_share(embedded(), both) == 1.0 and holds_everything(embedded(), both)
    plan = make_plan(embedded(), both)
    by_name = {one.policy: one.tpot_s for one in plan.policies}
    assert by_name["all_resident"] == SECONDS(by_name["on_demand"])


def test_slots_take_what_trunk_and_shadow_leave() -> None:
    (room,) = rooms(embedded(), cluster(device(slot_memory=None), context_tokens=1000))
    assert room.fixed_bytes == 14_000_000 + 8_192_000
    assert room.slot_bytes == 900_000_000 - room.fixed_bytes


@pytest.mark.parametrize("group_size", [None, 2])
def test_every_expert_has_an_owner(group_size: int | None) -> None:
    owners = ownership(embedded(), cluster(device("main", serves_experts=False), device(count=4)), group_size)
    assert owners is not None
    assert len(set().union(*map(set, owners.values()))) == 256


def test_a_thousand_devices_are_planned() -> None:
    many = cluster(device("main", serves_experts=False), device(count=1000))
    plan = make_plan(embedded(), many)
    assert plan.owned is None and plan.best is not None
