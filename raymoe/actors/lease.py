"""Keeps an application's workers alive for as long as its holder lives."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from raymoe.actors.names import NAMESPACE, Life, placement_name
from raymoe.types import DeviceName

log = logging.getLogger(__name__)

RENEW_S = 2.0
HURRY_EVERY_S = 0.1  # while something is about to change: an engine may be waiting for it
HURRY_S = 5.0  # after the last sign of that; longer than a worker's death takes to be noticed and repaired
CALL_TIMEOUT_S = 5.0


class Lease:
    """Renews ``holder``'s hold on the workers of ``app`` from a thread of its own, until closed.

    Where the placement actor is not there yet, or restarts, it keeps trying; it never raises.

    Args:
        tell: what each renewal takes along: the engine's counts, or None.
        standing: of an engine: the version of the cluster that it works with, and the devices it waits for in vain.
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
        standing: Callable[[], tuple[int | None, tuple[DeviceName, ...]]] = lambda: (None, ()),
        on_restart: Callable[[Any], None] = lambda placement: None,
        on_life: Callable[[Life], None] = lambda life: None,
    ) -> None:
        self._app = app
        self._holder = holder
        self._tell = tell
        self._standing = standing
        self._on_restart = on_restart
        self._on_life = on_life
        self._life: Life | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._hurry_until_s = self._told_s = 0.0
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Renew now, and often for a while: something is about to change. From any thread; does not wait."""
        self._hurry_until_s = time.monotonic() + HURRY_S
        self._wake.set()

    def close(self) -> None:
        """Let go. Does not wait for the workers to end. A second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=CALL_TIMEOUT_S)
        with contextlib.suppress(RayError, ValueError):
            placement = ray.get_actor(placement_name(self._app), NAMESPACE)
            ray.get(placement.release.remote(self._holder), timeout=CALL_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            with contextlib.suppress(RayError, ValueError):
                self._renew()
            if self._stop.wait(HURRY_EVERY_S):
                return
            if time.monotonic() > self._hurry_until_s:
                self._wake.wait(RENEW_S - HURRY_EVERY_S)

    def _renew(self) -> None:
        placement = ray.get_actor(placement_name(self._app), NAMESPACE)
        adopted, suspects = self._standing()
        renewed: Any = placement.renew.remote(self._holder, self._told(), adopted=adopted, suspects=suspects)
        life: Any = ray.get(renewed, timeout=CALL_TIMEOUT_S)
        before = self._life
        if before is not None and before.actor == life.actor and before.start != life.start:
            self._on_restart(placement)
        self._life = life
        if adopted is not None and not life.settled:
            self._hurry_until_s = time.monotonic() + HURRY_S
        self._on_life(life)

    def _told(self) -> Any:
        now_s = time.monotonic()
        if now_s - self._told_s < RENEW_S / 2:  # in a hurry: counts can wait
            return None
        self._told_s = now_s
        try:
            return self._tell()
        except Exception:  # counts are read while they change; whatever comes of that, the lease must be renewed
            log.warning("could not tell the engine's counts", exc_info=True)
            return None
