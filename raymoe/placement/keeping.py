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
        self._worth = ScoreWindow(layers, experts, window)
        self._uses = UseCounts(layers, experts)
        self._forecast_LE = np.zeros((layers, experts), dtype=np.float32)
        self._has_forecast = False

    def step(self, layer: int, scores_E: np.ndarray | None, experts_P: np.ndarray, rows: int) -> None:
        """The layer's step has these mean gate scores, and ``rows`` rows use these experts, one per pair."""
        if scores_E is not None:
            used_E = np.bincount(experts_P, minlength=len(scores_E)).astype(np.float32)
            self._worth.observe(layer, scores_E + used_E * np.float32(USED / rows))
        if self.eviction == "lfu":
            self._uses.observe(layer, experts_P)

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The forecast for a layer to come; replaces an earlier one for it. Returns what each expert is worth."""
        worth = scores + np.float32(USED)
        self._forecast_LE[layer] = 0.0
        self._forecast_LE[layer, experts] = worth
        self._has_forecast = True
        return worth

    def reached(self, layer: int) -> None:
        """The layer has come: its forecast is of no more use."""
        if self._has_forecast:
            self._forecast_LE[layer] = 0.0

    def values(self, layer_S: np.ndarray, expert_S: np.ndarray, last_use_S: np.ndarray) -> np.ndarray:
        """What keeping each slot's expert is worth; only their order means something."""
        if self.eviction == "score":
            mean_S = self._worth.mean_LE[layer_S, expert_S]
            return np.maximum(mean_S, self._forecast_LE[layer_S, expert_S]) if self._has_forecast else mean_S
        value_S = last_use_S if self.eviction == "lru" else self._uses.counts_LE[layer_S, expert_S]
        if not self._has_forecast:
            return value_S
        return np.where(self._forecast_LE[layer_S, expert_S] > 0.0, np.inf, value_S)

    def worth(self, layer: int, expert: int) -> float:
        """By score, whatever the rule of eviction: what a prefetch that would evict the expert has to beat."""
        return float(max(self._worth.mean_LE[layer, expert], self._forecast_LE[layer, expert]))
