"""How much substitution a time budget needs: alpha, time per output token and quality, measured on the same text.

Every alpha decodes the same forced text. Alphas take turns, sequence by sequence, so that a machine whose speed
drifts favours none of them. Quality is against alpha = 0, which is the exact model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.engine.forced import Forced, forced
from raymoe.engine.scheduler_protocol import Scheduler
from raymoe.errors import ConfigError
from raymoe.model.runner import Runner
from raymoe.placement.alpha import TpotFit, fit_tpot
from raymoe.types import Routing

STEP = 0.1  # between measured alphas: six points for a parabola at the default alpha_max
WARM_STEPS = 16  # decoded before anything is measured: slots are empty, kernels and pages cold
SETTLING_STEPS = 8  # of each sequence that don't count as time: the slots hold what the run before left
ALPHA_DIGITS = 3
TUNE_SEED = (
    1_000_000  # of generated text: other than a calibration's, so that no expert is judged by what it was chosen on
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePoint:
    """One measured alpha.

    Attributes:
        tpot_s: median seconds per output token.
        perplexity_ratio: perplexity over that at alpha = 0.
        top1_agreement: share of tokens whose likeliest next token is that of alpha = 0.
        routing: what decoding cost, in all.
    """

    alpha: float
    tpot_s: float
    perplexity: float
    perplexity_ratio: float
    top1_agreement: float
    routing: Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The measurements, and what follows from them.

    Attributes:
        alpha: the smallest that meets the budget by the fit, rounded up; None where none up to ``alpha_max`` does.
        fastest: the measured point with the least time per token.
    """

    points: tuple[TunePoint, ...]
    fit: TpotFit
    budget_s: float
    alpha: float | None

    @property
    def fastest(self) -> TunePoint:
        """The measured point with the least time per token."""
        return min(self.points, key=lambda point: point.tpot_s)


def alphas_to_measure(scheduling: SchedulingConfig) -> list[float]:
    """0, 0.1, … and alpha_max itself. Raises ConfigError where alpha decides nothing."""
    if not scheduling.substitutes:
        raise ConfigError(
            f'scheduling.policy is "{scheduling.policy}", which never substitutes an expert; alpha is tuned for '
            '"importance" and "joint"'
        )
    if scheduling.alpha_max == 0:
        raise ConfigError("scheduling.alpha_max is 0, so that alpha has no room; allowed is up to 1")
    count = math.ceil(round(scheduling.alpha_max / STEP, 9))
    return [round(index * STEP, 9) for index in range(count)] + [scheduling.alpha_max]


def tune(
    runner: Runner,
    scheduler: Scheduler,
    sequences: Sequence[Sequence[int]],
    scheduling: SchedulingConfig,
    budget_s: float,
    on_tokens: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Measure every alpha on every sequence, and choose. Nothing else may run on the engine meanwhile.

    Args:
        on_tokens: told of decoded tokens so far, and of how many there will be.
    """
    alphas = alphas_to_measure(scheduling)
    total = len(alphas) * sum(len(sequence) - 1 for sequence in sequences)
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        on_tokens(done, total)

    scheduler.alpha = 0.0
    forced(runner, scheduler, [sequences[0][: WARM_STEPS + 1]])
    runs: dict[float, list[Forced]] = {alpha: [] for alpha in alphas}
    for sequence in sequences:
        for alpha in alphas:
            scheduler.alpha = alpha
            runs[alpha].append(forced(runner, scheduler, [sequence], on_step=on_step))
    scheduler.alpha = 0.0
    return choose([summarise(alpha, runs[alpha], runs[0.0]) for alpha in alphas], budget_s, scheduling.alpha_max)


def summarise(alpha: float, runs: list[Forced], exact: list[Forced]) -> TunePoint:
    """One point of all sequences' runs, against those of alpha = 0."""
    nll, exact_nll = (np.concatenate([run.nll_BN[0] for run in group]).astype(np.float64) for group in (runs, exact))
    same = np.concatenate([run.argmax_BN[0] == other.argmax_BN[0] for run, other in zip(runs, exact, strict=True)])
    return TunePoint(
        alpha=alpha,
        tpot_s=float(np.median(np.concatenate([run.step_s[SETTLING_STEPS:] for run in runs]))),
        perplexity=float(np.exp(nll.mean())),
        perplexity_ratio=float(np.exp(nll.mean() - exact_nll.mean())),
        top1_agreement=float(same.mean()),
        routing=sum((run.routing for run in runs), Routing()),
    )


def choose(points: Sequence[TunePoint], budget_s: float, alpha_max: float) -> Tuned:
    """The smallest alpha whose predicted time meets the budget."""
    fit = fit_tpot([(point.alpha, point.tpot_s) for point in points])
    alpha = fit.smallest_alpha(budget_s, alpha_max)
    if alpha is not None:
        scale = 10**ALPHA_DIGITS
        alpha = min(math.ceil(round(alpha * scale, 6)) / scale, alpha_max)
    return Tuned(points=tuple(points), fit=fit, budget_s=budget_s, alpha=alpha)
