"""Policy joint in a simulation: the main node plans what the shadow foretells, and workers keep what is worth most.

As the engine does (``raymoe.engine.joint``): forecasts with scores travel to the main node, its orders from there to
the workers, a hop more than under on_demand_shadow. What slots hold is known as far as answers have told.

T rows, K experts per token, P pairs, E experts, W workers, L MoE layers.
"""

from collections import defaultdict

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.experts.call import LoadOrder, layer_and_expert
from raymoe.placement.assignment import reassign
from raymoe.placement.cadence import Cadence
from raymoe.placement.joint import plan_layer, spare_slots
from raymoe.placement.link_queues import LinkQueues
from raymoe.placement.routing import route
from raymoe.simulation.loop import EventLoop
from raymoe.simulation.policies import PROMPT, SEQUENCE, Ask, Routed, Tally, split
from raymoe.simulation.setting import Setting
from raymoe.simulation.shadow import Foretold
from raymoe.simulation.worker import SimAnswer, keeping_worker, shards
from raymoe.types import StepId


class Joint:
    """Policy joint; without a shadow it loads after routing, and substitutes by what slots have kept.

    Attributes:
        fleet: who may load what.
    """

    def __init__(self, loop: EventLoop, setting: Setting, scheduling: SchedulingConfig) -> None:
        self.tally = Tally()
        self.fleet = setting.fleet()
        self._loop, self._latency_s, self._alpha = loop, setting.network.latency_s, scheduling.alpha
        shape = setting.shape
        self.workers = [
            keeping_worker(loop, times, shape, shard, scheduling)
            for times, shard in zip(setting.workers, shards(self.fleet.owners_LWE), strict=True)
        ]
        resident_W1 = np.array([worker.bay is None for worker in self.workers])[:, None]
        self._held_LWE = np.stack(self.fleet.owners_LWE) & resident_W1
        self._passes_W = ~spare_slots(self.fleet, shape.top_k)
        self._load_s: list[float | None] = [None] * len(self.workers)
        self._links = LinkQueues(lambda: self._load_s, self.fleet.loads_s, loop.clock)
        self._booked: defaultdict[int, dict[int, dict[int, int]]] = defaultdict(dict)  # by layer and pass: who has what
        self._epoch = 0
        self._cadence = Cadence(shape.layers, loop.clock)

    def foretell(self, foretold: Foretold) -> None:
        """Tell the main node."""
        if len(foretold.experts_K):
            self._loop.at(self._loop.now_s + self._latency_s, self._plan, foretold)

    def ask(self, routed: Routed) -> list[Ask]:
        """The router's experts, low ones replaced by what is at hand; each of who has it or was to load it."""
        assert routed.scores_TE is not None, "checked before"
        layer, planned = routed.layer, self._use(routed.start, routed.layer)
        held_WE = self._held_LWE[layer]
        at_hand_E = held_WE.any(axis=0)
        at_hand_E[list(planned)] = True
        final = route(routed.scores_TE, routed.chosen_TK, at_hand_E, self._alpha, layer=layer)
        self.tally.substituted += int(np.count_nonzero(final.replaced_TK))
        experts_P = final.experts_TK.reshape(-1)
        self.tally.planned += sum(expert in planned for expert in experts_P.tolist())
        needed = sorted(set(experts_P.tolist()))
        held = {expert: int(held_WE[:, expert].argmax()) for expert in needed if held_WE[:, expert].any()}
        owners_N = reassign(np.array(needed, dtype=np.int32), held | planned, layer, self.fleet)
        owner_of = dict(zip(needed, owners_N.tolist(), strict=True))
        owner_P = np.array([owner_of[expert] for expert in experts_P.tolist()])
        step = StepId(sequence=SEQUENCE, position=PROMPT + routed.start)
        return split(routed, experts_P, owner_P, scores_E=routed.scores_TE.mean(axis=0), step=step)

    def answered(self, worker: int, answer: SimAnswer) -> None:
        """Note what the worker has now."""
        if answer.load_s is not None:
            self._load_s[worker] = answer.load_s
        for identifiers, here in ((answer.evicted, False), (answer.loaded, True)):
            for identifier in identifiers:
                layer, expert = layer_and_expert(identifier)
                self._held_LWE[layer, worker, expert] = here

    # --- plans ------------------------------------------------------------------------------------------

    def _plan(self, foretold: Foretold) -> None:
        """A forecast has come to the main node: order what the joint plan wants in slots."""
        layer, start = foretold.layer, foretold.start
        last = self._cadence.last
        if last is not None and (start, layer) <= last:
            return  # nobody could load anything for it
        assert foretold.scores_E is not None, "a shadow of this policy tells them"
        surprised = self._begin_epoch(foretold)
        due_s = self._cadence.until_s(start, layer)
        plan = plan_layer(
            layer,
            foretold.scores_E[None],
            foretold.experts_K[None],
            self.fleet,
            held_WE=self._will_hold(layer, start),
            alpha_T=self._alpha,
            busy_s_W=self._links.busy(),
            due_s_W=None if due_s is None else self._links.in_units(due_s),
        )
        named = dict(zip(plan.experts_N.tolist(), plan.workers_N.tolist(), strict=True))
        self._booked[layer].setdefault(start, {}).update(named)
        self._links.order(plan.workers_N[plan.loads_N])
        for worker in sorted(surprised | set(named.values())):
            self._order(worker, foretold, plan.experts_N[plan.workers_N == worker])

    def _will_hold(self, layer: int, start: int) -> np.ndarray:
        """Bool [W, E]: what slots hold now, and what was ordered for the layer; see ``spare_slots`` for who keeps it.

        What other positions of the same pass need will be there in any case.
        """
        held_WE = self._held_LWE[layer].copy()
        booked = self._booked[layer]
        for named in booked.values():
            held_WE[list(named.values()), list(named)] = True
        held_WE[self._passes_W] = False
        same = booked.get(start, {})
        held_WE[list(same.values()), list(same)] = True
        return held_WE

    def _begin_epoch(self, foretold: Foretold) -> set[int]:
        """The first forecast of an epoch makes void what was planned from its pass on. Returns who has such plans."""
        surprised: set[int] = set()
        if foretold.epoch <= self._epoch:
            return surprised
        self._epoch = foretold.epoch
        for booked in self._booked.values():
            for start in [start for start in booked if start >= foretold.start]:
                surprised.update(booked.pop(start).values())
        return surprised

    def _use(self, start: int, layer: int) -> dict[int, int]:
        """A pass has come to a layer: who was to load what for it. What was planned before is of no more use."""
        self._cadence.called(start, layer)
        booked = self._booked[layer]
        planned = booked.get(start, {})
        for other in [other for other in booked if other <= start]:
            del booked[other]
        return planned

    def _order(self, worker: int, foretold: Foretold, experts_N: np.ndarray) -> None:
        step = StepId(sequence=SEQUENCE, position=PROMPT + foretold.start)
        order = LoadOrder(step=step, epoch=foretold.epoch, layer=foretold.layer, experts=experts_N)
        self._loop.at(self._loop.now_s + self._latency_s, self.workers[worker].order, order)
        self.tally.orders += 1
