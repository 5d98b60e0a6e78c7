"""A device with less memory than promised: fewer slots, in a second attempt, or an error that says what is free."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.errors import CapacityError
from raymoe.experts.bay import Bay
from raymoe.experts.bays import make_bays
from raymoe.experts.host_store import HostStore
from raymoe.experts.link import MemoryLink
from raymoe.experts.loader import ThreadLoader
from raymoe.experts.slot_memory import DeviceMemory
from raymoe.placement.keeping import Keeper
from raymoe.types import ExpertKey
from tests.toy_models import save_toy

TOP_K = 3  # of the toy, which has two layers of eight experts


class SmallDevice(DeviceMemory):
    """Refuses what goes beyond its bytes; ``fragmented`` it refuses every second attempt too."""

    def __init__(self, room_bytes: int, *, fragmented: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.room_bytes = room_bytes
        self.fragmented = fragmented
        self.asked: list[int] = []

    def allocate(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self.asked.append(nbytes)
        if nbytes > self.room_bytes or self.fragmented:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nand much more")
        return torch.empty(shape, dtype=dtype, device=device)

    def free_bytes(self) -> int:
        return self.room_bytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_toy("qwen3_moe", tmp_path_factory.mktemp("toy")), "float32")


def bays(checkpoint: Checkpoint, memory: DeviceMemory, slots: int = 12) -> list[Bay]:
    loader = ThreadLoader(MemoryLink(), "edge")
    try:
        made, _ = make_bays(
            name="edge",
            layers=checkpoint.layers,
            keys=[ExpertKey(layer=layer, expert=expert) for layer in range(2) for expert in range(8)],
            budget_bytes=slots * expert_bytes(checkpoint),
            dtype=torch.float32,
            device=torch.device("cpu"),
            loader=loader,
            store=HostStore(checkpoint.read_expert),
            new_keeper=lambda: Keeper("lru", 2, 8, 4),
            memory=memory,
        )
        return made
    finally:
        loader.close()


def expert_bytes(checkpoint: Checkpoint) -> int:
    return checkpoint.layers[0].expert_bytes(torch.float32)


def test_what_fits_is_allocated_once(checkpoint: Checkpoint) -> None:
    size = expert_bytes(checkpoint)
    memory = SmallDevice(12 * size)
    (bay,) = bays(checkpoint, memory)
    assert (bay.pool.count, bay.shrunk, memory.asked) == (12, 0, [12 * size])


def test_a_smaller_device_gets_fewer_slots_and_says_so(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    size = expert_bytes(checkpoint)
    memory = SmallDevice(10 * size)
    with caplog.at_level(logging.WARNING):
        (bay,) = bays(checkpoint, memory)
    assert (bay.pool.count, bay.shrunk, len(bay.residency.expert_in)) == (9, 3, 9)  # nine tenths of what is free
    assert memory.asked == [12 * size, 9 * size]
    assert f'"edge" has no memory for 12 slots ({12 * size:,} bytes): {10 * size:,} bytes are free' in caplog.text
    assert "it goes on with 9" in caplog.text


def test_fewer_slots_than_a_token_needs_are_refused(checkpoint: Checkpoint) -> None:
    size = expert_bytes(checkpoint)
    with pytest.raises(CapacityError, match=r"too few for the experts of one token; lower devices\[\]\.slot_memory"):
        bays(checkpoint, SmallDevice(TOP_K * size))
    (bay,) = bays(checkpoint, SmallDevice(TOP_K * size), slots=2)
    assert bay.pool.count == 2  # as asked for: a call is computed in turns then


def test_a_second_refusal_is_an_error(checkpoint: Checkpoint) -> None:
    memory = SmallDevice(100 * expert_bytes(checkpoint), fragmented=True)
    with pytest.raises(CapacityError, match="not even 10 slots could be allocated; lower"):
        bays(checkpoint, memory)
    assert len(memory.asked) == 2


@given(room=st.integers(0, 20))
def test_never_more_than_the_device_has(checkpoint: Checkpoint, room: int) -> None:
    size = expert_bytes(checkpoint)
    try:
        (bay,) = bays(checkpoint, SmallDevice(room * size))
    except CapacityError:
        assert 0.9 * room < TOP_K
    else:
        assert bay.pool.nbytes <= room * size
        assert bay.pool.count + bay.shrunk == 12 and bay.pool.count >= TOP_K
