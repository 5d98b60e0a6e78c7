"""Slots that experts pass through: loaded as they were ordered ([O] OD-MoE), gone when used or no longer worth a slot.

Orders come ahead of their calls and are taken in the order of use; so each load begins as soon as a slot is free, in
turn, and several may be under way at once. What nobody ordered is loaded when a call asks for it, before all orders.
The ``Timetable`` knows which order holds which expert; an expert in a slot that neither the call in hand nor an order
claims leaves at once. So no decision is needed of whom to evict, but when a call finds no slot free (``_make_room``).

With a keeper nobody leaves before the slot is needed. Orders say when experts will be used next, and slots are given as
by "aggressive" integrated prefetching and caching (Cao, Felten, Karlin and Li, SIGMETRICS 1995): when the link is free,
load the first ordered expert that is missing, in place of the one used last of all; but never in place of one that is
used before. What nobody ordered is used after everything that was, and what is worth least goes first.

P pairs, E experts.
"""

import time
from collections import deque

import numpy as np

from raymoe.experts.bay import SLOT_WAIT_S, Bay, Step
from raymoe.experts.call import LoadOrder, expert_id, layer_and_expert
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import LOAD_TIMEOUT_S, ON_DEMAND, PREFETCH, Loader, Ticket
from raymoe.experts.slots import Residency, SlotPool
from raymoe.experts.timetable import Timetable
from raymoe.placement.keeping import Keeper
from raymoe.types import StepId


class Conveyor(Bay):
    """Slots for orders.

    The call in hand claims its experts until each is computed (``_claimed``); a cancelled load keeps its slot until
    it has ended (``_cancelled``).

    Args:
        keeper: judges what stays in slots that are not needed; None: nothing stays.
    """

    def __init__(
        self,
        pool: SlotPool,
        residency: Residency,
        loader: Loader,
        store: HostStore,
        expert_bytes: int,
        keeper: Keeper | None = None,
    ) -> None:
        super().__init__(pool, residency, loader, store, expert_bytes)
        self.keeper = keeper
        self._timetable = Timetable()
        self._claimed: set[int] = set()
        self._cancelled: set[int] = set()
        self._serving: tuple[StepId | None, int] = (None, 0)  # step and layer of the call in hand

    # --- orders -----------------------------------------------------------------------------------------

    def order(self, order: LoadOrder) -> None:
        """Load these experts when their turn comes; those that are not in the shard are ignored.

        An order of a lower epoch than its sequence's, or that comes after its call, is dropped and counted.
        """
        identifiers = (expert_id(order.layer, expert) for expert in dict.fromkeys(order.experts.tolist()))
        with self._lock:
            self._timetable.order(
                order, [identifier for identifier in identifiers if identifier in self._store.experts]
            )
            self._advance()

    def forget(self, sequence: int) -> None:
        """A sequence has ended: its orders are void."""
        with self._lock:
            self._timetable.forget(sequence)
            self._advance()

    def pass_by(self, step: StepId, layer: int) -> None:
        """A call has come to a layer whose experts pass through other slots: orders for earlier ones are void."""
        with self._lock:
            self._timetable.call(step, layer, [])
            self._advance()

    # --- a layer call -----------------------------------------------------------------------------------

    def begin_step(
        self, layer: int, experts_P: np.ndarray, rows: int, scores_E: np.ndarray | None, step: StepId | None = None
    ) -> Step:
        """Claim what the call needs, and begin to load what is missing. A call that was never finished claims no more.

        Args:
            step: whose orders the call uses up, and whose for earlier calls are void; None where nothing was ordered.
        """
        with self._lock:
            self._settle()
            identifiers = [expert_id(layer, expert) for expert in sorted(set(experts_P.tolist()))]
            self._timetable.call(step, layer, identifiers)
            slots_P = self.residency.ready_slot_LE[layer][experts_P]
            if self.keeper is not None:
                self.keeper.step(layer, scores_E, experts_P, rows)
                self.residency.use(slots_P[slots_P >= 0])
            self._count(len(experts_P), int(np.count_nonzero(slots_P >= 0)))
            self._asked_for(identifiers)
            return self._claim(step, layer, identifiers, slots_P)

    def next_arrival(self, step: Step) -> tuple[int, int] | None:
        """Wait for the next missing expert: (expert id, slot); None when all were delivered."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        while True:
            with self._lock:  # the loader's thread may just be giving a slot to one that waits
                if step.waiting and not step.arriving:
                    self._advance()
                if step.arriving:
                    identifier = step.arriving.popleft()
                    break
                if not step.waiting:
                    return None
            if time.monotonic() > deadline:
                raise TimeoutError(f"no slot became free within {LOAD_TIMEOUT_S:g} s")
            time.sleep(SLOT_WAIT_S)
        self._finish(identifier)
        slot = int(self.residency.ready_slot_LE[layer_and_expert(identifier)])
        assert slot >= 0, "what a call claims is neither cancelled nor evicted"
        return identifier, slot

    def release(self, step: Step, slots: list[int]) -> None:
        """The experts in ``slots`` are computed: nobody claims them but orders for other calls."""
        with self._lock:
            self._claimed -= {self.residency.expert_in[slot] for slot in slots}
            self._advance()

    def end_step(self) -> None:
        """The call is over: nobody claims what it did but orders for other ones."""
        with self._lock:
            self._claimed.clear()
            self._step = None
            self._advance()

    # --- outside of calls -------------------------------------------------------------------------------

    def load(self, identifier: int) -> None:
        """Bring an expert over the link outside of any call, and claim it no more: so it is known what that takes."""
        layer, expert = layer_and_expert(identifier)
        with self._lock:
            slots_P = self.residency.ready_slot_LE[layer][[expert]]
            step = self._claim(None, layer, [identifier], slots_P)
        try:
            while self.next_arrival(step) is not None:
                pass
        finally:
            self.end_step()

    def replace_keeper(self, keeper: Keeper) -> None:
        """Judge by other values from now on, where anything is kept."""
        with self._lock:
            if self.keeper is not None:
                self.keeper = keeper

    def worth_LE(self) -> np.ndarray | None:
        """Mean gate score and use over the last steps, where anything is kept."""
        return None if self.keeper is None else self.keeper.mean_LE

    def on_idle(self) -> None:
        """The link is free, or a slot has become so: go on with what waits for one."""
        with self._lock:
            self._advance()

    # --- the caller holds the lock ----------------------------------------------------------------------

    def _drop_orders(self, identifier: int) -> None:
        self._timetable.cancel(identifier)

    def _go_on(self, step: Step) -> None:
        self._advance()

    def _claim(self, of: StepId | None, layer: int, identifiers: list[int], slots_P: np.ndarray) -> Step:
        """Claim experts for the call in hand: those under way are hurried, those that are missing wait for a slot."""
        self._claimed = set(identifiers)
        self._serving = of, layer
        arriving = [i for i in self._tickets if i in self._claimed and i not in self._cancelled]
        missing = [i for i in identifiers if i not in self.residency.slot_of or i in self._cancelled]
        self._step = Step(layer, slots_P, deque(missing), deque(arriving))
        for identifier in arriving:
            self._tickets[identifier].hurry()
        self._advance()
        return self._step

    def _advance(self) -> None:
        """Whatever can go on goes on: first the call in hand, then orders in turn; what nobody claims may leave."""
        self._settle()
        if self._step is not None and self._step.waiting:
            self._dismiss()
            self._load_waiting(self._step)
        if self._step is None or not self._step.waiting:
            self._take_orders()
        self._dismiss()
        self.counters.prefetches_late = self._timetable.late
        self.counters.prefetches_refused = self._timetable.refused

    def _load_waiting(self, step: Step) -> None:
        for identifier in list(step.waiting):
            if identifier in self._cancelled:
                continue  # it was wanted again too late, and can be loaded once more when that has ended
            if identifier not in self.residency.slot_of:
                if not self._make_room(step):
                    return
                self._begin_load(identifier, ON_DEMAND)
            step.arriving.append(identifier)  # first, for a step where nothing waits or arrives is ready
            step.waiting.remove(identifier)

    def _make_room(self, step: Step) -> bool:
        """Free a slot for the call in hand; False where it has to wait for one.

        What is kept gives way first, then a wrong forecast for this call. Experts ordered for other calls do so only
        where the call has no slot at all, the one due last: a call that has one gets on without, one load at a time,
        as its link does.
        """
        if self.residency.has_free or self._give_up_kept(self._serving[1]):
            return True
        if len(self._cancelled) >= len(step.waiting):
            return False  # enough will be free soon
        slot_of, due = self.residency.slot_of, self._timetable.due
        held = [i for i in slot_of if self._timetable.holds(i) and i not in self._claimed]
        wrong = [i for i in held if self._timetable.is_wrong(i, *self._serving)]
        if wrong:
            here_first = max(wrong, key=lambda i: (i not in self._tickets, due(i)))
            self._timetable.drop(here_first)
            self._let_go(here_first)
        elif held and not self._cancelled and self._claimed.isdisjoint(slot_of):
            last = max(held, key=due)
            self._timetable.put_back(last)
            self._let_go(last)
        return self.residency.has_free

    def _take_orders(self) -> None:
        """Give slots to orders in turn, as far as they go. Those for an expert that is in a slot share it."""
        while (identifier := self._timetable.next()) is not None:
            if identifier in self._cancelled:
                return
            if identifier not in self.residency.slot_of:
                if not self.residency.has_free:
                    self._dismiss()
                if not self.residency.has_free and not self._make_room_for(identifier):
                    return
                self._begin_load(identifier, PREFETCH)
                self.counters.prefetches += 1
            self._timetable.hold()

    def _dismiss(self) -> None:
        """Let go of what nobody claims; with a keeper only of loads under way, for their link is wanted."""
        for identifier in list(self.residency.slot_of if self.keeper is None else self._tickets):
            claimed = identifier in self._claimed or self._timetable.holds(identifier)
            if not claimed and identifier not in self._cancelled:
                self._let_go(identifier)

    def _make_room_for(self, identifier: int) -> bool:
        """Free a slot for the order whose turn it is; False where all are used before it, or the link is not free."""
        if self._tickets:
            return False
        return self._give_up_kept(layer_and_expert(identifier)[0], after=identifier)

    def _give_up_kept(self, layer: int, after: int | None = None) -> bool:
        """Empty the slot of what is kept and used last of all; False where nothing is.

        Kept is what no call claims and no order holds. That nobody ordered comes last, and of it what is worth least.

        Args:
            layer: of the expert that the slot is for.
            after: only what is used later than this ordered expert may go.
        """
        residency = self.residency
        if self.keeper is None:
            return False
        busy, next_use = self._claimed | self._tickets.keys(), self._timetable.next_uses()
        idle = [i for i in residency.slot_of if i not in busy and not self._timetable.holds(i)]
        unordered = [i for i in idle if i not in next_use]
        if unordered:
            residency.shielded_S[:] = True
            residency.shielded_S[[residency.slot_of[i] for i in unordered]] = False
            slot = residency.victim(layer, self.keeper.values(residency.place_S, residency.last_use_S))
            assert slot is not None, "an expert that is ready can leave"
            victim = residency.expert_in[slot]
        else:
            later = [i for i in idle if after is None or next_use[i] > next_use[after]]
            victim = max(later, key=next_use.__getitem__, default=None)
        if victim is None:
            return False
        self._let_go(victim)
        return residency.has_free

    def _let_go(self, identifier: int) -> None:
        """An expert leaves its slot, at once or when its load has ended."""
        ticket = self._tickets.get(identifier)
        if ticket is not None:
            self._cancelled.add(identifier)
            ticket.cancel()
            if not ticket.is_done():
                return
            self._land(identifier, ticket)
        if identifier in self.residency.slot_of:  # as it still is where it was too late to cancel
            self._note_evicted(identifier)
            self.residency.abandon(self.residency.slot_of[identifier])

    def _step_of_load(self, priority: int) -> StepId | None:
        return self._serving[0] if priority == ON_DEMAND else self._timetable.next_step()

    def _begin_load(self, identifier: int, priority: int) -> None:
        claimed = self.residency.claim(identifier, None)
        assert claimed is not None, "a slot is free"
        self._start_load(identifier, claimed[0], priority)

    def _land(self, identifier: int, ticket: Ticket) -> None:
        super()._land(identifier, ticket)
        self._cancelled.discard(identifier)
        if identifier not in self.residency.slot_of:
            self._timetable.drop(identifier)  # it can't be had: a call that asks for it tries once more, and is told
