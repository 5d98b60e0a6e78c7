"""How much memory the cache of a sequence takes at any length, known before the sequence is.

Keys and values by position are counted from their shapes; what else a cache holds (recurrent states, compressed
windows) is measured at two lengths, and taken to grow in a straight line between and beyond.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.kv import places
from raymoe.model.roomy import ROOM_TOKENS, RoomyLayer
from raymoe.model.router import ProbeExperts, backend_of, probe_tokens
from raymoe.model.runner import Runner, SequenceState, tensors_within

SHORT_TOKENS, LONG_TOKENS = 24, 64  # of the two prompts that are measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Something that a cache keeps by position.

    Attributes:
        token_bytes: of one position.
        most_tokens: positions that it holds at most; None where all are.
        block_tokens: it takes memory for whole numbers of these.
    """

    token_bytes: int
    most_tokens: int | None
    block_tokens: int

    def at(self, tokens: int, at_once: int) -> int:
        """Bytes for a sequence of so many tokens, read at most so many at once (which windows keep until the next)."""
        if self.most_tokens is not None:
            tokens = min(tokens, self.most_tokens + at_once)
        return -(-tokens // self.block_tokens) * self.block_tokens * self.token_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSize:
    """Memory of one sequence's cache, in bytes.

    Attributes:
        held: by position.
        fixed_bytes: of what does not depend on the length.
        token_bytes: by which the rest grows with each token.
        slack: times; tensors may be views of larger ones, which are kept as long.
    """

    held: tuple[Held, ...]
    fixed_bytes: int = 0
    token_bytes: float = 0.0
    slack: float = 1.0

    def at(self, tokens: int, at_once: int = 1) -> int:
        """Bytes for a sequence of so many tokens, of which at most so many are read at once."""
        rest = self.fixed_bytes + self.token_bytes * tokens
        return ceil(self.slack * (sum(part.at(tokens, at_once) for part in self.held) + rest))

    def tokens_within(self, budget_bytes: int, at_once: int = 1) -> int:
        """The most tokens of a sequence whose cache fits, at most a thousand million."""
        low, high = 0, 1 << 30
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle, at_once) <= budget_bytes else (low, middle - 1)
        return low


def measure_kv(runner: Runner) -> KvSize:
    """By two prompts, with experts that return zeros. Leaves nothing behind."""
    tokens = probe_tokens(runner.model)
    with backend_of([module for _, module in experts_modules(runner.model)], ProbeExperts()):
        short, long = (runner.prefill(tokens[:count])[1] for count in (SHORT_TOKENS, LONG_TOKENS))
    held, long_rest = _taken_apart(long)
    _, short_rest = _taken_apart(short)
    growth = max(0.0, (long_rest - short_rest) / (LONG_TOKENS - SHORT_TOKENS))
    size = KvSize(held=held, fixed_bytes=max(0, ceil(long_rest - growth * LONG_TOKENS)), token_bytes=growth)
    measured = ((short, SHORT_TOKENS), (long, LONG_TOKENS))
    slack = max(Runner.held_bytes(state) / max(1, size.at(count, count)) for state, count in measured)
    return replace(size, slack=max(1.0, slack))


def _taken_apart(state: SequenceState) -> tuple[tuple[Held, ...], int]:
    """What is kept by position, and the bytes of all else."""
    cache: Any = state.kwargs.get("past_key_values")
    held, placed = [], set()
    for layer in getattr(cache, "layers", None) or []:
        block = ROOM_TOKENS if type(layer) is RoomyLayer else 1
        for place in places(layer, vars(layer)):
            tensor = place.tensor
            length = tensor.shape[place.axis]
            if length:
                placed.add(id(tensor))
                per_token = tensor.nbytes // length
                held.append(Held(token_bytes=per_token, most_tokens=place.most, block_tokens=block))
    rest = {id(tensor): tensor.nbytes for tensor in tensors_within(cache) if id(tensor) not in placed}
    return tuple(held), sum(rest.values())
