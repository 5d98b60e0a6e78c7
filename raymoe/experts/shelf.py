"""The slots for experts of one shape, with the loads into them: memory, residency and loader in one owner.

Serialised by one lock, since prefetch orders come from another thread than layer calls. P pairs.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from raymoe.experts.call import expert_id
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import ON_DEMAND, PREFETCH, Loader, Ticket
from raymoe.experts.slots import Residency, SlotPool
from raymoe.placement.eviction import prefetch_is_welcome

LOAD_TIMEOUT_S = 600.0  # a guard against a dead loader; deadlines of calls are the client's
SLOT_WAIT_S = 1e-4  # while every slot is taken by prefetches in flight


@dataclass(slots=True)
class ShelfCounters:
    """Totals since the start; pairs are (row, expert)."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    prefetches: int = 0
    prefetches_refused: int = 0


@dataclass(slots=True)
class Step:
    """One layer call in progress: which of its experts still wait for a slot."""

    layer: int
    experts_P: np.ndarray
    waiting: deque[int]
    arriving: deque[int]


class Shelf:
    """Slots, who is in them, and loads under way."""

    def __init__(
        self, pool: SlotPool, residency: Residency, loader: Loader, store: HostStore, expert_bytes: int
    ) -> None:
        self.pool = pool
        self.residency = residency
        self.counters = ShelfCounters()
        self.expert_bytes = expert_bytes
        self._loader = loader
        self._store = store
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._failed: dict[int, BaseException] = {}
        self._scores: dict[int, float] = {}
        self._loaded: list[int] = []
        self._evicted: list[int] = []

    # --- a layer call -----------------------------------------------------------------------------------

    def begin_step(
        self, layer: int, experts_P: np.ndarray, scores_E: np.ndarray | None
    ) -> tuple[np.ndarray, Step | None]:
        """Shield what the call needs and start loading what is missing.

        Returns (int32 slot of each pair that is ready now, else -1; the rest of the step, None where all is ready).
        """
        with self._lock:
            if self._tickets:
                self._settle()
            if scores_E is not None:
                self._scores.update({expert_id(layer, expert): float(s) for expert, s in enumerate(scores_E)})
            slots_P = self.residency.ready_slot_LE[layer][experts_P]
            ready_P = slots_P >= 0
            hits = int(np.count_nonzero(ready_P))
            self.counters.hits += hits
            self.counters.misses += len(experts_P) - hits
            if hits == len(experts_P):
                self.residency.use(slots_P)
                return slots_P, None
            self.residency.use(slots_P[ready_P])
            absent = [expert_id(layer, expert) for expert in np.unique(experts_P[~ready_P]).tolist()]
            arriving = deque(identifier for identifier in absent if self.residency.find(identifier) is not None)
            self.residency.use([self.residency.slot_of[identifier] for identifier in arriving])
            step = Step(layer, experts_P, deque(i for i in absent if i not in self.residency.slot_of), arriving)
            self._load_waiting(step)
            return slots_P, step

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
        return identifier, self.residency.slot_of[identifier]

    def release(self, step: Step, slots: list[int]) -> None:
        """The experts in ``slots`` are computed: where others of the step wait for a slot, they give theirs up."""
        if step.waiting:
            with self._lock:
                self.residency.unshield(slots)
                self._load_waiting(step)

    def end_step(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lift all shields; returns the ids that are here now and were not at the last step's end, and the reverse."""
        with self._lock:
            self.residency.unshield(slice(None))
            changes = tuple(self._loaded), tuple(self._evicted)
            self._loaded, self._evicted = [], []
            return changes

    # --- outside of calls -------------------------------------------------------------------------------

    def load(self, identifier: int) -> None:
        """Load an expert now and wait for it. The caller has made sure that there is room."""
        with self._lock:
            if self.residency.find(identifier) is None:
                started = self._begin_load(identifier, ON_DEMAND)
                assert started, "no slot for an expert that should fit"
        self._finish(identifier)

    def prefetch(self, identifier: int, score: float) -> bool:
        """Load ahead of need, unless that would cost a shielded or better expert. Returns whether it is on its way."""
        with self._lock:
            if self.residency.find(identifier) is not None:
                return True
            self._settle()
            victim = self.residency.victim()
            held = self.residency.expert_in[victim] if victim is not None else None
            welcome = held is None or prefetch_is_welcome(score, self._scores.get(held))
            if not welcome or not self._begin_load(identifier, PREFETCH):
                self.counters.prefetches_refused += 1
                return False
            self.counters.prefetches += 1
            return True

    def resident(self) -> list[int]:
        """Ids of all experts in slots or on their way into one."""
        with self._lock:
            return sorted(self.residency.slot_of)

    # --- the caller holds the lock ----------------------------------------------------------------------

    def _load_waiting(self, step: Step) -> None:
        while step.waiting and self._begin_load(step.waiting[0], ON_DEMAND):
            identifier = step.waiting.popleft()
            self.residency.use([self.residency.slot_of[identifier]])
            step.arriving.append(identifier)

    def _begin_load(self, identifier: int, priority: int) -> bool:
        claimed = self.residency.claim(identifier)
        if claimed is None:
            return False
        slot, evicted = claimed
        if evicted is not None:
            _note(evicted, self._evicted, self._loaded)
            self.counters.evictions += 1
        source = self._store.experts[identifier]
        self._tickets[identifier] = self._loader.start(source, self.pool.slots[slot], self.expert_bytes, priority)
        self._failed.pop(identifier, None)
        _note(identifier, self._loaded, self._evicted)
        self.counters.loads += 1
        self.counters.bytes_loaded += self.expert_bytes
        return True

    def _settle(self) -> None:
        """Take note of loads that have finished; a failed one frees its slot, its error comes up on demand."""
        for identifier, ticket in list(self._tickets.items()):
            if ticket.is_done():
                self._land(identifier, ticket)

    def _land(self, identifier: int, ticket: Ticket) -> None:
        del self._tickets[identifier]
        slot = self.residency.slot_of[identifier]
        if ticket.error is None:
            self.residency.mark_ready(slot)
        else:
            self.residency.abandon(slot)
            self._failed[identifier] = ticket.error
            _note(identifier, self._evicted, self._loaded)

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
