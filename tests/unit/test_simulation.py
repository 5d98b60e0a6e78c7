"""Simulated clusters: closed forms and the timing model, small numbers by hand, what must hold for any routing."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raymoe.config import SchedulingConfig
from raymoe.errors import ConfigError, LoadCancelledError
from raymoe.experts.loader import ON_DEMAND, PREFETCH
from raymoe.placement.pipelining import DecodePipeline, predicted_tpot_s
from raymoe.simulation.link import SimLink, SimTicket
from raymoe.simulation.loop import EventLoop, Lane
from raymoe.simulation.run import FORETOLD, POLICIES, simulate, with_agreement, with_forecasts
from raymoe.simulation.setting import NetworkTimes, ShadowTimes
from raymoe.simulation.synthetic import Habits, synthetic
from tests.simulated import EXPERT_BYTES, setting, shape, trace_of, walking

TPOT = pytest.approx


# --- time -----------------------------------------------------------------------------------------------


def test_events_come_by_time_and_at_one_moment_as_planned() -> None:
    loop, seen = EventLoop(), []
    for time_s, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        loop.at(time_s, seen.append, name)
    assert not loop.run(lambda: False)
    assert (seen, loop.now_s, loop.events) == (["a", "b", "c"], 2.0, 3)


def test_what_is_planned_for_the_past_happens_now() -> None:
    loop, seen = EventLoop(), []
    loop.at(5.0, lambda: loop.at(1.0, lambda: seen.append(loop.now_s)))
    loop.run(lambda: False)
    assert seen == [5.0]


def test_a_lane_serves_one_after_the_other() -> None:
    lane = Lane()
    assert [lane.take(0.0, 2.0), lane.take(1.0, 3.0), lane.take(9.0, 1.0)] == [2.0, 5.0, 10.0]
    assert lane.busy_s == 6.0


# --- a link ---------------------------------------------------------------------------------------------


def ends(loop: EventLoop, tickets: list[SimTicket]) -> list[float]:
    loop.run(lambda: all(ticket.done for ticket in tickets))
    return [ticket.ended_s for ticket in tickets]


def start(link: SimLink, priority: int) -> SimTicket:
    return link.start(None, None, EXPERT_BYTES, priority)


def test_loads_follow_each_other() -> None:
    link = SimLink(EventLoop(), load_s=4.0)
    assert ends(link.loop, [start(link, PREFETCH) for _ in range(3)]) == [4.0, 8.0, 12.0]
    assert (link.busy_s, link.loads) == (12.0, 3)


def test_an_urgent_load_overtakes_between_two_pieces() -> None:
    loop = EventLoop()
    link = SimLink(loop, load_s=4.0, pieces=2)
    tickets = [start(link, PREFETCH), start(link, PREFETCH)]
    loop.at(1.0, lambda: tickets.append(start(link, ON_DEMAND)))
    loop.run(lambda: len(tickets) == 3)
    assert ends(loop, tickets) == [8.0, 12.0, 6.0]


def test_a_load_in_its_last_piece_is_finished() -> None:
    loop = EventLoop()
    link = SimLink(loop, load_s=4.0, pieces=2)
    tickets = [start(link, PREFETCH)]
    loop.at(3.0, lambda: tickets.append(start(link, ON_DEMAND)))
    loop.run(lambda: len(tickets) == 2)
    assert ends(loop, tickets) == [4.0, 8.0]


def test_a_load_that_must_hurry_overtakes_those_before_it() -> None:
    link = SimLink(EventLoop(), load_s=4.0, pieces=4)
    tickets = [start(link, PREFETCH) for _ in range(3)]
    link.loop.at(0.5, tickets[2].hurry)
    assert ends(link.loop, tickets) == [8.0, 12.0, 5.0]


def test_a_cancelled_load_ends_at_its_next_piece_and_one_that_waits_before_all_others() -> None:
    link = SimLink(EventLoop(), load_s=4.0, pieces=2)
    tickets = [start(link, PREFETCH) for _ in range(3)]
    for ticket in tickets[:2]:
        link.loop.at(1.0, ticket.cancel)
    assert ends(link.loop, tickets) == [2.0, 2.0, 6.0]
    assert [isinstance(ticket.error, LoadCancelledError) for ticket in tickets] == [True, True, False]
    assert link.loads == 1


# --- against the timing model ---------------------------------------------------------------------------


@pytest.mark.parametrize("load_s", [1.0, 21.5, 22.5, 41.5])
def test_the_papers_pipeline(load_s: float) -> None:
    """8 workers in 4 groups of 2, 8 layers, slots for one expert each: flat up to 21.5, linear after it."""
    of = shape(layers=8, top_k=2)
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=load_s, slots=1, shadow_s=0.0)
    found = simulate(walking(of, 8), cluster, "on_demand_shadow", steps=32)
    assert found.tpot_s == TPOT(44.0 + 2 * max(0.0, load_s - 21.5))


def test_without_forecasts_every_load_is_waited_for() -> None:
    """Of three loads of 4 s the first is waited for as a whole, the others while the one before is computed."""
    of = shape(layers=4, top_k=3)
    cluster = setting(of, 1, main_s=5.0, worker_s=0.5, load_s=4.0, slots=3, group_size=1)
    found = simulate(walking(of, 8), cluster, "on_demand_shadow", steps=16)
    assert found.tpot_s == TPOT(4 * (5.0 + 0.5 + 3 * 4.0))
    assert found.hit_rate == 0.0
    assert found.parts == {"main": TPOT(20.0), "loads": TPOT(4 * 11.0), "experts": TPOT(4 * 1.5)}
    assert found.bottleneck.startswith("loads: link of w0")


@settings(max_examples=30)
@given(
    groups=st.integers(1, 4),
    group_size=st.integers(1, 3),
    layers=st.integers(1, 9),
    main_s=st.sampled_from([1.0, 2.0, 5.0]),
    worker_s=st.sampled_from([0.25, 1.0, 3.0]),
    load_s=st.sampled_from([0.5, 3.0, 7.0, 20.0]),
    shadow_s=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    head_s=st.sampled_from([0.0, 2.0]),
    spare=st.integers(0, 2),
)
def test_perfect_forecasts_give_what_the_timing_model_predicts(
    groups: int,
    group_size: int,
    layers: int,
    main_s: float,
    worker_s: float,
    load_s: float,
    shadow_s: float,
    head_s: float,
    spare: int,
) -> None:
    """Two ways to the same number: the real slots under simulated time, and the model's recurrence."""
    assume(layers * shadow_s <= layers * (main_s + worker_s) + head_s)  # a slower one takes over what was read
    of = shape(layers=layers, experts=4 * group_size, top_k=group_size)
    cluster = setting(
        of,
        groups * group_size,
        main_s=main_s,
        worker_s=worker_s,
        load_s=load_s,
        slots=1 + spare,
        head_s=head_s,
        shadow_s=shadow_s,
        group_size=group_size,
    )
    found = simulate(walking(of, 8), cluster, "on_demand_shadow", steps=40)
    pipeline = DecodePipeline(
        layers=layers,
        groups=groups,
        main_s=main_s,
        worker_s=worker_s,
        load_s=load_s,
        spare_slots=spare,
        head_s=head_s,
        shadow_s=shadow_s,
        steps_ahead=2,
    )
    assert found.tpot_s == TPOT(predicted_tpot_s(pipeline), rel=0.03)


def test_a_shadow_slower_than_the_model_takes_over_what_was_read_and_foretells_what_it_can() -> None:
    of = shape()
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=1.0, slots=1, shadow_s=9.0)
    found = simulate(walking(of, 8), cluster, "on_demand_shadow", steps=32)
    assert 44.0 < found.tpot_s <= 8 * (5.0 + 1.0 + 0.5)
    assert found.shadow == TPOT(1.0, rel=0.05)


def test_a_shadow_that_waits_for_the_token_exposes_the_first_layers_load() -> None:
    of = shape()
    late = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=8.0, slots=1, shadow_s=1.0, run_ahead=0)
    found = simulate(walking(of, 8), late, "on_demand_shadow", steps=32)
    assert found.tpot_s == TPOT(44.0 + 4.0)


# --- wrong forecasts ------------------------------------------------------------------------------------


def test_a_wrong_guess_costs_what_a_late_departure_costs() -> None:
    of = shape()
    routing = walking(of, 8)
    wrong = replace(routing, guessed_N=np.zeros(8, dtype=bool))
    ahead = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=8.0, slots=2, shadow_s=1.0)
    late = replace(ahead, shadow=ShadowTimes(layer_s=1.0, run_ahead=0))
    right_s = simulate(routing, ahead, "on_demand_shadow", steps=32).tpot_s
    wrong_s = simulate(wrong, ahead, "on_demand_shadow", steps=32).tpot_s
    late_s = simulate(routing, late, "on_demand_shadow", steps=32).tpot_s
    assert right_s == TPOT(44.0) and right_s < late_s <= wrong_s < late_s + 8.0


def test_what_nobody_foretold_is_loaded_on_demand() -> None:
    of = shape(layers=2, experts=8, top_k=2)
    routing = walking(of, 4)
    blind = replace(routing, foretold_NLK=np.full_like(routing.chosen_NLK, -1), guessed_N=np.ones(4, dtype=bool))
    cluster = setting(of, 2, main_s=5.0, worker_s=0.5, load_s=2.0, slots=1, shadow_s=0.5)
    found = simulate(blind, cluster, "on_demand_shadow", steps=16)
    assert (found.planned, found.hit_rate) == (0.0, 0.0)
    assert found.tpot_s == TPOT(2 * 7.5)


# --- caches ---------------------------------------------------------------------------------------------


def test_everything_resident_takes_main_and_workers_only() -> None:
    of = shape(layers=4)
    cluster = setting(of, 2, main_s=5.0, worker_s=0.0, call_s=0.5, load_s=2.0, slots=1)
    found = simulate(walking(of, 4), cluster, "all_resident", steps=8)
    assert found.tpot_s == TPOT(4 * 5.5)
    assert (found.hit_rate, found.loads_per_token, found.of_roofline) == (1.0, 0.0, TPOT(1.0))


def test_an_expert_that_is_chosen_again_needs_no_load() -> None:
    """One layer, experts 0 and 1 in every step: after the first one LRU hits always."""
    of = shape(layers=1)
    cluster = setting(of, 1, main_s=5.0, worker_s=0.0, call_s=0.5, load_s=2.0, slots=2)
    found = simulate(trace_of([[[0, 1]]], of), cluster, "on_demand", steps=8)
    assert (found.hit_rate, found.tpot_s) == (1.0, TPOT(5.5))


def test_lru_with_too_few_slots_loads_everything_each_time() -> None:
    of = shape(layers=1, experts=4)
    cluster = setting(of, 1, main_s=5.0, worker_s=0.0, call_s=0.5, load_s=2.0, slots=2)
    found = simulate(trace_of([[[0, 1]], [[2, 3]]], of), cluster, "on_demand", steps=8)
    assert (found.hit_rate, found.loads_per_token, found.tpot_s) == (0.0, 2.0, TPOT(5.0 + 4.0))


def test_the_host_takes_over_what_it_is_sooner_done_with() -> None:
    of = shape(layers=1, experts=4)
    cluster = setting(of, 1, main_s=5.0, worker_s=0.0, load_s=8.0, slots=2, host_s=1.0)
    scores = np.full((2, 1, 4), 0.25, dtype=np.float16)
    routing = trace_of([[[0, 1]], [[2, 3]]], of, scores_NLE=scores)
    found = simulate(routing, cluster, "importance", steps=32, alpha=0.0)
    assert found.hosted == 0.5 and found.tpot_s < 5.0 + 2.5


def test_substitution_saves_loads() -> None:
    of = shape(layers=4, experts=16, top_k=4)
    routing = synthetic(of, 64)
    cluster = setting(of, 2, main_s=2.0, worker_s=0.5, load_s=2.0, slots=12)
    exact = simulate(routing, cluster, "importance", alpha=0.0)
    replaced = simulate(routing, cluster, "importance", alpha=0.5)
    assert exact.substituted == 0 < replaced.substituted
    assert replaced.loads_per_token < exact.loads_per_token and replaced.hit_rate > exact.hit_rate


def test_eviction_by_score_hits_more_often_than_lru_on_popular_experts() -> None:
    of = shape(layers=2, experts=32, top_k=4)
    routing = synthetic(of, 256, Habits(popularity=1.0, persistence=0.1))
    cluster = setting(of, 1, main_s=2.0, worker_s=0.5, load_s=2.0, slots=16)
    lru = simulate(routing, cluster, "on_demand")
    score = simulate(
        routing, cluster, "importance", alpha=0.0, scheduling=SchedulingConfig(policy="importance", prefetch="none")
    )
    assert score.hit_rate > lru.hit_rate


# --- the network ----------------------------------------------------------------------------------------


def test_messages_take_their_time_both_ways() -> None:
    """Two workers per layer, 16 bytes at 16 bytes/s from one port: the second leaves a second later."""
    of = shape(layers=1, experts=2, top_k=2)
    network = NetworkTimes(latency_s=0.25, bytes_per_s=16.0)
    cluster = setting(of, 2, main_s=5.0, worker_s=0.5, load_s=0.0, slots=None, network=network, group_size=2)
    found = simulate(trace_of([[[0, 1]]], of), cluster, "on_demand_shadow", steps=4, resident=True)
    # sent by 1 and 2, computed by 1.75 and 2.75, received by 3.0 and 4.0
    assert found.tpot_s == TPOT(5.0 + 4.0)
    assert found.bottleneck == "main node: computing"


# --- drafts ---------------------------------------------------------------------------------------------


def test_right_drafts_share_a_pass() -> None:
    of = shape()
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=0.1, slots=4, shadow_s=0.1)
    found = simulate(walking(of, 8), cluster, "on_demand_shadow", steps=64, drafts=3)
    assert (found.accepted, found.tokens_per_pass) == (1.0, TPOT(4.0, rel=0.1))
    assert found.tpot_s < 44.0 / 3


def test_wrong_drafts_gain_nothing_and_lose_little() -> None:
    of = shape()
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=0.1, slots=4, shadow_s=0.1)
    wrong = replace(walking(of, 8), guessed_N=np.zeros(8, dtype=bool))
    found = simulate(wrong, cluster, "on_demand_shadow", steps=32, drafts=3)
    without = simulate(wrong, cluster, "on_demand_shadow", steps=32)
    assert found.tokens_per_pass == 1.0 and not found.accepted
    assert found.tpot_s < 1.25 * without.tpot_s


@pytest.mark.parametrize("policy", ["on_demand_shadow", "joint"])
def test_none_are_read_where_none_are_guessed_in_time(policy: str) -> None:
    """With none allowed, or none there yet as the shadow waits for the token: passes of one position, as without."""
    of = shape(experts=16)
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=4.0, slots=4, shadow_s=1.0)
    routing = synthetic(of, 32)
    plain = simulate(routing, cluster, policy)  # type: ignore[arg-type]
    assert simulate(routing, cluster, policy, drafts=0) == plain  # type: ignore[arg-type]
    late = replace(cluster, shadow=ShadowTimes(layer_s=20.0, run_ahead=0))
    assert simulate(routing, late, policy, drafts=2).tokens_per_pass == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["on_demand_shadow", "joint"])
def test_a_pass_loads_what_its_positions_share_once(policy: str) -> None:
    """Every position needs the same two experts: as many loads per pass as otherwise per token."""
    of = shape(layers=4, experts=8, top_k=2)
    scores_NLE = np.full((1, 4, 8), 0.125, dtype=np.float16)
    routing = trace_of([[[0, 1]] * 4], of, scores_NLE=scores_NLE)
    cluster = setting(of, 2, main_s=5.0, worker_s=0.5, load_s=1.0, slots=2, shadow_s=0.1)
    found = simulate(routing, cluster, policy, steps=32, drafts=3, alpha=0.0)  # type: ignore[arg-type]
    assert found.tokens_per_pass == 4.0
    assert found.loads_per_token == TPOT(2.0)


def test_further_positions_cost_main_node_and_workers_their_rows() -> None:
    """Four rows per pass: 3 s for each further one at the main node, 1 s at each of the two workers, in each layer."""
    of = shape(layers=2, experts=8, top_k=2)
    cluster = setting(of, 2, main_s=5.0, worker_s=2.0, load_s=0.1, slots=2, shadow_s=0.1)
    costly = replace(
        cluster,
        main=replace(cluster.main, row_s=3.0),
        workers=tuple(replace(worker, row_s=1.0) for worker in cluster.workers),
    )
    routing = trace_of([[[0, 1]] * 2], of)
    cheap_s, costly_s = (
        simulate(routing, of_, "on_demand_shadow", steps=32, drafts=3).tpot_s for of_ in (cluster, costly)
    )
    assert (cheap_s, costly_s) == (TPOT(2 * 7.0 / 4), TPOT(2 * (7.0 + 3 * 3.0 + 3 * 1.0) / 4))


def test_fewer_right_drafts_make_fewer_tokens_per_pass() -> None:
    of = shape()
    cluster = setting(of, 8, main_s=5.0, worker_s=0.5, load_s=0.1, slots=4, shadow_s=0.1)
    routing = synthetic(of, 128)
    gained = [
        simulate(with_agreement(routing, rate), cluster, "on_demand_shadow", drafts=3).tokens_per_pass
        for rate in (0.0, 0.5, 0.9, 1.0)
    ]
    assert gained == sorted(gained) and gained[0] == 1.0 and gained[-1] == TPOT(4.0, rel=0.1)
    with pytest.raises(ConfigError, match=r"--acceptance is 1\.5; allowed is 0 to 1"):
        with_agreement(routing, 1.5)


# --- what must hold -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    policy=st.sampled_from(POLICIES),
    workers=st.integers(1, 5),
    slots=st.integers(1, 6),
    load_s=st.sampled_from([0.1, 1.0, 5.0]),
    recall=st.sampled_from([0.0, 0.8, 1.0]),
    agreement=st.sampled_from([0.0, 0.7, 1.0]),
    drafts=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_any_cluster_decodes_to_its_end_the_same_each_time(
    policy: str, workers: int, slots: int, load_s: float, recall: float, agreement: float, drafts: int, seed: int
) -> None:
    of = shape(layers=3, experts=8, top_k=2)
    routing = synthetic(of, 12, Habits(recall=recall, agreement=agreement, seed=seed))
    cluster = setting(of, workers, main_s=1.0, worker_s=0.2, load_s=load_s, slots=slots, shadow_s=0.7)
    drafts = drafts if policy in FORETOLD else 0
    found, again = (simulate(routing, cluster, policy, drafts=drafts) for _ in range(2))  # type: ignore[arg-type]
    assert found == again
    assert found.steps >= 12
    assert found.tpot_s >= found.roofline_s * (1 - 1e-9)
    assert found.tpot_s == TPOT(sum(found.parts.values()))
    shares = [
        found.main,
        found.hit_rate,
        *(share for device in found.devices for share in (device.link, device.compute)),
    ]
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)
    assert math.isfinite(found.ttft_s) and found.ttft_s > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_events_per_step_do_not_grow_with_devices(policy: str) -> None:
    of = shape(layers=6, experts=16, top_k=4)
    routing = synthetic(of, 32)
    counts = []
    for workers in (8, 64):
        cluster = setting(of, workers, main_s=1.0, worker_s=0.2, load_s=1.0, slots=4, shadow_s=0.5)
        counts.append(simulate(routing, cluster, policy).events_per_step)  # type: ignore[arg-type]
    assert counts[1] <= 1.5 * counts[0] + 8


# --- what can't be simulated ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "more", "message"),
    [
        ("best", {}, '--policy is "best"; allowed are'),
        ("on_demand", {"steps": 0}, "--steps is 0"),
        ("on_demand", {"drafts": 2}, "--drafts come from a shadow"),
        ("on_demand_shadow", {"drafts": 9}, "--drafts is 9; allowed is 0 to 8"),
        ("importance", {}, "needs gate scores"),
    ],
)
def test_errors_name_what_is_missing(policy: str, more: dict[str, int], message: str) -> None:
    of = shape()
    cluster = setting(of, 2, main_s=1.0, worker_s=0.1, load_s=1.0, slots=2)
    with pytest.raises(ConfigError, match=message):
        simulate(walking(of, 4), cluster, policy, **more)  # type: ignore[arg-type]


def test_forecasts_are_made_up_where_none_were_recorded() -> None:
    routing = walking(shape(experts=16), 64)
    found = with_forecasts(routing, recall=0.9, agreement=0.5)
    assert found.recall == TPOT(0.9, abs=0.03) and found.agreement == TPOT(0.5, abs=0.2)
    assert with_forecasts(found, 0.1, 0.1) is found
