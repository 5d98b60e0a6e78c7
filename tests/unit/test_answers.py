"""The check of answers: transformers' own tokens pass, any other token does not."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe.config import EMBEDDED_MODEL
from tests.answers import Answer, Checker, check_answers
from tests.toy_models import reference_tokens

PROMPT = list(range(200, 216))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What transformers generates."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    return [tokenizer.decode([token]) for token in reference_tokens(model, PROMPT, 10)]


def test_the_models_own_tokens_are_right_however_few_have_come(texts: list[str]) -> None:
    checker = Checker()
    assert check_answers([Answer(prompt=PROMPT, texts=texts), Answer(prompt=PROMPT, texts=texts[:3])], checker) == []
    assert (checker.tokens, checker.ties, checker.wrong_tokens) == (13, 0, 0)


@pytest.mark.parametrize("place", [0, 4, 9])
def test_one_other_token_is_found_and_named(texts: list[str], place: int) -> None:
    checker = Checker()
    other = " the" if texts[place] != " the" else " and"
    changed = [*texts[:place], other, *texts[place + 1 :]]
    [line] = check_answers([Answer(prompt=PROMPT, texts=changed)], checker)
    assert "a prompt of 16 tokens: token " in line and "below the best" in line
    assert checker.wrong_tokens >= 1


def test_a_token_twice_and_a_token_left_out_are_wrong(texts: list[str]) -> None:
    """What a resumed or rerouted step that is applied twice, or never, would look like."""
    assert check_answers([Answer(prompt=PROMPT, texts=[*texts[:5], *texts[4:]])])
    assert check_answers([Answer(prompt=PROMPT, texts=[*texts[:4], *texts[5:]])])


def test_a_text_that_no_token_has_is_wrong() -> None:
    checker = Checker()
    assert checker.wrong(PROMPT, ["no token is like this"]) == "token 0 is 'no token is like this', which is none"
    assert checker.wrong_tokens == 1
