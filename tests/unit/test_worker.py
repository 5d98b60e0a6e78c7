"""The worker as a whole: budgets, exact results whatever the slots, what answers tell, and hosts that help."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint, ExpertTensors
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import DeviceConfig, SchedulingConfig
from raymoe.engine.dispatch import Changes, Dispatcher
from raymoe.errors import CapacityError, ConfigError, ExpertUnavailableError
from raymoe.experts.bays import share_slots
from raymoe.experts.build import make_worker
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, expert_id, layer_and_expert
from raymoe.experts.host_store import HostStore
from raymoe.experts.link import EmulatedLink, Link, MemoryLink
from raymoe.experts.worker import Begun, ExpertWorker
from raymoe.types import DeviceName, ExpertKey, LayerSize, StepId
from tests.toy_models import save_toy

TIMEOUT_S = 30.0

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


def make(
    checkpoint: Checkpoint, slots: int | None, link: Link | None = None, scheduling: SchedulingConfig | None = None
) -> ExpertWorker:
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
        scheduling=scheduling,
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


def test_forecasts_of_experts_that_are_not_owned_are_ignored(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 2)
    for layer, expert in ((0, 8), (0, -1), (-1, 0), (2, 0)):
        worker.expect(layer, np.array([expert]), np.ones(1, dtype=np.float32))
    assert worker.report().prefetches == 0
    worker.expect(1, np.array([7]), np.ones(1, dtype=np.float32))
    assert worker.report().prefetches == 1
    worker.close()


class FailingLink(MemoryLink):
    """Fails as long as told."""

    broken = True

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        if self.broken:
            raise OSError("the bus is on fire")
        yield from super().pieces(source, target, nbytes)


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


# --- scheduling -----------------------------------------------------------------------------------------

IMPORTANCE = SchedulingConfig(policy="importance")


def slow_link() -> EmulatedLink:
    """A load takes 30 ms and an expert on the host 1 ms, both imitated."""
    return EmulatedLink(1e12, 0.03, host_s=0.001)


def test_the_host_computes_exactly_what_slots_would(checkpoint: Checkpoint) -> None:
    helped, direct = make(checkpoint, 3, slow_link(), IMPORTANCE), make(checkpoint, None)
    hosted = 0
    for call in random_calls(20):
        answer = helped.compute(call)
        hosted += answer.hosted
        assert torch.equal(answer.output_PH, direct.compute(call).output_PH)
        assert answer.hits + answer.misses == len(call.experts_P) and answer.hosted <= answer.misses
    assert hosted == helped.report().hosted > 0
    helped.close()


def test_only_policy_importance_uses_the_host(checkpoint: Checkpoint) -> None:
    for scheduling in (SchedulingConfig(), SchedulingConfig(policy="importance", host_assist=False)):
        worker = make(checkpoint, 4, slow_link(), scheduling)
        assert sum(worker.compute(call).hosted for call in random_calls(4)) == 0
        worker.close()


def test_settings_change_while_the_worker_runs(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 3, slow_link(), IMPORTANCE)
    worker.reconfigure(IMPORTANCE.changed({"host_assist": False, "eviction": "lru"}))
    assert sum(worker.compute(call).hosted for call in random_calls(4)) == 0
    worker.reconfigure(IMPORTANCE)
    assert sum(worker.compute(call).hosted for call in random_calls(4, seed=1)) > 0
    worker.close()


def test_a_device_without_a_host_beside_it_never_assists(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 3, None, IMPORTANCE)
    assert sum(worker.compute(call).hosted for call in random_calls(10)) == 0
    worker.close()


# --- orders ---------------------------------------------------------------------------------------------

CACHELESS = SchedulingConfig(policy="on_demand_shadow")


def of_steps(calls: list[ExpertCall]) -> list[ExpertCall]:
    """The calls as one sequence's: two layers a step."""
    return [
        replace(call, layer=number % 2, step=StepId(sequence=7, position=number // 2))
        for number, call in enumerate(calls)
    ]


def order_of(call: ExpertCall, experts: list[int]) -> LoadOrder:
    assert call.step is not None
    return LoadOrder(step=call.step, epoch=0, layer=call.layer, experts=np.array(experts, dtype=np.int32))


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
@pytest.mark.parametrize("truth", [0.0, 0.5, 1.0])
def test_without_a_cache_results_are_those_of_everything_resident(
    checkpoint: Checkpoint, slots: int, truth: float
) -> None:
    """Whatever was ordered: orders run two calls ahead, and name other experts than are needed as often as told."""
    random = np.random.default_rng(slots)
    resident, worker = make(checkpoint, 16), make(checkpoint, slots, scheduling=CACHELESS)
    resident.load_all()
    calls = of_steps(random_calls(24))
    for number, call in enumerate(calls):
        for coming in calls[:3] if number == 0 else calls[number + 2 : number + 3]:
            experts = np.unique(coming.experts_P)
            guesses = np.where(random.random(len(experts)) < truth, experts, random.integers(0, 8, len(experts)))
            worker.order(order_of(coming, guesses.tolist()))
        assert torch.equal(worker.compute(call).output_PH, resident.compute(call).output_PH)
        assert len(worker.report().resident) <= slots
    worker.forget(7)
    worker.close()
    resident.close()


def test_ordered_experts_are_hits_and_leave_after_use(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 3, scheduling=CACHELESS)
    (call,) = of_steps(random_calls(1))
    experts = np.unique(call.experts_P)[:3].tolist()
    worker.order(order_of(call, experts))
    until_ready(worker, call.layer, len(experts))
    only = np.isin(call.experts_P, experts)
    answer = worker.compute(replace(call, experts_P=call.experts_P[only], rows_P=call.rows_P[only]))
    assert (answer.hits, answer.misses, answer.loads) == (only.sum(), 0, len(experts))
    report = worker.report()
    assert (report.resident, report.prefetches, report.evictions) == ((), len(experts), len(experts))
    worker.close()


def until_ready(worker: ExpertWorker, layer: int, experts: int) -> None:
    """Wait until so many experts are loaded. They are on their way: a load that is asked for begins at once."""
    deadline = time.monotonic() + TIMEOUT_S
    while worker.ready(layer).sum() < experts:
        assert time.monotonic() < deadline


def test_calls_that_nobody_foresaw_leave_no_expert_behind(checkpoint: Checkpoint) -> None:
    worker, direct = make(checkpoint, 2, scheduling=CACHELESS), make(checkpoint, None)
    for call in random_calls(6):
        assert torch.equal(worker.compute(call).output_PH, direct.compute(call).output_PH)
        assert worker.report().resident == ()
    worker.close()


def test_orders_of_experts_that_are_not_owned_are_ignored(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 2, scheduling=CACHELESS)
    for layer, expert in ((0, 8), (0, -1), (0, 1 << 16), (-1, 0), (2, 0)):
        (call,) = of_steps(random_calls(1))
        worker.order(order_of(replace(call, layer=layer), [expert]))
    assert worker.report().prefetches == 0
    worker.close()


@pytest.mark.parametrize("scheduling", [SchedulingConfig(), IMPORTANCE])
def test_other_policies_take_no_orders(checkpoint: Checkpoint, scheduling: SchedulingConfig) -> None:
    worker = make(checkpoint, 2, scheduling=scheduling)
    (call,) = of_steps(random_calls(1))
    worker.order(order_of(call, [1]))
    worker.forget(7)
    assert worker.report().resident == ()
    worker.close()


def test_without_a_cache_forecasts_of_worth_are_ignored(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 2, scheduling=CACHELESS)
    worker.expect(1, np.array([7]), np.ones(1, dtype=np.float32))
    assert worker.report().prefetches == 0
    worker.close()


# --- news of residency ----------------------------------------------------------------------------------


class Rotating:
    """A worker with one slot: every call evicts the expert of the call before."""

    def __init__(self) -> None:
        self.here: int | None = None

    load_s = None

    def begin(self, call: ExpertCall) -> Begun:
        return Begun(call=call, start_s=0.0, step=None)

    def finish(self, begun: Begun) -> ExpertAnswer:
        call = begun.call
        before, self.here = self.here, expert_id(call.layer, int(call.experts_P[0]))
        evicted = () if before is None else (before,)
        return ExpertAnswer(output_PH=call.hidden_RH, loads=1, loaded=(self.here,), evicted=evicted)

    def ready(self, layer: int) -> np.ndarray:
        return np.zeros(8, dtype=bool)

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        raise AssertionError("nobody forecasts here")


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
