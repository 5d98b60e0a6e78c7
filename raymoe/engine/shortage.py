"""When the trunk's device has no memory left: kept caches go, work is done once more, and then its request fails."""

import logging
from collections.abc import Callable

import torch

from raymoe.engine.admission import Roster
from raymoe.engine.totals import Totals
from raymoe.errors import CapacityError
from raymoe.model.runner import Runner

log = logging.getLogger(__name__)


class Shortage:
    """Used by the engine's thread.

    Args:
        totals: counts how often that happened.
    """

    def __init__(self, runner: Runner, roster: Roster, totals: Totals) -> None:
        self._runner = runner
        self._roster = roster
        self._totals = totals

    def twice(self, work: Callable[[], object], forget: Callable[[], object]) -> None:
        """Do ``work``; where memory is short, ``forget`` what it has begun and do it once more with what can be freed.

        Raises CapacityError where that does not last either.
        """
        if self.lasts_for(work):
            return
        forget()
        self._runner.trim()
        try:
            work()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the trunk's device ({self._runner.device}) has no memory left for this request, though no kept cache "
                f"is left ({_first_line(error)}); ask for fewer tokens, lower trunk.kv_memory or slot_memory"
            ) from error

    def lasts_for(self, work: Callable[[], object]) -> bool:
        """Do ``work``. Where memory does not last, let kept caches go and return False: it may be tried again."""
        try:
            work()
            return True
        except torch.OutOfMemoryError as error:
            said = _first_line(error)  # not the error itself: it holds on to what was allocated before it
        self._totals.shrunk += 1
        with self._roster.changed:
            kept = len(self._roster.prefixes)
            self._roster.prefixes.shrink_to(0)
        self._runner.trim()
        log.warning("the trunk's device has no memory left; %d kept caches go, the step is repeated: %s", kept, said)
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
