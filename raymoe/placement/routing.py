"""Routing with substitution: the router's choice, changed only where it costs a load and matters little.

The importance rule of SMoE (arXiv 2508.18983, section 4.1, eq. 1). With S the best score that the router did not
choose, and a threshold alpha, per token:

- *top-score* experts are chosen and score at least (1 + alpha)·S: always kept;
- *low-score* ones are chosen otherwise: kept where they cost nothing, replaced where a substitute is at hand;
- *substitutes* are not chosen, permitted, at hand, and score more than (1 - alpha)·S.

At hand is what is resident, and what any token of the batch needs anyway, as top-score or otherwise for certain.
alpha = 0 is the router's own choice, bit for bit. Routing weights are not decided here: they follow from the final
experts' own scores by the architecture's rule.

T tokens, K experts per token, E experts, R tokens with an expert to replace, J replacements of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from raymoe.placement.similarity import ScoreCloseness, Similarity

_BY_SCORE = ScoreCloseness()


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts to compute, and what that differs from the router's choice.

    Attributes:
        experts_TK: the final experts, as typed as the choice; kept ones where they were, a substitute in the place
            of the expert that it replaces.
        replaced_TK: bool, the places that hold a substitute.
        replaced_mass_T: float32, the gate scores of the replaced experts as a share of those of all K choices.
    """

    experts_TK: np.ndarray
    replaced_TK: np.ndarray
    replaced_mass_T: np.ndarray


def route(
    scores_TE: np.ndarray,
    chosen_TK: np.ndarray,
    available_E: np.ndarray,
    alpha_T: np.ndarray | float,
    *,
    permitted_TE: np.ndarray | None = None,
    similarity: Similarity | None = None,
    layer: int = 0,
) -> Routed:
    """The final experts of one layer for a batch of tokens.

    Every token gets K distinct experts. Where substitutes are scarce, the lowest-scored experts are replaced first;
    what can't be replaced stays and must be loaded or computed on the host. For one token and one state, a larger
    alpha never needs more loads. Ties go to the lower expert.

    Args:
        scores_TE: float32 gate scores of all experts, at least 0, without selection bias. An expert scored NaN is
            neither replaced nor a substitute.
        chosen_TK: the router's own choice, distinct per token; it may have been made by biased scores.
        available_E: bool, True for the experts that are resident.
        alpha_T: threshold per token, or one for all. Tokens with alpha = 0 are never changed.
        permitted_TE: bool, the experts that the router may choose for a token (group-limited top-k); None: all.
        similarity: ranks substitutes within the window, and names experts that are never replaced; None: by score.
        layer: for the similarity.
    """
    alpha_T1 = np.asarray(alpha_T, dtype=np.float32).reshape(-1, 1)
    if np.count_nonzero(alpha_T1) == 0 or np.count_nonzero(available_E[chosen_TK]) == chosen_TK.size:
        return _unchanged(chosen_TK)
    similarity = similarity or _BY_SCORE
    critical_E = similarity.critical_E(layer)
    prefer = partial(similarity.preference, layer)
    rest_TE = np.fmax(scores_TE, -np.inf)  # NaN becomes -inf
    if permitted_TE is not None:
        rest_TE = np.where(permitted_TE, rest_TE, -np.inf)
    if len(chosen_TK) == 1:
        return _route_one(rest_TE[0], scores_TE[0], chosen_TK, available_E, alpha_T1[0, 0], critical_E, prefer)
    return _route_batch(rest_TE, scores_TE, chosen_TK, available_E, alpha_T1, critical_E, prefer)


def without(
    lost_E: np.ndarray, scores_TE: np.ndarray, chosen_TK: np.ndarray, permitted_TE: np.ndarray | None = None
) -> Routed:
    """The router's choice with each lost expert replaced by the best one that is left, whatever alpha is.

    Of those that the router may choose, as long as there are any; then of all. What nothing is left for stays.

    Args:
        lost_E: bool, the experts that can't be computed.
        scores_TE, chosen_TK, permitted_TE: as in ``route``.
    """
    replaced_TK = lost_E[chosen_TK]
    if not replaced_TK.any():
        return _unchanged(chosen_TK)
    experts_TK = chosen_TK.copy()
    for token in np.flatnonzero(replaced_TK.any(axis=1)).tolist():
        left_E = ~lost_E
        left_E[chosen_TK[token]] = False
        permitted_E = left_E if permitted_TE is None else left_E & permitted_TE[token]
        order_E = np.argsort(-np.fmax(scores_TE[token], -np.inf), kind="stable")
        best = [*order_E[permitted_E[order_E]].tolist(), *order_E[(left_E & ~permitted_E)[order_E]].tolist()]
        places = np.flatnonzero(replaced_TK[token])[: len(best)]
        replaced_TK[token] = False
        replaced_TK[token, places] = True
        experts_TK[token, places] = best[: len(places)]
    chosen_scores_TK = np.take_along_axis(scores_TE, chosen_TK.astype(np.int64), axis=1)
    return Routed(experts_TK, replaced_TK, _replaced_mass_T(chosen_scores_TK, replaced_TK))


def _unchanged(chosen_TK: np.ndarray) -> Routed:
    return Routed(chosen_TK, np.zeros(chosen_TK.shape, dtype=bool), np.zeros(len(chosen_TK), dtype=np.float32))


def _route_one(
    rest_E: np.ndarray,
    scores_E: np.ndarray,
    chosen_TK: np.ndarray,
    available_E: np.ndarray,
    alpha: np.float32,
    critical_E: np.ndarray | None,
    prefer: Callable[[int, np.ndarray], np.ndarray],
) -> Routed:
    """One token, which is most of decoding: k is so small that plain loops are faster than vectors."""
    chosen_K = chosen_TK[0]
    rest_E[chosen_K] = -np.inf
    best_rest = max(rest_E[rest_E.argmax()], np.float32(0))
    high = float((1 + alpha) * best_rest)
    scores = scores_E[chosen_K].tolist()
    unwanted = sorted(
        (score, expert, place)
        for place, (score, expert) in enumerate(zip(scores, chosen_K.tolist(), strict=True))
        if score < high and not available_E[expert] and (critical_E is None or not critical_E[expert])
    )
    if not unwanted:
        return _unchanged(chosen_TK)

    outside_E = _outside((rest_E > (1 - alpha) * best_rest) & available_E)
    experts_TK, replaced_TK, mass = chosen_TK.copy(), np.zeros(chosen_TK.shape, dtype=bool), 0.0
    for score, expert, place in unwanted:
        best = (prefer(expert, rest_E) + outside_E).argmax()
        if outside_E[best]:
            break
        outside_E[best] = -np.inf
        experts_TK[0, place] = best
        replaced_TK[0, place] = True
        mass += score
    total = sum(score for score in scores if score > 0)
    return Routed(experts_TK, replaced_TK, np.array([mass / total if total else 0.0], dtype=np.float32))


def _route_batch(
    rest_TE: np.ndarray,
    scores_TE: np.ndarray,
    chosen_TK: np.ndarray,
    available_E: np.ndarray,
    alpha_T1: np.ndarray,
    critical_E: np.ndarray | None,
    prefer: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Routed:
    """Several tokens at once; the loop is over the replacements of a token, not over tokens."""
    token_T1 = np.arange(len(chosen_TK))[:, None]
    rest_TE[token_T1, chosen_TK] = -np.inf
    best_rest_T1 = rest_TE.max(axis=1, keepdims=True, initial=0.0)
    chosen_scores_TK = scores_TE[token_T1, chosen_TK]
    low_TK = (chosen_scores_TK < (1 + alpha_T1) * best_rest_T1) & (alpha_T1 > 0)
    if critical_E is not None:
        low_TK &= ~critical_E[chosen_TK]
    at_hand_E = available_E.copy()
    at_hand_E[chosen_TK[~low_TK]] = True
    unwanted_TK = low_TK & ~at_hand_E[chosen_TK]
    rows_R = unwanted_TK.any(axis=1).nonzero()[0]
    if rows_R.size == 0:
        return _unchanged(chosen_TK)

    floor_T1 = (1 - alpha_T1) * best_rest_T1
    rest_RE = rest_TE[rows_R]
    in_window_RE = (rest_RE > floor_T1[rows_R]) & at_hand_E
    outside_RE = _outside(in_window_RE)
    count_R = np.minimum(unwanted_TK[rows_R].sum(axis=1), in_window_RE.sum(axis=1))
    # places in the flat choice, the lowest-scored unwanted expert of each token first
    key_RK = np.where(unwanted_TK[rows_R], chosen_scores_TK[rows_R], np.inf)
    places_RK = np.lexsort((chosen_TK[rows_R], key_RK)) + (rows_R * chosen_TK.shape[1])[:, None]

    chosen, experts_TK, replaced_TK = chosen_TK.reshape(-1), chosen_TK.copy(), np.zeros(chosen_TK.shape, dtype=bool)
    each_R = np.arange(rows_R.size)
    for j in range(count_R.max()):
        places_R = places_RK[:, j]
        best_R = (prefer(chosen[places_R], rest_RE) + outside_RE).argmax(axis=1)
        outside_RE[each_R, best_R] = -np.inf
        done_R = count_R > j
        experts_TK.reshape(-1)[places_R[done_R]] = best_R[done_R]
        replaced_TK.reshape(-1)[places_R[done_R]] = True

    return Routed(experts_TK, replaced_TK, _replaced_mass_T(chosen_scores_TK, replaced_TK))


def _outside(in_window: np.ndarray) -> np.ndarray:
    """What to add to a preference so that only the window counts: 0 within, -inf outside."""
    return np.where(in_window, np.float32(0), np.float32(-np.inf))


def _replaced_mass_T(chosen_scores_TK: np.ndarray, replaced_TK: np.ndarray) -> np.ndarray:
    """Share of the choices' gate scores that was replaced; 0 where all of them are 0 or NaN."""
    scores_TK = np.fmax(chosen_scores_TK, 0.0)
    total_T = scores_TK.sum(axis=1)
    share_T = (scores_TK * replaced_TK).sum(axis=1) / np.where(total_T > 0, total_T, 1.0)
    return share_T.astype(np.float32, copy=False)
