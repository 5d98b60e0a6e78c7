"""How much each expert was used lately, and where each is now: what a map of a device shows.

L layers, E experts, P pairs (row, expert).
"""

import math
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from raymoe.experts.bay import Bay
from raymoe.experts.call import layer_and_expert
from raymoe.experts.report import Place, ResidencyMap

FADE_S = 10.0  # after which a use counts a third: long enough to see habits of a text, short enough to follow it
MOST_CALLS = 16_384  # that were not read yet: more than a second of a deep model's
MOST_PAIRS = 256  # of one call; prompts ask for thousands, of nearly every expert
MOST = 255  # heat is told in one byte per expert


class Usage:
    """Uses of every expert, fading with time. Counted by the thread that computes, read by others.

    Reading is rare and does all the work: to note a call is to put it aside. What nobody reads for long is forgotten,
    as it would have faded.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._noted: deque[np.ndarray] = deque(maxlen=MOST_CALLS)  # places in the table, layer by layer
        self._recent_LE = np.zeros((layers, experts), dtype=np.float64)
        self._seen_s = -math.inf
        self._reading = threading.Lock()

    def note(self, layer: int, experts_P: np.ndarray) -> None:
        """These pairs were asked for. Of a prompt's many, evenly spread ones stand for all."""
        self._noted.append(experts_P[:: len(experts_P) // MOST_PAIRS + 1] + layer * self._recent_LE.shape[1])

    def note_rows(self, layers_N: np.ndarray, experts_NK: np.ndarray) -> None:
        """One row of each of several layers."""
        self._noted.append((experts_NK + layers_N[:, None] * self._recent_LE.shape[1]).reshape(-1))

    def recent(self, now_s: float) -> np.ndarray:
        """Uses [L, E], each weighing less the longer ago it was seen here."""
        with self._reading:
            self._recent_LE *= math.exp(-max(0.0, now_s - self._seen_s) / FADE_S)
            self._seen_s = now_s
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            if noted:
                counts = np.bincount(np.concatenate(noted), minlength=self._recent_LE.size)
                self._recent_LE += counts.reshape(self._recent_LE.shape)
            return self._recent_LE.copy()


def as_heat(value_LE: np.ndarray) -> tuple[bytes, float]:
    """Values of at least 0 as bytes, and what the highest byte stands for; 0.0 where all are 0."""
    most = float(value_LE.max(initial=0.0))
    if most <= 0.0:
        return bytes(value_LE.size), 0.0
    return np.rint(value_LE * (MOST / most)).astype(np.uint8).tobytes(), most


def residency_map(
    owned: Sequence[np.ndarray], bays: Sequence[Bay], use_LE: np.ndarray, *, has_slots: bool
) -> ResidencyMap:
    """What a worker's books say.

    Args:
        owned: bool per expert, by layer.
        use_LE: uses lately.
        has_slots: whether an expert must be in one to be computed.
    """
    place_LE = np.full(use_LE.shape, Place.ELSEWHERE, dtype=np.uint8)
    score_LE = np.zeros(use_LE.shape, dtype=np.float32)
    for owned_E, place_E in zip(owned, place_LE, strict=True):
        place_E[: len(owned_E)][owned_E] = Place.HOST if has_slots else Place.READY
    for bay in bays:
        ready_LE, loading = bay.ready_and_loading()
        place_LE[ready_LE] = Place.READY
        for identifier in loading:
            place_LE[layer_and_expert(identifier)] = Place.LOADING
        worth_LE = bay.worth_LE()
        if worth_LE is not None:
            np.maximum(score_LE, worth_LE, out=score_LE)
    use, use_max = as_heat(use_LE)
    score, score_max = as_heat(score_LE)
    return ResidencyMap(
        layers=use_LE.shape[0],
        experts=use_LE.shape[1],
        place=place_LE.tobytes(),
        use=use,
        use_max=use_max,
        score=score,
        score_max=score_max,
    )
