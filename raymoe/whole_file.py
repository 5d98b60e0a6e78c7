"""Files that are written whole or not at all: a full disk leaves what was there before, and no half of anything."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymoe.errors import ConfigError


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file, text in UTF-8. Raises ConfigError where that can't be done; see ``whole``.

    Args:
        mode: of a new file, before the process's mask.
    """
    with whole(path, mode) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A name to write to meanwhile, with the same suffix; what is there at the end takes the file's place.

    A file that exists keeps its mode; what is no plain file (a pipe, /dev/stdout) is written to directly.

    Raises ConfigError where it can't be written, for a full disk for example; then nothing has changed.
    """
    target = path.resolve()  # a link stays one
    if target.exists() and not target.is_file():
        with _told(path):
            yield target
        return
    unfinished = target.with_name(f".unfinished-{os.getpid()}-{target.name}")
    try:
        with _told(path):
            os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
            if target.exists():
                shutil.copymode(target, unfinished)
            yield unfinished
            _flush(unfinished)
            os.replace(unfinished, target)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"can't write {path}: {error.strerror or error}; nothing was changed: free space, or name another place"
        ) from error


def _flush(path: Path) -> None:
    """To the disk, since some file systems find out only then that it is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
