"""Experts that a worker gives up: memory, slots and orders, and never under a call in hand."""

import numpy as np
import pytest
import torch

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import SchedulingConfig
from raymoe.errors import ExpertUnavailableError
from raymoe.experts.arena import HostArena
from raymoe.experts.call import ExpertCall, LoadOrder, expert_id
from raymoe.types import ExpertKey, StepId
from tests.toy_models import save_toy
from tests.unit.test_worker import all_keys, make

ONE, TWO = ExpertKey(layer=0, expert=1), ExpertKey(layer=0, expert=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two MoE layers of eight experts, in float32."""
    return open_checkpoint(save_toy("qwen3_moe", tmp_path_factory.mktemp("toy")), "float32")


def call(*experts: int, layer: int = 0) -> ExpertCall:
    return ExpertCall(
        layer=layer,
        hidden_RH=torch.ones(1, 32),
        experts_P=np.array(experts, dtype=np.int32),
        rows_P=np.zeros(len(experts), dtype=np.int32),
    )


@pytest.mark.parametrize("slots", [None, 16, 3])
@pytest.mark.parametrize("policy", ["on_demand", "on_demand_shadow"])
def test_memory_and_slots_are_free_and_calls_are_refused(
    checkpoint: Checkpoint, slots: int | None, policy: str
) -> None:
    worker = make(checkpoint, slots, scheduling=SchedulingConfig.model_validate({"policy": policy}))
    before = worker.compute(call(1, 3)).output_PH
    one_bytes = worker.store.nbytes // 16
    worker.disown([ONE, TWO])
    assert worker.store.nbytes == 14 * one_bytes and ONE not in worker.owned and len(worker.owned) == 14
    assert not worker.ready(0)[[1, 2]].any()
    assert (0, 1) not in worker.report().resident
    with pytest.raises(ExpertUnavailableError, match='"edge" does not own all experts asked for in layer 0'):
        worker.compute(call(1, 3))
    worker.own([ONE])
    assert torch.equal(worker.compute(call(1, 3)).output_PH, before)
    worker.close()


@pytest.mark.parametrize("slots", [None, 16])
def test_an_expert_of_the_call_in_hand_stays_until_it_has_ended(checkpoint: Checkpoint, slots: int | None) -> None:
    worker = make(checkpoint, slots)
    expected = worker.compute(call(1, 2)).output_PH
    begun = worker.begin(call(1, 2))
    worker.disown([ONE])
    assert expert_id(0, 1) in worker.store.experts
    assert torch.equal(worker.finish(begun).output_PH, expected)
    assert expert_id(0, 1) not in worker.store.experts
    worker.close()


def test_orders_for_an_expert_that_left_are_void(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, 1, scheduling=SchedulingConfig.model_validate({"policy": "on_demand_shadow"}))
    step = StepId(sequence=1, position=5)
    worker.order(LoadOrder(step=step, epoch=0, layer=1, experts=np.array([4, 5], dtype=np.int32)))
    key = ExpertKey(layer=1, expert=5)  # waits for the only slot
    worker.disown([key])
    worker.compute(call(4, layer=1))
    assert key not in worker.owned and expert_id(1, 5) not in worker.store.experts
    worker.forget(1)
    assert worker.compute(call(6, layer=1)).output_PH.shape == (1, 32)
    worker.close()


def test_what_was_never_owned_or_is_gone_already_changes_nothing(checkpoint: Checkpoint) -> None:
    worker = make(checkpoint, None)
    worker.disown([ONE])
    worker.disown([ONE])
    assert len(worker.owned) == 15
    worker.own([ONE])
    assert list(worker.owned) == all_keys(checkpoint)


class NoPinning:
    """Memory that no device reads."""

    def pin(self, address: int, nbytes: int) -> bool:
        return True

    def unpin(self, address: int) -> None:
        pass


def test_an_arena_gives_a_place_to_the_next_expert_of_its_size() -> None:
    arena = HostArena(NoPinning(), piece_bytes=4096)
    first = arena.place({"a": torch.ones(64)}, still_to_come=0)
    place, nbytes = first.flat.data_ptr(), arena.nbytes
    arena.take_back(first)
    second = arena.place({"a": torch.full((64,), 2.0)}, still_to_come=0)
    assert (second.flat.data_ptr(), arena.nbytes) == (place, nbytes)
    assert torch.equal(second["a"], torch.full((64,), 2.0))
