"""Waiting for what other processes do."""

import time
from collections.abc import Callable

WAIT_S = 180.0
"""The most to wait: an application's start is some fifty seconds of processor time, and a tested machine is busy."""


def until(holds: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait until ``holds()``; fails after ``timeout_s`` seconds and says that ``what`` did not happen."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)
