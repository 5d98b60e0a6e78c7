"""Small identifiers and records that several rooms share. No torch, no Ray, no I/O."""

from dataclasses import dataclass
from typing import NewType

DeviceName = NewType("DeviceName", str)
"""Name of an edge device, unique in a cluster; one expert worker serves it."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ExpertKey:
    """One routed expert: the unit that is owned, loaded, evicted and computed.

    ``layer`` counts MoE layers from 0 (a dense first layer has no number); ``expert`` is the router's index.
    """

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """What placement needs to know of one MoE layer: how many experts, how many bytes each, how many per token."""

    experts: int
    expert_bytes: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the expert calls of one request cost.

    ``hits`` and ``misses`` count (token, expert) pairs by whether the expert was resident when the call came;
    ``bytes_loaded`` crossed a link for this request's calls; ``calls`` went to workers.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    calls: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of pairs served from residency; 1.0 where nothing was asked for."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    def __add__(self, other: "Routing") -> "Routing":
        return Routing(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            loads=self.loads + other.loads,
            bytes_loaded=self.bytes_loaded + other.bytes_loaded,
            calls=self.calls + other.calls,
        )
