"""A fingerprint of a checkpoint's weights, cheap enough to take at every start."""

import hashlib
import os
from pathlib import Path

from raymoe.checkpoint.checkpoint import Checkpoint

SAMPLES = 64  # per file, evenly spaced: training moves nearly all weights, so that any place tells
SAMPLE_BYTES = 4096  # a page; 60 GB in 5 GB files are 768 reads


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hex SHA-256 of every tensor's name, dtype and shape, and of each file's size and a sample of its bytes.

    Files are told apart by their order, not their names, so a copy elsewhere has the same fingerprint.
    """
    digest = hashlib.sha256()
    for file in checkpoint.weight_files:
        for name, info in sorted(file.tensors.items()):
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\n".encode())
        digest.update(sample(file.path))
    return digest.hexdigest()


def sample(path: Path) -> bytes:
    """The file's size, and pieces of it from beginning to end."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        starts = [place * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1) for place in range(SAMPLES)]
        pieces = [os.pread(file.fileno(), SAMPLE_BYTES, start) for start in starts]
    return size.to_bytes(8, "little") + b"".join(pieces)
