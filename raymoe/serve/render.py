"""Answers as OpenAI's JSON: whole ones, and chunks of a stream."""

import time
import uuid
from typing import Any, Protocol

from raymoe.engine.request import TokenLogprob
from raymoe.serve.batch import Batch
from raymoe.serve.tools import ToolReader
from raymoe.serve.usage import Tally, routing_json

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Renderer(Protocol):
    """Renders the answers of one request."""

    def whole(self, batches: list[Batch]) -> dict[str, Any]:
        """The answers in one piece; a batch is all of one choice."""
        ...

    def chunks(self, batch: Batch) -> list[dict[str, Any]]:
        """What a batch adds to a stream, if anything. Batches of a choice come in order."""
        ...

    def usage(self) -> dict[str, Any]:
        """The stream's last chunk where usage was asked for: no choices."""
        ...


class _Envelope:
    """The fields around ``choices`` that stay the same for one request."""

    def __init__(
        self, model: str, prefix: str, kinds: tuple[str, str], *, include_usage: bool, per_prompt: int
    ) -> None:
        self._fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind, self._chunk_kind = kinds
        self._include_usage = include_usage
        self._tally = Tally(per_prompt)

    def whole(self, choices: list[dict[str, Any]], batches: list[Batch]) -> dict[str, Any]:
        """Finished answers."""
        for batch in batches:
            assert batch.last is not None
            self._tally.add(batch.choice, batch.last)
        body = {**self._fields, "object": self._kind, "choices": choices, "usage": self._tally.usage()}
        return body | routing_json(self._tally.routing)

    def chunk(self, choice: dict[str, Any], batch: Batch) -> dict[str, Any]:
        """A piece of an answer."""
        body = {**self._fields, "object": self._chunk_kind, "choices": [choice]}
        if batch.last is not None:
            self._tally.add(batch.choice, batch.last)
            body |= routing_json(batch.last.routing)
        return body | {"usage": None} if self._include_usage else body

    def usage(self) -> dict[str, Any]:
        """The chunk that carries usage."""
        return {**self._fields, "object": self._chunk_kind, "choices": [], "usage": self._tally.usage()}


class ChatRenderer:
    """/v1/chat/completions.

    Args:
        tools: whether calls of tools are read out of the text.
    """

    def __init__(
        self,
        model: str,
        *,
        include_usage: bool = False,
        logprobs: bool = False,
        per_prompt: int = 1,
        tools: bool = False,
    ) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        self._envelope = _Envelope(model, "chatcmpl", kinds, include_usage=include_usage, per_prompt=per_prompt)
        self._logprobs = logprobs
        self._tools = tools
        self._readers: dict[int, ToolReader] = {}  # of the choices that have begun

    def whole(self, batches: list[Batch]) -> dict[str, Any]:
        return self._envelope.whole([self._message(batch) for batch in batches], batches)

    def _message(self, batch: Batch) -> dict[str, Any]:
        text, calls = self._read(batch)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text.strip() or None, "tool_calls": calls}
        return self._choice({"message": message}, batch)

    def chunks(self, batch: Batch) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {} if batch.choice in self._readers else {"role": "assistant"}
        first = batch.choice not in self._readers
        text, calls = self._read(batch)
        if text or first:
            delta["content"] = text
        if calls:
            begin = self._readers[batch.choice].calls - len(calls)
            delta["tool_calls"] = [{"index": begin + number, **call} for number, call in enumerate(calls)]
        if not delta and not batch.logprobs and batch.last is None:
            return []
        return [self._envelope.chunk(self._choice({"delta": delta}, batch), batch)]

    def usage(self) -> dict[str, Any]:
        return self._envelope.usage()

    def _read(self, batch: Batch) -> tuple[str, list[dict[str, Any]]]:
        reader = self._readers.setdefault(batch.choice, ToolReader())
        return reader.read(batch.text, last=batch.last is not None) if self._tools else (batch.text, [])

    def _choice(self, content: dict[str, Any], batch: Batch) -> dict[str, Any]:
        logprobs = {"content": chat_logprobs(batch), "refusal": None} if self._logprobs else None
        reason = finish_reason(batch)
        if reason == "stop" and self._readers[batch.choice].calls:
            reason = "tool_calls"
        return {"index": batch.choice, **content, "logprobs": logprobs, "finish_reason": reason}


class CompletionRenderer:
    """/v1/completions.

    Args:
        echoes: the texts of the prompts, where answers begin with them.
    """

    def __init__(
        self,
        model: str,
        *,
        include_usage: bool = False,
        logprobs: bool = False,
        per_prompt: int = 1,
        echoes: list[str] | None = None,
    ) -> None:
        kinds = ("text_completion", "text_completion")
        self._envelope = _Envelope(model, "cmpl", kinds, include_usage=include_usage, per_prompt=per_prompt)
        self._logprobs = logprobs
        by_choice = [echo for echo in echoes or () for _ in range(per_prompt)]
        self._echoes = dict(enumerate(by_choice))
        self._offsets: dict[int, int] = {}  # of the choices that have begun

    def whole(self, batches: list[Batch]) -> dict[str, Any]:
        return self._envelope.whole([self._choice(batch) for batch in batches], batches)

    def chunks(self, batch: Batch) -> list[dict[str, Any]]:
        if batch.choice in self._offsets and not (batch.text or batch.logprobs or batch.last):
            return []
        return [self._envelope.chunk(self._choice(batch), batch)]

    def usage(self) -> dict[str, Any]:
        return self._envelope.usage()

    def _choice(self, batch: Batch) -> dict[str, Any]:
        self._offsets.setdefault(batch.choice, 0)
        text = self._echoes.pop(batch.choice, "") + batch.text
        logprobs = self._columns(batch) if self._logprobs else None
        return {"index": batch.choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(batch)}

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
            columns["text_offset"].append(self._offsets[batch.choice])
            self._offsets[batch.choice] += len(texts[item.token_id])
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
