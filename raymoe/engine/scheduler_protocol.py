"""What the step loop asks of whoever schedules experts."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from raymoe.config import SchedulingConfig
from raymoe.model.runner import SequenceState
from raymoe.types import Routing, SamplingRecipe


class Scheduler(Protocol):
    """One policy at work. Used by one thread.

    Attributes:
        alpha: threshold for substitution in the step to come; one for all rows, or one per sequence of the batch.
    """

    alpha: float | np.ndarray

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read; what follows is chosen by this recipe, None where that is not known."""
        ...

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token of a sequence is about to be read."""
        ...

    def end(self, sequence: int) -> None:
        """A sequence is finished. One that never began is ignored."""
        ...

    def take_cost(self) -> Routing:
        """What steps cost since the last take."""
        ...

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings from the next step on."""
        ...


@runtime_checkable
class RowScheduler(Scheduler, Protocol):
    """A policy under which several sequences may be rows of one step; under others each has steps of its own."""

    def take_costs(self, rows: int) -> list[Routing]:
        """What a step of so many sequences cost since the last take, by row."""
        ...
