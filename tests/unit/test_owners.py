"""Who is asked for each expert while workers are avoided: an owner that is well, nobody only where none is."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.owners import NOBODY, owners_to_ask


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    workers, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    owned_LWE, primary_LE = [], []
    for _ in range(layers):
        experts = draw(st.integers(1, 8))
        bits = draw(st.lists(st.booleans(), min_size=workers * experts, max_size=workers * experts))
        owned_LWE.append(np.array(bits, dtype=bool).reshape(workers, experts))
        primary = draw(st.lists(st.integers(NOBODY, workers - 1), min_size=experts, max_size=experts))
        primary_LE.append(np.array(primary, dtype=np.int16))
    avoided = draw(st.lists(st.booleans(), min_size=workers, max_size=workers))
    return owned_LWE, primary_LE, np.array(avoided, dtype=bool)


@given(layouts())
def test_who_is_asked_owns_it_and_is_well_and_nobody_is_only_where_nobody_does(
    layout: tuple[list[np.ndarray], list[np.ndarray], np.ndarray],
) -> None:
    owned_LWE, primary_LE, avoided_W = layout
    for asked_E, owned_WE, primary_E in zip(owners_to_ask(*layout), owned_LWE, primary_LE, strict=True):
        well_WE = owned_WE & ~avoided_W[:, None]
        for expert, worker in enumerate(asked_E.tolist()):
            assert (worker == NOBODY) == (not well_WE[:, expert].any())
            assert worker == NOBODY or well_WE[worker, expert]
            primary = int(primary_E[expert])
            if primary != NOBODY and well_WE[primary, expert]:
                assert worker == primary, "a primary owner that is well is asked"


@given(layouts())
def test_the_answer_is_always_the_same(layout: tuple[list[np.ndarray], list[np.ndarray], np.ndarray]) -> None:
    first, second = owners_to_ask(*layout), owners_to_ask(*layout)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_an_avoided_worker_was_asked_for_goes_to_one_other_as_a_whole() -> None:
    owned_WE = np.ones((3, 6), dtype=bool)
    primary_E = np.array([0, 0, 0, 0, 1, 1], dtype=np.int16)
    (asked_E,) = owners_to_ask([owned_WE], [primary_E], np.array([True, False, False]))
    assert asked_E.tolist() == [2, 2, 2, 2, 1, 1]


def test_layers_of_an_avoided_worker_are_spread_over_the_others() -> None:
    owned_LWE, primary_LE = [np.ones((3, 4), dtype=bool)] * 4, [np.zeros(4, dtype=np.int16)] * 4
    asked_LE = owners_to_ask(owned_LWE, primary_LE, np.array([True, False, False]))
    assert [int(asked_E[0]) for asked_E in asked_LE] == [1, 2, 1, 2]


def test_where_no_other_has_all_each_expert_goes_to_whoever_has_it() -> None:
    owned_WE = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=bool)
    (asked_E,) = owners_to_ask([owned_WE], [np.zeros(4, dtype=np.int16)], np.array([True, False, False]))
    assert asked_E.tolist() == [1, 1, 2, NOBODY]
    assert np.flatnonzero(asked_E == NOBODY).tolist() == [3], "nobody has the last"
