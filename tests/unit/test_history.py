"""The forecast by history: shares of what was seen, for this token, after the last one, and for any."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor import history
from predictor.history import KNOWN_AFTER, LAST, HistoryForecast
from predictor.predictor import HistoryPredictor, best

LAYERS, EXPERTS = 2, 4


def routed(*experts: Sequence[int]) -> list[np.ndarray]:
    """The same in every layer, a row for each token."""
    return [np.array(experts) for _ in range(LAYERS)]


def test_who_knows_nothing_says_that_all_are_alike() -> None:
    scores_TLE = HistoryForecast(LAYERS, EXPERTS).scores([7, 8])
    assert scores_TLE.shape == (2, LAYERS, EXPERTS)
    assert np.all(scores_TLE == 0.25)


def test_any_tokens_experts_come_first_after_a_step() -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    forecast.observe([7], routed([2, 1]))
    forecast.begin()
    # one token before that was everywhere alike, and one that shared its weight between two
    assert forecast.scores([9])[0, 0].tolist() == pytest.approx([0.125, 0.375, 0.375, 0.125])


def test_the_last_tokens_experts_weigh_until_a_sequence_begins() -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    forecast.observe([7], routed([2, 1]))
    any_E, last_E = np.array([0.125, 0.375, 0.375, 0.125]), np.array([0, 0.5, 0.5, 0])
    assert forecast.scores([9])[0, 1] == pytest.approx((1 - LAST) * any_E + LAST * last_E)
    forecast.begin()
    assert forecast.scores([9])[0, 1] == pytest.approx(any_E)


def test_a_tokens_own_experts_weigh_more_with_every_sighting() -> None:
    forecast, own = HistoryForecast(LAYERS, EXPERTS), []
    for sightings in range(1, 4):
        forecast.observe([7], routed([3]))
        forecast.observe([8], routed([0]))
        forecast.begin()
        known = sightings / (sightings + KNOWN_AFTER)
        any_E = np.array([0.25 + sightings, 0.25, 0.25, 0.25 + sightings]) / (1 + 2 * sightings)
        expected_E = (1 - known) * any_E + known * np.array([0, 0, 0, 1])
        own.append(forecast.scores([7])[0, 0])
        assert own[-1] == pytest.approx(expected_E)
    assert own[0][3] < own[1][3] < own[2][3]


def test_layers_are_told_apart() -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    forecast.observe([7], [np.array([[0]]), np.array([[3]])])
    assert forecast.scores([7])[0].argmax(axis=1).tolist() == [0, 3]


def test_each_row_follows_its_own_last_token() -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    forecast.observe([7, 8], routed([0], [3]), rows=2)
    scores_TLE = forecast.scores([1, 2])
    assert scores_TLE[:, 0].argmax(axis=1).tolist() == [0, 3]


def test_of_a_prompt_the_last_token_is_followed_and_all_are_learnt() -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    forecast.observe([7, 8, 9], routed([0], [1], [2]))
    assert forecast.scores([5])[0, 0].argmax() == 2
    forecast.begin()
    assert forecast.scores([7, 8, 9])[:, 0].argmax(axis=1).tolist() == [0, 1, 2]


def test_tokens_not_seen_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_TOKENS", 2)
    forecast = HistoryForecast(LAYERS, EXPERTS)
    for token in (1, 2, 1, 3):
        forecast.observe([token], routed([0]))
    assert list(forecast._of_token) == [1, 3]
    assert forecast._sightings == {1: 2, 3: 1}


def test_what_was_observed_may_be_changed_afterwards() -> None:
    forecast, experts = HistoryForecast(LAYERS, EXPERTS), routed([2])
    forecast.observe([7], experts)
    before = forecast.scores([7])
    experts[0][:] = 0
    forecast.scores([7])[:] = 0
    assert np.array_equal(forecast.scores([7]), before)


steps = st.lists(
    st.tuples(st.integers(0, 5), st.permutations(range(EXPERTS)).map(lambda order: order[:2])), min_size=1, max_size=12
)


@given(steps)
def test_scores_are_shares(seen: list[tuple[int, list[int]]]) -> None:
    forecast = HistoryForecast(LAYERS, EXPERTS)
    for token, experts in seen:
        forecast.observe([token], routed(experts))
    scores_TLE = forecast.scores(range(6))
    assert scores_TLE.min() >= 0
    assert scores_TLE.sum(axis=2) == pytest.approx(1.0, abs=1e-5)


# --- as a predictor -------------------------------------------------------------------------------------


def test_the_predictor_names_all_layers_before_the_step_and_learns_after_it() -> None:
    predictor = HistoryPredictor(LAYERS, EXPERTS, [2, 1])
    predictor.begin([[1], [1]])
    named = predictor.before(1, (7, 8), None)
    assert {layer: experts_BK.tolist() for layer, experts_BK in named.items()} == {0: [[0, 1]] * 2, 1: [[0]] * 2}
    predictor.after((7, 8), [np.array([[3, 2], [1, 2]]), np.array([[3], [1]])])
    named = predictor.before(2, (7, 8), None)
    assert [set(row) for row in named[0].tolist()] == [{2, 3}, {1, 2}] and named[1].tolist() == [[3], [1]]
    assert predictor.during(0) == {} and predictor.bytes_sent == 0


def test_the_best_are_in_order_and_ties_go_to_the_lower_index() -> None:
    assert best(np.array([[0.1, 0.5, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0]]), 3).tolist() == [[1, 2, 3], [0, 1, 2]]
