"""What a shadow leaves out of a decode step: of a token's experts all but the best, in some layers every one.

Only the computation of routed experts is thinned. Attention, norms, shared experts and routers run in every layer, so
that caches stay whole, keys and values can be aligned everywhere, and the router of a layer without experts still
names them, from the state at hand. Prompts are read in full: their keys and values are the shadow's own for good.

T tokens, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raymoe.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinning:
    """What is computed.

    Attributes:
        top_k: at most so many experts of a token, those that weigh most; None is all that its router chose.
        skipped: MoE layers of which none is.
    """

    top_k: int | None = None
    skipped: frozenset[int] = frozenset()

    def kept(self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts to compute and their weights, [T, k]; the same tensors where nothing is left out.

        Each keeps its own weight, also where the architecture makes them sum to one: what is left out is missing then,
        but nothing else has changed. With the best 2 of 4 experts the embedded model's shadow has 0.925 of the tokens
        right that way, and 0.894 where the two are scaled to make up for the others (recall 0.966 and 0.962).
        """
        if layer in self.skipped:
            return experts_TK[:, :0], weights_TK[:, :0]
        if self.top_k is None or self.top_k >= experts_TK.shape[1]:
            return experts_TK, weights_TK
        kept_Tk, places_Tk = weights_TK.topk(self.top_k, dim=1)
        return experts_TK.gather(1, places_Tk), kept_Tk


def skipped_layers(skip: int | Sequence[int], layers: int) -> frozenset[int]:
    """The layers that a setting names: by number, or so many from the last on, which fewest routers come after.

    Args:
        layers: MoE layers of the model.

    Raises:
        ConfigError: the model has no such layers.
    """
    if isinstance(skip, int):
        if skip > layers:
            raise ConfigError(
                f"predictor.skip_layers is {skip}, but the model has {layers} MoE layers; allowed is 0 to {layers}"
            )
        return frozenset(range(layers - skip, layers))
    unknown = sorted(layer for layer in skip if not 0 <= layer < layers)
    if unknown:
        raise ConfigError(
            f"predictor.skip_layers names layer {unknown[0]}, but the model's MoE layers are 0 to {layers - 1}"
        )
    return frozenset(skip)
