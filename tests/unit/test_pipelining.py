"""The pipeline of decode steps and the mini-batches of prefill: exact small numbers, closed forms, brute force."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.minibatching import StageCosts, minibatches, pipeline_s
from raymoe.placement.pipelining import DecodePipeline, hidden_load_s, missed_share, predicted_tpot_s

TPOT = pytest.approx


# --- decode: the bound ----------------------------------------------------------------------------------


def test_the_papers_bound_with_eight_workers_and_two_experts_per_token() -> None:
    assert hidden_load_s(8, 2, 5.0, 0.5) == 4 * 5.0 + 3 * 0.5


def test_one_group_hides_a_load_behind_the_main_node_only() -> None:
    assert hidden_load_s(3, 4, 5.0, 0.5) == 5.0


def test_some_missed_expert_is_likelier_than_any_one_of_them() -> None:
    assert missed_share(1.0, 4) == 0.0
    assert missed_share(0.5, 2) == 0.75


# --- decode: time per output token ----------------------------------------------------------------------

PAPER = DecodePipeline(layers=8, groups=4, main_s=5.0, worker_s=0.5, load_s=1.0)  # bound 21.5


@pytest.mark.parametrize(
    ("load_s", "tpot_s"),
    [
        (0.0, 44.0),
        (21.5, 44.0),  # the bound: 8 layers at 5.5
        (22.5, 46.0),  # one second more, for each of the two layers of a group
        (41.5, 84.0),
    ],
)
def test_tpot_is_flat_up_to_the_bound_and_linear_after_it(load_s: float, tpot_s: float) -> None:
    assert predicted_tpot_s(replace(PAPER, load_s=load_s, steps_ahead=2)) == TPOT(tpot_s)


def test_the_head_comes_on_top_and_hides_loads_as_well() -> None:
    assert predicted_tpot_s(replace(PAPER, head_s=3.0)) == TPOT(47.0)
    assert predicted_tpot_s(replace(PAPER, groups=1, load_s=8.0, head_s=3.0)) == TPOT(8 * 8.5)


@pytest.mark.parametrize(("recall", "tpot_s"), [(1.0, 44.0), (0.5, 44.0 + 8 * 0.75 * 2.0)])
def test_a_miss_waits_one_load_more(recall: float, tpot_s: float) -> None:
    pipeline = replace(PAPER, load_s=2.0, missed=missed_share(recall, 2))
    assert predicted_tpot_s(pipeline) == TPOT(tpot_s)


def test_without_forecasts_every_load_is_waited_for() -> None:
    assert predicted_tpot_s(replace(PAPER, load_s=2.0, loads=3, shadow_s=None)) == TPOT(8 * (5.0 + 3 * 2.0 + 0.5))


def test_a_slow_shadow_is_a_floor() -> None:
    assert predicted_tpot_s(replace(PAPER, shadow_s=9.0)) == TPOT(72.0)


def test_late_departure_exposes_the_first_layers_load() -> None:
    """Forecasts after 1, 2, ... s, loads of 8 s: layer 0 waits until 9 s instead of 5, layer 1 has caught up."""
    late = replace(PAPER, load_s=8.0, shadow_s=1.0, steps_ahead=0)
    assert predicted_tpot_s(late) == TPOT(44.0 + 4.0)
    assert predicted_tpot_s(replace(late, steps_ahead=1)) == TPOT(44.0)


def test_a_group_that_is_asked_twice_in_a_row_at_the_turn_of_the_token_exposes_its_load() -> None:
    """Layers 0, 1, 2 of groups 0, 1, 0: between 2 and the next 0 there are only 5 s for a load of 7."""
    pipeline = DecodePipeline(layers=3, groups=2, main_s=5.0, worker_s=1.0, load_s=7.0)
    assert predicted_tpot_s(pipeline) == TPOT(18.0 + 2.0)


@given(
    groups=st.sampled_from([1, 2, 4]),
    loads=st.integers(1, 3),
    spare_slots=st.integers(0, 3),
    main_s=st.integers(1, 9),
    worker_s=st.integers(0, 9),
    load_s=st.integers(0, 40),
)
def test_tpot_follows_the_closed_form(
    groups: int, loads: int, spare_slots: int, main_s: int, worker_s: int, load_s: int
) -> None:
    spare_slots = min(spare_slots, loads)
    pipeline = DecodePipeline(
        layers=8,
        groups=groups,
        main_s=main_s,
        worker_s=worker_s,
        load_s=load_s,
        loads=loads,
        spare_slots=spare_slots,
        steps_ahead=2,
    )
    chain_s = loads * load_s + max(0, worker_s - spare_slots * load_s)
    assert predicted_tpot_s(pipeline) == TPOT(8 / groups * max(groups * (main_s + worker_s), chain_s))


# --- prefill: the four stages ---------------------------------------------------------------------------

COSTS = StageCosts(row_bytes=10, bytes_per_s=10.0, message_s=0.0, load_s=2.0, row_s=3.0, slots=2)


def rows(*indices: tuple[int, ...]) -> list[np.ndarray]:
    return [np.array(group, dtype=np.int64) for group in indices]


@pytest.mark.parametrize(
    ("batches", "finish_s"),
    [
        ([], 0.0),
        ([[0]], 2 + 6 + 2),  # the load hides the sending
        ([[0, 1]], 3 + 6 + 6 + 4),  # three rows, for one of them is asked of both
        ([[0], [1]], 2 + 6 + 6 + 2),
        ([[1], [0]], 2 + 6 + 6 + 2),
        ([[0], [1], [2]], 2 + 6 + 6 + 3 + 1),
        ([[2], [0], [1]], 2 + 3 + 6 + 6 + 2),
    ],
)
def test_the_stages_overlap(batches: list[list[int]], finish_s: float) -> None:
    assert pipeline_s(batches, rows((0, 1), (1, 2), (2,)), COSTS) == finish_s


def test_a_row_is_sent_once_per_mini_batch() -> None:
    same = rows((0, 1, 2, 3), (0, 1, 2, 3))
    sending = replace(COSTS, load_s=0.0, row_s=0.0)
    assert pipeline_s([[0, 1]], same, sending) == 4 + 8
    assert pipeline_s([[0], [1]], same, sending) == 4 + 4 + 4  # 8 rows sent while the first 4 answers return


def test_a_load_waits_for_a_slot() -> None:
    many = rows((0,), (0,), (0,))
    assert pipeline_s([[0, 1, 2]], many, replace(COSTS, slots=3)) == 2 + 3 * 3 + 3
    assert pipeline_s([[0, 1, 2]], many, replace(COSTS, slots=1)) == 3 * (2 + 3) + 3


def test_every_message_has_its_price() -> None:
    assert pipeline_s([[0], [1]], rows((0,), (1,)), replace(COSTS, message_s=10.0)) == 11 + 11 + 3 + 11


# --- prefill: the cut -----------------------------------------------------------------------------------


def test_no_experts_need_no_message() -> None:
    assert minibatches([], COSTS) == ()


def test_dear_messages_are_not_multiplied() -> None:
    share = rows((0, 1), (1, 2), (2, 3), (0, 3))
    assert len(minibatches(share, replace(COSTS, message_s=100.0))) == 1


def test_a_worker_in_the_same_process_gets_one_message_where_nothing_is_gained() -> None:
    free = StageCosts(row_bytes=10, bytes_per_s=math.inf, message_s=0.0, load_s=1.0, row_s=1.0)
    assert minibatches(rows((0, 1), (1, 2)), free) == ((0, 1),)


def test_a_slow_network_makes_small_mini_batches() -> None:
    share = rows(*[(2 * expert, 2 * expert + 1) for expert in range(6)])
    costs = StageCosts(row_bytes=10, bytes_per_s=5.0, message_s=0.0, load_s=0.0, row_s=2.0)
    batches = minibatches(share, costs)
    assert [len(batch) for batch in batches] == [1] * 6
    assert pipeline_s(batches, share, costs) == 4 + 6 * 4 + 4
    assert pipeline_s([range(6)], share, costs) == 24 + 24 + 24


def cuts(experts: int) -> Iterator[list[list[int]]]:
    """Every way to order experts and cut them into mini-batches."""
    for order in itertools.permutations(range(experts)):
        for breaks in itertools.product([False, True], repeat=max(0, experts - 1)):
            batches = [[order[0]]]
            for expert, cut in zip(order[1:], breaks, strict=True):
                if cut:
                    batches.append([expert])
                else:
                    batches[-1].append(expert)
            yield batches


@st.composite
def shares(draw: st.DrawFn, most: int) -> tuple[list[np.ndarray], StageCosts]:
    """A worker's share and what the stages cost."""
    seconds = st.sampled_from([0.0, 0.05, 0.3, 1.0, 4.0])
    groups = draw(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=most))
    costs = StageCosts(
        row_bytes=1,
        bytes_per_s=draw(st.sampled_from([0.5, 3.0, 20.0, math.inf])),
        message_s=draw(seconds),
        load_s=draw(seconds),
        row_s=draw(seconds),
        slots=draw(st.integers(1, 4)),
    )
    return rows(*[tuple(sorted(group)) for group in groups]), costs


@given(shares(most=3))
def test_the_cut_is_nearly_as_fast_as_the_best_of_all(case: tuple[list[np.ndarray], StageCosts]) -> None:
    share, costs = case
    best_s = min(pipeline_s(batches, share, costs) for batches in cuts(len(share)))
    assert best_s - 1e-9 <= pipeline_s(minibatches(share, costs), share, costs) <= 1.2 * best_s + 1e-9


@given(shares(most=8))
def test_every_expert_is_in_one_mini_batch_and_one_message_is_never_better(
    case: tuple[list[np.ndarray], StageCosts],
) -> None:
    share, costs = case
    batches = minibatches(share, costs)
    assert sorted(expert for batch in batches for expert in batch) == list(range(len(share)))
    assert all(batches)
    whole = [sorted(range(len(share)), key=lambda expert: -len(share[expert]))]
    assert pipeline_s(batches, share, costs) <= pipeline_s(whole, share, costs)


@given(shares(most=4))
def test_no_stage_is_shorter_than_its_work(case: tuple[list[np.ndarray], StageCosts]) -> None:
    share, costs = case
    finish_s = pipeline_s([range(len(share))], share, costs)
    pairs = sum(len(group) for group in share)
    assert finish_s >= len(share) * costs.load_s - 1e-9
    assert finish_s >= 2 * costs.message_s + pairs * (costs.row_s + costs.row_transfer_s) - 1e-9
