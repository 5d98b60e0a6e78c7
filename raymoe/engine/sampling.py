"""From logits to the next token. transformers' processors do the warping, so both agree on their meaning.

V vocabulary.
"""

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raymoe.engine.constraints import Constraints, check_range
from raymoe.engine.grammar import Grammars
from raymoe.engine.request import SamplingParams, TokenLogprob
from raymoe.errors import NotFiniteError
from raymoe.types import SamplingRecipe

MASK = (1 << 64) - 1
LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity, which a model may give tokens that it never uses
NOT_FINITE = "the model's output is not finite (NaN or infinity)"
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a model brings to the choice of its tokens.

    Numbers apply where a request says nothing: the model's generation_config.json's, else OpenAI's defaults.

    Attributes:
        grammars: makes grammars for the model's tokens; None: answers can't follow any.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    grammars: Grammars | None = None

    @classmethod
    def from_generation_config(cls, raw: dict, grammars: Grammars | None = None) -> "SamplingDefaults":
        """From the file's own entries; ``do_sample: false`` means greedy."""
        known = {name: raw[name] for name in NUMBERS if isinstance(raw.get(name), (int, float))}
        if raw.get("do_sample") is False:
            known["temperature"] = 0.0
        return cls(**known, grammars=grammars)


class Sampler:
    """Chooses the tokens of one request.

    The noise of a choice depends on the seed and the number of the choice alone: a shadow with the same recipe that
    has similar logits makes the same choice most of the time, also where nothing is greedy.

    Raises RequestError from the constructor where a parameter is out of range.

    Attributes:
        recipe: what its choices depend on.
    """

    def __init__(self, params: SamplingParams, defaults: SamplingDefaults) -> None:
        def chosen(name: str) -> float:
            value = getattr(params, name)
            return getattr(defaults, name) if value is None else value

        temperature = check_range("temperature", chosen("temperature"), 0.0, 2.0)
        top_p = check_range("top_p", chosen("top_p"), 0.0, 1.0)
        min_p = check_range("min_p", chosen("min_p"), 0.0, 1.0)
        top_k = int(check_range("top_k", chosen("top_k"), -1, 1 << 31))
        repetition = check_range("repetition_penalty", chosen("repetition_penalty"), 0.01, 10.0)
        self._presence = check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
        self._frequency = check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
        self._logprobs = params.logprobs
        if params.logprobs is not None:
            check_range("logprobs", params.logprobs, 0, 20)
        self._constraints = Constraints(params, defaults.grammars)
        self._greedy = temperature == 0.0
        self._processors = LogitsProcessorList()
        if repetition != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(repetition))
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._add_warpers(temperature, top_k, top_p, min_p)
        self._generator = torch.Generator()
        self._choices = 0
        self.recipe = SamplingRecipe(
            seed=(secrets.randbits(63) if params.seed is None else params.seed) & (2**63 - 1),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=self._presence,
            frequency_penalty=self._frequency,
        )

    @classmethod
    def by(cls, recipe: SamplingRecipe) -> "Sampler":
        """A sampler that chooses as the one with this recipe does."""
        return cls(SamplingParams(**asdict(recipe)), SamplingDefaults())

    def _add_warpers(self, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(max(top_p, 1e-9)))
        if min_p > 0.0:
            self._warpers.append(MinPLogitsWarper(min_p))

    def choose(
        self, logits_V: torch.Tensor, prompt: list[int], answer: list[int], number: int | None = None
    ) -> tuple[int, TokenLogprob | None]:
        """The next token after ``prompt`` and ``answer``, and its log probability where asked for.

        Args:
            number: of the choice, from 0; omitted: one more than that of the last.

        Raises NotFiniteError where the logits are no numbers.
        """
        number = self._choices if number is None else number
        self._choices = number + 1
        scores_1V = logits_V.unsqueeze(0).float().cpu()
        if self._processors:
            scores_1V = self._processors(_ids(prompt, answer), scores_1V)
        if answer and (self._presence or self._frequency):
            scores_1V = scores_1V.clone()
            counts_V = torch.bincount(torch.tensor(answer), minlength=scores_1V.shape[1])[: scores_1V.shape[1]]
            scores_1V -= self._frequency * counts_V + self._presence * (counts_V > 0)
        choices_1V = self._constraints.apply(scores_1V, answer)
        if self._greedy:
            weights_1V = choices_1V
            token = int(choices_1V.argmax())
        else:
            weights_1V = torch.softmax(self._warpers(_ids(prompt, answer), choices_1V), dim=-1)
            token = self._draw(weights_1V[0], number)
        if not math.isfinite(weights_1V[0, token]):  # one NaN is chosen first, and makes all probabilities NaN
            check_finite(logits_V)
        return token, None if self._logprobs is None else logprob_of(scores_1V[0], token, self._logprobs)

    def _draw(self, probabilities_V: torch.Tensor, number: int) -> int:
        """A token by its probability: the largest of ratios to exponential noise, which is how multinomial does it."""
        self._generator.manual_seed(mixed(self.recipe.seed, number))
        noise_V = torch.empty_like(probabilities_V).exponential_(generator=self._generator)
        return int((probabilities_V / noise_V).argmax())


def check_finite(logits_V: torch.Tensor) -> None:
    """Raise NotFiniteError for logits that are NaN or infinite; some models never use tokens of minus infinity."""
    if not math.isfinite(logits_V.max()):
        raise NotFiniteError(NOT_FINITE)


def mixed(seed: int, number: int) -> int:
    """A seed for one choice: neighbouring numbers and seeds give unrelated ones (SplitMix64's finalizer)."""
    value = (seed + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return (value ^ (value >> 31)) >> 1


def logprob_of(scores_V: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The log probability of ``token`` before biases, grammar, temperature and cut-offs, and of the best others."""
    logprobs_V = torch.log_softmax(scores_V, dim=-1).clamp(min=LEAST_LOGPROB)
    best = torch.topk(logprobs_V, min(alternatives, len(logprobs_V))) if alternatives else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
    return TokenLogprob(token_id=token, logprob=float(logprobs_V[token]), top=top)


def _ids(prompt: list[int], answer: list[int]) -> Any:
    return torch.tensor([prompt + answer])
