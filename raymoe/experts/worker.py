"""The expert worker as a plain class: a shard in host memory, bounded slots, and the arithmetic.

The worker alone owns its residency. It computes one layer call at a time; prefetch orders and questions may
come from other threads.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from raymoe.checkpoint.checkpoint import MoeLayer
from raymoe.errors import CapacityError, ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall, expert_id, layer_and_expert
from raymoe.experts.compute import LayerCompute, WeightTable
from raymoe.experts.host_store import HostStore, ReadExpert
from raymoe.experts.link import Link, MemoryLink
from raymoe.experts.loader import CudaLoader, Loader, ThreadLoader
from raymoe.experts.shelf import Shelf, ShelfCounters
from raymoe.experts.slots import Residency, SlotPool
from raymoe.kernels.native import NativeKernels
from raymoe.types import ExpertKey

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself; sizes in bytes, ``resident`` as (layer, expert)."""

    name: str
    emulated_link: bool
    slot_budget_bytes: int | None
    peak_slot_bytes: int
    host_bytes: int
    owned: int
    resident: tuple[tuple[int, int], ...]
    calls: int
    hits: int
    misses: int
    loads: int
    bytes_loaded: int
    evictions: int
    prefetches: int
    prefetches_refused: int


class ExpertWorker:
    """Computes experts for one device.

    Args:
        layers: all MoE layers of the model.
        modules: the experts module of each layer (meta device will do).
        read_expert: reads one expert from the checkpoint.
        dtype: precision of weights and computation.
        device: where slots lie and experts are computed.
        slot_budget_bytes: strict limit for slots; None computes straight from host memory on a CPU without
            a link, and elsewhere gives every owned expert a slot.
        link: how experts reach the slots on a CPU; None is a plain copy.
        kernels: native kernels, or None to compute with torch.
    """

    def __init__(
        self,
        *,
        name: str,
        layers: tuple[MoeLayer, ...],
        modules: list[nn.Module],
        read_expert: ReadExpert,
        dtype: torch.dtype,
        device: torch.device,
        slot_budget_bytes: int | None = None,
        link: Link | None = None,
        kernels: NativeKernels | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.dtype = dtype
        self.layers = layers
        self.slot_budget_bytes = slot_budget_bytes
        self.store = HostStore(read_expert, pin=device.type == "cuda")
        self.has_slots = slot_budget_bytes is not None or link is not None or device.type == "cuda"
        self._link = link or MemoryLink()
        self._loader: Loader | None = None
        self._computes = [LayerCompute(module, dtype, device, kernels) for module in modules]
        self._tables = [WeightTable(layer.num_experts) for layer in layers]
        self._owned = [np.zeros(layer.num_experts, dtype=bool) for layer in layers]
        self._shelves: list[Shelf] = []
        self._shelf_of_layer: list[int] = []
        self._direct = ShelfCounters()
        self._calls = 0

    @property
    def num_layers(self) -> int:
        """MoE layers of the model."""
        return len(self.layers)

    # --- shard ------------------------------------------------------------------------------------------

    def own(self, keys: Iterable[ExpertKey], progress: Callable[[int], None] | None = None) -> None:
        """Take ownership of experts: read them into host memory; the first call also makes the slots.

        Raises CapacityError where the slot budget is less than one expert.
        """
        keys = list(keys)
        if self.has_slots and not self._shelves and keys:
            self._make_slots(keys)
        self.store.load(keys, progress)
        for key in keys:
            self._owned[key.layer][key.expert] = True
            if not self.has_slots:
                self._tables[key.layer].put(key.expert, self.store.experts[expert_id(key.layer, key.expert)])

    def load_all(self) -> None:
        """Bring every owned expert into a slot. Raises CapacityError where the budget is too small."""
        if not self.has_slots:
            return
        room = sum(shelf.pool.count for shelf in self._shelves)
        if room < len(self.store.experts):
            raise CapacityError(
                f'device "{self.name}": policy "all_resident" needs slots for {len(self.store.experts)} experts '
                f"({self.store.nbytes:,} bytes), but slot_memory of {self.slot_budget_bytes or 0:,} holds {room}; "
                'raise slot_memory, add devices, or use policy "on_demand"'
            )
        for identifier in sorted(self.store.experts):
            self._shelf(identifier).load(identifier)

    def _make_slots(self, keys: list[ExpertKey]) -> None:
        signatures: list[Shapes] = [tuple(sorted(layer.shapes.items())) for layer in self.layers]
        kinds = list(dict.fromkeys(signatures))
        self._shelf_of_layer = [kinds.index(signature) for signature in signatures]
        counts = [sum(self._shelf_of_layer[key.layer] == kind for key in keys) for kind in range(len(kinds))]
        sizes = [sum(torch.Size(shape).numel() for _, shape in kind) * self.dtype.itemsize for kind in kinds]
        on_cuda = self.device.type == "cuda"
        self._loader = CudaLoader(self.device) if on_cuda else ThreadLoader(self._link, self.name)
        experts = max(layer.num_experts for layer in self.layers)
        slots = share_slots(self.name, self.slot_budget_bytes, sizes, counts)
        for kind, count, size in zip(kinds, slots, sizes, strict=True):
            pool = SlotPool(dict(kind), count, self.dtype, self.device)
            residency = Residency(count, len(self.layers), experts)
            self._shelves.append(Shelf(pool, residency, self._loader, self.store, size))

    # --- computing --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def compute(self, call: ExpertCall) -> ExpertAnswer:
        """Compute every pair of ``call``, loading what is missing.

        Raises ExpertUnavailableError where an expert is not in this worker's shard.
        """
        owned = self._owned[call.layer]
        if call.experts_P.max() >= len(owned) or not owned[call.experts_P].all():
            raise ExpertUnavailableError(
                f'device "{self.name}" does not own all experts asked for in layer {call.layer}'
            )
        self._calls += 1
        if not self.has_slots:
            self._direct.hits += len(call.experts_P)
            output_PH = self._computes[call.layer](
                self._tables[call.layer], call.experts_P, call.hidden_RH, call.rows_P
            )
            return ExpertAnswer(output_PH=output_PH, hits=len(call.experts_P))
        return self._compute_in_slots(call)

    def _compute_in_slots(self, call: ExpertCall) -> ExpertAnswer:
        shelf = self._shelves[self._shelf_of_layer[call.layer]]
        compute = self._computes[call.layer]
        hidden_RH = call.hidden_RH.to(self.device)
        before = shelf.counters.loads
        slots_P, step = shelf.begin_step(call.layer, call.experts_P, call.scores_E)
        try:
            if step is None:
                output_PH = compute(shelf.pool.table, slots_P, hidden_RH, call.rows_P)
            else:
                output_PH = hidden_RH.new_empty((len(call.experts_P), hidden_RH.shape[1]))
                ready_P = np.flatnonzero(slots_P >= 0)
                if ready_P.size:
                    output_PH[torch.from_numpy(ready_P)] = compute(
                        shelf.pool.table, slots_P[ready_P], hidden_RH, call.rows_P[ready_P]
                    )
                    shelf.release(step, np.unique(slots_P[ready_P]).tolist())
                while (arrived := shelf.next_arrival(step)) is not None:
                    identifier, slot = arrived
                    mine_P = np.flatnonzero(call.experts_P == layer_and_expert(identifier)[1])
                    index_P = np.full(len(mine_P), slot, dtype=np.int32)
                    output_PH[torch.from_numpy(mine_P)] = compute(
                        shelf.pool.table, index_P, hidden_RH, call.rows_P[mine_P]
                    )
                    shelf.release(step, [slot])
        finally:
            loaded, evicted = shelf.end_step()
        hits = int(np.count_nonzero(slots_P >= 0))
        loads = shelf.counters.loads - before
        return ExpertAnswer(
            output_PH=output_PH,
            hits=hits,
            misses=len(slots_P) - hits,
            loads=loads,
            bytes_loaded=loads * shelf.expert_bytes,
            loaded=loaded,
            evicted=evicted,
        )

    def prefetch(self, layer: int, expert: int, score: float) -> bool:
        """Load an expert ahead of need, unless that would cost a shielded or better one.

        Returns whether it is resident or on its way.
        """
        if not 0 <= layer < len(self.layers) or not 0 <= expert < self.layers[layer].num_experts:
            return False
        if not self._owned[layer][expert]:
            return False
        identifier = expert_id(layer, expert)
        return not self.has_slots or self._shelf(identifier).prefetch(identifier, score)

    def _shelf(self, identifier: int) -> Shelf:
        return self._shelves[self._shelf_of_layer[layer_and_expert(identifier)[0]]]

    # --- looking ----------------------------------------------------------------------------------------

    def report(self) -> WorkerReport:
        """Memory, residency and totals. Slots are allocated once, so their size is also their peak."""
        identifiers = [i for shelf in self._shelves for i in shelf.resident()] if self.has_slots else self.store.experts
        parts = [asdict(shelf.counters) for shelf in self._shelves] or [asdict(self._direct)]
        return WorkerReport(
            name=self.name,
            emulated_link=self._link.emulated,
            slot_budget_bytes=self.slot_budget_bytes,
            peak_slot_bytes=sum(shelf.pool.nbytes for shelf in self._shelves),
            host_bytes=self.store.nbytes,
            owned=len(self.store.experts),
            resident=tuple(sorted(layer_and_expert(identifier) for identifier in identifiers)),
            calls=self._calls,
            **{name: sum(part[name] for part in parts) for name in parts[0]},
        )

    def close(self) -> None:
        """Stop the loader."""
        if self._loader is not None:
            self._loader.close()


def share_slots(name: str, budget_bytes: int | None, sizes: list[int], owned: list[int]) -> list[int]:
    """How many slots of each shape a budget gives: at least one per shape in use, never more than experts owned.

    Args:
        sizes: bytes of one expert of each shape.
        owned: experts of each shape in the shard.

    Raises CapacityError where the budget does not hold one expert of each.
    """
    if budget_bytes is None:
        return list(owned)
    least = sum(size for size, count in zip(sizes, owned, strict=True) if count)
    if budget_bytes < least:
        raise CapacityError(
            f'device "{name}": slot_memory of {budget_bytes:,} bytes is less than one expert ({least:,} bytes); '
            f"raise it to at least {least:,}"
        )
    total = sum(size * count for size, count in zip(sizes, owned, strict=True))
    counts = [max(1, count * min(budget_bytes, total) // total) if count else 0 for count in owned]
    while sum(size * count for size, count in zip(sizes, counts, strict=True)) > budget_bytes:
        largest = max(range(len(counts)), key=lambda i: (counts[i] > 1, sizes[i] * counts[i]))
        counts[largest] -= 1
    return counts
