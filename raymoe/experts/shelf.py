"""Slots as a cache: experts stay as long as nobody of more worth wants their slot. See ``Keeper`` for the worth.

P pairs, E experts.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from raymoe.errors import LoadCancelledError
from raymoe.experts.bay import SLOT_WAIT_S, Bay, Step
from raymoe.experts.call import expert_id, layer_and_expert
from raymoe.experts.costs import Cost
from raymoe.experts.cuda_loader import CudaLoader
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import LOAD_TIMEOUT_S, ON_DEMAND, PREFETCH, Loader, Ticket
from raymoe.experts.orders import Orders
from raymoe.experts.packing import PackedExpert
from raymoe.experts.slots import Residency, SlotPool
from raymoe.placement.eviction import prefetch_is_welcome
from raymoe.placement.host_assist import fastest_split
from raymoe.placement.keeping import Keeper
from raymoe.types import StepId

RANKED = 32  # slots per layer that are put in order beforehand: more than a row's misses
LONG_S = 3e-4  # about what the books of some rows take
MOST_HOST_ROWS = 16  # of a step; the cost of an expert on the host is known for few rows, prompts have hundreds


class Shelf(Bay):
    """Slots that cache experts by what they are worth.

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
        super().__init__(pool, residency, loader, store, expert_bytes)
        self.keeper = keeper
        self.host_cost = host_cost
        self.split = fastest_split
        self._orders = Orders()
        self._ahead: set[int] = set()  # prefetches under way
        self._begun: set[int] = set()  # loads that a row began before its call
        # by layer, its own slots in the order in which they would be emptied, ended by -1; what is no longer true of
        # one is found out when it is its turn
        self.ranked_LR = np.full((len(residency.ready_slot_LE), RANKED + 1), -1, dtype=np.int32)

    # --- a layer call -----------------------------------------------------------------------------------

    def begin_step(
        self, layer: int, experts_P: np.ndarray, rows: int, scores_E: np.ndarray | None, step: StepId | None = None
    ) -> Step:
        """Shield what the call needs, start loading what is missing, and say what the host shall compute."""
        return self._begin_step(layer, experts_P, rows, scores_E, host_may=rows <= MOST_HOST_ROWS)

    def take(self, layer: int, experts_K: np.ndarray) -> np.ndarray:
        """The slots of a row's experts, -1 for those that are not ready. They are shielded until the next call."""
        with self._lock:
            slots_K: np.ndarray = self.residency.ready_slot_LE[layer][experts_K]
            if self._tickets and min(slots_K.tolist()) < 0:
                self._settle(layer)
                slots_K = self.residency.ready_slot_LE[layer][experts_K]
            self.residency.unshield(slice(None))
            self.residency.shielded_S[slots_K[slots_K >= 0]] = True
            return slots_K

    def start(self, layer: int, experts: list[int], row_K: np.ndarray) -> bool:
        """Load these of a row before anything else is done. False where a slot is lacking.

        The row's other experts are shielded as far as they are there, and these too, for a load that has ended may be
        taken note of at any time. What begins here, ``begin_row`` finds under way.
        """
        slot_of, tickets, shielded_S = self.residency.slot_of, self._tickets, self.residency.shielded_S
        with self._lock:
            if tickets:
                self._settle(layer)  # one that was cancelled is no load of this row
            slots_K = self.residency.ready_slot_LE[layer][row_K]
            shielded_S[slots_K[slots_K >= 0]] = True
            for expert in experts:
                identifier = expert_id(layer, expert)
                if identifier in slot_of:
                    if identifier in tickets:
                        tickets[identifier].hurry()
                elif self._begin_load(identifier, ON_DEMAND, self._prepared_victim(layer)):
                    self._begun.add(identifier)
                else:
                    return False
                shielded_S[slot_of[identifier]] = True
            return True

    def arrive(self, layer: int, experts_K: np.ndarray, meanwhile: Callable[[], None]) -> np.ndarray:
        """The slots of a row that was taken and all of whose experts are in slots or under way, when all are there.

        Raises what a load failed with.

        Args:
            meanwhile: done once, if it is long until then.
        """
        wanted = [expert_id(layer, expert) for expert in experts_K.tolist()]
        with self._lock:
            for i in wanted:
                if i not in self.residency.slot_of:  # its load has failed already
                    raise self._failed.pop(i, LoadCancelledError("the load was cancelled"))
            tickets = [ticket for i in wanted if (ticket := self._tickets.get(i)) is not None]
            slots_K = np.array([self.residency.slot_of[i] for i in wanted], dtype=np.int32)
            self.residency.shielded_S[slots_K] = True
            self.counters.prefetches_late += self._orders.drop(layer)
            begun_s = min((self._started_s[i] for i in wanted if i in self._started_s), default=0.0)
            if tickets and self._orders.by_layer:
                self._settle()
                self._prefetch_next()  # behind the row's own loads, so that the link goes on
        if tickets and begun_s + len(tickets) * (self.load_cost.mean_s or 0.0) - self.clock() > LONG_S:
            meanwhile()
        self._land_all(tickets)
        return slots_K

    def _land_all(self, tickets: list[Ticket]) -> None:
        for ticket in reversed(tickets):  # a device's copies are in one order: when the last has ended, all have
            ticket.land(LOAD_TIMEOUT_S)
        for ticket in tickets:
            if ticket.error is not None:  # never compute what is not there
                raise ticket.error

    @contextmanager
    def begun_elsewhere(self) -> Iterator[None]:
        """While entered, nobody else loads into slots."""
        with self._lock:
            yield

    def adopt(self, layer: int, begun: list[tuple[int, int]]) -> None:
        """The caller has enqueued loads of a row that it has taken: (expert, slot), of the slots in ``ranked_LR``.

        It must not have left ``begun_elsewhere`` since.
        """
        assert isinstance(self._loader, CudaLoader), "only its copies can be enqueued by somebody else"
        for expert, slot in begun:
            identifier = expert_id(layer, expert)
            source = self._store.experts[identifier]
            assert isinstance(source, PackedExpert), "experts move in one piece"
            self._claim(identifier, slot)
            self._note_start(identifier, self._loader.adopt(source, self.pool.slots[slot]), ON_DEMAND)
            self._begun.add(identifier)

    def note_rows(
        self, layers_N: np.ndarray, experts_NK: np.ndarray, misses_N: list[int], scores_NE: np.ndarray | None
    ) -> None:
        """Rows of several layers, in this order, that were computed from slots: what ``begin_row`` would have noted."""
        with self._lock:
            if self._tickets:
                self._settle()
            residency = self.residency
            residency.note_use(residency.ready_slot_LE[layers_N[:, None], experts_NK])
            ids_NK = [
                [expert_id(layer, expert) for expert in experts_K]
                for layer, experts_K in zip(layers_N.tolist(), experts_NK.tolist(), strict=True)
            ]
            self._count(experts_NK.size, experts_NK.size - sum(misses_N))
            self.keeper.steps(layers_N, scores_NE, experts_NK)
            self.ranked_LR[layers_N, 0] = -1
            for layer, ids_K in zip(layers_N.tolist(), ids_NK, strict=True):
                self.counters.prefetches_late += self._orders.drop(layer)
                self._begun.difference_update(ids_K)
                if self._unused:
                    self._asked_for(ids_K)

    def prepare(self, layer: int) -> None:
        """Find out, while there is time, whose slots a row of the layer would take. See ``start``."""
        with self._lock:
            self._rank(layer)

    def begin_row(self, layer: int, experts_K: np.ndarray, scores_E: np.ndarray | None, *, host_may: bool) -> Step:
        """A call of one row that is computed from the slots where its experts are, once ``land`` has returned.

        They are shielded until the next call, by when the device must have computed them. There must be as many slots.
        """
        return self._begin_step(layer, experts_K, 1, scores_E, host_may=host_may, settles=layer)

    def land(self, step: Step, experts_K: np.ndarray) -> np.ndarray:
        """The slots of the row's experts when all are loaded; -1 for those that the host is to compute.

        Raises what a load failed with.
        """
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while step.waiting:  # all other slots are taken by prefetches under way
            if time.monotonic() > deadline:
                raise TimeoutError(f"no slot became free within {LOAD_TIMEOUT_S:g} s")
            with self._lock:
                self._go_on(step)
            if step.waiting:
                time.sleep(SLOT_WAIT_S)
        with self._lock:
            self._prefetch_next()  # behind the row's own loads, so that the link goes on
            tickets = [ticket for i in step.arriving if (ticket := self._tickets.get(i)) is not None]
            hosted, slot_of = set(step.hosted), self.residency.slot_of
            wanted = [expert_id(step.layer, expert) for expert in experts_K.tolist()]
            slots = [-1 if i in hosted else slot_of[i] for i in wanted]
        self._land_all(tickets)
        return np.array(slots, dtype=np.int32)

    def order_hosted(self) -> None:
        """The last row is computed: what the host did of it is ordered for later, when the link is free."""
        step = self._step
        if step is not None and step.hosted:
            with self._lock:
                self.counters.hosted += len(step.hosted)
                self._order(step.layer, {i: self.keeper.worth(*layer_and_expert(i)) for i in step.hosted})
        self._step = None

    def _begin_step(
        self,
        layer: int,
        experts_P: np.ndarray,
        rows: int,
        scores_E: np.ndarray | None,
        *,
        host_may: bool,
        settles: int | None = None,
    ) -> Step:
        """``settles``: the layer whose loads are taken note of before; None: all."""
        with self._lock:
            self.residency.unshield(slice(None))  # a call that was begun and never finished shields nothing any more
            if self._tickets:
                self._settle(settles)
            self.counters.prefetches_late += self._orders.drop(layer)
            self.keeper.step(layer, scores_E, experts_P, rows)
            self.ranked_LR[layer, 0] = -1
            self._cancel_wrong(layer, experts_P)
            slots_P = self.residency.ready_slot_LE[layer][experts_P]
            if self._begun:  # a load that this call itself began is a miss, however soon it is done
                begun, self._begun = self._begun, set()
                slots_P[[expert_id(layer, expert) in begun for expert in experts_P.tolist()]] = -1
            ready_P = slots_P >= 0
            ready = int(np.count_nonzero(ready_P))
            self._count(len(experts_P), ready)
            if self._unused:
                first = expert_id(layer, 0)
                self._asked_for([first | expert for expert in experts_P.tolist()])
            if ready == len(experts_P):
                self.residency.use(slots_P)
                self._step = Step(layer, slots_P, deque(), deque())
                return self._step
            self.residency.use(slots_P[ready_P])
            absent = np.unique(experts_P[~ready_P])
            call = self._step = self._split(layer, slots_P, absent, scores_E, host_may)
            for identifier in call.arriving:
                if identifier in self._tickets:
                    self._tickets[identifier].hurry()
                self.residency.use_one(self.residency.slot_of[identifier])
            self._load_waiting(call)
            return call

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
            self.ranked_LR[layer, 0] = -1
            first = expert_id(layer, 0)
            self._order(layer, {first | e: w for e, w in zip(experts.tolist(), worth.tolist(), strict=True)})

    def on_idle(self) -> None:
        """The link is free: begin the best order, if there is any. Called by the loader too."""
        with self._lock:
            self._settle()
            self._prefetch_next()

    def top_up(self) -> None:
        """Take note of loads that have ended, and begin ordered ones as far as the loader likes: for those who wait for
        a device that tells nobody when."""
        if self._tickets or self._orders.by_layer:
            self.on_idle()

    @property
    def is_prefetching(self) -> bool:
        """Whether loads ahead of need are under way, or ordered."""
        return bool(self._ahead or self._orders.by_layer)

    def replace_keeper(self, keeper: Keeper) -> None:
        """Judge by other values from now on."""
        with self._lock:
            self.keeper = keeper

    def worth_LE(self) -> np.ndarray | None:
        """Mean gate score and use over the last steps."""
        return self.keeper.mean_LE

    # --- the caller holds the lock ----------------------------------------------------------------------

    def _drop_orders(self, identifier: int) -> None:
        self._orders.cancel(identifier)

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
        now = self.clock()
        in_flight = [i in self.residency.slot_of for i in identifiers]
        remaining = np.array(
            [
                max(0.0, load_s - (now - self._started_s.get(i, -math.inf))) if flying else math.nan
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
            if wrong and self.clock() - self._started_s[identifier] < load_s / 2:
                ticket.cancel()

    def _order(self, layer: int, worth: dict[int, float]) -> None:
        missing = {i: value for i, value in worth.items() if i not in self.residency.slot_of}
        self._orders.place(layer, missing)
        if missing:
            self._settle()
            self._prefetch_next()

    def _prefetch_next(self) -> None:
        """As many prefetches at a time as the loader likes, and none while somebody waits for a load or a slot."""
        if self._step is not None and self._step.waiting:
            return
        while self._may_prefetch() and (order := self._orders.take()) is not None:
            identifier, worth = order
            if identifier in self.residency.slot_of or identifier not in self._store.experts:
                continue
            layer = int(layer_and_expert(identifier)[0])
            if self.ranked_LR[layer, 0] < 0:
                self._rank(layer)
            victim = self._prepared_victim(layer)
            if victim is None:
                victim = self._victim(identifier)
            held = self.residency.expert_in[victim] if victim is not None else None
            loss = self.keeper.worth(*layer_and_expert(held)) if held is not None else None
            if prefetch_is_welcome(worth, loss) and self._begin_load(identifier, PREFETCH, victim):
                self._ahead.add(identifier)
                self.counters.prefetches += 1
            else:
                self.counters.prefetches_refused += 1

    def _may_prefetch(self) -> bool:
        if self._loader.prefetches == 1:
            return not self._tickets
        self._ahead.intersection_update(self._tickets)
        return len(self._ahead) < self._loader.prefetches

    def _victim(self, identifier: int) -> int | None:
        residency, keeper, layer = self.residency, self.keeper, layer_and_expert(identifier)[0]
        if residency.has_free:
            return None
        own = residency.own_slots(layer)
        if own is not None:  # the common case, with a few dozen slots to look at instead of all
            values = keeper.values(residency.place_S[own], residency.last_use_S[own])
            slot = residency.victim_among(own, values)
            if slot is not None:
                return slot
        return residency.victim(layer, keeper.values(residency.place_S, residency.last_use_S))

    def _rank(self, layer: int) -> None:
        """Put the layer's own slots in the order in which they would be emptied."""
        residency = self.residency
        own = residency.own_slots(layer)
        if own is None or residency.has_free:
            self.ranked_LR[layer, 0] = -1
            return
        values = self.keeper.values(residency.place_S[own], residency.last_use_S[own])
        first = own[np.argsort(values, kind="stable")[:RANKED]]
        self.ranked_LR[layer, : len(first)] = first
        self.ranked_LR[layer, len(first)] = -1

    def _prepared_victim(self, layer: int) -> int | None:
        """The next of these that may be emptied; None where a slot is free, or no prepared one is left."""
        residency = self.residency
        if residency.has_free:
            return None
        for slot in self.ranked_LR[layer].tolist():
            if slot < 0:
                break
            if residency.ready_S[slot] and not residency.shielded_S[slot] and residency.layer_S[slot] == layer:
                return int(slot)
        return None

    def _go_on(self, step: Step) -> None:
        self._settle()
        self._load_waiting(step)

    def _load_waiting(self, step: Step) -> None:
        if not step.waiting:
            return
        while step.waiting and self._begin_load(step.waiting[0], ON_DEMAND):
            identifier = step.waiting.popleft()
            self.residency.use_one(self.residency.slot_of[identifier])
            step.arriving.append(identifier)

    def _begin_load(self, identifier: int, priority: int, victim: int | None = None) -> bool:
        slot = self._claim(identifier, self._victim(identifier) if victim is None else victim)
        if slot is None:
            return False
        self._start_load(identifier, slot, priority)
        return True

    def _claim(self, identifier: int, victim: int | None) -> int | None:
        claimed = self.residency.claim(identifier, victim)
        if claimed is None:
            return None
        slot, evicted = claimed
        if evicted is not None:
            self._note_evicted(evicted)
        return slot
