"""Keys and values in the caches of transformers: what a model's cache holds of some positions, for another's.

A shadow that overwrites its own keys and values by the model's stays close to it. For that, a cache is a list of
*places*: tensors with one axis that counts positions, the newest last. They are the keys and values of attention (full,
sliding, latent), the keys of its indexers, and the inputs that a short convolution still looks back on. What else a
layer holds (recurrent states, compressed windows) mixes many positions and can't be overwritten by position.

Position p is the place in the sequence, as in ``Runner``; all layers are at the same length. B rows in lockstep.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from raymoe.errors import FrameError
from raymoe.model.runner import tensors_within

POSITION_AXIS = {"keys": -2, "values": -2, "indexer_keys": 1, "idx_keys": -2, "indexer_position_ids": -1}
"""Attributes of transformers' attention layers that grow with the sequence, and the axis along which they do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor that holds something of each of the last positions.

    Attributes:
        name: attribute of the layer, and the key within it where that is a dict.
        axis: counts positions.
        most: positions that are held at most; None where all are.
    """

    name: tuple[str, int | None]
    tensor: torch.Tensor
    axis: int
    most: int | None

    def held_of(self, tokens: int) -> int:
        """How many of the last ``tokens`` positions are held once these are the newest."""
        return tokens if self.most is None else min(tokens, self.most)

    def shape_of(self, tokens: int) -> list[int]:
        """Shape of what is held of the last ``tokens`` positions."""
        shape = list(self.tensor.shape)
        shape[self.axis] = self.held_of(tokens)
        return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEntries:
    """What a cache holds of some positions, copied: for each layer and place [.., positions, ..], flattened.

    Windows hold no more than their length of them: the newest.
    """

    tokens: int
    flat: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of all entries: the widest of the cache's, so that nothing is lost."""
        return self.flat.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """How far a cache can be aligned with another model's.

    Attributes:
        layers: of the cache.
        alignable: layers with entries by position.
        own: layers with a state beside these (or nothing else), which alignment leaves as it is.
    """

    layers: int = 0
    alignable: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether entries are all there is: an aligned cache is the other model's."""
        return bool(self.alignable) and not self.own

    @property
    def words(self) -> str:
        """Which alignment that is, for people."""
        if self.full:
            return "tokens, and keys and values of all layers"
        if not self.alignable:
            return "tokens only: the cache keeps nothing by position"
        return (
            f"tokens, and keys and values in {len(self.alignable)} of {self.layers} layers; in {len(self.own)} "
            "a state that is not kept by position (recurrent, compressed) stays the shadow's own"
        )


def abilities(cache: Any) -> Abilities:
    """What of a cache can be aligned. Known from the end of the prefill on, and the same for each cache of a model."""
    if not isinstance(cache, Cache):
        return Abilities()
    alignable, own = set(), set(_states_of_cache(cache))
    for index, layer in enumerate(cache.layers):
        placed = {id(place.tensor) for place in places(layer, vars(layer))}
        states = {id(tensor) for tensor in tensors_within(vars(layer)) if tensor.is_floating_point()}
        if placed:
            alignable.add(index)
        if states - placed:
            own.add(index)
    layers = max(len(cache.layers), *(index + 1 for index in own), 0)
    return Abilities(layers=layers, alignable=tuple(sorted(alignable)), own=tuple(sorted(own)))


def places(layer: Any, held: Mapping[str, Any]) -> list[Place]:
    """The places of a layer, in a fixed order; ``held`` are its attributes, or some of them as they were once."""
    found = []
    if isinstance(layer, DynamicLayer):
        most = layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
        for name, axis in POSITION_AXIS.items():
            tensor = held.get(name)
            shared = name == "values" and tensor is held.get("keys")  # one tensor for both, where values are keys
            if tensor is not None and tensor.is_floating_point() and not shared:
                found.append(Place(name=(name, None), tensor=tensor, axis=axis, most=most))
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for key, tensor in held["conv_states"].items():
            if tensor is not None and tensor.is_floating_point():
                found.append(Place(name=("conv_states", key), tensor=tensor, axis=-1, most=tensor.shape[-1]))
    return found


def length_of(cache: Cache) -> int:
    """Positions that a cache has seen; 0 where it has no attention, which alone counts them."""
    return max((layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)), default=0)


# --- shipping -------------------------------------------------------------------------------------------


@torch.inference_mode()
def entries(cache: Cache, start: int, end: int) -> KvEntries:
    """A copy of what the cache holds of positions ``start`` to ``end - 1``.

    Raises:
        ValueError: a window has moved beyond them; take entries before the next tokens are read.
    """
    length, parts = length_of(cache), []
    if not 0 <= start < end <= length:
        raise ValueError(f"entries of positions {start} to {end - 1} of a cache that holds {length}")
    for index, layer in enumerate(cache.layers):
        for place in places(layer, vars(layer)):
            count, held = place.held_of(end - start), place.tensor.shape[place.axis]
            before = end - count - (length - held)
            if before < 0:
                raise ValueError(f"layer {index} holds {held} positions before {length}, not {end - count} any more")
            parts.append(place.tensor.narrow(place.axis, before, count).reshape(-1))
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return KvEntries(tokens=end - start, flat=torch.cat([part.to(dtype) for part in parts]))


def nbytes(cache: Cache, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of packed entries of ``tokens`` positions, as any cache of the same architecture and rows has them."""
    found = (place for layer in cache.layers for place in places(layer, vars(layer)))
    return sum(prod(place.shape_of(tokens)) for place in found) * dtype.itemsize


def pack(packed: KvEntries) -> memoryview:
    """The entries' bytes, without a copy where they lie on the host."""
    return packed.flat.cpu().view(torch.uint8).numpy().data


def unpack(buffer: bytes | memoryview, tokens: int, dtype: torch.dtype) -> KvEntries:
    """Entries from bytes, copied. Whether there are as many as the architecture has, ``align`` finds out.

    Raises:
        FrameError: the bytes are no whole number of elements.
    """
    raw = np.frombuffer(buffer, dtype=np.uint8)
    if not len(raw) or len(raw) % dtype.itemsize:
        raise FrameError(f"{len(raw):,} bytes are no keys and values in {dtype}")
    flat = torch.empty(len(raw) // dtype.itemsize, dtype=dtype)
    flat.view(torch.uint8).numpy()[:] = raw
    return KvEntries(tokens=tokens, flat=flat)


# --- alignment ------------------------------------------------------------------------------------------


@torch.inference_mode()
def align(cache: Cache, start: int, others: KvEntries, *, append: bool = False) -> bool:
    """Overwrite positions from ``start`` on by another model's entries; what has slid out of a window is skipped.

    Args:
        append: positions beyond the cache's length are appended, where entries are all that it holds.

    Returns:
        Whether the cache holds all of these positions now; False where some lie beyond its length.

    Raises:
        FrameError: they are not the entries of so many positions in this architecture. Nothing has changed then.
    """
    length, end = length_of(cache), start + others.tokens
    extend = append and start <= length < end and abilities(cache).full
    for index, place, part in list(parts_of(cache, others)):
        overwrite(place, length, part, end)
        if extend:
            _extend(cache.layers[index], place, length, part, end)
    return end <= length or extend


def parts_of(cache: Cache, others: KvEntries) -> Iterator[tuple[int, Place, torch.Tensor]]:
    """Entries by place: index of the layer, place in it, what the other model holds there. Errors as in ``align``."""
    expected = nbytes(cache, others.tokens, others.dtype) // others.dtype.itemsize
    if others.tokens < 1 or others.flat.numel() != expected:
        raise FrameError(
            f"keys and values of {others.tokens} positions are {expected:,} elements here, {others.flat.numel():,} "
            "came: both sides must run the same model with as many rows"
        )
    offset = 0
    for index, layer in enumerate(cache.layers):
        for place in places(layer, vars(layer)):
            shape = place.shape_of(others.tokens)
            part = others.flat[offset : offset + prod(shape)].view(shape)
            offset += prod(shape)
            yield index, place, part


def overwrite(place: Place, length: int, part: torch.Tensor, end: int) -> None:
    """Write the entries of positions before ``end`` to a place whose newest position is ``length - 1``."""
    mine, theirs = length - place.tensor.shape[place.axis], end - part.shape[place.axis]
    low, high = max(mine, theirs), min(length, end)
    if low < high:
        target = place.tensor.narrow(place.axis, low - mine, high - low)
        target.copy_(part.narrow(place.axis, low - theirs, high - low))


def _extend(layer: Any, place: Place, length: int, part: torch.Tensor, end: int) -> None:
    """Append the entries of positions ``length`` to ``end - 1``."""
    first = end - part.shape[place.axis]
    fresh = part.narrow(place.axis, max(length - first, 0), end - max(length, first)).to(place.tensor)
    grown = fresh if first > length else torch.cat([place.tensor, fresh], dim=place.axis)
    kept = place.held_of(grown.shape[place.axis])
    grown = grown.narrow(place.axis, grown.shape[place.axis] - kept, kept)
    attribute, key = place.name
    if key is None:
        setattr(layer, attribute, grown)
    else:
        getattr(layer, attribute)[key] = grown
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = end


def _states_of_cache(cache: Cache) -> list[int]:
    """Layers whose state the cache keeps itself, in a list of its own."""
    lists = [value for name, value in vars(cache).items() if name != "layers" and isinstance(value, list)]
    return [index for states in lists for index, state in enumerate(states) if tensors_within(state)]
