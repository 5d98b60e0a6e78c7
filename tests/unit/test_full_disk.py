"""A full disk: what was there stays, no half of a file takes its name, and the error says what to do."""

import json
import logging
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raymoe.checkpoint.synth import write_synthetic
from raymoe.engine.profile import write_tensors
from raymoe.errors import ConfigError
from raymoe.kernels import building, native
from raymoe.observe.trace import MAIN, Recording, Span
from raymoe.serve.key_source import add_key, read_keys
from raymoe.simulation.synthetic import synthetic
from raymoe.simulation.trace import save
from raymoe.types import StepId
from raymoe.whole_file import whole, write_whole
from tests.simulated import shape

ROOM_BYTES = 16 << 10


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which no file can become larger than some kilobytes: a disk of that size, or a limit."""
    directory = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_BYTES}", "none", str(directory)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield directory
        subprocess.run(["umount", str(directory)], check=True)
        return
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, limits[1]))
    yield directory
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def disk(small_disk: Path) -> Iterator[Path]:
    """The same, empty at the beginning of each test."""
    yield small_disk
    for file in small_disk.iterdir():
        file.unlink()


def save_trace(file: Path) -> None:
    save(synthetic(shape(layers=8, experts=64), 200), file)


def save_tensors(file: Path) -> None:
    write_tensors(file, {"noise": np.random.default_rng(0).random(8192)}, {"format": "test"})


def draw_diagram(file: Path) -> None:
    from raymoe.observe.diagram import draw

    spans = tuple(
        Span(
            lane="compute",
            kind="layer",
            start_s=float(number),
            end_s=number + 0.5,
            layer=0,
            step=StepId(sequence=1, position=number + 1),
        )
        for number in range(4)
    )
    draw(
        [Recording(role=MAIN, spans=spans, dropped=0, emulated_link=False, offset_s=0.0, pid=1)],
        file,
        title="t",
        steps=2,
    )


def write_text(file: Path) -> None:
    write_whole(file, json.dumps(list(range(8192))))


WRITERS: dict[str, Callable[[Path], None]] = {
    "text.json": write_text,
    "trace.npz": save_trace,
    "profile.safetensors": save_tensors,
    "diagram.png": draw_diagram,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_leaves_what_was_there(disk: Path, name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > ROOM_BYTES
    file = disk / name
    file.write_bytes(b"before")
    with pytest.raises(ConfigError, match=rf"can't write .*{name}: .*; nothing was changed: free space"):
        WRITERS[name](file)
    assert file.read_bytes() == b"before"
    assert list(disk.iterdir()) == [file]


def test_a_new_file_does_not_come_to_be(disk: Path) -> None:
    with pytest.raises(ConfigError, match="can't write"):
        save_tensors(disk / "p.safetensors")
    assert list(disk.iterdir()) == []


def test_keys_stay_usable(disk: Path) -> None:
    file = disk / "keys.yaml"
    first = add_key(file, "alice")
    filler = b"# " + b"x" * (ROOM_BYTES - file.stat().st_size - 5000) + b"\n"
    with file.open("ab") as out:
        out.write(filler)
    with pytest.raises(ConfigError, match="can't write"):
        for number in range(200):
            add_key(file, f"user-{number}")
    keys = read_keys(file)
    assert keys[0].name == "alice" and first
    assert list(disk.iterdir()) == [file]


def test_a_synthetic_checkpoint_is_not_half_there(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1 << 40}))
    with pytest.raises(ConfigError, match=r"can't write .*safetensors"):
        write_synthetic(disk, like="qwen3_moe", size_bytes=3_000_000)
    assert [file.name for file in disk.iterdir()] == []


def test_kernels_that_can_not_be_stored_are_done_without(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    building.native_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.load_native(1) is None
    finally:
        building.native_library.cache_clear()
        for directory in disk.iterdir():
            directory.rmdir()
    assert "did not build" in caplog.text and "decoding goes through torch" in caplog.text


# --- where nothing is full --------------------------------------------------------------------------------


def test_a_file_keeps_its_mode_and_a_link_its_target(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    write_whole(tmp_path / "secret", "x", 0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_what_is_no_plain_file_is_written_to(tmp_path: Path) -> None:
    write_whole(Path("/dev/null"), "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_whoever_gives_up_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "file") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
