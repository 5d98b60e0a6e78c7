"""Record exact routing of held-out text: gate scores, choices, and what later gates say ahead of time."""

import numpy as np
import torch

from benchmarks.scheduling.replay import Trace
from benchmarks.scheduling.setup import Bench, Variant
from predictor.gate import GateForecast
from raymoe.placement.prefetch import FARTHEST


class Recorder:
    """Wraps a variant's scheduler: notes scores and choices of every layer of every decode step."""

    def __init__(self, bench: Bench, variant: Variant) -> None:
        self._bench, self._inner, self._forecast = bench, variant.scheduler, GateForecast(bench.sites)
        self._rows: dict[str, list[np.ndarray]] = {"scores": [], "chosen": [], "ahead": []}

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note, and change nothing."""
        router = self._bench.routers[layer]
        assert router.rule is not None
        if experts_TK.shape[0] == 1:
            scores_E = router.scores_of(router.logits_TE)[0]
            ahead = [self._forecast.scores(layer, distance) for distance in range(1, FARTHEST + 1)]
            self._rows["scores"].append(scores_E)
            self._rows["chosen"].append(experts_TK[0].numpy().copy())
            self._rows["ahead"].append(np.stack([np.zeros_like(scores_E) if a is None else a[0] for a in ahead]))
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """As the scheduler does."""
        return self._inner.compute(layer, hidden_TH, experts_TK)

    def __getattr__(self, name: str):  # everything else is the scheduler's
        return getattr(self._inner, name)

    def trace(self) -> Trace:
        """What was recorded since the last call."""
        layers = self._bench.layers
        rows = {name: np.stack(values) for name, values in self._rows.items()}
        self._rows = {name: [] for name in self._rows}
        return Trace(
            scores_TLE=rows["scores"].reshape(-1, layers, *rows["scores"].shape[1:]),
            chosen_TLK=rows["chosen"].reshape(-1, layers, *rows["chosen"].shape[1:]),
            ahead_TLAE=rows["ahead"].reshape(-1, layers, *rows["ahead"].shape[1:]),
        )
