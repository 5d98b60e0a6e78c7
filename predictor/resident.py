"""The forecast by resident emulation (SMoE, arXiv 2508.18983): what the next gate says to what is here already.

While a layer's missing experts are on their way, its resident ones, its shared ones and all that follows up to the
next gate can be computed without them. What they lack is little where the missing experts score low. The next
layer's attention is computed twice for it, so it costs more than the plain lookahead, and looks one layer ahead only.

T tokens, K experts per token, E experts, H hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from predictor.forecast import Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentOutput:
    """What is known of the routed experts' output in the layer being computed.

    Attributes:
        output_TKH: unweighted output of every chosen expert, zeros where it is missing.
        weights_TK: the weights with which they will be summed.
    """

    output_TKH: torch.Tensor
    weights_TK: torch.Tensor


class Experts(Protocol):
    """Whoever computes the routed experts."""

    def resident(self) -> ResidentOutput | None:
        """The outputs of the step under way that need no load; None where no layer is being computed here."""
        ...


class Trunk(Protocol):
    """All of the model but its routed experts."""

    def scores_after(self, layer: int, routed_TH: torch.Tensor) -> np.ndarray | None:
        """Gate scores [T, E] of MoE layer ``layer + 1`` if the routed experts of ``layer`` gave ``routed_TH``.

        ``layer`` is being computed; the step under way does not notice. None where the trunk can't tell.
        """
        ...


class ResidentForecast:
    """Forecasts by running on with the experts that are here.

    The weights stay as routed: a missing expert leaves its part out. Scaling the others up in its place recalls less
    (0.930 instead of 0.944 of the top 4 with half of the embedded model's experts here; the next gates: 0.773).

    Args:
        otherwise: asked where the trunk can't run ahead of the step.
    """

    farthest = 1

    def __init__(self, trunk: Trunk, experts: Experts, otherwise: Forecast) -> None:
        self._trunk = trunk
        self._experts = experts
        self._otherwise = otherwise

    @torch.inference_mode()
    def scores(self, layer: int, ahead: int) -> np.ndarray | None:
        """Gate scores [T, E] of MoE layer ``layer + ahead``; more than one layer ahead, those of the other forecast."""
        resident = self._experts.resident() if ahead == 1 else None
        if resident is not None:
            output = resident.output_TKH
            routed_TH = (output * resident.weights_TK.unsqueeze(-1)).sum(dim=1).to(output.dtype)
            scores_TE = self._trunk.scores_after(layer, routed_TH)
            if scores_TE is not None:
                return scores_TE
        return self._otherwise.scores(layer, ahead)
