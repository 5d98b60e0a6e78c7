"""The engine's say on routing by importance: substitution, forecasts to the workers, and what both cost.

Decisions are pure functions of ``raymoe.placement``; here they get what they need (scores from the trunk's routers,
residency from the dispatcher) and are put into effect, in this process and without asking anybody.

T tokens, K experts per token, E experts, H hidden.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from predictor.forecast import Forecast
from predictor.resident import ResidentOutput
from raymoe.config import SchedulingConfig
from raymoe.engine.dispatch import Dispatcher, nothing
from raymoe.engine.lost import LostExperts
from raymoe.engine.substitution import Decide, Decided, mean_scores, per_row, substitute, warn_of_unknown
from raymoe.kernels.turns import PlainRule
from raymoe.model.router import Router
from raymoe.model.router_rule import SMALLEST_SUM, RouterRule
from raymoe.model.runner import SequenceState
from raymoe.placement.prefetch import lookahead, wanted
from raymoe.placement.routing import route
from raymoe.placement.similarity import ScoreCloseness, Similarity
from raymoe.types import Routing, SamplingRecipe

log = logging.getLogger(__name__)

MOST_FORECAST_TOKENS = 64  # a longer prompt needs nearly all experts of a layer, so that nothing is to be foretold
PLAIN_SCORES = ("softmax", "sigmoid")  # that kernels/turns.cpp knows
NO_SUBSTITUTION = PlainRule(alpha=0.0, score="softmax", renormalised=False, scale=1.0)
LAYER_SMOOTHING = 0.02  # weight of one layer's time in the running mean: about six tokens of eight layers

OnForecast = Callable[[int, np.ndarray, np.ndarray], None]
"""Told of each forecast: layer, experts best first, and what each is worth."""


@dataclass(slots=True)
class LayerTime:
    """Running mean of the time from one MoE layer to the next in decode."""

    mean_s: float | None = None
    _last_s: float | None = field(default=None, init=False)

    def layer(self, number: int, now_s: float, tokens: int) -> None:
        """A layer with so many tokens begins; only the time between two layers of one decode step counts."""
        if number == 0:
            self._last_s = None
        if tokens <= MOST_FORECAST_TOKENS and self._last_s is not None:
            took_s = now_s - self._last_s
            self.mean_s = took_s if self.mean_s is None else self.mean_s + LAYER_SMOOTHING * (took_s - self.mean_s)
        self._last_s = now_s if tokens <= MOST_FORECAST_TOKENS else None


def plain_form(rules: Sequence[RouterRule | None]) -> PlainRule | None:
    """What all of these rules are, as C++ knows it; None where they differ, or it doesn't."""
    forms = {None if rule is None else (rule.score, rule.renormalised, rule.scale) for rule in rules}
    form = forms.pop() if len(forms) == 1 else None
    if form is None or form[0] not in PLAIN_SCORES:
        return None
    return PlainRule(alpha=0.0, score=form[0], renormalised=form[1], scale=form[2])


class ExpertScheduler:
    """The trunk's ``ExpertBackend``. Used by one thread.

    Under policies other than ``importance`` it changes nothing and costs nothing.

    Attributes:
        alpha: threshold of the rows of the step to come: one for all, or one per sequence of the batch.
        similarity: what ranks substitutes; None is by gate score.
        decide: the routing decision, a pure function; benchmarks put others in its place.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        scheduling: SchedulingConfig,
        *,
        similarity: Similarity | None = None,
        on_forecast: OnForecast | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.alpha: float | np.ndarray = 0.0
        self.decide: Decide = route
        self.similarity = similarity
        self._on_forecast = on_forecast
        self._routers: Sequence[Router] = ()
        self._forecasts: dict[str, Forecast] = {}
        self._weights_tell = False  # whether an expert that outweighs another outscores it as much
        self._plain_form: PlainRule | None = None  # of all layers' rules, if C++ knows it
        self._decided = Decided()
        self._layer_time = LayerTime()
        self._ahead = 1
        self._top_k = 0
        self._scores_TE: np.ndarray | None = None
        self._weights_TK = torch.empty(0)
        self._lost = LostExperts(dispatcher, substitutes=scheduling.on_lost_expert == "substitute")
        self.reconfigure(scheduling)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings from the next step on."""
        self._scheduling = scheduling
        self._wants_scores = scheduling.policy == "importance"

    def attach(self, routers: Sequence[Router], forecasts: dict[str, Forecast]) -> None:
        """Take scores from these routers (one per MoE layer), and forecasts by kind from there."""
        self._routers = self._lost.routers = routers
        self._forecasts = forecasts
        rules = [router.rule for router in routers]
        self._weights_tell = all(rule is None or (rule.chooses_by_score and rule.scale_E is None) for rule in rules)
        self._plain_form = plain_form(rules) if self._weights_tell else None
        if self._wants_scores:
            warn_of_unknown(rules)

    # --- what the trunk calls ---------------------------------------------------------------------------

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's choice, with experts replaced where that saves a load and alpha allows it."""
        experts_TK, weights_TK = self._lost.route(layer, *self._route(layer, experts_TK, weights_TK))
        self._weights_TK = weights_TK
        return experts_TK, weights_TK

    def _route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._scores_TE = None
        if not self._wants_scores or not self._routers:
            return experts_TK, weights_TK
        tokens, self._top_k = experts_TK.shape
        self._decided.decisions += tokens
        router = self._routers[layer]
        scores_TE = self._scores_TE = router.scores_or_weights(experts_TK.cpu().numpy(), weights_TK)
        if router.rule is None:
            return experts_TK, weights_TK
        alpha_T = per_row(self.alpha, tokens)
        if not (alpha_T if isinstance(alpha_T, float) else alpha_T.any()):
            return experts_TK, weights_TK
        done = substitute(
            router.rule,
            layer,
            experts_TK,
            weights_TK,
            scores_TE,
            self.dispatcher.available(layer),
            alpha_T,
            similarity=self.similarity,
            decide=self.decide,
        )
        self._decided.add(done)
        if done.replaced is not None:
            self.dispatcher.gave_way(layer, done.replaced)
        return done.experts_TK, done.weights_TK

    def certainty(self) -> float | None:
        """How many times the lightest expert of a token another must weigh to be surely kept by ``choose_row``.

        An expert that outweighs the lightest by 1 + alpha outscores the best of those that were not chosen by as much,
        for that one scores less than the lightest: it is a top-score expert (``placement.routing``). None: weights
        don't tell.
        """
        if not self._wants_scores or not self._routers:
            return -math.inf
        alpha = per_row(self.alpha, 1)
        if not np.any(alpha):
            return -math.inf
        return 1.0 + float(np.max(alpha)) if self._weights_tell else None

    def plain_rule(self) -> PlainRule | None:
        """By which C++ decides rows as ``choose_row`` does, the router's logits being at hand; None where it can't."""
        if not self._wants_scores or not self._routers:
            return NO_SUBSTITUTION
        ranks_by_score = self.similarity is None or isinstance(self.similarity, ScoreCloseness)
        if self._plain_form is None or self.decide is not route or not ranks_by_score:
            return None
        return replace(self._plain_form, alpha=float(np.max(per_row(self.alpha, 1))))

    def note_replaced(self, layer: int, before_K: np.ndarray, after_K: np.ndarray, scores_E: np.ndarray) -> None:
        """One row in which somebody else, by ``plain_rule``, has replaced experts."""
        replaced_K = before_K != after_K
        mass = float(scores_E[before_K[replaced_K]].sum() / max(float(scores_E[before_K].sum()), SMALLEST_SUM))
        self.dispatcher.gave_way(layer, before_K[replaced_K])
        self._decided.count(np.array([np.count_nonzero(replaced_K)]), np.array([mass], dtype=np.float32))

    def note_rows(
        self, layers: list[int], experts_NK: np.ndarray, weights_NK: np.ndarray, logits_NE: np.ndarray | None
    ) -> np.ndarray | None:
        """Tokens whose experts were all at hand, one of each of these layers: their gate scores [N, E], where known.

        Args:
            logits_NE: as for ``choose_row``.
        """
        if not self._wants_scores or not self._routers:
            return None
        self._top_k = experts_NK.shape[1]
        self._decided.decisions += len(layers)
        rules = [self._routers[layer].rule for layer in layers]
        first = rules[0]
        if logits_NE is not None and first is not None and all(r is not None and r.score == first.score for r in rules):
            return first.scores(logits_NE)
        one_E = [
            self.scores_row(layer, experts_NK[n], weights_NK[n], None if logits_NE is None else logits_NE[n])
            for n, layer in enumerate(layers)
        ]
        return np.stack(one_E)

    def scores_row(
        self, layer: int, experts_K: np.ndarray, weights_K: np.ndarray, logits_E: np.ndarray | None
    ) -> np.ndarray:
        """Gate scores [E] of one token; where no rule is known, the weights of those that were chosen."""
        rule = self._routers[layer].rule
        if rule is not None and logits_E is not None:
            return rule.scores(logits_E[None])[0]
        scores_E = np.zeros(self._routers[layer].experts, dtype=np.float32)
        scores_E[experts_K] = weights_K
        return scores_E

    def choose_row(
        self,
        layer: int,
        experts_K: np.ndarray,
        weights_K: np.ndarray,
        logits_E: np.ndarray | None,
        available_E: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """``route`` for one token whose routing is on the host: experts, weights, and gate scores [E] where known.

        Args:
            logits_E: the router's; None where it has no known rule, or nobody asks for scores.
            available_E: bool, which experts are at hand.
        """
        self._scores_TE = None
        if not self._wants_scores or not self._routers:
            return experts_K, weights_K, None
        self._top_k = len(experts_K)
        self._decided.decisions += 1
        rule, scores_E = self._routers[layer].rule, self.scores_row(layer, experts_K, weights_K, logits_E)
        alpha = per_row(self.alpha, 1)
        if rule is None or logits_E is None or not np.any(alpha):
            return experts_K, weights_K, scores_E
        scores_TE = scores_E[None]
        permitted_TE, similarity = rule.permitted(scores_TE), self.similarity
        chosen_TK = experts_K[None]
        routed = self.decide(
            scores_TE, chosen_TK, available_E, alpha, permitted_TE=permitted_TE, similarity=similarity, layer=layer
        )
        replaced = int(np.count_nonzero(routed.replaced_TK))
        if replaced:
            self.dispatcher.gave_way(layer, experts_K[routed.replaced_TK[0]])
            experts_K = routed.experts_TK[0]
            weights_K = rule.weights(scores_TE[:, experts_K], routed.experts_TK)[0]
            self._decided.count(np.array([replaced]), routed.replaced_mass_T)
        return experts_K, weights_K, scores_E

    def foresee(self, layer: int, logits_E: np.ndarray) -> None:
        """Forecast router logits of a layer to come, of one token: what it will want is loaded ahead."""
        rule = self._routers[layer].rule
        if rule is not None:
            self._expect(layer, rule.scores(logits_E[None]))

    @property
    def foresees(self) -> bool:
        """Whether it has a use for ``foresee``."""
        return self._wants_scores and self._scheduling.prefetch == "gate"

    def router(self, layer: int) -> Router | None:
        """The layer's router, where scores are asked for."""
        return self._routers[layer] if self._wants_scores and self._routers else None

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every expert, [T, K, H]; forecasts go out while workers load."""
        scores_TE = self._scores_TE
        if scores_TE is None:
            return self.dispatcher.compute(layer, hidden_TH, experts_TK)
        tokens = hidden_TH.shape[0]
        self._layer_time.layer(layer, time.perf_counter(), tokens)
        forecast = self._forecasts.get(self._scheduling.prefetch)
        meanwhile = nothing
        if forecast is not None and tokens <= MOST_FORECAST_TOKENS:
            meanwhile = lambda: self._try_to_tell(forecast, layer)  # noqa: E731 - a closure over this step
        return self.dispatcher.compute(layer, hidden_TH, experts_TK, mean_scores(scores_TE), meanwhile)

    def _try_to_tell(self, forecast: Forecast, layer: int) -> None:
        """A guess must not fail a request: forecasts run architectures' own modules."""
        try:
            self._tell(forecast, layer)
        except Exception:
            log.exception("forecasts from layer %d failed; there are no more of this kind", layer)
            self._forecasts = {kind: other for kind, other in self._forecasts.items() if other is not forecast}

    def _tell(self, forecast: Forecast, layer: int) -> None:
        """Forecast the layer that a load begun now would be in time for; at the first one also those before it."""
        if layer == 0:
            chosen = self._scheduling.lookahead
            ahead = lookahead(self.dispatcher.load_s(), self._layer_time.mean_s) if chosen is None else chosen
            self._ahead = min(ahead, forecast.farthest)
        for ahead in range(1 if layer == 0 else self._ahead, self._ahead + 1):
            scores_TE = forecast.scores(layer, ahead)
            if scores_TE is not None:
                self._expect(layer + ahead, scores_TE)

    def _expect(self, layer: int, scores_TE: np.ndarray) -> None:
        """Tell workers what a layer to come is expected to choose by these scores."""
        rule = self._routers[layer].rule
        chosen_by_TE = scores_TE if rule is None or rule.chooses_by_score else rule.selection_scores(scores_TE)
        experts, worth = wanted(scores_TE, chosen_by_TE, self._top_k)
        self.dispatcher.expect(layer, experts, worth)
        if self._on_forecast is not None:
            self._on_forecast(layer, experts, worth)

    # --- what forecasts ask while a layer's loads are under way ------------------------------------------

    def resident(self) -> ResidentOutput | None:
        """What the experts of the layer in hand give that need no load.

        None where all are ready, or none is computed here: the next gate is reached as soon as one could run ahead.
        """
        output_PH = self.dispatcher.preview(self._weights_TK.numel())
        if output_PH is None:
            return None
        shape = (*self._weights_TK.shape, output_PH.shape[1])
        return ResidentOutput(output_TKH=output_PH.view(shape), weights_TK=self._weights_TK)

    # --- what the engine calls --------------------------------------------------------------------------

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read. This policy schedules by layers, whatever sequence they belong to."""

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token of a sequence is about to be read."""

    def end(self, sequence: int) -> None:
        """A sequence is finished."""

    def look(self) -> None:
        """Between steps: take in news of workers."""
        self.dispatcher.look()

    def serves(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether requests that need these (layer, expert) can go on."""
        return self._lost.serves(experts)

    def take_cost(self) -> Routing:
        """What steps cost since the last take; also passes residency changes on."""
        decided, self._decided = self._decided, Decided()
        return self.dispatcher.take_cost() + Routing(
            decisions=decided.decisions,
            substituted=decided.substituted,
            replaced_mass=decided.replaced_mass,
            degraded=self._lost.take(),
        )

    def take_costs(self, rows: int) -> list[Routing]:
        """The same by row of a step of one token each: each row's own substitutions, and its share of the rest."""
        decided = self._decided
        costs = self.take_cost().spread(rows)
        substituted_T, mass_T = decided.substituted_T, decided.replaced_mass_T
        if substituted_T is None or mass_T is None or len(substituted_T) != rows:
            return costs
        return [
            replace(cost, substituted=int(substituted), replaced_mass=float(mass))
            for cost, substituted, mass in zip(costs, substituted_T, mass_T, strict=True)
        ]
