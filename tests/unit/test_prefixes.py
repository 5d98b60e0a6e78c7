"""Kept caches: who finds which, and which have to go."""

import numpy as np
import pytest
import torch

from raymoe.engine.prefixes import FEWEST_TOKENS, Kept, PrefixStore, in_common
from raymoe.model.runner import SequenceState

LONG = list(range(100, 100 + 3 * FEWEST_TOKENS))


def kept(tokens: list[int], nbytes: int = 10, alpha: float = 0.0) -> Kept:
    state = SequenceState(torch.empty(0), {}, len(tokens))
    return Kept(tokens=np.array(tokens, dtype=np.int64), state=state, nbytes=nbytes, alpha=alpha)


def test_the_longest_common_beginning_is_found() -> None:
    store = PrefixStore(100)
    short, long = kept([*LONG[:20], 1]), kept([*LONG[:30], 1])
    store.put(short, None)
    store.put(long, None)
    assert store.find([*LONG, 5], 0.0) == (long, 30)
    assert store.find([*LONG[:20], 1, 2, 3], 0.0) == (short, 21)
    assert store.find([9, *LONG], 0.0) is None


def test_one_token_is_left_to_read() -> None:
    store = PrefixStore(100)
    store.put(kept(LONG), None)
    found = store.find(LONG, 0.0)
    assert found is not None and found[1] == len(LONG) - 1


def test_what_is_hardly_in_common_is_not_worth_copying() -> None:
    store = PrefixStore(100)
    store.put(kept([*LONG[: FEWEST_TOKENS - 1], 1]), None)
    assert store.find(LONG, 0.0) is None
    store.put(kept([*LONG[:FEWEST_TOKENS], 1]), None)
    assert store.find(LONG, 0.0) is not None


def test_the_least_recently_used_goes() -> None:
    store = PrefixStore(30)
    caches = [kept([number, *LONG]) for number in range(3)]
    for cache in caches:
        store.put(cache, None)
    store.find([0, *LONG], 0.0)
    store.put(kept([3, *LONG]), None)
    assert store.nbytes == 30
    assert store.find([1, *LONG], 0.0) is None and store.find([0, *LONG], 0.0) is not None


@pytest.mark.parametrize(("room", "stays"), [(9, False), (10, True), (None, True)])
def test_only_what_there_is_room_for_is_kept(room: int | None, stays: bool) -> None:
    store = PrefixStore(100)
    store.put(kept(LONG), room)
    assert len(store) == stays
    store.shrink_to(9)
    assert len(store) == 0 and store.nbytes == 0


def test_nothing_is_kept_where_nothing_may_be() -> None:
    store = PrefixStore(0)
    store.put(kept(LONG), None)
    assert len(store) == 0


def test_a_longer_history_takes_the_place_of_its_beginning() -> None:
    store = PrefixStore(100)
    store.put(kept(LONG[:20]), None)
    store.put(kept(LONG), None)
    store.put(kept(LONG[:25]), None)
    assert [len(each.tokens) for each in store._kept] == [len(LONG)]


def test_what_substituted_experts_computed_serves_no_exact_request() -> None:
    store = PrefixStore(100)
    store.put(kept(LONG, alpha=0.25), None)
    assert store.find(LONG, 0.0) is None and store.find(LONG, 0.2) is None
    assert store.find(LONG, 0.25) is not None
    store.put(kept(LONG[:20]), None)
    exact = store.find(LONG, 0.1)
    assert exact is not None and exact[1] == 20


def test_running_ones_are_found_too() -> None:
    found = PrefixStore(100).find(LONG, 0.0, [kept(LONG[:20])])
    assert found is not None and found[1] == 20


def test_in_common() -> None:
    one = np.array([1, 2, 3])
    assert [in_common(one, np.array(other, dtype=np.int64)) for other in ([], [1], [1, 2, 4], [1, 2, 3, 4], [2])] == [
        0, 1, 2, 3, 0,
    ]  # fmt: skip
