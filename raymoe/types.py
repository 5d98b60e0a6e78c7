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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class StepId:
    """One forward of the trunk.

    ``position`` is the place in ``sequence`` of the token that it reads (of the first one, where it reads several).
    """

    sequence: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """What placement needs to know of one MoE layer: how many experts, how many bytes each, how many per token."""

    experts: int
    expert_bytes: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the expert calls of one request cost.

    Attributes:
        hits, misses: (token, expert) pairs, after substitution, by whether the expert was resident when the call
            came; a load in flight is a miss, and so is an expert computed on the host.
        loads, bytes_loaded: what crossed a link in these calls and since the calls before them.
        hosted: pairs computed on a worker's host CPU instead of in a slot.
        calls: messages to workers.
        decisions: (token, layer) pairs that were routed.
        substituted: (token, expert) pairs of the router that were replaced by another expert.
        degraded: (token, expert) pairs whose expert nobody could be asked for, and another computed instead.
        replaced_mass: sum over decisions of the replaced experts' share of the chosen ones' gate scores.
        foretellable, foretold: (token, expert) pairs of decode steps under a predictor, and those it had named.
        drafted, accepted: guesses of a shadow that were read along, and those that the model chose too.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    hosted: int = 0
    calls: int = 0
    decisions: int = 0
    substituted: int = 0
    degraded: int = 0
    replaced_mass: float = 0.0
    foretellable: int = 0
    foretold: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def recall(self) -> float | None:
        """Share of the truly chosen experts that the predictor named; None where none was asked."""
        return self.foretold / self.foretellable if self.foretellable else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that the model chose too; None where none was read."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def hit_rate(self) -> float:
        """Share of pairs served from residency; 1.0 where nothing was asked for."""
        total = self.hits + self.misses
        return self.hits / total if total else 1.0

    @property
    def substituted_gate_mass(self) -> float:
        """Mean share of the chosen experts' gate scores that was replaced, from 0 (exact) to 1."""
        return self.replaced_mass / self.decisions if self.decisions else 0.0

    def spread(self, rows: int) -> list["Routing"]:
        """What so many rows of one step cost together, as evenly for each as whole numbers allow."""
        totals = {name: getattr(self, name) for name in self.__slots__}
        return [
            Routing(
                **{
                    name: total // rows + (row < total % rows) if isinstance(total, int) else total / rows
                    for name, total in totals.items()
                }
            )
            for row in range(rows)
        ]

    def __add__(self, other: "Routing") -> "Routing":
        return Routing(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRecipe:
    """All that the choice of tokens depends on, beside logits and tokens: who has the same recipe chooses alike."""

    seed: int
    top_k: int
    temperature: float
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
