"""Calls of one row for which a device computes straight from the slots: the host only sees to it that what is needed is
in a slot, or computes it itself.

Used by the engine's thread.

K experts per token, H hidden.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, layer_and_expert
from raymoe.experts.cuda_loader import CudaLoader
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import Loader
from raymoe.experts.packing import PackedExpert
from raymoe.experts.shelf import Shelf
from raymoe.experts.slots import SlotPool
from raymoe.experts.usage import Usage
from raymoe.types import DeviceName

# of the time of a load, that computing an expert on the host may take: more does not make up for deciding who does what
# (on an H100 it paid with half, 3.3 ms of 6.5, and cost with all, 0.17 ms of 0.17)
ASSIST_PAYS = 0.75

OnHost = Callable[[int, np.ndarray, torch.Tensor], torch.Tensor]
"""(layer, int32 experts [N], hidden [1, H]) -> unweighted outputs [N, H]."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Where one row's experts are.

    Attributes:
        slots_K: int32; -1 for those that the host has computed.
        sum_H: the weighted sum of these, float32; None where there are none.
    """

    slots_K: np.ndarray
    sum_H: np.ndarray | None = None


class Staging:
    """A worker's slots, step by step.

    Attributes:
        name: of the device.
        waited_s: seconds for which loads were waited for in the last step.

    Args:
        shelves: its slots; ``of_layer``: which of them serves each layer.
        owned: bool per expert of each layer, whether it is in the worker's shard.
        usage: counts who is asked for.
        on_host: computes experts from host memory; hidden_L: width of each layer's rows, dtype: their precision.
        shard: what the worker has in host memory; version: another number whenever that, or what it owns, has changed.
        hold: told that a step begins, and that it has ended: in between no expert may leave.
    """

    def __init__(
        self,
        name: DeviceName,
        shelves: list[Shelf],
        of_layer: list[int],
        loader: Loader,
        owned: list[np.ndarray],
        usage: Usage,
        on_host: OnHost,
        hidden_L: list[int],
        dtype: torch.dtype,
        shard: HostStore,
        version: Callable[[], int],
        hold: Callable[[bool], None],
    ) -> None:
        self.name = name
        self._shelves = shelves
        self._by_layer = [shelves[number] for number in of_layer]
        self._owned = owned
        self._usage = usage
        self._loader = loader if isinstance(loader, CudaLoader) else None
        self._before = (0, 0, 0)
        self._on_host = on_host
        self._hidden_L = hidden_L
        self._dtype = dtype
        self._shard = shard
        self._version = version
        self._hold = hold
        self._shelf_of_L = np.array(of_layer)
        self._source_LE = np.zeros((len(owned), self.most_experts), dtype=np.uint64)
        self._target_of = {
            id(shelf): np.array([slot.address for slot in shelf.pool.slots], dtype=np.uint64) for shelf in shelves
        }
        self._first_layers = [of_layer.index(number) for number in sorted(set(of_layer))]  # one per shelf
        self._addressed = -1
        self.waited_s = 0.0

    @property
    def may_assist(self) -> bool:
        """Whether the host computes experts too."""
        return any(shelf.host_cost is not None for shelf in self._shelves)

    def assists(self, layer: int) -> bool:
        """Whether the host is so much faster than the link that it pays to let it take experts of a row over."""
        shelf = self._by_layer[layer]
        host_s = shelf.host_cost.mean_s if shelf.host_cost is not None else None
        load_s = shelf.load_cost.mean_s
        return host_s is not None and (load_s is None or host_s <= ASSIST_PAYS * load_s)

    def hidden(self, layer: int) -> int:
        """Elements of a layer's rows."""
        return self._hidden_L[layer]

    @property
    def most_experts(self) -> int:
        """Of any layer."""
        return max(len(owned) for owned in self._owned)

    @property
    def device(self) -> torch.device:
        """Where the slots lie."""
        return self._shelves[0].pool.block.device

    def experts(self, layer: int) -> int:
        """Of a layer."""
        return len(self._owned[layer])

    def pool(self, layer: int) -> SlotPool:
        """The slots that a layer's experts pass through."""
        return self._by_layer[layer].pool

    def slots_by_expert(self, layer: int) -> np.ndarray:
        """int32 per expert of the layer: its slot, -1 for those that are in none."""
        slots_E: np.ndarray = self._by_layer[layer].residency.ready_slot_LE[layer][: self.experts(layer)].copy()
        return slots_E

    def begin(self) -> None:
        """A step begins: the host has seen the end of all computing in slots that loads may take."""
        self._hold(True)
        self._before = self._pairs()
        self.waited_s = 0.0
        if self._addressed != self._version():
            self._address_sources()
        if self._loader is not None:
            self._loader.follow_host(True)

    def take(self, layer: int, experts_K: np.ndarray) -> np.ndarray:
        """The slots of one row's experts, int32, negative for those that are not there.

        They are shielded until the next call. ``stage`` or ``note_rows`` must follow.
        """
        return self._by_layer[layer].take(layer, experts_K)

    def start(self, layer: int, experts: list[int], row_K: np.ndarray) -> bool:
        """Begin loads at once of experts of a row; see ``Shelf.start``.

        Raises ExpertUnavailableError where an expert is not in the worker's shard.
        """
        self._check_owned(layer, experts)
        return self._by_layer[layer].start(layer, experts, row_K)

    def arrive(self, layer: int, experts_K: np.ndarray, meanwhile: Callable[[], None]) -> np.ndarray:
        """The slots of a row whose loads have all begun, when all is there; see ``Shelf.arrive``."""
        start = time.perf_counter()
        slots_K = self._by_layer[layer].arrive(layer, experts_K, meanwhile)
        self.waited_s += time.perf_counter() - start
        return slots_K

    def _check_owned(self, layer: int, experts: Any) -> None:
        if not self._owned[layer][experts].all():
            raise ExpertUnavailableError(f'device "{self.name}" does not own all experts asked for in layer {layer}')

    def note_rows(
        self, layers_N: np.ndarray, experts_NK: np.ndarray, misses_N: np.ndarray, scores_NE: np.ndarray | None
    ) -> None:
        """Rows of several layers that were taken, and computed from slots alone."""
        self._usage.note_rows(layers_N, experts_NK)
        shelf_N = self._shelf_of_L[layers_N]
        for number in np.unique(shelf_N).tolist() if len(self._shelves) > 1 else [0]:
            mine_N = shelf_N == number
            scores = None if scores_NE is None else scores_NE[mine_N]
            self._shelves[number].note_rows(layers_N[mine_N], experts_NK[mine_N], misses_N[mine_N].tolist(), scores)

    # --- for whoever takes rows and begins loads himself (kernels/turns.cpp) -------------------------------

    def memory(self, layer: int) -> dict[str, int]:
        """Where the layer's slots are kept book of, as ``kernels.turns.TurnMemory`` names it."""
        shelf = self._by_layer[layer]
        residency = shelf.residency
        return {
            "slot_of": residency.ready_slot_LE[layer].ctypes.data,
            "ready": residency.ready_S.ctypes.data,
            "shielded": residency.shielded_S.ctypes.data,
            "slots": len(residency.ready_S),
            "layer_of": residency.layer_S.ctypes.data,
            "layer": layer,
            "source": self._source_LE[layer].ctypes.data,
            "target": self._target_of[id(shelf)].ctypes.data,
            "bytes": shelf.expert_bytes,
            "ranked": shelf.ranked_LR[layer].ctypes.data,
            "experts": self.experts(layer),
        }

    def eager(self) -> tuple[int, tuple[int, int] | None]:
        """How many loads of a row may be begun outside of it now, and by what: see ``CopyStream.native``."""
        native = self._loader.native if self._loader is not None else None
        assists = self.may_assist and any(self.assists(layer) for layer in self._first_layers)
        return (1 if assists else self.most_experts), native

    @contextmanager
    def begun_elsewhere(self) -> Iterator[None]:
        """While entered, nobody else loads into slots."""
        if len(self._shelves) == 1:
            with self._shelves[0].begun_elsewhere():
                yield
            return
        with ExitStack() as stack:
            for shelf in self._shelves:
                stack.enter_context(shelf.begun_elsewhere())
            yield

    def adopt(self, layer: int, begun: list[tuple[int, int]]) -> None:
        """See ``Shelf.adopt``."""
        self._by_layer[layer].adopt(layer, begun)

    def _address_sources(self) -> None:
        """Where the shard lies in host memory, as far as a device reads it there by itself."""
        self._addressed = self._version()
        self._source_LE[:] = 0
        for identifier, expert in list(self._shard.experts.items()):  # others may add to it
            layer, number = layer_and_expert(identifier)
            if self._owned[layer][number] and isinstance(expert, PackedExpert) and self._is_read_by_device(expert):
                self._source_LE[layer, number] = expert.address

    def _is_read_by_device(self, expert: PackedExpert) -> bool:
        return self.device.type != "cuda" or expert.is_pinned

    # --- one row ------------------------------------------------------------------------------------------

    def prepare(self, layer: int) -> None:
        """The device will come to a layer; what can be found out beforehand is."""
        self._by_layer[layer].prepare(layer)

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer, whether it is in a slot."""
        ready_E: np.ndarray = self._by_layer[layer].residency.ready_slot_LE[layer][: self.experts(layer)] >= 0
        return ready_E

    def stage(
        self,
        layer: int,
        experts_K: np.ndarray,
        scores_E: np.ndarray | None,
        weights_K: np.ndarray,
        state_H: np.ndarray | None = None,
    ) -> Staged:
        """Have every expert of one row in a slot, or computed by the host; see ``Shelf.begin_row``.

        Raises ExpertUnavailableError where an expert is not in the worker's shard.

        Args:
            weights_K: of the experts, float32.
            state_H: the row, float32; None: the host computes nothing.
        """
        self._check_owned(layer, experts_K)
        self._usage.note(layer, experts_K)
        shelf = self._by_layer[layer]
        step = shelf.begin_row(layer, experts_K, scores_E, host_may=state_H is not None)
        if step.is_ready:
            return Staged(step.slots_P)
        sum_H = None
        if step.hosted:
            assert state_H is not None
            experts = np.array([layer_and_expert(identifier)[1] for identifier in step.hosted], dtype=np.int32)
            hidden_1H = torch.from_numpy(state_H).to(self._dtype).view(1, -1)
            output_NH = self._on_host(layer, experts, hidden_1H).float().numpy()
            weights_N = np.array([weights_K[(experts_K == expert).argmax()] for expert in experts], dtype=np.float32)
            sum_H = weights_N @ output_NH
        start = time.perf_counter()
        slots_K = shelf.land(step, experts_K)
        self.waited_s += time.perf_counter() - start
        return Staged(slots_K, sum_H)

    def order_hosted(self, layer: int) -> None:
        """The layer's row is computed: what the host did of it is loaded later, when the link is free."""
        self._by_layer[layer].order_hosted()

    @property
    def is_prefetching(self) -> bool:
        """Whether ``pump`` has much to do."""
        return any(shelf.is_prefetching for shelf in self._shelves)

    def pump(self) -> None:
        """Let prefetches go on; for whoever waits for the device."""
        if self._loader is not None:
            self._loader.pump()
            for shelf in self._shelves:
                shelf.top_up()

    def end(self) -> ExpertAnswer:
        """The step has ended. What it cost, without any output."""
        self._hold(False)
        if self._loader is not None:
            self._loader.follow_host(False)
        hits, misses, hosted = (after - before for after, before in zip(self._pairs(), self._before, strict=True))
        changes = [shelf.take_changes() for shelf in self._shelves]
        loads = [loads for _, _, loads in changes]
        return ExpertAnswer(
            output_PH=torch.empty((0, 0)),
            hits=hits,
            misses=misses,
            hosted=hosted,
            loads=sum(loads),
            bytes_loaded=sum(count * shelf.expert_bytes for count, shelf in zip(loads, self._shelves, strict=True)),
            loaded=tuple(i for loaded, _, _ in changes for i in loaded),
            evicted=tuple(i for _, evicted, _ in changes for i in evicted),
            load_s=max((s for shelf in self._shelves if (s := shelf.load_cost.mean_s) is not None), default=None),
        )

    def _pairs(self) -> tuple[int, int, int]:
        """Hits, misses, and misses that the host computed, so far."""
        counters = [shelf.counters for shelf in self._shelves]
        return sum(c.hits for c in counters), sum(c.misses for c in counters), sum(c.hosted for c in counters)
