"""Device slots: a fixed allocation that experts pass through, and who sits where.

``SlotPool`` is the memory: one allocation per parameter, sliced into slots, never grown. ``Residency`` is the
bookkeeping: it alone knows which expert is in which slot. It holds no tensors and no locks; its owner, the
worker, serialises access.

S slots.
"""

import numpy as np
import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.call import layer_and_expert
from raymoe.experts.compute import WeightTable
from raymoe.placement.eviction import least_recently_used


class SlotPool:
    """Memory for ``count`` experts of one shape.

    Args:
        shapes: shape of each parameter of one expert.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.count = count
        self.storage = {
            name: torch.empty((count, *shape), dtype=dtype, device=device) for name, shape in shapes.items()
        }
        self.slots: list[ExpertTensors] = [
            {name: tensor[index] for name, tensor in self.storage.items()} for index in range(count)
        ]
        self.table = WeightTable(count)
        for index, slot in enumerate(self.slots):
            self.table.put(index, slot)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the whole of it at once."""
        return sum(tensor.nbytes for tensor in self.storage.values())


class Residency:
    """Which expert is in which slot, in what state.

    A slot is free, loading, or ready. A shielded slot is never a victim: the experts of the layer step in hand
    are shielded as a whole, for evicting one that another token of the same step still needs would silently
    give wrong output. Expert ids are those of ``expert_id``.

    ``ready_slot_LE`` answers for a whole layer call at once: the slot of each expert that can be computed now,
    -1 for the others.
    """

    def __init__(self, count: int, layers: int, experts: int) -> None:
        self.slot_of: dict[int, int] = {}
        self.ready_slot_LE = np.full((layers, experts), -1, dtype=np.int32)
        self.expert_in: list[int | None] = [None] * count
        self.ready_S = np.zeros(count, dtype=bool)
        self.shielded_S = np.zeros(count, dtype=bool)
        self.last_use_S = np.zeros(count, dtype=np.int64)
        self._step = 0
        self._free = list(range(count - 1, -1, -1))

    def find(self, expert: int) -> int | None:
        """The slot that holds ``expert`` or is loading it."""
        return self.slot_of.get(expert)

    def use(self, slots: np.ndarray | list[int]) -> None:
        """The experts in ``slots`` are used now: note the time, and shield them until ``unshield``."""
        self._step += 1
        self.last_use_S[slots] = self._step
        self.shielded_S[slots] = True

    def unshield(self, slots: np.ndarray | list[int] | slice) -> None:
        """Allow eviction again."""
        self.shielded_S[slots] = False

    def victim(self) -> int | None:
        """The slot that the next ``claim`` would empty; None where a free slot exists or none may be emptied."""
        if self._free:
            return None
        return least_recently_used(self.last_use_S, self.ready_S & ~self.shielded_S)

    def claim(self, expert: int) -> tuple[int, int | None] | None:
        """Reserve a slot for ``expert``, which must not be in one yet. Mutates; the slot is then loading.

        Returns (slot, evicted expert or None), or None where every slot is shielded or loading.
        """
        assert expert not in self.slot_of, "an expert has one slot at most"
        evicted = None
        if self._free:
            slot = self._free.pop()
        else:
            victim = self.victim()
            if victim is None:
                return None
            slot = victim
            evicted = self.expert_in[slot]
            assert evicted is not None
            del self.slot_of[evicted]
            self.ready_slot_LE[layer_and_expert(evicted)] = -1
        self.slot_of[expert] = slot
        self.expert_in[slot] = expert
        self.ready_S[slot] = False
        self._step += 1
        self.last_use_S[slot] = self._step
        return slot, evicted

    def mark_ready(self, slot: int) -> None:
        """The load into ``slot`` is complete."""
        self.ready_S[slot] = True
        expert = self.expert_in[slot]
        assert expert is not None
        self.ready_slot_LE[layer_and_expert(expert)] = slot

    def abandon(self, slot: int) -> None:
        """The load into ``slot`` failed: it is free again."""
        expert = self.expert_in[slot]
        if expert is not None:
            del self.slot_of[expert]
            self.ready_slot_LE[layer_and_expert(expert)] = -1
        self.expert_in[slot] = None
        self.ready_S[slot] = False
        self._free.append(slot)
