"""What clients may send, and what the engine is told."""

from typing import Any

import pytest
from pydantic import ValidationError

from raymoe.engine.request import SamplingParams
from raymoe.serve.schema import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "hi"}]
DEEP: dict[str, Any] = {}
for _ in range(64):
    DEEP = {"items": DEEP}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "time", "description": "what time it is"}},
]


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
        "grammar": "start: /a+/",
        "priority": 3,
        "logit_bias": {"5": -100, "6": 0.5},
    }
    read = {"stop": ("a", "b"), "stop_token_ids": (5, 6), "logit_bias": {5: -100, 6: 0.5}}
    expected = SamplingParams(**{**fields, **read})
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
        "logit_bias",
        "response_format",
        "tools",
        "tool_choice",
        "n",
        "functions",
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


def test_fields_that_mean_nothing_here_are_ignored_and_unknown_ones_refused_as_openai_does() -> None:
    assert chat(user="me", metadata={"a": 1}, store=True, service_tier="auto").sampling == SamplingParams()
    assert "Extra inputs are not permitted" in message_of(ChatRequest, {"messages": USER, "no_such_thing": 1})


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
        ({"priority": -1}, "greater than or equal to 0"),
        ({"n": 9}, "less than or equal to 8"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, '"tool_choice" needs "tools"'),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "which no tool has"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP}}}, "64 levels deep"),
        ({"functions": [{"name": "f"}]}, '"functions" is not supported here beyond its default; use "tools"'),
        ({"audio": {"voice": "alto"}}, "writes text only"),
        ({"logit_bias": {"five": 1}}, "'five' is no token id"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "names 1025 tokens, allowed are 1024"),
        ({"stop": "x" * 1025}, "at most 1024"),
        ({"stop_token_ids": [1] * 65}, "at most 64"),
        ({"seed": 1 << 63}, "less than or equal to"),
        ({"temperature": "hot"}, "valid number"),
        ({"temperature": "0.5"}, "valid number"),
        ({"max_tokens": 1.5}, "valid integer"),
        ({"max_tokens": True}, "valid integer"),
        ({"stream": "yes"}, "valid boolean"),
        ({"top_logprobs": 2}, 'needs "logprobs": true'),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, 'needs "stream": true'),
        ({"stop": ["x"] * 5}, "at most 4"),
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
        (["a", [3]], "all texts, or all lists"),
        ([1, "a"], "all texts, or all lists"),
        ([[1, 2], [2.5]], "whole numbers"),
        (["a", "half \ud800"], "half a surrogate pair"),
        ([1, 2.5], "whole numbers"),
        ([True], "whole numbers"),
        ({"a": 1}, "a text or a list of token ids"),
        ("half \ud800", "half a surrogate pair"),
    ],
)
def test_bad_prompts_are_told_apart(prompt: Any, words: str) -> None:
    assert words in message_of(CompletionRequest, {"prompt": prompt})


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"suffix": "x"}])
def test_what_would_change_a_completion_is_refused(fields: dict[str, Any]) -> None:
    assert "is not supported" in message_of(CompletionRequest, {"prompt": "hi", **fields})


def test_echo_and_logprobs_together_are_refused() -> None:
    assert completion(echo=True).echo
    assert "have no log probabilities" in message_of(CompletionRequest, {"prompt": "hi", "echo": True, "logprobs": 0})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([], [[]])],
)
def test_one_prompt_or_several(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}, {"type": "integer"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True}}, {}),
    ],
)
def test_the_form_of_an_answer_is_a_schema(form: dict[str, Any], schema: Any) -> None:
    assert chat(response_format=form).sampling == SamplingParams(json_schema=schema)


@pytest.mark.parametrize(
    ("choice", "must", "offered", "callable_"),
    [
        (None, False, ["weather", "time"], ["weather", "time"]),
        ("auto", False, ["weather", "time"], ["weather", "time"]),
        ("none", False, [], []),
        ("required", True, ["weather", "time"], ["weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, True, ["weather", "time"], ["time"]),
    ],
)
def test_which_tools_may_be_called(choice: Any, must: bool, offered: list[str], callable_: list[str]) -> None:
    request = chat(tools=TOOLS, tool_choice=choice)
    assert request.must_call == must
    assert [tool["function"]["name"] for tool in request.offered_tools] == offered
    assert [tool["function"]["name"] for tool in request.callable_tools] == callable_


def test_a_turn_that_called_a_tool_needs_no_content_and_the_developer_is_the_system() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    assert chat(messages=turns).conversation == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]


def test_a_schema_may_be_as_deep_as_the_limit() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": DEEP["items"]}}
    assert chat(response_format=form).sampling.json_schema == DEEP["items"]
