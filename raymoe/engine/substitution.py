"""Put a router's choice and a pure decision on it together: which experts are replaced, and with what weights.

T tokens, K experts per token, E experts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from raymoe.model.router import Router
from raymoe.model.router_rule import RouterRule
from raymoe.placement.routing import Routed, route, without
from raymoe.placement.similarity import Similarity

log = logging.getLogger(__name__)

Decide = Callable[..., Routed]
"""``placement.routing.route``, or what a benchmark puts in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Substituted:
    """What a layer computes.

    Attributes:
        experts_TK, weights_TK: on the devices of the router's.
        replaced_T: how many of each token's pairs were; None where none was.
        replaced_mass_T: the replaced experts' share of the chosen ones' gate scores.
        replaced: the replaced expert of each such pair.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    replaced_T: np.ndarray | None = None
    replaced_mass_T: np.ndarray | None = None
    replaced: np.ndarray | None = None


@dataclass(slots=True)
class Decided:
    """Totals of decisions, and of each row of a step."""

    decisions: int = 0
    substituted_T: np.ndarray | None = None
    replaced_mass_T: np.ndarray | None = None

    @property
    def substituted(self) -> int:
        """Of all rows."""
        return 0 if self.substituted_T is None else int(self.substituted_T.sum())

    @property
    def replaced_mass(self) -> float:
        """Of all rows."""
        return 0.0 if self.replaced_mass_T is None else float(self.replaced_mass_T.sum())

    def add(self, done: Substituted) -> None:
        """Count what was replaced in one layer."""
        if done.replaced_T is not None and done.replaced_mass_T is not None:
            self.count(done.replaced_T, done.replaced_mass_T)

    def count(self, replaced_T: np.ndarray, mass_T: np.ndarray) -> None:
        """The same, by how many pairs of each token were replaced and what share of its scores that was."""
        if self.substituted_T is None or self.replaced_mass_T is None:
            self.substituted_T, self.replaced_mass_T = replaced_T, mass_T.astype(np.float64)
        elif len(self.substituted_T) == len(replaced_T):
            self.substituted_T = self.substituted_T + replaced_T
            self.replaced_mass_T = self.replaced_mass_T + mass_T
        else:  # another step began before these were taken: only their sums mean anything
            self.substituted_T = np.array([self.substituted + int(replaced_T.sum())])
            self.replaced_mass_T = np.array([self.replaced_mass + float(mass_T.sum())])


def substitute(
    rule: RouterRule,
    layer: int,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    scores_TE: np.ndarray,
    available_E: np.ndarray,
    alpha_T: np.ndarray | float,
    *,
    similarity: Similarity | None = None,
    decide: Decide = route,
) -> Substituted:
    """Replace what ``decide`` says; weights of changed tokens follow from their final experts' own scores.

    Args:
        rule: by which the layer's router makes weights of scores.
        scores_TE: the router's gate scores.
        available_E: bool, the experts that cost no load.
        alpha_T: threshold per row, or one for all.
    """
    chosen_TK = experts_TK.cpu().numpy()
    routed = decide(
        scores_TE,
        chosen_TK,
        available_E,
        alpha_T,
        permitted_TE=rule.permitted(scores_TE),
        similarity=similarity,
        layer=layer,
    )
    if not routed.replaced_TK.any():
        return Substituted(experts_TK=experts_TK, weights_TK=weights_TK)
    replaced_T = np.count_nonzero(routed.replaced_TK, axis=1)
    rows = np.flatnonzero(replaced_T)
    return Substituted(
        experts_TK=torch.from_numpy(routed.experts_TK).to(experts_TK.device),
        weights_TK=reweighted(rule, scores_TE, routed.experts_TK, rows, weights_TK),
        replaced_T=replaced_T,
        replaced_mass_T=routed.replaced_mass_T,
        replaced=chosen_TK[routed.replaced_TK],
    )


def do_without(
    router: Router, lost_E: np.ndarray, experts_TK: torch.Tensor, weights_TK: torch.Tensor
) -> Substituted | None:
    """Replace experts that nobody can be asked for. None where no rule says with what weights."""
    rule = router.rule
    if rule is None:
        return None
    chosen_TK = experts_TK.cpu().numpy()
    scores_TE = router.scores_or_weights(chosen_TK, weights_TK)
    decide = partial(_without, lost_E)
    return substitute(rule, 0, experts_TK, weights_TK, scores_TE, ~lost_E, 0.0, decide=decide)


def _without(lost_E: np.ndarray, scores_TE: np.ndarray, chosen_TK: np.ndarray, *_: Any, **more: Any) -> Routed:
    """``without`` in the place of ``route``."""
    return without(lost_E, scores_TE, chosen_TK, more["permitted_TE"])


def warn_of_unknown(rules: Sequence[RouterRule | None]) -> None:
    """Say of how many layers it is not known by what rule their routers choose."""
    unknown = sum(rule is None for rule in rules)
    if unknown:
        log.warning("%d of %d layers route by no known rule: no expert is substituted there", unknown, len(rules))


def mean_scores(scores_TE: np.ndarray) -> np.ndarray:
    """Of a step's tokens, per expert [E]."""
    mean_E: np.ndarray = scores_TE[0] if len(scores_TE) == 1 else scores_TE.mean(axis=0)
    return mean_E


def per_row(alpha: float | np.ndarray, tokens: int) -> np.ndarray | float:
    """One alpha per row: sequences' rows lie together, as many for each."""
    if isinstance(alpha, float) or len(alpha) == tokens:
        return alpha
    return np.repeat(alpha, tokens // len(alpha))


def reweighted(
    rule: RouterRule, scores_TE: np.ndarray, experts_TK: np.ndarray, rows: np.ndarray, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Weights of the tokens in ``rows`` from their final experts' own scores; the others keep the router's bits."""
    if len(scores_TE) == 1:
        fresh_TK = rule.weights(scores_TE[:, experts_TK[0]], experts_TK)
        return torch.from_numpy(fresh_TK).to(weights_TK)
    experts_RK = experts_TK[rows]
    fresh_RK = rule.weights(np.take_along_axis(scores_TE[rows], experts_RK, axis=1), experts_RK)
    weights = weights_TK.clone()
    weights[torch.from_numpy(rows).to(weights.device)] = torch.from_numpy(fresh_RK).to(weights)
    return weights
