"""Whether greedy answers of the embedded model in float32, chosen together with others, are the model's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe.config import EMBEDDED_MODEL

TIE = 1e-2  # how far below the best logit a token may be, chosen together with others
MOST_TIES = 1e-4  # of all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A prompt's token ids, and the texts of the tokens that came."""

    prompt: list[int]
    texts: list[str]


class Checker:
    """transformers' own model, teacher-forced on answers whose tokens are known by their texts.

    Attributes:
        tokens, ties: checked so far, and those of them that were not the best, but within ``TIE`` of it.
        wrong_tokens: that were further below.
    """

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
        self._by_text: dict[str, list[int]] = {}
        for token in range(self._model.config.vocab_size):
            self._by_text.setdefault(str(tokenizer.decode([token])), []).append(token)
        self.ties = self.tokens = self.wrong_tokens = 0

    @torch.inference_mode()
    def wrong(self, prompt: list[int], texts: list[str]) -> str | None:
        """What is wrong with a greedy answer, in words; None where nothing is. Ties are counted."""
        candidates = [self._by_text.get(text, []) for text in texts]
        if not all(candidates):
            place = next(place for place, found in enumerate(candidates) if not found)
            self.wrong_tokens += 1
            return f"token {place} is {texts[place]!r}, which is none"
        tokens = [found[0] for found in candidates]
        logits_TV = self._logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        for place, found in enumerate(candidates):
            if len(found) > 1:  # a text that several tokens have (parts of a character): the best of them
                best = max(found, key=lambda token: float(logits_TV[place, token]))
                if best != tokens[place]:
                    tokens[place] = best
                    logits_TV = self._logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        behind_T = logits_TV.max(dim=-1).values - logits_TV[range(len(tokens)), tokens]
        wrong = int((behind_T > TIE).sum())
        self.ties += int((behind_T > 0).sum()) - wrong
        self.wrong_tokens += wrong
        self.tokens += len(tokens)
        worst = int(behind_T.argmax())
        if wrong:
            return f"token {worst} of {len(texts)} ({texts[worst]!r}) is {behind_T[worst]:.3g} below the best"
        return None

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits_TV: torch.Tensor = self._model(torch.tensor([tokens])).logits[0].float()
        return logits_TV


def check_answers(answers: Sequence[Answer], checker: Checker | None = None) -> list[str]:
    """What is wrong with answers, one line for each wrong one, and one if too many tokens tied with the best.

    Args:
        checker: counts what it sees; None: one of this call's own.
    """
    checker, found = checker or Checker(), []
    for answer in answers:
        wrong = checker.wrong(answer.prompt, answer.texts)
        if wrong is not None:
            found.append(f"a prompt of {len(answer.prompt)} tokens: {wrong}")
    print(f"{len(answers)} answers of {checker.tokens} tokens checked, ties: {checker.ties}")
    if checker.ties > MOST_TIES * checker.tokens + 1:
        found.append(f"{checker.ties} ties in {checker.tokens} tokens")
    return found
