"""Requests as they come in: what is wrong with one is said before anything waits for it."""

from dataclasses import dataclass

from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.engine.sequence import OnChunk, RequestId, Sequence
from raymoe.engine.text import Decoder, TextStream
from raymoe.errors import RequestError
from raymoe.model.kv_size import KvSize

MOST_PRIORITY = 1000  # to either side of 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Makes sequences of requests.

    Attributes:
        context: most tokens of prompt and answer together; None where the model names no limit.
        end_tokens: the model's ends of sequence.
        kv: memory of one sequence's cache.
        kv_budget_bytes: for all of them; None is without limit.
        at_once_tokens: most tokens of a prompt that are read at once.
    """

    tokenizer: Decoder | None
    defaults: SamplingDefaults
    end_tokens: frozenset[int]
    context: int | None
    vocabulary: int
    max_output_tokens: int
    kv: KvSize
    kv_budget_bytes: int | None
    at_once_tokens: int

    def take(
        self,
        request: RequestId,
        prompt: list[int],
        params: SamplingParams,
        on_chunk: OnChunk,
        defaults: SamplingDefaults | None,
        alpha: float | None,
        arrival_s: float,
    ) -> Sequence:
        """A sequence that may wait for its turn. Raises RequestError for a request that could never be answered."""
        self._check_prompt(prompt)
        if not -MOST_PRIORITY <= params.priority <= MOST_PRIORITY:
            raise RequestError(
                f"priority is {params.priority}, allowed is {-MOST_PRIORITY} (first) to {MOST_PRIORITY} (last)",
                param="priority",
            )
        max_tokens = self._max_tokens(prompt, params.max_tokens)
        return Sequence(
            id=request,
            prompt=list(prompt),
            max_tokens=max_tokens,
            kv_bytes=self._kv_bytes(len(prompt), max_tokens),
            end_tokens=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_tokens),
            sampler=Sampler(params, defaults or self.defaults),
            text=TextStream(self.tokenizer, params.stop),
            on_chunk=on_chunk,
            alpha=alpha,
            priority=params.priority,
            arrival_s=arrival_s,
        )

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        bad = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} is outside of the vocabulary (0 to {self.vocabulary - 1})", param="prompt"
            )
        if self.context is not None and len(prompt) >= self.context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with at least one to answer, the model's context of "
                f"{self.context} tokens is exceeded: shorten it",
                param="prompt",
            )

    def _max_tokens(self, prompt: list[int], wanted: int | None) -> int:
        """Most tokens of the answer: what was asked for, else all that there is room for."""
        room = self.max_output_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt))
        if wanted is not None:
            if not 1 <= wanted <= room:
                limit = (
                    f"the prompt of {len(prompt)} tokens leaves room for {room}"
                    if wanted > 0
                    else "allowed is 1 or more"
                )
                raise RequestError(f"max_tokens is {wanted}; {limit}", param="max_tokens")
            return wanted
        if self.kv_budget_bytes is not None:  # who names no number gets what there is memory for
            held = self.kv.tokens_within(self.kv_budget_bytes, self._at_once(len(prompt)))
            room = max(1, min(room, held - len(prompt)))
        return room

    def _kv_bytes(self, prompt: int, answer: int) -> int:
        needed = self.kv.at(prompt + answer, self._at_once(prompt))
        if self.kv_budget_bytes is not None and needed > self.kv_budget_bytes:
            raise RequestError(
                f"{prompt} prompt and {answer} new tokens need {needed:,} bytes of cache, "
                f"kv_memory is {self.kv_budget_bytes:,}: ask for fewer tokens or raise trunk.kv_memory",
                param="max_tokens",
            )
        return needed

    def _at_once(self, prompt: int) -> int:
        return min(prompt, self.at_once_tokens)
