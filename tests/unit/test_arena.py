"""Host memory for a GPU: an expert in one piece, in pinned pieces of bounded size; and what happens without pinning."""

import logging

import pytest
import torch

from raymoe.experts.arena import PLACE_BYTES, HostArena
from raymoe.experts.host_store import HostStore
from raymoe.experts.packing import PackedExpert, Packing
from raymoe.types import ExpertKey


class PlayedPinning:
    """Pins ``most`` pieces."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.most = most
        self.pinned: dict[int, int] = {}

    def pin(self, address: int, nbytes: int) -> bool:
        if len(self.pinned) >= self.most:
            return False
        self.pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        del self.pinned[address]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"up_proj": torch.full((6, 4), value), "down_proj": torch.full((4, 6), -value)}


def test_experts_keep_their_values_and_lie_in_one_piece() -> None:
    arena = HostArena(PlayedPinning(), piece_bytes=1 << 12)
    experts = [arena.place(tensors(float(n)), 40 - n) for n in range(40)]
    for number, expert in enumerate(experts):
        assert isinstance(expert, PackedExpert)
        for name, tensor in tensors(float(number)).items():
            assert torch.equal(expert[name], tensor)
        assert expert.flat.numel() == 48 and expert.flat.is_contiguous()
        assert expert["down_proj"].data_ptr() == expert.flat.data_ptr(), "parameters by name"


def test_pieces_are_bounded_and_no_larger_than_needed() -> None:
    pinning = PlayedPinning()
    arena = HostArena(pinning, piece_bytes=4 * PLACE_BYTES)
    for number in range(6):
        arena.place(tensors(1.0), 5 - number)
    assert list(pinning.pinned.values()) == [4 * PLACE_BYTES, 2 * PLACE_BYTES]
    assert arena.nbytes == arena.pinned_bytes == 6 * PLACE_BYTES and arena.is_pinned
    arena.close()
    assert not pinning.pinned and arena.pinned_bytes == 0


def test_an_expert_larger_than_a_piece_gets_one_of_its_own() -> None:
    arena = HostArena(PlayedPinning(), piece_bytes=16)
    assert torch.equal(arena.place(tensors(3.0), 0)["up_proj"], tensors(3.0)["up_proj"])
    assert arena.nbytes == PLACE_BYTES


def test_where_pinning_is_refused_memory_is_ordinary_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    arena = HostArena(PlayedPinning(most=1), piece_bytes=2 * PLACE_BYTES)
    with caplog.at_level(logging.WARNING):
        experts = [arena.place(tensors(float(n)), 5 - n) for n in range(6)]
    assert [float(expert["up_proj"][0, 0]) for expert in experts] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not arena.is_pinned and arena.pinned_bytes == 2 * PLACE_BYTES
    assert len([record for record in caplog.records if "could not be pinned" in record.message]) == 1


def test_a_store_with_an_arena_reads_each_expert_once_into_it() -> None:
    read: list[ExpertKey] = []

    def read_expert(key: ExpertKey) -> dict[str, torch.Tensor]:
        read.append(key)
        return tensors(float(key.expert))

    store = HostStore(read_expert, HostArena(PlayedPinning()))
    keys = [ExpertKey(layer=0, expert=e) for e in range(3)]
    store.load(keys)
    store.load([*keys, ExpertKey(layer=1, expert=0)])
    assert len(read) == 4 and store.nbytes == 4 * 48 * 4
    assert all(isinstance(expert, PackedExpert) for expert in store.experts.values())


def test_slots_stacked_are_the_architectures_fused_parameters() -> None:
    packing = Packing({"up_proj": (6, 4), "down_proj": (4, 6)})
    block = torch.arange(3 * packing.numel, dtype=torch.float32).view(3, packing.numel)
    stacked = packing.stacked(block)
    for slot in range(3):
        views = packing.views(block[slot])
        for name in ("up_proj", "down_proj"):
            assert torch.equal(stacked[name][slot], views[name])
            assert stacked[name][slot].data_ptr() == views[name].data_ptr()
