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


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request in the engine.

    Attributes:
        kv_bytes: that its cache may come to take.
        priority: less is sooner.
        arrival_s: on the engine's clock; so are the others.
        begun_s: when it was admitted.
        state: in the model; None before any of the prompt was read, and when the request has ended.
        cached: tokens of the prompt that were copied from another request's cache.
        lost_s: when it first lacked an expert since its last token; None where it does not.
        inexact: the largest alpha by which an expert was substituted in what its cache holds; 0 where none was.
    """

    id: RequestId
    prompt: list[int]
    max_tokens: int
    end_tokens: frozenset[int]
    sampler: Sampler
    text: TextStream
    on_chunk: OnChunk
    alpha: float | None
    kv_bytes: int = 0
    priority: int = 0
    arrival_s: float = 0.0
    begun_s: float | None = None
    cached: int = 0
    inexact: float = 0.0
    answer: list[int] = field(default_factory=list)
    state: SequenceState | None = None
    routing: Routing = field(default_factory=Routing)
    cancelled: bool = False
    lost_s: float | None = None

    @property
    def unread(self) -> int:
        """Tokens that the model has to read before the next one can be chosen: 1 in decode."""
        return len(self.prompt) + len(self.answer) - (0 if self.state is None else self.state.length)

    def next_tokens(self, count: int) -> list[int]:
        """The first so many of these."""
        start = 0 if self.state is None else self.state.length
        tokens = self.prompt if start + count <= len(self.prompt) else [*self.prompt, *self.answer]
        return tokens[start : start + count]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What the engine says of itself.

    Attributes:
        waiting, running: requests; ``max_waiting`` and ``max_running`` of the configuration bound them.
        kv_bytes: that the caches of running requests take now, room to grow included; ``kv_set_aside_bytes`` what they
            may come to take.
        prefix_bytes, prefixes: of finished requests' caches, kept for prompts that begin alike, and how many.
        cached_tokens: of all prompts, that were copied from such caches.
        admitted, queue_s: requests that were let in so far, and how long they had waited, all together.
        batch_rows, batch_tokens: that the last steps read on average, requests and their tokens.
        steps: passes of the model in decode, each of which makes one token, or several where drafts hold.
        parked: requests that wait for experts which nobody can be asked for; ``waiting`` does not count them.
        rerouted: calls that were handed out again, since a worker was silent or could not do them.
        late_answers: that were dropped, since another owner had answered, or the request had ended.
        suspects: remote workers that are silent now.
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
    kv_set_aside_bytes: int = 0
    prefix_bytes: int = 0
    prefixes: int = 0
    cached_tokens: int = 0
    admitted: int = 0
    queue_s: float = 0.0
    batch_rows: float = 0.0
    batch_tokens: float = 0.0
    parked: int = 0
    rerouted: int = 0
    late_answers: int = 0
    suspects: tuple[str, ...] = ()
