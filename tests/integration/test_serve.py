"""The whole server over HTTP and handles: real Ray, real Serve, the embedded model on two bounded devices.

One cluster serves every test here; the tests that break something come last.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import torch
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.overload import open_loop
from deployments.app import app as bound_application
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.request import Result
from raymoe.errors import RequestError
from raymoe.observe.stats import ClusterStats
from raymoe.serve.app import build_application, engine_options
from raymoe.serve.engine_deployment import EngineServer
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

PROMPT = "It is a truth universally acknowledged, that"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "temperature": 0.0}
CHAT = [{"role": "user", "content": "In the beginning God created"}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The running application."""

    url: str
    handle: DeploymentHandle

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=WAIT_S, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT_S)

    def stats(self) -> ClusterStats:
        return self.handle.stats.remote().result(timeout_s=WAIT_S)

    def running(self) -> int:
        engine = self.stats().engine
        assert engine is not None
        return engine.running + engine.waiting


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The embedded model as ``serve run deployments.app:app`` would serve it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        handle = serve.run(bound_application, name="raymoe")
        yield Server(url=f"http://127.0.0.1:{port}", handle=handle)
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def second(server: Server) -> Server:
    """Another application beside the first: one request at a time, none waiting."""
    config = {
        "model": {"dtype": "float32", "name": "second-moe"},
        "devices": [{"name": "edge-0", "slot_memory": "4MiB"}],
        "trunk": {"max_running": 1, "max_waiting": 0},
    }
    application = build_application(ClusterConfig.model_validate(config))
    return Server(url=f"{server.url}/second", handle=serve.run(application, name="second", route_prefix="/second"))


def deploy_tuned(user_config: dict[str, Any] | None) -> None:
    """What ``serve deploy`` does with a config file of one application by importance."""
    application: dict[str, Any] = {
        "name": "tuned",
        "route_prefix": "/tuned",
        "import_path": "deployments.app:build",
        "args": {
            "model": {"dtype": "float32"},
            "devices": [{"name": "edge-0", "slot_memory": "12MiB"}],
            "scheduling": {"policy": "importance", "alpha": 0.2},
        },
    }
    if user_config is not None:
        application["deployments"] = [{"name": "engine", "user_config": user_config}]
    serve_client = _get_global_client()
    assert serve_client is not None
    serve_client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))


@pytest.fixture(scope="module")
def tuned(server: Server) -> Iterator[Server]:
    """An application of a Serve config file, with policy importance."""
    deploy_tuned({"scheduling": {"alpha": 0.3}})
    until(lambda: serve.status().applications["tuned"].status == "RUNNING", "the start of the application")
    yield Server(url=f"{server.url}/tuned", handle=serve.get_app_handle("tuned"))
    serve.delete("tuned")
    until(lambda: actor_names("tuned") == [], "the end of the application's actors")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)


def actor_names(app: str) -> list[str]:
    """Our detached actors of an application."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if actor["name"].startswith(f"raymoe:{app}:"))


@contextlib.contextmanager
def long_stream(server: Server, **options: Any) -> Iterator[Iterator[str]]:
    """Lines of an answer that takes long; leaving closes the connection."""
    body = {**LONG, "stream": True, **options}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=WAIT_S) as stream:
        yield stream.iter_lines()


# --- answers --------------------------------------------------------------------------------------------


def test_health_and_models(server: Server, client: openai.OpenAI) -> None:
    assert server.get("/health").json() == {"status": "ok", "model": "tiny-moe"}
    assert [model.id for model in client.models.list()] == ["tiny-moe"]


def test_greedy_tokens_are_transformers_own(server: Server, client: openai.OpenAI) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
    expected = output[0, prompt.input_ids.shape[1] :].tolist()

    extra = {"ignore_eos": True, "repetition_penalty": 1.0}
    over_http = client.completions.create(model="tiny-moe", prompt=PROMPT, extra_body=extra, **GREEDY)
    assert over_http.choices[0].text == tokenizer.decode(expected)
    assert over_http.usage is not None
    assert over_http.usage.completion_tokens == 24
    by_handle: Result = server.handle.generate.remote(PROMPT, **GREEDY, **extra).result(timeout_s=WAIT_S)
    assert by_handle.token_ids == expected
    from_ids = client.completions.create(
        model="tiny-moe", prompt=prompt.input_ids[0].tolist(), extra_body=extra, **GREEDY
    )
    assert from_ids.choices[0].text == over_http.choices[0].text


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny-moe", messages=CHAT, **GREEDY)  # type: ignore[call-overload]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.routing["hits"] + whole.routing["misses"] > 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny-moe", messages=CHAT, **GREEDY, **options))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in chunks[-2].choices] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert set(chunks[-1].usage.routing) == set(whole.usage.routing)


def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny-moe", prompt=PROMPT, **GREEDY)
    chunks = list(client.completions.create(model="tiny-moe", prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 1


def test_a_chat_of_text_parts(client: openai.OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    plain = client.chat.completions.create(model="tiny-moe", messages=CHAT, **GREEDY)  # type: ignore[call-overload]
    assert client.chat.completions.create(model="tiny-moe", messages=parts, **GREEDY).choices[0].message.content == (
        plain.choices[0].message.content
    )


def test_log_probabilities(client: openai.OpenAI) -> None:
    asked: Any = {"messages": CHAT, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = client.chat.completions.create(model="tiny-moe", **asked).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 24
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
    columns = client.completions.create(model="tiny-moe", prompt=PROMPT, logprobs=2, **GREEDY).choices[0].logprobs
    assert columns is not None
    assert len(columns.tokens or []) == len(columns.token_logprobs or []) == len(columns.text_offset or []) == 24


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny-moe", prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[10:13]
    choice = client.completions.create(model="tiny-moe", prompt=PROMPT, stop=stop, **GREEDY).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(model="tiny-moe", prompt=PROMPT, seed=seed, temperature=1.5, max_tokens=24)
        return answer.choices[0].text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_handles_generate_stream_and_tell_stats(server: Server) -> None:
    handle = serve.get_app_handle("raymoe")
    whole: Result = handle.generate.remote(CHAT, **GREEDY).result(timeout_s=WAIT_S)
    chunks = list(handle.options(stream=True).stream.remote(CHAT, **GREEDY))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert chunks[-1].usage == whole.usage
    stats = server.stats()
    for device in stats.devices.values():
        assert device.slot_budget_bytes is not None
        assert 0 < device.peak_slot_bytes <= device.slot_budget_bytes


def test_a_handles_bad_request_raises_our_error(server: Server) -> None:
    with pytest.raises(RequestError, match="no such option: max_token"):
        server.handle.generate.remote(PROMPT, max_token=3).result(timeout_s=WAIT_S)


# --- errors ---------------------------------------------------------------------------------------------

BAD = [
    ({"prompt": PROMPT, "model": "gpt-9"}, 404, "model_not_found", "model"),
    ({"prompt": PROMPT, "n": 9}, 400, None, "n"),
    ({"prompt": PROMPT, "max_token": 9}, 400, "unknown_parameter", "max_token"),
    ({"prompt": PROMPT, "temperature": 9}, 400, None, "temperature"),
    ({"prompt": PROMPT, "max_tokens": 100_000}, 400, None, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": "many"}, 400, None, "max_tokens"),
    ({"prompt": [1, 99_999]}, 400, None, "prompt"),
    ({"prompt": [1] * 2000}, 400, None, "prompt"),
    ({"prompt": ["a", [1]]}, 400, None, "prompt"),
    ({"prompt": ["a"] * 65}, 400, None, "prompt"),
    ({"prompt": "half \ud800"}, 400, None, "prompt"),
    ({"prompt": []}, 400, None, "prompt"),
    ({}, 400, None, "prompt"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "status", "code", "param"), BAD)
def test_bad_requests_are_answered_in_json(
    server: Server, body: dict[str, Any], status: int, code: str | None, param: str, stream: bool
) -> None:
    answer = server.post(
        "/v1/completions",
        content=json.dumps({**body, "stream": stream}),
        headers={"Content-Type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"], error["param"]) == (
        status,
        "invalid_request_error",
        code,
        param,
    )


def test_framework_errors_are_json_too(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answers = [
        (server.post("/v1/completions", content=b"{", headers=headers), 400),
        (server.get("/v1/nothing"), 404),
        (server.get("/v1/completions"), 405),
        (server.post("/v1/completions", content=b" " * (9 << 20), headers=headers), 413),
    ]
    for answer, status in answers:
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature is 9"):
        client.completions.create(model="tiny-moe", prompt=PROMPT, temperature=9)


def test_the_server_still_serves(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny-moe", prompt=PROMPT, max_tokens=2).usage is not None


# --- clients that leave ---------------------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_ends_its_request(server: Server) -> None:
    with long_stream(server) as lines:
        next(lines)
        assert server.running() == 1
    until(lambda: server.running() == 0, "the end of the request", 10.0)
    engine = server.stats().engine
    assert engine is not None
    assert engine.kv_bytes == 0


def test_a_client_that_waits_for_a_whole_answer_and_leaves_ends_its_request(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=1.0)
    until(lambda: server.running() == 0, "the end of the request", 10.0)


def test_a_handle_that_cancels_ends_its_request(server: Server) -> None:
    prompt, options = LONG["prompt"], {name: value for name, value in LONG.items() if name != "prompt"}
    stream = server.handle.options(stream=True).stream.remote(prompt, **options)
    next(stream)
    stream.cancel()
    until(lambda: server.running() == 0, "the end of the request", 10.0)


# --- two applications -----------------------------------------------------------------------------------


def test_two_applications_have_actors_of_their_own(server: Server, second: Server) -> None:
    assert actor_names("second") == ["raymoe:second:placement", "raymoe:second:worker:edge-0"]
    assert len(actor_names("raymoe")) == 3
    assert server.get("/v1/models").json()["data"][0]["id"] == "tiny-moe"
    assert second.get("/v1/models").json()["data"][0]["id"] == "second-moe"
    answers = [one.post("/v1/completions", {"prompt": PROMPT, **GREEDY}) for one in (server, second)]
    texts = {answer.json()["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1


def test_a_full_server_sheds_with_json(second: Server) -> None:
    with long_stream(second) as lines:
        next(lines)
        answer = second.post("/v1/completions", {"prompt": PROMPT})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"
    until(lambda: second.running() == 0, "the end of the request", 10.0)


def test_under_far_too_many_requests_each_is_answered_whole_or_refused_properly(second: Server) -> None:
    port = int(second.url.split(":")[2].split("/")[0])
    run = asyncio.run(open_loop(port, rate=30.0, seconds=4.0, seed=1, prefix="/second"))
    assert run.wrong() == {}
    assert len(run.admitted()) + len(run.refused()) == len(run.outcomes) > 80
    assert len(run.admitted()) >= 1 and len(run.refused()) > len(run.outcomes) // 3
    until(lambda: second.running() == 0, "the end of all requests", 10.0)


def test_deleting_an_application_ends_its_actors_only(server: Server, second: Server) -> None:
    serve.delete("second")
    until(lambda: actor_names("second") == [], "the end of the second application's actors", 10.0)
    assert len(actor_names("raymoe")) == 3
    assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200


def test_a_start_that_fails_says_why_once_and_leaves_nothing(server: Server) -> None:
    config = ClusterConfig.model_validate({"model": {"path": "/no/such/model"}})
    with pytest.raises(RuntimeError):
        serve.run(build_application(config), name="broken", route_prefix="/broken")
    application = serve.status().applications["broken"]
    assert application.status == "DEPLOY_FAILED"
    assert "raymoe.errors.CheckpointError" in application.deployments["engine"].message
    assert actor_names("broken") == []
    answer = server.post("/broken/v1/completions", {"prompt": PROMPT})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
    serve.delete("broken")


# --- quality, and settings that change while it runs ----------------------------------------------------


def test_an_answer_says_what_was_substituted_and_exact_ones_nothing(tuned: Server, server: Server) -> None:
    client = openai.OpenAI(base_url=f"{tuned.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
    exact, fast = (
        client.completions.create(model="tiny-moe", prompt=PROMPT, extra_body={"quality": quality}, **GREEDY)
        for quality in ("exact", "fast")
    )
    assert exact.usage is not None and fast.usage is not None
    assert (exact.usage.routing["substituted"], exact.usage.routing["substituted_gate_mass"]) == (0, 0.0)
    assert fast.usage.routing["substituted"] > 0 < fast.usage.routing["substituted_gate_mass"]
    assert fast.routing == fast.usage.routing
    untouched = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()
    assert exact.choices[0].text == untouched["choices"][0]["text"]
    assert untouched["usage"]["routing"]["substituted"] == 0


def test_a_streams_chunk_of_usage_has_the_cost_too(tuned: Server) -> None:
    client = openai.OpenAI(base_url=f"{tuned.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    asked: Any = {"messages": CHAT, "extra_body": {"quality": 0.5}, **GREEDY, **options}
    *_, last = client.chat.completions.create(model="tiny-moe", **asked)
    routing = last.usage.routing
    assert routing["hits"] + routing["misses"] > 0 < routing["substituted"]
    assert routing["bytes_loaded"] == routing["loads"] * 196_608


@pytest.mark.parametrize("quality", ["best", 0.9, -0.1, True, ["exact"]])
def test_a_wrong_quality_is_400_with_what_is_allowed(tuned: Server, quality: Any) -> None:
    for path, body in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": CHAT, "stream": True})):
        answer = tuned.post(f"/v1/{path}", {**body, "quality": quality})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "quality")
        assert '"exact", "balanced", "fast", or an alpha from 0 to ' in error["message"]


def test_a_changed_user_config_is_in_force_without_a_restart(tuned: Server) -> None:
    def engine() -> dict[str, Any]:
        return tuned.get("/v1/stats").json()["engine"]

    def pids() -> list[int]:
        return [replica_pid("engine", "tuned"), *(device.pid for device in tuned.stats().devices.values())]

    def in_worker() -> float:
        worker = ray.get_actor("raymoe:tuned:worker:edge-0", "raymoe")
        return ray.get(worker.describe.remote(), timeout=WAIT_S).scheduling.alpha

    assert (engine()["alpha"], in_worker()) == (0.3, 0.3)
    before = pids()
    deploy_tuned({"scheduling": {"alpha": 0.4, "prefetch": "none"}})
    until(lambda: engine()["alpha"] == 0.4, "the change of alpha")
    assert in_worker() == 0.4

    deploy_tuned({"scheduling": {"alpha": 7}})
    until(lambda: engine()["refused_settings"] is not None, "the refusal")
    assert engine()["refused_settings"] == "user_config: scheduling: alpha: is 7; allowed is 0 to 1"
    assert (engine()["alpha"], in_worker()) == (0.4, 0.4)
    assert serve.status().applications["tuned"].status == "RUNNING"

    deploy_tuned(None)
    until(lambda: engine()["alpha"] == 0.2, "the way back to the configuration's alpha")
    assert (engine()["refused_settings"], in_worker()) == (None, 0.2)
    assert pids() == before


def test_a_wrong_user_config_fails_a_start_and_says_why(server: Server) -> None:
    config = ClusterConfig.model_validate({"devices": [{"name": "edge-0", "slot_memory": "4MiB"}]})
    engine = serve.deployment(name="engine", **engine_options(config) | {"user_config": {"scheduling": {"alpha": 7}}})
    with pytest.raises(RuntimeError):
        serve.run(engine(EngineServer).bind(config), name="refused", route_prefix="/refused")
    message = serve.status().applications["refused"].deployments["engine"].message
    assert "raymoe.errors.ConfigError: user_config: scheduling: alpha: is 7; allowed is 0 to 1" in message
    until(lambda: actor_names("refused") == [], "the end of what the start had started")
    serve.delete("refused")


# --- those who look on ---------------------------------------------------------------------------------


def test_the_page_and_what_it_looks_at(server: Server) -> None:
    page = server.get("/")
    assert page.status_code == 200 and "<title>raymoe</title>" in page.text
    assert server.get("/page/main.js").status_code == 200
    stats, residency = server.get("/v1/stats").json(), server.get("/v1/stats/residency").json()
    assert set(residency["devices"]) == set(stats["devices"])
    assert {"state", "use", "use_max", "score", "score_max"} == set(next(iter(residency["devices"].values())))
    assert stats["settings"]["policy"] == stats["policy"]
    assert set(server.get("/v1/stats/timeline").json()) == {"recorded_s", "duration_s", "steps", "processes"}
    metrics = server.get("/metrics")
    assert metrics.status_code == 200 and 'raymoe_nodes_unreachable{app="raymoe"} 0.0' in metrics.text


# --- an engine that dies --------------------------------------------------------------------------------


def replica_pid(deployment: str, app: str = "raymoe") -> int:
    """Process id of a deployment's one replica."""
    title = f"ray::ServeReplica:{app}:{deployment}"
    [process] = [one for one in psutil.Process().children(recursive=True) if "".join(one.cmdline()).startswith(title)]
    return process.pid


def whole_text(lines: Iterator[str]) -> str:
    """Of a stream that ends well."""
    *events, done = [line.removeprefix("data: ") for line in lines if line]
    assert done == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_generation_goes_on_when_the_placement_actor_dies(server: Server) -> None:
    with long_stream(server, max_tokens=300) as lines:
        undisturbed = whole_text(lines)
    with long_stream(server, max_tokens=300) as lines:
        first = next(lines)
        ray.kill(ray.get_actor("raymoe:raymoe:placement", "raymoe"), no_restart=False)
        assert whole_text(itertools.chain([first], lines)) == undisturbed

    def is_back() -> bool:
        answer = server.get("/v1/stats")
        return answer.status_code == 200 and len(answer.json()["devices"]) == 2

    until(is_back, "the return of the placement actor")


def test_an_ingress_that_dies_is_replaced_and_leaves_nothing_in_the_engine(server: Server) -> None:
    wanted = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["choices"][0]["text"]
    engine = replica_pid("engine")
    with contextlib.suppress(httpx.HTTPError), long_stream(server) as lines:
        next(lines)
        os.kill(replica_pid("ingress"), signal.SIGKILL)
        assert not any("[DONE]" in line for line in lines), "the client of a dead ingress sees its stream break off"

    def answers() -> bool:
        answer = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY})
        return answer.status_code == 200 and answer.json()["choices"][0]["text"] == wanted

    until(answers, "the next answer")
    until(lambda: server.running() == 0, "the end of the request that nobody reads any more")
    stats = server.stats().engine
    assert stats is not None and stats.kv_bytes == 0
    assert replica_pid("engine") == engine


def test_an_engine_that_dies_is_told_replaced_and_leaves_the_workers_alone(server: Server) -> None:
    def loaded() -> dict[str, tuple[int, int, int]]:
        return {name: (device.pid, device.owned, device.host_bytes) for name, device in server.stats().devices.items()}

    before = loaded()
    wanted = server.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["choices"][0]["text"]
    with long_stream(server) as lines:
        next(lines)
        os.kill(replica_pid("engine"), signal.SIGKILL)
        *_, error, done = [line for line in lines if line]
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "unavailable"
    assert done == "data: [DONE]"

    seen: list[int] = []
    healths: list[int] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            healths.append(server.get("/health").status_code)

    looking = threading.Thread(target=look)
    looking.start()
    while 200 not in seen:
        answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
        assert answer.headers["content-type"] == "application/json", answer.text
        seen.append(answer.status_code)
    stop.set()
    looking.join()
    assert set(seen) <= {503, 200}
    assert 503 in healths
    assert loaded() == before, "the workers are the same, with what they had in memory"
    assert server.post("/v1/completions", {"prompt": PROMPT, **GREEDY}).json()["choices"][0]["text"] == wanted


# --- the end (last in the file) -------------------------------------------------------------------------


def test_deleting_the_last_application_leaves_nothing(server: Server) -> None:
    serve.delete("raymoe")
    until(lambda: actor_names("raymoe") == [], "the end of the application's actors", 10.0)
