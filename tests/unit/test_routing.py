"""Routing with substitution: named scenarios, and properties against a reference in plain loops.

T tokens, K experts per token, E experts.
"""

import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.routing import Routed, route, without
from raymoe.placement.similarity import MatrixSimilarity, ScoreCloseness, Similarity

# the choice is 0, 1, 2, and S = 0.09; alpha = 0.25 makes 2 low-score, and 3 and 4 substitutes
SCORES = [0.40, 0.12, 0.10, 0.09, 0.08, 0.02]
CHOSEN = [0, 1, 2]
NAN = math.nan


def routed(
    resident: set[int],
    alpha: float | list[float],
    *,
    scores: list[list[float]] | None = None,
    chosen: list[list[int]] | None = None,
    permitted: list[list[int]] | None = None,
    similarity: Similarity | None = None,
    layer: int = 0,
) -> Routed:
    """``route`` for lists; the example above by default."""
    scores_TE = np.array(scores or [SCORES], dtype=np.float32)
    experts = scores_TE.shape[1]
    return route(
        scores_TE,
        np.array(chosen or [CHOSEN]),
        np.isin(np.arange(experts), list(resident)),
        np.array(alpha, dtype=np.float32),
        permitted_TE=None if permitted is None else np.array([np.isin(np.arange(experts), row) for row in permitted]),
        similarity=similarity,
        layer=layer,
    )


# --- one token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resident", "alpha", "experts"),
    [
        ({0, 1, 4}, 0.25, [0, 1, 4]),
        ({0, 1, 3, 4}, 0.25, [0, 1, 3]),  # the best-scored substitute
        ({3, 4}, 0.25, [0, 1, 3]),  # top-score ones stay, whatever they cost
        ({0, 1, 2, 3}, 0.25, [0, 1, 2]),  # all at hand
        ({2, 3}, 0.25, [0, 1, 2]),  # the low-score one is at hand
        ({0, 1, 5}, 0.25, [0, 1, 2]),  # 5 is out of the window
        ({0, 1}, 0.25, [0, 1, 2]),  # no substitute is at hand
        ({0, 1, 3}, 0.1, [0, 1, 2]),  # 2 is top-score: 0.10 >= 0.099
        ({0, 3, 4}, 0.5, [0, 4, 3]),  # the lowest-scored is replaced first, and gets the best
        ({0, 4}, 0.5, [0, 1, 4]),  # a scarce substitute goes to the lowest-scored
        ({3, 4, 5}, 9.0, [5, 4, 3]),  # the window takes in everything
        (set(), 9.0, [0, 1, 2]),
    ],
)
def test_who_replaces_whom(resident: set[int], alpha: float, experts: list[int]) -> None:
    result = routed(resident, alpha)
    assert result.experts_TK.tolist() == [experts]
    assert result.replaced_TK.tolist() == [[after != before for after, before in zip(experts, CHOSEN, strict=True)]]


def test_a_substitute_sits_where_the_replaced_expert_sat() -> None:
    assert routed({0, 1, 4}, 0.25, chosen=[[2, 0, 1]]).experts_TK.tolist() == [[4, 0, 1]]


def test_the_replaced_gate_mass_is_told_as_a_share_of_the_choice() -> None:
    assert routed({0, 1, 4}, 0.25).replaced_mass_T == pytest.approx([0.10 / 0.62])
    assert routed({0, 3, 4}, 0.5).replaced_mass_T == pytest.approx([0.22 / 0.62])
    assert routed({0, 1}, 0.25).replaced_mass_T.tolist() == [0.0]


def test_alpha_0_is_the_choice_itself() -> None:
    scores_TE = np.array([SCORES], dtype=np.float32)
    chosen_TK = np.array([[5, 0, 4]], dtype=np.int32)
    result = route(scores_TE, chosen_TK, np.ones(6, dtype=bool), 0.0)
    assert result.experts_TK is chosen_TK
    assert not result.replaced_TK.any() and result.replaced_mass_T.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_experts_keep_the_type_of_the_choice(dtype: type) -> None:
    chosen_TK = np.array([CHOSEN] * 2, dtype=dtype)
    scores_TE = np.array([SCORES] * 2, dtype=np.float32)
    available_E = np.array([1, 1, 0, 1, 0, 0], dtype=bool)
    for tokens in (1, 2):
        result = route(scores_TE[:tokens], chosen_TK[:tokens], available_E, 0.25)
        assert result.experts_TK.tolist() == [[0, 1, 3]] * tokens
        assert (result.experts_TK.dtype, result.replaced_mass_T.dtype) == (dtype, np.float32)


def test_ties_between_substitutes_go_to_the_lower_expert() -> None:
    scores = [0.3, 0.2, 0.1, 0.2, 0.2]
    assert routed({0, 4, 3}, 0.5, scores=[scores], chosen=[[0, 1]]).experts_TK.tolist() == [[0, 3]]


def test_ties_between_the_replaced_go_to_the_lower_expert_wherever_it_sits() -> None:
    scores = [0.3, 0.2, 0.2, 0.2]
    for chosen, experts in (([0, 1, 2], [0, 3, 2]), ([0, 2, 1], [0, 2, 3])):
        assert routed({0, 3}, 0.5, scores=[scores], chosen=[chosen]).experts_TK.tolist() == [experts]


def test_a_biased_choice_below_the_best_rest_is_low_score() -> None:
    """Selection bias chose 5 over 2: S is 2's unbiased score, and even a small alpha may replace 5."""
    assert routed({0, 1, 2}, 0.01, chosen=[[0, 1, 5]]).experts_TK.tolist() == [[0, 1, 2]]


def test_a_group_limit_holds_for_substitutes_and_for_the_best_rest() -> None:
    groups = [[0, 1, 2, 4, 5]]
    assert routed({0, 1, 3, 4}, 0.3, permitted=groups).experts_TK.tolist() == [[0, 1, 4]]
    assert routed({0, 1, 3, 4}, 0.25, permitted=groups).experts_TK.tolist() == [[0, 1, 2]], "S is 0.08: 2 is top-score"
    assert routed({3, 4}, 9.0, permitted=[CHOSEN]).experts_TK.tolist() == [CHOSEN]


def test_a_choice_of_all_experts_stays() -> None:
    assert routed({0}, 0.5, scores=[[0.5, 0.3, 0.2]]).experts_TK.tolist() == [CHOSEN]


@pytest.mark.parametrize(
    ("scores", "experts"),
    [
        ([NAN] * 6, [0, 1, 2]),
        ([0.4, 0.12, NAN, 0.09, 0.08, 0.02], [0, 1, 2]),  # an unknown choice stays
        ([0.4, 0.12, 0.1, 0.09, NAN, 0.08], [0, 1, 5]),  # an unknown substitute is none
        ([0.0] * 6, [0, 1, 2]),
    ],
)
def test_scores_without_meaning_do_no_harm(scores: list[float], experts: list[int]) -> None:
    for tokens in (1, 2):
        result = routed({0, 1, 4, 5}, 0.5, scores=[scores] * tokens, chosen=[CHOSEN] * tokens)
        assert result.experts_TK.tolist() == [experts] * tokens
        assert np.isfinite(result.replaced_mass_T).all()


# --- similarity -----------------------------------------------------------------------------------------


def alike(*pairs: tuple[int, int], critical: int | None = None) -> MatrixSimilarity:
    """Layer 1 of 2, in which the candidates of ``pairs`` resemble the experts they are paired with."""
    matrix_LEE = np.zeros((2, 6, 6), dtype=np.float32)
    for replaced, candidate in pairs:
        matrix_LEE[1, replaced, candidate] = 0.9
    critical_LE = np.zeros((2, 6), dtype=bool)
    if critical is not None:
        critical_LE[1, critical] = True
    return MatrixSimilarity(matrix_LEE, critical_LE)


@pytest.mark.parametrize(
    ("similarity", "alpha", "experts"),
    [
        (alike((2, 4)), 0.25, [0, 1, 4]),  # the most similar, not the best-scored
        (alike((2, 5)), 0.25, [0, 1, 3]),  # but never from out of the window
        (alike((4, 2)), 0.25, [0, 1, 3]),  # ties go to the lower expert
        (alike((1, 3), (2, 3)), 0.5, [0, 4, 3]),  # taken by the lowest-scored
        (alike((1, 3), (2, 4)), 0.5, [0, 3, 4]),
        (alike((2, 4), critical=2), 0.25, [0, 1, 2]),
        (alike((2, 4), critical=2), 0.5, [0, 3, 2]),
        (ScoreCloseness(), 0.5, [0, 4, 3]),
    ],
)
def test_similarity_ranks_within_the_window(similarity: Similarity, alpha: float, experts: list[int]) -> None:
    for tokens in (1, 2):
        result = routed(
            {3, 4, 5}, alpha, scores=[SCORES] * tokens, chosen=[CHOSEN] * tokens, similarity=similarity, layer=1
        )
        assert result.experts_TK.tolist() == [experts] * tokens


# --- batches --------------------------------------------------------------------------------------------

OTHER = [0.02, 0.08, 0.09, 0.40, 0.30, 0.05]  # another token: 3 and 4 are top-score


def test_an_expert_that_another_token_needs_is_at_hand() -> None:
    """3 is not resident, but the second token loads it anyway."""
    result = routed({0, 1}, 0.25, scores=[SCORES, OTHER], chosen=[CHOSEN, [3, 4, 2]])
    assert result.experts_TK.tolist() == [[0, 1, 3], [3, 4, 1]]


def test_a_low_score_expert_that_another_token_needs_stays() -> None:
    needs_2 = [0.02, 0.01, 0.50, 0.03, 0.04, 0.40]
    result = routed({0, 1, 3}, 0.25, scores=[SCORES, needs_2], chosen=[CHOSEN, [2, 5, 4]])
    assert result.experts_TK.tolist()[0] == CHOSEN


def test_tokens_do_not_compete_for_substitutes() -> None:
    result = routed({0, 1, 3}, 0.25, scores=[SCORES] * 3, chosen=[CHOSEN] * 3)
    assert result.experts_TK.tolist() == [[0, 1, 3]] * 3


@pytest.mark.parametrize(
    ("alpha", "experts"),
    [([0.25, 0.01], [[0, 2], [3, 4]]), ([0.01, 0.25], [[0, 1], [3, 2]]), ([0.25, 0.25], [[0, 2], [3, 2]])],
)
def test_every_token_has_its_own_alpha(alpha: list[float], experts: list[list[int]]) -> None:
    scores = [[0.5, 0.2, 0.19, 0.0, 0.0], [0.0, 0.0, 0.19, 0.5, 0.2]]
    assert routed({0, 2, 3}, alpha, scores=scores, chosen=[[0, 1], [3, 4]]).experts_TK.tolist() == experts


def test_an_exact_token_keeps_its_choice_and_brings_it_to_others() -> None:
    result = routed({0, 1}, [0.25, 0.0], scores=[SCORES, OTHER], chosen=[CHOSEN, [5, 4, 3]])
    assert result.experts_TK.tolist() == [[0, 1, 3], [5, 4, 3]]


# --- properties -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    scores_TE: np.ndarray
    chosen_TK: np.ndarray
    available_E: np.ndarray
    alpha_T: np.ndarray
    permitted_TE: np.ndarray | None
    similarity: MatrixSimilarity | None

    def route(self) -> Routed:
        return route(
            self.scores_TE,
            self.chosen_TK,
            self.available_E,
            self.alpha_T,
            permitted_TE=self.permitted_TE,
            similarity=self.similarity,
        )


ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5)


@st.composite
def cases(draw: st.DrawFn, most_tokens: int = 3, distinct: bool = False) -> Case:
    """Choices need not follow the scores, as with a selection bias; scores tie often unless ``distinct``."""
    tokens, experts = draw(st.integers(1, most_tokens)), draw(st.integers(2, 8))
    k = draw(st.integers(1, min(4, experts)))
    orders = [draw(st.permutations(range(experts))) for _ in range(tokens)]
    if distinct:
        scores = [[(expert + 1) / experts for expert in draw(st.permutations(range(experts)))] for _ in range(tokens)]
    else:
        values = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, NAN])
        scores = [draw(st.lists(values, min_size=experts, max_size=experts)) for _ in range(tokens)]
    chosen_TK = np.array([order[:k] for order in orders])
    permitted_TE = None
    if draw(st.booleans()):
        permitted_TE = draw_bools(draw, tokens, experts)
        np.put_along_axis(permitted_TE, chosen_TK, True, axis=1)
    similarity = None
    if draw(st.booleans()):
        values_EE = [draw(st.permutations(range(experts))) for _ in range(experts)]
        similarity = MatrixSimilarity(np.array([values_EE], dtype=np.float32) - 3, draw_bools(draw, 1, experts))
    return Case(
        scores_TE=np.array(scores, dtype=np.float32),
        chosen_TK=chosen_TK,
        available_E=draw_bools(draw, 1, experts)[0],
        alpha_T=np.array([draw(st.sampled_from(ALPHAS)) for _ in range(tokens)], dtype=np.float32),
        permitted_TE=permitted_TE,
        similarity=similarity,
    )


def draw_bools(draw: st.DrawFn, rows: int, columns: int) -> np.ndarray:
    bits = [draw(st.integers(0, 2**columns - 1)) for _ in range(rows)]
    return np.array([[bit >> column & 1 for column in range(columns)] for bit in bits], dtype=bool)


def best_rest(case: Case, token: int) -> np.float32:
    """S: the best score that was permitted and not chosen."""
    rest = [
        score
        for expert, score in enumerate(case.scores_TE[token])
        if expert not in case.chosen_TK[token]
        and (case.permitted_TE is None or case.permitted_TE[token, expert])
        and not math.isnan(score)
    ]
    return max([np.float32(0), *rest])


def is_low(case: Case, token: int, expert: int) -> bool:
    """Whether a chosen expert may be replaced at all."""
    alpha = case.alpha_T[token]
    critical = case.similarity is not None and case.similarity.critical_LE[0, expert]
    low = case.scores_TE[token, expert] < (np.float32(1) + alpha) * best_rest(case, token)
    return bool(alpha > 0 and low and not critical)


def at_hand(case: Case) -> set[int]:
    """Experts that are resident, or needed in any case."""
    needed = {
        int(expert)
        for token, chosen in enumerate(case.chosen_TK)
        for expert in chosen
        if not is_low(case, token, expert)
    }
    return needed | set(np.flatnonzero(case.available_E).tolist())


def window(case: Case, token: int) -> set[int]:
    """Experts that may stand in for one of the token's."""
    floor = (np.float32(1) - case.alpha_T[token]) * best_rest(case, token)
    return {
        expert
        for expert in at_hand(case)
        if case.scores_TE[token, expert] > floor
        and expert not in case.chosen_TK[token]
        and (case.permitted_TE is None or case.permitted_TE[token, expert])
    }


def reference(case: Case) -> list[list[int]]:
    """The rules in plain loops, token by token."""
    result = []
    for token, chosen in enumerate(case.chosen_TK.tolist()):
        scores, candidates, final = case.scores_TE[token], window(case, token), list(chosen)
        unwanted = [expert for expert in chosen if is_low(case, token, expert) and expert not in at_hand(case)]
        for replaced in sorted(unwanted, key=lambda expert: (scores[expert], expert)):
            if not candidates:
                break
            liking = scores if case.similarity is None else case.similarity.matrix_LEE[0, replaced]
            best = min(candidates, key=lambda expert: (-liking[expert], expert))
            candidates.remove(best)
            final[chosen.index(replaced)] = best
        result.append(final)
    return result


@given(cases())
def test_it_does_what_the_rules_say(case: Case) -> None:
    assert case.route().experts_TK.tolist() == reference(case)


@given(cases())
def test_every_token_gets_k_distinct_experts(case: Case) -> None:
    for experts in case.route().experts_TK.tolist():
        assert len(set(experts)) == len(experts)


@given(cases())
def test_what_is_told_is_what_changed(case: Case) -> None:
    result = case.route()
    assert (result.replaced_TK == (result.experts_TK != case.chosen_TK)).all()
    chosen_scores_TK = np.nan_to_num(np.take_along_axis(case.scores_TE, case.chosen_TK, axis=1))
    total_T = chosen_scores_TK.sum(axis=1)
    mass_T = (chosen_scores_TK * result.replaced_TK).sum(axis=1) / np.where(total_T > 0, total_T, 1)
    assert result.replaced_mass_T == pytest.approx(mass_T, abs=1e-6)


@given(cases())
def test_top_score_experts_are_always_kept(case: Case) -> None:
    for token, place in np.argwhere(case.route().replaced_TK):
        assert is_low(case, token, case.chosen_TK[token, place])


@given(cases())
def test_only_what_would_be_loaded_is_replaced(case: Case) -> None:
    assert not set(case.chosen_TK[case.route().replaced_TK].tolist()) & at_hand(case)


@given(cases())
def test_substitutes_are_at_hand_permitted_and_within_the_window(case: Case) -> None:
    result = case.route()
    for token, place in np.argwhere(result.replaced_TK):
        assert int(result.experts_TK[token, place]) in window(case, token)


@given(cases())
def test_exact_tokens_are_never_changed(case: Case) -> None:
    exact_T = case.alpha_T == 0
    assert (case.route().experts_TK[exact_T] == case.chosen_TK[exact_T]).all()


@given(cases())
def test_nothing_given_is_changed(case: Case) -> None:
    given_ = [case.scores_TE, case.chosen_TK, case.available_E, case.alpha_T]
    copies = [array.copy() for array in given_]
    case.route()
    for array, copy in zip(given_, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@given(cases(most_tokens=1))
def test_a_larger_alpha_never_loads_more_for_one_token(case: Case) -> None:
    loads = []
    for alpha in ALPHAS:
        experts_TK = replace(case, alpha_T=np.array([alpha], dtype=np.float32)).route().experts_TK
        loads.append(int((~case.available_E[experts_TK]).sum()))
    assert loads == sorted(loads, reverse=True)


@given(cases())
def test_similarity_decides_who_stands_in_never_for_whom(case: Case) -> None:
    if case.similarity is not None:
        plain = MatrixSimilarity(np.zeros_like(case.similarity.matrix_LEE), case.similarity.critical_LE)
        by_index = replace(case, similarity=plain).route()
        assert (case.route().replaced_TK == by_index.replaced_TK).all()


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_choice_does_not_matter(case: Case, random: Random) -> None:
    order_K = list(range(case.chosen_TK.shape[1]))
    random.shuffle(order_K)
    shuffled = replace(case, chosen_TK=case.chosen_TK[:, order_K])
    assert (shuffled.route().experts_TK == case.route().experts_TK[:, order_K]).all()


@given(cases(distinct=True), st.data())
def test_renaming_experts_renames_the_result(case: Case, data: st.DataObject) -> None:
    new_E = np.array(data.draw(st.permutations(range(case.scores_TE.shape[1]))))
    old_E = np.argsort(new_E)
    similarity = case.similarity
    if similarity is not None:
        matrix_LEE = similarity.matrix_LEE[:, old_E][:, :, old_E]
        similarity = MatrixSimilarity(matrix_LEE, similarity.critical_LE[:, old_E])
    renamed = Case(
        scores_TE=case.scores_TE[:, old_E],
        chosen_TK=new_E[case.chosen_TK],
        available_E=case.available_E[old_E],
        alpha_T=case.alpha_T,
        permitted_TE=None if case.permitted_TE is None else case.permitted_TE[:, old_E],
        similarity=similarity,
    )
    assert (renamed.route().experts_TK == new_E[case.route().experts_TK]).all()


@given(cases(), st.sampled_from(ALPHAS))
def test_one_alpha_for_all_is_the_same_alpha_for_each(case: Case, alpha: float) -> None:
    each = replace(case, alpha_T=np.full(len(case.chosen_TK), alpha, dtype=np.float32))
    one = replace(case, alpha_T=alpha)
    assert (each.route().experts_TK == one.route().experts_TK).all()


# --- experts that are lost ------------------------------------------------------------------------------


def left(lost: set[int], scores: list[float], chosen: list[int], permitted: list[int] | None = None) -> list[int]:
    """What one token computes without these."""
    lost_E = np.isin(np.arange(len(scores)), list(lost))
    permitted_TE = None if permitted is None else np.isin(np.arange(len(scores)), permitted)[None]
    done = without(lost_E, np.array([scores], dtype=np.float32), np.array([chosen]), permitted_TE)
    assert (done.replaced_TK == (done.experts_TK != np.array([chosen]))).all()
    return done.experts_TK[0].tolist()


def test_lost_experts_give_way_to_the_best_that_are_left_whatever_they_score() -> None:
    assert left(set(), SCORES, CHOSEN) == CHOSEN
    assert left({0}, SCORES, CHOSEN) == [3, 1, 2]
    assert left({0, 2, 3}, SCORES, CHOSEN) == [4, 1, 5]


def test_permitted_ones_come_first_and_what_nothing_is_left_for_stays() -> None:
    assert left({0}, SCORES, CHOSEN, permitted=[0, 1, 2, 5]) == [5, 1, 2]
    assert left({0, 1}, SCORES, CHOSEN, permitted=[0, 1, 2, 5]) == [5, 3, 2]
    assert left({0, 1, 3, 4}, SCORES, CHOSEN) == [5, 1, 2]
