"""The routes over an engine that is a script: status codes, JSON, events, cancellation. No Ray."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from raymoe.engine.request import Chunk, TokenLogprob, Usage
from raymoe.errors import CapacityError, EngineStoppedError, ExpertUnavailableError, OverloadedError, RequestError
from raymoe.observe.stats import ClusterStats, DeviceStats, EngineStats
from raymoe.serve.api import MAX_BODY_BYTES, Api, create_app
from raymoe.serve.batch import Batch
from raymoe.serve.choices import Answers
from raymoe.serve.errors import RequestTimeoutError, describe, unwrap
from raymoe.serve.render import ChatRenderer
from raymoe.serve.streaming import EventStream, events
from raymoe.types import Routing

LAST = {
    "finish_reason": "stop",
    "usage": Usage(prompt_tokens=3, completion_tokens=2),
    "routing": Routing(
        hits=3,
        misses=1,
        hosted=1,
        loads=2,
        bytes_loaded=200,
        calls=1,
        decisions=2,
        substituted=1,
        replaced_mass=0.5,
        foretellable=4,
        foretold=2,
    ),
}
COST = {
    "substituted": 1,
    "substituted_gate_mass": 0.25,
    "hit_rate": 0.75,
    "hits": 3,
    "misses": 1,
    "hosted": 1,
    "loads": 2,
    "bytes_loaded": 200,
    "recall": 0.5,
    "drafted": 0,
    "accepted": 0,
    "degraded": False,
}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
    "routing": COST,
}
ANSWER = [
    Batch(chunks=(Chunk(text="Hel", token_ids=(1,)), Chunk(text="lo", token_ids=(2,)))),
    Batch(chunks=(Chunk(text="", token_ids=(3,)),)),
    Batch(chunks=(Chunk(text="!", token_ids=(4,), **LAST),)),
]
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
DEVICE = DeviceStats(
    name="edge", kind="cpu", transport="zmq", state="healthy", node="n", pid=1, emulated_link=False,
    slot_budget_bytes=1, peak_slot_bytes=1, host_bytes=1, owned=1, resident=1, resident_experts=((0, 0),), calls=1,
    hits=8, misses=2, hosted=2, loads=1, bytes_loaded=1, evictions=0, prefetches=5, prefetches_refused=3,
    prefetches_late=4,
)  # fmt: skip
ENGINE = EngineStats(
    model="tiny", architecture="a", dtype="float32", running=0, waiting=0, finished=1, failed=0, prompt_tokens=3,
    completion_tokens=2, kv_bytes=0, kv_budget_bytes=None, hits=8, misses=2, hosted=2, substituted=1,
    substituted_gate_mass=0.01, loads=1, bytes_loaded=1, alpha=0.3, decode_s=0.1, steps=2,
)  # fmt: skip


class Script:
    """An engine that says what it was told to say."""

    def __init__(self, *items: Batch | Exception) -> None:
        self.items = items or tuple(ANSWER)
        self.asked: list[tuple[Any, Any]] = []
        self.closed = 0

    async def stream(self, prompt: Any, params: Any) -> AsyncGenerator[Batch]:
        self.asked.append((prompt, params))
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1

    async def card(self) -> dict[str, Any]:
        if isinstance(self.items[0], Exception):
            raise self.items[0]
        return {"name": "tiny"}

    async def stats(self) -> ClusterStats:
        if isinstance(self.items[0], Exception):
            raise self.items[0]
        return ClusterStats(app="tiny", devices={"edge": DEVICE}, engine=ENGINE, policy="importance")


def ask(asked: Script | Api, path: str, body: Any = None, **options: Any) -> httpx.Response:
    """One HTTP request, in process."""
    api = asked if isinstance(asked, Api) else Api(asked, "tiny")

    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(api), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            if body is None and not options:
                return await client.get(path)
            return await client.post(path, json=body, **options)

    return asyncio.run(request())


def stream_of(answer: httpx.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_whole_chat_answer() -> None:
    body = ask(Script(), "/v1/chat/completions", CHAT).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == USAGE
    assert body["routing"] == COST


def test_tokens_that_are_ready_together_share_an_event_and_silent_ones_have_none() -> None:
    chunks = stream_of(ask(Script(), "/v1/chat/completions", {**CHAT, "stream": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "Hello"},
        {"content": "!"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_is_the_last_chunk_and_has_no_choices() -> None:
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    chunks = stream_of(ask(Script(), "/v1/completions", body))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == USAGE
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert [chunk.get("routing") for chunk in chunks] == [None, COST, None]


def test_log_probabilities_in_both_apis() -> None:
    logprob = TokenLogprob(token_id=1, logprob=-0.5, top=((1, -0.5), (9, -2.0)))
    batch = Batch(chunks=(Chunk(text="é", token_ids=(1,), logprobs=(logprob,), **LAST),), token_texts={1: "é", 9: "�"})
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2}
    [entry] = ask(Script(batch), "/v1/chat/completions", asked).json()["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "é"
    assert entry["bytes"] == [0xC3, 0xA9]
    assert [(top["token"], top["bytes"]) for top in entry["top_logprobs"]] == [("é", [0xC3, 0xA9]), ("�", None)]
    columns = ask(Script(batch), "/v1/completions", {"prompt": "x", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert columns == {
        "tokens": ["é"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"é": -0.5, "�": -2.0}],
        "text_offset": [0],
    }


FAILURES = [
    (RequestError("max_tokens is 0", param="max_tokens"), 400, "invalid_request_error", None),
    (OverloadedError("full"), 429, "rate_limit_error", "overloaded"),
    (EngineStoppedError("gone"), 503, "unavailable", "unavailable"),
    (ExpertUnavailableError("lost"), 503, "unavailable", "unavailable"),
    (RequestTimeoutError("late"), 504, "timeout", "timeout"),
    (CapacityError("too small"), 500, "server_error", None),
    (KeyError("a bug"), 500, "server_error", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_byte_have_their_status(
    error: Exception, status: int, kind: str, code: str | None, stream: bool
) -> None:
    answer = ask(Script(error), "/v1/chat/completions", {**CHAT, "stream": stream})
    assert answer.status_code == status
    told = answer.json()["error"]
    assert (told["type"], told["code"]) == (kind, code)
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_an_unexpected_error_does_not_tell_its_details() -> None:
    assert "a bug" not in ask(Script(KeyError("a bug")), "/v1/chat/completions", CHAT).text


def test_the_field_at_fault_is_named() -> None:
    answer = ask(Script(RequestError("bad", param="top_p")), "/v1/chat/completions", CHAT)
    assert answer.json()["error"] == {
        "message": "bad",
        "type": "invalid_request_error",
        "param": "top_p",
        "code": None,
    }


def test_a_failure_in_mid_stream_is_an_event_before_done() -> None:
    script = Script(ANSWER[0], EngineStoppedError("the engine ended"))
    answer = ask(script, "/v1/chat/completions", {**CHAT, "stream": True})
    first, error = stream_of(answer)
    assert answer.status_code == 200
    assert first["choices"][0]["delta"]["content"] == "Hello"
    assert error["error"]["message"] == "the engine ended"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": "hi"}, "messages", "list"),
        ({**CHAT, "temperature": "hot"}, "temperature", "number"),
        ({**CHAT, "n": 9}, "n", "less than or equal to 8"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({**CHAT, "quality": {"alpha": 0.3}}, "quality", "an alpha from 0 to"),
        ([1], None, "JSON object"),
    ],
)
def test_invalid_bodies_are_400_with_the_field(body: Any, param: str | None, words: str) -> None:
    answer = ask(Script(), "/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_400(content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = ask(Script(), "/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_is_told_how_to_send_json() -> None:
    answer = ask(Script(), "/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_another_models_name_is_404() -> None:
    script = Script()
    answer = ask(script, "/v1/completions", {"model": "gpt-9", "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert '"tiny" is served' in answer.json()["error"]["message"]
    assert script.asked == []


def test_unknown_paths_and_methods_are_json_too() -> None:
    missing = ask(Script(), "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = ask(Script(), "/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_large_bodies_are_413_announced_or_not() -> None:
    def pieces() -> Callable[[], AsyncGenerator[bytes]]:
        async def generate() -> AsyncGenerator[bytes]:
            for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
                yield b" " * (1 << 20)

        return generate

    announced = ask(Script(), "/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    chunked = ask(Script(), "/v1/completions", content=pieces()(), headers={"Content-Type": "application/json"})
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_models() -> None:
    api = Api(Script(), "tiny")
    [model] = ask(api, "/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert ask(api, "/v1/models/tiny").json() == model
    assert ask(Script(), "/v1/models/a/b").json()["error"]["code"] == "model_not_found"


def test_stats_tell_alpha_and_the_rates_but_no_names_of_experts() -> None:
    stats = ask(Script(), "/v1/stats").json()
    assert stats["policy"] == "importance"
    rates = {name: stats["engine"][name] for name in ("alpha", "hit_rate", "substituted_share")}
    assert rates == {"alpha": 0.3, "hit_rate": 0.8, "substituted_share": 0.1}
    assert (stats["devices"]["edge"]["hosted"], stats["devices"]["edge"]["prefetches_late"]) == (2, 4)
    assert "resident_experts" not in stats["devices"]["edge"]
    assert ask(Script(EngineStoppedError("gone")), "/v1/stats").status_code == 503


def test_openais_client_reads_what_it_knows_and_keeps_the_rest() -> None:
    whole = ChatCompletion.model_validate(ask(Script(), "/v1/chat/completions", CHAT).json())
    assert whole.usage is not None and whole.usage.total_tokens == 5
    assert whole.usage.routing == COST  # type: ignore[attr-defined]
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    last = Completion.model_validate(stream_of(ask(Script(), "/v1/completions", body))[-1])
    assert last.usage is not None and last.usage.routing == COST  # type: ignore[attr-defined]


def test_health_follows_the_engine() -> None:
    assert ask(Script(), "/health").json() == {"status": "ok", "model": "tiny"}
    sick = ask(Script(EngineStoppedError("the engine has failed: out of memory")), "/health")
    assert sick.status_code == 503
    assert sick.json()["status"] == "unavailable"
    assert "out of memory" in sick.json()["error"]["message"]


def test_a_client_that_leaves_closes_the_engines_stream() -> None:
    async def leave() -> int:
        script = Script()
        answers = await Answers.begin([script.stream("hi", None)])
        body = events(answers, ChatRenderer("tiny"), include_usage=False)
        response = EventStream(body, answers)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.Event().wait()  # a client that no longer reads

        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        return script.closed

    assert asyncio.run(leave()) == 1


def test_errors_that_crossed_a_handle_are_ours_again() -> None:
    ours = RequestError("bad", param="seed")
    wrapped = RayTaskError("stream", "traceback", ours).as_instanceof_cause()
    twice = RayTaskError("stream", "traceback", wrapped).as_instanceof_cause()
    assert unwrap(wrapped) is ours
    assert unwrap(twice) is ours
    assert describe(wrapped).param == "seed"


@pytest.mark.parametrize(
    ("error", "status"),
    [(ActorDiedError(), 503), (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429)],
)
def test_rays_own_errors_have_a_status(error: Exception, status: int) -> None:
    assert describe(error).status == status
