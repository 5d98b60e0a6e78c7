"""Requests that lack an expert which nobody can be asked for: they wait for it, and others go on.

Such a request gives back its cache and what was set aside for it. Once somebody can be asked for the experts that it
lacked, because a silent worker answers again or another has read them from the checkpoint, it queues up where it was
and its cache is made anew from its tokens. Who has waited too long without a token more ends with an error.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

from raymoe.engine.sequence import Sequence
from raymoe.errors import ExpertLostError


class Owners(Protocol):
    """Whoever knows who can be asked for experts."""

    def look(self) -> None:
        """Between steps: take in news of owners, and whether silent ones answer again. Never waits."""
        ...

    def serves(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether requests that need these (layer, expert) can go on."""
        ...


class Parking:
    """Used by the engine's thread, but for ``len`` and ``cancel``.

    Args:
        owners: None: nobody waits.
        clock: seconds.

    Attributes:
        timeout_s: how long a request waits without a token more.
    """

    def __init__(self, owners: Owners | None, timeout_s: float, clock: Callable[[], float]) -> None:
        self.timeout_s = timeout_s
        self._owners = owners
        self._clock = clock
        self._parked: dict[int, _Parked] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def sequences(self) -> list[Sequence]:
        """Those that wait."""
        return [parked.sequence for parked in list(self._parked.values())]

    def cancel(self, request: int) -> None:
        """Mark a request, so that the next step ends it. Unknown ids are ignored. From any thread."""
        if (parked := self._parked.get(request)) is not None:
            parked.sequence.cancelled = True

    def cancelled(self) -> list[Sequence]:
        """Those that were marked."""
        return [sequence for sequence in self.sequences() if sequence.cancelled]

    def takes(self, error: BaseException) -> TypeGuard[ExpertLostError]:
        """Whether a request that failed so waits."""
        return self._owners is not None and isinstance(error, ExpertLostError)

    def park(self, sequence: Sequence, error: ExpertLostError) -> None:
        """A request waits. It counts from when it first lacked an expert since its last token."""
        if sequence.lost_s is None:
            sequence.lost_s = self._clock()
        self._parked[sequence.id] = _Parked(sequence, error)

    def remove(self, sequence: Sequence) -> None:
        """A request waits no more; nothing where it did not."""
        self._parked.pop(sequence.id, None)

    def look(self) -> list[Sequence]:
        """Those that can go on."""
        if self._owners is None:
            return []
        self._owners.look()
        return [p.sequence for p in self._parked.values() if self._owners.serves(p.error.experts)]

    def overdue(self) -> list[tuple[Sequence, ExpertLostError]]:
        """Those that have waited too long, and what to tell them."""
        now_s = self._clock()
        return [
            (parked.sequence, parked.too_late(self.timeout_s))
            for parked in self._parked.values()
            if parked.sequence.lost_s is not None and now_s - parked.sequence.lost_s > self.timeout_s
        ]


@dataclass(frozen=True, slots=True)
class _Parked:
    sequence: Sequence = field(repr=False)
    error: ExpertLostError

    def too_late(self, timeout_s: float) -> ExpertLostError:
        error = self.error
        return ExpertLostError(
            f"{error} (waited {timeout_s:g} s, scheduling.recovery_timeout_s)", error.experts, error.devices
        )
