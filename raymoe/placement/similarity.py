"""Which candidate stands in best for an expert that is not at hand. Pure: arrays in, arrays out.

Similarity only ranks candidates *within* the alpha window of ``routing``; it never widens the window. It comes from
behaviour, gate scores or outputs: experts' weights say nothing about it.

L layers, E experts, R tokens with an expert to replace.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raymoe.errors import ConfigError


class Similarity(Protocol):
    """Ranks substitutes, and knows which experts have none."""

    def preference(self, layer: int, replaced: np.ndarray | int, scores: np.ndarray) -> np.ndarray:
        """How well each expert stands in for ``replaced``: float [E] or [R, E], larger is better, not NaN.

        Args:
            replaced: the expert to replace: one, or one per token as int [R].
            scores: float32 [E] or [R, E], the tokens' gate scores, not NaN; -inf for what can't be a substitute. Not
                modified, but may be returned.
        """
        ...

    def critical_E(self, layer: int) -> np.ndarray | None:
        """Bool per expert: True where nothing resembles it, so that it is never replaced. None: there are none."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreCloseness:
    """Experts that the router scores alike do alike: the best candidate is the best-scored one (SMoE, as published)."""

    def preference(self, layer: int, replaced: np.ndarray | int, scores: np.ndarray) -> np.ndarray:
        """The gate scores themselves, whatever is replaced."""
        return scores

    def critical_E(self, layer: int) -> np.ndarray | None:
        """No expert is critical."""
        return None


@dataclass(frozen=True, slots=True)
class MatrixSimilarity:
    """Similarity from a calibration profile: co-activation, or mean cosine between outputs on the same tokens.

    Args:
        matrix_LEE: float32, ``matrix_LEE[layer, replaced, candidate]``; larger is more alike. Need not be symmetric.
        critical_LE: bool, the experts that are never replaced; None where there are none.

    Raises:
        ConfigError: shapes that do not belong together, or values that can't be compared.
    """

    matrix_LEE: np.ndarray
    critical_LE: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.matrix_LEE.shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ConfigError(f"profile: similarity must be [layers, experts, experts], not {list(shape)}")
        if not np.isfinite(self.matrix_LEE).all():
            raise ConfigError("profile: similarity must be finite, but some values are NaN or infinite")
        if self.critical_LE is not None and self.critical_LE.shape != shape[:2]:
            raise ConfigError(
                f"profile: critical experts must be [layers, experts] = {list(shape[:2])}, "
                f"not {list(self.critical_LE.shape)}"
            )

    def preference(self, layer: int, replaced: np.ndarray | int, scores: np.ndarray) -> np.ndarray:
        """The rows of the replaced experts, whatever the scores."""
        return self.matrix_LEE[layer].take(replaced, axis=0)

    def critical_E(self, layer: int) -> np.ndarray | None:
        """As the profile marks them."""
        return None if self.critical_LE is None else self.critical_LE[layer]
