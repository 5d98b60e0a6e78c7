"""A worker's shard of experts in the host memory of its node."""

from collections.abc import Callable, Iterable

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.arena import HostArena
from raymoe.experts.call import expert_id
from raymoe.experts.packing import PackedExpert
from raymoe.types import ExpertKey

ReadExpert = Callable[[ExpertKey], ExpertTensors]


class HostStore:
    """Experts by id, read straight from the checkpoint on the worker's node.

    Experts that the file holds in their final form are mapped, so workers on one node share their pages;
    others are converted into memory of their own. With an arena (CUDA) every expert lies there in one pinned piece, so
    that one copy brings it to the device, without staging or blocking.
    """

    def __init__(self, read_expert: ReadExpert, arena: HostArena | None = None) -> None:
        self._read_expert = read_expert
        self.arena = arena
        self.experts: dict[int, ExpertTensors] = {}
        self.nbytes = 0

    def load(self, keys: Iterable[ExpertKey], progress: Callable[[int], None] | None = None) -> None:
        """Read experts that are not here yet; ``progress`` is told how many are here."""
        missing = [key for key in dict.fromkeys(keys) if expert_id(key.layer, key.expert) not in self.experts]
        for number, key in enumerate(missing):
            tensors = self._read_expert(key)
            if self.arena is not None:
                tensors = self.arena.place(tensors, len(missing) - 1 - number)
            self.experts[expert_id(key.layer, key.expert)] = tensors
            self.nbytes += size_of(tensors)
            if progress is not None:
                progress(len(self.experts))

    def drop(self, keys: Iterable[ExpertKey]) -> None:
        """Forget experts. Nobody may read them any more; an arena keeps their place for others of their size."""
        for key in keys:
            tensors = self.experts.pop(expert_id(key.layer, key.expert), None)
            if tensors is not None:
                self.nbytes -= size_of(tensors)
                if self.arena is not None and isinstance(tensors, PackedExpert):
                    self.arena.take_back(tensors)


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of one expert's tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
