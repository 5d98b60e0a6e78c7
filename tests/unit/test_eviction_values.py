"""What keeps an expert in its slot: score, frequency, or knowledge of the future."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.eviction import (
    LONGEST_SCORE_WINDOW,
    ScoreWindow,
    UseCounts,
    clairvoyant_victim,
    lowest_value,
)

INF = float("inf")


def scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def bools(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=bool)


# --- victims --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "evictable", "victim"),
    [
        ([0.5, 0.3, 0.9], [1, 1, 1], 1),
        ([0.5, 0.3, 0.9], [1, 0, 1], 0),  # the lowest is shielded
        ([0.4, 0.4, 0.4], [0, 1, 1], 1),  # ties go to the lower slot
        ([0.5, 0.3], [0, 0], None),
        ([], [], None),
    ],
)
def test_the_slot_of_the_lowest_value_is_given_up(value: list[float], evictable: list[int], victim: int | None) -> None:
    assert lowest_value(np.array(value), bools(evictable)) == victim


@pytest.mark.parametrize(
    ("next_use", "evictable", "victim"),
    [
        ([7, 9, 8], [1, 1, 1], 1),
        ([7, 9, 8], [1, 0, 1], 2),
        ([7, INF, INF], [1, 1, 1], 1),  # never again; ties go to the lower slot
        ([7, 9], [0, 0], None),
        ([], [], None),
    ],
)
def test_who_knows_the_future_gives_up_what_is_needed_last(
    next_use: list[float], evictable: list[int], victim: int | None
) -> None:
    assert clairvoyant_victim(np.array(next_use), bools(evictable)) == victim


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20))
def test_the_victim_is_evictable_and_worth_least(slots: list[tuple[int, bool]]) -> None:
    value_S = np.array([value for value, _ in slots], dtype=np.int64)
    evictable_S = np.array([can for _, can in slots], dtype=bool)
    allowed = [slot for slot, (_, can) in enumerate(slots) if can]
    assert lowest_value(value_S, evictable_S) == min(allowed, key=lambda slot: (value_S[slot], slot), default=None)
    assert clairvoyant_victim(value_S, evictable_S) == min(
        allowed, key=lambda slot: (-value_S[slot], slot), default=None
    )


def misses(uses: list[int], slots: int, farthest: bool) -> int:
    """Loads of a cache that knows the future: gives up what is needed last, or (wrongly) first."""
    held: list[int] = []
    count = 0
    for now, expert in enumerate(uses):
        if expert in held:
            continue
        count += 1
        if len(held) < slots:
            held.append(expert)
            continue
        later = [next((then for then in range(now, len(uses)) if uses[then] == one), INF) for one in held]
        evictable_S = np.ones(slots, dtype=bool)
        choose = clairvoyant_victim if farthest else lowest_value
        held[choose(np.array(later), evictable_S)] = expert
    return count


@given(st.lists(st.integers(0, 4), max_size=30))
def test_knowing_the_future_is_never_worse_than_misusing_it(uses: list[int]) -> None:
    assert misses(uses, 2, farthest=True) <= misses(uses, 2, farthest=False)


# --- score ----------------------------------------------------------------------------------------------


def test_the_mean_is_over_the_last_steps_of_the_layer() -> None:
    window = ScoreWindow(layers=2, experts=2, window=2)
    means = []
    for step in ([0.5, 0.0], [0.25, 0.5], [0.75, 0.0]):
        window.observe(1, scores(*step))
        means.append(window.mean_LE[1].tolist())
    assert means == [[0.5, 0.0], [0.375, 0.25], [0.5, 0.25]]
    assert window.mean_LE[0].tolist() == [0.0, 0.0], "a layer without a step"


def test_layers_do_not_mix() -> None:
    window = ScoreWindow(layers=2, experts=1, window=8)
    window.observe(0, scores(0.5))
    window.observe(1, scores(0.25))
    assert window.mean_LE.tolist() == [[0.5], [0.25]]


def test_the_mean_is_an_array_to_gather_from() -> None:
    window = ScoreWindow(layers=2, experts=3, window=4)
    mean_LE = window.mean_LE
    window.observe(0, scores(0.5, 0.25, 0.125))
    layers_S, experts_S = np.array([0, 1, 0]), np.array([2, 2, 0])
    assert mean_LE[layers_S, experts_S].tolist() == [0.125, 0.0, 0.5]


def test_a_score_that_is_no_number_counts_as_nothing() -> None:
    window = ScoreWindow(layers=1, experts=2, window=2)
    window.observe(0, scores(float("nan"), 0.5))
    window.observe(0, scores(0.5, 0.5))
    assert window.mean_LE.tolist() == [[0.25, 0.5]]


def test_the_running_sum_does_not_drift() -> None:
    """Scores of very different size: a float32 sum would keep the rounding of the large ones for ever."""
    random = np.random.default_rng(0)
    window = ScoreWindow(layers=1, experts=16, window=5)
    steps = (10.0 ** random.uniform(-9, 0, size=(10_003, 16))).astype(np.float32)
    for step_E in steps:
        window.observe(0, step_E)
    np.testing.assert_allclose(window.mean_LE[0], steps[-5:].mean(axis=0, dtype=np.float64), rtol=1e-6)


@given(st.integers(1, 5), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_the_mean_is_that_of_the_last_observations(length: int, values: list[float]) -> None:
    window = ScoreWindow(layers=1, experts=1, window=length)
    for value in values:
        window.observe(0, scores(value))
    assert window.mean_LE[0, 0] == pytest.approx(np.mean(values[-length:]), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("length", [0, -1, LONGEST_SCORE_WINDOW + 1])
def test_a_window_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"score_window must be 1 to 1024 steps, not {length}"):
        ScoreWindow(layers=1, experts=1, window=length)


# --- frequency ------------------------------------------------------------------------------------------


def test_uses_are_counted_per_expert() -> None:
    counts = UseCounts(layers=2, experts=3)
    counts.observe(0, np.array([0, 2]))
    counts.observe(0, np.array([2, 2]))
    counts.observe(1, np.array([1]))
    assert counts.counts_LE.tolist() == [[1, 0, 3], [0, 1, 0]]


def test_old_uses_fade_where_asked() -> None:
    counts = UseCounts(layers=2, experts=2, half_life=2)
    for _ in range(3):
        counts.observe(0, np.array([1]))
    counts.observe(1, np.array([1]))
    assert counts.counts_LE.tolist() == [[0, 2], [0, 1]], "two steps halved to 1, and one since"


def test_a_half_life_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="half_life must be at least 1 step, not 0"):
        UseCounts(layers=1, experts=1, half_life=0)
