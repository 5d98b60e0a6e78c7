"""How an architecture turns router logits into chosen experts and their weights, and how that is found out.

A rule is not read from an architecture's name or code but fitted: of all candidates, it is the one that reproduces
what the architecture did on a sample of tokens. Where none does, there is no rule.

T tokens, E experts, K experts per token, G groups, M experts of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

SCORES = ("softmax", "sigmoid", "identity", "sqrtsoftplus")  # identity: the router returns scores, not logits
MAX_EXPONENT = 80.0  # exp of more than 88 overflows float32
SMALLEST_SUM = 1e-20  # what architectures add to the sum that they divide by


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """An architecture's choice of experts and weights, in float32.

    Attributes:
        score: gate scores from logits, one of SCORES.
        renormalised: weights are divided by their sum over the K chosen experts.
        scale: constant factor on the weights.
        scale_E: factor on an expert's weight, after the renormalisation.
        bias_E: added for selection only, to the gate scores, or to the logits where ``bias_on_logits``.
        groups: experts are chosen within the best ``groups_kept`` of this many groups, by biased scores.
        group_score: what a group is worth: its best expert ("max"), or the sum of its best two ("top2").
        excluded_score: what an expert outside these groups counts in the selection.
    """

    score: str
    renormalised: bool
    scale: float
    scale_E: np.ndarray | None = None
    bias_E: np.ndarray | None = None
    bias_on_logits: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    excluded_score: float = -np.inf

    @property
    def chooses_by_score(self) -> bool:
        """Whether the best-scored experts are chosen: there is neither a bias nor a limit to groups."""
        return self.bias_E is None and self.groups_kept == self.groups

    def scores(self, logits_TE: np.ndarray) -> np.ndarray:
        """Gate scores of all experts, without selection bias: float32 [T, E], at least 0."""
        logits_TE = logits_TE.astype(np.float32, copy=False)
        if self.score == "identity":
            return logits_TE
        if self.score == "sqrtsoftplus":
            return np.sqrt(np.logaddexp(np.float32(0.0), logits_TE))
        if self.score == "sigmoid":
            return 1.0 / (1.0 + np.exp(np.minimum(-logits_TE, MAX_EXPONENT)))
        exponentials_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        return exponentials_TE / exponentials_TE.sum(axis=1, keepdims=True)

    def permitted(self, scores_TE: np.ndarray) -> np.ndarray | None:
        """Which experts the group limit allows, bool [T, E]; None where there is no limit."""
        return None if self.groups_kept == self.groups else self._permitted(self._biased(scores_TE))

    def selection_scores(self, scores_TE: np.ndarray) -> np.ndarray:
        """What the architecture takes the K largest of, in terms of scores: biased and limited to groups."""
        biased_TE = self._biased(scores_TE)
        if self.groups_kept == self.groups:
            return biased_TE
        return np.where(self._permitted(biased_TE), biased_TE, np.float32(self.excluded_score))

    def weights(self, scores_TK: np.ndarray, experts_TK: np.ndarray | None = None) -> np.ndarray:
        """The weights of a set of experts from its own gate scores, float32 [T, K].

        Args:
            experts_TK: the set; needed only where the rule has a factor per expert.

        Raises:
            ValueError: the rule has a factor per expert, and ``experts_TK`` is missing.
        """
        if self.scale_E is not None and experts_TK is None:
            raise ValueError("this architecture scales weights by expert: weights() needs the experts")
        weights_TK = scores_TK
        if self.renormalised:
            weights_TK = scores_TK / np.maximum(scores_TK.sum(axis=1, keepdims=True), SMALLEST_SUM)
        if self.scale != 1.0 or not self.renormalised:
            weights_TK = weights_TK * self.scale
        return weights_TK if self.scale_E is None else weights_TK * self.scale_E[experts_TK]

    def _biased(self, scores_TE: np.ndarray) -> np.ndarray:
        if self.bias_E is None:
            return scores_TE
        if not self.bias_on_logits:
            return scores_TE + self.bias_E
        odds_TE = scores_TE * np.exp(self.bias_E)  # sigmoid(logit + bias), from sigmoid(logit)
        return odds_TE / (odds_TE + (1.0 - scores_TE))

    def _permitted(self, biased_TE: np.ndarray) -> np.ndarray:
        tokens = biased_TE.shape[0]
        groups_TGM = biased_TE.reshape(tokens, self.groups, -1)
        best = 2 if self.group_score == "top2" else 1
        worth_TG = np.sort(groups_TGM, axis=2)[:, :, -best:].sum(axis=2)
        kept_TG = np.zeros(worth_TG.shape, dtype=bool)
        np.put_along_axis(kept_TG, np.argsort(-worth_TG, axis=1)[:, : self.groups_kept], True, axis=1)
        return np.repeat(kept_TG, groups_TGM.shape[2], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSample:
    """What an architecture did for some tokens.

    Attributes:
        logits_TE: what its router returned.
        experts_TK, weights_TK: what its experts received.
        tolerance: relative error that the precision of its computation explains.
    """

    logits_TE: np.ndarray
    experts_TK: np.ndarray
    weights_TK: np.ndarray
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterHints:
    """Numbers found at a router that its rule may be made of.

    Attributes:
        biases: [E] each, not all zero, for the selection.
        scales: [E] each, for the weights.
        numbers: constants; a fitted scale close to one of them is that one.
        groups: pairs of (groups, groups kept).
    """

    biases: list[np.ndarray] = field(default_factory=list)
    scales: list[np.ndarray] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)


def fit_rule(sample: RoutingSample, hints: RouterHints) -> RouterRule | None:
    """The rule that reproduces weights and choices of every token in the sample, or None.

    Candidates with the closest weights come first. Choices may differ between experts whose scores the precision
    can't tell apart, but the candidate with the fewest such differences is taken.
    """
    weightings = []
    for rule in _weightings(hints):
        fitted = _scaled(rule, sample, hints)
        error = np.inf if fitted is None else _weight_error(fitted, sample)
        if fitted is not None and error <= sample.tolerance:
            weightings.append((error, fitted))
    for _, weighting in sorted(weightings, key=lambda item: item[0]):
        scores_TE = weighting.scores(sample.logits_TE)
        best: tuple[int, RouterRule] | None = None
        for rule in _selections(weighting, hints, scores_TE.shape[1]):
            differing = _differing_choices(rule, scores_TE, sample)
            if differing is not None and (best is None or differing < best[0]):
                best = (differing, rule)
            if differing == 0:
                break
        if best is not None:
            return best[1]
    return None


def _weightings(hints: RouterHints) -> Iterator[RouterRule]:
    """Candidates for the weights, the simplest first."""
    for scale_E in (None, *hints.scales):
        for score in SCORES:
            for renormalised in (True, False):
                yield RouterRule(score=score, renormalised=renormalised, scale=1.0, scale_E=scale_E)


def _selections(rule: RouterRule, hints: RouterHints, experts: int) -> Iterator[RouterRule]:
    """Candidates for the choice that weighs as ``rule`` does.

    Those with a bias come first, as one too small to change the sample's choices can still change others. Group
    limits come last, as one that holds changes many.
    """
    biased = [replace(rule, bias_E=bias_E) for bias_E in hints.biases]
    if rule.score == "sigmoid":
        biased += [replace(rule, bias_E=bias_E, bias_on_logits=True) for bias_E in hints.biases]
    biased.append(rule)
    yield from biased
    for groups, kept in hints.groups:
        for candidate in biased:
            for group_score in ("max", "top2") if experts >= 2 * groups else ("max",):
                for excluded in (-np.inf, 0.0):
                    yield replace(
                        candidate,
                        groups=groups,
                        groups_kept=kept,
                        group_score=group_score,
                        excluded_score=excluded,
                    )


def _scaled(rule: RouterRule, sample: RoutingSample, hints: RouterHints) -> RouterRule | None:
    """``rule`` with the factor on its weights that fits the sample best, or None where no factor is positive."""
    if rule.score == "identity" and sample.logits_TE.min() < 0:
        return None  # logits, not scores
    plain_TK = _weights(rule, sample)
    square = float((plain_TK * plain_TK).sum())
    scale = float((plain_TK * sample.weights_TK).sum()) / square if square > 0 else 0.0
    if not np.isfinite(scale) or scale <= 0:
        return None
    nearest = min((1.0, *hints.numbers), key=lambda number: abs(number - scale))
    return replace(rule, scale=nearest if abs(nearest - scale) <= sample.tolerance * scale else scale)


def _weights(rule: RouterRule, sample: RoutingSample) -> np.ndarray:
    chosen_TK = np.take_along_axis(rule.scores(sample.logits_TE), sample.experts_TK, axis=1)
    return rule.weights(chosen_TK, sample.experts_TK)


def _weight_error(rule: RouterRule, sample: RoutingSample) -> float:
    """The largest relative error of the weights; those that hardly count are held against the scale instead."""
    weights_TK = _weights(rule, sample)
    error_TK = np.abs(weights_TK - sample.weights_TK) / np.maximum(np.abs(sample.weights_TK), 1e-3 * rule.scale)
    return float(error_TK.max())


def _differing_choices(rule: RouterRule, scores_TE: np.ndarray, sample: RoutingSample) -> int | None:
    """For how many tokens the rule chooses other experts; None where the precision does not explain that."""
    chosen_TE = np.zeros(scores_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, sample.experts_TK, True, axis=1)
    if (chosen_TE.sum(axis=1) < sample.experts_TK.shape[1]).any():
        return None  # the same expert twice: not a choice among E
    selection_TE = rule.selection_scores(scores_TE)
    chosen_value_TE = np.where(chosen_TE, selection_TE, np.inf)
    other_value_TE = np.where(chosen_TE, -np.inf, selection_TE)
    worst_T, other_T = chosen_value_TE.min(axis=1), other_value_TE.max(axis=1)
    pair_T2 = np.stack([chosen_value_TE.argmin(axis=1), other_value_TE.argmax(axis=1)], axis=1)
    size_TE = scores_TE if rule.bias_E is None else scores_TE + np.abs(rule.bias_E)
    # of the roundings in the tolerance, two concern the choice: the score's, and that of its sum with the bias
    slack_T = sample.tolerance / 2 * np.take_along_axis(size_TE, pair_T2, axis=1).sum(axis=1)
    if (other_T > worst_T + slack_T).any():
        return None
    return int((other_T > worst_T).sum())
