"""Which slot to give up, and what each expert is worth. Pure: arrays in, an index out; the two books are plain state.

Eviction by score keeps experts by their mean gate score over the last steps (SMoE, arXiv 2508.18983): an expert that
scored high stays useful for a few steps, chosen or as a substitute. Recency, frequency and the clairvoyant bound
stand beside it. A victim is found from one value per slot, gathered from a book: ``mean_LE[layers_S, experts_S]``.

L layers, E experts, S slots, W steps of a window.
"""

import numpy as np

from raymoe.errors import ConfigError

LONGEST_SCORE_WINDOW = 1024  # steps; bounds the memory of the window, and the paper finds scores useful for about 3


def lowest_value(value_S: np.ndarray, evictable_S: np.ndarray) -> int | None:
    """The evictable slot of the lowest value, or None where there is none. Ties go to the lower slot.

    Args:
        value_S: what the expert in each slot is worth, not NaN.
        evictable_S: bool per slot; False for shielded slots and those with a load in flight.
    """
    candidates = evictable_S.nonzero()[0]
    if candidates.size == 0:
        return None
    return int(candidates[value_S[candidates].argmin()])


def least_recently_used(last_use_S: np.ndarray, evictable_S: np.ndarray) -> int | None:
    """The evictable slot whose expert was used longest ago, or None where every slot is shielded.

    Args:
        last_use_S: int64, a counter value per slot; larger is later. Ties go to the lower slot.
        evictable_S: bool per slot; False for shielded slots and those with a load in flight.
    """
    return lowest_value(last_use_S, evictable_S)


def clairvoyant_victim(next_use_S: np.ndarray, evictable_S: np.ndarray) -> int | None:
    """The evictable slot whose expert is used farthest in the future: Belady's optimum, for replays only.

    Args:
        next_use_S: the step at which each slot's expert is used next; the largest value, or inf, for never.
        evictable_S: bool per slot.
    """
    candidates = evictable_S.nonzero()[0]
    if candidates.size == 0:
        return None
    return int(candidates[next_use_S[candidates].argmax()])


def prefetch_is_welcome(score: float, victim_score: float | None) -> bool:
    """Whether a prefetch of an expert with gate score ``score`` may evict one that scored ``victim_score``.

    None means the victim was never scored, so nothing speaks for keeping it.
    """
    return victim_score is None or score > victim_score


class ScoreWindow:
    """Mean gate score of every expert over the last ``window`` steps of its layer.

    Attributes:
        mean_LE: float32, to gather from, not to write to; 0 for layers without a step yet.

    Raises:
        ConfigError: a window that is empty or too long.
    """

    def __init__(self, layers: int, experts: int, window: int) -> None:
        if not 1 <= window <= LONGEST_SCORE_WINDOW:
            raise ConfigError(f"score_window must be 1 to {LONGEST_SCORE_WINDOW} steps, not {window}")
        self.mean_LE = np.zeros((layers, experts), dtype=np.float32)
        self._ring_LWE = np.zeros((layers, window, experts), dtype=np.float32)
        self._sum_LE = np.zeros((layers, experts))
        self._steps_L = np.zeros(layers, dtype=np.int64)

    def observe(self, layer: int, scores_E: np.ndarray) -> None:
        """Add one step of a layer. Mutates.

        Args:
            scores_E: gate scores of all experts, chosen or not, at least 0: of the token, or the mean over the batch.
                NaN counts as 0.
        """
        ring_WE, sum_E, step = self._ring_LWE[layer], self._sum_LE[layer], int(self._steps_L[layer])
        place = step % len(ring_WE)
        scores_E = np.fmax(scores_E, 0.0)
        sum_E += scores_E
        sum_E -= ring_WE[place]
        ring_WE[place] = scores_E
        if place == len(ring_WE) - 1:  # once per round, so that rounding errors do not add up
            ring_WE.sum(axis=0, dtype=np.float64, out=sum_E)
        self._steps_L[layer] = step + 1
        np.divide(sum_E, min(step + 1, len(ring_WE)), out=self.mean_LE[layer], casting="same_kind")

    def observe_layers(self, layers_N: np.ndarray, scores_NE: np.ndarray) -> None:
        """``observe`` for several layers, none of them twice. Mutates."""
        window = self._ring_LWE.shape[1]
        steps_N = self._steps_L[layers_N]
        place_N = steps_N % window
        scores_NE = np.fmax(scores_NE, np.float32(0.0))
        self._sum_LE[layers_N] += scores_NE.astype(np.float64) - self._ring_LWE[layers_N, place_N]
        self._ring_LWE[layers_N, place_N] = scores_NE
        for layer in layers_N[place_N == window - 1].tolist():
            self._ring_LWE[layer].sum(axis=0, dtype=np.float64, out=self._sum_LE[layer])
        self._steps_L[layers_N] = steps_N + 1
        self.mean_LE[layers_N] = self._sum_LE[layers_N] / np.minimum(steps_N + 1, window)[:, None]


class UseCounts:
    """How often each expert was used: the least frequently used (LFU) baseline.

    Attributes:
        counts_LE: float64, to gather from, not to write to.

    Args:
        half_life: steps of a layer after which its old counts weigh half; None: they never fade.
    """

    def __init__(self, layers: int, experts: int, half_life: int | None = None) -> None:
        if half_life is not None and half_life < 1:
            raise ConfigError(f"half_life must be at least 1 step, not {half_life}")
        self.counts_LE = np.zeros((layers, experts))
        self._half_life = half_life
        self._steps_L = [0] * layers

    def observe(self, layer: int, experts: np.ndarray) -> None:
        """Add one step of a layer in which ``experts`` were used; one that is named twice counts twice. Mutates."""
        np.add.at(self.counts_LE[layer], experts, 1.0)
        self._steps_L[layer] += 1
        if self._half_life is not None and self._steps_L[layer] % self._half_life == 0:
            self.counts_LE[layer] *= 0.5
