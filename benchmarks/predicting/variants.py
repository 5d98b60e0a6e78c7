"""What is measured: kinds of predictors, precisions, alignments."""

from dataclasses import dataclass
from typing import Literal

PRECISIONS = (16, 8, 4, 3, 2)  # bits of a shadow's experts
SWEPT = (16, 8, 4)  # precisions for which periods are tried
PERIODS = (1, 2, 4, 8, 16, 0)  # steps between alignments; 0 is never
GATES_AHEAD = (1, 2, 3)  # layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A predictor.

    Attributes:
        bits: of a shadow's experts.
        token_every, kv_every: periods of a shadow's alignment in steps; 0 is never.
        ahead: layers that a gate looks ahead.
        top_k: experts of a token that a shadow computes at most; None is all.
        skipped: MoE layers in which it computes none.
    """

    kind: Literal["shadow", "gate", "history"] = "shadow"
    bits: int = 8
    token_every: int = 1
    kv_every: int = 1
    ahead: int = 1
    top_k: int | None = None
    skipped: tuple[int, ...] = ()

    @property
    def kind_name(self) -> str:
        """Kind and precision."""
        if self.kind == "gate":
            return f"gate, +{self.ahead}"
        if self.kind == "history":
            return "history"
        return f"shadow, {bits_name(self.bits)}"

    @property
    def thinned_name(self) -> str:
        """What a shadow leaves out of a step."""
        experts = "" if self.top_k is None else f", best {self.top_k}"
        if not self.skipped:
            return bits_name(self.bits) + experts
        first, last = self.skipped[0], self.skipped[-1]
        return f"{bits_name(self.bits)}{experts}, without {first}" + (f" to {last}" if last > first else "")

    @property
    def alignment_name(self) -> str:
        """Alignment of a shadow."""
        return f"token {period_name(self.token_every)}, KV {period_name(self.kv_every)}"


def bits_name(bits: int) -> str:
    """As people call them."""
    return {16: "bf16", 8: "int8"}.get(bits, f"{bits}-bit")


def period_name(every: int) -> str:
    """A period in words."""
    return "never" if every == 0 else f"every {every}" if every > 1 else "always"


def aligned() -> list[Variant]:
    """Shadows of each precision that follow token and KV at each step."""
    return [Variant(bits=bits) for bits in PRECISIONS]


def others() -> list[Variant]:
    """Predictors without a model of their own."""
    return [*(Variant(kind="gate", ahead=ahead) for ahead in GATES_AHEAD), Variant(kind="history")]


def unaligned_kv() -> list[Variant]:
    """On given text the tokens are the text's, so that KV alone is left to align."""
    return [Variant(bits=bits, kv_every=0) for bits in PRECISIONS]


def alignments() -> list[Variant]:
    """Each precision without alignment, and with that of the token, of KV, and of both."""
    return [
        Variant(bits=bits, token_every=token, kv_every=kv)
        for bits in PRECISIONS
        for token, kv in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]


def periods() -> list[Variant]:
    """Periods of the token with KV always, of KV with the token always, and of both alike."""
    pairs = [pair for every in PERIODS for pair in ((every, 1), (1, every), (every, every))]
    return [Variant(bits=bits, token_every=token, kv_every=kv) for bits in SWEPT for token, kv in dict.fromkeys(pairs)]
