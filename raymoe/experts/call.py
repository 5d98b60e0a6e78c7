"""What is asked of a worker for one layer, and what it answers.

T tokens, K experts per token, R rows sent to this worker, P (row, expert) pairs, H hidden, E experts.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from raymoe.types import StepId


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCall:
    """One layer's work for one worker.

    Attributes:
        layer: MoE layer.
        hidden_RH: rows of hidden states.
        experts_P: int32, the expert of each pair, in any order; equal ones together are computed together.
        rows_P: int32, the row of each pair.
        scores_E: float32 mean gate score of every expert in this step, or None; feeds eviction by score.
        step: the forward that asks; None where nothing was ordered for it.
    """

    layer: int
    hidden_RH: torch.Tensor
    experts_P: np.ndarray
    rows_P: np.ndarray
    scores_E: np.ndarray | None = None
    step: StepId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """Experts that one worker shall have in its slots when a step comes to a layer.

    Attributes:
        step: the forward that will use them.
        epoch: how often the forecasts of the sequence have begun anew. A higher one makes void what lower ones ordered
            for this step and later ones.
        layer: MoE layer.
        experts: int32, those of this worker.
    """

    step: StepId
    epoch: int
    layer: int
    experts: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAnswer:
    """The unweighted output of every pair, and what it took.

    Attributes:
        output_PH: one row per pair, in the order of the call.
        hits, misses: pairs by whether their expert was resident (a load in flight is a miss).
        hosted: the misses that were computed on the host.
        loads, bytes_loaded: experts whose way over the link began in this call, or since the call before.
        loaded: int32 expert ids (layer * 2**16 + expert) that became resident since the last answer.
        evicted: likewise, that ceased to be.
        load_s: seconds for which one expert lately kept the link busy; None where nothing was loaded yet.
        compute_s: seconds of computing these pairs, without waiting for loads.
    """

    output_PH: torch.Tensor
    hits: int = 0
    misses: int = 0
    hosted: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    loaded: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()
    load_s: float | None = None
    compute_s: float = 0.0


LAYER_SHIFT = 16


def expert_id(layer: int, expert: int) -> int:
    """One integer for (layer, expert), as residency and messages use it."""
    return (layer << LAYER_SHIFT) | expert


Identifier = TypeVar("Identifier", int, np.ndarray)


def layer_and_expert(identifier: Identifier) -> tuple[Identifier, Identifier]:
    """The inverse of ``expert_id``, for one or an array of them."""
    return identifier >> LAYER_SHIFT, identifier & ((1 << LAYER_SHIFT) - 1)
