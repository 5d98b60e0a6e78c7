"""Who waits, in which order, and what the caches of those who run may take.

Order is by arrival. A priority moves a request ahead of, or behind, others by a bounded time: one step of it is worth
``PRIORITY_STEP_S`` of waiting. So all that wait keep their order for ever, and nobody starves: a request is overtaken
only by those that came at most their advantage in steps times that time later.

Memory is set aside for a request when it begins, as much as its cache may grow to. So a request that runs is never
without, and nothing has to be taken from anybody; what comes when nothing is left waits.
"""

import bisect
import threading
from collections.abc import Iterator

from raymoe.config import TrunkConfig
from raymoe.engine.prefixes import Kept, PrefixStore
from raymoe.engine.sequence import RequestId, Sequence
from raymoe.errors import OverloadedError

PREFIX_BYTES = 64 << 20  # of kept caches where no memory was set: a few chats of a small model, less than its weights
PRIORITY_STEP_S = 10.0  # of waiting: several answers' time, so that it matters, and short enough to wait for


class WaitingQueue:
    """Requests that wait, the next one first. Not thread safe."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def put(self, sequence: Sequence) -> None:
        """Queue up, behind those that are as urgent."""
        bisect.insort_right(self._sequences, sequence, key=urgency)

    def first(self) -> Sequence | None:
        """Whose turn is next."""
        return self._sequences[0] if self._sequences else None

    def remove(self, sequence: Sequence) -> None:
        """Leave the queue; nothing where it is not in it."""
        if sequence in self:
            self._sequences.remove(sequence)

    def __contains__(self, sequence: object) -> bool:
        return any(other is sequence for other in self._sequences)


def urgency(sequence: Sequence) -> float:
    """The moment from which a request counts as waiting: the earliest is served first."""
    return sequence.arrival_s + PRIORITY_STEP_S * sequence.priority


class KvLedger:
    """Bytes set aside for the caches of running requests. Not thread safe.

    Args:
        budget_bytes: for all together; None is without limit.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        self._set_aside: dict[RequestId, int] = {}

    @property
    def set_aside_bytes(self) -> int:
        """For all that run."""
        return sum(self._set_aside.values())

    @property
    def free_bytes(self) -> int | None:
        """What is left; None without a limit."""
        return None if self.budget_bytes is None else self.budget_bytes - self.set_aside_bytes

    def fits(self, needed_bytes: int) -> bool:
        """Whether so much can be set aside now."""
        free = self.free_bytes
        return free is None or needed_bytes <= free

    def set_aside(self, request: RequestId, needed_bytes: int) -> None:
        """For a request that begins, which fits."""
        assert self.fits(needed_bytes), "who does not fit waits"
        self._set_aside[request] = needed_bytes

    def give_back(self, request: RequestId) -> None:
        """The request has ended, or never began."""
        self._set_aside.pop(request, None)


class Roster:
    """Who waits, who runs, and the memory of both and of kept caches. May be asked from any thread.

    Only the engine's thread lets in and removes; so it may look through ``running`` without the lock.

    Attributes:
        changed: to be held while several things are asked at once; notified when a request comes or is cancelled.
        prefixes: kept caches; they take what running requests leave free.
    """

    def __init__(self, config: TrunkConfig) -> None:
        self.changed = threading.Condition()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.ledger = KvLedger(config.kv_memory)
        limit = (config.kv_memory or PREFIX_BYTES) if config.prefix_memory is None else config.prefix_memory
        self.prefixes = PrefixStore(limit)
        self._config = config

    def put(self, sequence: Sequence, beside: int = 0) -> None:
        """Let a request wait. Raises OverloadedError where as many do as may, those ``beside`` these among them."""
        with self.changed:
            room = self._config.max_waiting + max(0, self._config.max_running - len(self.running))
            if len(self.waiting) + beside >= room:
                raise OverloadedError(
                    f"{len(self.waiting) + beside} requests are waiting already, no more are taken; try again later"
                )
            self.waiting.put(sequence)
            self.changed.notify()

    def cancel(self, request: RequestId) -> None:
        """Mark a request, so that the next step ends it. Unknown ids are ignored."""
        with self.changed:
            for sequence in (*self.running, *self.waiting):
                if sequence.id == request:
                    sequence.cancelled = True
            self.changed.notify()

    def cancelled(self) -> list[Sequence]:
        """Those that were marked."""
        with self.changed:
            return [sequence for sequence in (*self.running, *self.waiting) if sequence.cancelled]

    def admit(self, now_s: float) -> list[Sequence]:
        """Let in whose turn it is, as long as there is room. Kept caches make room for them.

        Returns those who come in for the first time.

        Nobody is let in before who is first: what is small would keep what is large waiting for ever.
        """
        admitted: list[Sequence] = []
        with self.changed:
            while (first := self.waiting.first()) is not None and len(self.running) < self._config.max_running:
                if not self.ledger.fits(first.kv_bytes):
                    break
                self.ledger.set_aside(first.id, first.kv_bytes)
                if self.ledger.free_bytes is not None:
                    self.prefixes.shrink_to(self.ledger.free_bytes)
                self.waiting.remove(first)
                self.running.append(first)
                if first.begun_s is None:
                    first.begun_s = now_s
                    admitted.append(first)
        return admitted

    def leave(self, sequence: Sequence) -> None:
        """A request that ran cannot go on for now: what was set aside for it is free."""
        with self.changed:
            self.running.remove(sequence)
            self.ledger.give_back(sequence.id)

    def come_back(self, sequence: Sequence) -> None:
        """It can: it waits where it would if it had never begun."""
        with self.changed:
            self.waiting.put(sequence)

    def keep(self, cache: Kept, sequence: Sequence) -> None:
        """Keep the cache of a request that ends, in the memory that was set aside for it and what else is free."""
        with self.changed:
            self.ledger.give_back(sequence.id)
            self.prefixes.put(cache, self.ledger.free_bytes)

    def remove(self, sequence: Sequence) -> None:
        """A request has ended, wherever it was: what was set aside for it is free."""
        with self.changed:
            self.waiting.remove(sequence)
            if sequence in self.running:
                self.running.remove(sequence)
            self.ledger.give_back(sequence.id)
