"""Keeps an application's workers alive for as long as its holder lives."""

import contextlib
import threading

import ray
from ray.exceptions import RayError

from raymoe.actors.names import NAMESPACE, placement_name

RENEW_S = 2.0
CALL_TIMEOUT_S = 5.0


class Lease:
    """Renews ``holder``'s hold on the workers of ``app`` from a thread of its own, until closed.

    Where the placement actor is not there yet, or restarts, it keeps trying; it never raises.
    """

    def __init__(self, app: str, holder: str) -> None:
        self._app = app
        self._holder = holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go. Does not wait for the workers to end. A second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=CALL_TIMEOUT_S)
        with contextlib.suppress(RayError, ValueError):
            placement = ray.get_actor(placement_name(self._app), NAMESPACE)
            ray.get(placement.release.remote(self._holder), timeout=CALL_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(RayError, ValueError):
                placement = ray.get_actor(placement_name(self._app), NAMESPACE)
                ray.get(placement.renew.remote(self._holder), timeout=CALL_TIMEOUT_S)
            self._stop.wait(RENEW_S)
