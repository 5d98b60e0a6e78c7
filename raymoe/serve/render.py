"""Answers as OpenAI's JSON: whole ones, and chunks of a stream.

``usage.routing`` is an extension: what the answer's expert calls cost, and how much of it was substituted. The same
stands beside ``usage`` as ``routing``, for streams without a chunk of usage.
"""

import time
import uuid
from typing import Any, Protocol

from raymoe.engine.request import Chunk, TokenLogprob
from raymoe.serve.batch import Batch

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Renderer(Protocol):
    """Renders one answer."""

    def whole(self, batch: Batch) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def chunk(self, batch: Batch) -> dict[str, Any]:
        """What a batch adds to a stream. Batches come in order."""
        ...

    def usage(self, batch: Batch) -> dict[str, Any]:
        """The stream's last chunk where usage was asked for: no choices."""
        ...


class _Envelope:
    """The fields around ``choices`` that stay the same for one answer."""

    def __init__(self, model: str, prefix: str, kind: str, *, include_usage: bool) -> None:
        self._fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._include_usage = include_usage

    def whole(self, choice: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """A finished answer."""
        assert batch.last is not None
        body = {**self._fields, "object": self._kind, "choices": [choice], "usage": usage_json(batch.last)}
        return body | routing_json(batch.last)

    def chunk(self, kind: str, choices: list[dict[str, Any]], batch: Batch) -> dict[str, Any]:
        """A piece of an answer."""
        body = {**self._fields, "object": kind, "choices": choices} | routing_json(batch.last)
        return body | {"usage": None} if self._include_usage else body

    def usage(self, kind: str, batch: Batch) -> dict[str, Any]:
        """The chunk that carries usage."""
        assert batch.last is not None
        return {**self._fields, "object": kind, "choices": [], "usage": usage_json(batch.last)}


class ChatRenderer:
    """/v1/chat/completions."""

    def __init__(self, model: str, *, include_usage: bool = False, logprobs: bool = False) -> None:
        self._envelope = _Envelope(model, "chatcmpl", "chat.completion", include_usage=include_usage)
        self._logprobs = logprobs
        self._begun = False

    def whole(self, batch: Batch) -> dict[str, Any]:
        message = {"role": "assistant", "content": batch.text, "refusal": None}
        return self._envelope.whole(self._choice({"message": message}, batch), batch)

    def chunk(self, batch: Batch) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        if batch.text or not self._begun:
            delta["content"] = batch.text
        self._begun = True
        return self._envelope.chunk("chat.completion.chunk", [self._choice({"delta": delta}, batch)], batch)

    def usage(self, batch: Batch) -> dict[str, Any]:
        return self._envelope.usage("chat.completion.chunk", batch)

    def _choice(self, content: dict[str, Any], batch: Batch) -> dict[str, Any]:
        logprobs = {"content": chat_logprobs(batch), "refusal": None} if self._logprobs else None
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason(batch)}


class CompletionRenderer:
    """/v1/completions."""

    KIND = "text_completion"

    def __init__(self, model: str, *, include_usage: bool = False, logprobs: bool = False) -> None:
        self._envelope = _Envelope(model, "cmpl", self.KIND, include_usage=include_usage)
        self._logprobs = logprobs
        self._offset = 0

    def whole(self, batch: Batch) -> dict[str, Any]:
        return self._envelope.whole(self._choice(batch), batch)

    def chunk(self, batch: Batch) -> dict[str, Any]:
        return self._envelope.chunk(self.KIND, [self._choice(batch)], batch)

    def usage(self, batch: Batch) -> dict[str, Any]:
        return self._envelope.usage(self.KIND, batch)

    def _choice(self, batch: Batch) -> dict[str, Any]:
        logprobs = self._columns(batch) if self._logprobs else None
        return {"index": 0, "text": batch.text, "logprobs": logprobs, "finish_reason": finish_reason(batch)}

    def _columns(self, batch: Batch) -> dict[str, Any]:
        """The older API's log probabilities: a list per quantity. Offsets count characters of the tokens' texts."""
        texts = batch.token_texts
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in batch.logprobs:
            top: dict[str, float] = {}
            for token, logprob in item.top:
                top.setdefault(texts[token], logprob)  # pieces of characters look alike; the likeliest is kept
            columns["tokens"].append(texts[item.token_id])
            columns["token_logprobs"].append(item.logprob)
            columns["top_logprobs"].append(top)
            columns["text_offset"].append(self._offset)
            self._offset += len(texts[item.token_id])
        return columns


def chat_logprobs(batch: Batch) -> list[dict[str, Any]]:
    """Every token's log probability with its alternatives."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = batch.token_texts[token]
        # a token that is a piece of a character has no text of its own, so its bytes can't be told from it
        return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}

    def tops(item: TokenLogprob) -> list[dict[str, Any]]:
        return [entry(token, logprob) for token, logprob in item.top]

    return [{**entry(item.token_id, item.logprob), "top_logprobs": tops(item)} for item in batch.logprobs]


def finish_reason(batch: Batch) -> str | None:
    """Why the answer ended, in its last batch."""
    return batch.last.finish_reason if batch.last is not None else None


ROUTING_FIELDS = (
    "substituted",
    "substituted_gate_mass",
    "hit_rate",
    "hits",
    "misses",
    "hosted",
    "loads",
    "bytes_loaded",
    "recall",
    "drafted",
    "accepted",
)
"""What an answer tells of its ``Routing``."""


def usage_json(last: Chunk) -> dict[str, Any]:
    """Tokens of prompt, answer and both, and what the expert calls cost; of the chunk that finishes an answer."""
    assert last.usage is not None
    tokens = {name: getattr(last.usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return tokens | routing_json(last)


def routing_json(last: Chunk | None) -> dict[str, Any]:
    """The cost of a finished answer's expert calls; nothing before it is finished."""
    if last is None or last.routing is None:
        return {}
    return {"routing": {name: getattr(last.routing, name) for name in ROUTING_FIELDS}}
