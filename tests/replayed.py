"""Segments without a GPU: the forward runs anew for each step, in a thread that stops wherever the capture was cut."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from raymoe.engine.turns import Shared
from raymoe.model.captured import Cut, Segment

TIMEOUT_S = 60.0


class ReplayRecorder:
    """A ``Recorder``. Results land in the memory of the first run's, as a graph's do.

    Attributes:
        captures: how often something was recorded.
    """

    def __init__(self) -> None:
        self.captures = 0
        self._threads: list[threading.Thread] = []

    def record(self, forward: Callable[[Cut], torch.Tensor]) -> tuple[list[Segment], torch.Tensor]:
        self.captures += 1
        cuts = [0]
        result = forward(lambda: cuts.__setitem__(0, cuts[0] + 1))
        run = _Run(forward, result)
        return [_ReplaySegment(run, number) for number in range(cuts[0] + 1)], result


class _Run:
    """One forward, part by part."""

    def __init__(self, forward: Callable[[Cut], torch.Tensor], result: torch.Tensor) -> None:
        self._forward = forward
        self._result = result
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

    def advance(self, number: int) -> None:
        if number == 0:
            threading.Thread(target=self._whole, daemon=True).start()
        self._go.release()
        assert self._stopped.acquire(timeout=TIMEOUT_S)
        if self._error is not None:
            raise self._error

    def _whole(self) -> None:
        def cut() -> None:
            self._stopped.release()
            assert self._go.acquire(timeout=TIMEOUT_S)

        assert self._go.acquire(timeout=TIMEOUT_S)
        try:
            with torch.inference_mode():
                self._result.copy_(self._forward(cut))
        except BaseException as error:
            self._error = error
        self._stopped.release()


class _ReplaySegment:
    def __init__(self, run: _Run, number: int) -> None:
        self._run, self._number, self._looks = run, number, 0

    def run(self) -> None:
        self._looks = 0
        self._run.advance(self._number)

    def is_done(self) -> bool:
        self._looks += 1
        return self._looks > 2  # so that somebody waits


def share(elements: int) -> Shared:
    """Memory that host and device, the same here, both see."""
    host: np.ndarray[Any, Any] = np.zeros(elements, dtype=np.float32)
    return Shared(host, torch.from_numpy(host))
