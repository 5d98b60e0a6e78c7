"""Prefill and decode through the trunk: single sequences for every kind of cache, several together for most.

The generic path uses the very hooks that transformers' ``generate`` uses, so that each architecture's own
preparation of inputs applies. Architectures that override none of them take a direct call instead.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.generation import GenerationMixin

from raymoe.errors import RequestError
from raymoe.model.roomy import RoomyLayer, held_bytes, new_cache
from raymoe.model.rows import RowCaches


@dataclass(slots=True, weakref_slot=True)
class SequenceState:
    """Tokens so far ([1, n], or [rows, n]; on the direct path only the prompt's), their cache, and their length."""

    ids: torch.Tensor
    kwargs: dict[str, Any]
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A pass that has read some tokens on trial.

    Attributes:
        logits_TV: after each of them, float32.
        tokens: [1, T].
        outputs: of the model; None where the tokens are kept already.
    """

    logits_TV: torch.Tensor
    tokens: torch.Tensor
    outputs: Any


class Captured(Protocol):
    """Decodes single tokens of one sequence at a time, whose cache it keeps meanwhile (``model.captured``)."""

    def decode(self, state: SequenceState, token: int) -> torch.Tensor | None:
        """The logits after one more token; None where it can't."""
        ...

    def release(self, state: SequenceState) -> None:
        """Give a sequence its own cache again."""
        ...


LONG_CONTEXT = 4096  # tokens from which attention of a single new token is worth torch's threads


class Runner:
    """Runs the trunk. Not thread safe: one engine thread calls it.

    Attributes:
        joins: whether ``decode_together`` was proved for this trunk, by ``model.rows_proof``.
        reads_on, mixes, copies: whether ``read_on``, ``read_together`` and ``copied`` were, by ``model.pieces_proof``.
        captured: what replays the steps of single tokens; None where nothing does.

    Args:
        single_threaded_decode: keep torch to one thread for single tokens, where native kernels bring their own
            threads. What remains are tiny operations; a barrier around each costs more than it saves, and on a
            machine with busy cores a lot more.
    """

    def __init__(
        self, model: Any, *, single_threaded_decode: bool = False
    ) -> None:  # generation hooks come from a mixin that PreTrainedModel does not show
        self.model = model
        self.joins = self.reads_on = self.mixes = self.copies = False
        self.captured: Captured | None = None
        self.device: torch.device = model.device
        parameters = inspect.signature(model.forward).parameters
        self._threads = torch.get_num_threads()
        self._single_threaded_decode = single_threaded_decode
        self._takes_positions = "position_ids" in parameters
        self._keep_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._direct = (
            type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
            and type(model)._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
            and self._takes_positions
            and model._supports_default_dynamic_cache()
        )

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> tuple[torch.Tensor, SequenceState]:
        """Run a prompt; returns the logits after its last token ([vocabulary], float32) and the state."""
        ids = torch.tensor([tokens], device=self.device)
        kwargs: dict[str, Any] = {"use_cache": True, **self._keep_last}
        if self.model._supports_default_dynamic_cache():
            kwargs["past_key_values"] = self._new_cache()
        if self._takes_positions:
            kwargs["position_ids"] = torch.arange(len(tokens), device=self.device).unsqueeze(0)
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, attention_mask=None, **kwargs)
        outputs = self.model(**inputs, return_dict=True)
        kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs)
        return outputs.logits[0, -1].float(), SequenceState(ids, kwargs, len(tokens))

    @torch.inference_mode()
    def decode(self, state: SequenceState, token: int) -> torch.Tensor:
        """Run one more token; returns the logits after it. Mutates ``state``."""
        if self.captured is not None and self._direct:
            logits_V = self.captured.decode(state, token)
            if logits_V is not None:
                return logits_V
        with self._threads_for(state):
            return self._decode(state, token)

    def _own_cache(self, *states: SequenceState) -> None:
        """Let sequences have their own caches, up to date."""
        if self.captured is not None:
            for state in states:
                self.captured.release(state)

    def forward_one(self, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> Any:
        """The architecture's own forward of a token that follows a cache, for ``model.captured``."""
        return self._forward(ids, positions, cache)

    @torch.inference_mode()
    def decode_together(self, states: Sequence[SequenceState], tokens: Sequence[int]) -> torch.Tensor:
        """Run one more token of each of several sequences of any lengths, in one forward. Mutates ``states``.

        Returns the logits after each ([rows, vocabulary], float32); a row differs from the same token run alone by
        rounding: about 1e-6 of the logits in float32. Where it fails the states are lost.
        """
        return self.read_together(states, [[token] for token in tokens])

    @torch.inference_mode()
    def read_together(self, states: Sequence[SequenceState], pieces: Sequence[list[int]]) -> torch.Tensor:
        """The same with several tokens of some; returns the logits after the last of each. Mutates ``states``."""
        self._own_cache(*states)
        counts = [len(piece) for piece in pieces]
        caches = RowCaches([state.kwargs["past_key_values"] for state in states], counts)
        ids_T1 = torch.tensor([token for piece in pieces for token in piece], device=self.device).unsqueeze(1)
        places = [range(state.length, state.length + count) for state, count in zip(states, counts, strict=True)]
        positions_T1 = torch.tensor([place for row in places for place in row], device=self.device).unsqueeze(1)
        with self._threads_for(max(states, key=lambda state: state.length)), self._head_for(counts):
            outputs = self._forward(ids_T1, positions_T1, caches)
        for state, count in zip(states, counts, strict=True):
            state.length += count
        return outputs.logits[:, -1].float()

    @contextmanager
    def _head_for(self, counts: Sequence[int]) -> Iterator[None]:
        """Let the model's head see the last token of each row only: no others' logits are wanted."""
        if max(counts) == 1:
            yield
            return
        lasts = torch.tensor(counts, device=self.device).cumsum(0) - 1
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _module, args: (args[0][lasts], *args[1:]))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _threads_for(self, state: SequenceState) -> Iterator[None]:
        """One thread for torch while single tokens decode, where that was asked for."""
        if not self._single_threaded_decode or state.length >= LONG_CONTEXT:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def _decode(self, state: SequenceState, token: int) -> torch.Tensor:
        state.length += 1
        if self._direct:
            return self._decode_directly(state, token)
        state.ids = torch.cat([state.ids, torch.tensor([[token]], device=self.device)], dim=1)
        inputs = self.model.prepare_inputs_for_generation(state.ids, next_sequence_length=1, **state.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        state.kwargs = self.model._update_model_kwargs_for_generation(outputs, state.kwargs)
        return outputs.logits[0, -1].float()

    def _decode_directly(self, state: SequenceState, token: int) -> torch.Tensor:
        ids = torch.tensor([[token]], device=self.device)
        position = torch.tensor([[state.length - 1]], device=self.device)
        return self._forward(ids, position, state.kwargs["past_key_values"]).logits[0, -1].float()

    # --- a prompt in pieces --------------------------------------------------------------------------------

    def empty(self) -> SequenceState:
        """A sequence that has read nothing yet, for ``read_on`` and ``read_together``."""
        return SequenceState(torch.empty((1, 0), dtype=torch.long), {"past_key_values": self._new_cache()}, 0)

    @torch.inference_mode()
    def read_on(self, state: SequenceState, tokens: list[int]) -> torch.Tensor:
        """Run the next tokens of a prompt in one pass; returns the logits after the last. Mutates ``state``."""
        self._own_cache(state)
        positions = torch.arange(state.length, state.length + len(tokens), device=self.device).unsqueeze(0)
        ids = torch.tensor([tokens], device=self.device)
        logits = self._forward(ids, positions, state.kwargs["past_key_values"]).logits[0, -1].float()
        state.length += len(tokens)
        return logits

    @torch.inference_mode()
    def copied(self, state: SequenceState, length: int) -> SequenceState:
        """A sequence that begins with the first tokens of another, whose keys and values it gets copies of."""
        self._own_cache(state)
        cache, fresh = state.kwargs["past_key_values"], self.empty()
        for layer, mine in zip(cache.layers, fresh.kwargs["past_key_values"].layers, strict=True):
            assert type(layer) is RoomyLayer and type(mine) is RoomyLayer, "a cache that can't be cut"
            if layer.is_initialized:
                keys, values = layer.keys[..., :length, :], layer.values[..., :length, :]
                mine.update(keys, values)
        fresh.length = length
        return fresh

    def _new_cache(self) -> DynamicCache:
        return new_cache(self.model.config.get_text_config(decoder=True))

    # --- several tokens, of which some may not stay --------------------------------------------------------

    @torch.inference_mode()
    def read(self, state: SequenceState, tokens: list[int]) -> Trial:
        """Run several more tokens in one pass of a sequence made ready by ``model.trials``; ``keep`` must follow.

        Rows of one pass differ from tokens run alone by rounding: about 1e-6 of the logits in float32.
        """
        ids = torch.tensor([tokens], device=self.device)
        if len(tokens) == 1:
            return Trial(logits_TV=self.decode(state, tokens[0]).unsqueeze(0), tokens=ids, outputs=None)
        self._own_cache(state)
        with self._threads_for(state):
            outputs = self._try_directly(state, ids) if self._direct else self._try(state, ids)
        return Trial(logits_TV=outputs.logits[0, -len(tokens) :].float(), tokens=ids, outputs=outputs)

    @torch.inference_mode()
    def keep(self, state: SequenceState, trial: Trial, count: int) -> None:
        """Keep the first ``count`` tokens of a trial, one at least, and forget the others. Mutates ``state``."""
        cache = state.kwargs["past_key_values"]
        read = trial.tokens.shape[1]
        assert 1 <= count <= read, "the first token is no guess"
        if trial.outputs is not None:
            state.length += count
            if not self._direct:
                state.ids = torch.cat([state.ids, trial.tokens[:, :count]], dim=1)
                update = self.model._update_model_kwargs_for_generation
                state.kwargs = update(trial.outputs, state.kwargs, num_new_tokens=count)
        cache.crop(count - read)  # 0 is for windows, which record what they would forget

    def _try(self, state: SequenceState, ids: torch.Tensor) -> Any:
        count = ids.shape[1]
        kwargs = self.model._update_model_kwargs_for_generation({}, dict(state.kwargs), num_new_tokens=count - 1)
        kwargs |= dict.fromkeys(self._keep_last, count)
        everything = torch.cat([state.ids, ids], dim=1)
        inputs = self.model.prepare_inputs_for_generation(everything, next_sequence_length=count, **kwargs)
        return self.model(**inputs, return_dict=True)

    def _try_directly(self, state: SequenceState, ids: torch.Tensor) -> Any:
        count = ids.shape[1]
        positions = torch.arange(state.length, state.length + count, device=self.device).unsqueeze(0)
        return self._forward(ids, positions, state.kwargs["past_key_values"], last=count)

    # --- several sequences of equal length ---------------------------------------------------------------

    @property
    def takes_rows(self) -> bool:
        """Whether several sequences can run in lockstep: not where the architecture prepares its inputs itself."""
        return self._direct

    def start(self, rows: list[list[int]]) -> tuple[torch.Tensor, SequenceState]:
        """Run one prompt, or several of equal length in lockstep; returns the logits after each ([rows, vocabulary]).

        A single one takes the way that every architecture has; several raise RequestError where it takes no rows.
        """
        if len(rows) > 1:
            return self.prefill_rows(rows)
        logits_V, state = self.prefill(rows[0])
        return logits_V.unsqueeze(0), state

    def go_on(self, state: SequenceState, tokens: list[int]) -> torch.Tensor:
        """Run one more token of every row of what ``start`` began; returns the logits after each. Mutates ``state``."""
        return self.decode_rows(state, tokens) if len(tokens) > 1 else self.decode(state, tokens[0]).unsqueeze(0)

    @torch.inference_mode()
    def prefill_rows(self, rows: list[list[int]]) -> tuple[torch.Tensor, SequenceState]:
        """Run prompts of equal length in one forward; returns the logits after each ([rows, vocabulary], float32).

        Raises RequestError where the architecture takes single sequences only.
        """
        if not self._direct:
            raise RequestError(
                f"{type(self.model).__name__} prepares its inputs in a way of its own: run one sequence at a time, "
                f"not {len(rows)} in lockstep"
            )
        ids = torch.tensor(rows, device=self.device)
        cache = self._new_cache()
        state = SequenceState(ids, {"past_key_values": cache}, ids.shape[1])
        return self._forward_rows(ids, 0, cache), state

    @torch.inference_mode()
    def decode_rows(self, state: SequenceState, tokens: list[int]) -> torch.Tensor:
        """Run one more token of every row; returns the logits after each. Mutates ``state``."""
        self._own_cache(state)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        state.length += 1
        with self._threads_for(state):
            return self._forward_rows(ids, state.length - 1, state.kwargs["past_key_values"])

    def _forward_rows(self, ids: torch.Tensor, start: int, cache: DynamicCache) -> torch.Tensor:
        positions = torch.arange(start, start + ids.shape[1], device=self.device).expand_as(ids)
        return self._forward(ids, positions, cache).logits[:, -1].float()

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: DynamicCache, last: int = 1) -> Any:
        """The architecture's own forward of what follows a cache, with the logits after the last positions at least."""
        return self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **dict.fromkeys(self._keep_last, last),
        )

    def trim(self) -> None:
        """Give memory that no tensor takes back to the trunk's device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @staticmethod
    def held_bytes(state: SequenceState) -> int:
        """Bytes of memory that a sequence's cache takes, with its room to grow."""
        return held_bytes(tensors_within(state.kwargs.get("past_key_values")))

    @staticmethod
    def cache_bytes(state: SequenceState) -> int:
        """Bytes that a sequence's cache has in use."""
        return sum(tensor.nbytes for tensor in tensors_within(state.kwargs.get("past_key_values")))


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Every tensor within a cache: its layers keep them as attributes, lists or dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_within(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_within(item)]
    layers = getattr(value, "layers", None)
    if layers is not None:
        return [tensor for layer in layers for tensor in tensors_within(vars(layer))]
    return []
