"""What links have still to do of what was ordered, in plans that hand out loads beside those under way.

Bookkeeping without a clock of its own. N experts of a plan.
"""

from collections.abc import Callable, Sequence

import numpy as np


class LinkQueues:
    """When each link will have done what was ordered of it: an estimate, from what loads lately took.

    Args:
        loads_s: seconds per load of each worker, as measured; None where that is not known yet.
        unit_s: what the fleet counts for a load of each worker.
    """

    def __init__(
        self, loads_s: Callable[[], list[float | None]], unit_s: Sequence[float], clock: Callable[[], float]
    ) -> None:
        self._loads_s = loads_s
        self._unit_s = unit_s
        self._clock = clock
        self._free_s = [0.0] * len(unit_s)

    def busy(self) -> np.ndarray | None:
        """Until each link is free, in the fleet's unit; None as long as nothing was measured somewhere."""
        now_s = self._clock()
        busy = []
        for load_s, unit_s, free_s in zip(self._loads_s(), self._unit_s, self._free_s, strict=True):
            if not load_s:
                return None
            busy.append(max(0.0, free_s - now_s) / load_s * unit_s)
        return np.array(busy)

    def in_units(self, seconds: float) -> np.ndarray | None:
        """Seconds in the fleet's unit of each worker; None as long as nothing was measured somewhere."""
        loads_s = self._loads_s()
        if not all(loads_s):
            return None
        return np.array(
            [seconds / (load_s or 1.0) * unit_s for load_s, unit_s in zip(loads_s, self._unit_s, strict=True)]
        )

    def order(self, workers_N: np.ndarray) -> None:
        """Each of these workers was told to load one expert more."""
        now_s, loads_s = self._clock(), self._loads_s()
        for worker in workers_N.tolist():
            self._free_s[worker] = max(now_s, self._free_s[worker]) + (loads_s[worker] or 0.0)
