"""Caches of finished requests, for prompts that begin as they did: chat histories, system prompts.

A prompt whose first tokens are those of a kept cache starts from a copy of its keys and values, cut to what both have
in common. What was computed with substituted experts serves only those who allow as much themselves.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from raymoe.engine.sequence import Sequence
from raymoe.model.runner import Runner, SequenceState

FEWEST_TOKENS = 16  # in common; reading fewer takes about as long as copying them


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A cache that may be copied from.

    Attributes:
        tokens: int64, as many as the cache holds.
        alpha: the largest by which an expert was substituted in it; 0 where none was.
    """

    tokens: np.ndarray
    state: SequenceState
    nbytes: int
    alpha: float

    @classmethod
    def of(cls, sequence: Sequence) -> "Kept":
        """A request's cache as it is now."""
        state = sequence.state
        assert state is not None, "a request that has read nothing"
        tokens = np.array([*sequence.prompt, *sequence.answer][: state.length], dtype=np.int64)
        return cls(tokens=tokens, state=state, nbytes=Runner.held_bytes(state), alpha=sequence.inexact)


class PrefixStore:
    """Finished requests' caches, the least recently used first. Not thread safe.

    Args:
        limit_bytes: of all of them; 0 keeps none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(kept.nbytes for kept in self._kept)

    def put(self, fresh: Kept, room_bytes: int | None) -> None:
        """Keep a cache, unless one is kept that holds all of it and serves as many; those that it makes needless go.

        Args:
            room_bytes: that are left for this store; None: as many as it likes.
        """
        limit = self.limit_bytes if room_bytes is None else min(self.limit_bytes, room_bytes)
        if fresh.nbytes > limit or any(_covers(kept, fresh) for kept in self._kept):
            return
        self._kept = [kept for kept in self._kept if not _covers(fresh, kept)]
        self.shrink_to(limit - fresh.nbytes)
        self._kept.append(fresh)

    def shrink_to(self, nbytes: int) -> None:
        """Let go of the least recently used ones, until no more than this is kept."""
        while self._kept and self.nbytes > nbytes:
            self._kept.pop(0)

    def find(self, prompt: list[int], alpha: float, running: Iterable[Kept] = ()) -> tuple[Kept, int] | None:
        """The cache that has most of a prompt's beginning, and how many tokens; at least one is left to read.

        Args:
            alpha: up to which the request lets experts be substituted.
            running: caches of others that are not kept here.
        """
        tokens = np.array(prompt[:-1], dtype=np.int64)
        allowed = [kept for kept in (*self._kept, *running) if kept.alpha <= alpha]
        best = max(allowed, key=lambda kept: in_common(kept.tokens, tokens), default=None)
        if best is None or (common := in_common(best.tokens, tokens)) < FEWEST_TOKENS:
            return None
        place = next((place for place, kept in enumerate(self._kept) if kept is best), None)
        if place is not None:
            self._kept.append(self._kept.pop(place))
        return best, common


def start_from_copy(
    runner: Runner, store: PrefixStore, sequence: Sequence, alpha: float, running: Iterable[Sequence]
) -> None:
    """Let a request begin with a copy of what another's cache has of its prompt, if any does."""
    others = [Kept.of(other) for other in running if other.state is not None]
    found = store.find(sequence.prompt, alpha, others)
    if found is not None:
        kept, common = found
        sequence.state, sequence.cached, sequence.inexact = runner.copied(kept.state, common), common, kept.alpha


def in_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    shortest = min(len(one), len(other))
    differ = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _covers(one: Kept, other: Kept) -> bool:
    """Whether whoever can use ``other`` gets as much from ``one``."""
    return one.alpha <= other.alpha and in_common(one.tokens, other.tokens) == len(other.tokens)
