"""What every forecast of routing is: gate scores of a layer before it is reached."""

from typing import Protocol

import numpy as np


class Forecast(Protocol):
    """Knows something of coming layers while a step is under way. T tokens, E experts."""

    farthest: int
    """How many layers ahead it can look."""

    def scores(self, layer: int, ahead: int) -> np.ndarray | None:
        """Forecast gate scores [T, E] of MoE layer ``layer + ahead``, while ``layer`` is being computed.

        None where it can't tell.
        """
        ...
