"""What clients may send, and what the engine is told."""

from typing import Any

import pytest
from pydantic import ValidationError

from raymoe.engine.request import SamplingParams
from raymoe.serve.schema import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": USER, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **fields})


def message_of(kind: type, body: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return str(caught.value)


def test_chat_says_nothing_where_the_request_says_nothing() -> None:
    assert chat().sampling == SamplingParams()


def test_completion_has_openais_limit() -> None:
    assert completion().sampling == SamplingParams(max_tokens=16)


def test_every_sampling_parameter_reaches_the_engine() -> None:
    fields = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "quality": "fast",
    }
    expected = SamplingParams(**{**fields, "stop": ("a", "b"), "stop_token_ids": (5, 6)})
    assert chat(**fields).sampling == expected
    assert completion(**fields).sampling == expected


def test_null_is_as_good_as_absent() -> None:
    names = (
        "quality",
        "temperature",
        "top_p",
        "stop",
        "stop_token_ids",
        "presence_penalty",
        "stream_options",
        "max_tokens",
    )
    assert chat(**dict.fromkeys(names)).sampling == SamplingParams()


@pytest.mark.parametrize("quality", ["exact", "balanced", "fast", "no such name", 0, 0.3, 7.0])
def test_quality_is_a_name_or_a_number_and_the_engine_judges_it(quality: Any) -> None:
    assert chat(quality=quality).sampling.quality == quality
    assert completion(quality=quality).sampling.quality == quality


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_either_name_of_the_token_limit(fields: dict[str, int], expected: int) -> None:
    assert chat(**fields).sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)
def test_chat_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    assert chat(**fields).sampling.logprobs == expected


def test_completion_logprobs_is_a_number() -> None:
    assert completion(logprobs=0).sampling.logprobs == 0
    assert completion().sampling.logprobs is None


def test_one_stop_string_needs_no_list() -> None:
    assert chat(stop="END").sampling.stop == ("END",)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).conversation == [{"role": "user", "content": "a b"}]


def test_unknown_fields_are_ignored() -> None:
    assert chat(user="me", metadata={"a": 1}, no_such_thing=1).sampling == SamplingParams()


def test_a_prompt_of_token_ids() -> None:
    assert completion(prompt=[1, 2, 3]).prompt == [1, 2, 3]


def test_usage_in_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True).include_usage


@pytest.mark.parametrize("harmless", [{"n": 1}, {"tools": []}, {"response_format": {"type": "text"}}, {"n": None}])
def test_defaults_of_what_is_not_supported_are_welcome(harmless: dict[str, Any]) -> None:
    assert chat(**harmless).sampling == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, '"n" is not supported here beyond its default; ask n times'),
        ({"tools": [{"type": "function"}]}, '"tools" is not supported'),
        ({"logit_bias": {"5": 1}}, '"logit_bias" is not supported'),
        ({"temperature": "hot"}, "valid number"),
        ({"temperature": "0.5"}, "valid number"),
        ({"max_tokens": 1.5}, "valid integer"),
        ({"max_tokens": True}, "valid integer"),
        ({"stream": "yes"}, "valid boolean"),
        ({"top_logprobs": 2}, 'needs "logprobs": true'),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, 'needs "stream": true'),
        ({"stop": ["x"] * 33}, "at most 32"),
        ({"quality": True}, 'quality is "exact", "balanced", "fast", or an alpha from 0 to the server'),
        ({"quality": ["exact"]}, "or an alpha from 0 to the server's scheduling.alpha_max"),
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "user"}]}, "required"),
        ({"messages": [{"role": "user", "content": None}]}, "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only"),
    ],
)
def test_bad_chat_requests_are_told_apart(fields: dict[str, Any], words: str) -> None:
    assert words in message_of(ChatRequest, {"messages": USER, **fields})


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", "b"], "one prompt per request"),
        ([[1, 2], [3]], "one prompt per request"),
        ([1, 2.5], "whole numbers"),
        ([True], "whole numbers"),
        ({"a": 1}, "a text or a list of token ids"),
        ("half \ud800", "half a surrogate pair"),
    ],
)
def test_bad_prompts_are_told_apart(prompt: Any, words: str) -> None:
    assert words in message_of(CompletionRequest, {"prompt": prompt})


@pytest.mark.parametrize("fields", [{"echo": True}, {"best_of": 2}, {"suffix": "x"}])
def test_what_would_change_a_completion_is_refused(fields: dict[str, Any]) -> None:
    assert "is not supported" in message_of(CompletionRequest, {"prompt": "hi", **fields})
