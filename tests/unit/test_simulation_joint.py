"""Policy joint in simulated clusters: what it shares with its parents, and what keeping and substituting save."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from raymoe.errors import ConfigError
from raymoe.simulation.result import SimResult
from raymoe.simulation.run import simulate
from raymoe.simulation.setting import NetworkTimes, Setting
from raymoe.simulation.shadow import Routes
from raymoe.simulation.synthetic import Habits, synthetic
from raymoe.simulation.trace import RoutingTrace
from tests.simulated import setting, shape, trace_of, walking

OF = shape(layers=8, experts=32, top_k=4)
PERFECT = Habits(recall=1.0, agreement=1.0)


def cluster(load_s: float = 35.0, slots: int = 2) -> Setting:
    """Eight workers in two groups of four."""
    return setting(OF, 8, main_s=12.0, worker_s=6.0, load_s=load_s, slots=slots, shadow_s=9.0, group_size=4)


def facts(found: SimResult) -> tuple[object, ...]:
    """What two runs have in common that load the same at the same time."""
    return found.tpot_s, found.hit_rate, found.planned, found.loads_per_token, found.parts, found.devices


# --- beside its parents ---------------------------------------------------------------------------------


@pytest.mark.parametrize("load_s", [10.0, 35.0, 60.0])
@pytest.mark.parametrize("recall", [0.9, 1.0])
def test_exact_and_without_a_slot_to_spare_it_loads_what_on_demand_shadow_loads(load_s: float, recall: float) -> None:
    """Four layers pass through each worker's two slots: nothing of a layer is left when it comes again."""
    routing = synthetic(OF, 64, Habits(recall=recall, agreement=1.0))
    parent, joint = (simulate(routing, cluster(load_s), policy) for policy in ("on_demand_shadow", "joint"))
    exact = simulate(routing, cluster(load_s), "joint", alpha=0.0)
    assert facts(exact) == facts(parent)
    assert joint.loads_per_token <= parent.loads_per_token


def test_without_a_slot_to_spare_wrong_guesses_never_cost_more_loads() -> None:
    """Its orders of a new epoch reach every worker that has void ones, so that these are not loaded any more."""
    routing = synthetic(OF, 64, Habits(recall=0.95, agreement=0.7))
    parent = simulate(routing, cluster(), "on_demand_shadow")
    exact = simulate(routing, cluster(), "joint", alpha=0.0)
    assert exact.loads_per_token <= parent.loads_per_token
    assert exact.tpot_s <= 1.01 * parent.tpot_s


def test_forecasts_take_a_hop_more_by_way_of_the_main_node() -> None:
    of = shape()
    network = NetworkTimes(latency_s=1.0)
    times = {"main_s": 5.0, "worker_s": 0.5, "load_s": 8.0, "slots": 1, "shadow_s": 1.0, "run_ahead": 0}
    routing = synthetic(of, 16, PERFECT)
    of_s = {
        policy: simulate(routing, setting(of, 8, network=network, **times), policy, alpha=0.0).tpot_s
        for policy in ("on_demand_shadow", "joint")
    }
    assert of_s["joint"] == pytest.approx(of_s["on_demand_shadow"] + 1.0)


def test_without_a_shadow_it_loads_after_routing_what_slots_have_not_kept() -> None:
    routing = synthetic(OF, 64)
    blind = replace(cluster(slots=6), shadow=None)
    parent = simulate(routing, blind, "on_demand_shadow")
    kept = simulate(routing, blind, "joint", alpha=0.0)
    assert parent.hit_rate == 0.0 < kept.hit_rate
    assert kept.planned is None and kept.loads_per_token < parent.loads_per_token


def test_what_slots_hold_makes_no_worker_of_a_group_compute_more_than_others() -> None:
    """Layers of two experts for each of two workers: what is kept at one of them must not make it the busier one."""
    routing = synthetic(OF, 96, PERFECT)
    of = setting(OF, 4, main_s=12.0, worker_s=6.0, load_s=17.0, slots=3, shadow_s=9.0, group_size=2)
    parent, joint = (
        simulate(routing, of, policy, alpha=0.0, spare_slots=5) for policy in ("on_demand_shadow", "joint")
    )
    assert joint.tpot_s == pytest.approx(parent.tpot_s, rel=0.01)
    assert joint.loads_per_token < 0.8 * parent.loads_per_token


# --- keeping --------------------------------------------------------------------------------------------


def test_more_spare_slots_never_load_more_where_all_is_foretold() -> None:
    """Of this trace; no law: what stays by worth is not always what stays in fewer slots and a little more besides."""
    routing = synthetic(OF, 96, PERFECT)
    loads = [
        simulate(routing, cluster(), "joint", alpha=0.0, spare_slots=spare).loads_per_token
        for spare in (0, 1, 2, 4, 8, 16, 64)
    ]
    assert all(more <= 1.01 * fewer for fewer, more in pairwise(loads))
    assert loads[0] == pytest.approx(32.0, rel=0.02) and loads[-1] < 8.0


def test_what_is_chosen_again_and_again_stays() -> None:
    of = shape(layers=4, experts=8, top_k=2)
    routing = trace_of([[[0, 1]] * 4], of, scores_NLE=np.full((1, 4, 8), 0.125, dtype=np.float16))
    few = setting(of, 2, main_s=5.0, worker_s=0.5, load_s=4.0, slots=2, shadow_s=1.0)
    assert simulate(routing, few, "joint").loads_per_token > 0
    assert simulate(routing, few, "joint", spare_slots=2).loads_per_token == 0


def test_spare_slots_are_those_beyond_what_passes_through() -> None:
    """Groups of four for four experts: one load and one meanwhile; groups of two: two loads."""
    assert {worker.slots for worker in cluster().with_spare_slots(3).workers} == {5}
    assert {worker.slots for worker in replace(cluster(), group_size=2).with_spare_slots(0).workers} == {3}
    assert simulate(synthetic(OF, 8), cluster(), "joint", spare_slots=0) == simulate(
        synthetic(OF, 8), cluster(), "joint"
    )


def test_workers_without_slots_have_everything() -> None:
    of = shape(layers=2)
    resident = setting(of, 4, main_s=5.0, worker_s=0.5, load_s=4.0, slots=None, shadow_s=1.0)
    found = simulate(synthetic(of, 8), resident, "joint", spare_slots=2)
    assert (found.hit_rate, found.loads_per_token) == (1.0, 0.0)


# --- substituting ---------------------------------------------------------------------------------------


def test_alpha_moves_fewer_bytes() -> None:
    routing = synthetic(OF, 96, PERFECT)
    exact, careful, bold = (
        simulate(routing, cluster(), "joint", alpha=alpha, spare_slots=6) for alpha in (0.0, 0.25, 0.75)
    )
    assert exact.substituted == 0 < careful.substituted < bold.substituted
    assert bold.bytes_per_token < careful.bytes_per_token < exact.bytes_per_token


def test_a_replaced_expert_is_not_even_ordered() -> None:
    """Experts 0 and 1 by turns with 0 and 2, which score alike: with alpha one of them is kept for both."""
    of = shape(layers=1, experts=4, top_k=2)
    scores_NLE = np.array([[[0.4, 0.21, 0.2, 0.0]], [[0.4, 0.2, 0.21, 0.0]]], dtype=np.float16)
    routing = trace_of([[[0, 1]], [[0, 2]]], of, scores_NLE=scores_NLE)
    few = setting(of, 1, main_s=5.0, worker_s=0.5, load_s=4.0, slots=4, shadow_s=1.0, group_size=1)
    found = simulate(routing, few, "joint", alpha=0.5, steps=16)
    assert found.loads_per_token == 0.0
    assert found.substituted == 0.25


# --- forecasts ------------------------------------------------------------------------------------------


def test_a_wrongly_named_expert_has_the_score_of_the_one_it_stands_for() -> None:
    of = shape(layers=1, experts=4, top_k=2)
    routing = trace_of(
        [[[0, 1]]],
        of,
        scores_NLE=np.array([[[0.5, 0.25, 0.125, 0.0]]], dtype=np.float16),
        foretold_NLK=np.array([[[0, 3]]], dtype=np.int32),
        guessed_N=np.ones(1, dtype=bool),
    )
    assert Routes(routing).foretold_scores(0, 0, lost=False).tolist() == [0.5, 0.0, 0.125, 0.25]


def test_what_nobody_named_is_loaded_on_demand() -> None:
    routing = synthetic(OF, 16, PERFECT)
    silent = replace(routing, foretold_NLK=np.full_like(routing.chosen_NLK, -1))
    found = simulate(silent, cluster(), "joint")
    assert found.planned == 0.0
    assert found.hit_rate < 0.2, "only what slots happen to hold still"
    assert found.loads_per_token == pytest.approx((1 - found.hit_rate) * 32, rel=0.1)


def test_a_trace_without_scores_says_so() -> None:
    with pytest.raises(ConfigError, match="policy joint needs gate scores, and the trace has none"):
        simulate(walking(OF, 4), cluster(), "joint")


@pytest.mark.parametrize("spare", [-1, 1 << 21])
def test_spare_slots_have_limits(spare: int) -> None:
    routing: RoutingTrace = synthetic(OF, 4)
    with pytest.raises(ConfigError, match=f"--spare-slots is {spare}; allowed is 0 to"):
        simulate(routing, cluster(), "joint", spare_slots=spare)
