"""What experts are worth keeping: by score and use, recency, frequency, and what forecasts add."""

import numpy as np
import pytest

from raymoe.placement.keeping import Keeper
from raymoe.placement.prefetch import lookahead, wanted

PLACES = np.array([0, 1, 4])  # of layer 0, experts 0 and 1, and layer 1, expert 1
LAST_USE = np.array([5, 3, 4])


def keeper(eviction: str) -> Keeper:
    """Two layers of three experts; layer 0 used expert 0 twice, the other steps once."""
    kept = Keeper(eviction, 2, 3, window=2)
    for scores, used in (([0.6, 0.3, 0.1], [0]), ([0.5, 0.4, 0.1], [0, 1])):
        kept.step(0, np.array(scores, dtype=np.float32), np.array(used), rows=1)
    kept.step(1, np.array([0.1, 0.2, 0.7], dtype=np.float32), np.array([2]), rows=1)
    return kept


@pytest.mark.parametrize(
    ("eviction", "values"),
    [("score", [0.55 + 1.0, 0.35 + 0.5, 0.2]), ("lru", [5, 3, 4]), ("lfu", [2, 1, 0])],
)
def test_values_by_rule(eviction: str, values: list[float]) -> None:
    assert keeper(eviction).values(PLACES, LAST_USE) == pytest.approx(values)


def test_uses_count_by_the_share_of_rows() -> None:
    kept = Keeper("score", 1, 2, window=4)
    kept.step(0, np.array([0.5, 0.5], dtype=np.float32), np.array([0, 0, 0, 1]), rows=4)
    assert kept.values(np.arange(2), np.zeros(2)) == pytest.approx([1.25, 0.75])


def test_a_forecast_is_worth_more_than_a_memory_until_its_layer_has_come() -> None:
    kept = keeper("score")
    kept.expect(1, np.array([1]), np.array([1.4], dtype=np.float32))
    assert kept.values(PLACES, LAST_USE)[2] == pytest.approx(1.4)
    assert kept.worth(1, 1) == pytest.approx(1.4)
    kept.step(1, np.array([0.1, 0.2, 0.7], dtype=np.float32), np.array([2]), rows=1)
    assert kept.values(PLACES, LAST_USE)[2] == pytest.approx(0.2)


def test_a_later_forecast_replaces_the_earlier() -> None:
    kept = keeper("score")
    kept.expect(1, np.array([1]), np.array([0.4], dtype=np.float32))
    kept.expect(1, np.array([0]), np.array([0.3], dtype=np.float32))
    assert kept.values(PLACES, LAST_USE)[2] == pytest.approx(0.2)


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_other_rules_never_evict_what_is_forecast(eviction: str) -> None:
    kept = keeper(eviction)
    kept.expect(1, np.array([1]), np.array([0.01], dtype=np.float32))
    assert np.isinf(kept.values(PLACES, LAST_USE)[2])


def test_wanted_are_the_top_of_each_token_best_first() -> None:
    scores = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.4, 0.3, 0.2]], dtype=np.float32)
    experts, worth = wanted(scores, scores, 2)
    assert experts.tolist() == [1, 0, 2]
    assert worth == pytest.approx([0.35 + 1.0, 0.25 + 0.5, 0.15 + 0.5])


def test_what_is_chosen_by_biased_scores_is_wanted_and_worth_its_own() -> None:
    scores = np.array([[0.5, 0.3, 0.1, 0.1]], dtype=np.float32)
    experts, worth = wanted(scores, scores + np.array([0, 0, 1, 1], dtype=np.float32), 2)
    assert experts.tolist() == [2, 3]
    assert worth == pytest.approx([1.1, 1.1])


def test_all_experts_are_wanted_where_all_are_chosen() -> None:
    scores = np.array([[0.2, 0.8]], dtype=np.float32)
    experts, _ = wanted(scores, scores, 2)
    assert experts.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("load_s", "layer_s", "ahead"),
    [(None, 1.0, 1), (1.0, None, 1), (0.5, 1.0, 1), (0.8, 1.0, 2), (1.5, 1.0, 2), (1.6, 1.0, 3), (99.0, 1.0, 4)],
)
def test_lookahead_follows_what_a_load_takes(load_s: float | None, layer_s: float | None, ahead: int) -> None:
    assert lookahead(load_s, layer_s) == ahead


@pytest.mark.parametrize("eviction", ["score", "lru", "lfu"])
def test_steps_of_several_layers_are_those_of_each(eviction: str) -> None:
    random = np.random.default_rng(0)
    one, together = (Keeper(eviction, 3, 6, window=3) for _ in range(2))
    places, uses = np.arange(18), np.arange(18)
    for _ in range(8):
        layers_N = random.permutation(3)[: random.integers(1, 4)]
        scores_NE = random.random((len(layers_N), 5)).astype(np.float32)
        experts_NK = np.stack([random.permutation(5)[:2] for _ in layers_N]).astype(np.int32)
        for keeper in (one, together):
            keeper.expect(int(layers_N[0]), np.array([4]), np.array([2.0], dtype=np.float32))
        for layer, scores_E, experts_K in zip(layers_N.tolist(), scores_NE, experts_NK, strict=True):
            one.step(layer, scores_E, experts_K, 1)
        together.steps(layers_N, scores_NE, experts_NK)
        np.testing.assert_allclose(together.mean_LE, one.mean_LE, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(together.values(places, uses), one.values(places, uses), rtol=1e-6, atol=1e-7)
