"""Host memory: looked at while a shard is read, so that it is the worker who stops and not the kernel."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from raymoe.checkpoint.checkpoint import Checkpoint, ExpertTensors
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import DeviceConfig
from raymoe.errors import CapacityError, CheckpointError
from raymoe.experts.arena import HostArena
from raymoe.experts.build import make_worker
from raymoe.experts.host_memory import (
    FLOOR_BYTES,
    LOOK_BYTES,
    MemoryGuard,
    available_bytes,
    is_out_of_memory,
    own_groups,
    room_in,
)
from raymoe.experts.host_store import HostStore
from raymoe.types import ExpertKey
from tests.toy_models import save_toy

EXPERT = LOOK_BYTES  # every expert is worth a look
KEYS = [ExpertKey(layer=0, expert=expert) for expert in range(6)]


def free(*values: int) -> Callable[[], int]:
    """What is available at one look after the other, above the floor; the last one stays."""
    found: Iterator[int] = iter(values)
    last = [0]

    def available() -> int:
        last[0] = next(found, last[0])
        return FLOOR_BYTES + last[0]

    return available


def store(available: Callable[[], int], read: Callable[[ExpertKey], ExpertTensors] | None = None) -> HostStore:
    guard = MemoryGuard("edge", 1 << 30, [EXPERT], available)
    return HostStore(read or (lambda key: {"w": torch.full((2,), float(key.expert))}), guard=guard)


def test_a_shard_that_does_not_fit_is_refused_before_any_of_it_is_read() -> None:
    held = store(free(6 * EXPERT - 1))
    expected = (
        r'device "edge": its experts may take 1,073,741,824 bytes of host memory and take 0 bytes so far, but for '
        r"402,653,184 more its node has 671,088,639 available, of which 268,435,456 must stay free; "
        r"lower devices\[\]\.host_memory"
    )
    with pytest.raises(CapacityError, match=expected):
        held.load(KEYS)
    assert not held.experts


def test_a_shard_that_just_fits_is_read() -> None:
    held = store(free(6 * EXPERT))
    held.load(KEYS)
    assert len(held.experts) == 6


def test_memory_that_others_take_meanwhile_ends_the_reading_and_keeps_what_was_read() -> None:
    held = store(free(6 * EXPERT, 5 * EXPERT, 4 * EXPERT, EXPERT))
    with pytest.raises(CapacityError, match="take 16 bytes so far"):
        held.load(KEYS)
    assert sorted(held.experts) == [0, 1]
    held._guard = None
    held.load(KEYS)
    assert len(held.experts) == 6


def test_an_allocation_that_fails_is_told_in_the_same_words() -> None:
    def read(key: ExpertKey) -> ExpertTensors:
        if key.expert == 2:
            return {"w": torch.empty(1 << 55, dtype=torch.uint8)}
        return {"w": torch.zeros(2)}

    with pytest.raises(CapacityError, match='device "edge": its experts may take'):
        store(free(1 << 40), read).load(KEYS)


def test_other_errors_of_reading_stay_what_they_are() -> None:
    def read(_key: ExpertKey) -> ExpertTensors:
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError, match=r"^gone$"):
        store(free(1 << 40), read).load(KEYS)


def test_small_experts_are_looked_after_together() -> None:
    looks = []

    def available() -> int:
        looks.append(1)
        return 1 << 40

    guard = MemoryGuard("edge", None, [1 << 20], available)
    for _ in range(256):
        guard.check(0, 1 << 20)
    assert len(looks) == 256 // 64


def test_who_promised_nothing_is_told_so() -> None:
    with pytest.raises(CapacityError, match="may take what was free at the start of host memory"):
        MemoryGuard("edge", None, [EXPERT], lambda: 0).check(0, EXPERT)


class NoPinning:
    def pin(self, address: int, nbytes: int) -> bool:
        return True

    def unpin(self, address: int) -> None:
        pass


def test_a_whole_piece_of_pinned_memory_is_asked_for() -> None:
    arena = HostArena(NoPinning(), piece_bytes=1 << 20)
    assert arena.needs(1 << 10, 9) == 10 << 10
    arena.place({"w": torch.zeros(256)}, 9)
    assert arena.needs(1 << 10, 8) == 0
    assert arena.needs(1 << 21, 8) == 1 << 21


# --- a worker that can't read all -------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_toy("qwen3_moe", tmp_path / "toy"), "float32")


def test_a_worker_keeps_what_it_could_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(checkpoint, DeviceConfig(name="edge"))
    read = worker.store._read_expert

    def failing(key: ExpertKey) -> ExpertTensors:
        if key.expert == 4:
            raise CheckpointError("can't read expert 4")
        return read(key)

    monkeypatch.setattr(worker.store, "_read_expert", failing)
    with pytest.raises(CheckpointError, match="can't read expert 4"):
        worker.own(KEYS)
    assert worker.owned == tuple(KEYS[:4])
    assert worker.ready(0).tolist() == [True] * 4 + [False] * 4
    monkeypatch.undo()
    worker.own(KEYS)
    assert worker.owned == tuple(KEYS)
    worker.close()


# --- what there is --------------------------------------------------------------------------------------


def test_each_way_of_saying_that_there_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as torch_says:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(torch_says.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(errno.ENOMEM, "no"))
    assert not is_out_of_memory(OSError(errno.EIO, "no")) and not is_out_of_memory(RuntimeError("shape"))


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_control_groups_of_the_second_version(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(root / "pod" / "box", memory__max="1000\n", memory__current="700\n", memory__stat="anon 5\ninactive_file 50")
    membership.write_text("0::/pod/box\n")
    groups = own_groups(root, membership)
    assert groups == [root / "pod" / "box", root / "pod", root]
    assert [room_in(group) for group in groups] == [350, None, None]
    (root / "pod" / "box" / "memory.max").write_text("max\n")
    assert room_in(groups[0]) is None


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    write(
        root / "memory" / "box",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="900",
        memory__stat="total_inactive_file 100",
    )
    membership.write_text("5:cpu:/other\n4:memory:/box\n")
    groups = own_groups(root, membership)
    assert groups == [root / "memory" / "box", root / "memory"]
    assert [room_in(group) for group in groups] == [200, None]


def test_this_machine_has_some_memory() -> None:
    assert available_bytes() > 1 << 20
    assert own_groups(membership=Path("/nowhere")) == []
