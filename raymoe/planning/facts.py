"""What planning needs to know of a model: sizes, all of which follow from its configuration and headers. Pure."""

from dataclasses import dataclass
from functools import cached_property

from raymoe.types import LayerSize

SHADOW_BITS = {16: 16, 8: 8, 4: 5, 3: 4, 2: 3}
"""Stored bits per weight of a shadow's experts: below 8 a float16 scale and minimum for each group of 32 are added."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model's sizes in the precision in which it is served.

    Attributes:
        known_from: "headers" of the weights, or the "configuration" alone.
        element_bytes: of one weight or activation.
        sizes: every MoE layer.
        hidden: width of a row.
        trunk_bytes: everything but the routed experts.
        head_bytes: the output matrix, which each token reads (also where it is the embedding table itself).
        table_bytes: the embedding table, of which a token reads one row; 0 where it is the output matrix.
        kv_bytes: keys and values of one token in all layers.
    """

    name: str
    model_type: str
    dtype: str
    known_from: str
    element_bytes: int
    sizes: tuple[LayerSize, ...]
    hidden: int
    trunk_bytes: int
    head_bytes: int
    table_bytes: int
    kv_bytes: int

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self.sizes)

    @cached_property
    def routed_bytes(self) -> int:
        """All routed experts."""
        return sum(size.experts * size.expert_bytes for size in self.sizes)

    @cached_property
    def experts(self) -> float:
        """Experts of a layer, in the mean; as all means here, layers that differ are taken as alike."""
        return sum(size.experts for size in self.sizes) / self.layers

    @cached_property
    def top_k(self) -> int:
        """Experts per token."""
        return max(size.top_k for size in self.sizes)

    @cached_property
    def expert_bytes(self) -> int:
        """One expert, the largest."""
        return max(size.expert_bytes for size in self.sizes)

    @property
    def layer_bytes(self) -> float:
        """What a token reads of the trunk per MoE layer; dense layers count in with their neighbours."""
        return max(0, self.trunk_bytes - self.head_bytes - self.table_bytes) / self.layers

    @property
    def row_bytes(self) -> int:
        """A row of hidden states."""
        return self.hidden * self.element_bytes

    def shadow_expert_bytes(self, bits: int) -> float:
        """One expert of a shadow."""
        return self.expert_bytes / self.element_bytes * SHADOW_BITS[bits] / 8

    def shadow_trunk_element_bytes(self, bits: int) -> int:
        """Bytes per weight of its trunk: the model's, or bfloat16 throughout."""
        return min(2, self.element_bytes) if bits == 16 else self.element_bytes

    def shadow_bytes(self, bits: int) -> int:
        """The weights of a shadow."""
        trunk = self.trunk_bytes / self.element_bytes * self.shadow_trunk_element_bytes(bits)
        return round(trunk + self.routed_bytes / self.element_bytes * SHADOW_BITS[bits] / 8)
