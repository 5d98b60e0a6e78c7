"""One request in the engine, and what the engine says of all of them: plain records."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType

from raymoe.engine.request import Chunk
from raymoe.engine.sampling import Sampler
from raymoe.engine.text import TextStream
from raymoe.model.runner import SequenceState
from raymoe.types import Routing

RequestId = NewType("RequestId", int)

OnChunk = Callable[[Chunk | BaseException], None]
"""Receives every chunk; an exception instead of one ends the request. Called on the engine's thread."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One request in the engine.

    Attributes:
        state: in the model; None before the prompt was read, and when the request has ended.
    """

    id: RequestId
    prompt: list[int]
    max_tokens: int
    end_tokens: frozenset[int]
    sampler: Sampler
    text: TextStream
    on_chunk: OnChunk
    alpha: float | None
    answer: list[int] = field(default_factory=list)
    state: SequenceState | None = None
    routing: Routing = field(default_factory=Routing)
    cancelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What the engine says of itself.

    Attributes:
        steps: passes of the model in decode, each of which makes one token, or several where drafts hold.
        drafts: whether a shadow's guesses are read along: "on", or "off" and why.
    """

    running: int
    waiting: int
    finished: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int
    kv_budget_bytes: int | None
    routing: Routing
    decode_s: float
    steps: int
    alpha: float
    drafts: str = "off"
