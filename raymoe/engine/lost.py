"""Experts that nobody can be asked for: whether a policy can do without them, and what that costs.

T tokens, K experts per token.
"""

from collections.abc import Collection, Sequence

import torch

from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.substitution import do_without
from raymoe.model.router import Router


class LostExperts:
    """Used by the engine's thread.

    Args:
        substitutes: whether others compute in their place, whatever alpha says (``scheduling.on_lost_expert``).

    Attributes:
        routers: one per MoE layer, once they are known.
        degraded: (token, expert) pairs in which another expert computed, since the last take.
    """

    def __init__(self, dispatcher: Dispatcher, *, substitutes: bool) -> None:
        self.routers: Sequence[Router] = ()
        self.degraded = 0
        self._dispatcher = dispatcher
        self._substitutes = substitutes
        self._top_k = 1

    def serves(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether requests that need these (layer, expert) can go on."""
        if self._dispatcher.has(experts):
            return True
        return self._substitutes and all(self._does_without(layer) for layer in {layer for layer, _ in experts})

    def _does_without(self, layer: int) -> bool:
        """Whether others can stand in for what is lost of a layer."""
        if layer >= len(self.routers) or self.routers[layer].rule is None:
            return False
        lost_E = self._dispatcher.lost(layer)
        return lost_E is None or int((~lost_E).sum()) >= self._top_k

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice, with what is lost replaced where that is wanted and can be done."""
        if not self._substitutes or layer >= len(self.routers):
            return experts_TK, weights_TK
        self._top_k = max(self._top_k, experts_TK.shape[1])
        lost_E = self._dispatcher.lost(layer)
        if lost_E is None:
            return experts_TK, weights_TK
        done = do_without(self.routers[layer], lost_E, experts_TK, weights_TK)
        if done is None or done.replaced is None:
            return experts_TK, weights_TK
        self.degraded += len(done.replaced)
        return done.experts_TK, done.weights_TK

    def take(self) -> int:
        """What was counted since the last take."""
        degraded, self.degraded = self.degraded, 0
        return degraded
