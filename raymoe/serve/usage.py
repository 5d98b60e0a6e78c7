"""What answers cost, as JSON: tokens, and the expert calls behind them.

``usage.routing`` is an extension: what the expert calls of all choices cost, and how much was substituted. The same
stands beside ``usage`` as ``routing``, for streams without a chunk of usage: there, each choice's own.
"""

from typing import Any

from raymoe.engine.request import Chunk
from raymoe.types import Routing

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


class Tally:
    """Adds up what the answers of one request cost. A prompt counts once, however many answers it has.

    Args:
        per_prompt: answers of each prompt; those of a prompt follow each other.
    """

    def __init__(self, per_prompt: int = 1) -> None:
        self._per_prompt = per_prompt
        self._prompt = self._cached = self._completion = 0
        self.routing: Routing | None = None

    def add(self, choice: int, last: Chunk) -> None:
        """An answer is finished."""
        assert last.usage is not None
        if choice % self._per_prompt == 0:
            self._prompt += last.usage.prompt_tokens
            self._cached += last.usage.cached_tokens
        self._completion += last.usage.completion_tokens
        if last.routing is not None:
            self.routing = last.routing if self.routing is None else self.routing + last.routing

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage, and what the expert calls cost."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        } | routing_json(self.routing)


def routing_json(routing: Routing | None) -> dict[str, Any]:
    """The cost of finished answers' expert calls; nothing before they are finished."""
    if routing is None:
        return {}
    told = {name: getattr(routing, name) for name in ROUTING_FIELDS}
    return {"routing": told | {"degraded": routing.degraded > 0}}
