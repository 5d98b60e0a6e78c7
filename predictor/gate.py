"""The plain lookahead: the gates of the next layers on the current state.

The residual stream changes little from layer to layer, so what a later layer's norm and gate make of it now is close
to what they will make of it then. It costs one norm and one gate per forecast and no second round trip.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch


class GateSite(Protocol):
    """One MoE layer as the lookahead sees it. T tokens, H hidden, E experts."""

    @property
    def state_TH(self) -> torch.Tensor | None:
        """The residual stream before the layer's norm in the step under way; None where it was not seen."""
        ...

    def gate_scores(self, state_TH: torch.Tensor) -> np.ndarray:
        """The layer's gate scores [T, E] for a residual stream."""
        ...


class GateForecast:
    """Forecasts by the gates of coming layers."""

    def __init__(self, sites: Sequence[GateSite | None]) -> None:
        self._sites = sites
        self.farthest = len(sites) - 1

    @torch.inference_mode()
    def scores(self, layer: int, ahead: int) -> np.ndarray | None:
        """Gate scores [T, E] of layer ``layer + ahead``, or None where either layer's gate is not known."""
        if layer + ahead >= len(self._sites):
            return None
        here, there = self._sites[layer], self._sites[layer + ahead]
        if here is None or there is None or here.state_TH is None:
            return None
        return there.gate_scores(here.state_TH)
