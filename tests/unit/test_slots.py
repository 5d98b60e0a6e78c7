"""Device slots: who is evicted, what is refused, and that turns, misses and failures never change a result."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint, ExpertTensors
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import DeviceConfig
from raymoe.engine.dispatch import Changes, Dispatcher
from raymoe.errors import CapacityError, ConfigError, ExpertUnavailableError
from raymoe.experts.build import make_worker
from raymoe.experts.call import ExpertAnswer, ExpertCall, expert_id, layer_and_expert
from raymoe.experts.host_store import HostStore
from raymoe.experts.link import EmulatedLink, Link, MemoryLink
from raymoe.experts.loader import ON_DEMAND, PREFETCH, ThreadLoader
from raymoe.experts.shelf import Shelf
from raymoe.experts.slots import Residency, SlotPool
from raymoe.experts.worker import ExpertWorker, share_slots
from raymoe.types import DeviceName, ExpertKey, LayerSize
from tests.toy_models import save_toy

EXPERT_BYTES = 8  # of the shelf's experts: two float32
TIMEOUT_S = 30.0


@dataclass
class ManualTicket:
    """A load that ends when the test says so, or at the latest when someone waits for it."""

    copy: Callable[[], None]
    done: bool = False
    error: BaseException | None = None

    def is_done(self) -> bool:
        return self.done

    def wait(self, timeout_s: float) -> None:
        self.finish()

    def finish(self) -> None:
        if not self.done and self.error is None:
            self.copy()
        self.done = True


@dataclass
class ManualLoader:
    """Notes every load; ``fails`` names experts whose loads end in an error."""

    fails: set[int] = field(default_factory=set)
    started: list[tuple[int, int]] = field(default_factory=list)
    tickets: dict[int, ManualTicket] = field(default_factory=dict)

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> ManualTicket:
        identifier = int(source["down_proj"].item())
        error = OSError(f"expert {identifier} is unreadable") if identifier in self.fails else None
        ticket = ManualTicket(lambda: MemoryLink().transfer(source, target, nbytes), error=error)
        self.started.append((identifier, priority))
        self.tickets[identifier] = ticket
        return ticket

    def close(self) -> None:
        pass


def make_shelf(slots: int, experts: int = 8, fails: Iterable[int] = ()) -> tuple[Shelf, ManualLoader]:
    """A shelf for one layer whose expert e holds the number e."""
    store = HostStore(lambda key: {name: torch.full((1,), float(key.expert)) for name in ("up_proj", "down_proj")})
    store.load(ExpertKey(layer=0, expert=expert) for expert in range(experts))
    pool = SlotPool({"up_proj": (1,), "down_proj": (1,)}, slots, torch.float32, torch.device("cpu"))
    loader = ManualLoader(fails=set(fails))
    return Shelf(pool, Residency(slots, 1, experts), loader, store, EXPERT_BYTES), loader


def run_step(shelf: Shelf, experts: list[int], scores: list[float] | None = None) -> dict[int, float]:
    """One whole layer call; returns what the slot of each expert held when it was its turn."""
    seen = serve_experts(shelf, experts, scores)
    shelf.end_step()
    return seen


def serve_experts(shelf: Shelf, experts: list[int], scores: list[float] | None = None) -> dict[int, float]:
    """A layer call without its end."""
    wanted = np.array(experts, dtype=np.int32)
    slots, step = shelf.begin_step(0, wanted, None if scores is None else np.array(scores, dtype=np.float32))
    seen = {expert: held(shelf, slot) for expert, slot in zip(experts, slots.tolist(), strict=True) if slot >= 0}
    if step is not None:
        ready = [slot for slot in slots.tolist() if slot >= 0]
        shelf.release(step, ready)
        while (arrived := shelf.next_arrival(step)) is not None:
            seen[arrived[0]] = held(shelf, arrived[1])
            shelf.release(step, [arrived[1]])
    return seen


def held(shelf: Shelf, slot: int) -> float:
    return shelf.pool.slots[slot]["down_proj"].item()


# --- residency ------------------------------------------------------------------------------------------


def fill(residency: Residency, *experts: int) -> None:
    for expert in experts:
        claimed = residency.claim(expert)
        assert claimed is not None
        residency.mark_ready(claimed[0])


def test_the_least_recently_used_expert_is_evicted() -> None:
    residency = Residency(3, 1, 8)
    fill(residency, 0, 1, 2)
    residency.use([residency.slot_of[0]])
    residency.unshield(slice(None))
    assert residency.claim(5) == (1, 1)


def test_shielded_experts_are_not_evicted() -> None:
    residency = Residency(2, 1, 8)
    fill(residency, 0, 1)
    residency.use([residency.slot_of[0]])
    assert residency.claim(5) == (1, 1)
    assert residency.claim(6) is None, "one is shielded, the other loading"


def test_loading_experts_are_not_evicted() -> None:
    residency = Residency(1, 1, 8)
    residency.claim(0)
    assert residency.victim() is None
    assert residency.claim(1) is None


def test_a_free_slot_is_taken_before_anyone_is_evicted() -> None:
    residency = Residency(2, 1, 8)
    fill(residency, 0)
    assert residency.victim() is None
    claimed = residency.claim(1)
    assert claimed is not None and claimed[1] is None


def test_an_abandoned_load_frees_its_slot() -> None:
    residency = Residency(1, 1, 8)
    residency.claim(3)
    residency.abandon(0)
    assert residency.find(3) is None
    assert residency.ready_slot_LE.tolist() == [[-1] * 8]
    assert residency.claim(4) == (0, None)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("cmaus"), st.integers(0, 7)), max_size=60))
def test_books_stay_consistent(slots: int, operations: list[tuple[str, int]]) -> None:
    residency = Residency(slots, 2, 4)
    for operation, number in operations:
        expert = expert_id(number // 4, number % 4)
        slot = residency.find(expert)
        if operation == "c" and slot is None:
            residency.claim(expert)
        elif operation == "m" and slot is not None:
            residency.mark_ready(slot)
        elif operation == "a" and slot is not None and not residency.ready_S[slot]:
            residency.abandon(slot)
        elif operation == "u" and slot is not None:
            residency.use([slot])
        elif operation == "s":
            residency.unshield(slice(None))
        occupied = {slot: expert for slot, expert in enumerate(residency.expert_in) if expert is not None}
        assert {expert: slot for slot, expert in occupied.items()} == residency.slot_of
        ready = {
            expert_id(layer, index): int(residency.ready_slot_LE[layer, index])
            for layer, index in zip(*np.nonzero(residency.ready_slot_LE >= 0), strict=True)
        }
        assert ready == {expert: slot for slot, expert in occupied.items() if residency.ready_S[slot]}


# --- shelf: layer calls ---------------------------------------------------------------------------------


def test_a_miss_loads_and_the_next_call_hits() -> None:
    shelf, loader = make_shelf(slots=4)
    assert run_step(shelf, [1, 2]) == {1: 1.0, 2: 2.0}
    assert run_step(shelf, [1, 2]) == {1: 1.0, 2: 2.0}
    assert loader.started == [(1, ON_DEMAND), (2, ON_DEMAND)]
    assert (shelf.counters.hits, shelf.counters.misses) == (2, 2)
    assert (shelf.counters.loads, shelf.counters.bytes_loaded) == (2, 2 * EXPERT_BYTES)


def test_an_expert_asked_for_by_several_rows_is_loaded_once() -> None:
    shelf, loader = make_shelf(slots=4)
    run_step(shelf, [3, 3, 3])
    assert loader.started == [(3, ON_DEMAND)]
    assert shelf.counters.misses == 3


def test_loads_of_a_step_evict_no_expert_of_the_step() -> None:
    shelf, _ = make_shelf(slots=3)
    run_step(shelf, [0])
    run_step(shelf, [1, 2])
    assert run_step(shelf, [0, 3, 4]) == {0: 0.0, 3: 3.0, 4: 4.0}
    assert shelf.resident() == [0, 3, 4]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_more_experts_than_slots_are_served_in_turns(slots: int) -> None:
    shelf, _ = make_shelf(slots=slots)
    wanted = [0, 2, 4, 5, 7]
    assert run_step(shelf, wanted) == {expert: float(expert) for expert in wanted}
    assert len(shelf.resident()) == slots


def test_a_slot_is_given_up_only_once_its_expert_is_computed() -> None:
    shelf, loader = make_shelf(slots=1)
    _, step = shelf.begin_step(0, np.array([1, 2], dtype=np.int32), None)
    assert step is not None
    assert shelf.next_arrival(step) == (1, 0)
    assert [expert for expert, _ in loader.started] == [1]
    shelf.release(step, [0])
    assert [expert for expert, _ in loader.started] == [1, 2]


def test_a_load_in_flight_counts_as_a_miss_and_is_not_started_again() -> None:
    shelf, loader = make_shelf(slots=2)
    assert shelf.prefetch(5, score=1.0)
    assert run_step(shelf, [5]) == {5: 5.0}
    assert loader.started == [(5, PREFETCH)]
    assert shelf.counters.misses == 1


def test_a_finished_prefetch_is_a_hit() -> None:
    shelf, loader = make_shelf(slots=2)
    shelf.prefetch(5, score=1.0)
    loader.tickets[5].finish()
    assert run_step(shelf, [5]) == {5: 5.0}
    assert (shelf.counters.hits, shelf.counters.misses) == (1, 0)


def test_a_step_waits_for_slots_that_prefetches_hold() -> None:
    shelf, loader = make_shelf(slots=1)
    shelf.prefetch(5, score=1.0)
    _, step = shelf.begin_step(0, np.array([2], dtype=np.int32), None)
    assert step is not None and list(step.waiting) == [2]
    loader.tickets[5].finish()
    assert shelf.next_arrival(step) == (2, 0)
    assert held(shelf, 0) == 2.0


def changes_of(shelf: Shelf, experts: list[int]) -> tuple[set[int], set[int]]:
    serve_experts(shelf, experts)
    loaded, evicted = shelf.end_step()
    assert len(set(loaded)) == len(loaded) and len(set(evicted)) == len(evicted)
    return set(loaded), set(evicted)


def test_residency_changes_lead_from_one_step_to_the_next() -> None:
    """Whatever came and went within a step is not reported: a mirror that adds and removes stays true."""
    shelf, _ = make_shelf(slots=2)
    mirror: set[int] = set()
    for experts in ([0], [1], [0, 1, 2, 3, 4], [5, 6, 7], [5], [0, 5, 0, 6]):
        loaded, evicted = changes_of(shelf, experts)
        assert not loaded & evicted and evicted <= mirror and not loaded & mirror
        mirror = mirror - evicted | loaded
        assert mirror == set(shelf.resident())


# --- shelf: prefetch ------------------------------------------------------------------------------------


def test_prefetch_into_a_free_slot_is_always_welcome() -> None:
    shelf, loader = make_shelf(slots=2)
    assert shelf.prefetch(3, score=0.0)
    assert loader.started == [(3, PREFETCH)]
    assert shelf.counters.prefetches == 1


def test_prefetch_of_what_is_there_costs_nothing() -> None:
    shelf, loader = make_shelf(slots=1)
    run_step(shelf, [3])
    assert shelf.prefetch(3, score=0.0)
    assert loader.started == [(3, ON_DEMAND)]


def test_prefetch_is_refused_where_every_slot_is_shielded() -> None:
    shelf, _ = make_shelf(slots=2)
    run_step(shelf, [0, 1])
    shelf.begin_step(0, np.array([0, 1], dtype=np.int32), None)
    assert not shelf.prefetch(3, score=9.0)
    assert shelf.counters.prefetches_refused == 1
    shelf.end_step()
    assert shelf.prefetch(3, score=9.0)


@pytest.mark.parametrize(("score", "welcome"), [(0.3, False), (0.4, False), (0.5, True)])
def test_prefetch_is_refused_where_the_victim_scored_as_well(score: float, welcome: bool) -> None:
    shelf, _ = make_shelf(slots=1)
    run_step(shelf, [2], scores=[0, 0, 0.4, 0, 0, 0, 0, 0])
    assert shelf.prefetch(3, score) is welcome
    assert shelf.resident() == [3 if welcome else 2]


# --- shelf: failing loads -------------------------------------------------------------------------------


def test_a_failing_load_surfaces_and_frees_the_slot() -> None:
    shelf, loader = make_shelf(slots=1, fails=[3])
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        run_step(shelf, [3])
    shelf.end_step()
    assert shelf.resident() == []
    loader.fails.clear()
    assert run_step(shelf, [3]) == {3: 3.0}


def test_a_failing_load_surfaces_even_if_a_prefetch_order_notices_it_first() -> None:
    shelf, loader = make_shelf(slots=2, fails=[3])
    _, step = shelf.begin_step(0, np.array([3], dtype=np.int32), None)
    assert step is not None
    loader.tickets[3].finish()
    shelf.prefetch(4, score=1.0)
    with pytest.raises(OSError, match="expert 3 is unreadable"):
        shelf.next_arrival(step)


def test_a_failed_prefetch_does_not_stand_in_the_way() -> None:
    shelf, loader = make_shelf(slots=1, fails=[3])
    shelf.prefetch(3, score=1.0)
    loader.tickets[3].finish()
    loader.fails.clear()
    assert run_step(shelf, [3]) == {3: 3.0}


def test_a_failed_load_is_not_reported_as_loaded() -> None:
    shelf, _ = make_shelf(slots=2, fails=[3])
    with pytest.raises(OSError):
        run_step(shelf, [3])
    assert shelf.end_step() == ((), ())


# --- loader and link ------------------------------------------------------------------------------------


class GatedLink:
    """Copies once the gate opens; notes the order."""

    emulated = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.order: list[float] = []

    def transfer(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        self.order.append(source["w"].item())
        target["w"].copy_(source["w"])


def test_on_demand_loads_overtake_queued_prefetches() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    target = {"w": torch.zeros(1)}
    first = loader.start({"w": torch.tensor([1.0])}, target, 4, PREFETCH)
    assert link.entered.wait(TIMEOUT_S)
    loads = [(2.0, PREFETCH), (3.0, ON_DEMAND), (4.0, PREFETCH), (5.0, ON_DEMAND)]
    tickets = [loader.start({"w": torch.tensor([number])}, target, 4, priority) for number, priority in loads]
    assert not first.is_done()
    link.gate.set()
    for ticket in tickets:
        ticket.wait(TIMEOUT_S)
    loader.close()
    assert link.order == [1.0, 3.0, 5.0, 2.0, 4.0]


def test_a_load_that_takes_too_long_is_an_error_not_a_hang() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    ticket = loader.start({"w": torch.zeros(1)}, {"w": torch.zeros(1)}, 4, ON_DEMAND)
    with pytest.raises(TimeoutError, match=r"not loaded within 0\.001 s"):
        ticket.wait(0.001)
    link.gate.set()
    loader.close()


@dataclass
class FakeTime:
    """A clock that only sleeping moves, by a little more than asked for."""

    now: float = 100.0
    overshoot_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.overshoot_s


def emulated(time: FakeTime, bytes_per_s: float = 1000.0, latency_s: float = 0.5) -> EmulatedLink:
    return EmulatedLink(bytes_per_s, latency_s, clock=lambda: time.now, sleep=time.sleep)


def test_an_emulated_transfer_takes_latency_plus_bytes_over_rate() -> None:
    time = FakeTime()
    target = {"w": torch.zeros(2)}
    emulated(time).transfer({"w": torch.ones(2)}, target, 2000)
    assert time.now == pytest.approx(100 + 0.5 + 2.0)
    assert target["w"].tolist() == [1.0, 1.0]


def test_emulated_transfers_do_not_add_up_overshoots_while_idle() -> None:
    time = FakeTime()
    link = emulated(time)
    link.transfer({}, {}, 1000)
    time.now += 60
    link.transfer({}, {}, 1000)
    assert time.now == pytest.approx(100 + 1.5 + 60 + 1.5)


def test_a_copy_that_took_longer_than_the_bus_is_not_delayed_further() -> None:
    time = FakeTime()

    class SlowTensor:
        def copy_(self, _source: object) -> None:
            time.now += 9.0

    emulated(time).transfer({"w": None}, {"w": SlowTensor()}, 1000)  # type: ignore[dict-item]
    assert time.now == pytest.approx(109.0)


# --- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "sizes", "owned", "slots"),
    [
        (None, [10], [7], [7]),  # no budget: everything
        (10, [10], [7], [1]),
        (19, [10], [7], [1]),
        (30, [10], [49], [3]),
        (1000, [10], [7], [7]),  # never more than is owned
        (30, [10, 20], [5, 5], [1, 1]),
        (150, [10, 20], [5, 5], [5, 5]),
        (60, [10, 20], [4, 4], [2, 2]),
        (10, [10, 20], [5, 0], [1, 0]),  # nothing of the second shape is owned
    ],
)
def test_slots_share_the_budget(budget: int | None, sizes: list[int], owned: list[int], slots: list[int]) -> None:
    assert share_slots("edge", budget, sizes, owned) == slots


@given(st.integers(1, 10**6), st.integers(1, 300), st.integers(1, 400), st.integers(0, 10**6))
def test_one_shape_gets_as_many_slots_as_fit(size: int, owned: int, fitting: int, rest: int) -> None:
    budget = size * fitting + rest % size
    assert share_slots("edge", budget, [size], [owned]) == [min(owned, fitting)]


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 50)), min_size=1, max_size=4), st.integers(1, 10**5))
def test_slots_never_exceed_the_budget(kinds: list[tuple[int, int]], budget: int) -> None:
    sizes, owned = [size for size, _ in kinds], [count for _, count in kinds]
    if budget < sum(size for size, count in kinds if count):
        return
    slots = share_slots("edge", budget, sizes, owned)
    assert sum(size * count for size, count in zip(sizes, slots, strict=True)) <= budget
    assert all(min(1, have) <= count <= have for count, have in zip(slots, owned, strict=True))


def test_a_budget_below_one_expert_is_refused_with_the_number() -> None:
    with pytest.raises(
        CapacityError, match=r'"edge": slot_memory of 9 bytes is less than one expert \(10 bytes\); raise'
    ):
        share_slots("edge", 9, [10], [4])


# --- the worker -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two MoE layers of eight experts, in float32."""
    return open_checkpoint(save_toy("qwen3_moe", tmp_path_factory.mktemp("toy")), "float32")


def make(checkpoint: Checkpoint, slots: int | None, link: Link | None = None) -> ExpertWorker:
    """A worker that owns everything, with a budget of so many slots."""
    size = checkpoint.layers[0].expert_bytes(torch.float32)
    worker = ExpertWorker(
        name="edge",
        layers=checkpoint.layers,
        modules=[module for _, module in experts_modules(checkpoint.skeleton)],
        read_expert=checkpoint.read_expert,
        dtype=torch.float32,
        device=torch.device("cpu"),
        slot_budget_bytes=None if slots is None else slots * size + size // 2,
        link=link,
    )
    worker.own(all_keys(checkpoint))
    return worker


def all_keys(checkpoint: Checkpoint) -> list[ExpertKey]:
    return [ExpertKey(layer=layer.index, expert=e) for layer in checkpoint.layers for e in range(layer.num_experts)]


def random_calls(count: int, seed: int = 0) -> list[ExpertCall]:
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for _ in range(count):
        rows = int(random.integers(1, 5))
        chosen = np.sort(np.stack([random.choice(8, 3, replace=False) for _ in range(rows)]).reshape(-1))
        calls.append(
            ExpertCall(
                layer=int(random.integers(2)),
                hidden_RH=torch.randn(rows, 32, generator=generator),
                experts_P=chosen.astype(np.int32),
                rows_P=random.integers(0, rows, rows * 3).astype(np.int32),
            )
        )
    return calls


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 16])
def test_any_budget_computes_exactly_what_direct_computation_does(checkpoint: Checkpoint, slots: int) -> None:
    direct, bounded = make(checkpoint, None), make(checkpoint, slots)
    for call in random_calls(20):
        assert torch.equal(bounded.compute(call).output_PH, direct.compute(call).output_PH)
    bounded.close()


def test_direct_computation_equals_the_architectures_own_module(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, None)
    module = experts_modules(checkpoint.skeleton)[1][1]
    tensors = [worker.store.experts[expert_id(1, expert)] for expert in range(8)]
    weights = {name: torch.stack([item[name] for item in tensors]) for name in tensors[0]}
    call = ExpertCall(
        layer=1,
        hidden_RH=torch.randn(2, 32, generator=torch.Generator().manual_seed(3)),
        experts_P=np.array([1, 1, 4, 6], dtype=np.int32),
        rows_P=np.array([0, 1, 0, 1], dtype=np.int32),
    )
    module.config._experts_implementation = "eager"
    expected = [
        torch.func.functional_call(
            module, weights, (call.hidden_RH[row : row + 1], torch.tensor([[expert]]), torch.ones(1, 1))
        )[0]
        for expert, row in zip(call.experts_P.tolist(), call.rows_P.tolist(), strict=True)
    ]
    torch.testing.assert_close(worker.compute(call).output_PH, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slots", [1, 2, 7, 16])
def test_slot_bytes_never_exceed_the_budget(checkpoint: Checkpoint, slots: int) -> None:
    worker = make(checkpoint, slots)
    size = checkpoint.layers[0].expert_bytes(torch.float32)
    for call in random_calls(10):
        worker.compute(call)
        report = worker.report()
        assert report.peak_slot_bytes == slots * size
        assert report.slot_budget_bytes is not None and report.peak_slot_bytes <= report.slot_budget_bytes
        assert len(report.resident) <= slots
    worker.close()


def test_answers_tell_what_the_call_cost(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 4)
    size = checkpoint.layers[0].expert_bytes(torch.float32)
    call = ExpertCall(
        layer=0,
        hidden_RH=torch.zeros(2, 32),
        experts_P=np.array([1, 1, 5], dtype=np.int32),
        rows_P=np.array([0, 1, 0], dtype=np.int32),
    )
    first, second = worker.compute(call), worker.compute(call)
    assert (first.hits, first.misses, first.loads, first.bytes_loaded) == (0, 3, 2, 2 * size)
    assert [layer_and_expert(identifier) for identifier in first.loaded] == [(0, 1), (0, 5)]
    assert (second.hits, second.misses, second.loads, second.bytes_loaded) == (3, 0, 0, 0)
    assert second.loaded == second.evicted == ()
    report = worker.report()
    assert report.resident == ((0, 1), (0, 5))
    assert (report.calls, report.hits, report.misses, report.loads) == (2, 3, 3, 2)
    worker.close()


def test_direct_computation_is_all_hits(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, None)
    answer = worker.compute(random_calls(1)[0])
    assert (answer.misses, answer.loads, worker.report().peak_slot_bytes) == (0, 0, 0)
    assert answer.hits == len(answer.output_PH)


def test_all_resident_loads_everything_once(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 16)
    worker.load_all()
    assert len(worker.report().resident) == 16
    assert all(worker.compute(call).loads == 0 for call in random_calls(5))
    worker.close()


def test_all_resident_needs_the_room(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 15)
    with pytest.raises(
        CapacityError, match=r'"edge": policy "all_resident" needs slots for 16 experts .* holds 15; raise'
    ):
        worker.load_all()
    worker.close()


def test_an_expert_of_another_worker_is_refused(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 2)
    for missing in (8, 1000):
        call = ExpertCall(
            layer=0,
            hidden_RH=torch.zeros(1, 32),
            experts_P=np.array([missing], dtype=np.int32),
            rows_P=np.zeros(1, dtype=np.int32),
        )
        with pytest.raises(ExpertUnavailableError, match=r'"edge" does not own all experts asked for in layer 0'):
            worker.compute(call)
    worker.close()


def test_orders_for_experts_that_are_not_owned_are_refused(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 2)
    assert not worker.prefetch(0, 8, 1.0)
    assert not worker.prefetch(-1, 0, 1.0)
    assert not worker.prefetch(2, 0, 1.0)
    assert worker.prefetch(1, 7, 1.0)
    worker.close()


class FailingLink(MemoryLink):
    """Fails as long as told."""

    broken = True

    def transfer(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
        if self.broken:
            raise OSError("the bus is on fire")
        super().transfer(source, target, nbytes)


def test_a_broken_link_fails_the_call_and_not_the_worker(checkpoint: Checkpoint) -> None:
    link = FailingLink()
    worker, direct = make(checkpoint, 2, link), make(checkpoint, None)
    calls = random_calls(6)
    for call in calls:
        with pytest.raises(OSError, match="the bus is on fire"):
            worker.compute(call)
    link.broken = False
    for call in calls:
        assert torch.equal(worker.compute(call).output_PH, direct.compute(call).output_PH)
    worker.close()


def test_experts_taken_on_later_are_computed_too(checkpoint: Checkpoint) -> None:
    size = checkpoint.layers[0].expert_bytes(torch.float32)
    worker = make_worker(checkpoint, DeviceConfig(name="edge", slot_memory=2 * size))
    keys = all_keys(checkpoint)
    worker.own(keys[:1])
    worker.own(keys[1:])
    direct = make(checkpoint, None)
    for call in random_calls(5):
        torch.testing.assert_close(worker.compute(call).output_PH, direct.compute(call).output_PH)
    assert worker.report().owned == 16
    worker.close()


def test_the_store_reads_each_expert_once_and_counts_bytes() -> None:
    reads: list[ExpertKey] = []

    def read(key: ExpertKey) -> ExpertTensors:
        reads.append(key)
        return {"w": torch.zeros(3)}

    store = HostStore(read)
    keys = [ExpertKey(layer=0, expert=expert) for expert in range(4)]
    told: list[int] = []
    store.load(keys[:3], told.append)
    store.load(keys, told.append)
    assert (reads, told, store.nbytes) == (keys, [1, 2, 3, 4], 4 * 12)
    store.drop(keys[1:3])
    assert store.nbytes == 2 * 12


def test_a_worker_for_a_gpu_that_is_not_there(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r'"edge" wants cuda:9, but this machine has \d+ CUDA devices'):
        make_worker(checkpoint, DeviceConfig(name="edge", kind="cuda:9", slot_memory=1 << 20))


def test_an_emulated_link_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    device = DeviceConfig.model_validate({"name": "edge", "link": {"bytes_per_s": "1GB"}})
    worker = make_worker(checkpoint, device)
    worker.own(all_keys(checkpoint))
    assert worker.report().emulated_link
    assert worker.has_slots
    worker.close()


# --- news of residency ----------------------------------------------------------------------------------


class Rotating:
    """A worker with one slot: every call evicts the expert of the call before."""

    def __init__(self) -> None:
        self.here: int | None = None

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        before, self.here = self.here, expert_id(call.layer, int(call.experts_P[0]))
        evicted = () if before is None else (before,)
        return ExpertAnswer(output_PH=call.hidden_RH, loads=1, loaded=(self.here,), evicted=evicted)


def test_news_of_several_calls_tell_the_difference_only() -> None:
    news: list[Changes] = []
    name = DeviceName("edge")
    dispatcher = Dispatcher(
        (LayerSize(experts=8, expert_bytes=1, top_k=1),),
        {ExpertKey(layer=0, expert=expert): name for expert in range(8)},
        local={name: Rotating()},
        remote=None,
        timeout_s=TIMEOUT_S,
        on_changes=news.append,
    )
    for experts in ([3], [4, 5, 6], [5, 6]):
        for expert in experts:
            dispatcher.compute(0, torch.zeros(1, 4), torch.tensor([[expert]]))
        dispatcher.take_cost()
    assert news == [{name: ([3], [])}, {name: ([6], [3])}]
