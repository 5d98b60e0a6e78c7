"""A layer's calls split by who computes what.

R rows of a call, P (row, expert) pairs, T tokens, H hidden.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from raymoe.experts.call import ExpertCall
from raymoe.types import StepId


def by_worker(experts_P: np.ndarray, worker_P: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each worker, and the places of its pairs: those of one expert lie together."""
    order_P = np.lexsort((experts_P, worker_P))
    bounds = np.flatnonzero(np.diff(worker_P[order_P], prepend=-2, append=-2)).tolist()
    for start, end in itertools.pairwise(bounds):
        mine_P = order_P[start:end]
        yield int(worker_P[mine_P[0]]), mine_P


def subset(
    layer: int,
    hidden_TH: torch.Tensor,
    experts_P: np.ndarray,
    rows_P: np.ndarray,
    scores_E: np.ndarray | None,
    step: StepId | None = None,
) -> ExpertCall:
    """A call with only the rows it needs, renumbered."""
    if hidden_TH.shape[0] == 1:
        return ExpertCall(
            layer=layer, hidden_RH=hidden_TH, experts_P=experts_P, rows_P=rows_P, scores_E=scores_E, step=step
        )
    needed_R, renumbered_P = np.unique(rows_P, return_inverse=True)
    hidden_RH = (
        hidden_TH if len(needed_R) == hidden_TH.shape[0] else hidden_TH[torch.from_numpy(needed_R).to(hidden_TH.device)]
    )
    return ExpertCall(
        layer=layer,
        hidden_RH=hidden_RH,
        experts_P=experts_P,
        rows_P=renumbered_P.astype(np.int32),
        scores_E=scores_E,
        step=step,
    )


def part_of(call: ExpertCall, mine_P: np.ndarray) -> ExpertCall:
    """Some pairs of a call as one of its own."""
    return subset(call.layer, call.hidden_RH, call.experts_P[mine_P], call.rows_P[mine_P], call.scores_E, call.step)
