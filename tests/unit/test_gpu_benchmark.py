"""The GPU benchmark's synthetic models decode by the policies that they name; on a CPU, with what a GPU has played."""

import gc

import numpy as np
import pytest
import torch

from benchmarks.device.decode import LRU, POLICIES, RESIDENT, Bench, Trace
from benchmarks.device.played import share
from benchmarks.device.routing import chosen, foretold, locality, recall_of, typical, uniform
from benchmarks.device.synthetic import RandomExperts, Shape, make_trunk
from raymoe.experts.host_store import HostStore
from raymoe.experts.slots import SlotPool
from raymoe.model.gpu_blocks import use_gpu_kernels
from tests.replayed import ReplayRecorder
from tests.torch_kernels import TorchKernels

SHAPE = Shape(
    name="tiny",
    layers=3,
    all_layers=3,
    experts=16,
    top_k=2,
    hidden=32,
    inner=16,
    heads=2,
    kv_heads=1,
    head_dim=16,
    vocabulary=64,
    architecture="qwen3_moe",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    model, kernels = make_trunk(SHAPE, torch.float32, CPU), TorchKernels()
    assert use_gpu_kernels(model, kernels) > SHAPE.layers
    read = RandomExperts(SHAPE, torch.float32, CPU)
    return Bench(
        shape=SHAPE,
        model=model,
        store=HostStore(read),
        kernels=kernels,
        new_recorder=ReplayRecorder,
        share=share,
        read_expert=read,
    )


def trace_of(logits_NLE: np.ndarray) -> Trace:
    gate, shadow = (foretold(logits_NLE, SHAPE.top_k, recall, seed=1) for recall in (0.75, 0.98))
    return Trace(name="uniform", logits_NLE=logits_NLE, gate_NLE=gate, shadow_NLE=shadow)


def test_everything_resident_loads_nothing(bench: Bench) -> None:
    found = bench.run(RESIDENT, None, trace_of(uniform(3, 16, 6, seed=0)), 1, 4)
    assert found.captured == "captured" and len(found.step_s) == 4
    assert found.cost.loads == 0 and found.slot_bytes == 3 * 16 * bench.expert_bytes


def test_a_run_leaves_no_slots_behind(bench: Bench) -> None:
    bench.run(LRU, 12, trace_of(uniform(3, 16, 6, seed=0)), 1, 4)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, SlotPool)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_policies_load_what_their_slots_lack(bench: Bench, policy: object) -> None:
    found = bench.run(policy, 12, trace_of(uniform(3, 16, 9, seed=0)), 2, 6)  # type: ignore[arg-type]
    assert found.captured == "captured" and found.slot_bytes == 12 * bench.expert_bytes
    assert found.cost.hits + found.cost.misses == 6 * 3 * 2
    assert 0 < found.cost.misses <= found.cost.hits + found.cost.misses
    assert found.loaded_bytes > 0
    if policy.alpha:  # type: ignore[attr-defined]
        assert found.cost.substituted > 0


def test_a_shadow_saves_misses(bench: Bench) -> None:
    shadow = next(policy for policy in POLICIES if policy.name == "shadow")
    trace = trace_of(uniform(3, 16, 24, seed=0))
    assert bench.run(shadow, 12, trace, 2, 20).cost.misses < bench.run(LRU, 12, trace, 2, 20).cost.misses


def test_typical_logits_are_as_local_as_their_source() -> None:
    random = np.random.default_rng(0)
    liking = random.standard_normal((1, 4, 8)) * 3.0
    streams = [(liking + random.standard_normal((40, 4, 8))).astype(np.float32) for _ in range(3)]
    made = typical(streams, layers=5, experts=16, steps=30, seed=0)
    assert made.shape == (30, 5, 16)
    assert locality(made, 2).again > 2 * locality(uniform(5, 16, 30, seed=0), 2).again


def test_forecasts_have_the_recall_that_is_asked_for() -> None:
    logits = uniform(4, 64, 30, seed=0)
    for recall in (0.75, 0.98):
        assert recall_of(logits, foretold(logits, 8, recall, seed=1), 8) == pytest.approx(recall, abs=0.02)


def test_chosen_are_the_largest() -> None:
    assert sorted(chosen(np.array([[1.0, 5.0, 3.0, 4.0]]), 2)[0].tolist()) == [1, 3]
