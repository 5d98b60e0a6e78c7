"""A captured step without a GPU: the forward runs anew for each, in a thread, as a device does beside its host."""

import threading
from collections.abc import Callable

import torch


class ReplayRecorder:
    """A ``Recorder``. Results land in the memory of the first run's, as a graph's do.

    Attributes:
        captures: how often something was recorded.
    """

    def __init__(self) -> None:
        self.captures = 0

    def record(self, forward: Callable[[], torch.Tensor]) -> tuple["ReplayStep", torch.Tensor]:
        self.captures += 1
        result = forward()
        return ReplayStep(forward, result), result


class ReplayStep:
    """One forward in a thread; whoever asks whether it is done waits a little, as there is nothing else to do."""

    def __init__(self, forward: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self._forward = forward
        self._result = result
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._thread is None or not self._thread.is_alive(), "one step at a time"
        self._error = None
        self._thread = threading.Thread(target=self._whole, daemon=True)
        self._thread.start()

    def _whole(self) -> None:
        try:
            with torch.inference_mode():
                self._result.copy_(self._forward())
        except BaseException as error:
            self._error = error

    def is_done(self) -> bool:
        if self._thread is None:
            return True
        self._thread.join(timeout=0.001)
        is_alive = self._thread.is_alive()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return not is_alive
