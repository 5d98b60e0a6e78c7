"""What is asked of a worker for one layer, and what it answers.

T tokens, K experts per token, R rows sent to this worker, P (row, expert) pairs, H hidden, E experts.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCall:
    """One layer's work for one worker.

    Attributes:
        layer: MoE layer.
        hidden_RH: rows of hidden states.
        experts_P: int32, the expert of each pair, in any order; equal ones together are computed together.
        rows_P: int32, the row of each pair.
        scores_E: float32 mean gate score of every expert in this step, or None; feeds eviction by score.
    """

    layer: int
    hidden_RH: torch.Tensor
    experts_P: np.ndarray
    rows_P: np.ndarray
    scores_E: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAnswer:
    """The unweighted output of every pair, and what it took.

    Attributes:
        output_PH: one row per pair, in the order of the call.
        hits, misses: pairs by whether their expert was resident (a load in flight is a miss).
        loads, bytes_loaded: experts moved over the link for this call.
        loaded: int32 expert ids (layer * 2**16 + expert) that became resident since the last answer.
        evicted: likewise, that ceased to be.
    """

    output_PH: torch.Tensor
    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    loaded: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


LAYER_SHIFT = 16


def expert_id(layer: int, expert: int) -> int:
    """One integer for (layer, expert), as residency and messages use it."""
    return (layer << LAYER_SHIFT) | expert


def layer_and_expert(identifier: int) -> tuple[int, int]:
    """The inverse of ``expert_id``."""
    return identifier >> LAYER_SHIFT, identifier & ((1 << LAYER_SHIFT) - 1)
