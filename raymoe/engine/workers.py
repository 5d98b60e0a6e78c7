"""What the engine asks of workers: of those in its own process, and of those in others."""

from collections.abc import Container, Mapping
from typing import Protocol

import numpy as np
import torch

from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.experts.worker import Begun
from raymoe.transport.client import Received
from raymoe.transport.sockets import Endpoint
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
    """Workers in other processes."""

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        """Send a call; returns its request number. Raises ExpertUnavailableError where it can't be sent."""
        ...

    def receive(self, wait_s: float, awaited: Container[int]) -> list[Received]:
        """Wait for whatever comes first, at most so long. What nobody waits for is dropped and counted."""
        ...

    def connect(self, endpoints: Mapping[DeviceName, Endpoint]) -> set[DeviceName]:
        """Talk to these from now on, and to no others. Returns those whose connection is another one now, or gone."""
        ...

    def probe(self, device: DeviceName) -> None:
        """Ask whether a worker lives; never waits."""
        ...

    def signs(self) -> tuple[set[DeviceName], set[DeviceName]]:
        """Who has answered pings, and whose connection has closed, since the last time; never waits."""
        ...

    @property
    def late_answers(self) -> int:
        """How many were dropped, since nobody waited for them any more."""
        ...

    def order(self, device: DeviceName, order: LoadOrder) -> None:
        """Pass an order on; never waits."""
        ...

    def forget(self, device: DeviceName, sequence: int) -> None:
        """A sequence is finished; never waits."""
        ...
