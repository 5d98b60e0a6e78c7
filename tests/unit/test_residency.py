"""Who sits in which slot: shields, turns of eviction, each layer's share, and books that stay consistent."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymoe.experts.call import expert_id, layer_and_expert
from raymoe.experts.slots import Residency


def claim(residency: Residency, expert: int) -> tuple[int, int | None] | None:
    """Claim a slot, at the cost of the least recently used."""
    return residency.claim(expert, residency.victim(layer_and_expert(expert)[0], residency.last_use_S))


def fill(residency: Residency, *experts: int) -> None:
    for expert in experts:
        claimed = claim(residency, expert)
        assert claimed is not None
        residency.mark_ready(claimed[0])


def test_the_least_recently_used_expert_is_evicted() -> None:
    residency = Residency(3, 1, 8)
    fill(residency, 0, 1, 2)
    residency.use([residency.slot_of[0]])
    residency.unshield(slice(None))
    assert claim(residency, 5) == (1, 1)


def test_a_slot_that_was_chosen_is_emptied_though_another_is_free_by_now() -> None:
    residency = Residency(2, 1, 8)
    fill(residency, 0, 1)
    chosen = residency.slot_of[1]
    residency.abandon(residency.slot_of[0])
    assert residency.claim(5, chosen) == (chosen, 1), "it may have been loaded already"
    assert residency.claim(6, None) is not None and residency.slot_of[6] != chosen


def test_shielded_experts_are_not_evicted() -> None:
    residency = Residency(2, 1, 8)
    fill(residency, 0, 1)
    residency.use([residency.slot_of[0]])
    assert claim(residency, 5) == (1, 1)
    assert claim(residency, 6) is None, "one is shielded, the other loading"


def test_loading_experts_are_not_evicted() -> None:
    residency = Residency(1, 1, 8)
    claim(residency, 0)
    assert residency.victim(0, residency.last_use_S) is None
    assert claim(residency, 1) is None


def test_a_free_slot_is_taken_before_anyone_is_evicted() -> None:
    residency = Residency(2, 1, 8)
    fill(residency, 0)
    assert residency.victim(0, residency.last_use_S) is None
    claimed = claim(residency, 1)
    assert claimed is not None and claimed[1] is None


def test_an_abandoned_load_frees_its_slot() -> None:
    residency = Residency(1, 1, 8)
    claim(residency, 3)
    residency.abandon(0)
    assert residency.find(3) is None
    assert residency.ready_slot_LE.tolist() == [[-1] * 8]
    assert claim(residency, 4) == (0, None)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("cmaus"), st.integers(0, 7)), max_size=60))
def test_books_stay_consistent(slots: int, operations: list[tuple[str, int]]) -> None:
    residency = Residency(slots, 2, 4)
    for operation, number in operations:
        expert = expert_id(number // 4, number % 4)
        slot = residency.find(expert)
        if operation == "c" and slot is None:
            claim(residency, expert)
        elif operation == "m" and slot is not None:
            residency.mark_ready(slot)
        elif operation == "a" and slot is not None and not residency.ready_S[slot]:
            residency.abandon(slot)
        elif operation == "u" and slot is not None:
            residency.use([slot])
        elif operation == "s":
            residency.unshield(slice(None))
        occupied = {slot: expert for slot, expert in enumerate(residency.expert_in) if expert is not None}
        assert {expert: slot for slot, expert in occupied.items()} == residency.slot_of
        ready = {
            expert_id(layer, index): int(residency.ready_slot_LE[layer, index])
            for layer, index in zip(*np.nonzero(residency.ready_slot_LE >= 0), strict=True)
        }
        assert ready == {expert: slot for slot, expert in occupied.items() if residency.ready_S[slot]}


def test_the_lowest_value_is_evicted() -> None:
    residency = Residency(3, 1, 8)
    fill(residency, 0, 1, 2)
    assert residency.victim(0, np.array([0.3, 0.2, 0.5])) == 1


def test_a_layer_that_has_its_share_evicts_its_own() -> None:
    residency = Residency(4, 2, 8)
    fill(residency, *(expert_id(layer, expert) for layer in (0, 1) for expert in (0, 1)))
    assert claim(residency, expert_id(1, 5)) == (2, expert_id(1, 0))


def test_a_layer_below_its_share_takes_from_one_above() -> None:
    residency = Residency(4, 2, 8)
    fill(residency, expert_id(1, 0), *(expert_id(0, expert) for expert in (0, 1, 2)))
    assert claim(residency, expert_id(1, 5)) == (1, expert_id(0, 0))


def test_shares_are_no_reason_to_refuse() -> None:
    residency = Residency(4, 2, 8)
    fill(residency, *(expert_id(layer, expert) for layer in (0, 1) for expert in (0, 1)))
    residency.use([2, 3])
    assert claim(residency, expert_id(1, 5)) == (0, expert_id(0, 0))
