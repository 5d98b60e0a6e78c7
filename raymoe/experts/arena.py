"""Host memory that a GPU's copy engine reads by itself: pinned, in pieces of bounded size.

Where pinning is refused (a limit on locked memory, a system that has none) pieces are ordinary memory; copies from them
go through a staging ring (``experts.cuda_stream``), about four times slower.
"""

import contextlib
import logging
import mmap
from typing import Protocol

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.packing import PackedExpert, Packing

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 30  # at most, unless one expert is more: a piece that is refused costs no more than that
PLACE_BYTES = 256  # experts begin at multiples of it


class Pinning(Protocol):
    """Locks host memory for a device."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Whether that worked."""
        ...

    def unpin(self, address: int) -> None:
        """The inverse."""
        ...


class CudaPinning:
    """By CUDA's own registration of memory, which unlike torch's allocator rounds nothing up."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Register with every context of this process."""
        done = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)) == 0
        if not done:
            forget_error()
        return done

    def unpin(self, address: int) -> None:
        """Give it back."""
        if int(torch.cuda.cudart().cudaHostUnregister(address)) != 0:
            forget_error()


def forget_error() -> None:
    """CUDA reports a refusal once more with the next thing that is asked of it: let that be this."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def pages(nbytes: int) -> torch.Tensor:
    """Host memory in pages of its own, as pinning takes whole ones; uint8, zeros."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a third less time to pin, on an H100's host
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class HostArena:
    """Takes experts up, one behind the other.

    Attributes:
        nbytes, pinned_bytes: allocated, and how much of that is pinned.
    """

    def __init__(self, pinning: Pinning, piece_bytes: int = PIECE_BYTES) -> None:
        self._pinning = pinning
        self._piece_bytes = piece_bytes
        self._room = torch.empty(0, dtype=torch.uint8)
        self._pinned: list[torch.Tensor] = []
        self._refused = False
        self._free: dict[int, list[torch.Tensor]] = {}  # by bytes, places of experts that were given up
        self.nbytes = 0
        self.pinned_bytes = 0

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is."""
        return self.nbytes == self.pinned_bytes

    def place(self, tensors: ExpertTensors, still_to_come: int) -> PackedExpert:
        """A copy of an expert in the arena.

        Args:
            tensors: all of one precision, on any device.
            still_to_come: experts as large as this one that will follow; says how large a new piece should be.
        """
        packing = Packing({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        dtype = next(iter(tensors.values())).dtype
        flat = self._take(packing.numel * dtype.itemsize, still_to_come).view(dtype)
        expert = packing.views(flat)
        for name, tensor in tensors.items():
            expert[name].copy_(tensor)
        return expert

    def take_back(self, expert: PackedExpert) -> None:
        """The place of an expert that nobody reads any more goes to the next one of its size."""
        place = expert.flat.view(torch.uint8)
        self._free.setdefault(place.numel(), []).append(place)

    def close(self) -> None:
        """Unpin everything. The experts stay readable."""
        for piece in self._pinned:
            self._pinning.unpin(piece.data_ptr())
        self._pinned.clear()
        self.pinned_bytes = 0

    def _take(self, nbytes: int, still_to_come: int) -> torch.Tensor:
        if free := self._free.get(nbytes):
            return free.pop()
        padded = -(-nbytes // PLACE_BYTES) * PLACE_BYTES
        if self._room.numel() < padded:
            most = max(1, self._piece_bytes // padded)
            self._room = self._piece(padded * min(most, 1 + max(0, still_to_come)))
        taken, self._room = self._room[:nbytes], self._room[padded:]
        return taken

    def _piece(self, nbytes: int) -> torch.Tensor:
        piece = pages(nbytes)
        self.nbytes += nbytes
        if not self._refused and self._pinning.pin(piece.data_ptr(), nbytes):
            self._pinned.append(piece)
            self.pinned_bytes += nbytes
        elif not self._refused:
            self._refused = True
            log.warning(
                "%d MB of host memory could not be pinned (%d MB are): copies to the device go through a staging "
                "buffer, which is slower; raise the limit on locked memory (ulimit -l)",
                nbytes >> 20,
                self.pinned_bytes >> 20,
            )
        return piece
