"""Keys and values that grow in place.

transformers' own layer makes a new tensor for every token, which copies all that came before: at a few hundred tokens
that takes longer than the attention. Here there is room for some more tokens, and copying is rare.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 64  # by which a cache grows: it is copied once in so many tokens, and half of that is unused on average


class RoomyLayer(DynamicLayer):
    """Full attention's keys and values [B, heads, tokens, d], in memory for a whole number of blocks of tokens.

    ``keys`` and ``values`` are views of what is in use, and may be cut or replaced from outside: what is not a view of
    the memory taken last, from its beginning, is copied at the next update.
    """

    keys: Any
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys_at = 0
        self._values_at = 0
        self._last: tuple[int, int, int, int] = (0, 0, 0, 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all that there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, count = self.get_seq_length(), key_states.shape[-2]
        self._reserve(length, count, key_states, value_states)
        self.keys[..., length:, :] = key_states
        self.values[..., length:, :] = value_states
        return self.keys, self.values

    def extend(self, count: int, shape: tuple[int, int], like: torch.Tensor) -> list[tuple[int, int, int, int]]:
        """Lengthen by tokens of one sequence, whose keys and values the caller puts in place.

        Args:
            shape: heads and width, of both keys and values.
            like: a tensor of the type and device for these.

        Returns:
            For each token: addresses of keys and values, elements from head to head, and the token's position.
        """
        heads, width = shape
        if self.is_initialized:
            keys, values = self.keys, self.values
            length = keys.shape[2]
            known_keys, known_values, known_length, capacity = self._last
            if id(keys) == known_keys and id(values) == known_values and length == known_length < capacity - count + 1:
                self.keys, self.values = _longer(keys, length + count), _longer(values, length + count)
                return self._places(length, count, capacity, width)
        length = self.get_seq_length()
        if not self._has_room(self.keys, self._keys_at, length + count) or not self._has_room(
            self.values, self._values_at, length + count
        ):
            empty = like.new_empty((1, heads, 0, width))
            if not self.is_initialized:
                self.lazy_initialization(empty, empty)
            self._reserve(length, count, empty, empty)
        else:
            self.keys, self.values = _longer(self.keys, length + count), _longer(self.values, length + count)
        return self._places(length, count, self.keys.stride(1) // width, width)

    def _places(self, length: int, count: int, capacity: int, width: int) -> list[tuple[int, int, int, int]]:
        """Of the tokens appended last; and note what was made for them, to be known again at the next step."""
        self._last = (id(self.keys), id(self.values), length + count, capacity)
        stride = capacity * width
        return [(self._keys_at, self._values_at, stride, length + token) for token in range(count)]

    def _reserve(self, length: int, count: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make ``keys`` and ``values`` longer by ``count``; what is new in them is not set."""
        self._last = (0, 0, 0, 0)
        if self._has_room(self.keys, self._keys_at, length + count):
            self.keys = _longer(self.keys, length + count)
        else:
            self.keys = _moved(self.keys, keys, length, count)
            self._keys_at = self.keys.data_ptr()
        if self._has_room(self.values, self._values_at, length + count):
            self.values = _longer(self.values, length + count)
        else:
            self.values = _moved(self.values, values, length, count)
            self._values_at = self.values.data_ptr()

    @staticmethod
    def _has_room(tensor: torch.Tensor | None, taken_at: int, length: int) -> bool:
        """Whether a tensor lies in the memory that was taken for it, with room for so many tokens."""
        if tensor is None or tensor.dim() != 4 or not taken_at or tensor.data_ptr() != taken_at:
            return False
        batch, heads, _, width = tensor.shape
        capacity = tensor.stride(1) // width if width else 0
        whole = batch * heads * capacity * width * tensor.element_size()
        packed = tensor.stride() == (heads * capacity * width, capacity * width, width, 1)
        return packed and length <= capacity and tensor.untyped_storage().nbytes() == whole


def _longer(tensor: torch.Tensor, length: int) -> torch.Tensor:
    batch, heads, _, width = tensor.shape
    return tensor.as_strided((batch, heads, length, width), tensor.stride())


def _moved(old: torch.Tensor | None, new: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """New memory with what is there so far, as long as both together."""
    batch, heads, _, width = new.shape
    room = -(-(length + count) // ROOM_TOKENS) * ROOM_TOKENS
    taken = new.new_empty((batch, heads, room, width))
    if length:
        assert old is not None
        taken[:, :, :length] = old
    return taken[:, :, : length + count]


def new_cache(config: Any) -> DynamicCache:
    """A cache for one sequence, or several in lockstep, of a model with this text configuration."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory that these take, room to grow included; what several share counts once."""
    storages = {(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in tensors}
    return sum(storages.values())
