"""Policy joint in the engine: what forecasts order, what gives way when the layer has come, and who is asked."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from predictor.forecast import LayerForecast
from raymoe.config import PredictorConfig
from raymoe.engine.cacheless import MOST_DECODE_TOKENS
from raymoe.engine.foresight import Foresight
from raymoe.engine.joint import JointConductor, JointScheduler, with_residents
from raymoe.experts.call import LoadOrder
from raymoe.model.router_rule import RouterRule
from raymoe.model.runner import SequenceState
from raymoe.placement.assignment import Fleet
from raymoe.placement.link_queues import LinkQueues
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, Routing, StepId
from tests.links import FakeLink

LAYERS, EXPERTS, HIDDEN, WORKERS = 2, 6, 2, 2
NAMES = (DeviceName("a"), DeviceName("b"))
STATE = SequenceState(torch.empty(0), {}, 0)
RULE = RouterRule(score="softmax", renormalised=True, scale=1.0)
SCORES = [0.4, 0.25, 0.12, 0.11, 0.1, 0.02]  # 0, 1 and 2 are chosen; 2 is low for alpha above 0.09, 4 in the window
NEXT = StepId(sequence=1, position=1)


def make_fleet(slots: int = 8) -> Fleet:
    owners = tuple(np.ones((WORKERS, EXPERTS), dtype=bool) for _ in range(LAYERS))
    return Fleet(workers=WORKERS, group_size=2, owners_LWE=owners, slots_W=(slots,) * WORKERS)


@dataclass
class FakeDispatcher:
    """Notes what it is asked; outputs are zeros. ``held`` is (layer, worker, expert)."""

    fleet: Fleet = field(default_factory=make_fleet)
    devices: tuple[DeviceName, ...] = NAMES
    max_rows: int = 16
    on_round_trip: Any = None
    held: set[tuple[int, int, int]] = field(default_factory=set)
    load_s: float | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    orders: list[tuple[DeviceName, LoadOrder]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    replaced: list[tuple[int, list[int]]] = field(default_factory=list)
    listens: Any = None

    def gave_way(self, layer: int, experts: np.ndarray) -> None:
        self.replaced.append((layer, experts.tolist()))

    def holding(self, layer: int) -> np.ndarray:
        held_WE = np.zeros((WORKERS, EXPERTS), dtype=bool)
        for at, worker, expert in self.held:
            held_WE[worker, expert] |= at == layer
        return held_WE

    def loads_s(self) -> list[float | None]:
        return [self.load_s] * WORKERS

    def listen(self, action: Any) -> None:
        self.listens = action

    def compute(
        self, layer: int, hidden_TH: Any, experts_TK: Any, scores_E: Any, meanwhile: Any, *, step: Any, plan: Any
    ) -> torch.Tensor:
        meanwhile()
        self.calls.append({"layer": layer, "scores_E": scores_E, "step": step, "plan": plan})
        return torch.zeros(*experts_TK.shape, HIDDEN)

    def order(self, name: DeviceName, order: LoadOrder) -> None:
        self.orders.append((name, order))

    def order_here(self, plan: Plan) -> None:
        raise AssertionError("the shadow makes no plans under this policy")

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)

    def lost(self, layer: int) -> None:
        return None

    def take_cost(self) -> Routing:
        return Routing(hits=1)

    def said(self) -> list[tuple[str, int, int, list[int]]]:
        """Whom it told for which position and layer to have what; forgets it."""
        said = [(str(name), o.step.position, o.layer, o.experts.tolist()) for name, o in self.orders]
        self.orders.clear()
        return said


@dataclass
class FakeRouter:
    """Scores every row alike."""

    rule: RouterRule | None = RULE
    experts: int = EXPERTS

    def scores_or_weights(self, chosen_TK: np.ndarray, weights_TK: torch.Tensor) -> np.ndarray:
        return np.array([SCORES] * len(chosen_TK), dtype=np.float32)


def scheduler(slots: int = 8, rule: RouterRule | None = RULE) -> tuple[JointScheduler, FakeDispatcher, FakeLink]:
    dispatcher, link = FakeDispatcher(make_fleet(slots)), FakeLink()
    made = JointScheduler(dispatcher, Foresight(PredictorConfig(), link))  # type: ignore[arg-type]
    made.attach([FakeRouter(rule)] * LAYERS)  # type: ignore[list-item]
    return made, dispatcher, link


def forecast(step: StepId = NEXT, layer: int = 0, epoch: int = 0, experts: int = EXPERTS) -> LayerForecast:
    scores_TE = np.array([SCORES[:experts]], dtype=np.float32)
    return LayerForecast(step=step, epoch=epoch, layer=layer, experts_TK=np.array([[0, 1, 2]]), scores_TE=scores_TE)


def read_one(experts: JointScheduler, alpha: float, link: FakeLink, *coming: Any) -> None:
    """A prompt of one token, and the next token is about to be read; then this comes from the shadow."""
    experts.alpha = alpha
    experts.begin(1, [10])
    experts.read(1, 20, STATE)
    link.coming = list(coming)
    experts.foresight.listen()


def ask(experts: JointScheduler, layer: int, *chosen: list[int]) -> tuple[list[list[int]], torch.Tensor]:
    """One layer of a forward, as the trunk calls it: what is computed, and by which weights."""
    weights_TK = torch.ones(len(chosen), len(chosen[0])) / len(chosen[0])
    experts_TK, weights_TK = experts.route(layer, torch.tensor(chosen), weights_TK)
    experts.compute(layer, torch.zeros(len(chosen), HIDDEN), experts_TK)
    return experts_TK.tolist(), weights_TK


# --- forecasts ------------------------------------------------------------------------------------------


def test_a_forecast_becomes_orders_and_the_plan_that_is_asked_by() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast())
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1])]
    ask(experts, 0, [0, 1, 2])
    plan = dispatcher.calls[0]["plan"]
    assert dispatcher.calls[0]["step"] == NEXT and plan.experts_N.tolist() == [0, 1, 2]
    assert dispatcher.calls[0]["scores_E"].tolist() == pytest.approx(SCORES)
    experts.end(1)
    assert experts.take_cost().recall == 1.0


def test_what_is_foretold_to_score_low_is_not_ordered_but_what_replaces_it_is_kept() -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.held = {(0, 1, 4)}
    read_one(experts, 0.5, link, forecast())
    assert dispatcher.said() == [("a", 1, 0, [0]), ("b", 1, 0, [1, 4])]
    computed, weights_TK = ask(experts, 0, [0, 1, 2])
    assert computed == [[0, 1, 4]]
    assert weights_TK.tolist()[0] == pytest.approx([0.4 / 0.75, 0.25 / 0.75, 0.1 / 0.75])
    cost = experts.take_cost()
    assert (cost.substituted, cost.decisions) == (1, 1) and cost.replaced_mass == pytest.approx(0.12 / 0.77)
    assert experts.take_cost() == Routing(hits=1)


def test_the_router_decides_by_its_own_scores_whatever_was_planned() -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.held = {(0, 1, 4)}
    read_one(experts, 0.5, link, forecast())
    assert ask(experts, 0, [0, 1, 5])[0] == [[0, 1, 4]], "5 scores least of all, and 4 is planned"
    assert ask(experts, 1, [0, 1, 2])[0] == [[0, 1, 2]], "nothing is at hand in this layer"


def test_each_request_has_its_own_alpha() -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.held = {(0, 1, 4)}
    experts.alpha = 0.5
    experts.begin(1, [10])
    experts.alpha = 0.0
    experts.begin(2, [10])
    experts.alpha = 0.5
    experts.read(1, 20, STATE)
    link.coming = [forecast(), forecast(StepId(sequence=2, position=1))]
    experts.foresight.listen()
    assert dispatcher.said() == [
        ("a", 1, 0, [0]), ("b", 1, 0, [1, 4]), ("a", 1, 0, [0, 2]), ("b", 1, 0, [1]),
    ]  # fmt: skip
    experts.alpha = 0.0
    experts.read(2, 20, STATE)
    assert ask(experts, 0, [0, 1, 2])[0] == [[0, 1, 2]]


def test_without_a_slot_to_spare_nothing_is_counted_on() -> None:
    experts, dispatcher, link = scheduler(slots=3)  # two loads of a layer, and one meanwhile
    dispatcher.held = {(0, 1, 4), (0, 1, 0)}
    read_one(experts, 0.5, link, forecast())
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1])]


def test_what_was_ordered_for_an_earlier_step_is_counted_on() -> None:
    experts, dispatcher, link = scheduler()
    later = StepId(sequence=1, position=2)
    read_one(experts, 0.0, link, forecast(), forecast(later))
    assert dispatcher.said() == [
        ("a", 1, 0, [0, 2]), ("b", 1, 0, [1]), ("a", 2, 0, [0, 2]), ("b", 2, 0, [1]),
    ]  # fmt: skip
    assert experts._joint.planned_away == 0


def test_forecasts_for_the_positions_of_one_pass_add_up() -> None:
    experts, dispatcher, link = scheduler()
    other = forecast()
    other.experts_TK[:] = [[1, 3, 0]]
    read_one(experts, 0.0, link, forecast(), other)
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1]), ("b", 1, 0, [3])]
    ask(experts, 0, [0, 1, 2], [1, 3, 0])
    plan = dispatcher.calls[0]["plan"]
    assert dict(zip(plan.experts_N.tolist(), plan.workers_N.tolist(), strict=True)) == {0: 0, 1: 1, 2: 0, 3: 1}


def test_what_one_position_needs_is_at_hand_for_the_others() -> None:
    experts, dispatcher, link = scheduler()
    other = forecast()
    other.experts_TK[:] = [[0, 1, 5]]
    read_one(experts, 0.5, link, forecast(), other)
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1])]
    assert experts._joint.planned_away == 1
    assert ask(experts, 0, [0, 1, 2], [0, 1, 5])[0] == [[0, 1, 2], [0, 1, 2]]


def test_a_pass_of_many_positions_substitutes_too() -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.held = {(0, 1, 4)}
    read_one(experts, 0.5, link, forecast())
    many = [[0, 1, 5]] * (MOST_DECODE_TOKENS + 1)
    assert ask(experts, 0, *many)[0] == [[0, 1, 4]] * len(many)


def test_what_was_used_is_counted_on_no_more_but_as_workers_say() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast())
    ask(experts, 0, [0, 1, 2])
    dispatcher.said()
    dispatcher.held = {(0, 1, 0)}
    link.coming = [forecast(StepId(sequence=1, position=2))]
    experts.foresight.listen()
    assert dispatcher.said() == [("a", 2, 0, [1]), ("b", 2, 0, [0, 2])]


def test_a_layer_that_has_come_waits_for_the_plan_of_its_own_alone() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast())
    dispatcher.said()
    later = forecast(StepId(sequence=1, position=2))
    link.coming = [later]
    experts.route(0, torch.tensor([[0, 1, 2]]), torch.ones(1, 3) / 3)
    assert experts.foresight.plan(0) is not None and link.coming == [later]
    ask(experts, 0, [0, 1, 2])
    assert not link.coming and {position for _, position, _, _ in dispatcher.said()} == {2}, "while workers compute"
    link.coming = [forecast(layer=1)]
    ask(experts, 1, [0, 1, 2])
    assert dispatcher.calls[-1]["plan"].experts_N.tolist() == [0, 1, 2]


def test_a_new_epoch_makes_orders_void_with_every_worker() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast())
    dispatcher.said()
    single = LayerForecast(
        step=NEXT, epoch=1, layer=0, experts_TK=np.array([[3]]), scores_TE=np.array([SCORES], np.float32)
    )
    link.coming = [single]
    experts.foresight.listen()
    assert [(str(name), o.epoch, o.experts.tolist()) for name, o in dispatcher.orders] == [("a", 1, [3]), ("b", 1, [])]
    assert list(experts._joint._booked[0]) == [NEXT]


def test_another_shadow_begins_anew() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast(epoch=3))
    link.moves += 1
    experts.read(1, 21, STATE)
    assert dispatcher.forgotten == [1] and not experts._joint._booked[0]
    dispatcher.said()
    link.coming = [forecast(StepId(sequence=1, position=2))]
    experts.foresight.listen()
    assert len(dispatcher.said()) == 2, "its epochs begin anew too"


def test_a_forecast_of_a_layer_gone_by_orders_nothing_but_counts_as_said() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link)
    ask(experts, 0, [0, 1, 2])
    link.coming = [forecast()]
    experts.foresight.listen()
    assert dispatcher.said() == []
    experts.end(1)
    assert experts.take_cost().recall == 1.0


def test_forecasts_of_another_model_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link, forecast(experts=4), forecast(layer=LAYERS))
    assert dispatcher.orders == [] and caplog.text.count("another model's layer") == 2


def test_a_forecast_that_can_not_be_planned_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.order = lambda name, order: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    experts._joint._send = dispatcher.order
    read_one(experts, 0.0, link, forecast())
    assert "could not be planned" in caplog.text


def test_forecasts_are_listened_to_while_workers_are_waited_for() -> None:
    experts, dispatcher, link = scheduler()
    read_one(experts, 0.0, link)
    link.coming = [forecast()]
    dispatcher.listens()
    assert len(dispatcher.said()) == 2


# --- layers ---------------------------------------------------------------------------------------------


def test_prompts_are_exact() -> None:
    experts, dispatcher, _ = scheduler()
    dispatcher.held = {(0, 1, 4)}
    experts.alpha = 0.5
    experts.begin(1, [10])
    assert ask(experts, 0, [0, 1, 2])[0] == [[0, 1, 2]]
    many = [[0, 1, 2]] * (MOST_DECODE_TOKENS + 1)
    assert experts.route(0, torch.tensor(many), torch.ones(len(many), 3))[0].tolist() == many


def test_a_router_without_a_rule_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    experts, dispatcher, link = scheduler(rule=None)
    assert "2 of 2 layers route by no known rule" in caplog.text
    dispatcher.held = {(0, 1, 4)}
    read_one(experts, 0.5, link, forecast())
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1])]
    assert ask(experts, 0, [0, 1, 2])[0] == [[0, 1, 2]]


def test_residents_that_no_plan_names_are_asked_for_where_they_are() -> None:
    experts, dispatcher, link = scheduler()
    dispatcher.held = {(0, 1, 3), (0, 0, 1)}
    read_one(experts, 0.0, link, forecast())
    ask(experts, 0, [0, 1, 3])
    plan = dispatcher.calls[0]["plan"]
    asked = dict(zip(plan.experts_N.tolist(), plan.workers_N.tolist(), strict=True))
    assert asked == {0: 1, 1: 0, 2: 0, 3: 1}
    experts.end(1)
    ask(experts, 0, [3])
    assert dispatcher.calls[1]["plan"].workers_N.tolist() == [1] and dispatcher.calls[1]["step"] is None


def test_nothing_planned_and_nothing_held_is_no_plan() -> None:
    held_WE = np.zeros((WORKERS, EXPERTS), dtype=bool)
    assert with_residents(None, 0, [1, 2], held_WE) is None


def test_what_is_settled_of_a_sequence_is_forgotten() -> None:
    experts, _, link = scheduler()
    read_one(experts, 0.5, link, forecast(), forecast(layer=1, epoch=1))
    experts.end(1)
    joint = experts._joint
    assert not joint.alphas and not joint._epochs and not joint._cadences and not any(joint._booked.values())


def test_other_similarity_is_the_plans_too() -> None:
    experts, _, _ = scheduler()
    experts.similarity = similarity = object()  # type: ignore[assignment]
    assert experts._joint.similarity is similarity


# --- links ----------------------------------------------------------------------------------------------


def test_links_are_busy_with_what_was_ordered_until_it_is_done() -> None:
    now = [0.0]
    loads_s: list[float | None] = [0.5, 2.0]
    queues = LinkQueues(lambda: loads_s, (1.0, 4.0), lambda: now[0])
    queues.order(np.array([0, 0, 1]))
    assert queues.busy() == pytest.approx([2.0, 4.0]), "in the fleet's unit: two loads, and one of four"
    now[0] = 0.75
    assert queues.busy() == pytest.approx([0.5, 2.5])
    now[0] = 5.0
    assert queues.busy() == pytest.approx([0.0, 0.0])
    queues.order(np.array([1]))
    assert queues.busy() == pytest.approx([0.0, 4.0])


def test_links_that_were_not_measured_count_as_free() -> None:
    queues = LinkQueues(lambda: [0.5, None], (1.0, 1.0), lambda: 0.0)
    queues.order(np.array([0, 1]))
    assert queues.busy() is None


def test_a_busy_link_gets_the_later_loads() -> None:
    dispatcher = FakeDispatcher(make_fleet(slots=3), load_s=1.0)
    conductor = JointConductor(dispatcher, clock=lambda: 0.0)  # type: ignore[arg-type]
    conductor.conduct(forecast())
    assert dispatcher.said() == [("a", 1, 0, [0, 2]), ("b", 1, 0, [1])]
    conductor.conduct(forecast(layer=1))
    assert dispatcher.said() == [("a", 1, 1, [1]), ("b", 1, 1, [0, 2])], "b has one load less to do"
