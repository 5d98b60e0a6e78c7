"""Forecasts become load orders: each worker hears of its own experts alone, in the order of need."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.forecast import LayerForecast
from raymoe.engine.conductor import Conductor
from raymoe.experts.call import LoadOrder
from raymoe.placement.assignment import Fleet, in_order_of_need
from raymoe.types import DeviceName, StepId

LAYERS, EXPERTS = 4, 8
NAMES = [DeviceName(name) for name in ("a", "b", "c", "d")]
STEP = StepId(sequence=3, position=17)


def fleet(workers: int = 4, group_size: int = 2, slots: tuple[int, ...] | None = None) -> Fleet:
    """All workers own everything."""
    owners = tuple(np.ones((workers, EXPERTS), dtype=bool) for _ in range(LAYERS))
    return Fleet(workers=workers, group_size=group_size, owners_LWE=owners, slots_W=slots)


def forecast(experts: Any, layer: int = 0, epoch: int = 2) -> LayerForecast:
    experts_TK = np.array(experts, dtype=np.int64)
    scores_TE = np.zeros((len(experts_TK), EXPERTS), dtype=np.float32)
    return LayerForecast(step=STEP, epoch=epoch, layer=layer, experts_TK=experts_TK, scores_TE=scores_TE)


def conductor(of: Fleet) -> tuple[Conductor, list[tuple[DeviceName, LoadOrder]]]:
    sent: list[tuple[DeviceName, LoadOrder]] = []
    return Conductor(of, NAMES[: of.workers], lambda device, order: sent.append((device, order))), sent


def test_an_expert_goes_to_each_worker_of_the_layers_group() -> None:
    conducting, sent = conductor(fleet())
    conducting.conduct(forecast([[5, 3]], layer=1))
    assert {name: order.experts.tolist() for name, order in sent} == {"b": [5], "d": [3]}
    sent.clear()
    conducting.conduct(forecast([[5, 3]], layer=2))
    assert {name: order.experts.tolist() for name, order in sent} == {"a": [5], "c": [3]}


def test_an_order_says_what_it_is_for() -> None:
    conducting, sent = conductor(fleet())
    conducting.conduct(forecast([[5]], layer=3, epoch=6))
    [(_, order)] = sent
    assert (order.step, order.epoch, order.layer, order.experts.dtype) == (STEP, 6, 3, np.int32)


def test_several_forecasts_for_a_layer_of_one_pass_add_up() -> None:
    conducting, sent = conductor(fleet(workers=2, group_size=2))
    first = conducting.conduct(forecast([[5, 3]]))
    sent.clear()
    second = conducting.conduct(forecast([[3, 7, 5, 1]]))
    where = dict(zip(first.experts_N.tolist(), first.workers_N.tolist(), strict=True))
    found = dict(zip(second.experts_N.tolist(), second.workers_N.tolist(), strict=True))
    assert {expert: found[expert] for expert in where} == where, "what was ordered stays where it is"
    assert sorted(expert for _, order in sent for expert in order.experts.tolist()) == [1, 7], "each is ordered once"
    assert sorted(found.values()) == [0, 0, 1, 1]


@pytest.mark.parametrize("other", [{"epoch": 3}, {"layer": 2}])
def test_other_layers_and_epochs_are_ordered_anew(other: dict[str, int]) -> None:
    conducting, sent = conductor(fleet())
    conducting.conduct(forecast([[5, 3]]))
    sent.clear()
    conducting.conduct(forecast([[5, 3]], **other))
    assert sorted(expert for _, order in sent for expert in order.experts.tolist()) == [3, 5]


def test_the_plan_says_who_was_told_what() -> None:
    conducting, sent = conductor(fleet())
    plan = conducting.conduct(forecast([[5, 3, 7]], layer=1, epoch=6))
    assert (plan.step, plan.epoch, plan.layer) == (STEP, 6, 1)
    assert plan.experts_N.tolist() == [5, 3, 7]
    assert (plan.experts_N.dtype, plan.workers_N.dtype) == (np.int32, np.int32)
    told = {(name, expert) for name, order in sent for expert in order.experts.tolist()}
    planned = zip(plan.workers_N.tolist(), plan.experts_N.tolist(), strict=True)
    assert told == {(NAMES[worker], expert) for worker, expert in planned}


def test_a_worker_with_several_experts_hears_of_those_needed_most_first() -> None:
    conducting, sent = conductor(fleet(workers=2, group_size=1))
    conducting.conduct(forecast([[6, 1, 4]], layer=1))
    assert [(name, order.experts.tolist()) for name, order in sent] == [("b", [6, 1, 4])]


def test_a_forecast_of_nothing_orders_nothing() -> None:
    conducting, sent = conductor(fleet())
    plan = conducting.conduct(forecast(np.empty((1, 0))))
    assert sent == [] and len(plan.experts_N) == len(plan.workers_N) == 0


@pytest.mark.parametrize(
    ("experts", "order"),
    [
        ([[4, 2, 7]], [4, 2, 7]),
        ([[4, 2], [1, 0]], [4, 1, 2, 0]),
        ([[4, 2], [2, 4]], [4, 2]),
        ([[3, 3, 3]], [3]),
        (np.empty((0, 2)), []),
    ],
)
def test_first_come_those_that_tokens_rank_first_each_once(experts: Any, order: list[int]) -> None:
    found_N = in_order_of_need(np.array(experts))
    assert found_N.tolist() == order and found_N.dtype == np.int32


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, LAYERS - 1),
    st.integers(1, 5).flatmap(
        lambda k: st.lists(st.permutations(range(EXPERTS)).map(lambda order: order[:k]), min_size=1, max_size=4)
    ),
)
def test_each_expert_is_ordered_once_of_a_worker_of_the_group(
    workers: int, group_size: int, layer: int, experts: list[list[int]]
) -> None:
    of = fleet(workers, group_size)
    conducting, sent = conductor(of)
    plan = conducting.conduct(forecast(experts, layer))
    ordered = [expert for _, order in sent for expert in order.experts.tolist()]
    assert sorted(ordered) == sorted(set(np.array(experts).reshape(-1).tolist()))
    assert len({name for name, _ in sent}) == len(sent), "one order per worker"
    assert {name for name, _ in sent} <= {NAMES[worker] for worker in of.group_of(layer)}
    place = {expert: index for index, expert in enumerate(plan.experts_N.tolist())}
    for _, order in sent:
        assert [place[e] for e in order.experts.tolist()] == sorted(place[e] for e in order.experts.tolist())
