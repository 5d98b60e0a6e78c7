"""What the engine asks of workers: of those in its own process, and of those in others."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.experts.worker import Begun
from raymoe.types import DeviceName


class LocalWorker(Protocol):
    """A worker in this process."""

    def begin(self, call: ExpertCall) -> Begun:
        """Start the loads of a call."""
        ...

    def finish(self, begun: Begun) -> ExpertAnswer:
        """Compute it."""
        ...

    def preview(self, begun: Begun) -> tuple[np.ndarray, torch.Tensor]:
        """Bool per pair of a call that has begun: whether it needs no load; and those pairs' outputs."""
        ...

    def ready(self, layer: int) -> np.ndarray:
        """Bool per expert: whether it needs no load."""
        ...

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        """A forecast for a layer to come."""
        ...

    def order(self, order: LoadOrder) -> None:
        """Experts to have in slots when a step comes to a layer."""
        ...

    def forget(self, sequence: int) -> None:
        """A sequence is finished; its orders are void."""
        ...

    @property
    def load_s(self) -> float | None:
        """Seconds to load one expert."""
        ...


class RemoteWorkers(Protocol):
    """Workers in other processes.

    Attributes:
        while_waiting: done again and again while answers are waited for; None is nothing.
    """

    while_waiting: Callable[[], None] | None

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send a call; returns its request number."""
        ...

    def gather(
        self, requests: dict[int, DeviceName], timeout_s: float, arrived_s: dict[int, float] | None = None
    ) -> dict[int, ExpertAnswer]:
        """Wait for answers; ``arrived_s`` takes the time at which each came."""
        ...

    def order(self, device: DeviceName, order: LoadOrder) -> None:
        """Pass an order on; never waits."""
        ...

    def forget(self, device: DeviceName, sequence: int) -> None:
        """A sequence is finished; never waits."""
        ...
