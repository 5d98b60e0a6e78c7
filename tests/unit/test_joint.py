"""The joint plan of a layer: the best there is by brute force, the cacheless plan where nothing is held, and whole."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import ExpertUnavailableError
from raymoe.placement.assignment import Fleet, assign, in_order_of_need
from raymoe.placement.joint import CAUTION, LayerPlan, plan_layer, spare_slots

EXPERTS = 6


def fleet(
    workers: int = 2,
    group_size: int = 2,
    *,
    experts: int = EXPERTS,
    load_s: tuple[float, ...] | None = None,
    slots: tuple[int, ...] | None = None,
) -> Fleet:
    """All workers own everything."""
    return Fleet(
        workers=workers,
        group_size=group_size,
        owners_LWE=(np.ones((workers, experts), dtype=bool),) * 2,
        load_s_W=None if load_s is None else np.array(load_s),
        slots_W=slots,
    )


def holding(cluster: Fleet, *held: tuple[int, int]) -> np.ndarray:
    """Who holds what: (worker, expert)."""
    held_WE = np.zeros((cluster.workers, cluster.owners_LWE[0].shape[1]), dtype=bool)
    for worker, expert in held:
        held_WE[worker, expert] = True
    return held_WE


def scores(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def placed(plan: LayerPlan) -> dict[int, tuple[int, bool]]:
    """Who shall have each expert, and whether it is loaded for that."""
    places = zip(plan.workers_N.tolist(), plan.loads_N.tolist(), strict=True)
    return dict(zip(plan.experts_N.tolist(), places, strict=True))


# --- single decisions -----------------------------------------------------------------------------------

FORECAST = scores(0.4, 0.25, 0.12, 0.11, 0.1, 0.02)  # 0, 1 and 2 are chosen; the best of the others scores 0.11
CHOSEN = np.array([[0, 1, 2]])


def test_nothing_held_is_the_cacheless_plan() -> None:
    plan = plan_layer(0, FORECAST, CHOSEN, fleet(), held_WE=holding(fleet()), alpha_T=0.5)
    assert placed(plan) == {0: (0, True), 1: (1, True), 2: (0, True)} and plan.replaced == 0


def test_what_scores_low_gives_way_to_what_is_held() -> None:
    cluster = fleet()
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=holding(cluster, (1, 4)), alpha_T=0.5)
    assert placed(plan) == {0: (0, True), 1: (1, True), 4: (1, False)} and plan.replaced == 1


def test_what_was_ordered_for_other_tokens_is_there_and_loads_before_the_rest() -> None:
    cluster = fleet()
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, ordered={0: 1, 5: 1}, alpha_T=0.0)
    assert placed(plan) == {0: (1, False), 1: (0, True), 2: (0, True)}
    held_WE = holding(cluster, (0, 0))
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, ordered={0: 1}, alpha_T=0.0)
    assert placed(plan)[0] == (1, False), "it stays with whom it was ordered of"
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, ordered={3: 0}, alpha_T=0.5)
    assert placed(plan) == {0: (1, True), 1: (0, True), 3: (0, False)} and plan.replaced == 1


@pytest.mark.parametrize(("alpha", "expert"), [(0.0, 2), (0.1, 2), (0.11, 2), (0.2, 4)])
def test_a_plan_is_more_careful_than_alpha(alpha: float, expert: int) -> None:
    """Expert 4 lies 9 % below the best of the others, expert 2 as much above: the window must be that wide."""
    assert CAUTION * 0.11 < 0.1 < CAUTION * 0.2
    cluster = fleet()
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=holding(cluster, (1, 4)), alpha_T=alpha)
    assert plan.experts_N.tolist() == [0, 1, expert]


def test_what_is_held_stays_and_costs_no_load() -> None:
    cluster = fleet()
    plan = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=holding(cluster, (1, 0)))
    assert placed(plan) == {0: (1, False), 1: (0, True), 2: (1, True)}


def test_of_several_holders_the_group_comes_first_then_who_has_least() -> None:
    cluster = fleet(workers=4, group_size=2)  # workers 0 and 2 serve layer 0
    held_WE = holding(cluster, (1, 0), (2, 0), (0, 1), (2, 1), (3, 2))
    assert placed(plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE)) == {
        0: (2, False), 1: (0, False), 2: (3, False),
    }  # fmt: skip


def test_loads_go_to_whose_link_is_free_first() -> None:
    plan = plan_layer(0, FORECAST, CHOSEN, fleet(), busy_s_W=np.array([1.5, 0.0]))
    assert placed(plan) == {0: (1, True), 1: (1, True), 2: (0, True)}


SOON, LATER = np.full(2, 0.5), np.full(2, 9.0)


def test_who_holds_much_loads_little_where_links_have_the_time() -> None:
    cluster = fleet()
    held_WE, busy_s_W = holding(cluster, (0, 0)), np.array([0.0, 0.5])
    in_a_hurry = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, busy_s_W=busy_s_W, due_s_W=SOON)
    assert placed(in_a_hurry) == {0: (0, False), 1: (0, True), 2: (1, True)}
    in_time = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, busy_s_W=busy_s_W, due_s_W=LATER)
    assert placed(in_time) == {0: (0, False), 1: (1, True), 2: (0, True)}


def test_what_one_worker_holds_is_loaded_by_another_only_where_that_costs_nothing() -> None:
    cluster = fleet()
    held_WE = holding(cluster, (0, 0), (0, 1), (0, 2))
    assert placed(plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE)) == dict.fromkeys((0, 1, 2), (0, False))
    in_time = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, due_s_W=LATER)
    assert placed(in_time) == {0: (0, False), 1: (0, False), 2: (1, True)}
    in_a_hurry = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, due_s_W=SOON)
    assert placed(in_a_hurry) == dict.fromkeys((0, 1, 2), (0, False))
    ordered = plan_layer(0, FORECAST, CHOSEN, cluster, ordered={0: 0, 1: 0, 2: 0}, due_s_W=LATER)
    assert placed(ordered) == dict.fromkeys((0, 1, 2), (0, False)), "what was ordered of a worker is its task"
    full = plan_layer(0, FORECAST, CHOSEN, cluster, held_WE=held_WE, due_s_W=LATER, busy_s_W=np.array([0.0, 8.5]))
    assert placed(full) == dict.fromkeys((0, 1, 2), (0, False))


def test_an_expert_that_nobody_has_is_named() -> None:
    owners_WE = np.ones((2, EXPERTS), dtype=bool)
    owners_WE[:, 1] = False
    cluster = Fleet(workers=2, group_size=2, owners_LWE=(owners_WE,))
    with pytest.raises(ExpertUnavailableError, match="expert 1 of layer 0 has no owner among the 2 workers"):
        plan_layer(0, FORECAST, CHOSEN, cluster)


def test_a_forecast_of_nothing_is_a_plan_of_nothing() -> None:
    plan = plan_layer(0, FORECAST, CHOSEN[:, :0], fleet(), held_WE=holding(fleet(), (0, 1)), alpha_T=0.3)
    assert placed(plan) == {}


@pytest.mark.parametrize(
    ("workers", "group_size", "slots", "top_k", "spare"),
    [
        (2, 2, (2, 3), 2, [False, True]),  # one load a layer, and one more
        (2, 1, (3, 4), 2, [False, True]),
        (3, 2, (4, 9, 2), 3, [True, True, False]),  # one group of three
        (2, 2, None, 2, [True, True]),
    ],
)
def test_slots_are_spare_beyond_what_passes_through(
    workers: int, group_size: int, slots: tuple[int, ...] | None, top_k: int, spare: list[bool]
) -> None:
    assert spare_slots(fleet(workers, group_size, slots=slots), top_k).tolist() == spare


# --- against brute force --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One token's layer."""

    scores_E: np.ndarray
    chosen: list[int]
    held: list[tuple[int, int]]
    alpha: float
    load_s: tuple[float, ...]
    due_s: float

    @property
    def cluster(self) -> Fleet:
        return fleet(len(self.load_s), len(self.load_s), load_s=self.load_s)

    @property
    def plan(self) -> LayerPlan:
        held_WE = holding(self.cluster, *self.held)
        chosen_TK = np.array([self.chosen])
        return plan_layer(0, self.scores_E[None], chosen_TK, self.cluster, held_WE=held_WE, alpha_T=self.alpha)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(1, 40), min_size=EXPERTS, max_size=EXPERTS, unique=True))
    scores_E = (np.array(values) / sum(values)).astype(np.float32)
    workers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    held = draw(st.lists(st.tuples(st.integers(0, workers - 1), st.integers(0, EXPERTS - 1)), max_size=4))
    return Case(
        scores_E=scores_E,
        chosen=np.argsort(-scores_E)[:top_k].tolist(),
        held=held,
        alpha=draw(st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0])),
        load_s=tuple(draw(st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=workers, max_size=workers))),
        due_s=draw(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 10.0])),
    )


def worth(case: Case, ends_with: list[int], worker_of: dict[int, int], order: list[int]) -> tuple[float, float]:
    """Mass on time per load, and mass on time; loads are done one after the other, in this order."""
    done_s, on_time = [0.0] * len(case.load_s), 0.0
    for expert in order:
        done_s[worker_of[expert]] += case.load_s[worker_of[expert]]
        on_time += case.scores_E[expert] * (done_s[worker_of[expert]] <= case.due_s)
    on_time += sum(float(case.scores_E[expert]) for expert in ends_with if expert not in worker_of)
    return (on_time / len(order) if order else np.inf), on_time


def permitted_ends(case: Case) -> list[list[int]]:
    """All that the token may end with: any low-scored experts replaced by any substitutes of the window."""
    held = {expert for _, expert in case.held}
    alpha = np.float32(CAUTION * case.alpha)
    rest = [expert for expert in range(EXPERTS) if expert not in case.chosen]
    best = max((case.scores_E[expert] for expert in rest), default=np.float32(0))
    low = [e for e in case.chosen if case.scores_E[e] < (1 + alpha) * best and e not in held]
    window = [e for e in rest if case.scores_E[e] > (1 - alpha) * best and e in held] if alpha else []
    ends = []
    for count in range(min(len(low), len(window)) + 1):
        for gone in itertools.combinations(low, count):
            for come in itertools.combinations(window, count):
                ends.append([e for e in case.chosen if e not in gone] + list(come))
    return ends


@given(cases())
def test_no_plan_serves_more_mass_on_time_per_byte(case: Case) -> None:
    plan, held = case.plan, {expert for _, expert in case.held}
    loads = plan.experts_N[plan.loads_N].tolist()
    worker_of = dict(zip(loads, plan.workers_N[plan.loads_N].tolist(), strict=True))
    per_load, mass = worth(case, plan.experts_N.tolist(), worker_of, loads)
    for ends_with in permitted_ends(case):
        missing = [expert for expert in ends_with if expert not in held]
        for workers in itertools.product(range(len(case.load_s)), repeat=len(missing)):
            for order in itertools.permutations(missing):
                other = worth(case, ends_with, dict(zip(missing, workers, strict=True)), list(order))
                assert other[0] <= per_load + 1e-6
                assert other[0] < per_load - 1e-6 or len(missing) != len(loads) or other[1] <= mass + 1e-6


# --- whatever comes -------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, Fleet]:
    """Scores, choices, holdings and a fleet of which every expert has an owner."""
    tokens, workers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    scores_TE = random.dirichlet(np.ones(EXPERTS), tokens).astype(np.float32)
    chosen_TK = np.argsort(-scores_TE, axis=1)[:, : draw(st.integers(1, EXPERTS))]
    owners_WE = random.random((workers, EXPERTS)) < draw(st.sampled_from([0.3, 1.0]))
    owners_WE[random.integers(workers, size=EXPERTS), np.arange(EXPERTS)] = True
    held_WE = owners_WE & (random.random((workers, EXPERTS)) < draw(st.sampled_from([0.0, 0.3, 0.8])))
    cluster = Fleet(workers=workers, group_size=draw(st.integers(1, 3)), owners_LWE=(owners_WE,) * 2)
    return scores_TE, chosen_TK, held_WE, cluster


@given(batches(), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 1))
def test_a_plan_is_whole(batch: tuple[np.ndarray, np.ndarray, np.ndarray, Fleet], alpha: float, layer: int) -> None:
    scores_TE, chosen_TK, held_WE, cluster = batch
    plan = plan_layer(layer, scores_TE, chosen_TK, cluster, held_WE=held_WE, alpha_T=alpha)
    experts = plan.experts_N.tolist()
    assert len(set(experts)) == len(experts) and plan.experts_N.dtype == np.int32
    assert plan.loads_N.tolist() == [not held_WE[:, expert].any() for expert in experts]
    for expert, (worker, loads) in placed(plan).items():
        assert cluster.owners_LWE[layer][worker, expert] and loads != held_WE[worker, expert]
    new = set(experts) - set(chosen_TK.reshape(-1).tolist())
    assert all(held_WE[:, expert].any() for expert in new), "substitutes are held already"
    exact = plan_layer(layer, scores_TE, chosen_TK, cluster, held_WE=held_WE)
    assert plan.loads_N.sum() <= exact.loads_N.sum()
    assert plan.replaced > 0 or experts == exact.experts_N.tolist()
    assert exact.replaced == 0 and set(exact.experts_N.tolist()) == set(chosen_TK.reshape(-1).tolist())


@given(batches(), st.sampled_from([0.0, 0.5]), st.integers(0, 1))
def test_nothing_held_is_load_for_load_the_cacheless_plan(
    batch: tuple[np.ndarray, np.ndarray, np.ndarray, Fleet], alpha: float, layer: int
) -> None:
    scores_TE, chosen_TK, held_WE, cluster = batch
    plan = plan_layer(layer, scores_TE, chosen_TK, cluster, held_WE=np.zeros_like(held_WE), alpha_T=alpha)
    needed_N = in_order_of_need(chosen_TK)
    assert plan.loads_N.all()
    if alpha == 0:
        assert plan.experts_N.tolist() == needed_N.tolist()
        assert plan.workers_N.tolist() == assign(needed_N, layer, cluster).tolist()


@given(batches(), st.integers(0, 1), st.lists(st.floats(0.0, 20.0), min_size=8, max_size=8), st.floats(0.0, 30.0))
def test_no_worker_of_a_group_has_two_more_than_one_whose_link_has_the_time(
    batch: tuple[np.ndarray, np.ndarray, np.ndarray, Fleet], layer: int, busy: list[float], due_s: float
) -> None:
    scores_TE, chosen_TK, held_WE, cluster = batch
    busy_s_W, due_s_W = np.array(busy[: cluster.workers]), np.full(cluster.workers, due_s)
    group = list(cluster.group_of(layer))
    held_WE[[worker for worker in range(cluster.workers) if worker not in group]] = False
    plan = plan_layer(layer, scores_TE, chosen_TK, cluster, held_WE=held_WE, busy_s_W=busy_s_W, due_s_W=due_s_W)
    tasks_W = np.bincount(plan.workers_N, minlength=cluster.workers)
    next_s_W = busy_s_W + (1 + np.bincount(plan.workers_N[plan.loads_N], minlength=cluster.workers)) * cluster.loads_s
    in_time = [worker for worker in group if next_s_W[worker] <= due_s]
    owners_WE = cluster.owners_LWE[layer]
    for worker in in_time:
        if owners_WE[worker].all() and (cluster.slots_W is None or tasks_W[worker] < cluster.slots_W[worker]):
            assert tasks_W[group].max() <= tasks_W[worker] + 1
