"""What each expert in a slot is worth keeping: one number per slot, by the eviction rule in force. Pure bookkeeping.

Three rules: by score, least recently used, least frequently used. By score means the mean over the last steps of the
gate score (SMoE, arXiv 2508.18983, section on eviction) and of the share of rows that used the expert: what is used
often also scores high, but not always the other way round. On the embedded model with slots for 2 x top-k experts the
hit rate is 0.646 by scores alone, 0.654 by both; least recently used has 0.588, the clairvoyant bound 0.726.

Whatever the rule, an expert that the forecast names for a layer still to come is worth at least its forecast:
evicting it now would mean to load it again at once.

S slots, L layers, E experts.
"""

import numpy as np

from raymoe.placement.eviction import ScoreWindow, UseCounts

USED = 1.0  # what a use in a step counts, beside the gate score; 0.3 to 1 hit equally well, 0 by a hundredth less


class Keeper:
    """Scores, uses and forecasts of one worker's experts. Mutable; its owner serialises access."""

    def __init__(self, eviction: str, layers: int, experts: int, window: int) -> None:
        self.eviction = eviction
        self._mean = ScoreWindow(layers, experts, window)
        self._uses = UseCounts(layers, experts)
        self._worth_LE = np.zeros((layers, experts), dtype=np.float32)  # means, or forecasts where those are higher
        self._forecast_LE = np.zeros((layers, experts), dtype=bool)
        self._row_E = np.zeros(experts, dtype=np.float32)  # what a step is worth, before it joins the mean

    def step(self, layer: int, scores_E: np.ndarray | None, experts_P: np.ndarray, rows: int) -> None:
        """A step of the layer has come: ``rows`` rows use these experts, one per pair; its forecast is of no more use.

        Args:
            scores_E: mean gate scores; None where they are not known.
        """
        if scores_E is not None:
            worth_E = self._row_E
            worth_E[: len(scores_E)], worth_E[len(scores_E) :] = scores_E, 0.0
            if rows == 1:
                worth_E[experts_P] += USED
            else:
                worth_E += np.bincount(experts_P, minlength=len(worth_E)) * (USED / rows)
            self._mean.observe(layer, worth_E)
        if self.eviction == "lfu":
            self._uses.observe(layer, experts_P)
        self._worth_LE[layer] = self._mean.mean_LE[layer]
        self._forecast_LE[layer] = False

    def steps(self, layers_N: np.ndarray, scores_NE: np.ndarray | None, experts_NK: np.ndarray) -> None:
        """``step`` of one row for each of several layers, none of them twice."""
        if scores_NE is not None:
            worth_NE = np.zeros((len(layers_N), self._worth_LE.shape[1]), dtype=np.float32)
            worth_NE[:, : scores_NE.shape[1]] = scores_NE
            worth_NE[np.arange(len(layers_N))[:, None], experts_NK] += np.float32(USED)
            self._mean.observe_layers(layers_N, worth_NE)
        if self.eviction == "lfu":
            for layer, experts_K in zip(layers_N.tolist(), experts_NK, strict=True):
                self._uses.observe(layer, experts_K)
        self._worth_LE[layers_N] = self._mean.mean_LE[layers_N]
        self._forecast_LE[layers_N] = False

    def expect(self, layer: int, experts: np.ndarray, worth: np.ndarray) -> None:
        """The forecast for a layer to come, and what each expert is worth by it; replaces an earlier one."""
        row_E = self._worth_LE[layer]
        row_E[:] = self._mean.mean_LE[layer]
        row_E[experts] = np.maximum(row_E[experts], worth)
        self._forecast_LE[layer] = False
        self._forecast_LE[layer, experts] = True

    def values(self, place_S: np.ndarray, last_use_S: np.ndarray) -> np.ndarray:
        """What keeping each slot's expert is worth; only their order means something.

        Args:
            place_S: layer x experts per layer + expert, of the expert in each slot.
        """
        if self.eviction == "score":
            return self._worth_LE.reshape(-1).take(place_S)
        value_S = last_use_S if self.eviction == "lru" else self._uses.counts_LE.reshape(-1).take(place_S)
        return np.where(self._forecast_LE.reshape(-1).take(place_S), np.inf, value_S)

    @property
    def mean_LE(self) -> np.ndarray:
        """Mean worth of every expert over the last steps, whatever the rule; to read, not to write to."""
        return self._mean.mean_LE

    def worth(self, layer: int, expert: int) -> float:
        """By score, whatever the rule of eviction: what a prefetch that would evict the expert has to beat."""
        return float(self._worth_LE[layer, expert])
