"""A worker's shard of experts in the host memory of its node."""

from collections.abc import Callable, Iterable

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.call import expert_id
from raymoe.types import ExpertKey

ReadExpert = Callable[[ExpertKey], ExpertTensors]


class HostStore:
    """Experts by id, read straight from the checkpoint on the worker's node.

    Experts that the file holds in their final form are mapped, so workers on one node share their pages;
    others are converted into memory of their own. With ``pin`` (CUDA) every tensor lies in pinned memory, so
    that copies to the device need no staging and do not block.
    """

    def __init__(self, read_expert: ReadExpert, *, pin: bool = False) -> None:
        self._read_expert = read_expert
        self._pin = pin
        self.experts: dict[int, ExpertTensors] = {}
        self.nbytes = 0

    def load(self, keys: Iterable[ExpertKey], progress: Callable[[int], None] | None = None) -> None:
        """Read experts that are not here yet; ``progress`` is told how many are here."""
        for key in keys:
            identifier = expert_id(key.layer, key.expert)
            if identifier in self.experts:
                continue
            tensors = self._read_expert(key)
            if self._pin:
                tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self.experts[identifier] = tensors
            self.nbytes += size_of(tensors)
            if progress is not None:
                progress(len(self.experts))

    def drop(self, keys: Iterable[ExpertKey]) -> None:
        """Forget experts."""
        for key in keys:
            tensors = self.experts.pop(expert_id(key.layer, key.expert), None)
            if tensors is not None:
                self.nbytes -= size_of(tensors)


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of one expert's tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())
