"""Who waits, in which order, and what the caches of those who run may take.

Order is by arrival. A priority moves a request ahead of, or behind, others by a bounded time: one step of it is worth
``PRIORITY_STEP_S`` of waiting. So all that wait keep their order for ever, and nobody starves: a request is overtaken
only by those that came at most their advantage in steps times that time later.

Memory is set aside for a request when it begins, as much as its cache may grow to. So a request that runs is never
without, and nothing has to be taken from anybody; what comes when nothing is left waits.

Who would wait too long for a first token is refused at once (``shedding.py``): whoever asks can go elsewhere, and those
who wait get what they were promised.
"""

import bisect
import threading
import time
from collections.abc import Callable, Iterator

from raymoe.config import TrunkConfig
from raymoe.engine.prefixes import Kept, PrefixStore
from raymoe.engine.sequence import RequestId, Sequence
from raymoe.engine.shedding import Pace, Wait
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

    def before(self, moment_s: float) -> list[Sequence]:
        """Those who go before a request of this urgency."""
        return self._sequences[: bisect.bisect_right(self._sequences, moment_s, key=urgency)]


def urgency(sequence: Sequence) -> float:
    """The moment from which a request counts as waiting: the earliest is served first."""
    return counted_from(sequence.arrival_s, sequence.priority)


def counted_from(arrival_s: float, priority: int) -> float:
    """The same, of a request that is not made yet."""
    return arrival_s + PRIORITY_STEP_S * priority


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

    Args:
        ttft_slo_s: who would wait longer for a first token is refused; None: only the number of those who wait counts.
        clock: seconds that never go back.

    Attributes:
        changed: to be held while several things are asked at once; notified when a request comes or is cancelled.
        pace: how fast requests leave, and how long prompts take.
        prefixes: kept caches; they take what running requests leave free.
    """

    def __init__(
        self, config: TrunkConfig, ttft_slo_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.changed = threading.Condition()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.ledger = KvLedger(config.kv_memory)
        limit = (config.kv_memory or PREFIX_BYTES) if config.prefix_memory is None else config.prefix_memory
        self.prefixes = PrefixStore(limit)
        self.pace = Pace()
        self._config = config
        self._ttft_slo_s = ttft_slo_s
        self._clock = clock

    def put(self, sequence: Sequence, beside: int = 0) -> None:
        """Let a request wait. Raises OverloadedError as ``check_room`` does."""
        with self.changed:
            self.check_room(sequence.priority, sequence.kv_bytes, beside)
            self.waiting.put(sequence)
            self.changed.notify()

    def check_room(self, priority: int = 0, kv_bytes: int = 0, beside: int = 0) -> None:
        """Raises OverloadedError where as many wait as may, or a request that comes now would wait too long.

        Args:
            beside: requests that wait elsewhere, which count as well.
        """
        with self.changed:
            now_s, free = self._clock(), max(0, self._config.max_running - len(self.running))
            before = self.waiting.before(counted_from(now_s, priority))
            fits = self.ledger.fits(kv_bytes + sum(sequence.kv_bytes for sequence in before))
            place = max(0, len(before) + 1 - (free if fits else 0))
            wait, full_s = self.pace.wait(place, now_s), self.pace.interval_s(now_s) or 0.0
            waiting = len(self.waiting) + beside
            if waiting >= self._config.max_waiting + free:
                raise OverloadedError(
                    f"{waiting} requests are waiting already, no more are taken; try again later",
                    retry_after_s=None if wait is None else wait.likely_s,
                    full_s=full_s,
                )
            if self._ttft_slo_s is not None:
                self._check_in_time(place, wait, self._ttft_slo_s, full_s)

    def _check_in_time(self, place: int, wait: Wait | None, slo_s: float, full_s: float) -> None:
        if wait is None:  # nothing was measured: as many may wait as run, whose turn is the next
            if place <= self._config.max_running:
                return
            raise OverloadedError(f"{place - 1} requests go before this one, and how long they take is not known yet")
        if place and wait.most_s > slo_s:
            raise OverloadedError(
                f"{place - 1} requests go before this one; its first token might take {wait.most_s:.1f} s, more than "
                f"the {slo_s:g} s that this server promises; try again later",
                retry_after_s=wait.likely_s,
                full_s=full_s,
            )

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
                self.pace.left(self._clock(), len(self.waiting) > 0)
            self.ledger.give_back(sequence.id)
