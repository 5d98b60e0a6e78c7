"""Who was heard of when. Part of the placement actor; light to import, as that is."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from raymoe.observe.metrics import Values, of_health
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

SILENT_S = 5.0  # a device of which nothing was heard for so long is shown as down; it is asked every other second


class Heartbeats:
    """When each worker last answered, by a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard_s: dict[DeviceName, float] = {}

    def heard(self, name: DeviceName) -> None:
        """It has answered just now."""
        self._heard_s[name] = self._clock()

    def age_s(self, name: DeviceName) -> float | None:
        """Since then; None where it never has."""
        heard_s = self._heard_s.get(name)
        return None if heard_s is None else self._clock() - heard_s

    def listen(self, workers: Mapping[DeviceName, ActorHandle], wait_s: float) -> None:
        """Ask all of them something short, and note who answers in time. Never raises: whoever calls has more to do."""
        try:
            self._listen(workers, wait_s)
        except Exception:
            log.warning("workers could not be asked whether they are there", exc_info=True)

    def _listen(self, workers: Mapping[DeviceName, ActorHandle], wait_s: float) -> None:
        asked: dict[Any, DeviceName] = {handle.progress.remote(): name for name, handle in workers.items()}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=wait_s) if asked else ([], [])
        for reference in done:
            with contextlib.suppress(RayError):
                ray.get(reference)
                self.heard(asked[reference])

    def values(self, names: list[DeviceName]) -> Values:
        """Metrics of these devices."""
        values: Values = []
        for name in names:
            age_s = self.age_s(name)
            values += of_health(name, up=age_s is not None and age_s < SILENT_S, heartbeat_age_s=age_s)
        return values
