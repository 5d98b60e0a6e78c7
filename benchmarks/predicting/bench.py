"""The embedded model in float32, predictors that follow it, and what it reads: held-out text or what it says itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.predicting.cheaper import Choices, Quality, Timed, read_bytes, shadow_model, timed, told
from benchmarks.predicting.together import Together
from benchmarks.predicting.variants import Variant
from benchmarks.scheduling.setup import DOMAINS, EVAL
from predictor.predictor import Predictor, ShadowPredictor
from predictor.quantized_experts import QuantizedExperts
from predictor.shadow import Alignment, Guess, greedy
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, ModelConfig, PredictorConfig
from raymoe.engine.calibrate import kept_bytes
from raymoe.engine.corpus import generate_rows, start_token, text_pieces
from raymoe.engine.evaluate import PREFIX, Model, Recall, Sampled, forced, make_predictor
from raymoe.engine.service import load_tokenizer

CPU = torch.device("cpu")
DTYPE = "float32"  # of the model, and of a shadow's trunk unless the shadow is bfloat16 throughout

OnStep = Callable[[int, int], None]
"""Told of steps done, and of how many there are."""


class Bench:
    """Not thread safe. Every shadow has a trunk and caches of its own; those of one precision share their experts."""

    def __init__(self) -> None:
        self._source = ModelConfig(path=str(EMBEDDED_MODEL), dtype=DTYPE)
        checkpoint = open_checkpoint(self._source.source, DTYPE)
        self._model = Model(checkpoint, kept_bytes())
        self._tokenizer = load_tokenizer(checkpoint)
        self._start = start_token(checkpoint.config.get_text_config(decoder=True))
        self._shadows: dict[int, tuple[Checkpoint, QuantizedExperts]] = {}

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self._model.sites)

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return max(self._model.top_k)

    def held_out(self, variants: Sequence[Variant], rows: int, steps: int, on_step: OnStep) -> list[Recall]:
        """``rows`` pieces of the held-out text, as many of each domain. Nobody guesses it: there is no agreement."""
        texts = self._texts(rows, steps)
        following = forced([text[PREFIX:] for text in texts])
        predictors = [self._predictor(variant, greedy) for variant in variants]
        found = self._run(predictors, [text[:PREFIX] for text in texts], following, steps, on_step)
        return [replace(recall, agreement=None) for recall in found]

    def free(self, variants: Sequence[Variant], rows: int, steps: int, on_step: OnStep) -> list[Recall]:
        """What the model itself says, at temperature 1."""
        prompts = generate_rows(self._model.runner, self._start, rows, PREFIX, 0, lambda count: None)
        sampled = Sampled(seed=0)
        predictors = [self._predictor(variant, sampled) for variant in variants]
        return self._run(predictors, prompts, sampled, steps, on_step)

    def cheaper(self, variants: Sequence[Variant], rows: int, steps: int, on_step: OnStep) -> list[Quality]:
        """What shadows know of ``held_out`` text, and how often they would have chosen the model's token."""
        texts, noise = self._texts(rows, steps), Sampled(seed=0)
        model = Choices(noise, then=forced([text[PREFIX:] for text in texts]))
        shadows = [Choices(noise) for _ in variants]
        predictors = [self._predictor(variant, guess) for variant, guess in zip(variants, shadows, strict=True)]
        found = self._run(predictors, [text[:PREFIX] for text in texts], model, steps, on_step)
        return told(found, shadows, model)

    def timed(self, variant: Variant) -> Timed:
        """A shadow that decodes alone."""
        return timed(*self._shadow(variant.bits), variant)

    def read_bytes(self, variant: Variant) -> float:
        """Bytes of experts that a step of one token reads."""
        return read_bytes(*self._shadow(variant.bits), variant)

    def _texts(self, rows: int, steps: int) -> list[list[int]]:
        each = rows // len(DOMAINS)
        return [
            piece
            for domain in DOMAINS
            for piece in text_pieces((EVAL / f"{domain}.txt").read_text(), self._tokenizer, each, PREFIX + steps)
        ]

    def _run(
        self,
        predictors: Sequence[Predictor],
        prompts: Sequence[Sequence[int]],
        following: Guess,
        steps: int,
        on_step: OnStep,
    ) -> list[Recall]:
        together = Together(predictors)
        done = 0

        def stepped() -> None:
            nonlocal done
            done += 1
            on_step(done, steps)

        self._model.evaluate(together, prompts, following, steps, stepped)
        return together.results()

    def _predictor(self, variant: Variant, guess: Guess) -> Predictor:
        if variant.kind != "shadow":
            config = PredictorConfig(kind=variant.kind)
            return make_predictor(config, self._model, self._source, ahead=variant.ahead, guess=guess)
        checkpoint, experts = self._shadow(variant.bits)
        alignment = Alignment(token_every=variant.token_every, kv_every=variant.kv_every, run_ahead=0)
        return ShadowPredictor(shadow_model(checkpoint, experts, variant, depth=0), alignment, guess)

    def _shadow(self, bits: int) -> tuple[Checkpoint, QuantizedExperts]:
        if bits not in self._shadows:
            checkpoint = open_checkpoint(self._source.source, "bfloat16" if bits == 16 else DTYPE)
            self._shadows[bits] = checkpoint, QuantizedExperts(checkpoint, bits, CPU)
        return self._shadows[bits]
