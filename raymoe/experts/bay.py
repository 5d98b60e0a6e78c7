"""What every set of slots does, whatever decides who sits in them: loads into slots, landing, counting, telling.

Serialised by one lock, since orders come from another thread than layer calls, and the loader asks on its own for what
to do next. P pairs, E experts.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np

from raymoe.errors import LoadCancelledError
from raymoe.experts.call import layer_and_expert
from raymoe.experts.costs import Cost
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import LOAD_TIMEOUT_S, ON_DEMAND, Loader, Ticket
from raymoe.experts.slots import Residency, SlotPool
from raymoe.observe.trace import Span, Tracer
from raymoe.placement.keeping import Keeper
from raymoe.types import ExpertKey, StepId

SLOT_WAIT_S = 1e-4  # while every slot is taken by loads in flight that nobody waits for


@dataclass(slots=True)
class Counters:
    """Totals since the start; pairs are (row, expert).

    Attributes:
        prefetches: loads begun ahead of need; ``prefetches_used`` of them a call then asked for, ``prefetches_wasted``
            left their slot before any did.
        prefetches_late: ordered but never begun.
        link_busy_s: seconds for which loads that arrived kept the link busy.
    """

    hits: int = 0
    misses: int = 0
    hosted: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    evictions: int = 0
    prefetches: int = 0
    prefetches_refused: int = 0
    prefetches_late: int = 0
    prefetches_used: int = 0
    prefetches_wasted: int = 0
    link_busy_s: float = 0.0


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


class Bay(ABC):
    """Slots for experts of one shape, who is in them, and loads under way.

    Args:
        expert_bytes: size of one expert.

    Attributes:
        tracer: told of loads; None where nobody looks.
        shrunk: slots fewer than were wanted.
        clock: seconds by which loads under way are judged; a simulation puts its own in its place.
    """

    def __init__(
        self, pool: SlotPool, residency: Residency, loader: Loader, store: HostStore, expert_bytes: int
    ) -> None:
        self.pool = pool
        self.residency = residency
        self.counters = Counters()
        self.shrunk = 0
        self.expert_bytes = expert_bytes
        self.load_cost = Cost()
        self.tracer: Tracer | None = None
        self.clock = time.perf_counter
        self._loader = loader
        self._store = store
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._started_s: dict[int, float] = {}
        self._failed: dict[int, BaseException] = {}
        self._purposes: dict[int, tuple[str, StepId | None]] = {}  # of loads under way, while somebody looks
        self._unused: set[int] = set()  # loaded ahead, or under way, and not asked for yet
        self._loaded: dict[int, None] = {}  # in order, and quick to look up
        self._evicted: dict[int, None] = {}
        self._told_loads = 0
        self._unmeasured: list[Ticket] = []  # loads that computing waits for on the device, their time not known yet
        self._step: Step | None = None

    @abstractmethod
    def begin_step(
        self, layer: int, experts_P: np.ndarray, rows: int, scores_E: np.ndarray | None, step: StepId | None = None
    ) -> Step:
        """Shield what the call needs and start loading what is missing."""

    @abstractmethod
    def next_arrival(self, step: Step) -> tuple[int, int] | None:
        """Wait for the next missing expert: (expert id, slot); None when all were delivered."""

    def poll(self, step: Step) -> bool:
        """Go on with what waits for a slot; whether ``next_arrival`` would return now. For those who don't wait."""
        with self._lock:
            if step.waiting and not step.arriving:
                self._go_on(step)
            ticket = self._tickets.get(step.arriving[0]) if step.arriving else None
            return bool(step.arriving) and (ticket is None or ticket.is_done())

    @abstractmethod
    def release(self, step: Step, slots: list[int]) -> None:
        """The experts in ``slots`` are computed."""

    @abstractmethod
    def end_step(self) -> None:
        """The call is over: nothing is shielded any more."""

    @abstractmethod
    def _go_on(self, step: Step) -> None:
        """Begin what loads of the call can begin now. The caller holds the lock."""

    @abstractmethod
    def load(self, identifier: int) -> None:
        """Load an expert now, outside of any call, and wait for it."""

    def drop(self, identifier: int) -> bool:
        """Let go of an expert that leaves the shard, in its slot and in host memory. Outside of any call.

        False, and nothing is changed, while it is on its way into a slot.
        """
        with self._lock:
            self._settle()
            if identifier in self._tickets:
                return False
            self._drop_orders(identifier)
            slot = self.residency.find(identifier)
            if slot is not None:
                self._note_evicted(identifier)
                self.residency.abandon(slot)
            self._failed.pop(identifier, None)
            layer, expert = layer_and_expert(identifier)
            self._store.drop([ExpertKey(layer=int(layer), expert=int(expert))])
            return True

    @abstractmethod
    def replace_keeper(self, keeper: Keeper) -> None:
        """Judge what slots keep by other values from now on; nothing where they keep nothing."""

    @abstractmethod
    def worth_LE(self) -> np.ndarray | None:
        """What keeping each expert is worth [L, E]; None where nothing is kept for its worth."""

    @abstractmethod
    def on_idle(self) -> None:
        """The loader has nothing to do, or a cancelled load has given its slot back. On the loader's thread."""

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Ids that are here now and were not at the last take, the reverse, and the loads since then."""
        with self._lock:
            changes = tuple(self._loaded), tuple(self._evicted)
            self._loaded, self._evicted = {}, {}
            loads = self.counters.loads - self._told_loads
            self._told_loads = self.counters.loads
            return *changes, loads

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether it can be computed now."""
        with self._lock:
            if self._tickets:
                self._settle()
            return self.residency.ready_slot_LE[layer] >= 0

    def trace(self, tracer: Tracer | None) -> None:
        """Tell a tracer of loads that begin from now on; None is nobody. Those that have ended are told before."""
        with self._lock:
            self._settle()
            self.tracer = tracer
            self._purposes.clear()

    def ready_and_loading(self) -> tuple[np.ndarray, list[int]]:
        """Bool of all layers' experts [L, E], whether each can be computed now; and the ids of those under way."""
        with self._lock:
            return self.residency.ready_slot_LE >= 0, list(self._tickets)

    def resident(self) -> list[int]:
        """Ids of all experts in slots or on their way into one."""
        with self._lock:
            return sorted(self.residency.slot_of)

    # --- the caller holds the lock ----------------------------------------------------------------------

    @abstractmethod
    def _drop_orders(self, identifier: int) -> None:
        """Forget orders for an expert that leaves the shard."""

    def _count(self, pairs: int, hits: int) -> None:
        self.counters.hits += hits
        self.counters.misses += pairs - hits

    def _asked_for(self, identifiers: list[int]) -> None:
        """A call wants these experts: what was loaded ahead of it was not in vain."""
        if self._unused.isdisjoint(identifiers):
            return
        used = self._unused.intersection(identifiers)
        self._unused -= used
        self.counters.prefetches_used += len(used)

    def _left(self, identifier: int) -> None:
        """An expert has left its slot, or never came to it."""
        if identifier in self._unused:
            self._unused.remove(identifier)
            self.counters.prefetches_wasted += 1

    def _start_load(self, identifier: int, slot: int, priority: int) -> None:
        """Begin the load into a slot that was claimed for it."""
        if priority != ON_DEMAND:
            self._unused.add(identifier)
        source = self._store.experts[identifier]
        ticket = self._loader.start(source, self.pool.slots[slot], self.expert_bytes, priority)
        self._note_start(identifier, ticket, priority)

    def _note_start(self, identifier: int, ticket: Ticket, priority: int) -> None:
        self._tickets[identifier] = ticket
        self._started_s[identifier] = self.clock()
        self._failed.pop(identifier, None)
        if self.tracer is not None:
            order = "on demand" if priority == ON_DEMAND else "ordered"
            self._purposes[identifier] = order, self._step_of_load(priority)

    def _step_of_load(self, priority: int) -> StepId | None:
        """The forward for which a load begins; None where that is not known."""
        return None

    def _trace_load(self, tracer: Tracer, identifier: int, ticket: Ticket) -> None:
        order, step = self._purposes.pop(identifier, ("", None))
        span_s = ticket.span_s()
        if not order or span_s is None:  # begun before somebody looked, or never
            return
        layer, expert = layer_and_expert(identifier)
        outcome = "loaded"
        if ticket.error is not None:
            outcome = "cancelled" if isinstance(ticket.error, LoadCancelledError) else "failed"
        tracer.add(
            Span(
                lane="link",
                kind="load",
                start_s=span_s[0],
                end_s=span_s[1],
                layer=int(layer),
                experts=(int(expert),),
                step=step,
                facts={"order": order, "outcome": outcome, "bytes": self.expert_bytes},
            )
        )

    def _note_evicted(self, identifier: int) -> None:
        _note(identifier, self._evicted, self._loaded)
        self.counters.evictions += 1
        self._left(identifier)

    def _settle(self, layer: int | None = None) -> None:
        """Take note of loads that have finished; a failed one frees its slot, its error comes up on demand.

        Args:
            layer: whose loads; None: all.
        """
        for identifier, ticket in list(self._tickets.items()):
            if (layer is None or layer_and_expert(identifier)[0] == layer) and ticket.is_done():
                self._land(identifier, ticket)
        if self._unmeasured:
            self._unmeasured = [ticket for ticket in self._unmeasured if not self._measure(ticket)]

    def _land(self, identifier: int, ticket: Ticket) -> None:
        del self._tickets[identifier], self._started_s[identifier]
        if self.tracer is not None:
            self._trace_load(self.tracer, identifier, ticket)
        slot = self.residency.slot_of[identifier]
        if ticket.error is None:
            self.residency.mark_ready(slot)
            self.counters.loads += 1
            self.counters.bytes_loaded += self.expert_bytes
            _note(identifier, self._loaded, self._evicted)
            if not self._measure(ticket):
                self._unmeasured.append(ticket)
        else:
            self._left(identifier)
            self.residency.abandon(slot)
            if not isinstance(ticket.error, LoadCancelledError):
                self._failed[identifier] = ticket.error

    def _measure(self, ticket: Ticket) -> bool:
        """Take note of the time that a load took. False while that is still to come."""
        seconds = ticket.link_s()
        if seconds is not None:
            self.load_cost.add(seconds)
            self.counters.link_busy_s += seconds
        return seconds is not None or ticket.is_done()

    # --- the caller does not hold the lock --------------------------------------------------------------

    def _finish(self, identifier: int) -> None:
        """Wait until a load has ended. Raises what it failed with."""
        while (ticket := self._tickets.get(identifier)) is not None:
            ticket.wait(LOAD_TIMEOUT_S)
            with self._lock:
                if self._tickets.get(identifier) is ticket:
                    self._land(identifier, ticket)
        with self._lock:
            error = self._failed.pop(identifier, None)
        if error is not None:
            raise error


def _note(identifier: int, gained: dict[int, None], lost: dict[int, None]) -> None:
    """Add a change to ``gained``, unless it only undoes one in ``lost``: what came and went is no change."""
    if identifier in lost:
        del lost[identifier]
    else:
        gained[identifier] = None
