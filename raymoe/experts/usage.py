"""How much each expert was used lately, and where each is now: what a map of a device shows.

L layers, E experts, P pairs (row, expert).
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

FADE_S = 10.0  # after which a use counts a third: long enough to see habits of a text, short enough to follow it
MOST = 255  # heat is told in one byte per expert


class Place(IntEnum):
    """Where an expert is, as seen from one device."""

    ELSEWHERE = 0
    HOST = 1
    LOADING = 2
    READY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyMap:
    """One device's experts, a byte each, layer by layer.

    Attributes:
        place: ``Place`` of every expert [L * E].
        use: uses lately, from 0 to 255, which stands for ``use_max``.
        score: what keeping it is worth by gate score and use, from 0 to 255, which stands for ``score_max``.
    """

    layers: int
    experts: int
    place: bytes
    use: bytes
    use_max: float
    score: bytes
    score_max: float


class Usage:
    """Uses of every expert, fading with time. Counted by the thread that computes, read by others.

    Reading is rare and does all the work: a count is one addition per pair.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._counted_LE = np.zeros((layers, experts), dtype=np.int64)
        self._seen_LE = np.zeros((layers, experts), dtype=np.int64)
        self._recent_LE = np.zeros((layers, experts), dtype=np.float64)
        self._seen_s = -math.inf

    def note(self, layer: int, experts_P: np.ndarray) -> None:
        """These pairs were asked for."""
        np.add.at(self._counted_LE[layer], experts_P, 1)

    def recent(self, now_s: float) -> np.ndarray:
        """Uses [L, E], each weighing less the longer ago it was seen here."""
        counted_LE = self._counted_LE.copy()
        self._recent_LE *= math.exp(-max(0.0, now_s - self._seen_s) / FADE_S)
        self._recent_LE += counted_LE - self._seen_LE
        self._seen_LE, self._seen_s = counted_LE, now_s
        return self._recent_LE.copy()


def as_heat(value_LE: np.ndarray) -> tuple[bytes, float]:
    """Values of at least 0 as bytes, and what the highest byte stands for; 0.0 where all are 0."""
    most = float(value_LE.max(initial=0.0))
    if most <= 0.0:
        return bytes(value_LE.size), 0.0
    return np.rint(value_LE * (MOST / most)).astype(np.uint8).tobytes(), most
