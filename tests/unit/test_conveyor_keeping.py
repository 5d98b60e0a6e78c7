"""Slots for orders that keep what is not needed: orders before keeping, the known future before worth, no slot idle."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import LoadCancelledError
from raymoe.experts.call import expert_id
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.link import MemoryLink
from raymoe.experts.loader import ON_DEMAND, PREFETCH, ThreadLoader
from raymoe.placement.keeping import Keeper
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
from tests.manual_loader import ManualLoader


def keeping(slots: int, eviction: str = "score", fails: Iterable[int] = ()) -> tuple[Conveyor, ManualLoader]:
    conveyor, loader = make(slots, fails)
    conveyor.keeper = Keeper(eviction, LAYERS, EXPERTS, window=4)
    return conveyor, loader


def score(conveyor: Conveyor, layer: int, **worth: float) -> None:
    """What the keeper thinks of experts, by name ("e5")."""
    assert conveyor.keeper is not None
    scores_E = np.zeros(EXPERTS, dtype=np.float32)
    for name, value in worth.items():
        scores_E[int(name[1:])] = value
    for _ in range(4):
        conveyor.keeper.step(layer, scores_E, np.empty(0, dtype=np.int32), 1)


def test_what_was_used_stays_while_its_slot_is_not_needed() -> None:
    conveyor, loader = keeping(slots=3)
    assert call(conveyor, [1, 2]) == [1, 2]
    assert conveyor.resident() == [1, 2]
    assert call(conveyor, [2, 3]) == [2, 3]
    assert (conveyor.counters.hits, conveyor.counters.misses, conveyor.counters.loads) == (1, 3, 3)
    assert [expert for expert, _ in loader.started] == [1, 2, 3]


def test_what_is_worth_least_gives_way_to_a_call() -> None:
    conveyor, _ = keeping(slots=3)
    call(conveyor, [1, 2, 3])
    score(conveyor, 0, e1=0.5, e2=0.1, e3=0.3)
    call(conveyor, [4])
    assert conveyor.resident() == [1, 3, 4]


@pytest.mark.parametrize(("eviction", "gone"), [("lru", 2), ("lfu", 3)])
def test_other_rules_of_eviction_are_in_force_too(eviction: str, gone: int) -> None:
    conveyor, _ = keeping(slots=3, eviction=eviction)
    for experts in ([2], [2], [1], [1], [3]):
        call(conveyor, experts)
    call(conveyor, [4])
    assert conveyor.resident() == sorted({1, 2, 3, 4} - {gone})


def test_an_order_takes_the_place_of_what_is_worth_least() -> None:
    conveyor, loader = keeping(slots=2)
    call(conveyor, [1, 2])
    score(conveyor, 0, e1=0.1, e2=0.5)
    order(conveyor, [5], position=1)
    assert conveyor.resident() == [2, 5] and loader.started[-1] == (5, PREFETCH)


def test_an_order_for_what_is_kept_costs_no_load_and_keeps_it() -> None:
    conveyor, loader = keeping(slots=2)
    call(conveyor, [1, 2])
    score(conveyor, 0, e1=0.1, e2=0.5)
    order(conveyor, [1], position=1)
    order(conveyor, [5], position=1, layer=1)
    finish_all(conveyor, loader)
    assert conveyor.resident() == [1, expert_id(1, 5)], "worth less, but needed"
    assert call(conveyor, [1], step=step_id(1)) == [1]
    assert conveyor.counters.loads == 3


def test_slots_are_emptied_for_orders_only_when_the_link_is_free() -> None:
    conveyor, loader = keeping(slots=3)
    call(conveyor, [1, 2, 3])
    order(conveyor, [5, 6], position=1)
    assert len(conveyor.resident()) == 3 and [expert for expert, _ in loader.started][3:] == [5]
    finish_all(conveyor, loader)
    assert [expert for expert, _ in loader.started][3:] == [5, 6]


def test_what_is_used_later_gives_way_to_what_is_used_before() -> None:
    conveyor, loader = keeping(slots=2)
    call(conveyor, [1, 2])
    order(conveyor, [5], position=1)  # its load takes one of the two slots
    score(conveyor, 0, e1=0.5, e2=0.5)
    kept = next(expert for expert in conveyor.resident() if expert != 5)
    order(conveyor, [6], position=1, layer=1)
    order(conveyor, [kept], position=2)
    finish_all(conveyor, loader)
    assert conveyor.resident() == [5, expert_id(1, 6)], "it would have been used, but after the others"
    call(conveyor, [5], step=step_id(1))
    finish_all(conveyor, loader)
    assert conveyor.resident() == [kept, expert_id(1, 6)], "its turn has come"


def test_what_is_used_before_does_not_give_way_to_what_is_used_later() -> None:
    conveyor, loader = keeping(slots=2)
    order(conveyor, [1, 2], position=1)
    order(conveyor, [5], position=2)
    finish_all(conveyor, loader)
    assert conveyor.resident() == [1, 2] and [expert for expert, _ in loader.started] == [1, 2]


def test_a_load_that_nobody_wants_any_more_is_cancelled_but_what_is_here_stays() -> None:
    conveyor, loader = keeping(slots=3)
    order(conveyor, [1, 2], position=1)
    loader.tickets[1].finish()
    conveyor.forget(1)
    assert conveyor.resident() == [1]
    assert isinstance(loader.tickets[2].error, LoadCancelledError)


def test_a_call_takes_what_is_kept_before_what_is_ordered() -> None:
    conveyor, loader = keeping(slots=2)
    call(conveyor, [1])
    order(conveyor, [5], position=1, layer=1)
    finish_all(conveyor, loader)
    step = begin(conveyor, [6], step=step_id(1))
    assert conveyor.resident() == [6, expert_id(1, 5)] and loader.started[-1] == (6, ON_DEMAND)
    deliver(conveyor, step)
    conveyor.end_step()


def test_another_keeper_judges_from_now_on_and_where_nothing_is_kept_there_is_none() -> None:
    conveyor, _ = keeping(slots=2)
    call(conveyor, [1])
    call(conveyor, [2])
    score(conveyor, 0, e1=0.5)
    conveyor.replace_keeper(Keeper("lru", LAYERS, EXPERTS, window=4))
    call(conveyor, [3])
    assert conveyor.resident() == [2, 3], "1 scores higher, 2 was used later"
    plain, _ = make(slots=2)
    plain.replace_keeper(Keeper("lru", LAYERS, EXPERTS, window=4))
    assert plain.keeper is None


def test_residency_changes_lead_from_one_call_to_the_next() -> None:
    conveyor, loader = keeping(slots=3)
    check_changes(conveyor, loader, ([0], [1, 2, 3], [5, 0], [6, 7], [5]))


# --- whatever comes -------------------------------------------------------------------------------------


def nobody_waits(conveyor: Conveyor) -> bool:
    """What is in slots is kept, not claimed by anybody."""
    return not len(conveyor._timetable) and not conveyor._cancelled and not conveyor._tickets


@given(
    st.integers(1, 5),
    st.sampled_from(["score", "lru", "lfu"]),
    st.sampled_from([0, 1, 4]),
    st.sets(st.integers(0, 3)),
    st.lists(events, max_size=40),
)
def test_every_call_is_served_and_nothing_is_claimed_for_ever(
    slots: int, eviction: str, reluctance: int, fails: set[int], script: list[tuple]
) -> None:
    conveyor, loader = keeping(slots, eviction, fails)
    loader.reluctance = reluctance
    Rehearsal(conveyor, loader, fails).play(script)
    assert nobody_waits(conveyor)


@given(st.integers(1, 4), st.lists(events, max_size=25))
def test_the_same_with_a_loader_on_a_thread(slots: int, script: list[tuple]) -> None:
    loader = ThreadLoader(MemoryLink(), "test")
    conveyor = over(loader, slots)
    conveyor.keeper = Keeper("score", LAYERS, EXPERTS, window=4)
    Rehearsal(conveyor, loader).play(script)
    assert nobody_waits(conveyor)


# --- loads saved ----------------------------------------------------------------------------------------


def fewest_loads(uses: list[int], slots: int) -> int:
    """Loads of a clairvoyant (Belady) who is asked for one expert at a time."""
    held: set[int] = set()
    loads = 0
    for place, expert in enumerate(uses):
        if expert not in held:
            loads += 1
            if len(held) == slots:
                coming = uses[place + 1 :]
                held.remove(max(held, key=lambda other: coming.index(other) if other in coming else len(uses)))
            held.add(expert)
    return loads


@given(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=24), st.integers(1, EXPERTS))
def test_with_the_future_known_nobody_waits_and_what_is_kept_saves_loads(uses: list[int], slots: int) -> None:
    """All is ordered ahead, one expert for each call."""
    conveyor, loader = keeping(slots)
    for position, expert in enumerate(uses):
        order(conveyor, [expert], position=position + 1)
    for position, expert in enumerate(uses):
        finish_all(conveyor, loader)
        assert call(conveyor, [expert], step=step_id(position + 1)) == [expert]
    assert conveyor.counters.misses == 0
    assert fewest_loads(uses, slots) <= conveyor.counters.loads <= len(uses)
    assert slots < EXPERTS or conveyor.counters.loads == len(set(uses))


def test_the_clairvoyant_counts_right() -> None:
    assert fewest_loads([1, 2, 1, 3, 2, 1], 2) == 4
