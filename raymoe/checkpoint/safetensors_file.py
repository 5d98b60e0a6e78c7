"""Lazy reads from one safetensors file.

Opening costs the header. A read takes exactly the tensor's (or the rows') bytes by ``pread``; a view maps
them without a copy and shares the pages with every process on the node. The safetensors library hides the
byte offsets that row reads, exact accounting and shared mappings need, so the (tiny) header is parsed here;
the library still writes our files.

A file that is replaced goes on being read as it was, through its open descriptor. One that is changed in place, or
can't be read any more, is noticed (``has_changed``, errors of ``read``), and opened again when it has come back.
"""

import json
import math
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from raymoe.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: ``start`` is absolute in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsFile:
    """One open file: ``tensors`` lists its contents, ``read`` and ``view`` fetch them.

    ``bytes_read`` counts what ``read`` took from the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._mapping: mmap.mmap | None = None
        self._mapping_lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"can't open {path}: {error.strerror}") from error
        try:
            self.tensors = parse_header(path, self._fd)
            self._stamp = _stamp(self._fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Tensors from ``view`` keep their mapping alive."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def has_changed(self) -> bool:
        """Whether somebody wrote to the file since it was opened, as its size and time say."""
        return _stamp(self._fd) != self._stamp

    def reopen(self) -> None:
        """Read from what lies at the path now; it counts as changed from then on.

        Raises CheckpointError where that can't be opened or is another file by its header; nothing has changed then.
        """
        if self._fd < 0:
            raise CheckpointError(f"{self.path} was closed")
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"can't open {self.path}: {error.strerror}") from error
        try:
            if parse_header(self.path, fd) != self.tensors:
                raise CheckpointError(f"{self.path} was replaced by a file with other tensors")
            os.dup2(fd, self._fd, inheritable=False)  # at once: other threads may be reading
        finally:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Read one tensor, or its ``row`` along the first dimension (kept, as size 1), into fresh memory.

        Raises CheckpointError where the file can't be read, or ends before.
        """
        shape, start, nbytes = self._range(name, row)
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        target = buffer.numpy().data
        done = 0
        while done < nbytes:
            try:
                got = os.preadv(self._fd, [target[done:]], start + done)
            except OSError as error:
                raise CheckpointError(
                    f"can't read {name} from {self.path}: {error.strerror}; check the disk or the mount"
                ) from error
            if got == 0:
                raise self._truncated(name, start + nbytes)
            done += got
        self.bytes_read += nbytes
        return buffer.view(self.tensors[name].dtype).view(shape)

    def view(self, name: str, row: int | None = None) -> torch.Tensor:
        """Map one tensor, or one row of it, without reading it now. The result must not be written to.

        Who touches it when the file has been truncated since is ended by the system (SIGBUS).

        Raises CheckpointError where the file ends before already.
        """
        shape, start, nbytes = self._range(name, row)
        info = self.tensors[name]
        if nbytes == 0 or start % info.dtype.itemsize:
            return self.read(name, row)
        if os.fstat(self._fd).st_size < start + nbytes:
            raise self._truncated(name, start + nbytes)
        with self._mapping_lock:  # transformers loads with several threads, and a second mapping would be read anew
            if self._mapping is None:
                # copy-on-write access only because torch warns about read-only buffers; pages stay shared
                self._mapping = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        count = nbytes // info.dtype.itemsize
        return torch.frombuffer(self._mapping, dtype=info.dtype, count=count, offset=start).view(shape)

    def _truncated(self, name: str, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated: {name} ends at byte {end:,}, the file has {os.fstat(self._fd).st_size:,}; "
            "download or copy it again"
        )

    def _range(self, name: str, row: int | None) -> tuple[tuple[int, ...], int, int]:
        info = self.tensors[name]
        if row is None:
            return info.shape, info.start, info.nbytes
        row_bytes = info.nbytes // info.shape[0]
        return (1, *info.shape[1:]), info.start + row * row_bytes, row_bytes


def _stamp(fd: int) -> tuple[int, int]:
    """A file's size and the time of its last change."""
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def parse_header(path: Path, fd: int) -> dict[str, TensorInfo]:
    """Read and check the header. Raises CheckpointError for a truncated, oversized or inconsistent one."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path} is not a complete safetensors file: its header claims {length:,} bytes, the file has {size:,}; "
            "download or copy it again"
        )
    try:
        header = json.loads(os.pread(fd, length, 8))
        entries = {name: _entry(item, 8 + length) for name, item in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error
    for name, info in entries.items():
        if info.start + info.nbytes > size:
            raise CheckpointError(
                f"{path} is truncated: {name} ends at byte {info.start + info.nbytes:,}, the file has {size:,}; "
                "download or copy it again"
            )
    return entries


def _entry(item: dict, data_start: int) -> TensorInfo:
    if item["dtype"] not in DTYPES:
        raise ValueError(f"dtype {item['dtype']} is not supported")
    begin, end = item["data_offsets"]
    info = TensorInfo(
        dtype=DTYPES[item["dtype"]], shape=tuple(item["shape"]), start=data_start + begin, nbytes=end - begin
    )
    if not all(type(number) is int and number >= 0 for number in (begin, end, *info.shape)):
        raise ValueError(f"shape {list(info.shape)} or offsets {[begin, end]} are no natural numbers")
    if math.prod(info.shape) * info.dtype.itemsize != info.nbytes:
        raise ValueError(f"shape {list(info.shape)} and {info.nbytes:,} bytes do not agree")
    return info
