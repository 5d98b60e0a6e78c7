"""What is read again is what was read first, or an error that names file, tensor, difference and the way out."""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.digests import Digests, digest_of
from raymoe.checkpoint.opening import SINGLE_FILE, open_checkpoint
from raymoe.errors import CheckpointError
from raymoe.experts.host_store import HostStore
from raymoe.types import ExpertKey
from tests.toy_models import save_toy

KEY, OTHER = ExpertKey(layer=1, expert=3), ExpertKey(layer=0, expert=5)


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tensor per expert, and one for all."""
    return save_toy(request.param, tmp_path / "model") / SINGLE_FILE


def opened(file: Path) -> Checkpoint:
    return open_checkpoint(file.parent, "float32")


def overwrite(file: Path, checkpoint: Checkpoint, key: ExpertKey, byte: int = 0x5A) -> str:
    """Change one byte of an expert where it lies in the file; returns the tensor's name."""
    name, row = checkpoint.layers[key.layer].pieces(key.expert)[-1]
    info = checkpoint.info(name)
    start = info.start + (0 if row is None else row * info.nbytes // info.shape[0])
    with file.open("r+b") as stream:
        stream.seek(start + 2)
        old = stream.read(1)
        stream.seek(start + 2)
        stream.write(bytes([old[0] ^ byte]))
    return name


@given(st.binary(min_size=1, max_size=64), st.integers(0, 63), st.integers(1, 255))
def test_a_changed_byte_changes_the_digest(content: bytes, place: int, flip: int) -> None:
    changed = bytearray(content)
    changed[place % len(content)] ^= flip
    one, other = (torch.tensor(list(data), dtype=torch.uint8) for data in (content, bytes(changed)))
    assert digest_of(one) == zlib.crc32(content)
    assert digest_of(one) != digest_of(other)


def test_the_first_digest_of_a_piece_stays() -> None:
    digests = Digests()
    assert digests.record(("a", None), 7) == 7
    assert digests.record(("a", None), 8) == 7
    assert digests.of([("a", None)]) == (7,)
    assert digests.of([("a", None), ("a", 0)]) is None


def test_reading_again_gives_the_same(path: Path) -> None:
    checkpoint = opened(path)
    first, again = checkpoint.read_expert(KEY), checkpoint.read_expert(KEY)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_expert_that_was_changed_in_place_is_not_read_again(path: Path) -> None:
    checkpoint = opened(path)
    store = HostStore(checkpoint.read_expert)
    store.load([KEY, OTHER])
    store.drop([KEY])
    name = overwrite(path, checkpoint, KEY)
    expected = rf"model\.safetensors: {name}.* is not what it was .*\(CRC-32 \w{{8}}, then \w{{8}}\); put the file back"
    with pytest.raises(CheckpointError, match=expected):
        store.load([KEY])
    overwrite(path, checkpoint, KEY)  # undone
    store.load([KEY])


def test_a_change_before_the_first_read_is_told_by_the_files_time(path: Path) -> None:
    checkpoint = opened(path)
    overwrite(path, checkpoint, KEY)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"was changed before model\..* was first read"):
        checkpoint.read_expert(KEY)


def test_a_new_time_alone_is_no_change_of_what_is_known(path: Path) -> None:
    checkpoint = opened(path)
    checkpoint.read_expert(KEY)
    os.utime(path, ns=(1, 1))
    checkpoint.read_expert(KEY)


def test_a_replaced_file_is_read_as_it_was(path: Path) -> None:
    checkpoint = opened(path)
    other = save_toy("qwen3_moe", path.parent.parent / "other", seed=1) / SINGLE_FILE
    expected = checkpoint.read_expert(KEY)
    os.replace(other, path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.read_expert(KEY).items())


def test_a_truncated_file_that_came_back_is_read_on(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = opened(path)
    expected = checkpoint.read_expert(KEY)
    backup = shutil.copy2(path, path.with_suffix(".backup"))
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=r"is truncated: model\..* ends at byte .*, the file has 100"):
        checkpoint.read_expert(KEY)
    os.replace(backup, path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.read_expert(KEY).items())
    assert "could be read again" in caplog.text


def test_a_disk_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = opened(path)

    def failing(*_: Any) -> int:
        raise OSError(116, os.strerror(116))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"can't read model\..* from .*: Stale file handle; check the disk"):
        checkpoint.read_expert(KEY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_any_more(path: Path) -> None:
    checkpoint = opened(path)
    path.chmod(0)
    checkpoint.read_expert(KEY)  # it is open
    with pytest.raises(CheckpointError, match=r"can't open .*Permission denied"):
        opened(path)


def test_a_truncated_file_is_not_mapped(path: Path) -> None:
    checkpoint = open_checkpoint(path.parent, "float32", map_weights=True)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=r"is truncated: "):
        checkpoint.read_expert(KEY)


# --- between processes ----------------------------------------------------------------------------------


def test_another_process_reads_the_same_or_refuses(path: Path) -> None:
    one = opened(path)
    one.read_expert(KEY)
    known = one.expert_digests([KEY, OTHER])
    assert list(known) == [KEY]
    other = opened(path)
    other.expect_experts(known)
    other.read_expert(KEY)
    name = overwrite(path, one, KEY)
    late = opened(path)
    late.expect_experts(known)
    with pytest.raises(CheckpointError, match=rf"{name}.* is not what it was"):
        late.read_expert(KEY)


@pytest.mark.parametrize("order", [list, reversed])
def test_two_that_have_read_different_bytes_can_not_agree(path: Path, order: Callable[[Any], Any]) -> None:
    one = opened(path)
    one.read_expert(KEY)
    overwrite(path, one, KEY)
    other = opened(path)
    other.read_expert(KEY)
    first, second = order([one, other])
    with pytest.raises(CheckpointError, match="is not what it was"):
        first.expect_experts(second.expert_digests([KEY]))
