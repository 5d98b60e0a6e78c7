"""What host and device say to each other in a captured step, through memory that both see.

Neither relies on the order in which the other's writes arrive. The device's words replace a value that no arithmetic
gives; the host's carry the number of the turn that they belong to (``kernels.triton_kernels.fetch_kernel``).

K experts per token, H hidden.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from raymoe.experts.arena import CudaPinning, Pinning, pages

UNHEARD = 0xFFC0DEAD  # bits of a NaN; those that arithmetic gives end in zeros or ones
OPEN = 1 << 30  # a turn that is always later than the device's
LAST_TURN = 1 << 29  # before turns are counted from 1 again
CLOSED = 0
TYPES = {torch.float32: "<f4", torch.int64: "<i8"}


@dataclass(frozen=True, slots=True)
class Shared:
    """Memory that host and device both see: as a numpy array, and as a tensor of the device."""

    host: np.ndarray
    device: torch.Tensor


Share = Callable[[int, torch.dtype], Shared]
"""Makes so many elements of it: float32 or int64."""


class MappedMemory:
    """Pinned host memory under the address that the device knows it by: a kernel's small reads and writes go straight
    over the link, where a copy would queue behind experts.

    Attributes:
        pinning: what pins it.
    """

    def __init__(self, pinning: Pinning | None = None) -> None:
        self.pinning = pinning or CudaPinning()

    def __call__(self, elements: int, dtype: torch.dtype) -> Shared:
        """Raises RuntimeError where host memory can't be mapped."""
        memory = pages(dtype.itemsize * elements).view(dtype)
        if not self.pinning.pin(memory.data_ptr(), memory.nbytes):
            raise RuntimeError("host memory could not be mapped for the device")
        weakref.finalize(memory, self.pinning.unpin, memory.data_ptr())
        return Shared(memory.numpy(), torch.as_tensor(_Seen(memory), device="cuda"))


class _Seen:
    """Host memory described as a device's."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": TYPES[memory.dtype],
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


class Words(NamedTuple):
    """What a device tells of a row, in this order: its experts, their weights, and more where somebody asks for it.

    Attributes:
        top_k: experts, and as many weights.
        logits: of the layer's router.
        coming: logits of the next layer's router, as far as they can be foretold here.
        state: elements of the row itself.
    """

    top_k: int
    logits: int = 0
    coming: int = 0
    state: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.of_router + self.coming + self.state

    @property
    def of_router(self) -> int:
        """Those that tell what this layer's router says; they come first."""
        return 2 * self.top_k + self.logits

    def chosen(self, told_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 experts and float32 weights [..., K] of rows [..., words]."""
        k = self.top_k
        return told_W[..., :k].astype(np.int32), told_W[..., k : 2 * k]

    def router_logits(self, told_W: np.ndarray) -> np.ndarray | None:
        """[..., E]; None where they are not told."""
        return self._part(told_W, 2 * self.top_k, self.logits)

    def forecast(self, told_W: np.ndarray) -> np.ndarray | None:
        """The next layer's router logits [..., E]; None where they are not told."""
        return self._part(told_W, self.of_router, self.coming)

    def row(self, told_W: np.ndarray) -> np.ndarray | None:
        """[..., H]; None where it is not told."""
        return self._part(told_W, self.of_router + self.coming, self.state)

    @staticmethod
    def _part(told_W: np.ndarray, start: int, length: int) -> np.ndarray | None:
        return told_W[..., start : start + length] if length else None


class Dialogue:
    """One layer's: what the device tells, and what the host answers.

    Args:
        most: what the device tells at most. Where that includes the row, the host computes a part of it itself.

    Attributes:
        words: what it does tell; the most, until somebody says otherwise.
        told: where it does, on the host.
        there: the same memory on the device; decided, sums: words of the host's answer there, [2 K] and [H].
    """

    def __init__(self, share: Share, most: Words) -> None:
        top_k, sums = most.top_k, most.state
        self.words = most
        told, decided = share(most.total, torch.float32), share(2 * top_k, torch.int64)
        self.told, self.there = told.host, told.device
        self._bits = told.host.view(np.uint32)
        self._decided, self.decided = decided.host, decided.device
        self._value_W = np.zeros(2 * top_k, dtype=np.uint32)
        self._slots_K, self._weights_K = self._value_W[:top_k].view(np.int32), self._value_W[top_k:].view(np.float32)
        summed = share(sums, torch.int64) if sums else Shared(np.zeros(0, dtype=np.int64), torch.empty(0))
        self._sums, self.sums = summed.host, summed.device
        self.forget()

    def memory(self) -> dict[str, int]:
        """Where this is, as ``kernels.turns.TurnMemory`` names it; once it is known what is told."""
        return {
            "told": self._bits.ctypes.data,
            "words": self.words.total,
            "decided": self._decided.ctypes.data,
            "k": len(self._slots_K),
        }

    def heard(self) -> bool:
        """Whether all of it has arrived."""
        bits = self._bits[: self.words.total]
        return bits[-1] != UNHEARD and not (bits == UNHEARD).any()

    def forget(self) -> None:
        """What was told is of no more use."""
        self._bits[:] = UNHEARD

    def answer(self, turn: int, slots_K: np.ndarray, weights_K: np.ndarray, sum_H: np.ndarray | None = None) -> None:
        """Let the device go on.

        Args:
            turn: the device's, so that it takes no older answer for this one.
            slots_K: int32; -1 for the host's own experts. weights_K, sum_H: float32.
        """
        if sum_H is not None:
            np.bitwise_or(sum_H.view(np.uint32), turn << 32, out=self._sums, dtype=np.int64)
        self._slots_K[:] = slots_K
        self._weights_K[:] = weights_K
        np.bitwise_or(self._value_W, turn << 32, out=self._decided, dtype=np.int64)

    def pass_all(self, turn: int) -> None:
        """Let the device go on with nothing of use: the first slot at no weight."""
        self._decided[:] = turn << 32
        self._sums[:] = turn << 32
