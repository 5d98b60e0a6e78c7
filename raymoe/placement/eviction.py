"""Which slot to give up. Pure: arrays in, an index out."""

import numpy as np


def least_recently_used(last_use_S: np.ndarray, evictable_S: np.ndarray) -> int | None:
    """The evictable slot whose expert was used longest ago, or None where every slot is shielded.

    Args:
        last_use_S: int64, a counter value per slot; larger is later. Ties go to the lower slot.
        evictable_S: bool per slot; False for shielded slots and those with a load in flight.
    """
    candidates = np.flatnonzero(evictable_S)
    if candidates.size == 0:
        return None
    return int(candidates[np.argmin(last_use_S[candidates])])


def prefetch_is_welcome(score: float, victim_score: float | None) -> bool:
    """Whether a prefetch of an expert with gate score ``score`` may evict one that scored ``victim_score``.

    None means the victim was never scored, so nothing speaks for keeping it.
    """
    return victim_score is None or score > victim_score
