"""A simulated worker: the real slots and the rules of who sits in them, over a link and a processor of imagined speed.

``Conveyor`` and ``Shelf`` are those of ``raymoe.experts``; only the link beneath them, the clock and the waiting are
simulated, so that what a cluster would load, keep and evict is decided by the same code.

P pairs, E experts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.experts.bay import Bay, Step
from raymoe.experts.call import LoadOrder, expert_id, layer_and_expert
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.costs import Cost
from raymoe.experts.shelf import Shelf
from raymoe.experts.slots import Residency
from raymoe.placement.keeping import Keeper
from raymoe.simulation.link import SimLink
from raymoe.simulation.loop import EventLoop
from raymoe.simulation.setting import WorkerTimes
from raymoe.simulation.shape import ModelShape
from raymoe.types import ExpertKey, StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class SimAnswer:
    """What a call came to.

    Attributes:
        pairs, hits, hosted: (row, expert) pairs: all, those ready when the call came, those computed on the host.
        loaded, evicted: ids of experts that came and went since the last answer.
        waited_s: seconds in which the worker had nothing to do but wait for loads.
        load_s: what a load took lately; None before the first one.
    """

    pairs: int
    hits: int
    hosted: int = 0
    loaded: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    waited_s: float = 0.0
    load_s: float | None = None


OnAnswer = Callable[[SimAnswer], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """The experts that a worker owns, without their weights. May be shared by workers that own the same.

    Attributes:
        experts: by id.
        layers: how many have any.
    """

    experts: dict[int, None]
    layers: int


@dataclass(slots=True)
class _Pool:
    """Slots without memory."""

    count: int
    slots: list[None]


@dataclass(slots=True)
class _Call:
    """The call in hand."""

    layer: int
    rows: Counter[int]
    step: Step
    answer: OnAnswer
    begun_s: float
    pairs: int
    waited_s: float = 0.0
    waits_since_s: float | None = None
    is_computing: bool = True


class SimWorker:
    """Computes one call at a time. Without a bay all that it owns is ready.

    Attributes:
        times: how fast it is.
        bay, link: its slots and what fills them; None where nothing is loaded.
        busy_s: seconds of computing so far.
    """

    def __init__(
        self, loop: EventLoop, times: WorkerTimes, bay: Bay | None = None, link: SimLink | None = None
    ) -> None:
        self.times = times
        self.bay = bay
        self.link = link
        self.busy_s = 0.0
        self._loop = loop
        self._call: _Call | None = None
        if bay is not None and link is not None:
            bay.clock = loop.clock
            link.on_idle = bay.on_idle
            link.on_ended = self._go_on

    # --- what comes from outside ------------------------------------------------------------------------

    def order(self, order: LoadOrder) -> None:
        """Experts to have in slots when a step comes to a layer."""
        if isinstance(self.bay, Conveyor):
            self.bay.order(order)

    def expect(self, layer: int, experts: np.ndarray, worth: np.ndarray) -> None:
        """A forecast for a layer to come."""
        if isinstance(self.bay, Shelf):
            self.bay.expect(layer, experts, worth)

    def call(
        self,
        layer: int,
        experts_P: np.ndarray,
        rows: int,
        scores_E: np.ndarray | None,
        step: StepId | None,
        answer: OnAnswer,
    ) -> None:
        """Compute these pairs; the answer comes in time."""
        assert self._call is None, "one sequence asks for one layer at a time"
        count, now_s = Counter(experts_P.tolist()), self._loop.now_s
        if self.bay is None:
            takes_s = self._compute(self.times.call_s, count.values())
            self._loop.at(now_s + takes_s, answer, SimAnswer(pairs=len(experts_P), hits=len(experts_P)))
            return
        begun = self.bay.begin_step(layer, experts_P, rows, scores_E, step)
        self._call = _Call(layer, count, begun, answer, now_s, len(experts_P))
        ready_P = begun.slots_P >= 0
        ready = set(experts_P[ready_P].tolist())
        takes_s = self._compute(self.times.call_s, (count[expert] for expert in ready))
        self._loop.at(now_s + takes_s, self._computed, sorted(set(begun.slots_P[ready_P].tolist())))

    # --- the call in hand -------------------------------------------------------------------------------

    def _compute(self, first_s: float, rows: Iterable[int]) -> float:
        takes_s = first_s + sum(map(self.times.compute_s, rows))
        self.busy_s += takes_s
        return takes_s

    def _computed(self, slots: list[int]) -> None:
        call = self._call
        assert call is not None and self.bay is not None
        call.is_computing = False
        if slots:
            self.bay.release(call.step, slots)
        self._go_on()

    def _go_on(self) -> None:
        """Compute the next expert that has arrived, wait for it, or answer."""
        call, bay, now_s = self._call, self.bay, self._loop.now_s
        if call is None or call.is_computing or bay is None:
            return
        if bay.poll(call.step):
            if call.waits_since_s is not None:
                call.waited_s += now_s - call.waits_since_s
                call.waits_since_s = None
            call.is_computing = True
            arrived = bay.next_arrival(call.step)
            assert arrived is not None, "it was there a moment ago"
            identifier, slot = arrived
            takes_s = self._compute(0.0, (call.rows[layer_and_expert(identifier)[1]],))
            self._loop.at(self._loop.now_s + takes_s, self._computed, [slot])
        elif call.step.waiting or call.step.arriving:
            call.waits_since_s = now_s if call.waits_since_s is None else call.waits_since_s
        else:
            call.is_computing = True
            hosted_s = len(call.step.hosted) * (self.times.host_s or 0.0)
            self._loop.at(call.begun_s + hosted_s, self._finish)

    def _finish(self) -> None:
        call, bay = self._call, self.bay
        assert call is not None and bay is not None
        bay.end_step()
        loaded, evicted, _ = bay.take_changes()
        self._call = None
        hosted = sum(call.rows[layer_and_expert(identifier)[1]] for identifier in call.step.hosted)
        call.answer(
            SimAnswer(
                pairs=call.pairs,
                hits=int(np.count_nonzero(call.step.slots_P >= 0)),
                hosted=hosted,
                loaded=loaded,
                evicted=evicted,
                waited_s=call.waited_s,
                load_s=bay.load_cost.mean_s,
            )
        )


def shards(owned_LWE: Sequence[np.ndarray]) -> list[Shard]:
    """Each worker's shard, from bool [W, E] per layer."""
    known: dict[bytes, Shard] = {}
    found = []
    for worker in range(len(owned_LWE[0])):
        owned_LE = np.stack([owned_WE[worker] for owned_WE in owned_LWE])
        key = np.packbits(owned_LE).tobytes()
        if key not in known:
            ids = (expert_id(layer, expert) for layer, expert in np.argwhere(owned_LE).tolist())
            known[key] = Shard(dict.fromkeys(ids), int(owned_LE.any(axis=1).sum()))
        found.append(known[key])
    return found


def shard_of(keys: Iterable[ExpertKey]) -> Shard:
    """Of a list of experts."""
    keys = list(keys)
    return Shard(dict.fromkeys(expert_id(key.layer, key.expert) for key in keys), len({key.layer for key in keys}))


def resident_worker(loop: EventLoop, times: WorkerTimes) -> SimWorker:
    """One that has everything ready."""
    return SimWorker(loop, times)


def passing_worker(loop: EventLoop, times: WorkerTimes, shape: ModelShape, shard: Shard) -> SimWorker:
    """One whose experts leave after use; ready all the same where it has no slots to speak of."""
    if times.slots is None:
        return SimWorker(loop, times)
    link, pool, residency = _parts(loop, times, shape, shard)
    bay = Conveyor(cast(Any, pool), residency, link, cast(Any, shard), shape.expert_bytes)
    return SimWorker(loop, times, bay, link)


def keeping_worker(
    loop: EventLoop, times: WorkerTimes, shape: ModelShape, shard: Shard, scheduling: SchedulingConfig
) -> SimWorker:
    """One whose experts pass through as they were ordered, and stay for as long as nobody needs the slot."""
    if times.slots is None:
        return SimWorker(loop, times)
    link, pool, residency = _parts(loop, times, shape, shard)
    keeper = Keeper(scheduling.eviction, shape.layers, shape.experts, scheduling.score_window)
    bay = Conveyor(cast(Any, pool), residency, link, cast(Any, shard), shape.expert_bytes, keeper)
    return SimWorker(loop, times, bay, link)


def caching_worker(
    loop: EventLoop, times: WorkerTimes, shape: ModelShape, shard: Shard, scheduling: SchedulingConfig
) -> SimWorker:
    """One whose slots are a cache."""
    if times.slots is None:
        return SimWorker(loop, times)
    link, pool, residency = _parts(loop, times, shape, shard)
    eviction = scheduling.eviction if scheduling.policy == "importance" else "lru"
    keeper = Keeper(eviction, shape.layers, shape.experts, scheduling.score_window)
    assists = scheduling.policy == "importance" and scheduling.host_assist and times.host_s is not None
    cost = Cost(times.host_s) if assists else None
    bay = Shelf(cast(Any, pool), residency, link, cast(Any, shard), shape.expert_bytes, keeper, host_cost=cost)
    return SimWorker(loop, times, bay, link)


def _parts(loop: EventLoop, times: WorkerTimes, shape: ModelShape, shard: Shard) -> tuple[SimLink, _Pool, Residency]:
    slots = max(1, min(times.slots or 1, len(shard.experts)))
    residency = Residency(slots, shape.layers, shape.experts, max(1, shard.layers))
    return SimLink(loop, times.load_s), _Pool(slots, [None] * slots), residency
