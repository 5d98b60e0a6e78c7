"""The engine deployment over a service that is a script, and the handle's client. No Ray, no model."""

import asyncio
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from raymoe.config import ClusterConfig, SchedulingConfig
from raymoe.engine.request import Chunk, SamplingParams, TokenLogprob
from raymoe.errors import (
    ConfigError,
    DrainingError,
    EngineStoppedError,
    ExpertUnavailableError,
    OverloadedError,
    RaymoeError,
    RequestError,
)
from raymoe.serve.batch import Batch
from raymoe.serve.client import EngineClient
from raymoe.serve.engine_deployment import EngineServer
from raymoe.serve.errors import RequestTimeoutError
from raymoe.serve.ingress import holding

PARAMS = SamplingParams(max_tokens=3)
LAST = Chunk(text="!", token_ids=(3,), finish_reason="length")
SCHEDULING: dict[str, Any] = {"policy": "importance", "alpha": 0.2, "prefetch": "none"}


class Service:
    """Says its chunks as soon as a request comes; remembers what was cancelled."""

    def __init__(self, *items: Chunk | Exception, refusal: Exception | None = None) -> None:
        self.items = items
        self.refusal = refusal
        self.cancelled: list[int] = []
        self.params: Any = None
        self.failure: BaseException | None = None
        self.stalled_s = 0.0
        self.drained = False
        self.on_chunk: Callable[[Any], None] = lambda item: None
        self.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")

    def submit(self, prompt: Any, params: Any, on_chunk: Callable[[Any], None]) -> int:
        self.params, self.on_chunk = params, on_chunk
        if self.refusal is not None:
            raise self.refusal
        for item in self.items:
            on_chunk(item)
        return 7

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def drain(self) -> None:
        self.drained = True

    def give_up(self, error: BaseException) -> None:
        self.failure = error
        self.on_chunk(error)


class Session:
    """Holds a service, counts how often it is closed, and remembers its settings."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.closed = 0
        self.scheduled: list[SchedulingConfig] = []
        self.refused_settings: str | None = None
        self.refusal: RaymoeError | None = None

    def schedule(self, scheduling: SchedulingConfig) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.scheduled.append(scheduling)

    def close(self) -> None:
        self.closed += 1


def server(service: Service, timeout_s: float = 60.0) -> EngineServer:
    made = EngineServer.__new__(EngineServer)
    config = ClusterConfig.model_validate({"serving": {"request_timeout_s": timeout_s}, "scheduling": SCHEDULING})
    made._start(Session(service), config)  # type: ignore[arg-type]
    return made


def batches_of(engine: EngineServer, params: Any = PARAMS) -> list[Batch]:
    async def read() -> list[Batch]:
        return [batch async for batch in engine.stream("hi", params)]

    return asyncio.run(read())


def test_the_first_batch_is_empty_and_the_rest_holds_what_was_ready_together() -> None:
    service = Service(Chunk(text="a", token_ids=(1,)), Chunk(text="b", token_ids=(2,)), LAST)
    accepted, answer = batches_of(server(service))
    assert accepted == Batch()
    assert answer.text == "ab!"
    assert answer.last is LAST
    assert service.cancelled == []


def test_tokens_with_log_probabilities_have_their_texts() -> None:
    logprob = TokenLogprob(token_id=3, logprob=-1.0, top=((3, -1.0), (8, -2.0)))
    service = Service(Chunk(text="!", token_ids=(3,), logprobs=(logprob,), finish_reason="length"))
    assert batches_of(server(service))[1].token_texts == {3: "<3>", 8: "<8>"}


@pytest.mark.parametrize("refusal", [RequestError("bad"), OverloadedError("full"), EngineStoppedError("gone")])
def test_what_is_refused_raises_before_the_first_batch(refusal: Exception) -> None:
    with pytest.raises(type(refusal), match=str(refusal)):
        batches_of(server(Service(refusal=refusal)))


def test_chunks_before_a_failure_are_told() -> None:
    engine = server(Service(Chunk(text="a", token_ids=(1,)), EngineStoppedError("the engine stopped")))

    async def read() -> str:
        text = ""
        with pytest.raises(EngineStoppedError):
            async for batch in engine.stream("hi", PARAMS):
                text += batch.text
        return text

    assert asyncio.run(read()) == "a"


def test_leaving_early_cancels_the_request() -> None:
    service = Service(Chunk(text="a", token_ids=(1,)))

    async def leave() -> None:
        stream = server(service).stream("hi", PARAMS)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert service.cancelled == [7]


def test_a_request_that_takes_too_long_is_ended() -> None:
    service = Service(Chunk(text="a", token_ids=(1,)))
    with pytest.raises(RequestTimeoutError, match=r"longer than 0\.01 s"):
        batches_of(server(service, timeout_s=0.01))
    assert service.cancelled == [7]


def test_options_of_python_handles_are_sampling_parameters() -> None:
    service = Service(LAST)
    batches_of(server(service), {"temperature": 0.0, "stop": "x"})
    assert service.params == SamplingParams(max_tokens=128, temperature=0.0, stop=("x",))


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(RequestError, match="no such option: temprature"):
        batches_of(server(Service(LAST)), {"temprature": 0.0})


def test_health_tells_a_dead_engine() -> None:
    service = Service()
    engine = server(service)
    engine.check_health()
    service.failure = RuntimeError("out of memory")
    with pytest.raises(EngineStoppedError, match="out of memory"):
        engine.check_health()


def test_an_engine_that_is_stuck_ends_its_requests_and_is_unwell_from_then_on() -> None:
    service = Service(Chunk(text="a", token_ids=(1,)))
    engine = server(service)

    async def read() -> None:
        stream = engine.stream("hi", PARAMS)
        assert [(await anext(stream)).text, (await anext(stream)).text] == ["", "a"]
        engine.check_health()
        service.stalled_s = 181.0
        for _ in range(2):
            with pytest.raises(EngineStoppedError, match=r"stuck for 181 s.*serving\.stuck_timeout_s"):
                engine.check_health()
        with pytest.raises(EngineStoppedError, match="stuck for 181 s"):
            await anext(stream)

    asyncio.run(read())


def test_draining_waits_for_those_under_way_and_refuses_the_others() -> None:
    service = Service(Chunk(text="a", token_ids=(1,)))
    engine = server(service)

    async def drain() -> None:
        stream = engine.stream("hi", PARAMS)
        await anext(stream)
        draining = asyncio.create_task(engine.drain(60.0))
        await asyncio.sleep(0)
        await anext(stream)
        assert service.drained and not draining.done()
        engine.check_health()
        with pytest.raises(DrainingError):
            await engine.card()
        service.on_chunk(LAST)
        assert [batch.text async for batch in stream] == ["!"]
        assert await draining == 0

    asyncio.run(drain())
    assert service.failure is None


def test_what_is_not_finished_in_time_ends_with_an_error() -> None:
    engine = server(Service(Chunk(text="a", token_ids=(1,))))

    async def drain() -> None:
        stream = engine.stream("hi", PARAMS)
        await anext(stream)
        await anext(stream)
        assert await engine.drain(0.0) == 1
        with pytest.raises(EngineStoppedError, match="was ended before the answer was complete"):
            await anext(stream)

    asyncio.run(drain())


def reconfigured(*user_configs: Any, started: bool = True, refusal: RaymoeError | None = None) -> Session:
    """The session of an engine to which Serve handed these, one after the other."""
    engine = server(Service())
    session: Any = engine._session
    session.refusal = refusal
    if started:
        engine.check_health()
    for user_config in user_configs:
        asyncio.run(engine.reconfigure(user_config))
    return session


def test_a_user_config_changes_what_it_names_and_gives_back_what_it_no_longer_names() -> None:
    session = reconfigured({"scheduling": {"alpha": 0.4}}, {"scheduling": {"prefetch": "gate"}}, {})
    settings = [(scheduling.alpha, scheduling.prefetch) for scheduling in session.scheduled]
    assert settings == [(0.4, "none"), (0.2, "gate"), (0.2, "none")]
    assert session.refused_settings is None


BAD_USER_CONFIGS = [
    ({"scheduling": {"alpha": -0.1}}, r"user_config: scheduling: alpha: is -0\.1; allowed is 0 to 1"),
    ({"scheduling": {"alfa": 0.1}}, "user_config: scheduling: alfa: no such field"),
    ({"scheduling": {"policy": "on_demand"}}, r"user_config: scheduling\.policy can't be changed while the model runs"),
    ({"schedulin": {}}, "user_config: schedulin: no such field"),
    ({"scheduling": 3}, "user_config: scheduling: Input should be a valid dict"),
    ([], "user_config: .*valid dictionary"),
]


@pytest.mark.parametrize(("user_config", "message"), BAD_USER_CONFIGS)
def test_a_wrong_user_config_fails_a_start_and_later_changes_nothing(user_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reconfigured(user_config, started=False)
    session = reconfigured(user_config)
    assert session.scheduled == []
    assert session.refused_settings is not None
    assert re.search(message, session.refused_settings)


def test_a_refusal_is_forgotten_once_settings_are_taken() -> None:
    assert reconfigured({"scheduling": {"alpha": 2}}, {"scheduling": {"alpha": 0.1}}).refused_settings is None


def test_workers_that_do_not_take_settings_do_not_end_the_engine() -> None:
    session = reconfigured({}, refusal=ExpertUnavailableError("the placement actor did not take the new settings"))
    assert session.refused_settings == "the placement actor did not take the new settings"


def test_the_session_is_closed_once() -> None:
    engine = server(Service())
    session: Any = engine._session
    engine.close()
    engine.__del__()
    assert session.closed == 1


def test_an_engine_that_never_started_closes_quietly() -> None:
    EngineServer.__new__(EngineServer).close()


class Response:
    """Stands in for a handle's response: yields its items, then waits for ever."""

    def __init__(self, *items: Batch | Exception, ends: bool = False) -> None:
        self.items = list(items)
        self.ends = ends
        self.cancelled = 0

    async def __anext__(self) -> Batch:
        if not self.items:
            if self.ends:
                raise StopAsyncIteration
            await asyncio.Event().wait()
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled += 1


def client(response: Response, timeout_s: float = 60.0) -> EngineClient:
    method = SimpleNamespace(remote=lambda *arguments: response)
    handle: Any = SimpleNamespace(stream=method, options=lambda **options: SimpleNamespace(stream=method))
    return EngineClient(handle, timeout_s)


def read_all(client: EngineClient) -> list[Batch]:
    async def read() -> list[Batch]:
        return [batch async for batch in client.stream("hi", PARAMS)]

    return asyncio.run(read())


def test_the_client_hides_the_first_batch_and_stops_at_the_last() -> None:
    response = Response(Batch(), Batch(chunks=(LAST,)))
    assert [batch.text for batch in read_all(client(response))] == ["!"]
    assert response.cancelled == 0


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with pytest.raises(EngineStoppedError, match="in the middle"):
        read_all(client(Response(Batch(), ends=True)))


def test_a_client_that_leaves_cancels_the_call() -> None:
    response = Response(Batch(), Batch(chunks=(Chunk(text="a", token_ids=(1,)),)))

    async def leave() -> None:
        stream = client(response).stream("hi", PARAMS)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert response.cancelled == 1


def test_the_lease_is_taken_when_the_engine_first_answers_and_given_back_at_the_end() -> None:
    events: list[str] = []
    answered = asyncio.Event()

    class Engine:
        async def card(self) -> dict[str, Any]:
            events.append("card")
            answered.set()
            return {}

    def take() -> Any:
        events.append("take")
        return SimpleNamespace(close=lambda: events.append("close"))

    async def live() -> None:
        async with holding(Engine(), take):  # type: ignore[arg-type]
            await answered.wait()
            await asyncio.sleep(0)

    asyncio.run(live())
    assert events == ["card", "take", "close"]


def test_no_lease_is_taken_while_the_engine_does_not_start() -> None:
    asked = asyncio.Event()

    class Engine:
        async def card(self) -> dict[str, Any]:
            asked.set()
            raise EngineStoppedError("starting")

    def take() -> Any:
        raise AssertionError("a failed start must not be held")

    async def live() -> None:
        async with holding(Engine(), take):  # type: ignore[arg-type]
            await asked.wait()
            await asyncio.sleep(0)

    asyncio.run(live())
