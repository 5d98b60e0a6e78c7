"""Both methods at once: forecast scores become one plan of loads, substitutions and keeps (``placement.joint``).

The shadow sends its forecasts with all scores here instead of ordering loads itself. The engine plans, for it knows
what the shadow does not: what the workers' slots hold, as answers told and orders will make it, and what alpha each
request has. Its load orders go straight to the workers; by way of the placement actor they would take a hop more, and
the decision is the same pure function wherever it is made. Forecasts are taken in while workers compute; a layer that
has come waits only for the plan of its own.

When a layer has come its router decides on its true scores. Experts that score low give way to what was planned for
this very step or is in a slot; what was neither planned nor is at hand is loaded on demand.

T tokens, K experts per token, E experts, H hidden, N experts of a plan, W workers.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from predictor.forecast import Forecast, LayerForecast
from predictor.history import HistoryForecast
from raymoe.engine.cacheless import CachelessScheduler
from raymoe.engine.conductor import Conductor, plan_of
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.foresight import Foresight
from raymoe.engine.substitution import Decided, mean_scores, per_row, substitute, warn_of_unknown
from raymoe.errors import ExpertUnavailableError
from raymoe.model.router import Router
from raymoe.model.router_rule import RouterRule
from raymoe.model.runner import SequenceState
from raymoe.placement.assignment import Fleet, in_order_of_need
from raymoe.placement.cadence import Cadence
from raymoe.placement.joint import plan_layer, spare_slots
from raymoe.placement.link_queues import LinkQueues
from raymoe.placement.similarity import Similarity
from raymoe.transport.shadow_messages import Plan
from raymoe.types import Routing, SamplingRecipe, StepId

log = logging.getLogger(__name__)

NOWHERE = StepId(sequence=0, position=0)  # the step of what is asked for outside of sequences


class JointConductor(Conductor):
    """Makes joint plans and sends their load orders. Used by the engine's thread.

    Orders also name what is in a slot already: so it stays there until its call.

    Attributes:
        alphas: of the sequences under way.
        rules: of the routers, one per MoE layer, once they are known.
        similarity: ranks substitutes; None is by gate score.
        planned_away: (token, expert) pairs of forecasts that were planned to be replaced, since the start.
    """

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float] = time.monotonic) -> None:
        assert dispatcher.fleet is not None, "orders for steps to come go to the workers of a fleet"
        super().__init__(dispatcher.fleet, dispatcher.devices, dispatcher.order)
        self.alphas: dict[int, float] = {}
        self.rules: Sequence[RouterRule | None] = ()
        self.similarity: Similarity | None = None
        self.planned_away = 0
        self._dispatcher = dispatcher
        self._links = LinkQueues(dispatcher.loads_s, dispatcher.fleet.loads_s, clock)
        self._spare_W: dict[int, np.ndarray] = {}  # by experts per token
        self._epochs: dict[int, int] = {}
        self._clock = clock
        self._cadences: dict[int, Cadence] = {}  # by sequence
        self._booked: defaultdict[int, dict[StepId, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)  # by layer

    @property
    def fleet(self) -> Fleet:
        """Whom it conducts."""
        return self._fleet

    def use(self, fleet: Fleet) -> None:
        """Conduct these workers from now on."""
        super().use(fleet)
        self._spare_W.clear()

    def is_late(self, forecast: LayerForecast) -> bool:
        """Whether its layer has come already."""
        cadence = self._cadences.get(forecast.step.sequence)
        last = None if cadence is None else cadence.last
        return last is not None and (forecast.step.position, forecast.layer) <= last

    def called(self, step: StepId, layer: int) -> None:
        """A step has come to a layer: what was booked for that, and before, is used."""
        cadence = self._cadences.get(step.sequence)
        if cadence is None:
            cadence = self._cadences[step.sequence] = Cadence(len(self._fleet.owners_LWE), self._clock)
        cadence.called(step.position, layer)
        booked = self._booked[layer]
        for other in [s for s in booked if s.sequence == step.sequence and s.position <= step.position]:
            del booked[other]

    def forget(self, sequence: int) -> None:
        """A sequence has ended, or begins anew."""
        self._epochs.pop(sequence, None)
        self._void(sequence, 0)

    def end(self, sequence: int) -> None:
        """A sequence has ended."""
        self.forget(sequence)
        self._cadences.pop(sequence, None)
        self.alphas.pop(sequence, None)

    def conduct(self, forecast: LayerForecast) -> Plan:
        """Order what the joint plan wants in slots and no forecast before it did for this layer of its step.

        A pass of several positions is foretold one by one. What was ordered for one of them is at hand for the others.
        """
        layer, step = forecast.layer, forecast.step
        is_new = self._begin_epoch(forecast)
        before = self._before(forecast)
        rule = self.rules[layer] if self.rules else None
        plan = plan_layer(
            layer,
            forecast.scores_TE,
            forecast.experts_TK,
            self._fleet,
            held_WE=self._will_hold(forecast),
            ordered=before.workers,
            alpha_T=0.0 if rule is None else self.alphas.get(step.sequence, 0.0),
            busy_s_W=self._links.busy(),
            due_s_W=self._due(forecast),
            permitted_TE=None if rule is None else rule.permitted(forecast.scores_TE),
            similarity=self.similarity,
        )
        told = set(self._send_orders(forecast, plan.experts_N, plan.workers_N, before))
        if is_new:  # workers that it has no use for must know as well; the others hear of it by their orders
            for worker in sorted(set(range(self._fleet.workers)) - told):
                self._order(worker, forecast, np.empty(0, dtype=np.int32))
        self._booked[layer][step] = np.array(list(before.workers)), np.array(list(before.workers.values()))
        self._links.order(plan.workers_N[plan.loads_N])
        self.planned_away += plan.replaced
        return plan_of(forecast, plan.experts_N, plan.workers_N)

    def _due(self, forecast: LayerForecast) -> np.ndarray | None:
        """Until its layer comes, in the fleet's unit; None where nobody knows."""
        cadence = self._cadences.get(forecast.step.sequence)
        due_s = None if cadence is None else cadence.until_s(forecast.step.position, forecast.layer)
        return None if due_s is None else self._links.in_units(due_s)

    def _will_hold(self, forecast: LayerForecast) -> np.ndarray:
        """Bool [W, E]: what is in slots now, and what was ordered for the forecast's layer of other steps.

        A worker without a slot to spare keeps nothing of that until its layer comes again.
        """
        layer, top_k = forecast.layer, forecast.experts_TK.shape[1]
        held_WE = self._dispatcher.holding(layer)
        for step, (experts_N, workers_N) in self._booked[layer].items():
            if step != forecast.step:
                held_WE[workers_N, experts_N] = self._fleet.owners_LWE[layer][workers_N, experts_N]
        if top_k not in self._spare_W:
            self._spare_W[top_k] = spare_slots(self._fleet, top_k)
        held_WE[~self._spare_W[top_k]] = False
        return held_WE

    def _begin_epoch(self, forecast: LayerForecast) -> bool:
        """The first forecast of an epoch makes void what was planned before from its step on. Whether it is one."""
        sequence, epoch = forecast.step.sequence, forecast.epoch
        before = self._epochs.setdefault(sequence, epoch)
        if epoch <= before:
            return False
        self._epochs[sequence] = epoch
        self._void(sequence, forecast.step.position)
        return True

    def _void(self, sequence: int, position: int) -> None:
        for booked in self._booked.values():
            for step in [s for s in booked if s.sequence == sequence and s.position >= position]:
                del booked[step]


class JointScheduler(CachelessScheduler):
    """The trunk's ``ExpertBackend`` under policy joint. Used by one thread.

    Prompts are exact, as they need nearly every expert anyway.

    Attributes:
        alpha: threshold of the rows of the step to come: one for all, or one per sequence of the batch.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        foresight: Foresight,
        similarity: Similarity | None = None,
        *,
        substitutes_lost: bool = False,
    ) -> None:
        self._joint = JointConductor(dispatcher)
        super().__init__(dispatcher, foresight, self._joint, substitutes_lost=substitutes_lost)
        self.similarity = similarity
        foresight.on_forecast = self._take_forecast
        foresight.on_anew = self._begin_anew
        foresight.plans_here = True
        dispatcher.listen(foresight.listen)
        self._decided = Decided()
        self._scores_E: np.ndarray | None = None

    @property
    def similarity(self) -> Similarity | None:
        """What ranks substitutes, in plans and when the layer has come; None is by gate score."""
        return self._joint.similarity

    @similarity.setter
    def similarity(self, similarity: Similarity | None) -> None:
        self._joint.similarity = similarity

    def attach(
        self, routers: Sequence[Router], forecast: Forecast | None = None, history: HistoryForecast | None = None
    ) -> None:
        """Take scores from these routers (one per MoE layer), and plan by these forecasts of this process."""
        super().attach(routers, forecast, history)
        self._joint.rules = [router.rule for router in routers]
        warn_of_unknown(self._joint.rules)

    # --- what the trunk calls ---------------------------------------------------------------------------

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's choice; in decode with low-scored experts replaced by what is at hand, as alpha allows."""
        experts_TK, weights_TK = super().route(layer, experts_TK, weights_TK)
        self._scores_E = None
        tokens = experts_TK.shape[0]
        if not self._routers or self._reads_prompt(tokens):
            return experts_TK, weights_TK
        router = self._routers[layer]
        scores_TE = router.scores_or_weights(experts_TK.cpu().numpy(), weights_TK)
        self._scores_E = mean_scores(scores_TE)
        alpha_T = per_row(self.alpha, tokens)
        if router.rule is None or self.foresight.in_prompt or not np.any(alpha_T):
            return experts_TK, weights_TK
        available_E = self._at_hand(layer)
        done = substitute(
            router.rule, layer, experts_TK, weights_TK, scores_TE, available_E, alpha_T, similarity=self.similarity
        )
        self._decided.add(done)
        if done.replaced is not None:
            self.dispatcher.gave_way(layer, done.replaced)
        self._weights_TK = done.weights_TK
        return done.experts_TK, done.weights_TK

    def _at_hand(self, layer: int) -> np.ndarray:
        """Bool per expert: whether it was planned for this step, or is in a slot as far as is known."""
        available_E = np.asarray(self.dispatcher.holding(layer).any(axis=0))
        plan = self.foresight.plan(layer)
        if plan is not None:
            available_E[plan.experts_N] = True
        return available_E

    def _ask(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        experts_TK: torch.Tensor,
        meanwhile: Callable[[], None],
        plan: Plan | None,
    ) -> torch.Tensor:
        step = self.foresight.step
        if step is not None:
            self._joint.called(step, layer)
        planned = [] if plan is None else plan.experts_N.tolist()
        unplanned = set(experts_TK.reshape(-1).tolist()).difference(planned)
        if unplanned:
            plan = with_residents(plan, layer, sorted(unplanned), self.dispatcher.holding(layer))

        def listen() -> None:
            self.foresight.listen()
            meanwhile()

        return self.dispatcher.compute(layer, hidden_TH, experts_TK, self._scores_E, listen, step=step, plan=plan)

    # --- forecasts --------------------------------------------------------------------------------------

    def _take_forecast(self, forecast: LayerForecast) -> None:
        """Plan what the shadow foretells. A guess must not fail a request."""
        sizes = self._joint.fleet.owners_LWE
        if forecast.layer >= len(sizes) or forecast.scores_TE.shape[1] != sizes[forecast.layer].shape[1]:
            log.warning("a forecast of another model's layer %d was dropped", forecast.layer)
            return
        if self._joint.is_late(forecast):  # nobody could load anything for it; it counts as said all the same
            experts_N = in_order_of_need(forecast.experts_TK)
            self.foresight.book.add(plan_of(forecast, experts_N, np.zeros(len(experts_N))))
            return
        try:
            self.foresight.book.add(self._joint.conduct(forecast))
        except ExpertUnavailableError as error:  # nobody could be told to load it
            log.debug("a forecast for layer %d could not be planned: %s", forecast.layer, error)
        except Exception:
            log.exception("a forecast for layer %d could not be planned", forecast.layer)

    def _begin_anew(self, sequence: int) -> None:
        """Another shadow takes a sequence up: all orders for it so far are void."""
        self._joint.forget(sequence)
        self.dispatcher.forget(sequence)

    # --- what the engine calls --------------------------------------------------------------------------

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read."""
        self._joint.alphas[sequence] = float(np.min(self.alpha))
        super().begin(sequence, prompt, recipe)

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token of a sequence is about to be read."""
        self._joint.alphas[sequence] = float(np.min(self.alpha))
        super().read(sequence, token, state)

    def end(self, sequence: int) -> None:
        """A sequence is finished: what was ordered for it is void."""
        super().end(sequence)
        self._joint.end(sequence)

    def take_cost(self) -> Routing:
        """What steps cost since the last take, and how well those before them had been foretold."""
        decided, self._decided = self._decided, Decided()
        return super().take_cost() + Routing(substituted=decided.substituted, replaced_mass=decided.replaced_mass)


def with_residents(plan: Plan | None, layer: int, unplanned: list[int], held_WE: np.ndarray) -> Plan | None:
    """A plan, with those of the experts that it does not name which a worker holds. None where neither is."""
    found_N = np.array([expert for expert in unplanned if held_WE[:, expert].any()], dtype=np.int32)
    if not found_N.size:
        return plan
    holders_N = held_WE[:, found_N].argmax(axis=0).astype(np.int32)
    if plan is None:
        return Plan(step=NOWHERE, epoch=0, layer=layer, experts_N=found_N, workers_N=holders_N)
    return Plan(
        step=plan.step,
        epoch=plan.epoch,
        layer=layer,
        experts_N=np.concatenate([plan.experts_N, found_N]),
        workers_N=np.concatenate([plan.workers_N, holders_N]),
    )
