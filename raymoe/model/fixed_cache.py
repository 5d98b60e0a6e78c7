"""A KV cache of fixed size for one sequence, so that the decode step always finds it in the same place.

Only caches that grow by one entry per token have such a form: windows move, and recurrent states change as a whole.
"""

from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from raymoe.kernels.gpu import GpuKernels, power_of_two
from raymoe.model.roomy import RoomyLayer

LEAST_CAPACITY = 512  # tokens; a graph is captured anew whenever the capacity grows, and it doubles then


def why_not_fixed(cache: Any) -> str | None:
    """Why a sequence's cache can't be kept in a fixed one; None where it can."""
    if not isinstance(cache, DynamicCache) or not cache.layers:
        return f"its cache is a {type(cache).__name__}"
    other = next((layer for layer in cache.layers if type(layer) not in (DynamicLayer, RoomyLayer)), None)
    return None if other is None else f"its cache has layers of type {type(other).__name__}"


def grown(cache: DynamicCache) -> list[Any]:
    """Its layers, each of which holds all entries so far."""
    return list(cache.layers)


def capacity_for(tokens: int) -> int:
    """Entries of a fixed cache that is to take so many tokens."""
    return max(LEAST_CAPACITY, power_of_two(tokens))


class FixedCache(StaticCache):
    """Takes a sequence's entries over, and gives them back.

    Attributes:
        position: int64 [1, 1] on the device, the place of the token that is being read.
    """

    def __init__(self, config: Any, capacity: int, device: torch.device) -> None:
        super().__init__(config=config, max_cache_len=capacity)
        self.capacity = capacity
        self.position = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._scratch: dict[tuple[int, int], torch.Tensor] = {}
        self._counting: list[Any] = []

    @property
    def static(self) -> list[Any]:
        """The layers; transformers' own type knows of layers without entries too."""
        return list(self.layers)

    @property
    def is_plain(self) -> bool:
        """Whether every layer keeps all of its entries, each in its place."""
        return all(type(layer) is StaticLayer for layer in self.layers)

    def take(self, cache: DynamicCache, length: int) -> None:
        """Copy the entries of a sequence with so many tokens."""
        for mine, theirs in zip(self.static, grown(cache), strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            mine.keys[:, :, :length].copy_(theirs.keys)
            mine.values[:, :, :length].copy_(theirs.values)
            mine.cumulative_length.fill_(length)

    def give_back(self, cache: DynamicCache, length: int) -> None:
        """Put all entries of a sequence that has so many tokens by now into its own cache again."""
        for mine, theirs in zip(self.static, grown(cache), strict=True):
            theirs.keys = mine.keys[:, :, :length].clone()
            theirs.values = mine.values[:, :, :length].clone()

    def at(self, position: int) -> None:
        """The next step reads the token in this place, and writes its entries there."""
        self.position.fill_(position)

    def note_counting(self) -> None:
        """After a step: which layers count their entries as they go, since transformers' own attention fills them."""
        position = int(self.position)
        counting = [layer for layer in self.static if int(layer.cumulative_length) != position]
        self._counting = [*counting, self.static[0]] if counting else []

    def begin_step(self) -> None:
        """Set the counts that a step relies on; enqueued as a part of it."""
        for layer in self._counting:
            layer.cumulative_length.copy_(self.position.view(()))

    def scratch(self, heads: int, width: int) -> torch.Tensor:
        """What attention over this cache needs beside it; the same memory for all layers of one form."""
        key = (heads, width)
        if key not in self._scratch:
            elements = GpuKernels.scratch_elements(heads, width, self.capacity)
            self._scratch[key] = torch.empty(elements, dtype=torch.float32, device=self.position.device)
        return self._scratch[key]
