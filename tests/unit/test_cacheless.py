"""Scheduling without a cache: who is asked with which plan, and what this process's own forecasts order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from predictor.history import HistoryForecast
from raymoe.config import PredictorConfig, SchedulingConfig
from raymoe.engine.cacheless import FARTHEST, MOST_DECODE_TOKENS, CachelessScheduler
from raymoe.engine.conductor import Conductor
from raymoe.engine.dispatch import nothing
from raymoe.engine.foresight import Foresight
from raymoe.experts.call import LoadOrder
from raymoe.model.runner import SequenceState
from raymoe.placement.assignment import Fleet
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, Routing, StepId
from tests.links import FakeLink

LAYERS, EXPERTS, HIDDEN, WORKERS = 4, 8, 2, 2
NAMES = (DeviceName("a"), DeviceName("b"))
STATE = SequenceState(torch.empty(0), {}, 0)


def make_fleet() -> Fleet:
    owners = tuple(np.ones((WORKERS, EXPERTS), dtype=bool) for _ in range(LAYERS))
    return Fleet(workers=WORKERS, group_size=1, owners_LWE=owners)


@dataclass
class FakeDispatcher:
    """Notes what it is asked; outputs are zeros."""

    fleet: Fleet = field(default_factory=make_fleet)
    devices: tuple[DeviceName, ...] = NAMES
    max_rows: int = 16
    on_round_trip: Any = None
    calls: list[tuple[int, StepId | None, Plan | None]] = field(default_factory=list)
    parts: list[tuple[int, int, list[int]]] = field(default_factory=list)
    orders: list[tuple[DeviceName, LoadOrder]] = field(default_factory=list)
    ordered_here: list[Plan] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def compute(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        meanwhile: Callable[[], None] = nothing,
        *,
        step: StepId | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        self.calls.append((layer, step, plan))
        meanwhile()
        return torch.zeros(*experts_TK.shape, hidden_TH.shape[1])

    def compute_parts(
        self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor, parts: Any, step: Any, on_answer: Any
    ) -> torch.Tensor:
        self.parts.append((layer, len(hidden_TH), sorted(pair for _, pairs_P in parts for pair in pairs_P.tolist())))
        return torch.zeros(*experts_TK.shape, hidden_TH.shape[1])

    def order(self, name: DeviceName, order: LoadOrder) -> None:
        self.orders.append((name, order))

    def order_here(self, plan: Plan) -> None:
        self.ordered_here.append(plan)

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)

    def lost(self, layer: int) -> None:
        return None

    def take_cost(self) -> Routing:
        return Routing(hits=1)

    def preview(self, pairs: int) -> torch.Tensor | None:
        return torch.arange(float(pairs * HIDDEN)).view(pairs, HIDDEN)


@dataclass
class FakeForecast:
    """Foretells expert ``there + seen`` for layer ``there``; ``seen`` counts how often it was asked for that layer."""

    farthest: int = LAYERS - 1
    fails: bool = False
    asked: list[tuple[int, int]] = field(default_factory=list)

    def scores(self, layer: int, ahead: int) -> np.ndarray | None:
        if self.fails:
            raise RuntimeError("no such gate")
        if layer + ahead >= LAYERS:
            return None
        self.asked.append((layer, ahead))
        scores_TE = np.zeros((1, EXPERTS), dtype=np.float32)
        scores_TE[0, layer + ahead] = 1.0
        return scores_TE


def scheduler(kind: str = "gate", link: FakeLink | None = None) -> tuple[CachelessScheduler, FakeDispatcher]:
    dispatcher = FakeDispatcher()
    conductor = Conductor(dispatcher.fleet, NAMES, dispatcher.order)
    foresight = Foresight(PredictorConfig.model_validate({"kind": kind}), link)
    return CachelessScheduler(dispatcher, foresight, conductor), dispatcher  # type: ignore[arg-type]


def ask(experts: CachelessScheduler, layer: int, *chosen: list[int]) -> torch.Tensor:
    """One layer of a forward, as the trunk calls it."""
    experts_TK = torch.tensor(chosen)
    experts.route(layer, experts_TK, torch.ones(experts_TK.shape))
    return experts.compute(layer, torch.zeros(len(chosen), HIDDEN), experts_TK)


def plan(position: int, layer: int, experts: list[int]) -> Plan:
    return Plan(
        step=StepId(sequence=1, position=position),
        epoch=0,
        layer=layer,
        experts_N=np.array(experts, np.int32),
        workers_N=np.zeros(len(experts), np.int32),
    )


def routers(rule: Any = None) -> list[Any]:
    return [SimpleNamespace(rule=rule, experts=EXPERTS) for _ in range(LAYERS)]


def test_routing_is_the_routers_own() -> None:
    experts, _ = scheduler()
    chosen_TK, weights_TK = torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]])
    routed = experts.route(0, chosen_TK, weights_TK)
    assert routed[0] is chosen_TK and routed[1] is weights_TK


def test_a_layer_is_asked_for_with_its_plan_and_step() -> None:
    link = FakeLink()
    experts, dispatcher = scheduler("shadow", link)
    experts.begin(1, [10])
    experts.read(1, 20, STATE)
    mine, late = plan(1, 0, [3]), plan(1, 1, [4])
    link.coming = [mine]
    ask(experts, 0, [3, 5])
    ask(experts, 1, [4, 5])
    link.coming = [late]
    ask(experts, 2, [6, 7])
    step = StepId(sequence=1, position=1)
    assert dispatcher.calls == [(0, step, mine), (1, step, None), (2, step, None)]
    assert dispatcher.ordered_here == [mine, late], "workers in this process hear of the shadow's plans"
    experts.end(1)
    assert experts.take_cost().recall == pytest.approx(2 / 6), "the late plan counts too"


def test_a_prompt_is_spread_over_all_workers_and_its_loads_are_ordered_before() -> None:
    experts, dispatcher = scheduler()
    experts.begin(1, list(range(MOST_DECODE_TOKENS + 1)))
    chosen = [[token % EXPERTS, (token + 1) % EXPERTS] for token in range(MOST_DECODE_TOKENS + 1)]
    assert ask(experts, 0, *chosen).shape == (MOST_DECODE_TOKENS + 1, 2, HIDDEN)
    assert dispatcher.calls == [] and dispatcher.parts == [(0, len(chosen), list(range(2 * len(chosen))))]
    assert {name for name, _ in dispatcher.orders} == set(NAMES)
    assert {order.step for _, order in dispatcher.orders} == {StepId(sequence=1, position=0)}
    ordered = [expert for _, order in dispatcher.orders for expert in order.experts.tolist()]
    assert set(ordered) == set(range(EXPERTS))


def test_a_prompt_that_no_message_holds_goes_in_several() -> None:
    experts, dispatcher = scheduler()
    experts.begin(1, list(range(40)))
    assert ask(experts, 0, *[[1]] * 40).shape == (40, 1, HIDDEN)
    assert [tokens for _, tokens, _ in dispatcher.parts] == [16, 16, 8]


def test_what_is_computed_outside_of_sequences_orders_nothing() -> None:
    experts, dispatcher = scheduler()
    experts.attach(routers(), FakeForecast())
    ask(experts, 0, [1])
    ask(experts, 0, *[[1]] * 12)
    assert dispatcher.calls == [(0, None, None)] and dispatcher.orders == []


# --- forecasts of this process --------------------------------------------------------------------------


def test_gates_order_as_far_as_they_see_and_again_only_for_the_next_layer() -> None:
    experts, dispatcher = scheduler()
    forecast = FakeForecast()
    experts.attach(routers(), forecast)
    experts.begin(1, [10])
    ask(experts, 0, [0])
    assert dispatcher.orders == [] and forecast.asked == [], "nothing is foretold in a prompt"
    experts.read(1, 20, STATE)
    for layer in range(LAYERS):
        ask(experts, layer, [layer])
    assert FARTHEST == 3 and forecast.asked == [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1)]
    said = [(name, order.layer, order.epoch, order.experts.tolist()) for name, order in dispatcher.orders]
    assert said == [("b", 1, 0, [1]), ("a", 2, 0, [2]), ("b", 3, 0, [3])], "the same again needs no order"
    plans = [found for _, _, found in dispatcher.calls[1:]]
    assert plans[0] is None and [found.experts_N.tolist() for found in plans[1:] if found] == [[1], [2], [3]]
    experts.end(1)
    assert experts.take_cost().recall == 0.75


def test_a_forecast_that_fails_is_given_up_and_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    experts, dispatcher = scheduler()
    experts.attach(routers(), FakeForecast(fails=True))
    experts.begin(1, [10])
    experts.read(1, 20, STATE)
    ask(experts, 0, [1])
    ask(experts, 1, [1])
    assert len(dispatcher.calls) == 2 and caplog.text.count("forecasts from layer") == 1


def test_forecasts_name_what_the_router_would_choose_of_them() -> None:
    experts, dispatcher = scheduler()
    experts.attach(routers(SimpleNamespace(selection_scores=lambda scores_TE: -scores_TE)), FakeForecast())
    experts.begin(1, [10])
    experts.read(1, 20, STATE)
    ask(experts, 0, [1, 2])
    assert [(order.layer, order.experts.tolist()) for _, order in dispatcher.orders] == [
        (1, [0, 2]), (2, [0, 1]), (3, [0, 1]),
    ]  # fmt: skip


def test_history_orders_all_layers_of_a_step_before_it_begins() -> None:
    experts, dispatcher = scheduler("history")
    experts.attach(routers(), history=HistoryForecast(LAYERS, EXPERTS))
    experts.begin(1, [10, 11])
    for layer in range(LAYERS):
        ask(experts, layer, [layer], [layer + 1])
    assert dispatcher.orders == []
    experts.read(1, 11, STATE)
    assert [(order.layer, order.experts.tolist()) for _, order in dispatcher.orders] == [
        (layer, [layer + 1]) for layer in range(LAYERS)
    ], "what the same token was routed to in the prompt"


def test_history_learns_nothing_of_a_forward_that_broke_off() -> None:
    experts, dispatcher = scheduler("history")
    experts.attach(routers(), history=HistoryForecast(LAYERS, EXPERTS))
    experts.begin(1, [10])
    ask(experts, 0, [5])
    experts.end(1)
    experts.begin(2, [10])
    for layer in range(LAYERS):
        ask(experts, layer, [6])
    experts.read(2, 10, STATE)
    assert {expert for _, order in dispatcher.orders for expert in order.experts.tolist()} == {6}


def test_the_resident_output_has_the_shape_of_the_step() -> None:
    experts, _ = scheduler("resident")
    weights_TK = torch.tensor([[0.5, 0.5]])
    experts.route(0, torch.tensor([[1, 2]]), weights_TK)
    output = experts.resident()
    assert output is not None and output.weights_TK is weights_TK
    assert output.output_TKH.tolist() == [[[0.0, 1.0], [2.0, 3.0]]]


# --- the ends of it -------------------------------------------------------------------------------------


def test_the_end_of_a_sequence_is_told_to_the_workers() -> None:
    experts, dispatcher = scheduler()
    experts.begin(1, [10])
    experts.end(1)
    experts.end(9)
    assert dispatcher.forgotten == [1, 9]


def test_another_shadow_makes_orders_void() -> None:
    link = FakeLink()
    experts, dispatcher = scheduler("shadow", link)
    experts.begin(1, [10])
    experts.read(1, 20, STATE)
    assert dispatcher.forgotten == []
    link.moves += 1
    experts.read(1, 21, STATE)
    assert dispatcher.forgotten == [1]


def test_costs_are_told_once() -> None:
    experts, _ = scheduler()
    experts.begin(1, [10])
    ask(experts, 0, [1], [2])
    assert experts.take_cost() == Routing(hits=1, decisions=2)
    assert experts.take_cost() == Routing(hits=1)


def test_other_settings_of_scheduling_change_nothing() -> None:
    experts, dispatcher = scheduler()
    experts.reconfigure(SchedulingConfig(policy="on_demand_shadow", alpha=0.1))
    assert experts.alpha == 0.0 and dispatcher.orders == []
