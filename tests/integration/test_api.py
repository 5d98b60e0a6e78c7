"""OpenAI's own client before a real server: every parameter, streaming and not, and errors in its classes.

The model is the embedded one, behind a chat template with tools. One server serves every test here.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import Result
from tests.serving import TOOL_TEMPLATE, Served, run_application, serving, with_template
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

MODEL = "tiny-moe"
PROMPT = "It is a truth universally acknowledged, that"
CHAT: Any = [{"role": "user", "content": "In the beginning God created"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["glad", "sad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
                "required": ["town"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "stop_all",
            "parameters": {
                "type": "object",
                "properties": {"now": {"type": "boolean"}},
                "required": ["now"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = with_template(tmp_path_factory.mktemp("model"), TOOL_TEMPLATE)
    with serving() as url:
        yield run_application(url, {"model": {"path": str(model)}}, "api")


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return served.client()


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": CHAT, **GREEDY, **options})


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": PROMPT, **GREEDY, **options})


# --- several answers ------------------------------------------------------------------------------------


def test_n_answers_have_seeds_of_their_own_and_the_first_is_the_only_one_of_n_1(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 7}
    several = complete(client, n=3, **options)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.text for choice in complete(client, n=3, **options).choices] == texts
    one = complete(client, **options)
    assert one.choices[0].text == texts[0]
    assert several.usage.prompt_tokens == one.usage.prompt_tokens
    assert several.usage.completion_tokens == 3 * 16


def test_a_stream_of_n_answers_is_the_whole_ones(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 7, "n": 3}
    whole = ask(client, **options)
    texts, reasons = ["", "", ""], ["", "", ""]
    *chunks, usage = ask(client, stream=True, stream_options={"include_usage": True}, **options)
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length"] * 3
    assert usage.choices == [] and usage.usage.total_tokens == whole.usage.total_tokens


def test_a_batch_of_prompts_answers_each(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "In the beginning", "def main"]
    batch = complete(client, prompt=prompts, n=2)
    alone = [complete(client, prompt=prompt) for prompt in prompts]
    assert [choice.index for choice in batch.choices] == list(range(6))
    assert [choice.text for choice in batch.choices[::2]] == [answer.choices[0].text for answer in alone]
    assert batch.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(prompts).input_ids
    assert [choice.text for choice in complete(client, prompt=ids).choices] == [
        choice.text for choice in batch.choices[::2]
    ]


def test_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    ids = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(PROMPT).input_ids
    assert complete(client, prompt=ids, echo=True).choices[0].text == PROMPT + plain
    streamed = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == PROMPT + plain


# --- which tokens ---------------------------------------------------------------------------------------


def test_logit_bias_bans_and_forces_tokens(client: openai.OpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    first = complete(client, max_tokens=1).choices[0].text
    [banned] = tokenizer.encode(first)
    assert complete(client, max_tokens=1, logit_bias={str(banned): -100}).choices[0].text != first
    [forced] = tokenizer.encode(" the")
    assert complete(client, max_tokens=5, logit_bias={str(forced): 100}).choices[0].text == " the" * 5


def test_log_probabilities_are_those_of_one_distribution(client: openai.OpenAI) -> None:
    [choice] = ask(client, logprobs=True, top_logprobs=20).choices
    for entry in choice.logprobs.content:
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0]  # greedy
        mass = sum(2.718281828459045**logprob for logprob in tops)
        assert 0.2 < mass < 1.0 + 1e-5
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    columns = complete(client, logprobs=5).choices[0].logprobs
    for top, own in zip(columns.top_logprobs, columns.token_logprobs, strict=True):
        assert len(top) <= 5 and max(top.values()) == own
    assert columns.text_offset == [len("".join(columns.tokens[:number])) for number in range(16)]


def test_a_bias_does_not_change_what_the_model_is_told_to_think(client: openai.OpenAI) -> None:
    plain, biased = (
        complete(client, max_tokens=1, logprobs=1, logit_bias=bias).choices[0].logprobs for bias in ({}, {"500": 100})
    )
    assert biased.top_logprobs == plain.top_logprobs
    assert biased.token_logprobs[0] < plain.token_logprobs[0]


def test_penalties_and_stop(client: openai.OpenAI) -> None:
    plain = complete(client, max_tokens=40).choices[0].text
    assert complete(client, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text != plain
    stops = [plain[20:24], plain[8:12]]
    stopped = complete(client, max_tokens=40, stop=stops).choices[0]
    assert stopped.text == plain[: min(plain.index(stop) for stop in stops)]
    assert stopped.finish_reason == "stop"


def test_max_completion_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


# --- forms of answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_an_answer_by_a_schema_parses_and_validates(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = ask(client, response_format=form, max_tokens=200, temperature=temperature, seed=3, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_any_json_object(client: openai.OpenAI) -> None:
    bias = {"92": 5}  # braces, so that a model that knows no JSON comes to an end
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=300, logit_bias=bias)
    [choice] = answer.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


def test_a_streamed_answer_by_a_grammar(client: openai.OpenAI) -> None:
    grammar = 'start: ("yes" | "no") "!"'
    chunks = ask(client, stream=True, extra_body={"grammar": grammar})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in ("yes!", "no!")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "http://127.0.0.1:1/x"}, "fetch"),
        ({"enum": ["y" * 200_000]}, "allowed are 100,000"),
    ],
)
def test_a_schema_that_can_not_be_used_is_told(client: openai.OpenAI, schema: Any, words: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ask(client, response_format=form)
    assert caught.value.param == "response_format"


# --- tools ----------------------------------------------------------------------------------------------


def test_a_required_tool_is_called_by_its_schema(client: openai.OpenAI) -> None:
    answer = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_named_tool_is_called_and_its_stream_is_openais(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "stop_all"}}
    chunks = list(ask(client, tools=TOOLS, tool_choice=choice, stream=True, max_tokens=200))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "stop_all")]
    assert isinstance(json.loads(calls[0].function.arguments)["now"], bool)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI) -> None:
    first = ask(client, tools=TOOLS, tool_choice="required", max_tokens=200).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls]
    turns = [*CHAT, first.model_dump(), *results]
    answer = ask(client, messages=turns, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


def test_tools_are_told_to_the_model(client: openai.OpenAI) -> None:
    without, offered = ask(client), ask(client, tools=TOOLS)
    assert offered.usage.prompt_tokens > without.usage.prompt_tokens + 20
    assert ask(client, tools=TOOLS, tool_choice="none").usage.prompt_tokens == without.usage.prompt_tokens


# --- other routes ---------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_tokens_and_back(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    answer = served.post("/tokenize", {"prompt": PROMPT}).json()
    ids = tokenizer.encode(PROMPT)
    assert answer == {"count": len(ids), "max_model_len": 1024, "tokens": ids}
    assert served.post("/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}
    chat = served.post("/tokenize", {"messages": CHAT}).json()["tokens"]
    assert served.post("/detokenize", {"tokens": chat}).json()["prompt"] == CHAT[0]["content"]
    for path, body, param in [
        ("/detokenize", {"tokens": [99_999]}, "tokens"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
    ]:
        refused = served.post(path, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


# --- the async client -----------------------------------------------------------------------------------


def test_the_async_client_streams_several_answers_at_once(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        text = ""
        stream: Any = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stream=True, seed=seed, temperature=1.2, max_tokens=12
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def both() -> tuple[list[str], str]:
        async with served.async_client() as client:
            streamed = await asyncio.gather(*(one(client, seed) for seed in range(4)))
            whole = await client.chat.completions.create(
                model=MODEL, messages=CHAT, seed=2, temperature=1.2, max_tokens=12
            )
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model=MODEL, prompt=PROMPT, temperature=9)
            return streamed, whole.choices[0].message.content or ""

    streamed, whole = asyncio.run(both())
    assert len(set(streamed)) == 4
    assert streamed[2] == whole


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary is 0 to 4095"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"prompt": ["x"] * 65}, "prompt", "at most 64"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported"),
        ({"extra_body": {"max_token": 5}}, "max_token", "unrecognized request argument"),
        ({"extra_body": {"grammar": "start: nothing"}}, "grammar", "unknown name"),
        ({"extra_body": {"grammar": 'start: "a"', "ignore_eos": True}}, "ignore_eos", "has an end"),
    ],
)
def test_wrong_parameters_are_bad_requests_with_their_field(
    client: openai.OpenAI, options: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        complete(client, **options)
    assert caught.value.param == param


def test_a_client_that_leaves_n_answers_ends_them_all(served: Served, client: openai.OpenAI) -> None:
    def running() -> int:
        engine = served.get("/v1/stats").json()["engine"]
        return engine["running"] + engine["waiting"]

    stream = complete(client, n=4, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert running() == 4
    stream.close()
    until(lambda: running() == 0, "the end of the answers", 20.0)


def test_handles_take_grammars_and_biases(served: Served) -> None:
    options: dict[str, Any] = {"json_schema": {"enum": ["a", "b"]}, "logit_bias": {5: 1.0}}
    result: Result = served.handle.generate.remote(PROMPT, **options).result(timeout_s=WAIT_S)
    assert json.loads(result.text) in ("a", "b")
