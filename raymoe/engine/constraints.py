"""What a request wants of its tokens beside what the model makes of them: biases, and a grammar.

V vocabulary.
"""

import math
from collections.abc import Mapping

import torch

from raymoe.engine.grammar import Grammars, GrammarState
from raymoe.engine.lark import json_grammar
from raymoe.engine.request import SamplingParams
from raymoe.errors import RequestError

MOST_BIASES = 1024  # OpenAI's clients send some hundreds at most


class Constraints:
    """Which tokens a request prefers, forbids or allows, beside what the model makes of them.

    They stand between the penalties and the temperature, and log probabilities are told without them. The state of a
    grammar follows the answer, so each choice may be made in any pass, over drafts or not. A shadow knows none of
    this: its drafts hold less often where a grammar speaks, and the tokens are the same.

    Raises RequestError from the constructor where a parameter is out of range, or the grammar can't be used.
    """

    def __init__(self, params: SamplingParams, grammars: Grammars | None) -> None:
        if len(params.logit_bias) > MOST_BIASES:
            raise RequestError(
                f"logit_bias names {len(params.logit_bias)} tokens, allowed are {MOST_BIASES}", param="logit_bias"
            )
        for token, bias in params.logit_bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise RequestError(f"logit_bias names {token!r}, which is no token id", param="logit_bias")
            if grammars is not None and token >= grammars.vocabulary:
                raise RequestError(
                    f"logit_bias names token {token}, the vocabulary is 0 to {grammars.vocabulary - 1}",
                    param="logit_bias",
                )
            check_range("logit_bias", bias, -100.0, 100.0)
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._grammar = _grammar(params, grammars)

    def apply(self, scores_1V: torch.Tensor, answer: list[int]) -> torch.Tensor:
        """The scores as the request wants them after ``answer``; ``scores_1V`` stays as it is."""
        vocabulary = scores_1V.shape[1]
        if len(self._biased):
            scores_1V = scores_1V.index_add(1, self._biased, self._biases.unsqueeze(0))
        if self._grammar is not None:
            forbidden_V = ~self._grammar.allowed_V(answer, vocabulary)
            scores_1V = scores_1V.masked_fill(forbidden_V.unsqueeze(0), -math.inf)
        return scores_1V


def _grammar(params: SamplingParams, grammars: Grammars | None) -> GrammarState | None:
    """The grammar that the answer must follow, if any."""
    if params.grammar is None and params.json_schema is None:
        return None
    if params.grammar is not None and params.json_schema is not None:
        raise RequestError("give either grammar or json_schema, not both", param="grammar")
    if params.ignore_eos:
        raise RequestError("an answer by a grammar has an end: leave ignore_eos out", param="ignore_eos")
    if grammars is None:
        raise RequestError("answers can't follow a grammar here", param="grammar")
    if params.grammar is not None:
        return grammars.begin(params.grammar)
    if not isinstance(params.json_schema, (Mapping, bool)):
        raise RequestError("json_schema is a JSON schema: a mapping, true or false", param="json_schema")
    return grammars.begin(json_grammar(params.json_schema))


def check_range(name: str, value: float, low: float, high: float) -> float:
    """``value``. Raises RequestError where it is no number from ``low`` to ``high``."""
    if not isinstance(value, (int, float)) or math.isnan(value) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}, allowed is {low:g} to {high:g}", param=name)
    return value
