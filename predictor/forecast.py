"""What forecasts of routing are: gate scores of a layer before the model reaches it.

Two kinds of knowing. Some look from the layer in hand at those that follow (``Forecast``); some know a coming step,
layer by layer, before it begins or while it runs (``LayerForecast`` is what they say).

T tokens, K experts per token, E experts.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from raymoe.types import StepId


class Forecast(Protocol):
    """Knows something of coming layers while a step is under way."""

    farthest: int
    """How many layers ahead it can look."""

    def scores(self, layer: int, ahead: int) -> np.ndarray | None:
        """Forecast gate scores [T, E] of MoE layer ``layer + ahead``, while ``layer`` is being computed.

        None where it can't tell.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForecast:
    """What a step is expected to be routed to in one layer.

    Attributes:
        step: the forward that it is about.
        epoch: how often the forecasts of the sequence have begun anew; a later one makes earlier ones void.
        layer: MoE layer.
        experts_TK: int64, the experts that will be chosen, as the router orders them.
        scores_TE: float32, gate scores of all experts.
    """

    step: StepId
    epoch: int
    layer: int
    experts_TK: np.ndarray
    scores_TE: np.ndarray
