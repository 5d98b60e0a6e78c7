"""Many predictors behind one run of the model: what they name changes nothing, so they can follow it side by side.

B rows, N steps, L MoE layers, K experts per token.
"""

from collections.abc import Sequence

import numpy as np
from transformers.cache_utils import Cache

from predictor.predictor import Named, Predictor, ShadowPredictor
from predictor.shadow import Rows
from raymoe.engine.evaluate import Recall, recalled


class Together:
    """A ``Predictor`` that names nothing itself, asks others, and notes how well each of them did."""

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        self.bytes_sent = 0
        self._predictors = list(predictors)
        self._named: list[Named] = [{} for _ in predictors]
        self._recall: list[list[np.ndarray]] = [[] for _ in predictors]  # [B, L] of each step

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """The model has read these prompts."""
        for predictor in self._predictors:
            predictor.begin(rows)

    def before(self, position: int, tokens: Rows, cache: Cache | None) -> Named:
        """Ask each."""
        self._named = [dict(predictor.before(position, tokens, cache)) for predictor in self._predictors]
        return {}

    def during(self, layer: int) -> Named:
        """Ask each."""
        for predictor, named in zip(self._predictors, self._named, strict=True):
            named.update(predictor.during(layer))
        return {}

    def after(self, tokens: Rows, routed: Sequence[np.ndarray]) -> None:
        """Compare."""
        for predictor, named, recall in zip(self._predictors, self._named, self._recall, strict=True):
            nothing_B = np.full(len(tokens), np.nan)
            recall.append(
                np.stack(
                    [
                        recalled(experts_BK, named[layer]) if layer in named else nothing_B
                        for layer, experts_BK in enumerate(routed)
                    ],
                    axis=1,
                )
            )
            predictor.after(tokens, routed)

    def results(self) -> list[Recall]:
        """Of each predictor, in order."""
        return [
            _result(predictor, np.stack(steps, axis=1))
            for predictor, steps in zip(self._predictors, self._recall, strict=True)
        ]


def _result(predictor: Predictor, recall_BNL: np.ndarray) -> Recall:
    counts = predictor.counts if isinstance(predictor, ShadowPredictor) else None
    return Recall(
        recall_BNL=recall_BNL,
        agreement=counts.right / counts.guesses if counts is not None and counts.guesses else None,
        bytes_per_token=predictor.bytes_sent / (recall_BNL.shape[0] * recall_BNL.shape[1]),
    )
