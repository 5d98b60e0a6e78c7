"""Similarity: who is preferred, who is critical, and profiles that can't be used."""

import numpy as np
import pytest

from raymoe.errors import ConfigError
from raymoe.placement.similarity import MatrixSimilarity, ScoreCloseness, Similarity

MATRIX_LEE = np.arange(18, dtype=np.float32).reshape(2, 3, 3) - 9
SCORES_RE = np.array([[0.2, -np.inf, 0.0], [-np.inf, 0.3, 0.1]], dtype=np.float32)


def test_by_score_the_preference_is_the_score() -> None:
    assert ScoreCloseness().preference(0, np.array([1, 0]), SCORES_RE) is SCORES_RE


def test_by_matrix_the_preference_is_the_row_of_the_replaced_expert() -> None:
    assert MatrixSimilarity(MATRIX_LEE).preference(1, np.array([2, 0]), SCORES_RE).tolist() == [[6, 7, 8], [0, 1, 2]]


@pytest.mark.parametrize("similarity", [ScoreCloseness(), MatrixSimilarity(MATRIX_LEE)])
def test_one_token_and_several_are_answered_alike(similarity: Similarity) -> None:
    replaced_R = np.array([1, 2])
    preference_RE = similarity.preference(1, replaced_R, SCORES_RE)
    for token, expert in enumerate(replaced_R.tolist()):
        assert (similarity.preference(1, expert, SCORES_RE[token]) == preference_RE[token]).all()


def test_critical_experts_are_those_of_the_layer() -> None:
    critical_LE = np.array([[0, 1, 0], [1, 0, 0]], dtype=bool)
    assert MatrixSimilarity(MATRIX_LEE, critical_LE).critical_E(1) is not None
    assert MatrixSimilarity(MATRIX_LEE, critical_LE).critical_E(1).tolist() == [True, False, False]
    assert MatrixSimilarity(MATRIX_LEE).critical_E(1) is None
    assert ScoreCloseness().critical_E(1) is None


@pytest.mark.parametrize(
    ("matrix_LEE", "critical_LE", "message"),
    [
        (np.zeros((2, 3)), None, r"must be \[layers, experts, experts\], not \[2, 3\]"),
        (np.zeros((2, 3, 4)), None, r"not \[2, 3, 4\]"),
        (np.full((1, 2, 2), np.nan), None, "NaN or infinite"),
        (np.zeros((1, 2, 2)), np.zeros((1, 3), dtype=bool), r"\[layers, experts\] = \[1, 2\], not \[1, 3\]"),
    ],
)
def test_a_profile_that_does_not_fit_together_is_refused(
    matrix_LEE: np.ndarray, critical_LE: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"profile: .*{message}"):
        MatrixSimilarity(matrix_LEE, critical_LE)
