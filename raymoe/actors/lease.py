"""Keeps an application's workers alive for as long as its holder lives."""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from raymoe.actors.names import NAMESPACE, Life, placement_name

log = logging.getLogger(__name__)

RENEW_S = 2.0
CALL_TIMEOUT_S = 5.0


class Lease:
    """Renews ``holder``'s hold on the workers of ``app`` from a thread of its own, until closed.

    Where the placement actor is not there yet, or restarts, it keeps trying; it never raises. Ray's head is asked for
    the actor once only, and again where the actor does not answer: while the head is away, calls to actors go on.

    Args:
        tell: what each renewal takes along: the engine's counts, or None.
        on_restart: called with the placement actor when it has lost its state. Where it raises RayError, it is called
            again at the next renewal.
        on_life: told what each renewal brought back.
    """

    def __init__(
        self,
        app: str,
        holder: str,
        *,
        tell: Callable[[], Any] = lambda: None,
        on_restart: Callable[[Any], None] = lambda placement: None,
        on_life: Callable[[Life], None] = lambda life: None,
    ) -> None:
        self._app = app
        self._holder = holder
        self._tell = tell
        self._on_restart = on_restart
        self._on_life = on_life
        self._life: Life | None = None
        self._placement: Any = None
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
            placement = self._placement or ray.get_actor(placement_name(self._app), NAMESPACE)
            ray.get(placement.release.remote(self._holder), timeout=CALL_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
            except (RayError, ValueError):
                self._placement = None
            self._stop.wait(RENEW_S)

    def _renew(self) -> None:
        if self._placement is None:
            self._placement = ray.get_actor(placement_name(self._app), NAMESPACE)
        placement = self._placement
        life: Any = ray.get(placement.renew.remote(self._holder, self._told()), timeout=CALL_TIMEOUT_S)
        before = self._life
        if before is not None and before.actor == life.actor and before.start != life.start:
            self._on_restart(placement)
        self._life = life
        self._on_life(life)

    def _told(self) -> Any:
        try:
            return self._tell()
        except Exception:  # counts are read while they change; whatever comes of that, the lease must be renewed
            log.warning("could not tell the engine's counts", exc_info=True)
            return None
