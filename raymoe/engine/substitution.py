"""Put a router's choice and a pure decision on it together: which experts are replaced, and with what weights.

T tokens, K experts per token, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from raymoe.model.router_rule import RouterRule
from raymoe.placement.routing import Routed, route
from raymoe.placement.similarity import Similarity

Decide = Callable[..., Routed]
"""``placement.routing.route``, or what a benchmark puts in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Substituted:
    """What a layer computes.

    Attributes:
        experts_TK, weights_TK: on the devices of the router's.
        replaced: (token, expert) pairs that were.
        replaced_mass: sum over tokens of the replaced experts' share of the chosen ones' gate scores.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    replaced: int
    replaced_mass: float


@dataclass(slots=True)
class Decided:
    """Totals of decisions."""

    decisions: int = 0
    substituted: int = 0
    replaced_mass: float = 0.0

    def add(self, done: Substituted) -> None:
        """Count what was replaced in one layer."""
        self.substituted += done.replaced
        self.replaced_mass += done.replaced_mass


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
    routed = decide(
        scores_TE,
        experts_TK.cpu().numpy(),
        available_E,
        alpha_T,
        permitted_TE=rule.permitted(scores_TE),
        similarity=similarity,
        layer=layer,
    )
    replaced = int(np.count_nonzero(routed.replaced_TK))
    if not replaced:
        return Substituted(experts_TK=experts_TK, weights_TK=weights_TK, replaced=0, replaced_mass=0.0)
    rows = np.flatnonzero(routed.replaced_TK.any(axis=1))
    return Substituted(
        experts_TK=torch.from_numpy(routed.experts_TK).to(experts_TK.device),
        weights_TK=reweighted(rule, scores_TE, routed.experts_TK, rows, weights_TK),
        replaced=replaced,
        replaced_mass=float(routed.replaced_mass_T.sum()),
    )


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
