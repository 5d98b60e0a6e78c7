"""Sharing missing experts between link and host: the walk as published, the split against brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.host_assist import Split, fastest_split, two_ended_walk

NAN = math.nan


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# --- two-ended walk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "host_s", "split"),
    [
        ([], 1.0, Split((), (), 0.0)),
        ([0.5], 1.0, Split((0,), (), 3.0)),  # a lone miss is loaded, though the host is three times faster
        ([0.1, 0.5], 1.0, Split((1,), (0,), 3.0)),  # the best-scored is loaded
        ([0.1, 0.5, 0.3], 1.0, Split((1,), (2, 0), 3.0)),
        ([0.1, 0.5, 0.3, 0.2], 1.0, Split((1,), (2, 3, 0), 3.0)),
        ([0.5, 0.4, 0.3, 0.2, 0.1], 1.0, Split((0, 1), (2, 3, 4), 6.0)),
        ([0.1, 0.1, 0.1], 1.0, Split((0,), (1, 2), 3.0)),  # ties go to the lower index
        ([0.1, 0.5, 0.3], None, Split((1, 2, 0), (), 9.0)),  # no core to spare
        ([0.1, 0.5, 0.3], 9.0, Split((1, 2), (0,), 9.0)),
    ],
)
def test_the_walk_balances_link_and_host(scores: list[float], host_s: float | None, split: Split) -> None:
    assert two_ended_walk(array(*scores), 3.0, host_s) == split


# --- fastest split --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "host_s", "split"),
    [
        ([], 1.0, Split((), (), 0.0)),
        ([0.5], 1.0, Split((), (0,), 1.0)),  # a lone miss goes where it is done first
        ([0.5], 4.0, Split((0,), (), 3.0)),
        ([0.1, 0.5, 0.3], 1.0, Split((1,), (2, 0), 3.0)),  # as fast as all on the host, and one more is resident
        ([0.5, 0.4, 0.3, 0.2, 0.1], 1.0, Split((0,), (1, 2, 3, 4), 4.0)),
        ([0.1, 0.1, 0.1], 1.0, Split((0,), (1, 2), 3.0)),
        ([0.1, 0.5, 0.3], None, Split((1, 2, 0), (), 9.0)),
    ],
)
def test_the_split_is_the_fastest(scores: list[float], host_s: float | None, split: Split) -> None:
    assert fastest_split(array(*scores), 3.0, host_s) == split


def test_a_busy_side_gets_less() -> None:
    scores_N = array(0.4, 0.3, 0.2)
    assert fastest_split(scores_N, 3.0, 1.0, link_busy_s=2.0) == Split((), (0, 1, 2), 3.0)
    assert fastest_split(scores_N, 3.0, 1.0, host_busy_s=3.0) == Split((0,), (1, 2), 5.0)
    assert fastest_split(scores_N, 3.0, 1.0, host_busy_s=9.0) == Split((0, 1, 2), (), 9.0)


def test_a_busy_side_without_work_is_not_waited_for() -> None:
    assert fastest_split(array(0.5), 3.0, 1.0, link_busy_s=50.0).finish_s == 1.0
    assert fastest_split(array(0.5), 3.0, 1.0, host_busy_s=50.0).finish_s == 3.0


def test_a_load_that_is_worth_its_time_later_is_made() -> None:
    scores_N = array(0.5, 0.4)
    assert fastest_split(scores_N, 3.0, 1.0) == Split((), (0, 1), 2.0)
    assert fastest_split(scores_N, 3.0, 1.0, load_worth_s=array(0.0, 1.5)) == Split((1,), (0,), 3.0)
    assert fastest_split(scores_N, 3.0, 1.0, load_worth_s=array(4.0, 4.0)) == Split((0, 1), (), 6.0)


def test_an_expert_in_flight_is_not_loaded_again() -> None:
    assert fastest_split(array(0.5, 0.4), 3.0, 1.0, remaining_s=array(0.5, NAN)) == Split((), (1,), 1.0)
    assert fastest_split(array(0.5, 0.4), 3.0, None, remaining_s=array(0.5, NAN), link_busy_s=0.5) == Split(
        (1,), (), 3.5
    )


def test_an_expert_long_in_flight_is_computed_on_the_host() -> None:
    assert fastest_split(array(0.5), 3.0, 1.0, remaining_s=array(2.5)) == Split((), (0,), 1.0)
    assert fastest_split(array(0.5), 3.0, 1.0, remaining_s=array(1.0)) == Split((), (), 1.0), "among equals it waits"
    assert fastest_split(array(0.5), 3.0, None, remaining_s=array(2.5)) == Split((), (), 2.5)


def test_the_longest_wait_goes_to_the_host_first() -> None:
    split = fastest_split(array(0.5, 0.4, 0.3), 9.0, 2.0, remaining_s=array(3.0, 5.0, 1.0))
    assert split == Split((), (1,), 3.0)


times = st.integers(0, 8).map(float)
worths = st.integers(-2, 6).map(float)
missing = st.lists(st.tuples(st.integers(0, 3), worths, st.none() | times), max_size=5)


@given(missing, times, times, times, times)
def test_no_other_split_is_better(
    experts: list[tuple[int, float, float | None]], load_s: float, host_s: float, link_busy_s: float, host_busy_s: float
) -> None:
    scores, worth, flight = zip(*experts, strict=True) if experts else ((), (), ())

    def cost(hosted: tuple[bool, ...]) -> tuple[float, float]:
        """Seconds until all are done, and less what loads are worth, in plain sums."""
        loads = [n for n, on_host in enumerate(hosted) if not on_host and flight[n] is None]
        waits = [left for left, on_host in zip(flight, hosted, strict=True) if not on_host and left is not None]
        link_s = link_busy_s + len(loads) * load_s if loads else 0.0
        cpu_s = host_busy_s + sum(hosted) * host_s if any(hosted) else 0.0
        finish_s = max(link_s, cpu_s, *waits, 0.0)
        return finish_s, finish_s - sum(worth[n] for n in loads)

    split = fastest_split(
        array(*scores),
        load_s,
        host_s,
        link_busy_s=link_busy_s,
        host_busy_s=host_busy_s,
        load_worth_s=array(*worth),
        remaining_s=array(*(NAN if left is None else left for left in flight)),
    )
    hosted = tuple(n in split.host for n in range(len(experts)))
    finish_s, least = cost(hosted)
    assert set(split.load) == {n for n in range(len(experts)) if not hosted[n] and flight[n] is None}
    assert split.finish_s == finish_s
    assert least == min(cost(other)[1] for other in itertools.product([False, True], repeat=len(experts)))


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.1, 9), st.floats(0.1, 9))
def test_the_split_is_never_slower_than_the_walk(scores: list[float], load_s: float, host_s: float) -> None:
    scores_N = array(*scores)
    assert fastest_split(scores_N, load_s, host_s).finish_s <= two_ended_walk(scores_N, load_s, host_s).finish_s


@given(st.lists(st.floats(0, 1), max_size=12), st.none() | st.floats(0.1, 9))
def test_every_expert_goes_one_way_and_better_scores_are_loaded(scores: list[float], host_s: float | None) -> None:
    for split in (two_ended_walk(array(*scores), 3.0, host_s), fastest_split(array(*scores), 3.0, host_s)):
        assert sorted([*split.load, *split.host]) == list(range(len(scores)))
        in_order = [scores[n] for n in (*split.load, *split.host)]
        assert in_order == sorted(scores, reverse=True)
