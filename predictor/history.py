"""The forecast by history: what a token was routed to before, in each layer.

Routing depends much on the token itself, most of all in early layers. Per layer three counts are mixed: what this very
token was routed to, what the sequence's last token was routed to, and what any token was. It costs next to nothing,
knows all layers of a step before the step begins, and learns while the model runs.

L layers, T tokens, K experts per token, E experts.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

MOST_TOKENS = 1 << 16  # that are remembered; a row takes layers x experts x 4 bytes, those not seen longest go
KNOWN_AFTER = 0.5  # sightings for which a token's own counts weigh as much as all others'; found by trying 0.25 to 4
LAST = 0.2  # weight of the last token's experts beside the share of any token's; from the embedded model


class HistoryForecast:
    """Token- and layer-conditioned statistics of routing. Mutable; one owner."""

    def __init__(self, layers: int, experts: int) -> None:
        self._layers, self._experts = layers, experts
        self._any_LE = np.full((layers, experts), 1.0 / experts, dtype=np.float32)
        self._any_count = 1.0
        self._of_token: OrderedDict[int, np.ndarray] = OrderedDict()
        self._sightings: dict[int, int] = {}
        self._last_TLE: np.ndarray | None = None

    def begin(self) -> None:
        """A sequence begins: there is no last token."""
        self._last_TLE = None

    def scores(self, tokens: Sequence[int]) -> np.ndarray:
        """Forecast scores [T, L, E] of a step that reads these tokens, one of each row; a layer's sum to about 1."""
        any_LE = self._any_LE / self._any_count
        scores_TLE = np.broadcast_to(any_LE, (len(tokens), *any_LE.shape)).copy()
        if self._last_TLE is not None:
            scores_TLE = (1 - LAST) * scores_TLE + LAST * self._last_TLE
        for row, token in enumerate(tokens):
            seen = self._sightings.get(token, 0)
            if seen:
                share = seen / (seen + KNOWN_AFTER)
                scores_TLE[row] = (1 - share) * scores_TLE[row] + share * self._of_token[token] / seen
        return scores_TLE

    def observe(self, tokens: Sequence[int], routed: Sequence[np.ndarray], rows: int = 1) -> None:
        """A step read these tokens and was routed to these experts ([T, K] per layer).

        Args:
            rows: of the step; the last ``rows`` tokens are those that the next step follows.
        """
        used_TLE = np.zeros((len(tokens), self._layers, self._experts), dtype=np.float32)
        for layer, experts_TK in enumerate(routed):
            np.put_along_axis(used_TLE[:, layer], experts_TK, 1.0 / experts_TK.shape[1], axis=1)
        self._any_LE += used_TLE.sum(axis=0)
        self._any_count += len(tokens)
        self._last_TLE = used_TLE[-rows:]
        for token, used_LE in zip(tokens, used_TLE, strict=True):
            if token in self._of_token:
                self._of_token[token] += used_LE
                self._of_token.move_to_end(token)
            else:
                self._of_token[token] = used_LE.copy()
            self._sightings[token] = self._sightings.get(token, 0) + 1
        while len(self._of_token) > MOST_TOKENS:
            forgotten, _ = self._of_token.popitem(last=False)
            del self._sightings[forgotten]
