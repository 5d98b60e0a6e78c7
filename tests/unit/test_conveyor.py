"""Slots without a cache: loads in the order of orders, out after use, misses, void orders, and nothing that leaks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import LoadCancelledError
from raymoe.experts import timetable
from raymoe.experts.call import LoadOrder, expert_id
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.link import MemoryLink
from raymoe.experts.loader import ON_DEMAND, PREFETCH, ThreadLoader
from tests.conveyors import (
    EXPERTS,
    LAYERS,
    Rehearsal,
    begin,
    call,
    check_changes,
    deliver,
    events,
    finish_all,
    make,
    order,
    over,
    step_id,
)

# --- orders ---------------------------------------------------------------------------------------------


def test_orders_are_loaded_as_they_came_as_far_as_slots_go() -> None:
    conveyor, loader = make(slots=3)
    order(conveyor, [5, 2])
    order(conveyor, [1, 7], layer=1)
    assert loader.started == [(5, PREFETCH), (2, PREFETCH), (expert_id(1, 1), PREFETCH)]
    assert conveyor.counters.prefetches == 3


def test_a_computed_expert_leaves_at_once_and_the_next_order_takes_its_slot() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5, 2, 7])
    finish_all(conveyor, loader)
    step = begin(conveyor, [5, 2, 7], step=step_id(0))
    assert step.slots_P.tolist() == [0, 1, -1] and list(step.waiting) == [expert_id(0, 7)]
    order(conveyor, [4], layer=1)
    conveyor.release(step, [0])
    assert conveyor.resident() == [2, 7], "the call in hand comes first"
    conveyor.release(step, [1])
    assert conveyor.resident() == [7, expert_id(1, 4)]
    assert conveyor.next_arrival(step) == (7, 0)


def test_what_was_ordered_in_time_is_a_hit() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5, 2])
    finish_all(conveyor, loader)
    assert call(conveyor, [2, 5], step=step_id(0)) == [2, 5]
    assert (conveyor.counters.hits, conveyor.counters.misses, conveyor.counters.loads) == (2, 0, 2)
    assert conveyor.resident() == []


def test_a_load_in_flight_is_hurried_and_waited_for() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5])
    assert call(conveyor, [5], step=step_id(0)) == [5]
    assert loader.started == [(5, PREFETCH)] and loader.tickets[5].hurried
    assert conveyor.counters.misses == 1


def test_two_steps_share_a_slot_until_the_last_has_used_it() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5], position=0)
    order(conveyor, [5], position=1)
    call(conveyor, [5], step=step_id(0))
    assert conveyor.resident() == [5]
    call(conveyor, [5], step=step_id(1))
    assert conveyor.resident() == [] and loader.started == [(5, PREFETCH)]


def test_a_later_use_holds_no_slot_before_its_turn() -> None:
    conveyor, _ = make(slots=1)
    order(conveyor, [5], position=0)
    order(conveyor, [3], position=0, layer=1)
    order(conveyor, [5], position=1)
    call(conveyor, [5], step=step_id(0))
    assert conveyor.resident() == [expert_id(1, 3)]


def test_an_order_whose_turn_it_is_keeps_what_would_have_left() -> None:
    conveyor, loader = make(slots=1)
    begun = begin(conveyor, [5], step=step_id(0))
    order(conveyor, [5], position=1)
    deliver(conveyor, begun)
    conveyor.end_step()
    assert conveyor.resident() == [5] and loader.started == [(5, ON_DEMAND)]


def test_an_order_for_an_expert_of_another_shard_is_ignored() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [EXPERTS, -1, 3])
    assert loader.started == [(3, PREFETCH)]


def test_an_order_that_failed_does_not_stand_in_the_way() -> None:
    conveyor, loader = make(slots=1, fails=[3])
    order(conveyor, [3, 4])
    loader.tickets[3].finish()
    conveyor.on_idle()
    assert conveyor.resident() == [4]
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        call(conveyor, [3], step=step_id(0))
    conveyor.end_step()
    loader.fails.clear()
    assert call(conveyor, [3], step=step_id(0)) == [3]


def test_orders_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetable, "MOST_BOOKINGS", 3)
    conveyor, _ = make(slots=1)
    order(conveyor, [0, 1])
    order(conveyor, [2, 3, 4], layer=1)
    assert conveyor.counters.prefetches_refused == 2


# --- calls that were not foreseen -----------------------------------------------------------------------


def test_without_orders_calls_load_on_demand_and_keep_nothing() -> None:
    conveyor, loader = make(slots=4)
    for _ in range(2):
        assert call(conveyor, [1, 2]) == [1, 2]
        assert conveyor.resident() == []
    assert loader.started == [(1, ON_DEMAND), (2, ON_DEMAND)] * 2
    assert (conveyor.counters.misses, conveyor.counters.loads, conveyor.counters.evictions) == (4, 4, 4)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_experts_than_slots_are_served_in_turns(slots: int) -> None:
    conveyor, _ = make(slots)
    assert call(conveyor, [0, 2, 4, 5, 7]) == [0, 2, 4, 5, 7]


def test_a_miss_takes_a_free_slot_first() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5])
    assert call(conveyor, [6], step=step_id(0)) == [6]
    assert loader.tickets[5].error is None and conveyor.resident() == [5]


def test_a_wrong_forecast_for_the_call_gives_way_before_what_is_due_later() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5])
    order(conveyor, [4], layer=1)
    finish_all(conveyor, loader)
    step = begin(conveyor, [6], step=step_id(0))
    assert conveyor.resident() == [6, expert_id(1, 4)]
    deliver(conveyor, step)
    conveyor.end_step()
    assert conveyor.resident() == [expert_id(1, 4)], "the wrong one does not come again"


def test_a_wrong_forecast_that_is_here_gives_way_before_one_under_way() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5, 4])
    loader.tickets[4].finish()
    begin(conveyor, [6], step=step_id(0))
    assert conveyor.resident() == [5, 6] and loader.tickets[5].error is None


def test_a_miss_without_any_slot_takes_the_one_due_last_whose_order_waits_again() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [5], layer=1)
    order(conveyor, [4], layer=2)
    finish_all(conveyor, loader)
    step = begin(conveyor, [6, 7], step=step_id(0))
    assert conveyor.resident() == [6, expert_id(1, 5)], "one slot is enough: its link loads one expert at a time"
    deliver(conveyor, step)
    conveyor.end_step()
    assert conveyor.resident() == [expert_id(1, 5), expert_id(2, 4)]


def test_an_order_that_gave_way_comes_again_before_later_ones() -> None:
    conveyor, loader = make(slots=1)
    order(conveyor, [5], layer=1)
    order(conveyor, [4], layer=2)
    call(conveyor, [6], step=step_id(0))
    assert loader.started == [(expert_id(1, 5), PREFETCH), (6, ON_DEMAND), (expert_id(1, 5), PREFETCH)]


def test_no_order_begins_while_a_call_waits_for_a_slot() -> None:
    conveyor, loader = make(slots=1)
    step = begin(conveyor, [1, 2])
    order(conveyor, [4], layer=1)
    assert conveyor.next_arrival(step) == (1, 0)
    conveyor.release(step, [0])
    assert [expert for expert, _ in loader.started] == [1, 2]


def test_a_call_that_was_never_finished_claims_nothing() -> None:
    conveyor, loader = make(slots=2)
    begin(conveyor, [0, 1])
    assert call(conveyor, [2, 3]) == [2, 3]
    assert isinstance(loader.tickets[0].error, LoadCancelledError)


def test_an_expert_that_is_wanted_while_its_cancelled_load_ends_is_loaded_again() -> None:
    conveyor, loader = make(slots=1)
    loader.reluctance = 5
    order(conveyor, [5])
    conveyor.forget(1)
    step = begin(conveyor, [5])
    assert list(step.waiting) == [5] and conveyor.resident() == [5]
    assert deliver(conveyor, step) == [5.0] and loader.started == [(5, PREFETCH), (5, ON_DEMAND)]


def test_a_load_that_could_not_be_cancelled_any_more_serves_a_call_that_wants_it() -> None:
    conveyor, loader = make(slots=1)
    loader.reluctance = 5
    order(conveyor, [5])
    conveyor.forget(1)
    step = begin(conveyor, [5])
    loader.tickets[5].finish()
    assert deliver(conveyor, step) == [5.0] and loader.started == [(5, PREFETCH)]


def test_loading_outside_of_calls_keeps_nothing_but_the_time() -> None:
    conveyor, _ = make(slots=1)
    conveyor.load(expert_id(1, 3))
    assert conveyor.resident() == [] and conveyor.load_cost.mean_s == 1000.0
    assert (conveyor.counters.hits, conveyor.counters.misses) == (0, 0)


# --- void orders ----------------------------------------------------------------------------------------


def test_in_a_prompt_orders_for_another_part_of_the_same_layer_stay() -> None:
    conveyor, loader = make(slots=3)
    order(conveyor, [3], position=0, layer=1)
    finish_all(conveyor, loader)
    call(conveyor, [7], layer=1, step=step_id(0))
    assert conveyor.resident() == [expert_id(1, 3)]


def test_an_order_that_comes_after_its_decode_steps_call_is_late_even_for_an_expert_not_asked_for() -> None:
    conveyor, loader = make(slots=3)
    call(conveyor, [7], layer=1, step=step_id(5))
    finish_all(conveyor, loader)
    order(conveyor, [3], position=5, layer=1)
    assert (conveyor.resident(), conveyor.counters.prefetches_late) == ([], 1)


def test_a_call_makes_orders_for_earlier_layers_and_steps_void() -> None:
    conveyor, loader = make(slots=3)
    order(conveyor, [1], position=4, layer=2)
    order(conveyor, [2], position=5, layer=0)
    order(conveyor, [3], position=5, layer=1)
    finish_all(conveyor, loader)
    call(conveyor, [7], layer=1, step=step_id(5))
    assert conveyor.resident() == [], "a decode step's layer comes in one call"
    call(conveyor, [7], layer=2, step=step_id(5))
    assert conveyor.resident() == []


def test_a_call_for_other_slots_makes_earlier_orders_void_here() -> None:
    conveyor, _ = make(slots=2)
    order(conveyor, [1], position=4)
    order(conveyor, [2], position=5)
    conveyor.pass_by(step_id(4), 1)
    assert conveyor.resident() == [2]


def test_void_orders_that_waited_are_counted_late() -> None:
    conveyor, _ = make(slots=1)
    order(conveyor, [1, 2, 3])
    call(conveyor, [7], layer=1, step=step_id(0))
    assert conveyor.counters.prefetches_late == 2


def test_other_sequences_orders_stay() -> None:
    conveyor, _ = make(slots=2)
    order(conveyor, [1], position=4, sequence=2)
    call(conveyor, [7], layer=1, step=step_id(9, sequence=1))
    assert conveyor.resident() == [1]


def test_an_order_after_its_call_is_late() -> None:
    conveyor, loader = make(slots=2)
    call(conveyor, [7], layer=1, step=step_id(3))
    started = list(loader.started)
    order(conveyor, [1], position=3, layer=0)
    order(conveyor, [1], position=2, layer=2)
    order(conveyor, [7], position=3, layer=1)
    assert loader.started == started
    assert conveyor.counters.prefetches_late == 3


def test_one_layers_calls_in_parts_each_use_their_own_orders() -> None:
    conveyor, loader = make(slots=2)
    for part in ([1, 2], [2, 3], [4, 1]):
        order(conveyor, part)
    finish_all(conveyor, loader)
    for part in ([1, 2], [2, 3], [4, 1]):
        assert call(conveyor, part, step=step_id(0)) == sorted(part)
        finish_all(conveyor, loader)
    assert (conveyor.counters.hits, conveyor.counters.misses) == (6, 0)
    assert [expert for expert, _ in loader.started] == [1, 2, 3, 4, 1], "2 stays for the second part"
    assert conveyor.resident() == []


def test_an_order_for_the_next_part_of_a_layer_is_not_late() -> None:
    conveyor, loader = make(slots=2)
    call(conveyor, [1], step=step_id(0))
    order(conveyor, [1])
    order(conveyor, [1, 2])
    assert conveyor.counters.prefetches_late == 1
    assert loader.started == [(1, ON_DEMAND), (1, PREFETCH), (2, PREFETCH)]


def test_turns_within_a_sequence_go_by_layers_and_not_by_arrival() -> None:
    conveyor, loader = make(slots=1)
    order(conveyor, [1], position=4, layer=0)
    order(conveyor, [2], position=4, layer=1)
    order(conveyor, [3], position=4, layer=2)
    for layer in range(LAYERS):  # the pass reads a second position
        order(conveyor, [4], position=4, layer=layer)
    for layer in range(LAYERS):
        assert call(conveyor, [1 + layer, 4], layer=layer, step=step_id(4)) == sorted([1 + layer, 4])
        finish_all(conveyor, loader)
    begun = [identifier for identifier, priority in loader.started if priority == PREFETCH]
    layers = [identifier >> 16 for identifier in begun]
    assert len(layers) == LAYERS and layers == sorted(layers), "the other half was loaded on demand, in one slot"
    assert all_is_over(conveyor)


def test_an_expert_that_two_positions_of_a_pass_need_is_booked_once() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [1, 2], position=4)
    order(conveyor, [2, 3], position=4)
    finish_all(conveyor, loader)
    assert len(conveyor._timetable) == 3
    assert call(conveyor, [1, 2, 3], step=step_id(4)) == [1, 2, 3]
    assert all_is_over(conveyor)


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)),
        max_size=40,
    )
)
def test_turns_follow_places_within_a_sequence(
    orders: list[tuple[int, int, int, int]],
) -> None:
    table = timetable.Timetable()
    for sequence, position, layer, expert in orders:
        named = LoadOrder(step=step_id(position, sequence), epoch=0, layer=layer, experts=np.array([expert], np.int32))
        table.order(named, [expert_id(layer, expert)])
    assert len(table) == len(set(orders)), "each expert once per place"
    turns: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    while (identifier := table.next()) is not None:
        step = table.next_step()
        assert step is not None
        turns[step.sequence].append((step.position, identifier >> 16))
        table.hold()
    assert all(places == sorted(places) for places in turns.values())


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, EXPERTS - 1)), max_size=40))
def test_orders_that_come_in_the_order_of_use_are_taken_as_they_came(orders: list[tuple[int, int]]) -> None:
    table = timetable.Timetable()
    calls = dict.fromkeys(range(1, 4), LAYERS)
    expected = []
    for sequence, expert in orders:
        position, layer = divmod(calls[sequence], LAYERS)
        calls[sequence] += 1
        named = LoadOrder(step=step_id(position, sequence), epoch=0, layer=layer, experts=np.array([expert], np.int32))
        table.order(named, [expert_id(layer, expert)])
        expected.append(expert_id(layer, expert))
    taken = []
    while (identifier := table.next()) is not None:
        taken.append(identifier)
        table.hold()
    assert taken == expected


def test_a_higher_epoch_makes_void_what_lower_ones_ordered_from_its_step_on() -> None:
    conveyor, loader = make(slots=3)
    order(conveyor, [1], position=4)
    order(conveyor, [2], position=5)
    order(conveyor, [3], position=6)
    order(conveyor, [4], position=7)
    loader.tickets[2].finish()
    order(conveyor, [6], position=5, epoch=1)
    assert conveyor.resident() == [1, 6]
    assert isinstance(loader.tickets[3].error, LoadCancelledError)
    assert conveyor.counters.prefetches_late == 1, "the one that had not begun"


def test_what_a_new_epoch_orders_too_goes_on() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [1, 2], position=5)
    order(conveyor, [2], position=5, epoch=1)
    assert conveyor.resident() == [2]
    assert loader.tickets[2].error is None and len(loader.started) == 2


def test_orders_of_a_lower_epoch_are_dropped() -> None:
    conveyor, _ = make(slots=2)
    order(conveyor, [], position=5, epoch=2)
    order(conveyor, [1], position=6, epoch=1)
    order(conveyor, [1], position=6, epoch=1, sequence=2)
    assert conveyor.counters.prefetches_late == 1 and conveyor.resident() == [1]


def test_a_forgotten_sequence_holds_nothing_and_orders_nothing_more() -> None:
    conveyor, loader = make(slots=2)
    order(conveyor, [1, 2, 3], position=5)
    conveyor.forget(1)
    order(conveyor, [4], position=6)
    assert conveyor.resident() == [] and len(loader.started) == 2


def test_a_forgotten_sequence_that_calls_again_may_order_again() -> None:
    conveyor, _ = make(slots=2)
    order(conveyor, [1], position=5, epoch=7)
    conveyor.forget(1)
    call(conveyor, [1], step=step_id(0))
    order(conveyor, [4], position=1)
    assert conveyor.resident() == [4]


def test_a_sequence_that_ended_without_a_word_gives_its_slots_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetable, "STALE_CALLS", 3)
    conveyor, _ = make(slots=2)
    order(conveyor, [1, 2, 3], sequence=1)
    for position in range(3):
        call(conveyor, [7], step=step_id(position, sequence=2))
    assert conveyor.resident() == [1, 2]
    call(conveyor, [7], step=step_id(3, sequence=2))
    assert conveyor.resident() == []


def test_only_so_many_sequences_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timetable, "MOST_SEQUENCES", 2)
    conveyor, _ = make(slots=4)
    for sequence in (1, 2, 3):
        order(conveyor, [sequence], sequence=sequence)
    assert conveyor.resident() == [2, 3]


def test_residency_changes_lead_from_one_call_to_the_next() -> None:
    conveyor, loader = make(slots=2)
    check_changes(conveyor, loader, ([0], [1, 2, 3], [5], [6, 7]))


# --- whatever comes -------------------------------------------------------------------------------------


def all_is_over(conveyor: Conveyor) -> bool:
    return not conveyor.resident() and not len(conveyor._timetable) and not conveyor._cancelled


@given(st.integers(1, 4), st.sampled_from([0, 1, 4]), st.sets(st.integers(0, 3)), st.lists(events, max_size=40))
def test_every_call_is_served_and_nothing_leaks(
    slots: int,
    reluctance: int,
    fails: set[int],
    script: list[tuple],
) -> None:
    conveyor, loader = make(slots, fails)
    loader.reluctance = reluctance
    Rehearsal(conveyor, loader, fails).play(script)
    assert all_is_over(conveyor)


@given(st.integers(1, 4), st.lists(events, max_size=25))
def test_the_same_with_a_loader_on_a_thread(slots: int, script: list[tuple]) -> None:
    loader = ThreadLoader(MemoryLink(), "test")
    conveyor = over(loader, slots)
    Rehearsal(conveyor, loader).play(script)
    assert all_is_over(conveyor)
