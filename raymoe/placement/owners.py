"""Which owner is asked for each expert while some of the workers are avoided.

All are asked of their primary owner while that is well. What it would have been asked for in a layer goes as a whole to
one other owner where one has all of it, so that a layer costs as many messages as before; else each expert to whoever
is asked for fewest of the layer.

L MoE layers, W workers, E experts of a layer.
"""

from collections.abc import Sequence

import numpy as np

NOBODY = -1


def owners_to_ask(
    owned_LWE: Sequence[np.ndarray], primary_LE: Sequence[np.ndarray], avoided_W: np.ndarray
) -> list[np.ndarray]:
    """The worker to ask for each expert of each layer, int16 [E], ``NOBODY`` where no owner is well. Deterministic.

    Args:
        owned_LWE: bool [W, E], who owns what.
        primary_LE: whom to ask while all are well, ``NOBODY`` where that was never said. One who does not own the
            expert is not asked.
        avoided_W: bool, who is not to be asked.
    """
    total_W = np.zeros(len(avoided_W), dtype=np.int64)
    asked_LE = []
    for owned_WE, primary_E in zip(owned_LWE, primary_LE, strict=True):
        well_WE = owned_WE & ~avoided_W[:, None]
        asked_E = primary_E.astype(np.int16)
        asked_E[~_is_well(well_WE, asked_E)] = NOBODY
        _fill(asked_E, primary_E, well_WE, total_W)
        total_W += np.bincount(asked_E[asked_E >= 0], minlength=len(total_W))
        asked_LE.append(asked_E)
    return asked_LE


def _is_well(well_WE: np.ndarray, asked_E: np.ndarray) -> np.ndarray:
    """Bool [E]: whether who is asked is well and owns it."""
    well_E: np.ndarray = well_WE[np.maximum(asked_E, 0), np.arange(len(asked_E))]
    return well_E & (asked_E >= 0)


def _fill(asked_E: np.ndarray, primary_E: np.ndarray, well_WE: np.ndarray, total_W: np.ndarray) -> None:
    """Find somebody for each expert that nobody is asked for and somebody has, in place."""
    missing = np.flatnonzero((asked_E < 0) & well_WE.any(axis=0))
    layer_W = np.bincount(asked_E[asked_E >= 0], minlength=len(total_W))
    for primary in np.unique(primary_E[missing]).tolist():
        group = missing[primary_E[missing] == primary]
        whole = np.flatnonzero(well_WE[:, group].all(axis=1))
        if whole.size:
            worker = _least(whole, layer_W, total_W)
            asked_E[group] = worker
            layer_W[worker] += len(group)
            continue
        for expert in group.tolist():
            worker = _least(np.flatnonzero(well_WE[:, expert]), layer_W, total_W)
            asked_E[expert] = worker
            layer_W[worker] += 1


def _least(workers: np.ndarray, layer_W: np.ndarray, total_W: np.ndarray) -> int:
    """Who is asked for fewest of the layer, then of all; then the first."""
    return min(workers.tolist(), key=lambda worker: (layer_W[worker], total_W[worker], worker))
