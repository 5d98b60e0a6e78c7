"""Answers that must follow a grammar: which tokens may come next.

Grammars are written in llguidance's Lark form, in which ``%json {...}`` stands for a JSON schema. The state of one
answer follows the tokens that were chosen and nothing else: so it is the same whatever rows share a step, whether
drafts were read along, and where the answer is read again after its cache was lost.

V vocabulary.
"""

import threading
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from raymoe.errors import RequestError

MOST_GRAMMAR_CHARS = 100_000  # compiling one takes time by its size, before a request is taken


class GrammarState:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._consumed = 0

    def allowed_V(self, answer: list[int], vocabulary: int) -> torch.Tensor:
        """Which tokens may follow ``answer``, of which what was told before is the beginning; bool[V].

        Raises RequestError where the grammar grows beyond the library's limits.
        """
        if self._matcher.consume_tokens(answer[self._consumed :]):
            self._consumed = len(answer)
            bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the grammar can't go on: {_first_line(self._matcher.get_error())}", param="grammar")
        allowed_V = torch.zeros(vocabulary, dtype=torch.bool)
        known = min(vocabulary, len(bias))
        allowed_V[:known] = bias[:known] > 0
        return allowed_V


class Grammars:
    """Makes the state of grammars for one model's tokens. From any thread.

    Args:
        tokenizer: the model's, or None where it has none.
        end_tokens: of which one ends an answer whose grammar is complete.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._end_tokens = end_tokens
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def begin(self, grammar: str) -> GrammarState:
        """The state before the first token. Raises RequestError that tells what is wrong with ``grammar``."""
        if len(grammar) > MOST_GRAMMAR_CHARS:
            raise RequestError(
                f"the grammar or schema has {len(grammar):,} characters, allowed are {MOST_GRAMMAR_CHARS:,}",
                param="grammar",
            )
        matcher = LLMatcher(self._tokens_of_the_model(), grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"this grammar or schema can't be used: {_told(matcher.get_error())}", param="grammar")
        state = GrammarState(matcher)
        state.allowed_V([], self.vocabulary)  # some turn out to allow nothing only when it comes to a token
        return state

    def _tokens_of_the_model(self) -> LLTokenizer:
        """Built at the first use, as it takes about a second for a large vocabulary."""
        if self._tokenizer is None or not self._end_tokens:
            what = "tokenizer" if self._tokenizer is None else "end-of-sequence token"
            raise RequestError(f"this model has no {what}, so its answers can't follow a grammar", param="grammar")
        with self._lock:
            if self._tokens is None:
                size = max(self.vocabulary, len(self._tokenizer))
                try:
                    self._tokens = from_tokenizer(self._tokenizer, size, sorted(self._end_tokens))
                except ValueError as error:
                    raise RequestError(
                        f"this model's tokenizer can't be used with grammars: {error}", param="grammar"
                    ) from error
            return self._tokens


def _told(message: str) -> str:
    """An error of the library without the place in a text that clients never see."""
    return _first_line(message).partition(": ")[2] or _first_line(message)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "unknown error"
