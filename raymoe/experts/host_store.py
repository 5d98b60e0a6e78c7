"""A worker's shard of experts in the host memory of its node."""

from collections.abc import Callable, Iterable

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.arena import HostArena
from raymoe.experts.call import expert_id
from raymoe.experts.host_memory import MemoryGuard, is_out_of_memory
from raymoe.experts.packing import PackedExpert
from raymoe.types import ExpertKey

ReadExpert = Callable[[ExpertKey], ExpertTensors]


class HostStore:
    """Experts by id, read straight from the checkpoint on the worker's node.

    With an arena (CUDA) every expert lies there in one pinned piece, so that one copy brings it to the device, without
    staging or blocking.

    Args:
        guard: looks after the node's memory; None: nobody does.
    """

    def __init__(
        self, read_expert: ReadExpert, arena: HostArena | None = None, guard: MemoryGuard | None = None
    ) -> None:
        self._read_expert = read_expert
        self._guard = guard
        self.arena = arena
        self.experts: dict[int, ExpertTensors] = {}
        self.nbytes = 0

    def load(self, keys: Iterable[ExpertKey], progress: Callable[[int], None] | None = None) -> None:
        """Read experts that are not here yet; ``progress`` is told how many are here.

        Raises CheckpointError where one can't be read and CapacityError where memory is short. Those before it stay.
        """
        missing = [key for key in dict.fromkeys(keys) if expert_id(key.layer, key.expert) not in self.experts]
        if self._guard is not None and missing:
            self._guard.check(self.nbytes, sum(self._guard.expert_bytes[key.layer] for key in missing))
        for number, key in enumerate(missing):
            tensors = self._read(key, len(missing) - 1 - number)
            self.experts[expert_id(key.layer, key.expert)] = tensors
            self.nbytes += size_of(tensors)
            if progress is not None:
                progress(len(self.experts))

    def _read(self, key: ExpertKey, still_to_come: int) -> ExpertTensors:
        guard, arena = self._guard, self.arena
        if guard is None:
            tensors = self._read_expert(key)
            return tensors if arena is None else arena.place(tensors, still_to_come)
        needed = guard.expert_bytes[key.layer]
        more = needed if arena is None else arena.needs(needed, still_to_come)
        guard.check(self.nbytes, needed + more)  # it is converted, or placed, from a copy
        try:
            tensors = self._read_expert(key)
            return tensors if arena is None else arena.place(tensors, still_to_come)
        except (MemoryError, OSError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise guard.error(self.nbytes, needed + more) from error
            raise

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
