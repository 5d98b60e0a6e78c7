"""How much substitution a time budget needs: alpha chosen from measurements, once or while serving.

``choose_alpha`` is for ``tune``: a polynomial of low degree through measured (alpha, TPOT), for TPOT falls about
linearly in alpha, and the smallest alpha whose predicted TPOT meets the budget (SMoE, arXiv 2508.18983, eq. 5).

``AlphaControl`` does the same live. Its law: TPOT is averaged over a window of steps in which alpha did not change,
so that no measurement answers to an older alpha and there is no lag to oscillate on. Then, with

    excess = mean TPOT / budget - 1

- a mean within ``SLACK`` below the budget is left alone: the dead band is wider than the noise of a mean, and wider
  than what one step changes, so that steps do not chase each other across it;
- otherwise alpha moves by ``GAIN`` times the distance to the middle of the band, up when too slow, down when there is
  time to spare, but by ``LARGEST_STEP`` at most, so that one outlier (a pause, a long prefill) does little harm.

With TPOT falling by s of the budget per unit of alpha, every step shortens the distance by the factor |1 - GAIN·s|:
no overshoot for s <= 5, convergence for s < 10; the paper's systems have s of about 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raymoe.errors import ConfigError

WINDOW_STEPS = 32  # brings noise of 10% per step down to 2% of the mean; 1.3 s at 40 ms per token
SLACK = 0.05  # of the budget: over twice the noise of a mean
GAIN = 0.2  # alpha per unit of relative excess: a fifth of the distance per window at s = 1
LARGEST_STEP = 0.02  # of alpha per window: at least 17 windows from exact to the paper's 0.35
QUADRATIC_POINTS = 4  # distinct alphas from which a parabola is more than a line through noise


@dataclass(frozen=True, slots=True, kw_only=True)
class TpotFit:
    """Predicted TPOT: ``constant_s + linear_s·alpha + quadratic_s·alpha²``."""

    constant_s: float
    linear_s: float = 0.0
    quadratic_s: float = 0.0

    def at(self, alpha: float) -> float:
        """Predicted seconds per output token."""
        return self.constant_s + (self.linear_s + self.quadratic_s * alpha) * alpha

    def smallest_alpha(self, budget_s: float, alpha_max: float) -> float | None:
        """The smallest alpha in [0, alpha_max] that meets the budget; None where none does."""
        if self.constant_s <= budget_s:
            return 0.0
        # TPOT starts above the budget, so that it first meets it where it equals it
        return min((root for root in self._crossings(budget_s) if 0 < root <= alpha_max), default=None)

    def _crossings(self, budget_s: float) -> list[float]:
        """Where the prediction equals the budget, by the formula that does not cancel for a tiny quadratic part."""
        above_s = self.constant_s - budget_s
        discriminant = self.linear_s**2 - 4 * self.quadratic_s * above_s
        if discriminant < 0:
            return []
        half = -(self.linear_s + math.copysign(math.sqrt(discriminant), self.linear_s)) / 2
        roots = [above_s / half] if half else []
        return [*roots, half / self.quadratic_s] if self.quadratic_s else roots


def fit_tpot(points: Sequence[tuple[float, float]]) -> TpotFit:
    """Least squares through measured (alpha, TPOT in seconds): a parabola, with few distinct alphas a line.

    Raises:
        ConfigError: no point, or one that is no number.
    """
    if not points or not np.isfinite(points).all():
        raise ConfigError(f"alpha can't be chosen: needs at least one finite (alpha, TPOT), got {list(points)}")
    alphas, tpots_s = zip(*points, strict=True)
    distinct = len(set(alphas))
    degree = 2 if distinct >= QUADRATIC_POINTS else min(distinct - 1, 1)
    constant_s, linear_s, quadratic_s = [*np.polynomial.polynomial.polyfit(alphas, tpots_s, degree), 0.0, 0.0][:3]
    return TpotFit(constant_s=float(constant_s), linear_s=float(linear_s), quadratic_s=float(quadratic_s))


def choose_alpha(points: Sequence[tuple[float, float]], budget_s: float, alpha_max: float) -> float:
    """The smallest alpha in [0, alpha_max] whose predicted TPOT meets the budget; alpha_max where none does.

    ``fit_tpot(points).smallest_alpha(budget_s, alpha_max) is None`` tells whether the budget is out of reach.

    Args:
        points: measured (alpha, TPOT in seconds).
    """
    alpha = fit_tpot(points).smallest_alpha(budget_s, alpha_max)
    return alpha_max if alpha is None else alpha


@dataclass(slots=True, kw_only=True)
class AlphaControl:
    """Keeps TPOT just within a budget by moving alpha slowly; the law is explained above.

    Attributes:
        measured_tpot_s: mean TPOT of the last full window; None before the first.

    Raises:
        ConfigError: a budget or a limit of alpha that makes no sense.
    """

    tpot_budget_s: float
    alpha_max: float
    measured_tpot_s: float | None = field(default=None, init=False)
    _alpha: float = field(default=math.nan, init=False)
    _window_s: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tpot_budget_s) and self.tpot_budget_s > 0):
            raise ConfigError(f"tpot_budget_s must be more than 0 seconds, not {self.tpot_budget_s}")
        if not (math.isfinite(self.alpha_max) and self.alpha_max >= 0):
            raise ConfigError(f"alpha_max must be at least 0, not {self.alpha_max}")

    def update(self, alpha: float, tpot_s: float) -> float:
        """Take in one step's TPOT, measured with ``alpha``; returns the alpha for the next step. Mutates.

        An alpha other than the last one returned (someone set it) starts a new window. A TPOT that is no positive
        number, or was measured with an alpha out of range, is passed over.
        """
        if alpha != self._alpha:
            self._start_window(alpha)
        if alpha == self._alpha and math.isfinite(tpot_s) and tpot_s > 0:
            self._window_s.append(tpot_s)
        if len(self._window_s) == WINDOW_STEPS:
            self.measured_tpot_s = sum(self._window_s) / WINDOW_STEPS
            self._start_window(alpha + self._step(self.measured_tpot_s / self.tpot_budget_s - 1))
        return self._alpha

    def _start_window(self, alpha: float) -> None:
        self._alpha = min(max(alpha, 0.0), self.alpha_max)
        self._window_s.clear()

    def _step(self, excess: float) -> float:
        if -SLACK <= excess <= 0:
            return 0.0
        return min(max(GAIN * (excess + SLACK / 2), -LARGEST_STEP), LARGEST_STEP)
