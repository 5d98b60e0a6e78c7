"""The embedded model in float32, predictors that follow it, and what it reads: held-out text or what it says itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.predicting.together import Together
from benchmarks.predicting.variants import Variant
from benchmarks.scheduling.setup import DOMAINS, EVAL
from predictor.predictor import Predictor, ShadowPredictor
from predictor.quantized_experts import QuantizedExperts
from predictor.shadow import Alignment, Guess, greedy
from predictor.shadow_model import ShadowModel
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

    def held_out(self, variants: Sequence[Variant], rows: int, steps: int, on_step: OnStep) -> list[Recall]:
        """``rows`` pieces of the held-out text, as many of each domain. Nobody guesses it: there is no agreement."""
        each = rows // len(DOMAINS)
        texts = [
            piece
            for domain in DOMAINS
            for piece in text_pieces((EVAL / f"{domain}.txt").read_text(), self._tokenizer, each, PREFIX + steps)
        ]
        following = forced([text[PREFIX:] for text in texts])
        found = self._run(variants, [text[:PREFIX] for text in texts], following, greedy, steps, on_step)
        return [replace(recall, agreement=None) for recall in found]

    def free(self, variants: Sequence[Variant], rows: int, steps: int, on_step: OnStep) -> list[Recall]:
        """What the model itself says, at temperature 1."""
        prompts = generate_rows(self._model.runner, self._start, rows, PREFIX, 0, lambda count: None)
        sampled = Sampled(seed=0)
        return self._run(variants, prompts, sampled, sampled, steps, on_step)

    def _run(
        self,
        variants: Sequence[Variant],
        prompts: Sequence[Sequence[int]],
        following: Guess,
        guess: Guess,
        steps: int,
        on_step: OnStep,
    ) -> list[Recall]:
        together = Together([self._predictor(variant, guess) for variant in variants])
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
        return ShadowPredictor(ShadowModel(checkpoint, experts, CPU), alignment, guess)

    def _shadow(self, bits: int) -> tuple[Checkpoint, QuantizedExperts]:
        if bits not in self._shadows:
            checkpoint = open_checkpoint(self._source.source, "bfloat16" if bits == 16 else DTYPE)
            self._shadows[bits] = checkpoint, QuantizedExperts(checkpoint, bits, CPU)
        return self._shadows[bits]
