"""The way between engine and shadow: messages survive, nothing malformed gets further, nobody ever waits for the other.

The second half uses real ZeroMQ sockets on loopback, with CURVE, inside this process.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from predictor.forecast import LayerForecast
from raymoe.errors import FrameError
from raymoe.transport.frames import DTYPES, HEADER, Header, Kind, Limits, parse_header
from raymoe.transport.shadow import ShadowClient, ShadowServer
from raymoe.transport.shadow_messages import (
    MOST_DRAFTS,
    MOST_TOKENS,
    Begin,
    Draft,
    End,
    News,
    Plan,
    Token,
    pack_foretold,
    pack_from_shadow,
    pack_news,
    pack_plan,
    parse_draft,
    parse_foretold,
    parse_from_shadow,
    parse_news,
    parse_plan,
)
from raymoe.transport.sockets import Endpoint, KeyPair, client_socket
from raymoe.types import SamplingRecipe, StepId
from tests.frames import DAMAGED, wire

LIMITS = Limits(layers=8, rows=64, pairs=256, hidden=64, experts=32, changes=64, body_bytes=1 << 16)
WORKERS = 5
TIMEOUT_S = 30.0
UINT32, INT32 = (1 << 32) - 1, (1 << 31) - 1

sequences = st.integers(0, UINT32)
numbers = st.floats(allow_nan=False)
recipes = st.builds(
    SamplingRecipe,
    seed=st.integers(0, (1 << 64) - 1),
    top_k=st.integers(-(1 << 63), (1 << 63) - 1),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), numbers
    ),
)
begins = st.builds(
    Begin,
    sequence=sequences,
    tokens=st.lists(st.integers(0, INT32), min_size=1, max_size=20).map(tuple),
    recipe=st.none() | recipes,
    first=sequences,
    coming=st.integers(0, MOST_DRAFTS),
)
ends = st.builds(End, sequence=sequences)


@st.composite
def tokens(draw: st.DrawFn) -> Token:
    position = draw(st.integers(0, UINT32))
    step = StepId(sequence=draw(sequences), position=position)
    token, dtype = draw(st.integers(0, UINT32)), draw(st.sampled_from(DTYPES))
    drafts, coming = draw(st.integers(0, MOST_DRAFTS)), draw(st.integers(0, MOST_DRAFTS))
    plain = Token(step=step, token=token, dtype=dtype, drafts=drafts, coming=coming)
    if position == 0 or draw(st.booleans()):
        return plain
    start = draw(st.integers(0, position - 1))
    count = draw(st.integers(1, position - start))
    entries = draw(st.binary(min_size=1, max_size=64))
    return replace(plain, start=start, count=count, entries=entries)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    pairs = draw(st.lists(st.tuples(st.integers(0, LIMITS.experts - 1), st.integers(0, WORKERS - 1)), max_size=16))
    return Plan(
        step=StepId(sequence=draw(sequences), position=draw(sequences)),
        epoch=draw(sequences),
        layer=draw(st.integers(0, LIMITS.layers - 1)),
        experts_N=np.array([expert for expert, _ in pairs], dtype=np.int32),
        workers_N=np.array([worker for _, worker in pairs], dtype=np.int32),
    )


@st.composite
def forecasts(draw: st.DrawFn) -> LayerForecast:
    rows, experts = draw(st.integers(1, 3)), draw(st.integers(1, LIMITS.experts))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    top_k = draw(st.integers(0, experts))
    return LayerForecast(
        step=StepId(sequence=draw(sequences), position=draw(sequences)),
        epoch=draw(sequences),
        layer=draw(st.integers(0, LIMITS.layers - 1)),
        experts_TK=np.stack([random.permutation(experts)[:top_k] for _ in range(rows)]),
        scores_TE=random.random((rows, experts), dtype=np.float32),
    )


drafts = st.builds(
    Draft, step=st.builds(StepId, sequence=sequences, position=sequences), epoch=sequences, token=sequences
)


def plan(position: int = 3, epoch: int = 0) -> Plan:
    step = StepId(sequence=1, position=position)
    return Plan(
        step=step, epoch=epoch, layer=1, experts_N=np.array([7, 2], np.int32), workers_N=np.array([0, 4], np.int32)
    )


def shown(plan: Plan) -> tuple[Any, ...]:
    """A plan's fields, comparable."""
    return plan.step, plan.epoch, plan.layer, plan.experts_N.tolist(), plan.workers_N.tolist()


def read_news(frames: list[bytes]) -> News:
    return parse_news(parse_header(frames[0], LIMITS), frames[1:], LIMITS)


def read_foretold(frames: list[bytes]) -> LayerForecast:
    return parse_foretold(parse_header(frames[0], LIMITS), frames[1:], LIMITS)


def read_plan(frames: list[bytes]) -> Plan:
    return parse_plan(parse_header(frames[0], LIMITS), frames[1:], LIMITS, WORKERS)


# --- round trips ----------------------------------------------------------------------------------------


@given(begins | ends)
def test_beginnings_and_ends_survive_the_round_trip(news: News) -> None:
    assert read_news(wire(pack_news(news))) == news


@given(tokens())
def test_tokens_survive_the_round_trip_with_their_entries(token: Token) -> None:
    parsed = read_news(wire(pack_news(token)))
    assert isinstance(parsed, Token)
    assert (parsed.step, parsed.token, parsed.dtype) == (token.step, token.token, token.dtype)
    assert (parsed.drafts, parsed.coming) == (token.drafts, token.coming)
    assert (parsed.start, parsed.count, bytes(parsed.entries)) == (token.start, token.count, bytes(token.entries))


@given(plans())
def test_plans_survive_the_round_trip(plan: Plan) -> None:
    parsed = read_plan(wire(pack_plan(plan)))
    assert shown(parsed) == shown(plan)
    assert parsed.experts_N.dtype == parsed.workers_N.dtype == np.int32


@given(forecasts())
def test_forecasts_survive_the_round_trip_with_their_scores(forecast: LayerForecast) -> None:
    parsed = read_foretold(wire(pack_foretold(forecast)))
    assert (parsed.step, parsed.epoch, parsed.layer) == (forecast.step, forecast.epoch, forecast.layer)
    assert np.array_equal(parsed.experts_TK, forecast.experts_TK) and parsed.experts_TK.dtype == np.int64
    assert np.array_equal(parsed.scores_TE, forecast.scores_TE) and parsed.scores_TE.dtype == np.float32


def test_entries_are_sent_from_their_own_memory() -> None:
    entries = np.arange(8, dtype=np.uint8)
    step = StepId(sequence=1, position=4)
    message = pack_news(Token(step=step, token=1, start=3, count=1, entries=entries.data))
    assert np.frombuffer(message[1], dtype=np.uint8).ctypes.data == entries.ctypes.data


def test_indices_of_any_integer_type_become_int32() -> None:
    wide = Plan(
        step=StepId(sequence=1, position=3),
        epoch=0,
        layer=1,
        experts_N=np.array([7, 2], np.int64),
        workers_N=np.array([0, 4], np.int64),
    )
    assert shown(read_plan(wire(pack_plan(wide)))) == shown(plan())


@given(drafts | plans())
def test_what_the_shadow_tells_survives_the_round_trip(told: Draft | Plan) -> None:
    frames = wire(pack_from_shadow(told))
    parsed = parse_from_shadow(parse_header(frames[0], LIMITS), frames[1:], LIMITS, WORKERS)
    if isinstance(told, Draft):
        assert parsed == told
    else:
        assert isinstance(parsed, Plan) and shown(parsed) == shown(told)


# --- malformed frames -----------------------------------------------------------------------------------


def check_parsers(frames: list[bytes]) -> None:
    """All parsers either understand the message, within its bounds, or raise FrameError."""
    try:
        header = parse_header(frames[0], LIMITS) if frames else None
    except FrameError:
        return
    if header is None:
        return
    received = sum(map(len, frames))
    try:
        news = parse_news(header, frames[1:], LIMITS)
        assert not isinstance(news, Begin) or (4 * len(news.tokens) <= received and min(news.tokens) >= 0)
        assert not isinstance(news, Token) or news.start + news.count <= news.step.position
        assert not isinstance(news, Token) or len(news.entries) <= received
        assert not isinstance(news, Token) or max(news.drafts, news.coming) <= MOST_DRAFTS
    except FrameError:
        pass
    try:
        parsed = parse_plan(header, frames[1:], LIMITS, WORKERS)
        assert parsed.layer < LIMITS.layers and len(parsed.experts_N) == len(parsed.workers_N) <= LIMITS.experts
        assert all(0 <= expert < LIMITS.experts for expert in parsed.experts_N.tolist())
        assert all(0 <= worker < WORKERS for worker in parsed.workers_N.tolist())
    except FrameError:
        pass
    try:
        foretold = parse_foretold(header, frames[1:], LIMITS)
        assert foretold.layer < LIMITS.layers and foretold.scores_TE.shape[1] <= LIMITS.experts
        assert np.isfinite(foretold.scores_TE).all() and len(foretold.experts_TK) == len(foretold.scores_TE)
        assert all(0 <= e < foretold.scores_TE.shape[1] for e in foretold.experts_TK.reshape(-1).tolist())
    except FrameError:
        pass
    with suppress(FrameError):
        parse_draft(header, frames[1:], LIMITS)


messages = st.one_of(
    (begins | ends | tokens()).map(lambda news: wire(pack_news(news))),
    plans().map(lambda plan: wire(pack_plan(plan))),
    forecasts().map(lambda forecast: wire(pack_foretold(forecast))),
    drafts.map(lambda draft: wire(pack_from_shadow(draft))),
)


@pytest.mark.parametrize("damage", DAMAGED)
@given(data=st.data())
def test_damaged_messages_raise_nothing_but_frame_errors(damage: str, data: st.DataObject) -> None:
    check_parsers(data.draw(DAMAGED[damage](messages)))


@given(plans(), st.binary(max_size=64), st.integers(1, 2))
def test_a_damaged_plan_is_refused_or_stays_within_its_bounds(plan: Plan, noise: bytes, index: int) -> None:
    frames = wire(pack_plan(plan))
    frames[index] = noise[: len(frames[index])] + frames[index][len(noise) :]
    check_parsers(frames)


def header(kind: Kind, **fields: int) -> bytes:
    return Header(kind=kind, dtype=torch.float32, request=0, **fields).pack()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([header(Kind.BEGIN, b=0), b""], "a prompt of 0 tokens; allowed is 1 to 1,048,576"),
        ([header(Kind.BEGIN, b=MOST_TOKENS + 1)], "a prompt of 1,048,577 tokens; allowed is 1 to 1,048,576"),
        ([header(Kind.BEGIN, b=MOST_TOKENS)], "a body of 4,194,304 bytes, the limit is 65,536"),
        ([header(Kind.BEGIN, b=2), bytes(4), b""], r"buffers of \[4, 0\] bytes, expected \[8, 0\]"),
        ([header(Kind.BEGIN, b=1, c=1), bytes(4), b""], r"buffers of \[4, 0\] bytes, expected \[4, 64\]"),
        ([header(Kind.BEGIN, b=1), b"\xff" * 4, b""], "token ids can't be negative"),
        ([header(Kind.END), b"x"], r"buffers of \[1\] bytes, expected \[\]"),
        ([header(Kind.PLAN)], "PLAN does not belong on the shadow's socket"),
        ([header(Kind.PING)], "PING does not belong on the shadow's socket"),
        ([header(Kind.TOKEN, b=4, e=1)], "keys and values of 1 positions from 0 on, before position 4"),
        ([header(Kind.TOKEN, b=4, big=8), bytes(8)], "keys and values of 0 positions from 0 on, before position 4"),
        ([header(Kind.TOKEN, b=4, d=3, e=2, big=8), bytes(8)], "keys and values of 2 positions from 3 on, before"),
        ([header(Kind.TOKEN, b=4, d=3, e=1, big=8), bytes(7)], r"buffers of \[7\] bytes, expected \[8\]"),
        ([header(Kind.TOKEN, b=4, d=3, e=1, big=1 << 40), b""], "the limit is 65,536"),
        ([header(Kind.TOKEN, b=4), bytes(8)], r"buffers of \[8\] bytes, expected \[\]"),
        ([header(Kind.TOKEN, b=4, rows=64, pairs=65)], "64 drafts now and 65 to come; allowed are 64"),
        ([header(Kind.BEGIN, b=1, e=65), bytes(4), b""], "65 drafts now and 0 to come; allowed are 64"),
        ([header(Kind.DRAFT)], "DRAFT does not belong on the shadow's socket"),
    ],
)
def test_what_is_wrong_with_news_is_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read_news(frames)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([header(Kind.TOKEN)], "TOKEN is no plan"),
        ([header(Kind.PLAN, layer=8)], "a plan of 0 experts for layer 8"),
        ([header(Kind.PLAN, d=33), bytes(132), bytes(132)], "a plan of 33 experts for layer 0"),
        ([header(Kind.PLAN, d=2), bytes(8), bytes(4)], r"buffers of \[8, 4\] bytes, expected \[8, 8\]"),
        ([header(Kind.PLAN, d=1), b"\xff" * 4, bytes(4)], "experts lie within 0 and 31, its workers within 0 and 4"),
        ([header(Kind.PLAN, d=1), b"\x20\0\0\0", bytes(4)], "experts lie within 0 and 31"),
        ([header(Kind.PLAN, d=1), bytes(4), b"\x05\0\0\0"], "its workers within 0 and 4"),
        ([header(Kind.PLAN, d=1), bytes(4), b"\xff" * 4], "its workers within 0 and 4"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read_plan(frames)


NAN = np.full(2, np.nan, np.float32).tobytes()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([header(Kind.PLAN)], "PLAN is no forecast"),
        ([header(Kind.FORETOLD, d=1, e=2)], "a forecast of 1 of 2 experts in 0 rows for layer 0"),
        ([header(Kind.FORETOLD, layer=8, rows=1, d=1, e=2)], "a forecast of 1 of 2 experts in 1 rows for layer 8"),
        ([header(Kind.FORETOLD, rows=1, d=3, e=2)], "a forecast of 3 of 2 experts in 1 rows for layer 0"),
        ([header(Kind.FORETOLD, rows=1, d=1, e=33)], "a forecast of 1 of 33 experts in 1 rows for layer 0"),
        ([header(Kind.FORETOLD, rows=1, d=1, e=2), bytes(4)], r"buffers of \[4\] bytes, expected \[4, 8\]"),
        ([header(Kind.FORETOLD, rows=1, d=1, e=2), b"\2\0\0\0", bytes(8)], "experts lie within 0 and 1"),
        ([header(Kind.FORETOLD, rows=1, d=1, e=2), bytes(4), NAN], "scores must be finite"),
    ],
)
def test_what_is_wrong_with_a_forecast_is_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        read_foretold(frames)


@pytest.mark.parametrize(
    ("frames", "message"),
    [([header(Kind.PLAN)], "PLAN is no draft"), ([header(Kind.DRAFT), b"x"], r"buffers of \[1\] bytes, expected \[\]")],
)
def test_what_is_wrong_with_a_draft_is_named(frames: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        parse_draft(parse_header(frames[0], LIMITS), frames[1:], LIMITS)


# --- sockets --------------------------------------------------------------------------------------------


@contextmanager
def server_for(*clients: bytes) -> Iterator[ShadowServer]:
    server = ShadowServer("127.0.0.1", LIMITS)
    server.clients.keys.update(clients)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def client_of(endpoint: Endpoint | None, keys: KeyPair) -> Iterator[ShadowClient]:
    client = ShadowClient(endpoint, keys, LIMITS, WORKERS)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def keys() -> KeyPair:
    return KeyPair.create()


@pytest.fixture
def server(keys: KeyPair) -> Iterator[ShadowServer]:
    with server_for(keys.public) as server:
        yield server


@pytest.fixture
def client(server: ShadowServer, keys: KeyPair) -> Iterator[ShadowClient]:
    with client_of(server.endpoint, keys) as client:
        yield client


def heard_until(end: End, server: ShadowServer) -> list[News]:
    """All that comes before an end."""
    heard: list[News] = []
    while (news := server.receive(TIMEOUT_S)) is not None and news != end:
        heard.append(news)
    assert news == end, "it did not come in time"
    return heard


def plan_from(client: ShadowClient) -> Plan:
    """The next plan that comes."""
    received: list[Plan] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not received and time.monotonic() < deadline:
        client.receive(received.append)
        time.sleep(1e-3)
    assert len(received) == 1
    return received[0]


def nobody_there(keys: KeyPair) -> Endpoint:
    """Where a shadow was, and is no more."""
    with server_for(keys.public) as server:
        return server.endpoint


def test_news_go_there_in_order_and_plans_come_back(server: ShadowServer, client: ShadowClient) -> None:
    news = [
        Begin(sequence=1, tokens=(5, 6)),
        Token(step=StepId(sequence=1, position=2), token=7),
        Token(step=StepId(sequence=1, position=3), token=8, start=2, count=1, entries=b"12345678"),
    ]
    for item in news:
        client.tell(item)
    client.tell(End(sequence=1))
    begun, plain, with_entries = heard_until(End(sequence=1), server)
    assert [begun, plain] == news[:2]
    assert isinstance(with_entries, Token) and bytes(with_entries.entries) == b"12345678"
    server.send(plan())
    assert shown(plan_from(client)) == shown(plan())
    assert client.bytes_sent == 4 * HEADER.size + 2 * 4 + 8, "headers, two tokens of the prompt, and entries"


def test_forecasts_come_back_too(server: ShadowServer, client: ShadowClient) -> None:
    client.tell(End(sequence=1))
    assert server.receive(TIMEOUT_S) == End(sequence=1)
    scores_TE = np.array([[0.25, 0.75]], dtype=np.float32)
    step = StepId(sequence=1, position=3)
    server.send(LayerForecast(step=step, epoch=2, layer=1, experts_TK=np.array([[1]]), scores_TE=scores_TE))
    received: Any = plan_from(client)
    assert isinstance(received, LayerForecast) and (received.step, received.epoch, received.layer) == (step, 2, 1)
    assert (received.experts_TK.tolist(), received.scores_TE.tolist()) == ([[1]], [[0.25, 0.75]])


def test_drafts_and_plans_come_in_order(server: ShadowServer, client: ShadowClient) -> None:
    client.tell(End(sequence=1))
    assert server.receive(TIMEOUT_S) == End(sequence=1)
    guessed = [Draft(step=StepId(sequence=1, position=p), epoch=0, token=p) for p in (3, 4)]
    for told in (guessed[0], plan(), guessed[1]):
        server.send(told)
    received: list[Any] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(received) < 3 and time.monotonic() < deadline:
        client.receive(received.append)
        time.sleep(1e-3)
    assert [received[0], received[2]] == guessed and shown(received[1]) == shown(plan())


def test_nothing_to_hear_is_none_at_once(server: ShadowServer, client: ShadowClient) -> None:
    assert server.receive(0.0) is None
    client.receive(lambda plan: pytest.fail("there is none"))


def test_a_shadow_that_nobody_has_spoken_to_sends_nowhere(server: ShadowServer) -> None:
    server.send(plan())
    assert server.dropped == 0


def test_a_wrongly_keyed_client_is_not_heard(server: ShadowServer, client: ShadowClient) -> None:
    with client_of(server.endpoint, KeyPair.create()) as stranger:
        for _ in range(3):
            stranger.tell(Begin(sequence=9, tokens=(1,)))
        client.tell(End(sequence=1))
        assert heard_until(End(sequence=1), server) == []
        deadline = time.monotonic() + TIMEOUT_S
        while not server.refused and time.monotonic() < deadline:
            assert server.receive(0.01) is None
        stranger.receive(lambda plan: pytest.fail("it is not admitted"))
    assert server.refused > 0


def test_a_client_that_expects_another_key_is_not_heard(server: ShadowServer, keys: KeyPair) -> None:
    endpoint = Endpoint(data=server.endpoint.data, control="", public_key=KeyPair.create().public)
    with client_of(endpoint, keys) as misled:
        misled.tell(Begin(sequence=9, tokens=(1,)))
        assert server.receive(0.2) is None


def test_a_client_is_admitted_once_its_key_is_known(server: ShadowServer) -> None:
    keys = KeyPair.create()
    server.clients.keys.add(keys.public)
    with client_of(server.endpoint, keys) as newcomer:
        newcomer.tell(End(sequence=4))
        assert server.receive(TIMEOUT_S) == End(sequence=4)


def test_malformed_messages_are_dropped_and_counted(server: ShadowServer, keys: KeyPair) -> None:
    malformed = [[b""], [b"GET / HTTP/1.1"], [bytes(HEADER.size)], [header(Kind.PLAN)], [header(Kind.BEGIN, b=1)]]
    with zmq.Context() as context:
        socket = client_socket(context, server.endpoint.data, server.endpoint.public_key, keys, LIMITS)
        for frames in malformed:
            socket.send_multipart(frames)
        socket.send_multipart(wire(pack_news(End(sequence=1))))
        heard = None
        while heard is None:
            heard = server.receive(TIMEOUT_S)
        socket.close()
    assert heard == End(sequence=1)
    assert server.dropped == len(malformed)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=80), min_size=1, max_size=4))
def test_any_bytes_leave_the_shadow_listening(server: ShadowServer, keys: KeyPair, frames: list[bytes]) -> None:
    with zmq.Context() as context:
        socket = client_socket(context, server.endpoint.data, server.endpoint.public_key, keys, LIMITS)
        socket.send_multipart(frames)
        socket.send_multipart(wire(pack_news(End(sequence=5))))
        heard_until(End(sequence=5), server)
        socket.close()


def test_malformed_plans_are_dropped_and_counted(server: ShadowServer, client: ShadowClient) -> None:
    client.tell(End(sequence=1))
    assert server.receive(TIMEOUT_S) == End(sequence=1)
    peer = server._peer
    for frames in ([b""], [b"nonsense"], [header(Kind.TOKEN)], [header(Kind.PLAN, d=1), b"\xff" * 4, bytes(4)]):
        server._socket.send_multipart([peer, *frames])
    server.send(plan())
    assert shown(plan_from(client)) == shown(plan())
    assert client.dropped == 4


# --- a shadow that moves, or is gone --------------------------------------------------------------------


def test_a_client_follows_the_shadow_to_another_endpoint(
    server: ShadowServer, client: ShadowClient, keys: KeyPair
) -> None:
    client.tell(End(sequence=1))
    assert server.receive(TIMEOUT_S) == End(sequence=1)
    assert client.moves == 1
    with server_for(keys.public) as second:
        client.move(second.endpoint)
        client.tell(End(sequence=2))
        assert second.receive(TIMEOUT_S) == End(sequence=2)
        assert client.moves == 2
        second.send(plan())
        assert shown(plan_from(client)) == shown(plan())
        assert server.receive(0.0) is None


def test_moves_are_noticed_while_plans_are_looked_for(client: ShadowClient, keys: KeyPair) -> None:
    with server_for(keys.public) as second:
        client.move(second.endpoint)
        client.receive(lambda plan: None)
        assert client.moves == 2


def test_the_same_place_is_no_move(server: ShadowServer, client: ShadowClient) -> None:
    client.move(server.endpoint)
    client.tell(End(sequence=1))
    assert server.receive(TIMEOUT_S) == End(sequence=1)
    assert client.moves == 1


def test_a_shadow_that_comes_back_to_its_place_counts_as_moved(server: ShadowServer, client: ShadowClient) -> None:
    client.move(None)
    client.tell(End(sequence=1))
    client.move(server.endpoint)
    client.tell(End(sequence=2))
    assert server.receive(TIMEOUT_S) == End(sequence=2)
    assert client.moves == 2


def test_without_a_shadow_news_go_nowhere(client: ShadowClient, server: ShadowServer, keys: KeyPair) -> None:
    client.move(None)
    client.tell(Begin(sequence=1, tokens=(1,)))
    client.receive(lambda plan: pytest.fail("nobody plans"))
    assert client.bytes_sent == 0 and server.receive(0.05) is None
    with client_of(None, keys) as alone:
        alone.tell(Begin(sequence=1, tokens=(1,)))
        alone.receive(lambda plan: pytest.fail("nobody plans"))
        assert alone.moves == 0


@pytest.mark.parametrize("act", [ShadowClient.tell, lambda client, news: client.receive(lambda plan: None)])
def test_a_dead_shadow_costs_no_time(act: Callable[[ShadowClient, News], None], keys: KeyPair) -> None:
    news = Token(step=StepId(sequence=1, position=4), token=1, start=3, count=1, entries=bytes(1024))
    with client_of(nobody_there(keys), keys) as client:
        start = time.monotonic()
        for _ in range(1000):
            act(client, news)
        assert time.monotonic() - start < TIMEOUT_S / 10
        assert client.dropped > 0 or act is not ShadowClient.tell


def test_a_shadow_that_does_not_listen_costs_no_time(server: ShadowServer, client: ShadowClient) -> None:
    news = Token(step=StepId(sequence=1, position=4), token=1, start=3, count=1, entries=bytes(LIMITS.body_bytes))
    for _ in range(1000):
        client.tell(news)
    assert client.dropped > 0
    assert isinstance(server.receive(TIMEOUT_S), Token), "what was not dropped arrives"


def test_an_engine_that_is_gone_costs_the_shadow_nothing(server: ShadowServer, keys: KeyPair) -> None:
    with client_of(server.endpoint, keys) as leaving:
        leaving.tell(End(sequence=1))
        assert server.receive(TIMEOUT_S) == End(sequence=1)
    for _ in range(1000):
        server.send(plan())
    with client_of(server.endpoint, keys) as following:
        following.tell(End(sequence=2))
        assert server.receive(TIMEOUT_S) == End(sequence=2)
        server.send(plan(position=9))
        assert plan_from(following).step.position == 9


def test_plans_go_to_the_engine_that_spoke_last(server: ShadowServer, client: ShadowClient, keys: KeyPair) -> None:
    with client_of(server.endpoint, keys) as second:
        client.tell(End(sequence=1))
        assert server.receive(TIMEOUT_S) == End(sequence=1)
        second.tell(End(sequence=2))
        assert server.receive(TIMEOUT_S) == End(sequence=2)
        server.send(plan(position=5))
        assert plan_from(second).step.position == 5
        client.receive(lambda plan: pytest.fail("it is not the one that spoke last"))
