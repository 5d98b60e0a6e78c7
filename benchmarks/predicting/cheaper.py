"""Cheaper shadows: fewer bits, fewer experts of a token, layers without any; what each forgets, and what a step costs.

All follow one run of the model on held-out text, aligned at each step, so that they are compared on the same states.
A shadow computes on one thread and waits for nothing: its cost is processor time, which tells more than the clock on a
machine that does other things as well.

B rows, N choices.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.predicting.variants import Variant
from predictor.quantized_experts import QuantizedExperts
from predictor.shadow import RUN_AHEAD, Guess, Rows, greedy
from predictor.shadow_model import ShadowModel
from predictor.thinning import Thinning, skipped_layers
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import PredictorConfig
from raymoe.engine.evaluate import Recall, Sampled
from raymoe.presets import SHADOW_PRESETS

CPU = torch.device("cpu")
SEQUENCE = 0
PROMPT, STEPS = 64, 48  # tokens of a timed run: attention has something to read, and a median something to stand on


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a shadow knew.

    Attributes:
        recall: of the experts that the model's routers chose.
        greedy, sampled: share of choices in which its token was the model's: the likeliest, and at temperature 1 with
            the same noise. The latter is what drafts are accepted by.
    """

    recall: Recall
    greedy: float
    sampled: float


@dataclass(slots=True)
class Choices:
    """Notes what logits choose at each step, greedily and with noise; returns what ``then`` chooses."""

    noise: Sampled
    then: Guess = greedy
    likeliest: dict[int, Rows] = field(default_factory=dict)
    drawn: dict[int, Rows] = field(default_factory=dict)

    def __call__(self, step: int, logits_BV: torch.Tensor) -> Rows:
        """A ``Guess``."""
        self.likeliest[step] = greedy(step, logits_BV)
        self.drawn[step] = self.noise(step, logits_BV)
        return self.then(step, logits_BV)

    def agreement(self, others: "Choices") -> tuple[float, float]:
        """Shares of alike choices, greedily and with noise, over the steps that both have seen."""
        return alike(self.likeliest, others.likeliest), alike(self.drawn, others.drawn)


def alike(mine: dict[int, Rows], theirs: dict[int, Rows]) -> float:
    """Share of equal tokens over all rows and common steps."""
    pairs = [pair for step in mine.keys() & theirs.keys() for pair in zip(mine[step], theirs[step], strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


# --- what is compared -----------------------------------------------------------------------------------


def fewer_bits() -> list[Variant]:
    """The precisions."""
    return [Variant(bits=bits) for bits in (16, 8, 4, 3, 2)]


def fewer_experts(top_k: int) -> list[Variant]:
    """Experts per token, at three precisions."""
    return [Variant(bits=bits, top_k=fewer) for bits in (8, 4, 2) for fewer in range(top_k - 1, 0, -1)]


def fewer_layers(layers: int) -> list[Variant]:
    """The last layers without experts, more and more; then each layer alone."""
    counts = [count for count in (2, layers // 2, layers) if count > 1]
    last = [Variant(skipped=tuple(range(layers - count, layers))) for count in dict.fromkeys(counts)]
    return [*last, *(Variant(skipped=(layer,)) for layer in range(layers))]


def presets(layers: int, top_k: int) -> dict[str, Variant]:
    """The configuration's presets as variants of a model with so many MoE layers and experts per token."""
    configs = {name: PredictorConfig.model_validate({"preset": name}) for name in SHADOW_PRESETS}
    return {
        name: Variant(
            bits=config.bits,
            top_k=config.top_k if config.top_k and top_k > config.top_k else None,
            skipped=tuple(sorted(skipped_layers(config.skip_layers, layers))),
        )
        for name, config in configs.items()
    }


def variants(layers: int, top_k: int) -> list[Variant]:
    """Everything, each once."""
    mixed = [Variant(bits=bits, top_k=top_k - 1, skipped=(layers - 1,)) for bits in (8, 4) if top_k > 1 and layers > 1]
    every = [
        *fewer_bits(),
        *fewer_experts(top_k),
        *fewer_layers(layers),
        *mixed,
        *presets(layers, top_k).values(),
    ]
    return list(dict.fromkeys(every))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points, (cost, worth), no other beats in one without losing in the other; the cheapest first."""
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


# --- what a step costs ----------------------------------------------------------------------------------


def shadow_model(checkpoint: Checkpoint, experts: QuantizedExperts, variant: Variant, *, depth: int) -> ShadowModel:
    """The shadow of a variant, on this CPU."""
    thinning = Thinning(top_k=variant.top_k, skipped=frozenset(variant.skipped))
    return ShadowModel(checkpoint, experts, CPU, depth=depth, thinning=thinning)


def read_bytes(checkpoint: Checkpoint, experts: QuantizedExperts, variant: Variant) -> float:
    """Bytes of routed experts that a step of one token reads: the part of a step that a variant makes cheaper."""
    computed = sum(
        layer.top_k if variant.top_k is None else min(variant.top_k, layer.top_k)
        for layer in checkpoint.layers
        if layer.index not in variant.skipped
    )
    return computed * experts.nbytes / sum(layer.num_experts for layer in checkpoint.layers)


class Timed:
    """A shadow that decodes one token after the other, as in service: ready to take steps back.

    Each call is a run over the same text, so that what a round tells does not depend on its place.
    """

    def __init__(self, model: ShadowModel, vocabulary: int) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(0)
        self._tokens: list[int] = torch.randint(vocabulary, (PROMPT + STEPS,), generator=generator).tolist()

    def __call__(self) -> float:
        """Milliseconds of processor time of a step, the median of a run."""
        self._model.prefill(SEQUENCE, [tuple(self._tokens[:PROMPT])])
        times_s = []
        for token in self._tokens[PROMPT:]:
            start_s = time.thread_time()
            self._model.decode(SEQUENCE, [token])
            times_s.append(time.thread_time() - start_s)
        self._model.forget(SEQUENCE)
        return statistics.median(times_s) * 1e3


def timed(checkpoint: Checkpoint, experts: QuantizedExperts, variant: Variant) -> Timed:
    """A variant, ready for ``in_turns``."""
    vocabulary = checkpoint.config.get_text_config(decoder=True).vocab_size
    return Timed(shadow_model(checkpoint, experts, variant, depth=RUN_AHEAD + 1), vocabulary)


def told(recalls: Sequence[Recall], shadows: Sequence[Choices], model: Choices) -> list[Quality]:
    """What each shadow knew, given what all of them and the model would have chosen."""
    found = []
    for recall, choices in zip(recalls, shadows, strict=True):
        likeliest, drawn = choices.agreement(model)
        found.append(Quality(recall=replace(recall, agreement=drawn), greedy=likeliest, sampled=drawn))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A variant with all that was found of it.

    Attributes:
        step_ms: processor time of a step of one token, by round.
        read_bytes: of experts in such a step.
    """

    variant: Variant
    quality: Quality
    step_ms: list[float]
    read_bytes: float

    @property
    def median_ms(self) -> float:
        """Over rounds."""
        return statistics.median(self.step_ms)


def on_front(measured: Sequence[Measured]) -> list[Measured]:
    """Those that no other beats in both experts read and accepted drafts, the cheapest first."""
    return [measured[index] for index in front([(item.read_bytes, item.quality.sampled) for item in measured])]
