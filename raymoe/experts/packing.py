"""One expert's parameters in one piece of memory, the same way on the host and in a slot, so that one copy moves them.

Nothing is padded, so that a slot is exactly an expert; real models' parameters are multiples of 64 elements, so that
each begins where wide loads want it.
"""

import math
from functools import cached_property

import torch

from raymoe.checkpoint.checkpoint import ExpertTensors


class PackedExpert(dict[str, torch.Tensor]):
    """An expert's parameters by name, as views of ``flat``.

    Attributes:
        address: where it begins; itemsize: bytes of an element; numel: elements.
    """

    def __init__(self, views: ExpertTensors, flat: torch.Tensor) -> None:
        super().__init__(views)
        self.flat = flat
        self.address, self.itemsize, self.numel = flat.data_ptr(), flat.element_size(), flat.numel()

    @cached_property
    def is_pinned(self) -> bool:
        """Whether a device reads it by itself. Asked once: it costs as much as half a copy."""
        return self.flat.is_pinned()


class Packing:
    """Where each parameter of an expert lies.

    Args:
        shapes: of one expert's parameters.

    Attributes:
        numel: elements of one expert.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        end = 0
        for name in sorted(shapes):
            self._places[name] = end, tuple(shapes[name])
            end += math.prod(shapes[name])
        self.numel = end

    def views(self, flat: torch.Tensor) -> PackedExpert:
        """The parameters within ``flat`` [numel]."""
        views = {
            name: flat[start : start + math.prod(shape)].view(shape) for name, (start, shape) in self._places.items()
        }
        return PackedExpert(views, flat)

    def stacked(self, block: torch.Tensor) -> ExpertTensors:
        """The parameters of all slots of ``block`` [slots, numel], each as [slots, *shape]."""
        slots, stride = block.shape
        return {
            name: torch.as_strided(
                block,
                (slots, *shape),
                (stride, *(math.prod(shape[index + 1 :]) for index in range(len(shape)))),
                block.storage_offset() + start,
            )
            for name, (start, shape) in self._places.items()
        }
