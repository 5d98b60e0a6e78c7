"""Several answers of one request, and calls of tools in their texts. No Ray, no model."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.engine.request import Chunk, SamplingParams, Usage
from raymoe.errors import OverloadedError
from raymoe.serve.batch import Batch
from raymoe.serve.choices import Answers, params_of
from raymoe.serve.tools import ToolReader
from tests.unit.test_serve_api import CHAT, LAST, Script, ask, stream_of

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


# --- choices --------------------------------------------------------------------------------------------


def test_each_choice_has_a_seed_of_its_own_and_the_first_the_requests() -> None:
    params = SamplingParams(seed=5)
    seeds = [params_of(params, choice).seed for choice in range(8)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 8
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert params_of(SamplingParams(), 3).seed is None


class Source:
    """A stream of batches whose pace the test sets; counts how often it was closed."""

    def __init__(self, *texts: str, error: Exception | None = None) -> None:
        self.texts = texts
        self.error = error
        self.closed = 0
        self.go = asyncio.Event()

    async def stream(self) -> AsyncGenerator[Batch]:
        try:
            if self.error is not None:
                raise self.error
            yield Batch()
            for text in self.texts:
                await self.go.wait()
                yield Batch(chunks=(Chunk(text=text, token_ids=(1,)),))
        finally:
            self.closed += 1


def test_batches_come_as_they_are_ready_with_their_choice() -> None:
    async def read() -> list[tuple[int, str]]:
        slow, fast = Source("s"), Source("f", "g")
        answers = await Answers.begin([slow.stream(), fast.stream()])
        fast.go.set()
        got = []
        async for batch in answers:
            got.append((batch.choice, batch.text))
            if batch.text == "g":
                slow.go.set()
        await answers.aclose()
        return got

    assert asyncio.run(read()) == [(0, ""), (1, ""), (1, "f"), (1, "g"), (0, "s")]


def test_one_that_is_refused_refuses_and_closes_all() -> None:
    async def begin() -> list[int]:
        good, bad = Source("x"), Source(error=OverloadedError("full"))
        with pytest.raises(OverloadedError):
            await Answers.begin([good.stream(), bad.stream()])
        return [good.closed, bad.closed]

    assert asyncio.run(begin()) == [1, 1]


def test_leaving_closes_all_also_those_that_are_waited_for() -> None:
    async def leave() -> list[int]:
        sources = [Source("x"), Source("y"), Source("z")]
        answers = await Answers.begin([source.stream() for source in sources])
        sources[1].go.set()
        async for batch in answers:
            if batch.text == "y":
                break
        await answers.aclose()
        return [source.closed for source in sources]

    assert asyncio.run(leave()) == [1, 1, 1]


def test_several_prompts_and_choices_over_http() -> None:
    script = Script()
    body = {"prompt": ["a", "b"], "n": 2, "seed": 9, "echo": True}
    answer = ask(script, "/v1/completions", body).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "aHello!"), (1, "aHello!"), (2, "bHello!"), (3, "bHello!"),
    ]  # fmt: skip
    assert [prompt for prompt, _ in script.asked] == ["a", "a", "b", "b"]
    seeds = [params.seed for _, params in script.asked]
    assert seeds[:2] == seeds[2:] and len(set(seeds)) == 2
    assert answer["usage"]["prompt_tokens"] == 2 * 3  # once per prompt
    assert answer["usage"]["completion_tokens"] == 4 * 2
    assert answer["usage"]["routing"]["hits"] == 4 * 3
    assert script.closed == 4


def test_cached_tokens_are_told() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2)
    batch = Batch(chunks=(Chunk(text="x", token_ids=(1,), **{**LAST, "usage": usage}),))
    answer = ask(Script(batch), "/v1/completions", {"prompt": "a"}).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_more_answers_than_the_engine_holds_are_refused() -> None:
    from raymoe.serve.api import Api

    answer = ask(Api(Script(), "tiny", most_choices=3), "/v1/completions", {"prompt": ["a", "b"], "n": 2})
    assert answer.status_code == 400
    assert "2 prompts x n 2 are 4 answers; this server makes at most 3" in answer.json()["error"]["message"]


# --- calls of tools -------------------------------------------------------------------------------------


def read(pieces: list[str]) -> tuple[str, list[dict[str, Any]]]:
    reader = ToolReader()
    text, calls = "", []
    for number, piece in enumerate(pieces):
        new, found = reader.read(piece, last=number == len(pieces) - 1)
        text += new
        calls += found
    return text, [call["function"] for call in calls]


F = {"name": "f", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ("hello", "hello", []),
        (CALL, "", [F]),
        (f"I look.\n{CALL}", "I look.\n", [F]),
        (f"{CALL}\n{CALL}", "", [F, F]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [F]),  # the last tag left out
        ("<tool_call>not JSON</tool_call>!", "<tool_call>not JSON</tool_call>!", []),
        ('<tool_call>{"no": "name"}', '<tool_call>{"no": "name"}', []),
        ("1 < 2, <tool", "1 < 2, <tool", []),
        ('<tool_call>{"name": "g"}</tool_call>', "", [{"name": "g", "arguments": "{}"}]),
    ],
)
@given(data=st.data())
def test_calls_are_told_from_text_however_it_is_cut(
    text: str, plain: str, calls: list[dict[str, Any]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == (plain, calls)


def script_of(text: str, tool_format: str | None = "hermes") -> Script:
    first = Batch(chunks=(Chunk(text=text[:20], token_ids=(1,)),))
    script = Script(first, Batch(chunks=(Chunk(text=text[20:], token_ids=(2,), **LAST),)))

    async def card() -> dict[str, Any]:
        return {"name": "tiny", "tool_format": tool_format}

    script.card = card  # type: ignore[method-assign]
    return script


def test_calls_in_a_whole_answer() -> None:
    answer = ask(script_of(f"So.\n{CALL}"), "/v1/chat/completions", {**CHAT, "tools": TOOLS}).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "So."
    [call] = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", F)
    assert call["id"].startswith("call_")


def test_calls_in_a_stream() -> None:
    answer = ask(script_of(f"{CALL}\n{CALL}"), "/v1/chat/completions", {**CHAT, "tools": TOOLS, "stream": True})
    chunks = stream_of(answer)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]) for call in calls] == [(0, F), (1, F)]
    assert len({call["id"] for call in calls}) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    answer = ask(script_of(CALL), "/v1/chat/completions", CHAT).json()
    assert answer["choices"][0]["message"]["content"] == CALL
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("tool_format", "choice", "param"), [(None, "auto", "tools"), ("unknown", "required", "tool_choice")]
)
def test_models_that_can_not_call_say_so(tool_format: str | None, choice: str, param: str) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": choice}
    answer = ask(script_of("x", tool_format), "/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_tools_reach_the_template_and_a_must_becomes_a_grammar() -> None:
    script = script_of(CALL)
    ask(script, "/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": "required"})
    [(prompt, params)] = script.asked
    assert prompt.tools == TOOLS
    assert json.dumps('{"name": "f", "arguments": ') in params.grammar
