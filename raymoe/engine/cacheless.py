"""Scheduling without a cache (OD-MoE, arXiv 2512.03927): experts are where a forecast had them loaded, then gone.

Each layer's experts are asked of the workers that a plan sent them to; what no plan named is asked of who can load it
soonest. Computation follows the router in every case, so the result is that of the full model whatever was foretold.

Plans come from the shadow's process, or are made here, by forecasts that need no model of their own: the gates of
coming layers, the resident emulation, or history.

T tokens, K experts per token, E experts, H hidden.
"""

import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from predictor.forecast import Forecast, LayerForecast
from predictor.history import HistoryForecast
from predictor.resident import ResidentOutput
from raymoe.config import SchedulingConfig
from raymoe.engine.conductor import Conductor
from raymoe.engine.dispatch import Dispatcher, nothing
from raymoe.engine.foresight import Foresight
from raymoe.engine.lost import LostExperts
from raymoe.engine.prefill import PrefillPlanner
from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, LoadOrder
from raymoe.model.router import Router
from raymoe.model.runner import SequenceState
from raymoe.placement.assignment import Fleet
from raymoe.placement.owners import NOBODY
from raymoe.transport.shadow_messages import Plan
from raymoe.types import DeviceName, Routing, SamplingRecipe, StepId

log = logging.getLogger(__name__)

MOST_DECODE_TOKENS = 8  # of a prompt that a layer's group serves alone; more need most experts, so all workers help
FARTHEST = 3  # layers that gates look ahead; on the embedded model they name .77, .69 and .61 of the top 4 there


class CachelessScheduler:
    """The trunk's ``ExpertBackend`` under policy on_demand_shadow. Used by one thread.

    Args:
        foresight: plans, and the way to the shadow.
        conductor: makes plans of this process's own forecasts.
        substitutes_lost: whether other experts compute in the place of those that nobody can be asked for.

    Attributes:
        alpha: of no account: this policy is exact.
        prefill: how prompts are cut into mini-batches.
    """

    def __init__(
        self, dispatcher: Dispatcher, foresight: Foresight, conductor: Conductor, *, substitutes_lost: bool = False
    ) -> None:
        self.dispatcher = dispatcher
        self.foresight = foresight
        foresight.on_plan = dispatcher.order_here
        foresight.on_anew = dispatcher.forget
        self.alpha: float | np.ndarray = 0.0
        self._conductor = conductor
        self._routers: Sequence[Router] = ()
        self._forecast: Forecast | None = None
        self._history: HistoryForecast | None = None
        self._routed: list[np.ndarray] = []
        self._tokens: list[int] = []
        self._weights_TK = torch.empty(0)
        self._decisions = 0
        self._lost = LostExperts(dispatcher, substitutes=substitutes_lost)
        assert dispatcher.fleet is not None, "without a cache any owner of an expert may be asked"
        self.prefill = PrefillPlanner(dispatcher.fleet)
        self._place = {name: place for place, name in enumerate(dispatcher.devices)}
        dispatcher.on_round_trip = self._learn_message_cost
        dispatcher.on_fleet = self._use

    def _use(self, fleet: Fleet) -> None:
        """Who owns what has changed, or who is avoided."""
        self._conductor.use(fleet)
        self.prefill.use(fleet)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Nothing: what can be changed while the model runs is of policy importance."""

    def attach(
        self, routers: Sequence[Router], forecast: Forecast | None = None, history: HistoryForecast | None = None
    ) -> None:
        """Make plans of these forecasts, with the routers (one per MoE layer) whose choices they foretell."""
        self._routers, self._forecast, self._history = routers, forecast, history
        self._lost.routers = routers

    # --- what the trunk calls ---------------------------------------------------------------------------

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice, but for experts that are lost."""
        experts_TK, weights_TK = self._lost.route(layer, experts_TK, weights_TK)
        self._weights_TK = weights_TK
        self._decisions += experts_TK.shape[0]
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every expert, [T, K, H]; this process's forecasts are made while workers load."""
        tokens, k = experts_TK.shape
        foresight = self.foresight
        chosen_TK = experts_TK.cpu().numpy()
        foresight.routed(layer, chosen_TK)
        if self._history is not None:
            self._routed.append(chosen_TK)
        if self._reads_prompt(tokens):
            return self._compute_prompt(layer, hidden_TH, experts_TK)
        plan = foresight.plan(layer)
        meanwhile = nothing
        if self._forecast is not None and foresight.step is not None and not foresight.in_prompt:
            forecast, step = self._forecast, foresight.step
            meanwhile = lambda: self._foretell(forecast, step, layer, k)  # noqa: E731 - a closure over this step
        return self._ask(layer, hidden_TH, experts_TK, meanwhile, plan)

    def _reads_prompt(self, tokens: int) -> bool:
        """Whether the forward in hand reads so much of a prompt that most experts are needed."""
        decodes = self.foresight.step is not None and not self.foresight.in_prompt
        return tokens > MOST_DECODE_TOKENS and not decodes

    def _ask(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        meanwhile: Callable[[], None],
        plan: Plan | None,
    ) -> torch.Tensor:
        step = self.foresight.step
        return self.dispatcher.compute(layer, hidden_TH, experts_TK, meanwhile=meanwhile, step=step, plan=plan)

    def _compute_prompt(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """All workers help, in mini-batches; their loads are ordered at the beginning."""
        tokens, k = experts_TK.shape
        most = self.dispatcher.max_rows
        if tokens > most:
            pieces = zip(hidden_TH.split(most), experts_TK.split(most), strict=True)
            return torch.cat([self._compute_prompt(layer, hidden, experts) for hidden, experts in pieces])
        experts_P = experts_TK.reshape(-1).cpu().numpy()
        rows_P = np.repeat(np.arange(tokens), k)
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        lost_E = self.dispatcher.lost(layer)
        lost_P = np.zeros(len(experts_P), dtype=bool) if lost_E is None else lost_E[experts_P]
        owned_P = np.flatnonzero(~lost_P)
        batches = self.prefill.plan(layer, experts_P[owned_P], rows_P[owned_P], row_bytes) if owned_P.size else []
        step = self.foresight.step
        if step is not None:
            for batch in batches:
                order = LoadOrder(step=step, epoch=0, layer=layer, experts=batch.experts_N.astype(np.int32))
                self.dispatcher.order(self.dispatcher.devices[batch.worker], order)
        parts = [(batch.worker, owned_P[batch.pairs_P]) for batch in batches]
        if lost_P.any():
            parts.append((NOBODY, np.flatnonzero(lost_P)))
        return self.dispatcher.compute_parts(layer, hidden_TH, experts_TK, parts, step, self._learn_cost)

    def _learn_cost(self, worker: int, sent_bytes: int, answer: ExpertAnswer, round_trip_s: float | None) -> None:
        self.prefill.costs[worker].call(sent_bytes, answer, round_trip_s)

    def _learn_message_cost(self, name: DeviceName, on_the_way_s: float) -> None:
        self.prefill.costs[self._place[name]].small_call(on_the_way_s)

    # --- forecasts of this process ----------------------------------------------------------------------

    def _foretell(self, forecast: Forecast, step: StepId, layer: int, k: int) -> None:
        """Plan the layers that can be seen from here. A guess must not fail a request."""
        try:
            for ahead in range(1, min(FARTHEST, forecast.farthest) + 1):
                there = layer + ahead
                if self.foresight.book.plan(step, there) is None or ahead == 1:
                    scores_TE = forecast.scores(layer, ahead)
                    if scores_TE is not None:
                        rule = self._routers[there].rule
                        self._plan(step, there, scores_TE if rule is None else rule.selection_scores(scores_TE), k)
        except ExpertUnavailableError as error:  # nobody could be told to load it
            log.debug("no plan of a forecast from layer %d: %s", layer, error)
        except Exception:
            log.exception("forecasts from layer %d failed; there are no more of this kind", layer)
            self._forecast = None

    def _plan(self, step: StepId, layer: int, scores_TE: np.ndarray, k: int) -> None:
        """Order the best experts, unless that is what the plan says already."""
        experts_TK = np.argsort(-scores_TE, axis=1, kind="stable")[:, :k]
        before = self.foresight.book.plan(step, layer)
        if before is not None and set(before.experts_N.tolist()) == set(experts_TK.reshape(-1).tolist()):
            return
        epoch = 0 if before is None else before.epoch
        foretold = LayerForecast(step=step, epoch=epoch, layer=layer, experts_TK=experts_TK, scores_TE=scores_TE)
        self.foresight.book.put(self._conductor.conduct(foretold))

    def _plan_by_history(self, step: StepId, token: int) -> None:
        """Learn from the step before, and plan all layers of the one that begins."""
        assert self._history is not None
        if len(self._routed) == len(self._routers):
            self._history.observe(self._tokens, self._routed)
            scores_LE = self._history.scores([token])[0]
            for layer, experts_TK in enumerate(self._routed):
                self._plan(step, layer, scores_LE[layer : layer + 1], experts_TK.shape[1])
        self._tokens, self._routed = [token], []

    def resident(self) -> ResidentOutput | None:
        """What the experts of the layer in hand give that need no load; None where all are ready or none is here."""
        output_PH = self.dispatcher.preview(self._weights_TK.numel())
        if output_PH is None:
            return None
        shape = (*self._weights_TK.shape, output_PH.shape[1])
        return ResidentOutput(output_TKH=output_PH.view(shape), weights_TK=self._weights_TK)

    # --- what the engine calls --------------------------------------------------------------------------

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read."""
        self.foresight.begin(sequence, prompt, recipe)
        if self._history is not None:
            self._history.begin()
            self._tokens, self._routed = list(prompt), []

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token of a sequence is about to be read."""
        self.foresight.read(sequence, token, state)
        if self._history is not None and self.foresight.step is not None:
            self._plan_by_history(self.foresight.step, token)

    def end(self, sequence: int) -> None:
        """A sequence is finished: what was ordered for it is void."""
        self.foresight.end(sequence)
        self.dispatcher.forget(sequence)

    def look(self) -> None:
        """Between steps: take in news of workers."""
        self.dispatcher.look()

    def serves(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether requests that need these (layer, expert) can go on."""
        return self._lost.serves(experts)

    def take_cost(self) -> Routing:
        """What steps cost since the last take, and how well those before them had been foretold."""
        decisions, self._decisions = self._decisions, 0
        own = Routing(decisions=decisions, degraded=self._lost.take())
        return self.dispatcher.take_cost() + own + self.foresight.book.take()
