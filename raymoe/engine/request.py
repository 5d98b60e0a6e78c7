"""What a client asks for, and what it gets: plain records, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymoe.config import Quality
from raymoe.types import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. None means: as the model's generation_config.json says, else OpenAI's default.

    Attributes:
        max_tokens: most new tokens; None as many as the context holds (bounded by the server).
        temperature: 0 is greedy.
        stop: strings that end the answer; they are not part of it.
        stop_token_ids: token ids that end the answer, beside the model's own end of sequence.
        logprobs: how many alternatives to report per token; None reports nothing, 0 the chosen token only.
        logit_bias: added to the logits of these tokens, from -100 (never) to 100 (nothing else).
        grammar: which the answer must follow, in llguidance's Lark form; see ``raymoe.engine.lark``.
        json_schema: of the JSON value that the answer must be: a short way to a grammar.
        quality: "exact", "balanced", "fast", or an alpha: how freely experts may be substituted under policies
            importance and joint; None as the server is configured.
        priority: less is sooner, from -1000 to 1000; a step of one is worth 10 s of waiting.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    json_schema: Mapping[str, Any] | bool | None = None
    quality: Quality | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation as a prompt, with what its template takes beside messages.

    Attributes:
        messages: {"role", "content"}, and "tool_calls", "tool_call_id" and "name" where they have them.
        tools: functions that the model may call, as OpenAI's API and chat templates describe them.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability of a chosen token and of its best alternatives (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request. ``cached_tokens`` of the prompt needed no reading."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer: text that is final, and the tokens made since the last chunk.

    Text may lag behind tokens, for half a character or a possible stop string is held back. The last chunk has
    a ``finish_reason`` ("stop", "length" or "cancelled"), ``usage`` and ``routing``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    routing: Routing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    routing: Routing
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def degraded(self) -> bool:
        """Whether an expert that nobody could be asked for was replaced by another."""
        return self.routing.degraded > 0


def collect(chunks: list[Chunk]) -> Result:
    """Join the chunks of one finished answer."""
    last = chunks[-1]
    assert last.finish_reason is not None and last.usage is not None and last.routing is not None
    return Result(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        finish_reason=last.finish_reason,
        usage=last.usage,
        routing=last.routing,
        logprobs=[item for chunk in chunks for item in chunk.logprobs],
    )
