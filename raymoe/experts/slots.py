"""Device slots: a fixed allocation that experts pass through, and who sits where.

``SlotPool`` is the memory: one allocation, sliced into slots, never grown. ``Residency`` is the
bookkeeping: it alone knows which expert is in which slot. It holds no tensors and no locks; its owner, the
worker, serialises access.

S slots.
"""

from collections.abc import Callable

import numpy as np
import torch

from raymoe.experts.call import layer_and_expert
from raymoe.experts.compute import WeightTable
from raymoe.experts.packing import PackedExpert, Packing
from raymoe.placement.eviction import lowest_value

ABSENT, UNDER_WAY = -1, -2  # kernels/turns.cpp knows them too


class SlotPool:
    """Memory for ``count`` experts of one shape.

    Args:
        shapes: shape of each parameter of one expert.
        allocate: makes the memory, as ``torch.empty`` does.

    Attributes:
        block: the whole allocation, [S, elements of a slot].
        stacked: each parameter of all slots, [S, *shape]: what the architecture's experts module keeps fused.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        allocate: Callable[..., torch.Tensor] = torch.empty,
    ) -> None:
        self.count = count
        packing = Packing(shapes)
        self.block = allocate((count, packing.numel), dtype=dtype, device=device)
        self.stacked = packing.stacked(self.block)
        self.slots: list[PackedExpert] = [packing.views(self.block[index]) for index in range(count)]
        self.table = WeightTable(count)
        for index, slot in enumerate(self.slots):
            self.table.put(index, slot)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the whole of it at once."""
        return self.block.nbytes


class Residency:
    """Which expert is in which slot, in what state.

    A slot is free, loading, or ready. A shielded slot is never a victim: the experts of the layer step in hand
    are shielded as a whole, for evicting one that another token of the same step still needs would silently
    give wrong output. Expert ids are those of ``expert_id``.

    Every layer has a claim to an equal share of the slots: a layer that has its share evicts its own experts, one
    that hasn't takes from those above theirs. Without that, a rule that looks at all layers' experts together
    does worse (recency by a tenth of the hits: what the next layers need is always what was used longest ago).

    ``ready_slot_LE`` answers for a whole layer call at once: the slot of each expert that can be computed now,
    ABSENT for one that is in none, UNDER_WAY for one that is being loaded into one; both are negative.

    Args:
        count: slots.
        sharing: layers whose experts pass through these slots.
    """

    def __init__(self, count: int, layers: int, experts: int, sharing: int | None = None) -> None:
        self.slot_of: dict[int, int] = {}
        self.ready_slot_LE = np.full((layers, experts), ABSENT, dtype=np.int32)
        self.expert_in: list[int | None] = [None] * count
        self.layer_S = np.zeros(count, dtype=np.int64)
        self.place_S = np.zeros(count, dtype=np.int64)  # layer x experts per layer + expert
        self.ready_S = np.zeros(count, dtype=bool)
        self.shielded_S = np.zeros(count, dtype=bool)
        self.last_use_S = np.zeros(count, dtype=np.int64)
        self.share = count // (sharing or layers)
        self._held_L = np.zeros(layers, dtype=np.int64)
        self._step = 0
        self._free = list(range(count - 1, -1, -1))
        self._slots_of_layer: list[np.ndarray | None] = [None] * layers  # as far as known; claims make it unknown

    @property
    def has_free(self) -> bool:
        """Whether a claim would empty no slot."""
        return bool(self._free)

    def find(self, expert: int) -> int | None:
        """The slot that holds ``expert`` or is loading it."""
        return self.slot_of.get(expert)

    def use(self, slots: np.ndarray | list[int]) -> None:
        """The experts in ``slots`` are used now: note the time, and shield them until ``unshield``."""
        self._step += 1
        self.last_use_S[slots] = self._step
        self.shielded_S[slots] = True

    def use_one(self, slot: int) -> None:
        """The same for one slot, in a third of the time."""
        self._step += 1
        self.last_use_S[slot] = self._step
        self.shielded_S[slot] = True

    def note_use(self, slots_NK: np.ndarray) -> None:
        """N steps have used these slots, one after the other; a negative one is a slot that was given up since."""
        steps_N1 = self._step + 1 + np.arange(len(slots_NK))[:, None]
        here_NK = slots_NK >= 0
        self.last_use_S[slots_NK[here_NK]] = np.broadcast_to(steps_N1, slots_NK.shape)[here_NK]
        self._step += len(slots_NK)

    def unshield(self, slots: np.ndarray | list[int] | slice) -> None:
        """Allow eviction again."""
        self.shielded_S[slots] = False

    def victim(self, layer: int, value_S: np.ndarray) -> int | None:
        """The slot that a claim for an expert of ``layer`` would empty.

        None where a free slot exists or none may be emptied.

        Args:
            value_S: what keeping each slot's expert is worth; the lowest goes.
        """
        if self._free:
            return None
        evictable_S = self.ready_S > self.shielded_S
        if self.share:
            if self._held_L[layer] >= self.share:
                preferred_S = evictable_S & (self.layer_S == layer)
            else:
                preferred_S = evictable_S & (self._held_L > self.share)[self.layer_S]
            victim = lowest_value(value_S, preferred_S)
            if victim is not None:
                return victim
        return lowest_value(value_S, evictable_S)

    def own_slots(self, layer: int) -> np.ndarray | None:
        """The slots, in order, among which ``victim`` looks first for a layer that has its share; None for others."""
        if not self.share or self._held_L[layer] < self.share:
            return None
        slots = self._slots_of_layer[layer]
        if slots is None:
            slots = self._slots_of_layer[layer] = np.flatnonzero(self.layer_S == layer)
        return slots

    def victim_among(self, slots: np.ndarray, value_N: np.ndarray) -> int | None:
        """As ``victim``, among a few slots with these values."""
        place = lowest_value(value_N, self.ready_S[slots] > self.shielded_S[slots])
        return None if place is None else int(slots[place])

    def claim(self, expert: int, victim: int | None) -> tuple[int, int | None] | None:
        """Reserve a slot for ``expert``, which must not be in one yet. Mutates; the slot is then loading.

        Returns (slot, evicted expert or None), or None where every slot is shielded or loading.

        Args:
            victim: the slot to empty, as ``victim`` names it; None: a free one.
        """
        assert expert not in self.slot_of, "an expert has one slot at most"
        evicted = None
        if victim is not None:
            slot = victim
            evicted = self.expert_in[slot]
            assert evicted is not None
            self._forget(evicted)
        elif self._free:
            slot = self._free.pop()
        else:
            return None
        self.slot_of[expert] = slot
        self.expert_in[slot] = expert
        layer, number = layer_and_expert(expert)
        before = int(self.layer_S[slot])
        if before != layer:
            self._slots_of_layer[before] = self._slots_of_layer[layer] = None
        self.layer_S[slot], self.place_S[slot] = layer, layer * self.ready_slot_LE.shape[1] + number
        self.ready_slot_LE[layer, number] = UNDER_WAY
        self._held_L[layer] += 1
        self.ready_S[slot] = False
        self._step += 1
        self.last_use_S[slot] = self._step
        return slot, evicted

    def mark_ready(self, slot: int) -> None:
        """The load into ``slot`` is complete."""
        self.ready_S[slot] = True
        self.ready_slot_LE.reshape(-1)[self.place_S[slot]] = slot

    def abandon(self, slot: int) -> None:
        """The slot is free again: its load failed, or its expert leaves."""
        expert = self.expert_in[slot]
        if expert is not None:
            self._forget(expert)
        self.expert_in[slot] = None
        self.ready_S[slot] = False
        self._free.append(slot)

    def _forget(self, expert: int) -> None:
        slot = self.slot_of.pop(expert)
        self._held_L[self.layer_S[slot]] -= 1
        self.ready_slot_LE[layer_and_expert(expert)] = ABSENT
