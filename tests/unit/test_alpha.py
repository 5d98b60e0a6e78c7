"""Choosing alpha for a time budget: from a fit, and live on a simulated plant."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.placement.alpha import SLACK, WINDOW_STEPS, AlphaControl, choose_alpha, fit_tpot

# --- from measurements ----------------------------------------------------------------------------------

LINE = [(0.0, 0.050), (0.1, 0.045), (0.2, 0.040)]  # 50 ms, 5 ms less per 0.1


@pytest.mark.parametrize(
    ("points", "budget_s", "alpha"),
    [
        (LINE, 0.060, 0.0),
        (LINE, 0.050, 0.0),
        (LINE, 0.045, 0.1),
        (LINE, 0.040, 0.2),
        (LINE, 0.0375, 0.25),  # beyond what was measured, within alpha_max
        (LINE, 0.030, 0.35),  # out of reach: alpha_max
        (LINE[:2], 0.0475, 0.05),
        (LINE[:1], 0.050, 0.0),
        (LINE[:1], 0.049, 0.35),  # one point knows no slope
        ([(0.1, 0.044), (0.1, 0.046), (0.2, 0.040), (0.2, 0.040)], 0.0425, 0.15),  # repeated alphas make a line
        ([(a, 0.05 - 0.2 * a + 0.4 * a * a) for a in (0.0, 0.1, 0.2, 0.3)], 0.034, 0.1),  # a parabola's first crossing
        ([(a, 0.05 + 0.01 * a) for a in (0.0, 0.1, 0.2, 0.3)], 0.049, 0.35),  # slower with alpha
    ],
)
def test_the_smallest_alpha_within_the_budget(points: list[tuple[float, float]], budget_s: float, alpha: float) -> None:
    assert choose_alpha(points, budget_s, 0.35) == pytest.approx(alpha, abs=1e-9)


def test_a_budget_out_of_reach_can_be_told() -> None:
    fit = fit_tpot(LINE)
    assert fit.smallest_alpha(0.030, 0.35) is None
    assert fit.at(0.35) == pytest.approx(0.0325)


def test_the_fit_is_a_line_until_a_parabola_has_something_to_show() -> None:
    bent = [(0.0, 0.05), (0.1, 0.04), (0.2, 0.04), (0.3, 0.05)]
    assert fit_tpot(bent[:3]).quadratic_s == 0
    assert fit_tpot(bent).quadratic_s == pytest.approx(0.5)


@pytest.mark.parametrize("points", [[], [(0.1, math.nan)], [(math.inf, 0.04), (0.1, 0.04)]])
def test_no_measurement_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="needs at least one finite"):
        choose_alpha(points, 0.04, 0.35)


measured = st.lists(st.tuples(st.integers(0, 10).map(lambda n: n / 20), st.floats(0.001, 0.1)), min_size=1, max_size=8)


@given(measured, st.floats(0.001, 0.1))
def test_the_prediction_meets_the_budget_and_no_smaller_alpha_does(
    points: list[tuple[float, float]], budget_s: float
) -> None:
    fit = fit_tpot(points)
    alpha = fit.smallest_alpha(budget_s, 0.5)
    limit = 0.5 if alpha is None else alpha
    assert all(fit.at(limit * part / 100) > budget_s - 1e-9 for part in range(100) if limit > 0)
    if alpha is not None:
        assert 0 <= alpha <= 0.5 and fit.at(alpha) <= budget_s + 1e-9


# --- live -----------------------------------------------------------------------------------------------

BUDGET_S = 0.040


def simulate(
    tpot_s: float, slope: float, noise: float, *, windows: int = 200, start: float = 0.0, alpha_max: float = 0.35
) -> list[float]:
    """Alpha after each window; the plant takes ``tpot_s`` at alpha = 0, and per alpha ``slope`` budgets less."""
    random = np.random.default_rng(0)
    control = AlphaControl(tpot_budget_s=BUDGET_S, alpha_max=alpha_max)
    alpha, alphas = start, []
    for _ in range(windows):
        for _ in range(WINDOW_STEPS):
            alpha = control.update(alpha, (tpot_s - slope * BUDGET_S * alpha) * random.lognormal(0, noise))
        alphas.append(alpha)
    return alphas


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("slope", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("start", [0.0, 0.35])
def test_it_settles_where_the_budget_is_just_met(start: float, slope: float, noise: float) -> None:
    tpot_s = BUDGET_S * (1 + 0.2 * slope)  # alpha = 0.2 meets the budget exactly
    settled = simulate(tpot_s, slope, noise, start=start)[80:]
    noise_of_mean = noise / math.sqrt(WINDOW_STEPS)
    highest = 0.2 + (SLACK + 2 * noise_of_mean) / slope
    lowest = 0.2 - 2 * noise_of_mean / slope - 1e-6
    assert lowest <= min(settled) and max(settled) <= highest
    if noise == 0.0:
        assert len(set(settled)) == 1, "within the band it rests"


@pytest.mark.parametrize("slope", [0.5, 1.0, 5.0, 8.0])
def test_it_does_not_oscillate_without_noise(slope: float) -> None:
    for start in (0.0, 0.35):
        moves = np.diff(simulate(BUDGET_S * (1 + 0.2 * slope), slope, 0.0, start=start))
        turns = np.diff(np.sign(moves[moves != 0]))
        assert np.count_nonzero(turns) == 0


def test_it_is_exact_again_when_there_is_time_to_spare() -> None:
    alphas = simulate(BUDGET_S * 0.9, 1.0, 0.1, start=0.35)
    assert alphas[-1] == 0.0
    assert alphas[0] > 0.3, "slowly"


def test_it_stays_at_the_limit_when_the_budget_is_out_of_reach() -> None:
    assert simulate(BUDGET_S * 2, 1.0, 0.1)[-1] == 0.35


def test_within_the_band_nothing_changes() -> None:
    control = AlphaControl(tpot_budget_s=1.0, alpha_max=0.5)
    assert [control.update(0.25, 1 - SLACK / 2) for _ in range(5 * WINDOW_STEPS)] == [0.25] * 5 * WINDOW_STEPS
    assert control.measured_tpot_s == pytest.approx(1 - SLACK / 2)


def test_one_outlier_moves_alpha_by_one_small_step() -> None:
    control = AlphaControl(tpot_budget_s=1.0, alpha_max=0.5)
    alpha = control.update(0.25, 1000.0)
    for _ in range(WINDOW_STEPS - 1):
        alpha = control.update(alpha, 1.0)
    assert alpha == pytest.approx(0.27)


def test_a_new_alpha_starts_a_new_window() -> None:
    """31 steps with another alpha say nothing of this one."""
    control = AlphaControl(tpot_budget_s=1.0, alpha_max=0.5)
    for _ in range(WINDOW_STEPS - 1):
        control.update(0.25, 9.0)
    assert control.update(0.0, 9.0) == 0.0
    assert control.measured_tpot_s is None


@pytest.mark.parametrize("tpot_s", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_without_meaning_is_passed_over(tpot_s: float) -> None:
    control = AlphaControl(tpot_budget_s=1.0, alpha_max=0.5)
    assert {control.update(0.25, tpot_s) for _ in range(2 * WINDOW_STEPS)} == {0.25}


@given(st.lists(st.tuples(st.none() | st.floats(-1, 2), st.floats(0.001, 100)), max_size=100), st.floats(0, 1))
def test_alpha_stays_in_range_whatever_is_measured(steps: list[tuple[float | None, float]], alpha_max: float) -> None:
    control, alpha = AlphaControl(tpot_budget_s=1.0, alpha_max=alpha_max), 0.0
    for given_, tpot_s in steps:
        alpha = control.update(alpha if given_ is None else given_, tpot_s)
        assert 0 <= alpha <= alpha_max


@pytest.mark.parametrize(
    ("budget_s", "alpha_max", "message"),
    [
        (0.0, 0.3, "tpot_budget_s must be more than 0 seconds, not 0.0"),
        (math.nan, 0.3, "tpot_budget_s must be more than 0"),
        (0.04, -0.1, "alpha_max must be at least 0, not -0.1"),
        (0.04, math.inf, "alpha_max must be at least 0"),
    ],
)
def test_limits_without_meaning_are_refused(budget_s: float, alpha_max: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlphaControl(tpot_budget_s=budget_s, alpha_max=alpha_max)
