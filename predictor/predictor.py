"""One protocol for everything that foretells routing, and each kind of it behind that protocol, for evaluation.

A predictor follows B rows in lockstep. Before a step it may name the experts of any layer, and while a layer is being
computed those of layers after it. What it names last before a layer is reached counts.

B rows, K experts per token, E experts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from transformers.cache_utils import Cache

from predictor.forecast import Forecast, LayerForecast
from predictor.history import HistoryForecast
from predictor.shadow import Alignment, Guess, Rows, Shadow, Told, is_due
from predictor.shadow_model import ShadowModel
from raymoe.model.kv import abilities, entries
from raymoe.model.router import Router

Named = dict[int, np.ndarray]
"""Experts [B, K] by MoE layer."""

SEQUENCE = 0  # a predictor that is evaluated follows one


class Predictor(Protocol):
    """Foretells routing.

    Attributes:
        bytes_sent: of keys and values that the model gave to it.
    """

    bytes_sent: int

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """The model has read these prompts, all of one length."""
        ...

    def before(self, position: int, tokens: Rows, cache: Cache | None) -> Named:
        """What is known before the model reads ``tokens`` at ``position``; ``cache`` is the model's."""
        ...

    def during(self, layer: int) -> Named:
        """What else is known while ``layer`` is being computed."""
        ...

    def after(self, tokens: Rows, routed: Sequence[np.ndarray]) -> None:
        """The step was routed so, by layer."""
        ...


class ShadowPredictor:
    """A shadow in lockstep with the model: each step is foretold as a whole before it begins.

    Attributes:
        counts: the shadow's.
    """

    def __init__(self, model: ShadowModel, alignment: Alignment, guess: Guess | None = None) -> None:
        self.bytes_sent = 0
        self._alignment = alignment
        self._shadow = Shadow(model, alignment, self._take, guess)
        self.counts = self._shadow.counts
        self._named: Named = {}
        self._prompt = 0
        self._unsent = 0

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """Read the prompts too."""
        self._shadow.end(SEQUENCE)
        self._shadow.begin(SEQUENCE, rows)
        self._prompt = self._unsent = len(rows[0])
        while self._shadow.step():
            pass

    def before(self, position: int, tokens: Rows, cache: Cache | None) -> Named:
        """Align as far as that is due, and run the step."""
        told = Told(position=position, tokens=tokens)
        due = is_due(self._alignment.kv_every, position - self._prompt) and self._unsent < position
        if due and cache is not None and abilities(cache).alignable:
            mine = entries(cache, self._unsent, position)
            told = Told(position=position, tokens=tokens, entries=mine, start=self._unsent)
            self.bytes_sent += mine.flat.nbytes
            self._unsent = position
        self._named = {}
        self._shadow.tell(SEQUENCE, told)
        while self._shadow.step():
            pass
        return self._named

    def during(self, layer: int) -> Named:
        """Nothing new."""
        return {}

    def after(self, tokens: Rows, routed: Sequence[np.ndarray]) -> None:
        """Nothing to learn."""

    def _take(self, forecast: LayerForecast) -> None:
        self._named[forecast.layer] = forecast.experts_TK


class LookaheadPredictor:
    """A forecast that looks from the layer in hand at a later one.

    Args:
        ahead: layers.
        top_k: experts per token.
    """

    def __init__(self, forecast: Forecast, routers: Sequence[Router], ahead: int, top_k: Sequence[int]) -> None:
        self.bytes_sent = 0
        self._forecast = forecast
        self._routers = routers
        self._ahead = ahead
        self._top_k = top_k

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """It keeps nothing."""

    def before(self, position: int, tokens: Rows, cache: Cache | None) -> Named:
        """Nothing is known yet."""
        return {}

    def during(self, layer: int) -> Named:
        """The experts of one later layer."""
        there = layer + self._ahead
        if there >= len(self._routers):
            return {}
        scores_BE = self._forecast.scores(layer, self._ahead)
        rule = self._routers[there].rule
        if scores_BE is None or rule is None:
            return {}
        return {there: best(rule.selection_scores(scores_BE), self._top_k[there])}

    def after(self, tokens: Rows, routed: Sequence[np.ndarray]) -> None:
        """Nothing to learn."""


class HistoryPredictor:
    """What tokens were routed to before."""

    def __init__(self, layers: int, experts: int, top_k: Sequence[int]) -> None:
        self.bytes_sent = 0
        self._history = HistoryForecast(layers, experts)
        self._top_k = top_k

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """What was learnt stays."""
        self._history.begin()

    def before(self, position: int, tokens: Rows, cache: Cache | None) -> Named:
        """All layers."""
        scores_BLE = self._history.scores(tokens)
        return {layer: best(scores_BLE[:, layer], k) for layer, k in enumerate(self._top_k)}

    def during(self, layer: int) -> Named:
        """Nothing new."""
        return {}

    def after(self, tokens: Rows, routed: Sequence[np.ndarray]) -> None:
        """Learn."""
        self._history.observe(tokens, routed, rows=len(tokens))


def best(scores_BE: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` highest of each row, [B, K]; ties go to the lower index."""
    return np.argsort(-scores_BE, axis=1, kind="stable")[:, :k]
