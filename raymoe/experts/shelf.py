"""The slots for experts of one shape, with the loads into them: memory, residency and loader in one owner.

Serialised by one lock, since prefetch orders come from another thread than layer calls, and the loader asks for the
next order on its own. P pairs, E experts.
"""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from raymoe.errors import LoadCancelledError
from raymoe.experts.call import expert_id, layer_and_expert
from raymoe.experts.costs import Cost
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import ON_DEMAND, PREFETCH, Loader, Ticket
from raymoe.experts.orders import Orders
from raymoe.experts.slots import Residency, SlotPool
from raymoe.placement.eviction import prefetch_is_welcome
from raymoe.placement.host_assist import fastest_split
from raymoe.placement.keeping import Keeper

LOAD_TIMEOUT_S = 600.0  # a guard against a dead loader; deadlines of calls are the client's
MOST_HOST_ROWS = 16  # of a step; the cost of an expert on the host is known for few rows, prompts have hundreds
SLOT_WAIT_S = 1e-4  # while every slot is taken by prefetches in flight


@dataclass(slots=True)
class ShelfCounters:
    """Totals since the start; pairs are (row, expert). ``prefetches_late`` were ordered but never begun."""

    hits: int = 0
    misses: int = 0
    hosted: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    prefetches: int = 0
    prefetches_refused: int = 0
    prefetches_late: int = 0


@dataclass(slots=True)
class Step:
    """One layer call in progress.

    Attributes:
        slots_P: slot of each pair that was ready when the call came, else -1.
        waiting: ids that still wait for a slot; arriving: those under way into one.
        hosted: ids to compute on the host.
    """

    layer: int
    slots_P: np.ndarray
    waiting: deque[int]
    arriving: deque[int]
    hosted: tuple[int, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether every expert was there from the start."""
        return not (self.waiting or self.arriving or self.hosted)


class Shelf:
    """Slots, who is in them, and loads under way.

    Attributes:
        split: how misses are shared between link and host (``fastest_split``, or the published walk).
    """

    def __init__(
        self,
        pool: SlotPool,
        residency: Residency,
        loader: Loader,
        store: HostStore,
        expert_bytes: int,
        keeper: Keeper,
        *,
        host_cost: Cost | None = None,
    ) -> None:
        self.pool = pool
        self.residency = residency
        self.keeper = keeper
        self.counters = ShelfCounters()
        self.expert_bytes = expert_bytes
        self.load_cost = Cost()
        self.host_cost = host_cost
        self.split = fastest_split
        self._loader = loader
        self._store = store
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._started_s: dict[int, float] = {}
        self._failed: dict[int, BaseException] = {}
        self._orders = Orders()
        self._loaded: list[int] = []
        self._evicted: list[int] = []
        self._told_loads = 0
        self._step: Step | None = None

    # --- a layer call -----------------------------------------------------------------------------------

    def begin_step(self, layer: int, experts_P: np.ndarray, rows: int, scores_E: np.ndarray | None) -> Step:
        """Shield what the call needs, start loading what is missing, and say what the host shall compute."""
        with self._lock:
            self.residency.unshield(slice(None))  # a call that was begun and never finished shields nothing any more
            if self._tickets:
                self._settle()
            self.counters.prefetches_late += self._orders.drop(layer)
            self.keeper.step(layer, scores_E, experts_P, rows)
            self._cancel_wrong(layer, experts_P)
            slots_P = self.residency.ready_slot_LE[layer][experts_P]
            ready_P = slots_P >= 0
            hits = int(np.count_nonzero(ready_P))
            self.counters.hits += hits
            self.counters.misses += len(experts_P) - hits
            if hits == len(experts_P):
                self.residency.use(slots_P)
                self._step = Step(layer, slots_P, deque(), deque())
                return self._step
            self.residency.use(slots_P[ready_P])
            absent = np.unique(experts_P[~ready_P])
            step = self._step = self._split(layer, slots_P, absent, scores_E, rows <= MOST_HOST_ROWS)
            for identifier in step.arriving:
                self._tickets[identifier].hurry()
            self.residency.use([self.residency.slot_of[identifier] for identifier in step.arriving])
            self._load_waiting(step)
            return step

    def next_arrival(self, step: Step) -> tuple[int, int] | None:
        """Wait for the next missing expert: (expert id, slot); None when all were delivered."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while not step.arriving:
            if not step.waiting:
                return None
            if time.monotonic() > deadline:
                raise TimeoutError(f"no slot became free within {LOAD_TIMEOUT_S:g} s")
            with self._lock:
                self._settle()
                self._load_waiting(step)
            if not step.arriving:
                time.sleep(SLOT_WAIT_S)
        identifier = step.arriving.popleft()
        self._finish(identifier)
        slot = int(self.residency.ready_slot_LE[layer_and_expert(identifier)])
        if slot < 0:  # it had been cancelled as a prefetch just before it was wanted after all
            step.waiting.append(identifier)
            return self.next_arrival(step)
        return identifier, slot

    def release(self, step: Step, slots: list[int]) -> None:
        """The experts in ``slots`` are computed: where others of the step wait for a slot, they give theirs up."""
        if step.waiting:
            with self._lock:
                self.residency.unshield(slots)
                self._load_waiting(step)

    def end_step(self) -> None:
        """Lift all shields; what the host computed is ordered for later, when the link is free."""
        with self._lock:
            self.residency.unshield(slice(None))
            step, self._step = self._step, None
            if step is not None and step.hosted:
                self._order(step.layer, {i: self.keeper.worth(*layer_and_expert(i)) for i in step.hosted})
            if self._tickets:
                self._settle()
            self._prefetch_next()

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Ids that are here now and were not at the last take, the reverse, and the loads since then."""
        with self._lock:
            changes = tuple(self._loaded), tuple(self._evicted)
            self._loaded, self._evicted = [], []
            loads = self.counters.loads - self._told_loads
            self._told_loads = self.counters.loads
            return *changes, loads

    # --- outside of calls -------------------------------------------------------------------------------

    def load(self, identifier: int) -> None:
        """Load an expert now and wait for it. The caller has made sure that there is room."""
        with self._lock:
            if self.residency.find(identifier) is None:
                started = self._begin_load(identifier, ON_DEMAND)
                assert started, "no slot for an expert that should fit"
                self._told_loads += 1  # it belongs to no call
        self._finish(identifier)

    def expect(self, layer: int, experts: np.ndarray, worth: np.ndarray) -> None:
        """A forecast: these experts of a layer to come will be wanted, and are worth this much (see ``prefetch``).

        Those that are here are kept for it; the others are loaded when the link is free, best first, unless that
        would cost a shielded or better expert. What has not begun when the layer comes is dropped, and so is a
        forecast of the layer in hand: it is late.
        """
        with self._lock:
            if self._step is not None and self._step.layer == layer:
                self.counters.prefetches_late += len(experts)
                return
            self.keeper.expect(layer, experts, worth)
            self._order(layer, {expert_id(layer, e): w for e, w in zip(experts.tolist(), worth.tolist(), strict=True)})

    def on_idle(self) -> None:
        """The link is free: begin the best order, if there is any. Called by the loader too."""
        with self._lock:
            self._settle()
            self._prefetch_next()

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether it can be computed now."""
        with self._lock:
            if self._tickets:
                self._settle()
            return self.residency.ready_slot_LE[layer] >= 0

    def resident(self) -> list[int]:
        """Ids of all experts in slots or on their way into one."""
        with self._lock:
            return sorted(self.residency.slot_of)

    def replace_keeper(self, keeper: Keeper) -> None:
        """Judge by other values from now on."""
        with self._lock:
            self.keeper = keeper

    # --- the caller holds the lock ----------------------------------------------------------------------

    def _split(
        self, layer: int, slots_P: np.ndarray, absent: np.ndarray, scores_E: np.ndarray | None, host_may: bool
    ) -> Step:
        """Who loads, who waits, who is computed on the host."""
        identifiers = [expert_id(layer, expert) for expert in absent.tolist()]
        load_s = self.load_cost.mean_s
        host_cost = self.host_cost  # once: it may be taken away by another thread
        host_s = host_cost.mean_s if host_cost is not None and host_may else None
        if host_s is None or load_s is None:
            arriving = [i for i in identifiers if i in self.residency.slot_of]
            return Step(layer, slots_P, deque(i for i in identifiers if i not in arriving), deque(arriving))
        now = time.perf_counter()
        in_flight = [i in self.residency.slot_of for i in identifiers]
        remaining = np.array(
            [
                max(0.0, load_s - (now - self._started_s[i])) if flying else math.nan
                for i, flying in zip(identifiers, in_flight, strict=True)
            ]
        )
        busy_s = float(np.nanmax(remaining)) if any(in_flight) else 0.0
        scores = scores_E[absent] if scores_E is not None else np.zeros(len(absent), dtype=np.float32)
        # no worth of a load beyond the step: what the host computes is loaded soon after, when the link is free
        split = self.split(
            scores, load_s, host_s, link_busy_s=busy_s, remaining_s=remaining if any(in_flight) else None
        )
        hosted = {identifiers[index] for index in split.host}
        arriving = [i for i, flying in zip(identifiers, in_flight, strict=True) if flying and i not in hosted]
        waiting = deque(identifiers[index] for index in split.load)
        return Step(layer, slots_P, waiting, deque(arriving), tuple(sorted(hosted)))

    def _cancel_wrong(self, layer: int, experts_P: np.ndarray) -> None:
        """A prefetch in flight for this layer that its call does not want makes way, unless it is half done."""
        load_s = self.load_cost.mean_s
        if load_s is None:
            return
        for identifier, ticket in self._tickets.items():
            mine, expert = layer_and_expert(identifier)
            wrong = mine == layer and not (experts_P == expert).any()
            if wrong and time.perf_counter() - self._started_s[identifier] < load_s / 2:
                ticket.cancel()

    def _order(self, layer: int, worth: dict[int, float]) -> None:
        self._orders.place(layer, {i: value for i, value in worth.items() if i not in self.residency.slot_of})
        self._settle()
        self._prefetch_next()

    def _prefetch_next(self) -> None:
        """One prefetch at a time, and none while somebody waits for a load or a slot."""
        if self._step is not None and self._step.waiting:
            return
        while not self._tickets and (order := self._orders.take()) is not None:
            identifier, worth = order
            if identifier in self.residency.slot_of or identifier not in self._store.experts:
                continue
            victim = self._victim(identifier)
            held = self.residency.expert_in[victim] if victim is not None else None
            loss = self.keeper.worth(*layer_and_expert(held)) if held is not None else None
            if prefetch_is_welcome(worth, loss) and self._begin_load(identifier, PREFETCH, victim):
                self.counters.prefetches += 1
            else:
                self.counters.prefetches_refused += 1

    def _victim(self, identifier: int) -> int | None:
        residency = self.residency
        values = self.keeper.values(residency.place_S, residency.last_use_S)
        return residency.victim(layer_and_expert(identifier)[0], values)

    def _load_waiting(self, step: Step) -> None:
        while step.waiting and self._begin_load(step.waiting[0], ON_DEMAND):
            identifier = step.waiting.popleft()
            self.residency.use([self.residency.slot_of[identifier]])
            step.arriving.append(identifier)

    def _begin_load(self, identifier: int, priority: int, victim: int | None = None) -> bool:
        claimed = self.residency.claim(identifier, self._victim(identifier) if victim is None else victim)
        if claimed is None:
            return False
        slot, evicted = claimed
        if evicted is not None:
            _note(evicted, self._evicted, self._loaded)
            self.counters.evictions += 1
        source = self._store.experts[identifier]
        self._tickets[identifier] = self._loader.start(source, self.pool.slots[slot], self.expert_bytes, priority)
        self._started_s[identifier] = time.perf_counter()
        self._failed.pop(identifier, None)
        return True

    def _settle(self) -> None:
        """Take note of loads that have finished; a failed one frees its slot, its error comes up on demand."""
        for identifier, ticket in list(self._tickets.items()):
            if ticket.is_done():
                self._land(identifier, ticket)

    def _land(self, identifier: int, ticket: Ticket) -> None:
        del self._tickets[identifier], self._started_s[identifier]
        slot = self.residency.slot_of[identifier]
        if ticket.error is None:
            self.residency.mark_ready(slot)
            self.counters.loads += 1
            self.counters.bytes_loaded += self.expert_bytes
            _note(identifier, self._loaded, self._evicted)
            seconds = ticket.link_s()
            if seconds is not None:
                self.load_cost.add(seconds)
        else:
            self.residency.abandon(slot)
            if not isinstance(ticket.error, LoadCancelledError):
                self._failed[identifier] = ticket.error

    # --- the caller does not hold the lock --------------------------------------------------------------

    def _finish(self, identifier: int) -> None:
        while (ticket := self._tickets.get(identifier)) is not None:
            ticket.wait(LOAD_TIMEOUT_S)
            with self._lock:
                if self._tickets.get(identifier) is ticket:
                    self._land(identifier, ticket)
        with self._lock:
            error = self._failed.pop(identifier, None)
        if error is not None:
            raise error


def _note(identifier: int, gained: list[int], lost: list[int]) -> None:
    """Add a change to ``gained``, unless it only undoes one in ``lost``: what came and went is no change."""
    if identifier in lost:
        lost.remove(identifier)
    else:
        gained.append(identifier)
