"""Which experts of a layer to come are worth their way over a link, who shall fetch them, and how far to look ahead.

Pure.

T tokens, E experts, N experts named.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np

from raymoe.placement.keeping import USED
from raymoe.types import DeviceName, ExpertKey

QUEUEING = 1.3  # loads' time per layer's: orders wait for each other; replays of the embedded model's routing gave it
FARTHEST = 4  # layers; gates on the current state name 3 of 4 experts one layer ahead, hardly half of them four ahead


def wanted(scores_TE: np.ndarray, chosen_by_TE: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts that a forecast expects to be chosen, best first, and what each is worth.

    An expert is worth the mean over tokens of its score and of a use, where it is among a token's ``top_k``: the units
    in which ``keeping`` values what is in slots.

    Args:
        scores_TE: forecast gate scores.
        chosen_by_TE: what the architecture takes the largest of: the scores, or biased and limited to groups.

    Returns:
        (int64 [N], float32 [N])
    """
    tokens, experts = scores_TE.shape
    if tokens == 1:
        top = np.argsort(-chosen_by_TE[0], kind="stable")[:top_k]
        best = top[np.argsort(-scores_TE[0, top], kind="stable")] if chosen_by_TE is not scores_TE else top
        return best, scores_TE[0, best] + np.float32(USED)
    top_TK = np.argsort(-chosen_by_TE, axis=1, kind="stable")[:, : min(top_k, experts)]
    worth_TE = np.zeros_like(scores_TE)
    token_T1 = np.arange(tokens)[:, None]
    worth_TE[token_T1, top_TK] = scores_TE[token_T1, top_TK] + np.float32(USED)
    worth_E = worth_TE.mean(axis=0)
    named = np.flatnonzero(worth_E > 0)
    order = np.argsort(-worth_E[named], kind="stable")
    return named[order], worth_E[named][order]


def orders(
    layer: int,
    experts: np.ndarray,
    worths: np.ndarray,
    owners: Mapping[ExpertKey, DeviceName],
    devices: Collection[DeviceName],
) -> dict[DeviceName, tuple[list[int], list[float]]]:
    """A forecast split by who is asked for each expert: per device the experts, best first as given, and their worths.

    Residents are named too: their owner keeps them for the layer, and alone knows who they are. Experts without an
    owner, or with one that is not among ``devices``, are left out.
    """
    split: dict[DeviceName, tuple[list[int], list[float]]] = {}
    for expert, worth in zip(experts.tolist(), worths.tolist(), strict=True):
        owner = owners.get(ExpertKey(layer=layer, expert=expert))
        if owner is not None and owner in devices:
            mine = split.setdefault(owner, ([], []))
            mine[0].append(expert)
            mine[1].append(worth)
    return split


def lookahead(load_s: float | None, layer_s: float | None) -> int:
    """How many layers ahead a load must begin to be there in time: as many as pass while it waits and is loaded."""
    if not load_s or not layer_s:
        return 1
    return min(FARTHEST, max(1, math.ceil(QUEUEING * load_s / layer_s)))
