"""Stand between the engine and its trunk, and their scheduler, and change nothing. Neither knows of it.

T tokens, K experts per token, H hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch

from raymoe.config import SchedulingConfig
from raymoe.engine.scheduler_protocol import Scheduler
from raymoe.model.runner import SequenceState
from raymoe.model.trunk import ExpertBackend
from raymoe.types import Routing, SamplingRecipe


class Onlooker:
    """Base of those who look on: a scheduler and backend that hands every call on. Used by the engine's thread.

    It is no ``RowScheduler``: while somebody looks on, sequences have steps of their own.
    """

    def __init__(self, scheduler: Scheduler, backend: ExpertBackend) -> None:
        self._scheduler = scheduler
        self._backend = backend

    @property
    def alpha(self) -> float | np.ndarray:
        """The scheduler's."""
        return self._scheduler.alpha

    @alpha.setter
    def alpha(self, alpha: float | np.ndarray) -> None:
        self._scheduler.alpha = alpha

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read."""
        self._scheduler.begin(sequence, prompt, recipe)

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token is about to be read."""
        self._scheduler.read(sequence, token, state)

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's say on a router's choice."""
        return self._backend.route(layer, experts_TK, weights_TK)

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Outputs of experts [T, K, H]."""
        return self._backend.compute(layer, hidden_TH, experts_TK)

    def take_cost(self) -> Routing:
        """A forward has ended."""
        return self._scheduler.take_cost()

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self._scheduler.end(sequence)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings."""
        self._scheduler.reconfigure(scheduling)
