"""The expert worker as a plain class: a shard in host memory, bounded slots, and the arithmetic.

The worker alone owns its residency. It computes one layer call at a time; prefetch orders and questions may
come from other threads.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn

from raymoe.checkpoint.checkpoint import MoeLayer
from raymoe.config import SchedulingConfig
from raymoe.errors import CapacityError, ExpertUnavailableError
from raymoe.experts.arena import CudaPinning, HostArena
from raymoe.experts.bay import Bay, Counters, Step
from raymoe.experts.bays import make_bays
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, expert_id, layer_and_expert
from raymoe.experts.compute import LayerCompute, WeightTable
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.costs import Cost
from raymoe.experts.cuda_loader import CudaLoader
from raymoe.experts.cuda_stream import CudaCopyStream
from raymoe.experts.host_memory import MemoryGuard
from raymoe.experts.host_store import HostStore, ReadExpert
from raymoe.experts.link import EmulatedLink, Link, MemoryLink
from raymoe.experts.loader import Loader, ThreadLoader
from raymoe.experts.report import ResidencyMap, WorkerReport
from raymoe.experts.shelf import Shelf
from raymoe.experts.staging import Staging
from raymoe.experts.usage import Usage, residency_map
from raymoe.experts.watch import CallWatch
from raymoe.kernels.native import NativeKernels
from raymoe.observe.trace import Recording, Tracer
from raymoe.placement.keeping import Keeper
from raymoe.types import DeviceName, ExpertKey


@dataclass(slots=True, kw_only=True)
class Begun:
    """A call whose loads are under way.

    Attributes:
        step: None where experts need no slots.
        early_PH: outputs of the pairs that needed no load, once somebody has asked for them.
        compute_s: seconds of computing so far.
    """

    call: ExpertCall
    start_s: float
    step: Step | None
    early_PH: torch.Tensor | None = None
    compute_s: float = 0.0

    @property
    def ready_P(self) -> np.ndarray:
        """Bool per pair: whether its expert needed no load."""
        return np.ones(len(self.call.experts_P), dtype=bool) if self.step is None else self.step.slots_P >= 0


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
        new_loader: makes what moves them instead, on any device.
        kernels: native kernels, or None to compute with torch.
        scheduling: whether slots cache, how they evict, and whether to prefetch and to compute on the host.
        store: host memory that holds the shard already, or is shared; None: one of its own.
        guard: looks after the node's memory while experts are read into a store of its own.
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
        new_loader: Callable[[], Loader] | None = None,
        kernels: NativeKernels | None = None,
        scheduling: SchedulingConfig | None = None,
        store: HostStore | None = None,
        guard: MemoryGuard | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.dtype = dtype
        self.layers = layers
        self.slot_budget_bytes = slot_budget_bytes
        self._arena = HostArena(CudaPinning()) if store is None and device.type == "cuda" else None
        self.store = store or HostStore(read_expert, self._arena, guard)
        self.has_slots = slot_budget_bytes is not None or link is not None or device.type == "cuda"
        self._link = link or MemoryLink()
        self._new_loader = new_loader
        self._loader: Loader | None = None
        self._computes = [LayerCompute(module, dtype, device, kernels) for module in modules]
        self._tables = [WeightTable(layer.num_experts) for layer in layers]
        self._owns_all = False
        self._version = 0  # of the shard
        self._owned = [np.zeros(layer.num_experts, dtype=bool) for layer in layers]
        self._shard_lock = threading.Lock()  # so that no expert leaves while a call that needs it begins
        self._in_hand = False  # whether a call has begun and not ended
        self._leaving: set[ExpertKey] = set()  # given up, but still in memory
        self._bays: list[Bay] = []
        self._bay_of_layer: list[int] = []
        self._direct = Counters()
        self._calls = 0
        self._usage = Usage(len(layers), max((layer.num_experts for layer in layers), default=0))
        self._watch: CallWatch | None = None
        self._scheduling = scheduling or SchedulingConfig()
        self._host_computes = self._computes
        if device.type == "cuda":
            self._host_computes = [LayerCompute(module, dtype, torch.device("cpu"), kernels) for module in modules]

    @property
    def num_layers(self) -> int:
        """MoE layers of the model."""
        return len(self.layers)

    # --- shard ------------------------------------------------------------------------------------------

    def own(self, keys: Iterable[ExpertKey], progress: Callable[[int], None] | None = None) -> None:
        """Take ownership of experts: read them into host memory; the first call also makes the slots.

        Raises CapacityError where the slot budget is less than one expert or memory is short, and CheckpointError where
        one can't be read; what was read before is owned.
        """
        keys = list(keys)
        if self.has_slots and not self._bays and keys:
            self._make_slots(keys)
        self._check_slots(keys)
        with self._shard_lock:
            self._leaving.difference_update(keys)
        try:
            self.store.load(keys, progress)
        finally:
            self._take_on(keys)
        self._assist()

    def _take_on(self, keys: list[ExpertKey]) -> None:
        """Own those of these experts that are in host memory."""
        for key in keys:
            tensors = self.store.experts.get(expert_id(key.layer, key.expert))
            if tensors is not None:
                self._owned[key.layer][key.expert] = True
                self._tables[key.layer].put(key.expert, tensors)
        self._owns_all = all(owned.all() for owned in self._owned)
        self._version += 1

    @property
    def owned(self) -> tuple[ExpertKey, ...]:
        """The shard, in order."""
        return tuple(
            ExpertKey(layer=layer, expert=expert)
            for layer, owned_E in enumerate(self._owned)
            for expert in np.flatnonzero(owned_E).tolist()
        )

    def disown(self, keys: Iterable[ExpertKey]) -> None:
        """Give experts up. Calls for them fail from now on; their memory is free when no call is in hand.

        From any thread. An expert on its way into a slot is let go with the next call, or the next of these.
        """
        with self._shard_lock:
            for key in keys:
                if self._owned[key.layer][key.expert]:
                    self._owned[key.layer][key.expert] = False
                    self._leaving.add(key)
                    self._owns_all = False
            self._let_go()

    def _let_go(self) -> None:
        """Free what was given up, as far as nobody uses it. The caller holds the lock."""
        self._version += 1
        if self._in_hand:
            return
        for key in list(self._leaving):
            if self._bays and not self._bay(key.layer).drop(expert_id(key.layer, key.expert)):
                continue
            self.store.drop([key])
            self._tables[key.layer].put(key.expert, None)
            self._leaving.discard(key)

    def _check_slots(self, keys: list[ExpertKey]) -> None:
        """Slots are cut for the shapes of the first shard: an expert of another has none."""
        for key in keys:
            if self._bays and not self._bay(key.layer).pool.count:
                raise CapacityError(
                    f'device "{self.name}" has no slots for experts of the shape that layer {key.layer} has: its first '
                    "shard had none; start it again to cut its slots anew"
                )

    def load_all(self) -> None:
        """Bring every owned expert into a slot. Raises CapacityError where the budget is too small."""
        if not self.has_slots:
            return
        room = sum(bay.pool.count for bay in self._bays)
        if room < len(self.store.experts):
            raise CapacityError(
                f'device "{self.name}": policy "all_resident" needs slots for {len(self.store.experts)} experts '
                f"({self.store.nbytes:,} bytes), but slot_memory of {self.slot_budget_bytes or 0:,} holds {room}; "
                'raise slot_memory, add devices, or use policy "on_demand"'
            )
        for identifier in sorted(self.store.experts):
            self._bay(layer_and_expert(identifier)[0]).load(identifier)

    def _make_slots(self, keys: list[ExpertKey]) -> None:
        loader: Loader
        if self._new_loader is not None:
            loader = self._new_loader()
        elif self.device.type == "cuda" and not self._link.emulated:
            loader = CudaLoader(CudaCopyStream(self.device))
        else:
            loader = ThreadLoader(self._link, self.name)
        self._loader = loader
        self._bays, self._bay_of_layer = make_bays(
            name=self.name,
            layers=self.layers,
            keys=keys,
            budget_bytes=self.slot_budget_bytes,
            dtype=self.dtype,
            device=self.device,
            loader=loader,
            store=self.store,
            new_keeper=None if self._scheduling.policy == "on_demand_shadow" else self._new_keeper,
            on_orders=self._scheduling.follows_orders,
        )
        loader.on_idle = self._on_idle

    def _new_keeper(self) -> Keeper:
        eviction = self._scheduling.eviction if self._scheduling.substitutes else "lru"
        experts = max(layer.num_experts for layer in self.layers)
        return Keeper(eviction, len(self.layers), experts, self._scheduling.score_window)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Evict, prefetch and assist by other settings from the next call on. Policy and timeouts stay."""
        before, self._scheduling = self._scheduling, scheduling
        if (before.eviction, before.score_window) != (scheduling.eviction, scheduling.score_window):
            for bay in self._bays:
                bay.replace_keeper(self._new_keeper())
        if before.host_assist != scheduling.host_assist:
            self._assist()

    def _assist(self) -> None:
        """Let the host compute experts where that is asked for and can pay: it needs a core of its own.

        On a CPU device the host is the device, so only an emulated link has a host beside it, with a time of its own.
        """
        wanted = self._scheduling.policy == "importance" and self._scheduling.host_assist
        link = self._link
        if isinstance(link, EmulatedLink):
            host_s = link.host_s
        else:
            spare = self.device.type == "cuda" and len(os.sched_getaffinity(0)) > 1
            host_s = self._time_on_host() if wanted and spare else None
        for shelf in self._shelves:
            shelf.host_cost = Cost(host_s) if wanted and host_s is not None else None

    @torch.inference_mode()
    def _time_on_host(self) -> float:
        """Seconds of computing one expert for one row on the host, the quicker of two runs."""
        identifier = next(iter(self.store.experts), None)
        if identifier is None:
            return 0.0
        layer, expert = layer_and_expert(identifier)
        rows = torch.zeros((1, self._hidden(layer)), dtype=self.dtype)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            one, first = np.array([expert], dtype=np.int32), np.zeros(1, dtype=np.int32)
            self._host_computes[layer](self._tables[layer], one, rows, first)
            times.append(time.perf_counter() - start)
        return min(times)

    def _hidden(self, layer: int) -> int:
        return self.layers[layer].shapes["down_proj"][-1 if self._host_computes[layer].math.is_transposed else 0]

    # --- computing --------------------------------------------------------------------------------------

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        """Compute every pair of ``call``, loading what is missing.

        Raises ExpertUnavailableError where an expert is not in this worker's shard.
        """
        return self.finish(self.begin(call))

    def begin(self, call: ExpertCall) -> Begun:
        """Start the loads of a call, so that its caller can do something else meanwhile. Must be finished.

        Raises ExpertUnavailableError where an expert is not in this worker's shard.
        """
        owned = self._owned[call.layer]
        with self._shard_lock:
            if call.experts_P.max() >= len(owned) or not owned[call.experts_P].all():
                raise ExpertUnavailableError(
                    f'device "{self.name}" does not own all experts asked for in layer {call.layer}'
                )
            self._in_hand = True
        self._calls += 1
        self._usage.note(call.layer, call.experts_P)
        start_s = time.perf_counter()
        if not self.has_slots:
            return Begun(call=call, start_s=start_s, step=None)
        bay = self._bay(call.layer)
        step = bay.begin_step(call.layer, call.experts_P, call.hidden_RH.shape[0], call.scores_E, call.step)
        if call.step is not None:
            for other in self._conveyors:
                if other is not bay:
                    other.pass_by(call.step, call.layer)
        return Begun(call=call, start_s=start_s, step=step)

    @torch.inference_mode()
    def finish(self, begun: Begun) -> ExpertAnswer:
        """The answer to a call that has begun."""
        call = begun.call
        try:
            if begun.step is None:
                self._direct.hits += len(call.experts_P)
                output_PH = self._ready_output(begun)
                return ExpertAnswer(output_PH=output_PH, hits=len(call.experts_P), compute_s=begun.compute_s)
            return self._finish_in_slots(begun, begun.step)
        finally:
            self._in_hand = False
            if self._leaving:
                with self._shard_lock:
                    self._let_go()

    @torch.inference_mode()
    def preview(self, begun: Begun) -> tuple[np.ndarray, torch.Tensor]:
        """What is known of the answer to a call that has begun: which pairs needed no load, and their outputs.

        Waits for nothing, and changes neither residency nor totals: what was ready is shielded until the call is
        finished. ``finish`` takes these outputs instead of computing them again.
        """
        ready_P = begun.ready_P
        if not ready_P.any():
            return ready_P, begun.call.hidden_RH.new_empty((0, begun.call.hidden_RH.shape[1]))
        return ready_P, self._ready_output(begun)

    def _ready_output(self, begun: Begun) -> torch.Tensor:
        """Outputs of the pairs that needed no load; there is at least one."""
        if begun.early_PH is None:
            call, step = begun.call, begun.step
            hidden_RH = call.hidden_RH.to(self.device)
            table, index_P, rows_P = self._tables[call.layer], call.experts_P, call.rows_P
            if step is not None:
                table, index_P = self._bay(call.layer).pool.table, step.slots_P
                if not step.is_ready:
                    index_P, rows_P = index_P[begun.ready_P], rows_P[begun.ready_P]
            computing_s = time.perf_counter()
            begun.early_PH = self._computes[call.layer](table, index_P, hidden_RH, rows_P)
            begun.compute_s += time.perf_counter() - computing_s
            watch = self._watch  # once: another thread may end the watching meanwhile
            if watch is not None:
                watch.computed(call, call.experts_P[begun.ready_P], computing_s, "hit")
        return begun.early_PH

    def _finish_in_slots(self, begun: Begun, step: Step) -> ExpertAnswer:
        call = begun.call
        bay = self._bay(call.layer)
        hidden_RH = call.hidden_RH.to(self.device)
        hosted = 0
        try:
            if step.is_ready:
                output_PH = self._ready_output(begun)
            else:
                output_PH = hidden_RH.new_empty((len(call.experts_P), hidden_RH.shape[1]))
                self._take_ready(bay, begun, step, output_PH)
                hosted = self._compute_on_host(call, step, output_PH)
                self._compute_arrivals(bay, begun, step, hidden_RH, output_PH)
                if step.hosted and isinstance(self._link, EmulatedLink):
                    self._link.until(begun.start_s + len(step.hosted) * (self._link.host_s or 0.0))
        finally:
            bay.end_step()
        loaded, evicted, loads = bay.take_changes()
        bay.counters.hosted += hosted
        hits = int(np.count_nonzero(step.slots_P >= 0))
        return ExpertAnswer(
            output_PH=output_PH,
            hits=hits,
            misses=len(step.slots_P) - hits,
            hosted=hosted,
            loads=loads,
            bytes_loaded=loads * bay.expert_bytes,
            loaded=loaded,
            evicted=evicted,
            load_s=bay.load_cost.mean_s,
            compute_s=begun.compute_s,
        )

    def _take_ready(self, bay: Bay, begun: Begun, step: Step, output_PH: torch.Tensor) -> None:
        ready_P = np.flatnonzero(begun.ready_P)
        if ready_P.size:
            output_PH[torch.from_numpy(ready_P)] = self._ready_output(begun)
            bay.release(step, np.unique(step.slots_P[ready_P]).tolist())

    def _compute_on_host(self, call: ExpertCall, step: Step, output_PH: torch.Tensor) -> int:
        """Compute the step's hosted experts from host memory; returns how many pairs that were."""
        if not step.hosted:
            return 0
        experts = np.array([layer_and_expert(identifier)[1] for identifier in step.hosted])
        mine_P = np.flatnonzero(np.isin(call.experts_P, experts))
        mine_P = mine_P[np.argsort(call.experts_P[mine_P], kind="stable")]
        start = time.perf_counter()
        output = self._host_computes[call.layer](
            self._tables[call.layer], call.experts_P[mine_P], call.hidden_RH.cpu(), call.rows_P[mine_P]
        )
        watch = self._watch
        if watch is not None:
            watch.computed(call, call.experts_P[mine_P], start, "hosted")
        if len(mine_P) == len(step.hosted):
            self._note_host_cost(call.layer, time.perf_counter() - start, len(mine_P))
        output_PH[torch.from_numpy(mine_P).to(output_PH.device)] = output.to(output_PH.device)
        return len(mine_P)

    def _compute_arrivals(
        self, bay: Bay, begun: Begun, step: Step, hidden_RH: torch.Tensor, output_PH: torch.Tensor
    ) -> None:
        call = begun.call
        waiting_s = time.perf_counter()
        while (arrived := bay.next_arrival(step)) is not None:
            identifier, slot = arrived
            watch = self._watch
            if watch is not None:
                watch.waited(call, layer_and_expert(identifier)[1], waiting_s)
            mine_P = np.flatnonzero(call.experts_P == layer_and_expert(identifier)[1])
            index_P = np.full(len(mine_P), slot, dtype=np.int32)
            computing_s = time.perf_counter()
            output_PH[torch.from_numpy(mine_P)] = self._computes[call.layer](
                bay.pool.table, index_P, hidden_RH, call.rows_P[mine_P]
            )
            waiting_s = time.perf_counter()
            begun.compute_s += waiting_s - computing_s
            if watch is not None:
                watch.computed(call, call.experts_P[mine_P], computing_s, "miss")
            bay.release(step, [slot])

    def staging(self) -> Staging | None:
        """For calls of one row that are computed elsewhere, from this worker's slots; None where it keeps nothing."""
        shelves = [bay for bay in self._bays if isinstance(bay, Shelf)]
        if self._loader is None or len(shelves) < len(self._bays):
            return None
        return Staging(
            DeviceName(self.name),
            shelves,
            self._bay_of_layer,
            self._loader,
            self._owned,
            self._usage,
            self._on_host,
            [self._hidden(layer) for layer in range(len(self.layers))],
            self.dtype,
            self.store,
            lambda: self._version,
            self._hold,
        )

    def _hold(self, held: bool) -> None:
        """While held, no expert leaves."""
        with self._shard_lock:
            self._in_hand = held
            if self._leaving:
                self._let_go()

    def _on_host(self, layer: int, experts_N: np.ndarray, hidden_1H: torch.Tensor) -> torch.Tensor:
        """Unweighted outputs [N, H] of one layer's experts for one row, from host memory."""
        start = time.perf_counter()
        rows_N = np.zeros(len(experts_N), dtype=np.int32)
        output_NH = self._host_computes[layer](self._tables[layer], experts_N, hidden_1H, rows_N)
        self._note_host_cost(layer, time.perf_counter() - start, len(experts_N))
        return output_NH

    def _note_host_cost(self, layer: int, took_s: float, experts: int) -> None:
        """So many experts took the host so long together; an imitated host has a time of its own."""
        bay = self._bay(layer)
        cost = bay.host_cost if isinstance(bay, Shelf) else None
        if cost is not None and not self._link.emulated:
            cost.add(took_s / experts)

    # --- outside of calls -------------------------------------------------------------------------------

    def expect(self, layer: int, experts: np.ndarray, worth: np.ndarray) -> None:
        """A forecast for a layer to come: keep these experts, or load them when the link is free.

        Experts that are not in this worker's shard are ignored.
        """
        bay = self._bay(layer) if self._bays and 0 <= layer < len(self.layers) else None
        if not isinstance(bay, Shelf):
            return
        if self._owns_all and experts.min(initial=0) >= 0 and experts.max(initial=0) < self.layers[layer].num_experts:
            bay.expect(layer, experts, worth)
            return
        mine = (experts >= 0) & (experts < self.layers[layer].num_experts)
        mine[mine] &= self._owned[layer][experts[mine]]
        bay.expect(layer, experts[mine], worth[mine])

    def order(self, order: LoadOrder) -> None:
        """Load experts for a call to come, where slots are given to orders (``on_demand_shadow``, ``joint``).

        Experts that are not in this worker's shard are ignored.
        """
        if not 0 <= order.layer < len(self.layers):
            return
        known = (order.experts >= 0) & (order.experts < self.layers[order.layer].num_experts)
        for conveyor in self._conveyors:  # all of them must know of a new epoch
            mine = known if conveyor is self._bay(order.layer) else np.zeros_like(known)
            conveyor.order(replace(order, experts=order.experts[mine]))

    def forget(self, sequence: int) -> None:
        """A sequence has ended: what was ordered for it is void."""
        for conveyor in self._conveyors:
            conveyor.forget(sequence)

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert of the layer: whether it could be computed now without a load."""
        if not self.has_slots:
            return self._owned[layer]
        if not self._bays:
            return np.zeros(self.layers[layer].num_experts, dtype=bool)
        return self._bay(layer).ready(layer)[: self.layers[layer].num_experts]

    @property
    def host_s(self) -> float | None:
        """Seconds for which the host computes one expert for one row; None where it computes none."""
        costs = [shelf.host_cost.mean_s for shelf in self._shelves if shelf.host_cost is not None]
        return max((cost for cost in costs if cost is not None), default=None)

    @property
    def load_s(self) -> float | None:
        """Seconds for which one expert lately kept the link busy; None where nothing was loaded yet."""
        return max((s for bay in self._bays if (s := bay.load_cost.mean_s) is not None), default=None)

    def _on_idle(self) -> None:
        for bay in self._bays:
            bay.on_idle()

    def _bay(self, layer: int) -> Bay:
        return self._bays[self._bay_of_layer[layer]]

    @property
    def _shelves(self) -> list[Shelf]:
        return [bay for bay in self._bays if isinstance(bay, Shelf)]

    @property
    def _conveyors(self) -> list[Conveyor]:
        return [bay for bay in self._bays if isinstance(bay, Conveyor)]

    # --- looking ----------------------------------------------------------------------------------------

    def trace(self, on: bool) -> Recording | None:
        """Begin to record loads, computing and waits; or end it, which returns what was recorded."""
        before = self._watch
        tracer = Tracer(f"worker {self.name}", emulated_link=self._link.emulated) if on else None
        if self._loader is not None and on:
            self._loader.watch(True)
        for bay in self._bays:
            bay.trace(tracer)
        if self._loader is not None and not on:
            self._loader.watch(False)
        self._watch = None if tracer is None else CallWatch(tracer, self.device)
        return None if before is None else before.tracer.recording()

    def residency(self) -> ResidencyMap:
        """Where every expert is, how much it was used lately, and how high it scores."""
        return residency_map(self._owned, self._bays, self._usage.recent(time.monotonic()), has_slots=self.has_slots)

    def report(self, *, names: bool = True) -> WorkerReport:
        """Memory, residency and totals. Slots are allocated once, so their size is also their peak.

        Args:
            names: also of the resident experts, of which there may be ten thousands.
        """
        identifiers: Iterable[int] = ()
        if names:
            identifiers = (
                [i for bay in self._bays for i in bay.resident()] if self.has_slots else list(self.store.experts)
            )
        here = sum(len(bay.residency.slot_of) for bay in self._bays) if self.has_slots else len(self.store.experts)
        parts = [asdict(bay.counters) for bay in self._bays] or [asdict(self._direct)]
        return WorkerReport(
            name=self.name,
            emulated_link=self._link.emulated,
            slot_budget_bytes=self.slot_budget_bytes,
            peak_slot_bytes=sum(bay.pool.nbytes for bay in self._bays),
            host_bytes=self.store.nbytes,
            owned=len(self.store.experts),
            resident_count=here,
            slot_count=sum(bay.pool.count for bay in self._bays) if self.has_slots else None,
            resident=tuple(sorted(layer_and_expert(identifier) for identifier in identifiers)),
            calls=self._calls,
            shrunk=sum(bay.shrunk for bay in self._bays),
            **{name: sum(part[name] for part in parts) for name in parts[0]},
        )

    def close(self) -> None:
        """Stop the loader, and give pinned memory of its own back."""
        if self._loader is not None:
            self._loader.close()
        if self._arena is not None:
            self._arena.close()
