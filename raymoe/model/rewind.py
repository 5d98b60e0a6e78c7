"""Taking a sequence back by some tokens: a shadow that ran ahead must, where the model's token is another.

Three kinds of state, three ways back:

- Keys and values of full attention are cut off.
- A sliding window forgets what it needs when it goes back. transformers' own recording keeps it (switched on after
  the prefill, which cuts to the window); it would grow with every token, so it is cut to the window and the depth.
- All else (recurrent states, convolutions, compressed windows, and whatever the class of a cache keeps itself) is
  copied before each step. transformers can't take these back, and for some says that it could.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from raymoe.model.kv import POSITION_AXIS, KvEntries, align, overwrite, parts_of, places
from raymoe.model.runner import SequenceState

PLAIN = (type(None), bool, int, float, str, type, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """A sequence before a step: all of its state but what is cut off on the way back."""

    length: int
    ids: torch.Tensor
    kwargs: dict[str, Any]
    cache: dict[str, Any]
    layers: list[dict[str, Any]]


class Rewind:
    """Takes one sequence back, by ``depth`` steps at most. Made after its prefill.

    Args:
        state: of the sequence; changed in place.
        depth: steps that can be taken back; each costs a copy of the states that can't be cut off.

    Attributes:
        possible: whether the sequence can be taken back; where it can't, steps run as if there were no ``Rewind``.
    """

    def __init__(self, state: SequenceState, depth: int) -> None:
        self._state = state
        self._depth = depth
        self._marks: deque[_Mark] = deque(maxlen=depth)
        cache: Any = state.kwargs.get("past_key_values")
        self._cache = cache
        self.possible = depth > 0 and isinstance(cache, Cache) and _is_copyable(_attributes(cache))
        for layer in cache.layers if self.possible else []:
            if type(layer) is DynamicSlidingWindowLayer:
                layer.activate_past_recording()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Round each forward of the sequence. One that raises is taken back at once, however far it has come."""
        if not self.possible:
            yield
            return
        self._trim()
        mark = self._mark()
        self._marks.append(mark)
        try:
            yield
        except BaseException:
            self.back_to(mark.length)
            raise

    def back_to(self, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Raises:
            ValueError: that lies ahead, or further back than the depth.
        """
        if length == self._state.length and (not self._marks or self._marks[-1].length < length):
            return
        mark = next((mark for mark in self._marks if mark.length == length), None)
        if mark is None:
            reach = f"{self._marks[0].length} to {self._state.length}" if self._marks else f"{self._state.length} only"
            raise ValueError(f"can't take the sequence back to {length} tokens: within reach are {reach}")
        while self._marks and self._marks[-1].length >= length:
            self._marks.pop()
        self._restore(mark)

    @torch.inference_mode()
    def align(self, start: int, others: KvEntries, *, append: bool = False) -> bool:
        """As ``kv.align``, for the states to go back to as well.

        Args:
            append: only where the runner takes rows; other architectures keep the tokens beside the cache.
        """
        end = start + others.tokens
        copies = [
            (mark.length, index, place)
            for mark in self._marks
            for index, saved in enumerate(mark.layers)
            for place in places(self._cache.layers[index], saved)
        ]
        parts = {(index, place.name): part for index, place, part in parts_of(self._cache, others)} if copies else {}
        for length, index, place in copies:
            overwrite(place, length, parts[index, place.name], end)
        held = align(self._cache, start, others, append=append)
        if held and end > self._state.length:
            self._state.length = end
            self._marks.clear()  # what the model has read is never taken back
        return held

    def _mark(self) -> _Mark:
        state = self._state
        return _Mark(
            length=state.length,
            ids=state.ids,
            kwargs=dict(state.kwargs),
            cache=_copy(_without(vars(self._cache), ["layers"]), {}),
            layers=[_copy(_without(vars(layer), _cut_off(layer)), {}) for layer in self._cache.layers],
        )

    @torch.inference_mode()
    def _restore(self, mark: _Mark) -> None:
        """The mark's copies become the cache's own, so a mark serves once."""
        for layer, saved in zip(self._cache.layers, mark.layers, strict=False):  # some caches grow by layers
            for name in _cut_off(layer):
                _cut(layer, name, mark.length)
            vars(layer).update(saved)
        vars(self._cache).update(mark.cache)
        self._state.ids, self._state.kwargs, self._state.length = mark.ids, mark.kwargs, mark.length

    def _trim(self) -> None:
        """Forget what no way back needs. A view: the next step copies it anyway."""
        for layer in self._cache.layers:
            if type(layer) is DynamicSlidingWindowLayer and layer.keys is not None and layer.values is not None:
                kept = layer.sliding_window - 1 + self._depth
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]


def _attributes(cache: Cache) -> list[dict[str, Any]]:
    return [_without(vars(cache), ["layers"]), *(vars(layer) for layer in cache.layers)]


def _cut_off(layer: Any) -> list[str]:
    """Attributes that are cut off on the way back; a subclass of the sliding layer may not record."""
    if not isinstance(layer, DynamicLayer) or (layer.is_sliding and type(layer) is not DynamicSlidingWindowLayer):
        return []
    return [name for name in POSITION_AXIS if getattr(layer, name, None) is not None]


def _cut(layer: DynamicLayer, name: str, length: int) -> None:
    """Cut one attribute. Full layers by its own length: a step may have left the layer between two of them."""
    tensor: torch.Tensor = getattr(layer, name)
    axis = POSITION_AXIS[name]
    kept = tensor.shape[axis] - (layer.get_seq_length() - length) if layer.is_sliding else length
    setattr(layer, name, tensor.narrow(axis, 0, kept))


def _without(attributes: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in names}


def _copy(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """A deep copy; what is one tensor under two names stays one."""
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _copy(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item, copies) for item in value)
    return value


def _is_copyable(value: Any) -> bool:
    """Whether ``_copy`` copies all that may change: an object of a kind unknown here may hide more."""
    if isinstance(value, dict):
        return all(_is_copyable(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_copyable(item) for item in value)
    return isinstance(value, (torch.Tensor, *PLAIN))
