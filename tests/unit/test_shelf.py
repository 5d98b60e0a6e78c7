"""Slots and loads together: hits, misses, prefetches, host assist, and failures that surface where they belong."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from raymoe.errors import LoadCancelledError
from raymoe.experts.bay import Step
from raymoe.experts.costs import Cost
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import ON_DEMAND, PREFETCH
from raymoe.experts.shelf import Shelf
from raymoe.experts.slots import Residency, SlotPool
from raymoe.placement.keeping import Keeper
from raymoe.types import ExpertKey
from tests.manual_loader import LOAD_S, ManualLoader

EXPERT_BYTES = 8  # of the shelf's experts: two float32


def make_shelf(
    slots: int, experts: int = 8, fails: Iterable[int] = (), host_s: float | None = None
) -> tuple[Shelf, ManualLoader]:
    """A shelf for two layers, whose expert e holds the number e in both."""
    store = HostStore(lambda key: {name: torch.full((1,), float(key.expert)) for name in ("up_proj", "down_proj")})
    store.load(ExpertKey(layer=layer, expert=expert) for layer in (0, 1) for expert in range(experts))
    pool = SlotPool({"up_proj": (1,), "down_proj": (1,)}, slots, torch.float32, torch.device("cpu"))
    loader = ManualLoader(fails=set(fails))
    shelf = Shelf(
        pool,
        Residency(slots, 2, experts, sharing=1),
        loader,
        store,
        EXPERT_BYTES,
        Keeper("score", 2, experts, window=4),
        host_cost=None if host_s is None else Cost(host_s),
    )
    loader.on_idle = shelf.on_idle
    return shelf, loader


def run_step(shelf: Shelf, experts: list[int], scores: list[float] | None = None) -> dict[int, float]:
    """One whole layer call; returns what the slot of each expert held when it was its turn."""
    seen = serve_experts(shelf, experts, scores)
    shelf.end_step()
    return seen


def begin(shelf: Shelf, experts: list[int], scores: list[float] | None = None) -> Step:
    wanted = np.array(experts, dtype=np.int32)
    return shelf.begin_step(0, wanted, 1, None if scores is None else np.array(scores, dtype=np.float32))


def serve_experts(shelf: Shelf, experts: list[int], scores: list[float] | None = None) -> dict[int, float]:
    """A layer call without its end."""
    step = begin(shelf, experts, scores)
    ready = [slot for slot in step.slots_P.tolist() if slot >= 0]
    seen = {expert: held(shelf, slot) for expert, slot in zip(experts, step.slots_P.tolist(), strict=True) if slot >= 0}
    shelf.release(step, ready)
    while (arrived := shelf.next_arrival(step)) is not None:
        seen[arrived[0]] = held(shelf, arrived[1])
        shelf.release(step, [arrived[1]])
    return seen


def expect(shelf: Shelf, worth: dict[int, float], layer: int = 0) -> None:
    """Forecast these experts; a use in every step is worth 1, and so are the gate scores together."""
    shelf.expect(layer, np.array(list(worth), dtype=np.int64), np.array(list(worth.values()), dtype=np.float32))


def held(shelf: Shelf, slot: int) -> float:
    return shelf.pool.slots[slot]["down_proj"].item()


# --- shelf: layer calls ---------------------------------------------------------------------------------


def test_a_miss_loads_and_the_next_call_hits() -> None:
    shelf, loader = make_shelf(slots=4)
    assert run_step(shelf, [1, 2]) == {1: 1.0, 2: 2.0}
    assert run_step(shelf, [1, 2]) == {1: 1.0, 2: 2.0}
    assert loader.started == [(1, ON_DEMAND), (2, ON_DEMAND)]
    assert (shelf.counters.hits, shelf.counters.misses) == (2, 2)
    assert (shelf.counters.loads, shelf.counters.bytes_loaded) == (2, 2 * EXPERT_BYTES)


def test_an_expert_asked_for_by_several_rows_is_loaded_once() -> None:
    shelf, loader = make_shelf(slots=4)
    run_step(shelf, [3, 3, 3])
    assert loader.started == [(3, ON_DEMAND)]
    assert shelf.counters.misses == 3


def test_loads_of_a_step_evict_no_expert_of_the_step() -> None:
    shelf, _ = make_shelf(slots=3)
    run_step(shelf, [0])
    run_step(shelf, [1, 2])
    assert run_step(shelf, [0, 3, 4]) == {0: 0.0, 3: 3.0, 4: 4.0}
    assert shelf.resident() == [0, 3, 4]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_experts_than_slots_are_served_in_turns(slots: int) -> None:
    shelf, _ = make_shelf(slots=slots)
    wanted = [0, 2, 4, 5, 7]
    assert run_step(shelf, wanted) == {expert: float(expert) for expert in wanted}
    assert len(shelf.resident()) == slots


def test_a_slot_is_given_up_only_once_its_expert_is_computed() -> None:
    shelf, loader = make_shelf(slots=1)
    step = begin(shelf, [1, 2])
    assert shelf.next_arrival(step) == (1, 0)
    assert [expert for expert, _ in loader.started] == [1]
    shelf.release(step, [0])
    assert [expert for expert, _ in loader.started] == [1, 2]


def test_a_load_in_flight_counts_as_a_miss_and_is_hurried_but_not_started_again() -> None:
    shelf, loader = make_shelf(slots=2)
    expect(shelf, {5: 1.0})
    assert run_step(shelf, [5]) == {5: 5.0}
    assert loader.started == [(5, PREFETCH)]
    assert loader.tickets[5].hurried
    assert shelf.counters.misses == 1


def test_a_finished_prefetch_is_a_hit() -> None:
    shelf, loader = make_shelf(slots=2)
    expect(shelf, {5: 1.0})
    loader.tickets[5].finish()
    assert run_step(shelf, [5]) == {5: 5.0}
    assert (shelf.counters.hits, shelf.counters.misses) == (1, 0)


def test_a_step_waits_for_slots_that_prefetches_hold() -> None:
    shelf, loader = make_shelf(slots=1)
    expect(shelf, {5: 1.0}, layer=1)
    step = begin(shelf, [2])
    assert list(step.waiting) == [2]
    loader.tickets[5].finish()
    assert shelf.next_arrival(step) == (2, 0)
    assert held(shelf, 0) == 2.0


def changes_of(shelf: Shelf, experts: list[int]) -> tuple[set[int], set[int]]:
    serve_experts(shelf, experts)
    shelf.end_step()
    loaded, evicted, loads = shelf.take_changes()
    assert len(set(loaded)) == len(loaded) <= loads and len(set(evicted)) == len(evicted)
    return set(loaded), set(evicted)


def test_residency_changes_lead_from_one_step_to_the_next() -> None:
    """Whatever came and went within a step is not reported: a mirror that adds and removes stays true."""
    shelf, _ = make_shelf(slots=2)
    mirror: set[int] = set()
    for experts in ([0], [1], [0, 1, 2, 3, 4], [5, 6, 7], [5], [0, 5, 0, 6]):
        loaded, evicted = changes_of(shelf, experts)
        assert not loaded & evicted and evicted <= mirror and not loaded & mirror
        mirror = mirror - evicted | loaded
        assert mirror == set(shelf.resident())


def test_the_expert_of_the_lowest_mean_score_is_evicted() -> None:
    shelf, _ = make_shelf(slots=2)
    run_step(shelf, [0], scores=[0.6, 0.3, 0.1, 0, 0, 0, 0, 0])
    run_step(shelf, [1], scores=[0.5, 0.4, 0.1, 0, 0, 0, 0, 0])
    run_step(shelf, [2], scores=[0.4, 0.1, 0.5, 0, 0, 0, 0, 0])
    assert shelf.resident() == [0, 2], "1 was used last and as often, but 0 scored higher"


# --- shelf: prefetch ------------------------------------------------------------------------------------


def test_prefetch_into_a_free_slot_is_always_welcome() -> None:
    shelf, loader = make_shelf(slots=2)
    expect(shelf, {3: 0.0})
    assert loader.started == [(3, PREFETCH)]
    assert shelf.counters.prefetches == 1


def test_the_best_is_prefetched_first_and_the_next_when_the_link_is_idle() -> None:
    shelf, loader = make_shelf(slots=4)
    expect(shelf, {3: 0.1, 4: 0.3, 5: 0.2})
    assert loader.started == [(4, PREFETCH)]
    loader.tickets[4].finish()
    loader.on_idle()
    assert loader.started == [(4, PREFETCH), (5, PREFETCH)]


def test_orders_are_late_when_their_layer_has_come() -> None:
    shelf, loader = make_shelf(slots=4)
    expect(shelf, {3: 0.1, 4: 0.3, 5: 0.2})
    begin(shelf, [4])
    loader.tickets[4].finish()
    loader.on_idle()
    assert loader.started == [(4, PREFETCH)]
    assert shelf.counters.prefetches_late == 2


def test_no_prefetch_begins_while_somebody_waits_for_a_load() -> None:
    shelf, loader = make_shelf(slots=4)
    step = begin(shelf, [1])
    expect(shelf, {3: 0.9}, layer=1)
    assert loader.started == [(1, ON_DEMAND)]
    shelf.next_arrival(step)
    shelf.end_step()
    assert loader.started == [(1, ON_DEMAND), (3, PREFETCH)]


def test_a_forecast_of_the_layer_in_hand_is_late() -> None:
    shelf, loader = make_shelf(slots=1)
    expect(shelf, {5: 1.0}, layer=1)
    step = begin(shelf, [2])
    expect(shelf, {2: 1.0})
    loader.tickets[5].finish()
    loader.on_idle()
    assert loader.started == [(5, PREFETCH)], "the slot that becomes free is the waiting call's"
    assert shelf.next_arrival(step) == (2, 0)


def test_a_call_that_was_never_finished_shields_nothing() -> None:
    shelf, _ = make_shelf(slots=2)
    run_step(shelf, [0, 1])
    begin(shelf, [0, 1])
    assert run_step(shelf, [2, 3]) == {2: 2.0, 3: 3.0}


def test_cancelled_loads_are_not_counted() -> None:
    shelf, _ = make_shelf(slots=4)
    run_step(shelf, [0])
    expect(shelf, {3: 0.9})
    run_step(shelf, [0])
    shelf.on_idle()
    assert shelf.counters.loads == 1 and 3 not in shelf.resident()


def test_a_wrong_prefetch_makes_way() -> None:
    shelf, loader = make_shelf(slots=4)
    run_step(shelf, [0])
    expect(shelf, {3: 0.9})
    step = begin(shelf, [0])
    assert isinstance(loader.tickets[3].error, LoadCancelledError)
    assert step.is_ready
    shelf.end_step()
    assert run_step(shelf, [3]) == {3: 3.0}


def test_prefetch_of_what_is_there_costs_nothing_and_keeps_it() -> None:
    shelf, loader = make_shelf(slots=2)
    run_step(shelf, [3, 4], scores=[0, 0, 0, 0.1, 0.2, 0, 0, 0])
    expect(shelf, {3: 1.5}, layer=0)
    assert loader.started == [(3, ON_DEMAND), (4, ON_DEMAND)]
    expect(shelf, {6: 1.4}, layer=1)
    assert 3 in shelf.resident() and 4 not in shelf.resident(), "a forecast counts more than a mean"


def test_prefetch_is_refused_where_every_slot_is_shielded() -> None:
    shelf, _ = make_shelf(slots=2)
    run_step(shelf, [0, 1])
    begin(shelf, [0, 1])
    expect(shelf, {3: 9.0}, layer=1)
    assert shelf.counters.prefetches_refused == 1
    shelf.end_step()
    expect(shelf, {3: 9.0}, layer=1)
    assert shelf.counters.prefetches == 1


@pytest.mark.parametrize(("score", "welcome"), [(1.3, False), (1.4, False), (1.5, True)])
def test_prefetch_is_refused_where_the_victim_scored_as_well(score: float, welcome: bool) -> None:
    shelf, _ = make_shelf(slots=1)
    run_step(shelf, [2], scores=[0, 0, 0.4, 0, 0, 0, 0, 0])
    expect(shelf, {3: score})
    assert shelf.resident() == [3 if welcome else 2]


# --- shelf: host assist ---------------------------------------------------------------------------------


def warm(shelf: Shelf) -> None:
    """One load, after which the shelf knows what loads take."""
    run_step(shelf, [0])


def test_without_a_host_everything_is_loaded() -> None:
    shelf, _ = make_shelf(slots=8)
    warm(shelf)
    step = begin(shelf, [1, 2, 3], scores=[0, 0.1, 0.2, 0.3, 0, 0, 0, 0])
    assert step.hosted == () and len(step.arriving) == 3


def test_a_lone_miss_goes_to_the_faster_side() -> None:
    for host_s, hosted in ((LOAD_S / 3, (1,)), (LOAD_S * 3, ())):
        shelf, _ = make_shelf(slots=8, host_s=host_s)
        warm(shelf)
        assert begin(shelf, [1], scores=[0, 0.1, 0, 0, 0, 0, 0, 0]).hosted == hosted


def test_many_misses_are_shared_and_the_best_are_loaded() -> None:
    shelf, _ = make_shelf(slots=8, host_s=LOAD_S / 3)
    warm(shelf)
    step = begin(shelf, [1, 2, 3, 4], scores=[0, 0.1, 0.4, 0.3, 0.2, 0, 0, 0])
    assert list(step.arriving) == [2]
    assert step.hosted == (1, 3, 4)


def test_what_the_host_computed_is_loaded_when_the_link_is_free() -> None:
    shelf, loader = make_shelf(slots=8, host_s=LOAD_S / 3)
    warm(shelf)
    begin(shelf, [1], scores=[0, 0.1, 0, 0, 0, 0, 0, 0])
    assert 1 not in shelf.resident()
    shelf.end_step()
    assert loader.started[-1] == (1, PREFETCH)


# --- shelf: failing loads -------------------------------------------------------------------------------


def test_a_failing_load_surfaces_and_frees_the_slot() -> None:
    shelf, loader = make_shelf(slots=1, fails=[3])
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        run_step(shelf, [3])
    shelf.end_step()
    assert shelf.resident() == []
    loader.fails.clear()
    assert run_step(shelf, [3]) == {3: 3.0}


def test_a_failing_load_surfaces_even_if_a_prefetch_order_notices_it_first() -> None:
    shelf, loader = make_shelf(slots=2, fails=[3])
    step = begin(shelf, [3])
    loader.tickets[3].finish()
    expect(shelf, {4: 1.0})
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        shelf.next_arrival(step)


def test_a_failed_prefetch_does_not_stand_in_the_way() -> None:
    shelf, loader = make_shelf(slots=1, fails=[3])
    expect(shelf, {3: 1.0})
    loader.tickets[3].finish()
    loader.fails.clear()
    assert run_step(shelf, [3]) == {3: 3.0}


def test_a_failed_load_is_not_reported_as_loaded() -> None:
    shelf, _ = make_shelf(slots=2, fails=[3])
    with pytest.raises(OSError):
        run_step(shelf, [3])
    shelf.end_step()
    assert shelf.take_changes() == ((), (), 0)


def land(shelf: Shelf, experts: list[int], host_may: bool = False) -> list[int]:
    wanted = np.array(experts, dtype=np.int32)
    slots: list[int] = shelf.land(shelf.begin_row(0, wanted, None, host_may=host_may), wanted).tolist()
    return slots


def test_a_row_lands_in_slots() -> None:
    shelf, _ = make_shelf(slots=3)
    run_step(shelf, [4])
    assert [held(shelf, slot) for slot in land(shelf, [4, 1])] == [4.0, 1.0]


def test_a_row_whose_load_fails_ends_with_its_error() -> None:
    shelf, loader = make_shelf(slots=3, fails=[3])
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        land(shelf, [1, 3])
    loader.fails.clear()
    assert [held(shelf, slot) for slot in land(shelf, [1, 3])] == [1.0, 3.0], "it is loaded again"


def test_what_the_host_computes_of_a_row_has_no_slot_and_is_loaded_later() -> None:
    shelf, loader = make_shelf(slots=4, host_s=LOAD_S / 10)
    run_step(shelf, [0, 1])
    assert land(shelf, [1, 2, 0], host_may=True)[1] == -1
    assert shelf.counters.hosted == 0 and not loader.running()
    shelf.order_hosted()
    assert shelf.counters.hosted == 1 and loader.started[-1] == (2, PREFETCH)


def take(shelf: Shelf, experts: list[int]) -> list[float | None]:
    """What the slots of a row's experts hold; None for those that are in none."""
    slots = shelf.take(0, np.array(experts, dtype=np.int32)).tolist()
    return [None if slot < 0 else held(shelf, slot) for slot in slots]


def test_what_is_ready_of_a_row_is_taken_and_shielded() -> None:
    shelf, loader = make_shelf(slots=2)
    run_step(shelf, [4])
    assert take(shelf, [4, 1]) == [4.0, None]
    expect(shelf, {1: 0.9})
    assert take(shelf, [4, 1]) == [4.0, None], "it is on its way"
    loader.tickets[1].finish()
    assert take(shelf, [4, 1]) == [4.0, 1.0]
    expect(shelf, {7: 9.0}, layer=1)
    assert shelf.resident() == [1, 4], "both slots are shielded"


@pytest.mark.parametrize("prepared", [True, False])
def test_what_a_row_surely_needs_is_started_before_anything_else(prepared: bool) -> None:
    shelf, loader = make_shelf(slots=4)
    for experts in ([0, 1], [2, 3], [1]):
        run_step(shelf, experts, scores=[0.1] * 8)
    if prepared:
        shelf.prepare(0)
    take(shelf, [0, 5, 6, 1])
    assert shelf.start(0, [5, 6], np.array([0, 5, 6, 1], dtype=np.int32))
    assert loader.started[-2:] == [(5, ON_DEMAND), (6, ON_DEMAND)]
    assert [held(shelf, slot) for slot in land(shelf, [0, 5, 6, 1])] == [0.0, 5.0, 6.0, 1.0], "2 and 3 gave way"
    assert len(loader.started) == 6, "nothing was loaded twice"


def test_a_prefetch_that_a_row_surely_needs_is_hurried() -> None:
    shelf, loader = make_shelf(slots=4)
    expect(shelf, {5: 1.0})
    take(shelf, [5, 1])
    assert shelf.start(0, [5, 1], np.array([5, 1], dtype=np.int32))
    assert loader.tickets[5].hurried and loader.started == [(5, PREFETCH), (1, ON_DEMAND)]


def full_shelf(loads: list[int]) -> tuple[Shelf, ManualLoader]:
    """Four slots that hold 0 to 3; a row of these is taken and its loads are begun."""
    shelf, loader = make_shelf(slots=4)
    for experts in ([0, 1], [2, 3]):
        run_step(shelf, experts, scores=[0.1] * 8)
    take(shelf, [*loads, 3])
    assert shelf.start(0, loads, np.array([*loads, 3], dtype=np.int32))
    return shelf, loader


def test_what_a_row_needs_keeps_its_slot_when_its_load_has_ended() -> None:
    shelf, loader = full_shelf([5, 6])
    loader.tickets[5].finish()
    for layer in (0, 1):
        expect(shelf, dict.fromkeys([1, 2, 4, 7], 9.0), layer=layer)
        shelf.on_idle()
    row = np.array([5, 6, 3], dtype=np.int32)
    wanted = lambda: expect(shelf, dict.fromkeys([1, 2, 4, 7], 9.0), layer=1)  # noqa: E731
    slots = shelf.arrive(0, row, wanted).tolist()
    shelf.on_idle()
    assert [held(shelf, slot) for slot in slots] == [5.0, 6.0, 3.0]
    assert {3, 5, 6} <= set(shelf.resident())


def test_orders_for_the_layer_in_hand_begin_no_more_when_its_row_is_there() -> None:
    shelf, loader = full_shelf([5, 6])
    expect(shelf, {7: 9.0})
    late, begun = shelf.counters.prefetches_late, len(loader.started)
    shelf.arrive(0, np.array([5, 6, 3], dtype=np.int32), lambda: None)
    assert shelf.counters.prefetches_late == late + 1 and len(loader.started) == begun


def test_a_cancelled_prefetch_is_begun_anew_for_a_row() -> None:
    shelf, loader = make_shelf(slots=4)
    expect(shelf, {5: 1.0})
    loader.tickets[5].cancel()
    assert shelf.start(0, [5], np.array([5], dtype=np.int32))
    assert loader.started == [(5, PREFETCH), (5, ON_DEMAND)]
    assert held(shelf, int(shelf.arrive(0, np.array([5], dtype=np.int32), lambda: None)[0])) == 5.0


def test_after_a_row_forecasts_of_its_layer_are_for_the_next_step() -> None:
    shelf, loader = make_shelf(slots=4)
    land(shelf, [0])
    shelf.order_hosted()
    expect(shelf, {7: 9.0})
    assert loader.started[-1] == (7, PREFETCH)
