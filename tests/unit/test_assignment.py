"""Assignment of a layer's experts to workers: exact against brute force, whole, stable, fair."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import ExpertUnavailableError
from raymoe.placement.assignment import WORTHWHILE, Fleet, assign, fleet_of, reassign, spread
from raymoe.types import DeviceName, ExpertKey, LayerSize


def fleet(
    workers: int = 4,
    group_size: int = 4,
    *,
    experts: int = 8,
    layers: int = 2,
    owned: dict[int, tuple[int, ...]] | None = None,
    load_s: list[float] | None = None,
    slots: tuple[int, ...] | None = None,
) -> Fleet:
    """Everybody owns everything, unless ``owned`` names the owners of an expert, the same in every layer."""
    owners_WE = np.ones((workers, experts), dtype=bool)
    for expert, owners in (owned or {}).items():
        owners_WE[:, expert] = [worker in owners for worker in range(workers)]
    return Fleet(
        workers=workers,
        group_size=group_size,
        owners_LWE=(owners_WE,) * layers,
        load_s_W=None if load_s is None else np.array(load_s),
        slots_W=slots,
    )


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, dtype=np.int32)


def makespan(worker_N: list[int], loads_s: tuple[float, ...], busy_s: list[float]) -> float:
    """When the last of these loads is done."""
    return max(
        (busy_s[worker] + worker_N.count(worker) * loads_s[worker] for worker in set(worker_N)),
        default=0.0,
    )


# --- groups ---------------------------------------------------------------------------------------------


def test_layers_go_round_the_groups() -> None:
    cluster = fleet(8, 4)
    assert [cluster.group_of(layer) for layer in range(3)] == [(0, 2, 4, 6), (1, 3, 5, 7), (0, 2, 4, 6)]


def test_fewer_workers_than_a_group_are_one_group() -> None:
    assert fleet(3, 4).group_of(1) == (0, 1, 2)


def test_a_fleet_follows_from_an_ownership() -> None:
    keys = [ExpertKey(layer=layer, expert=expert) for layer in range(2) for expert in range(3)]
    ownership = {DeviceName("b"): tuple(keys[:2]), DeviceName("a"): tuple(keys[1:])}
    sizes = (LayerSize(experts=3, expert_bytes=1, top_k=1),) * 2
    cluster = fleet_of([DeviceName("a"), DeviceName("b"), DeviceName("new")], ownership, sizes, 3)
    assert cluster.owners_LWE[0].tolist() == [[False, True, True], [True, True, False], [False] * 3]
    assert cluster.owners_LWE[1].tolist() == [[True] * 3, [False] * 3, [False] * 3]


# --- assign ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ([], []),
        ([5], [0]),
        ([5, 1, 3, 7], [0, 1, 2, 3]),
        ([5, 1, 3, 7, 0, 2], [0, 1, 2, 3, 0, 1]),
        ([7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 0, 1, 2, 3]),
    ],
)
def test_equal_workers_get_one_each_in_turn(experts: list[int], expected: list[int]) -> None:
    assert assign(ids(*experts), 0, fleet()).tolist() == expected


@pytest.mark.parametrize(
    ("load_s", "expected"),
    [
        ([1.0, 9.0, 1.0, 9.0], [0, 2, 0, 2]),  # two loads on a fast link are done before one on a slow link
        ([2.0, 1.0, 3.0, 4.0], [1, 0, 1, 2]),  # the first in need is loaded first
        ([1.0, np.nan, 1.0, 1.0], [0, 1, 2, 3]),  # not measured: like the others
    ],
)
def test_slow_links_get_less(load_s: list[float], expected: list[int]) -> None:
    assert assign(ids(0, 1, 2, 3), 0, fleet(load_s=load_s)).tolist() == expected


def test_a_tie_goes_to_the_worker_with_fewer_loads() -> None:
    assert assign(ids(0, 1), 0, fleet(2, 2, load_s=[1.0, 2.0])).tolist() == [0, 1]


def test_what_is_queued_already_counts() -> None:
    assert assign(ids(0, 1, 2), 0, fleet(), np.array([0.0, 5.0, 1.5, 0.0])).tolist() == [0, 3, 0]


def test_where_all_are_in_time_who_computes_fewest_gets_the_next_one() -> None:
    cluster, tasks_W, busy_s_W = fleet(2, 2), np.array([2, 0]), np.array([0.0, 0.5])
    assert assign(ids(0, 1), 0, cluster, busy_s_W, tasks_W=tasks_W).tolist() == [0, 1]
    for due_s in ([9.0, 9.0], [8.0, 9.0], [9.0, 8.0]):  # as much time, however each link counts it
        in_time = assign(ids(0, 1), 0, cluster, busy_s_W, tasks_W=tasks_W, due_s_W=np.array(due_s))
        assert in_time.tolist() == [1, 1]
    late = assign(ids(0, 1), 0, cluster, busy_s_W, tasks_W=tasks_W, due_s_W=np.array([0.5, 0.5]))
    assert late.tolist() == [0, 1]


def test_no_more_than_slots_while_others_have_some() -> None:
    assert assign(ids(0, 1, 2), 0, fleet(2, 2, load_s=[1.0, 9.0], slots=(2, 2))).tolist() == [0, 0, 1]
    assert assign(ids(0, 1, 2, 3), 0, fleet(2, 2, load_s=[1.0, 9.0], slots=(2, 1))).tolist() == [0, 0, 1, 0]


def test_a_scarce_expert_gets_its_only_owner_though_it_comes_last() -> None:
    cluster = fleet(owned={2: (0,), 1: (0, 1)})
    assert assign(ids(0, 1, 2), 0, cluster).tolist() == [2, 1, 0]


def test_experts_come_from_outside_only_where_the_group_does_not_own_them() -> None:
    cluster = fleet(4, 2, owned={0: (1, 2, 3), 1: (1, 3)})
    assert assign(ids(0, 1), 0, cluster).tolist() == [2, 1]
    assert assign(ids(0, 1), 0, cluster, np.array([0.0, 2.0, 9.0, 1.0])).tolist() == [2, 3]


def test_an_expert_without_owner_is_named() -> None:
    cluster = fleet(owned={3: ()})
    for call in (
        lambda: assign(ids(1, 3), 1, cluster),
        lambda: reassign(ids(1, 3), {3: 0}, 1, cluster),
        lambda: spread(ids(1, 3), ids(1, 1), 1, cluster),
    ):
        with pytest.raises(ExpertUnavailableError, match="expert 3 of layer 1 has no owner among the 4 workers"):
            call()


@st.composite
def fleets(draw: st.DrawFn, most_workers: int = 4) -> tuple[Fleet, list[float]]:
    """Uneven links, partial ownership, busy workers; small enough for brute force. One layer of 5 experts."""
    workers = draw(st.integers(1, most_workers))
    seconds = st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0]), min_size=workers, max_size=workers)
    owned = {
        expert: tuple(draw(st.lists(st.integers(0, workers - 1), min_size=1, max_size=workers, unique=True)))
        for expert in range(5)
    }
    cluster = fleet(
        workers, draw(st.integers(1, 4)), experts=5, owned=draw(st.sampled_from([owned, {}])), load_s=draw(seconds)
    )
    return cluster, draw(seconds)


def choices(experts: list[int], cluster: Fleet, workers: tuple[int, ...]) -> list[list[int]]:
    """The workers that may get each expert: owners among ``workers``, else any owner."""
    owners = [cluster.owners_LWE[0][:, expert].nonzero()[0].tolist() for expert in experts]
    return [[worker for worker in own if worker in workers] or own for own in owners]


@given(fleets(), st.permutations(range(5)), st.integers(0, 5))
def test_no_other_assignment_is_done_sooner(case: tuple[Fleet, list[float]], order: list[int], count: int) -> None:
    cluster, busy_s = case
    experts = order[:count]
    permitted = choices(experts, cluster, cluster.group_of(0))
    found = assign(ids(*experts), 0, cluster, np.array(busy_s)).tolist()
    assert all(worker in workers for worker, workers in zip(found, permitted, strict=True))
    best = min(makespan(list(other), cluster.loads_s, busy_s) for other in itertools.product(*permitted))
    assert makespan(found, cluster.loads_s, busy_s) == best


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 20), st.integers(0, 5))
def test_equal_workers_differ_by_one_expert_at_most(workers: int, group_size: int, count: int, layer: int) -> None:
    cluster = fleet(workers, group_size, experts=20, layers=6)
    found = assign(np.arange(count), layer, cluster).tolist()
    counts = [found.count(worker) for worker in cluster.group_of(layer)]
    assert sum(counts) == count, "nobody else was asked"
    assert max(counts) - min(counts) <= 1


# --- reassign -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "planned", "expected"),
    [
        ([], {0: 0}, []),
        ([3, 1], {3: 2, 1: 0}, [2, 0]),  # as planned, wherever that is
        ([0, 1, 2, 7], {0: 3, 1: 2, 2: 1, 4: 0}, [3, 2, 1, 0]),  # 7 in the place of 4
        ([6, 7], {4: 3, 5: 1}, [1, 3]),  # all wrong: their places, the lower worker first
        ([0, 1], {}, [0, 1]),  # nothing planned
        ([0, 1, 2], {0: 0, 1: 1}, [0, 1, 2]),  # nothing was wrong: who has nothing yet
        ([0, 1, 2, 3, 7], {0: 0, 1: 1, 2: 2, 3: 3}, [0, 1, 2, 3, 0]),
    ],
)
def test_planned_experts_stay_and_others_fill_the_gaps(
    needed: list[int], planned: dict[int, int], expected: list[int]
) -> None:
    assert reassign(ids(*needed), planned, 0, fleet()).tolist() == expected


def test_a_free_place_is_taken_even_on_a_slower_link() -> None:
    cluster = fleet(2, 2, load_s=[1.0, 9.0])
    assert reassign(ids(0, 7), {0: 0, 4: 1}, 0, cluster).tolist() == [0, 1]


def test_a_free_place_of_a_worker_without_the_expert_is_no_place() -> None:
    assert reassign(ids(0, 7), {0: 0, 4: 1}, 0, fleet(3, 3, owned={7: (0, 2)})).tolist() == [0, 2]


def test_a_plan_with_a_worker_that_is_gone_is_ignored() -> None:
    assert reassign(ids(0, 1), {0: 0, 1: 1}, 0, fleet(3, 3, owned={0: (1, 2)})).tolist() == [2, 1]


@given(fleets(), st.permutations(range(5)), st.permutations(range(5)), st.integers(0, 5))
def test_a_planned_expert_never_moves(
    case: tuple[Fleet, list[float]], forecast: list[int], needed: list[int], count: int
) -> None:
    cluster, busy_s = case
    planned = dict(
        zip(forecast[:count], assign(ids(*forecast[:count]), 0, cluster, np.array(busy_s)).tolist(), strict=True)
    )
    found = dict(zip(needed[:3], reassign(ids(*needed[:3]), planned, 0, cluster).tolist(), strict=True))
    assert all(found[expert] == planned[expert] for expert in found.keys() & planned.keys())
    permitted = choices(needed[:3], cluster, cluster.group_of(0))
    assert all(found[expert] in workers for expert, workers in zip(needed[:3], permitted, strict=True))


# --- spread ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "row_s", "expected"),
    [
        ([], 1.0, []),
        ([9, 9, 9, 9], 0.0, [0, 1, 0, 1]),  # only loads count
        ([1, 8, 3, 4], 1.0, [0, 0, 1, 1]),  # 2 + 9 against 4 + 5
        ([6, 6, 6, 6], np.array([1.0, 100.0]), [0, 0, 0, 0]),  # 28 on the fast one, 601 for one on the other
    ],
)
def test_work_is_spread_by_loads_and_rows(rows: list[int], row_s: float | np.ndarray, expected: list[int]) -> None:
    assert spread(np.arange(len(rows)), ids(*rows), 0, fleet(2, 1), row_s).tolist() == expected


def test_all_workers_take_part_whatever_the_group() -> None:
    assert sorted(spread(np.arange(8), np.ones(8), 1, fleet(8, 4)).tolist()) == list(range(8))


def test_an_exchange_mends_what_longest_first_spoils() -> None:
    """Longest first: 7 + 5 + 5 = 17 and 7 + 6 = 13; best: 7 + 7 = 14 and 6 + 5 + 5 = 16."""
    cluster = fleet(2, 1, load_s=[0.0, 0.0])
    found = spread(np.arange(5), ids(7, 7, 6, 5, 5), 0, cluster, 1.0)
    assert sorted(np.bincount(found, [7, 7, 6, 5, 5])) == [14, 16]


def totals(worker_N: list[int], rows: list[int], cluster: Fleet) -> np.ndarray:
    """Seconds of each worker, at one second per row."""
    cost_N = [cluster.loads_s[worker] + rows_ for worker, rows_ in zip(worker_N, rows, strict=True)]
    return np.bincount(np.array(worker_N, dtype=int), cost_N, minlength=cluster.workers)


@given(st.integers(1, 3), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_equal_workers_are_within_four_thirds_of_the_optimum(workers: int, rows: list[int]) -> None:
    cluster = fleet(workers, 1)
    found = spread(np.arange(len(rows)), ids(*rows), 0, cluster, 1.0).tolist()
    others = itertools.product(range(workers), repeat=len(rows))
    best = min(totals(list(other), rows, cluster).max() for other in others)
    assert totals(found, rows, cluster).max() <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


@given(fleets(), st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_owners_compute_and_no_single_move_is_worthwhile(case: tuple[Fleet, list[float]], rows: list[int]) -> None:
    cluster, _ = case
    found = spread(np.arange(5), ids(*rows), 0, cluster, 1.0).tolist()
    permitted = choices(list(range(5)), cluster, tuple(range(cluster.workers)))
    assert all(worker in workers for worker, workers in zip(found, permitted, strict=True))
    done_s = totals(found, rows, cluster).max()
    for expert, workers in enumerate(permitted):
        for worker in workers:
            moved = [*found[:expert], worker, *found[expert + 1 :]]
            assert totals(moved, rows, cluster).max() >= done_s * (1 - WORTHWHILE) - 1e-9
