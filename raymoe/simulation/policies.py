"""Policies at work in a simulation: who is asked for which expert, and what is ordered or foretold.

Every decision is a function of ``raymoe.placement``, called with what the engine would know at that moment.

T rows, K experts per token, P pairs, N distinct experts, E experts.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.experts.call import LoadOrder, layer_and_expert
from raymoe.placement.assignment import assign, reassign
from raymoe.placement.prefetch import lookahead, orders, wanted
from raymoe.placement.routing import route
from raymoe.simulation.loop import EventLoop
from raymoe.simulation.setting import Setting
from raymoe.simulation.shadow import Foretold
from raymoe.simulation.worker import (
    SimAnswer,
    SimWorker,
    caching_worker,
    passing_worker,
    resident_worker,
    shard_of,
    shards,
)
from raymoe.types import ExpertKey, StepId

SEQUENCE = 1
PROMPT = 1  # position 0 is a prompt's, whose rules are others
GATE_RECALL = (0.77, 0.69, 0.61, 0.5)  # of gates 1 to 4 layers ahead, docs/benchmarks.md
LAYER_SMOOTHING = 0.02  # as the engine's mean of a layer's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A call to one worker: the expert of each pair, and how many rows go along."""

    worker: int
    layer: int
    experts_P: np.ndarray
    rows: int
    scores_E: np.ndarray | None = None
    step: StepId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A layer of a pass as the router has it.

    Attributes:
        start: first position of the pass; positions_T: the trace's steps that its rows are.
        scores_TE: gate scores; None where they are not known.
    """

    start: int
    layer: int
    positions_T: tuple[int, ...]
    chosen_TK: np.ndarray
    scores_TE: np.ndarray | None


@dataclass(slots=True)
class Tally:
    """Totals of what policies did."""

    orders: int = 0
    planned: int = 0
    substituted: int = 0


class Policy(Protocol):
    """One policy. Attributes: its workers, in the order of the setting, and totals."""

    workers: list[SimWorker]
    tally: Tally

    def ask(self, routed: Routed) -> list[Ask]:
        """The calls of a layer."""
        ...

    def answered(self, worker: int, answer: SimAnswer) -> None:
        """A call was answered."""
        ...

    def foretell(self, foretold: Foretold) -> None:
        """The shadow knows a layer of a step to come."""
        ...


@dataclass(slots=True)
class _Plan:
    """Who was told to load what for one layer of a pass, and when the engine knows it."""

    epoch: int
    known_s: float
    workers: dict[int, int] = field(default_factory=dict)


class Cacheless:
    """Policy on_demand_shadow; without a shadow it loads after routing.

    Attributes:
        fleet: who may load what.

    Args:
        resident: everything is ready at the workers that would load it: what the policy is measured against.
    """

    def __init__(self, loop: EventLoop, setting: Setting, *, resident: bool = False) -> None:
        self.tally = Tally()
        self._loop, self._latency_s = loop, setting.network.latency_s
        self.fleet = setting.fleet()
        self._plans: dict[tuple[int, int], list[_Plan]] = {}
        self.workers = [
            resident_worker(loop, times) if resident else passing_worker(loop, times, setting.shape, shard)
            for times, shard in zip(setting.workers, shards(self.fleet.owners_LWE), strict=True)
        ]

    def foretell(self, foretold: Foretold) -> None:
        """Order what is named and was not yet for that place; the engine is told as well."""
        place = foretold.start, foretold.layer
        plans = self._plans.setdefault(place, [])
        if plans and plans[-1].epoch < foretold.epoch:
            plans.clear()
        before = {expert: worker for plan in plans for expert, worker in plan.workers.items()}
        fresh_N = np.array([e for e in foretold.experts_K.tolist() if e not in before], dtype=np.int32)
        if not len(fresh_N):
            return
        busy_s_W = None
        if before:
            held_W = np.bincount(list(before.values()), minlength=self.fleet.workers)
            busy_s_W = held_W * np.array(self.fleet.loads_s)
        workers_N = assign(fresh_N, foretold.layer, self.fleet, busy_s_W)
        arrives_s = self._loop.now_s + self._latency_s
        chosen = dict(zip(fresh_N.tolist(), workers_N.tolist(), strict=True))
        plans.append(_Plan(foretold.epoch, arrives_s, chosen))
        step = StepId(sequence=SEQUENCE, position=PROMPT + foretold.start)
        for worker in dict.fromkeys(chosen.values()):
            experts = fresh_N[workers_N == worker]
            order = LoadOrder(step=step, epoch=foretold.epoch, layer=foretold.layer, experts=experts)
            self._loop.at(arrives_s, self.workers[worker].order, order)
            self.tally.orders += 1

    def ask(self, routed: Routed) -> list[Ask]:
        """Each expert of the worker that was told to load it, else of who can do so soonest."""
        experts_P = routed.chosen_TK.reshape(-1)
        needed = sorted(set(experts_P.tolist()))
        planned: dict[int, int] = {}
        for plan in self._plans.pop((routed.start, routed.layer), ()):
            if plan.known_s <= self._loop.now_s:
                planned |= plan.workers
        self.tally.planned += sum(expert in planned for expert in experts_P.tolist())
        owners_N = reassign(np.array(needed, dtype=np.int32), planned, routed.layer, self.fleet)
        owner_of = dict(zip(needed, owners_N.tolist(), strict=True))
        owner_P = np.array([owner_of[expert] for expert in experts_P.tolist()])
        step = StepId(sequence=SEQUENCE, position=PROMPT + routed.start)
        return split(routed, experts_P, owner_P, step=step)

    def answered(self, worker: int, answer: SimAnswer) -> None:
        """Nothing: nothing stays."""


class Caching:
    """Policies all_resident, on_demand and importance: every expert has one owner, whose slots are a cache.

    Attributes:
        primary: who is asked for each expert.
        fits: False where everything is resident that the slots don't hold.
    """

    def __init__(self, loop: EventLoop, setting: Setting, scheduling: SchedulingConfig, seed: int = 0) -> None:
        self.tally = Tally()
        self._loop, self._setting, self._scheduling = loop, setting, scheduling
        shape, names = setting.shape, setting.names
        owned, self.primary = setting.owners()
        self._place = {name: worker for worker, name in enumerate(names)}
        self._owner_LE = np.array(
            [
                [self._place[self.primary[ExpertKey(layer=layer, expert=expert)]] for expert in range(shape.experts)]
                for layer in range(shape.layers)
            ]
        )
        resident = scheduling.policy == "all_resident"
        self.workers = [
            resident_worker(loop, times)
            if resident
            else caching_worker(loop, times, shape, shard_of(owned[times.name]), scheduling)
            for times in setting.workers
        ]
        ready_W = np.array([worker.bay is None for worker in self.workers])
        rooms = zip(setting.workers, (len(owned[name]) for name in names), strict=True)
        self.fits = not resident or all(times.slots is None or times.slots >= count for times, count in rooms)
        self._available_LE = ready_W[self._owner_LE]
        self._importance = scheduling.policy == "importance"
        self._random = np.random.default_rng(seed)
        self._load_s: dict[int, float] = {}
        self._layer_s: float | None = None
        self._last_s: float | None = None

    def foretell(self, foretold: Foretold) -> None:
        """Nothing: these policies have no shadow."""

    def ask(self, routed: Routed) -> list[Ask]:
        """Each expert of its owner; under policy importance replaced where that saves a load."""
        chosen_TK, mean_E = routed.chosen_TK, None
        if self._importance:
            assert routed.scores_TE is not None, "checked before"
            self._time_layer(routed.layer)
            available_E = self._available_LE[routed.layer]
            final = route(routed.scores_TE, chosen_TK, available_E, self._scheduling.alpha)
            self.tally.substituted += int(np.count_nonzero(final.replaced_TK))
            chosen_TK, mean_E = final.experts_TK, routed.scores_TE.mean(axis=0)
        experts_P = chosen_TK.reshape(-1)
        return split(routed, experts_P, self._owner_LE[routed.layer][experts_P], scores_E=mean_E)

    def answered(self, worker: int, answer: SimAnswer) -> None:
        """Note what the worker has now."""
        if answer.load_s is not None:
            self._load_s[worker] = answer.load_s
        for identifiers, here in ((answer.evicted, False), (answer.loaded, True)):
            for identifier in identifiers:
                self._available_LE[layer_and_expert(identifier)] = here

    def ahead(self) -> int:
        """How many layers the engine looks ahead; 0: not at all."""
        if not self._importance or self._scheduling.prefetch == "none":
            return 0
        chosen = self._scheduling.lookahead
        found = lookahead(max(self._load_s.values(), default=None), self._layer_s) if chosen is None else chosen
        return min(found, len(GATE_RECALL))

    def expect(self, layer: int, ahead: int, chosen_TK: np.ndarray, scores_TE: np.ndarray) -> None:
        """Tell the owners what gates ``ahead`` layers before say of a layer that will choose this."""
        named_TE = self._foggy(chosen_TK, scores_TE, GATE_RECALL[ahead - 1])
        experts, worth = wanted(named_TE, named_TE, chosen_TK.shape[1])
        # by the placement actor, on its way from the engine to remote owners
        for name, (mine, worths) in orders(layer, experts, worth, self.primary, self._place).items():
            worker = self._place[name]
            times = self._setting.workers[worker]
            arrives_s = self._loop.now_s + (0.0 if times.is_local else 2 * self._setting.network.latency_s)
            self._loop.at(
                arrives_s, self.workers[worker].expect, layer, np.array(mine), np.array(worths, dtype=np.float32)
            )

    def _foggy(self, chosen_TK: np.ndarray, scores_TE: np.ndarray, recall: float) -> np.ndarray:
        """Gate scores as a forecast of this recall has them: some of the chosen change places with the next best."""
        foggy_TE = scores_TE.copy()
        for row_E, chosen_K in zip(foggy_TE, chosen_TK, strict=True):
            missed = chosen_K[self._random.random(len(chosen_K)) >= recall]
            rest_E = row_E.copy()
            rest_E[chosen_K] = -1.0
            others = np.argsort(-rest_E, kind="stable")[: min(len(missed), len(row_E) - len(chosen_K))]
            for mine, other in zip(missed, others, strict=False):
                row_E[mine], row_E[other] = row_E[other], row_E[mine]
        return foggy_TE

    def _time_layer(self, layer: int) -> None:
        now_s = self._loop.now_s
        if layer and self._last_s is not None:
            took_s = now_s - self._last_s
            mean_s = self._layer_s
            self._layer_s = took_s if mean_s is None else mean_s + LAYER_SMOOTHING * (took_s - mean_s)
        self._last_s = now_s


def split(
    routed: Routed,
    experts_P: np.ndarray,
    owner_P: np.ndarray,
    scores_E: np.ndarray | None = None,
    step: StepId | None = None,
) -> list[Ask]:
    """One call per worker involved, from the worker of each pair."""
    top_k = routed.chosen_TK.shape[1]
    by_worker: dict[int, list[int]] = {}
    for pair, worker in enumerate(owner_P.tolist()):
        by_worker.setdefault(worker, []).append(pair)
    return [
        Ask(
            worker=worker,
            layer=routed.layer,
            experts_P=experts_P[pairs],
            rows=len({pair // top_k for pair in pairs}),
            scores_E=scores_E,
            step=step,
        )
        for worker, pairs in sorted(by_worker.items())
    ]
