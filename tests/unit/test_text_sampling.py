"""Text that streams without half characters or stop strings, and tokens drawn as the request asks."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults, logprob_of
from raymoe.engine.text import REPLACEMENT, TextStream
from raymoe.errors import RequestError


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's: byte level, so that characters may be split over tokens."""
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


class Letters:
    """One character per token: token ids are code points."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))


class Bytes:
    """One byte per token, as the smallest tokens of a byte-level tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode(errors="replace")


def run(stream: TextStream, tokens: list[int]) -> tuple[list[str], int]:
    """The pieces until the end or a stop string, and how many tokens were pushed."""
    pieces = []
    pushed = 0
    for token in tokens:
        pieces.append(stream.push(token))
        pushed += 1
        if stream.stopped:
            break
    return [*pieces, stream.finish()], pushed


def cut(text: str, stop: tuple[str, ...]) -> str:
    """``text`` before the first stop string."""
    return text[: min((text.find(item) for item in stop if item in text), default=len(text))]


# --- text -----------------------------------------------------------------------------------------------


def test_a_character_comes_whole_once_its_last_byte_is_there() -> None:
    assert run(TextStream(Bytes()), list("aé🙂b".encode()))[0] == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_an_unfinished_character_shows_as_replacement_at_the_end_only() -> None:
    assert run(TextStream(Bytes()), [0x61, 0xF0, 0x9F])[0] == ["a", "", "", REPLACEMENT]


def test_invalid_bytes_do_not_hold_back_what_follows() -> None:
    assert run(TextStream(Bytes()), [0xFF, 0x61, 0x62])[0] == ["", REPLACEMENT + "a", "b", ""]


def test_real_tokens_split_a_character() -> None:
    tokens = tokenizer().encode("naïve 漢字")
    pieces, _ = run(TextStream(tokenizer()), tokens)
    assert "" in pieces[:-1]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == "naïve 漢字"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert run(TextStream(None, ("x",)), [1, 2, 3])[0] == ["", "", "", ""]


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abcd", ("c",), ["a", "b", ""]),
        ("xENDy", ("END",), ["x", "", "", ""]),
        ("xENxy", ("END",), ["x", "", "", "ENx", "y"]),
        ("EENDx", ("END",), ["", "E", "", ""]),
        ("abab!", ("abaa", "b!"), ["", "", "", "ab", "a"]),
        ("abc", ("",), ["a", "b", "c"]),  # an empty stop string never stops
        ("ab", ("ab", "b"), ["", ""]),
        ("axyz", ("xyz", "y"), ["a", "", "x"]),  # "y" is complete before "xyz" could be
    ],
)
def test_stop_strings_across_tokens(text: str, stop: tuple[str, ...], pieces: list[str]) -> None:
    stream = TextStream(Letters(), stop)
    got, _ = run(stream, [ord(letter) for letter in text])
    assert got[:-1] == pieces
    assert stream.stopped is any(item and item in text for item in stop)


def test_a_held_back_beginning_of_a_stop_string_comes_at_the_end() -> None:
    pieces, _ = run(TextStream(Letters(), ("END",)), [ord(letter) for letter in "xEN"])
    assert pieces == ["x", "", "", "EN"]


def test_after_a_stop_string_nothing_more_comes() -> None:
    stream = TextStream(Letters(), ("b",))
    assert [stream.push(ord(letter)) for letter in "abc"] == ["a", "", ""]
    assert stream.finish() == ""


def test_a_stop_string_may_end_in_half_a_token() -> None:
    token = tokenizer().encode(" the")
    assert len(token) == 1
    assert run(TextStream(tokenizer(), ("th",)), token)[0] == [" ", ""]


def test_special_tokens_show_no_text() -> None:
    end = tokenizer().eos_token_id
    assert run(TextStream(tokenizer()), [*tokenizer().encode("a b"), end])[0][-2:] == ["", ""]


@given(st.lists(st.integers(0, 4095), max_size=60))
def test_any_tokens_stream_to_their_full_text(tokens: list[int]) -> None:
    pieces, _ = run(TextStream(tokenizer()), tokens)
    assert "".join(pieces) == tokenizer().decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_stream_to_their_full_text(tokens: list[int]) -> None:
    assert "".join(run(TextStream(Bytes()), tokens)[0]) == Bytes().decode(tokens)


@given(st.text("abé🙂", max_size=30), st.lists(st.text("abé🙂", max_size=4), max_size=3).map(tuple))
def test_output_is_the_full_text_cut_at_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    tokens = list(text.encode())
    pieces, pushed = run(TextStream(Bytes(), stop), tokens)
    wanted = tuple(item for item in stop if item)
    assert "".join(pieces) == cut(Bytes().decode(tokens[:pushed]), wanted)
    assert pushed == len(tokens) or cut(text, wanted) != text


@given(st.lists(st.integers(2, 4095), max_size=40), st.integers(0, 40), st.integers(1, 6))
def test_a_stop_string_taken_from_the_text_is_found(tokens: list[int], start: int, length: int) -> None:
    text = tokenizer().decode(tokens)
    stop = text[start : start + length]
    if not stop or REPLACEMENT in text:
        return
    stream = TextStream(tokenizer(), (stop,))
    pieces, _ = run(stream, tokens)
    assert stream.stopped
    assert "".join(pieces) == text[: text.find(stop)]


# --- sampling -------------------------------------------------------------------------------------------

LOGITS_V = torch.tensor([0.5, 3.0, 2.5, -1.0, 2.9, 0.0])


def sampler(defaults: SamplingDefaults | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), defaults or SamplingDefaults())


def tokens_of(one: Sampler, count: int = 200, answer: list[int] | None = None) -> list[int]:
    return [one.choose(LOGITS_V, [0], answer or [])[0] for _ in range(count)]


def test_temperature_zero_takes_the_largest_logit() -> None:
    assert tokens_of(sampler(temperature=0.0), 5) == [1] * 5


def test_greedy_takes_the_first_of_equals_as_argmax_does() -> None:
    assert sampler(temperature=0.0).choose(torch.tensor([1.0, 2.0, 2.0]), [0], [])[0] == 1


def test_a_seed_makes_sampling_repeatable() -> None:
    first, second, other = (tokens_of(sampler(seed=seed)) for seed in (7, 7, 8))
    assert first == second != other
    assert len(set(first)) > 3


def test_without_a_seed_runs_differ() -> None:
    assert tokens_of(sampler()) != tokens_of(sampler())


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert tokens_of(sampler(seed=seed), 20) == tokens_of(sampler(seed=seed), 20)


def test_top_k_of_one_equals_greedy() -> None:
    assert set(tokens_of(sampler(top_k=1, temperature=2.0, seed=0))) == {1}


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_of_zero_or_minus_one_cuts_nothing(top_k: int) -> None:
    assert set(tokens_of(sampler(top_k=top_k, temperature=2.0, seed=0), 2000)) == set(range(6))


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_k": 100}, set(range(6))),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.7}, {1, 4}),  # 0.38 + 0.35 reach it
        ({"min_p": 0.5}, {1, 2, 4}),  # at least half as likely as the best: within 0.69 of its logit
        ({"min_p": 1.0}, {1}),
        ({"temperature": 0.01}, {1}),
    ],
)
def test_cut_offs_leave_the_likeliest(params: dict[str, float], possible: set[int]) -> None:
    assert (
        set(tokens_of(sampler(seed=0, **({"temperature": 2.0} if "top_k" in params else {}) | params), 2000))
        == possible
    )


def test_frequencies_follow_the_softmax() -> None:
    drawn = torch.tensor(tokens_of(sampler(seed=0), 20_000)).bincount(minlength=6) / 20_000
    torch.testing.assert_close(drawn, LOGITS_V.softmax(0), atol=0.015, rtol=0)


def test_temperature_flattens() -> None:
    drawn = torch.tensor(tokens_of(sampler(seed=0, temperature=2.0), 20_000)).bincount(minlength=6) / 20_000
    torch.testing.assert_close(drawn, (LOGITS_V / 2).softmax(0), atol=0.015, rtol=0)


def greedy_after(prompt: list[int], answer: list[int], **params: Any) -> int:
    return sampler(temperature=0.0, **params).choose(LOGITS_V, prompt, answer)[0]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    assert greedy_after([1], [], repetition_penalty=1.1) == 4  # 3.0 / 1.1 < 2.9
    assert greedy_after([0], [1], repetition_penalty=1.1) == 4
    assert greedy_after([1], [4], repetition_penalty=1.1) == 1


def test_repetition_penalty_pushes_negative_logits_down_too() -> None:
    logits_V = torch.tensor([-1.0, -1.5])
    assert sampler(temperature=0.0, repetition_penalty=2.0).choose(logits_V, [0], [])[0] == 1


def test_presence_penalty_counts_the_answer_once() -> None:
    assert greedy_after([1], [], presence_penalty=2.0) == 1, "the prompt does not count"
    assert greedy_after([0], [1], presence_penalty=0.2) == 4
    assert greedy_after([0], [1, 1, 1], presence_penalty=0.09) == 1


def test_frequency_penalty_counts_the_answer_as_often_as_it_repeats() -> None:
    assert greedy_after([1], [], frequency_penalty=2.0) == 1, "the prompt does not count"
    assert greedy_after([0], [1], frequency_penalty=0.09) == 1
    assert greedy_after([0], [1, 1], frequency_penalty=0.09) == 4


def test_negative_penalties_encourage() -> None:
    assert greedy_after([0], [4], presence_penalty=-0.5) == 4
    assert greedy_after([0], [2, 2], frequency_penalty=-0.5) == 2


def test_penalties_leave_the_callers_logits_alone() -> None:
    logits_V = LOGITS_V.clone()
    sampler(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=2.0).choose(logits_V, [0], [1, 2])
    assert torch.equal(logits_V, LOGITS_V)


def test_logits_of_half_precision_are_sampled_in_single() -> None:
    token, logprob = sampler(temperature=0.0, logprobs=0).choose(LOGITS_V.bfloat16(), [0], [])
    assert token == 1 and logprob is not None
    assert logprob.logprob == pytest.approx(LOGITS_V.bfloat16().float().log_softmax(0)[1].item(), abs=1e-6)


# --- logprobs -------------------------------------------------------------------------------------------


def test_no_logprobs_unless_asked_for() -> None:
    assert sampler(temperature=0.0).choose(LOGITS_V, [0], [])[1] is None


def test_zero_logprobs_report_the_chosen_token_only() -> None:
    _, logprob = sampler(temperature=0.0, logprobs=0).choose(LOGITS_V, [0], [])
    assert logprob is not None
    assert (logprob.token_id, logprob.top) == (1, ())


def test_logprobs_of_the_whole_vocabulary_sum_to_one() -> None:
    logprob = logprob_of(LOGITS_V, 2, 20)
    assert len(logprob.top) == 6
    assert sum(math.exp(value) for _, value in logprob.top) == pytest.approx(1.0)
    assert dict(logprob.top)[2] == pytest.approx(logprob.logprob)
    assert [token for token, _ in logprob.top] == [1, 4, 2, 0, 5, 3]


def test_logprobs_are_those_before_temperature_and_cut_offs() -> None:
    _, logprob = sampler(temperature=2.0, top_k=1, logprobs=1).choose(LOGITS_V, [0], [])
    assert logprob is not None
    assert logprob.logprob == pytest.approx(LOGITS_V.log_softmax(0)[1].item())


# --- ranges and defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 2.1, math.nan, math.inf]),
        ("top_p", [-0.1, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1]),
        ("top_k", [-2]),
        ("repetition_penalty", [0.0, -1.0, 10.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1, math.nan]),
        ("logprobs", [-1, 21]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=rf"{name} is .*, allowed is ") as caught:
            sampler(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("value", ["0.5", [1]])
def test_values_of_another_kind_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="temperature is "):
        sampler(temperature=value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0.0)),
        ({"do_sample": True}, SamplingDefaults()),
        ({"temperature": None, "top_k": "many", "eos_token_id": 3}, SamplingDefaults()),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, SamplingDefaults(repetition_penalty=1.05, min_p=0.1)),
    ],
)
def test_defaults_come_from_the_models_generation_config(raw: dict[str, Any], expected: SamplingDefaults) -> None:
    assert SamplingDefaults.from_generation_config(raw) == expected


@pytest.mark.parametrize(
    ("field", "default", "asked", "check"),
    [
        ("temperature", 0.0, 2.0, lambda drawn: len(drawn) > 1),
        ("top_k", 1, 0, lambda drawn: len(drawn) > 1),
        ("top_p", 0.0, 1.0, lambda drawn: len(drawn) > 1),
    ],
)
def test_a_request_overrides_the_models_defaults(
    field: str, default: float, asked: float, check: Callable[[set[int]], bool]
) -> None:
    defaults = SamplingDefaults(**{field: default})
    assert set(tokens_of(sampler(defaults, seed=0))) == {1}
    assert check(set(tokens_of(sampler(defaults, seed=0, **{field: asked}))))
