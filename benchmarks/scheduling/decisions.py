"""What scheduling decides, and what that does to the text: no link, no clock, real hidden states.

Every setting decodes the same held-out text on the real model. Eviction rules without substitution leave hidden states
alone, so that they are replayed on recorded exact routing, the clairvoyant bound among them.

C slots per layer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.scheduling.record import Recorder
from benchmarks.scheduling.replay import Trace, hits, mean_hit_rate
from benchmarks.scheduling.setup import DOMAINS, Bench, Variant
from raymoe.config import SchedulingConfig
from raymoe.placement.routing import Routed, route
from raymoe.types import Routing

ALPHAS = (0.1, 0.2, 0.25, 0.3, 0.35, 0.5)
CAPACITIES = (1, 2, 3, 4)  # x top-k experts per layer
REPLAYED = (("clairvoyant", 1), ("lru", 1), ("lfu", 1), ("score", 8), ("score", 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One setting's figures. Perplexity is relative to exact, agreement is of the likeliest token with exact's."""

    slots: int
    rule: str
    alpha: float
    hit_rate: float
    loads_per_layer: float
    substituted: float = 0.0
    replaced_mass: float = 0.0
    perplexity: float = 0.0
    agreement: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class Exact:
    """The exact model on the text: likelihoods, likeliest tokens, and routing."""

    nll: list[np.ndarray]
    argmax: list[np.ndarray]
    traces: list[Trace]

    @property
    def perplexity(self) -> float:
        """Over all texts."""
        return float(np.exp(np.concatenate(self.nll).mean(dtype=np.float64)))


def record(bench: Bench, tokens: int) -> Exact:
    """Decode every domain exactly."""
    exact = Exact([], [], [])
    with bench.variant(SchedulingConfig(), slots=None) as variant:
        recorder = Recorder(bench, variant)
        watched = Variant(recorder, variant.worker, 0.0)  # type: ignore[arg-type]  # it stands before the scheduler
        for domain in DOMAINS:
            result = bench.run(watched, [bench.text(domain, tokens + 1)])
            exact.nll.append(result.nll_BN[0])
            exact.argmax.append(result.argmax_BN[0])
            exact.traces.append(recorder.trace())
    return exact


def replayed(bench: Bench, exact: Exact) -> list[Decided]:
    """Eviction rules on recorded routing."""
    rows = []
    for capacity in CAPACITIES:
        slots = capacity * bench.top_k
        for rule, window in REPLAYED:
            rate = mean_hit_rate(exact.traces, partial(hits, slots=slots, rule=rule, window=window))
            name = f"{rule} n={window}" if rule == "score" else rule
            loads = (1 - rate) * bench.top_k
            rows.append(Decided(slots=slots, rule=name, alpha=0.0, hit_rate=rate, loads_per_layer=loads))
    return rows


def substituted(
    bench: Bench, exact: Exact, tokens: int, progress: Callable[[str], None], alphas: tuple[float, ...] = ALPHAS
) -> list[Decided]:
    """Substitution on the real model, by score and at random."""
    rows = []
    base = SchedulingConfig(policy="importance", prefetch="none", host_assist=False)
    for capacity in CAPACITIES:
        for alpha in alphas:
            rows.append(run_one(bench, exact, tokens, capacity * bench.top_k, base.changed({"alpha": alpha})))
        rows.append(run_one(bench, exact, tokens, capacity * bench.top_k, base, decide=AtRandom()))
        progress(f"substitution at {capacity} x top-k: done")
    return rows


def run_one(
    bench: Bench,
    exact: Exact,
    tokens: int,
    slots: int,
    scheduling: SchedulingConfig,
    decide: Callable[..., Routed] = route,
) -> Decided:
    """One setting on all domains; slots start empty with each, as in the replays."""
    routing, nll, agree = Routing(), [], []
    for number, domain in enumerate(DOMAINS):
        with bench.variant(scheduling, slots=slots) as variant:
            variant.scheduler.decide = decide
            result = bench.run(variant, [bench.text(domain, tokens + 1)])
        routing += result.routing
        nll.append(result.nll_BN[0])
        agree.append(result.argmax_BN[0] == exact.argmax[number])
    perplexity = float(np.exp(np.concatenate(nll).mean(dtype=np.float64)))
    pairs = routing.hits + routing.misses
    return Decided(
        slots=slots,
        rule="score n=64 + substitution" if decide is route else "random substitution",
        alpha=scheduling.alpha,
        hit_rate=routing.hit_rate,
        loads_per_layer=routing.loads / routing.decisions,
        substituted=routing.substituted / pairs,
        replaced_mass=routing.substituted_gate_mass,
        perplexity=perplexity / exact.perplexity,
        agreement=float(np.concatenate(agree).mean()),
    )


class AtRandom:
    """As ``route``, but the replaced experts give way to any resident ones, whatever they score."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def __call__(
        self, scores_TE: np.ndarray, chosen_TK: np.ndarray, available_E: np.ndarray, alpha_T: Any, **more: Any
    ) -> Routed:
        """One token: as many replacements as by score, in the same places."""
        routed = route(scores_TE, chosen_TK, available_E, alpha_T, **more)
        if not routed.replaced_TK.any() or len(chosen_TK) > 1:
            return routed
        places = np.flatnonzero(routed.replaced_TK[0])
        free = np.setdiff1d(np.flatnonzero(available_E), routed.experts_TK[0][~routed.replaced_TK[0]])
        routed.experts_TK[0, places] = self._random.choice(free, len(places), replace=False)
        return routed
