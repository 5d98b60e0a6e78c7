"""The data plane: frames survive the round trip, nothing malformed gets further than FrameError, servers live on.

The second half uses real ZeroMQ sockets on loopback, with CURVE, inside this process.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.errors import ExpertUnavailableError, FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, expert_id, layer_and_expert
from raymoe.placement.state import ClusterState
from raymoe.transport.client import WorkerClient
from raymoe.transport.door import AllowedClients, Door
from raymoe.transport.frames import (
    DTYPES,
    HEADER,
    MAX_TEXT_BYTES,
    TIMES,
    VERSION,
    Header,
    Kind,
    Limits,
    pack_answer,
    pack_call,
    pack_experts,
    pack_forecast,
    pack_forget,
    pack_order,
    pack_text,
    parse_answer,
    parse_call,
    parse_experts,
    parse_forecast,
    parse_forget,
    parse_header,
    parse_order,
    parse_text,
)
from raymoe.transport.placement import OnForecast, OrderDesk, PlacementClient, PlacementServer
from raymoe.transport.server import WorkerServer
from raymoe.transport.sockets import Endpoint, KeyPair, Redial, client_socket, server_socket
from raymoe.types import DeviceName, ExpertKey, StepId
from tests.asking import gather
from tests.frames import DAMAGED, LIMITS, wire
from tests.free_ports import free_ports

EDGE, OTHER = DeviceName("edge"), DeviceName("other")
TIMEOUT_S = 30.0

steps = st.builds(StepId, sequence=st.integers(0, (1 << 64) - 1), position=st.integers(0, (1 << 32) - 1))


expert_ids = st.builds(expert_id, st.integers(0, LIMITS.layers - 1), st.integers(0, LIMITS.experts - 1))


@st.composite
def calls(draw: st.DrawFn) -> ExpertCall:
    rows, hidden = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    pairs = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    experts = draw(st.lists(st.integers(0, LIMITS.experts - 1), min_size=pairs, max_size=pairs))
    of_rows = draw(st.lists(st.integers(0, rows - 1), min_size=pairs, max_size=pairs))
    scores = draw(st.none() | st.lists(st.floats(0, 1, width=32), min_size=1, max_size=LIMITS.experts))
    return ExpertCall(
        layer=draw(st.integers(0, LIMITS.layers)),
        hidden_RH=torch.randn(rows, hidden, generator=generator).to(draw(st.sampled_from(DTYPES))),
        experts_P=np.array(experts, dtype=np.int32),
        rows_P=np.array(of_rows, dtype=np.int32),
        scores_E=None if scores is None else np.array(scores, dtype=np.float32),
        step=draw(st.none() | steps),
    )


@st.composite
def answers(draw: st.DrawFn) -> ExpertAnswer:
    pairs, hidden = draw(st.integers(1, 24)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    identifiers = st.lists(expert_ids, max_size=LIMITS.changes // 2).map(tuple)
    return ExpertAnswer(
        output_PH=torch.randn(pairs, hidden, generator=generator).to(draw(st.sampled_from(DTYPES))),
        hits=draw(st.integers(0, 1 << 20)),
        misses=draw(st.integers(0, 1 << 20)),
        hosted=draw(st.integers(0, 1 << 20)),
        loads=draw(st.integers(0, 1 << 20)),
        bytes_loaded=draw(st.integers(0, 1 << 60)),
        loaded=draw(identifiers),
        evicted=draw(identifiers),
        load_s=draw(st.none() | st.floats(2**-20, 128, width=32)),
        compute_s=draw(st.floats(0, 128, width=32)),
    )


@st.composite
def forecasts(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    named = draw(st.lists(st.tuples(st.integers(0, LIMITS.experts - 1), st.floats(0, 1, width=32)), max_size=16))
    experts, worths = [expert for expert, _ in named], [worth for _, worth in named]
    return draw(st.integers(0, LIMITS.layers - 1)), np.array(experts, np.int64), np.array(worths, np.float32)


@st.composite
def load_orders(draw: st.DrawFn) -> LoadOrder:
    experts = draw(st.lists(st.integers(0, LIMITS.experts - 1), max_size=16))
    return LoadOrder(
        step=draw(steps),
        epoch=draw(st.integers(0, (1 << 32) - 1)),
        layer=draw(st.integers(0, LIMITS.layers - 1)),
        experts=np.array(experts, dtype=np.int32),
    )


# --- round trips ----------------------------------------------------------------------------------------


@given(st.sampled_from(Kind), st.sampled_from(DTYPES), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_headers_survive_the_round_trip(kind: Kind, dtype: torch.dtype, big: int, number: int) -> None:
    header = Header(
        kind=kind, dtype=dtype, request=big, layer=7, rows=6, pairs=5, hidden=4, a=number, b=3, c=2, d=1, e=8, f=9,
        big=big,
    )  # fmt: skip
    assert len(header.pack()) == HEADER.size == 64
    assert parse_header(header.pack(), LIMITS) == header


@given(calls(), st.integers(0, (1 << 64) - 1))
def test_calls_survive_the_round_trip(call: ExpertCall, request_number: int) -> None:
    first, *body = wire(pack_call(request_number, call))
    header = parse_header(first, LIMITS)
    parsed = parse_call(header, body, LIMITS)
    assert (header.kind, header.request, parsed.layer) == (Kind.CALL, request_number, call.layer)
    assert parsed.step == call.step
    assert parsed.hidden_RH.dtype == call.hidden_RH.dtype
    assert torch.equal(parsed.hidden_RH, call.hidden_RH)
    assert parsed.experts_P.tolist() == call.experts_P.tolist()
    assert parsed.rows_P.tolist() == call.rows_P.tolist()
    if call.scores_E is None:
        assert parsed.scores_E is None
    else:
        assert parsed.scores_E is not None and parsed.scores_E.tolist() == call.scores_E.tolist()


@given(answers(), st.integers(0, (1 << 64) - 1))
def test_answers_survive_the_round_trip(answer: ExpertAnswer, request_number: int) -> None:
    first, *body = wire(pack_answer(request_number, answer))
    header = parse_header(first, LIMITS)
    parsed = parse_answer(header, body, LIMITS)
    assert (header.kind, header.request) == (Kind.ANSWER, request_number)
    assert torch.equal(parsed.output_PH, answer.output_PH)
    for name in ("hits", "misses", "hosted", "loads", "bytes_loaded", "loaded", "evicted"):
        assert getattr(parsed, name) == getattr(answer, name)
    assert (parsed.load_s, parsed.compute_s) == (answer.load_s, answer.compute_s)


@given(st.text())
def test_texts_survive_the_round_trip_up_to_their_limit(text: str) -> None:
    first, *body = wire(pack_text(Kind.ERROR, 3, text))
    assert parse_text(parse_header(first, LIMITS), body, LIMITS) == text


def test_long_texts_are_cut() -> None:
    first, *body = wire(pack_text(Kind.ERROR, 3, "x" * 10_000))
    assert parse_text(parse_header(first, LIMITS), body, LIMITS) == "x" * MAX_TEXT_BYTES


@given(st.lists(st.tuples(expert_ids, st.floats(0, 1, width=32)), max_size=LIMITS.changes), st.text())
def test_expert_lists_survive_the_round_trip(items: list[tuple[int, float]], tag: str) -> None:
    identifiers, scores = [identifier for identifier, _ in items], [score for _, score in items]
    first, *body = wire(pack_experts(Kind.PREFETCH, 1, identifiers, scores, tag))
    assert parse_experts(parse_header(first, LIMITS), body, LIMITS) == (identifiers, scores, tag)


@given(forecasts())
def test_forecasts_survive_the_round_trip(forecast: tuple[int, np.ndarray, np.ndarray]) -> None:
    first, *body = wire(pack_forecast(*forecast))
    header = parse_header(first, LIMITS)
    assert header.kind is Kind.FORECAST
    layer, experts, worths = parse_forecast(header, body, LIMITS)
    assert (layer, experts.tolist(), worths.tolist()) == (forecast[0], forecast[1].tolist(), forecast[2].tolist())


@given(load_orders())
def test_load_orders_survive_the_round_trip(order: LoadOrder) -> None:
    first, *body = wire(pack_order(order))
    header = parse_header(first, LIMITS)
    parsed = parse_order(header, body, LIMITS)
    assert header.kind is Kind.ORDER
    assert (parsed.step, parsed.epoch, parsed.layer) == (order.step, order.epoch, order.layer)
    assert parsed.experts.dtype == np.int32 and parsed.experts.tolist() == order.experts.tolist()


@given(st.integers(0, (1 << 64) - 1))
def test_ended_sequences_survive_the_round_trip(sequence: int) -> None:
    first, *body = wire(pack_forget(sequence))
    header = parse_header(first, LIMITS)
    assert (header.kind, parse_forget(header, body, LIMITS)) == (Kind.FORGET, sequence)


@given(st.integers(0, 1 << 14), st.integers(0, (1 << 16) - 1))
def test_expert_ids_are_reversible(layer: int, expert: int) -> None:
    assert layer_and_expert(expert_id(layer, expert)) == (layer, expert)


def test_calls_are_sent_from_the_tensors_own_memory() -> None:
    hidden = torch.randn(3, 8)
    sent = np.frombuffer(pack_call(1, some_call(hidden))[1], dtype=np.float32)
    assert sent.ctypes.data == hidden.data_ptr()


def some_call(hidden: torch.Tensor | None = None, layer: int = 0) -> ExpertCall:
    hidden = torch.arange(24, dtype=torch.float32).view(3, 8) if hidden is None else hidden
    return ExpertCall(
        layer=layer,
        hidden_RH=hidden,
        experts_P=np.array([1, 1, 2], dtype=np.int32),
        rows_P=np.array([0, 2, 1], dtype=np.int32),
    )


# --- connections made anew ------------------------------------------------------------------------------


def test_a_socket_that_takes_nothing_is_connected_anew_at_most_once_a_second() -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        now_s = [10.0]
        calls: list[tuple[str, float]] = []
        watched = Watched(socket, lambda what: calls.append((what, now_s[0])))
        redial = Redial(clock=lambda: now_s[0])
        for now_s[0] in (10.0, 10.5, 10.99, 11.01, 11.5):
            redial.refused(watched, "tcp://127.0.0.1:1")  # type: ignore[arg-type]
    assert calls == [("disconnect", 10.0), ("connect", 10.0), ("disconnect", 11.01), ("connect", 11.01)]


class Watched:
    """A socket that tells what is done with its connection."""

    def __init__(self, socket: zmq.Socket, tell: Callable[[str], None]) -> None:
        self._socket = socket
        self._tell = tell

    def connect(self, endpoint: str) -> None:
        self._tell("connect")
        self._socket.connect(endpoint)

    def disconnect(self, endpoint: str) -> None:
        self._tell("disconnect")
        self._socket.disconnect(endpoint)


# --- malformed frames -----------------------------------------------------------------------------------

PARSERS: tuple[Callable[..., Any], ...] = (
    parse_call, parse_answer, parse_text, parse_experts, parse_forecast, parse_order, parse_forget,
)  # fmt: skip


def check_parsers(frames: list[bytes]) -> None:
    """Every parser either understands the message or raises FrameError; nothing is larger than what came."""
    try:
        header = parse_header(frames[0], LIMITS) if frames else None
    except FrameError:
        return
    if header is None:
        return
    received = sum(map(len, frames))
    for parse in PARSERS:
        try:
            parsed = parse(header, frames[1:], LIMITS)
        except FrameError:
            continue
        for name in ("hidden_RH", "output_PH"):
            tensor = getattr(parsed, name, None)
            assert tensor is None or tensor.nbytes <= received


messages = st.one_of(
    calls().map(lambda call: wire(pack_call(1, call))),
    answers().map(lambda answer: wire(pack_answer(1, answer))),
    st.text(max_size=50).map(lambda text: wire(pack_text(Kind.ERROR, 1, text))),
    st.lists(expert_ids, max_size=9).map(lambda ids: wire(pack_experts(Kind.PREFETCH, 1, ids, [0.5] * len(ids)))),
    forecasts().map(lambda forecast: wire(pack_forecast(*forecast))),
    load_orders().map(lambda order: wire(pack_order(order))),
    st.integers(0, 99).map(lambda sequence: wire(pack_forget(sequence))),
)


@pytest.mark.parametrize("damage", DAMAGED)
@given(data=st.data())
def test_damaged_messages_raise_nothing_but_frame_errors(damage: str, data: st.DataObject) -> None:
    check_parsers(data.draw(DAMAGED[damage](messages)))


@given(calls(), st.binary(max_size=64), st.integers(1, 3))
def test_a_damaged_body_is_refused_or_stays_within_its_bounds(call: ExpertCall, noise: bytes, index: int) -> None:
    first, *body = wire(pack_call(1, call))
    index = min(index, len(body) - 1)
    body[index] = noise[: len(body[index])] + body[index][len(noise) :]
    try:
        parsed = parse_call(parse_header(first, LIMITS), body, LIMITS)
    except FrameError:
        return
    assert parsed.experts_P.min() >= 0 and parsed.experts_P.max() < LIMITS.experts
    assert parsed.rows_P.min() >= 0 and parsed.rows_P.max() < len(parsed.hidden_RH)


def header_with(**fields: int) -> bytes:
    values = {
        "magic": b"RMOE", "version": VERSION, "kind": 1, "dtype": 0, "reserved": 0, "request": 1, "layer": 0, "rows": 1,
        "pairs": 1, "hidden": 1, "a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "f": 0, "big": 0,
    } | fields  # fmt: skip
    return HEADER.pack(*values.values())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "a header has 64 bytes, this frame has 0"),
        (b"x" * 55, "a header has 64 bytes, this frame has 55"),
        (header_with(magic=b"HTTP"), "wrong magic"),
        (header_with(version=9), "frame version 9, expected 4: all nodes must run the same raymoe release"),
        (header_with(kind=0), "unknown message kind 0"),
        (header_with(kind=200), "unknown message kind 200"),
        (header_with(dtype=3), "unknown dtype code 3"),
        (header_with(layer=9), "layer is 9, the limit is 8"),
        (header_with(rows=65), "rows is 65, the limit is 64"),
        (header_with(pairs=(1 << 32) - 1), "pairs is 4,294,967,295, the limit is 256"),
        (header_with(hidden=65), "hidden is 65, the limit is 64"),
    ],
)
def test_what_is_wrong_with_a_header_is_named(header: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        parse_header(header, LIMITS)


@pytest.mark.parametrize(
    ("fields", "body", "message"),
    [
        ({"rows": 0}, [b"", bytes(4), bytes(4)], "at least one row"),
        ({"pairs": 0}, [bytes(4), b"", b""], "at least one row, one pair"),
        ({"a": 33}, [bytes(4), bytes(4), bytes(4), bytes(132)], "33 scores, the limit is 32"),
        ({"c": 2}, [bytes(4), bytes(4), bytes(4)], "a call belongs to one step or none, not to 2"),
        ({}, [bytes(4), bytes(4)], r"buffers of \[4, 4\] bytes, expected \[4, 4, 4\]"),
        ({}, [bytes(8), bytes(4), bytes(4)], r"buffers of \[8, 4, 4\] bytes, expected"),
        ({}, [bytes(4), (32).to_bytes(4, "little"), bytes(4)], "experts of a call must lie within 0 and 31"),
        ({}, [bytes(4), b"\xff" * 4, bytes(4)], "experts of a call must lie within 0 and 31"),
        ({}, [bytes(4), bytes(4), (1).to_bytes(4, "little")], "row indices must lie within 0 and 0"),
        ({}, [bytes(4), bytes(4), b"\xff" * 4], "row indices must lie within 0 and 0"),
    ],
)
def test_what_is_wrong_with_a_call_is_named(fields: dict[str, int], body: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        parse_call(parse_header(header_with(**fields), LIMITS), body, LIMITS)


def test_a_body_beyond_the_limit_is_refused_before_it_is_looked_at() -> None:
    limits = Limits(body_bytes=100)
    header = Header(kind=Kind.ANSWER, dtype=torch.float32, request=1, pairs=100, hidden=100)
    with pytest.raises(FrameError, match="a body of 40,008 bytes, the limit is 100"):
        parse_answer(header, [], limits)


def test_too_many_residency_changes_are_refused() -> None:
    header = parse_header(header_with(kind=2, c=40, d=40), LIMITS)
    with pytest.raises(FrameError, match="80 residency changes, the limit is 64"):
        parse_answer(header, [bytes(4), bytes(320)], LIMITS)


@pytest.mark.parametrize("load_s", [-1.0, float("nan"), float("inf")])
def test_a_load_that_takes_no_time_at_all_is_refused(load_s: float) -> None:
    header = parse_header(header_with(kind=2, c=1), LIMITS)
    with pytest.raises(FrameError, match="which are no times"):
        parse_answer(header, [bytes(4), TIMES.pack(load_s, 0.0) + bytes(4)], LIMITS)


@pytest.mark.parametrize(
    ("fields", "body", "message"),
    [
        ({"layer": 8}, [], "a forecast for layer 8, but there are 8"),
        ({"a": 33}, [bytes(132), bytes(132)], "a forecast of 33 experts, the limit is 32"),
        ({"a": 1}, [bytes(4)], r"buffers of \[4\] bytes, expected \[4, 4\]"),
        ({"a": 1}, [b"\xff" * 4, bytes(4)], "experts of a forecast must lie within 0 and 31"),
        ({"a": 1}, [bytes(4), np.array([np.nan], dtype=np.float32).tobytes()], "must be worth a finite number"),
    ],
)
def test_what_is_wrong_with_a_forecast_is_named(fields: dict[str, int], body: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        parse_forecast(parse_header(header_with(kind=8, **fields), LIMITS), body, LIMITS)


@pytest.mark.parametrize(
    ("fields", "body", "message"),
    [
        ({"layer": 8}, [], "an order for layer 8, but there are 8"),
        ({"a": 33}, [bytes(132)], "an order of 33 experts, the limit is 32"),
        ({"a": 2}, [bytes(4)], r"buffers of \[4\] bytes, expected \[8\]"),
        ({"a": 1}, [b"\xff" * 4], "experts of an order must lie within 0 and 31"),
        ({"a": 1}, [(32).to_bytes(4, "little")], "experts of an order must lie within 0 and 31"),
    ],
)
def test_what_is_wrong_with_an_order_is_named(fields: dict[str, int], body: list[bytes], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        parse_order(parse_header(header_with(kind=9, **fields), LIMITS), body, LIMITS)


@given(load_orders(), st.binary(max_size=64))
def test_a_damaged_order_is_refused_or_stays_within_its_bounds(order: LoadOrder, noise: bytes) -> None:
    first, body = wire(pack_order(order))
    try:
        parsed = parse_order(parse_header(first, LIMITS), [noise[: len(body)] + body[len(noise) :]], LIMITS)
    except FrameError:
        return
    assert len(parsed.experts) == len(order.experts)
    assert all(0 <= expert < LIMITS.experts for expert in parsed.experts.tolist())


@pytest.mark.parametrize("identifier", [-1, expert_id(8, 0), expert_id(0, 32), (1 << 31) - 1])
def test_expert_ids_of_what_the_model_lacks_are_refused(identifier: int) -> None:
    limits = "expert ids are of 8 layers with at most 32 experts"
    named = np.array([identifier], dtype=np.int32).tobytes()
    with pytest.raises(FrameError, match=limits):
        parse_experts(parse_header(header_with(kind=6, a=1), LIMITS), [named, bytes(4), b""], LIMITS)
    with pytest.raises(FrameError, match=limits):
        parse_answer(parse_header(header_with(kind=2, d=1), LIMITS), [bytes(4), TIMES.pack(0.0, 0.0) + named], LIMITS)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(score: float) -> None:
    said = np.array([score], dtype=np.float32).tobytes()
    with pytest.raises(FrameError, match="scores of a list of experts must be finite"):
        parse_experts(parse_header(header_with(kind=6, a=1), LIMITS), [bytes(4), said, b""], LIMITS)
    with pytest.raises(FrameError, match="gate scores of a call must be finite"):
        parse_call(parse_header(header_with(a=1), LIMITS), [bytes(4), bytes(4), bytes(4), said], LIMITS)


def test_too_many_orders_are_refused() -> None:
    header = parse_header(header_with(kind=6, a=65), LIMITS)
    with pytest.raises(FrameError, match="65 experts in one list, the limit is 64"):
        parse_experts(header, [bytes(260), bytes(260), b""], LIMITS)


# --- sockets --------------------------------------------------------------------------------------------


@dataclass
class FakeWorker:
    """Doubles its input. ``gate`` holds calls back while it is closed."""

    name: str = "edge"
    num_layers = 2
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    order_error: Exception | None = None
    orders: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    ordered: threading.Event = field(default_factory=threading.Event)
    load_orders: list[tuple[StepId, int, int, list[int]]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def compute(self, call: ExpertCall) -> ExpertAnswer:
        self.calls += 1
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return ExpertAnswer(output_PH=2 * call.hidden_RH[torch.from_numpy(call.rows_P.copy())], hits=len(call.rows_P))

    def expect(self, layer: int, experts: np.ndarray, scores: np.ndarray) -> None:
        self.orders.append((layer, dict(zip(experts.tolist(), scores.tolist(), strict=True))))
        self.ordered.set()
        if self.order_error is not None:
            raise self.order_error

    def order(self, order: LoadOrder) -> None:
        self.load_orders.append((order.step, order.epoch, order.layer, order.experts.tolist()))

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)


@dataclass
class Wired:
    """Workers behind servers, and a client that is allowed in."""

    workers: dict[DeviceName, FakeWorker]
    servers: dict[DeviceName, WorkerServer]
    client: WorkerClient
    keys: KeyPair

    @property
    def endpoint(self) -> Endpoint:
        return self.servers[EDGE].endpoint


@contextmanager
def closing_client(endpoints: dict[DeviceName, Endpoint], keys: KeyPair) -> Iterator[WorkerClient]:
    client = WorkerClient(endpoints, keys, LIMITS)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def wired() -> Iterator[Wired]:
    """Two workers."""
    keys = KeyPair.create()
    workers = {name: FakeWorker(name=name) for name in (EDGE, OTHER)}
    with ExitStack() as stack:
        servers = {}
        for name, worker in workers.items():
            server = WorkerServer(worker, "127.0.0.1", LIMITS, {keys.public})  # type: ignore[arg-type]
            stack.callback(server.close)
            servers[name] = server
        client = stack.enter_context(closing_client({name: s.endpoint for name, s in servers.items()}, keys))
        yield Wired(workers=workers, servers=servers, client=client, keys=keys)
        for worker in workers.values():
            worker.gate.set()


def ask(client: WorkerClient, device: DeviceName = EDGE, timeout_s: float = TIMEOUT_S, layer: int = 0) -> ExpertAnswer:
    request = client.send(device, some_call(layer=layer))
    return gather(client, {request: device}, timeout_s)[request]


@contextmanager
def raw_socket(endpoint: str, server_key: bytes, keys: KeyPair) -> Iterator[zmq.Socket]:
    context = zmq.Context()
    socket = client_socket(context, endpoint, server_key, keys, LIMITS)
    socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def test_a_layer_goes_to_several_workers_and_comes_back(wired: Wired) -> None:
    call = some_call()
    requests = {wired.client.send(name, call): name for name in (EDGE, OTHER)}
    answers = gather(wired.client, requests, TIMEOUT_S)
    assert set(answers) == set(requests)
    for answer in answers.values():
        assert torch.equal(answer.output_PH, 2 * call.hidden_RH[[0, 2, 1]])
        assert answer.hits == 3


def test_many_calls_in_a_row_are_answered_in_kind(wired: Wired) -> None:
    for number in range(50):
        hidden = torch.full((3, 8), float(number))
        request = wired.client.send(EDGE, some_call(hidden))
        assert gather(wired.client, {request: EDGE}, TIMEOUT_S)[request].output_PH[0, 0] == 2.0 * number


def test_a_wrongly_keyed_client_gets_no_answer(wired: Wired) -> None:
    with closing_client({EDGE: wired.endpoint}, KeyPair.create()) as stranger:
        # whether the refusal has arrived before the call is sent, or not, is up to the scheduler
        refused = r"no answer from worker edge within 0\.5 s|takes no calls: it refuses the connection"
        with pytest.raises(ExpertUnavailableError, match=refused):
            ask(stranger, timeout_s=0.5)
        assert stranger.ping(EDGE, timeout_s=0.2) is None
    assert wired.workers[EDGE].calls == 0
    assert wired.servers[EDGE].refused > 0
    assert ask(wired.client).hits == 3


def test_a_client_that_expects_another_server_key_gets_no_answer(wired: Wired) -> None:
    endpoint = Endpoint(data=wired.endpoint.data, control=wired.endpoint.control, public_key=KeyPair.create().public)
    with closing_client({EDGE: endpoint}, wired.keys) as misled, pytest.raises(ExpertUnavailableError):
        ask(misled, timeout_s=0.3)
    assert wired.workers[EDGE].calls == 0


def test_a_client_without_encryption_gets_no_answer(wired: Wired) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(wired.endpoint.data)
    socket.send_multipart(wire(pack_call(1, some_call())))
    assert not socket.poll(300)
    socket.close()
    context.term()
    assert wired.workers[EDGE].calls == 0


def test_a_client_is_admitted_once_its_key_is_known(wired: Wired) -> None:
    keys = KeyPair.create()
    wired.servers[EDGE].clients.keys.add(keys.public)
    with closing_client({EDGE: wired.endpoint}, keys) as newcomer:
        assert ask(newcomer).hits == 3


MALFORMED = [
    [b""],
    [b"GET / HTTP/1.1"],
    [b"\0" * HEADER.size],
    [header_with()],
    [header_with(kind=3)],
    [header_with(kind=4)],
    [header_with(layer=7), bytes(4), bytes(4), bytes(4)],
    [header_with(), bytes(4), b"\xff" * 4, bytes(4)],
    [header_with(), bytes(4), bytes(4), bytes(4), bytes(4)],
    [header_with(dtype=7), bytes(4), bytes(4), bytes(4)],
]


def test_malformed_messages_are_dropped_and_counted_and_the_server_lives_on(wired: Wired) -> None:
    with raw_socket(wired.endpoint.data, wired.endpoint.public_key, wired.keys) as socket:
        for message in MALFORMED:
            socket.send_multipart(message)
        socket.send_multipart(wire(pack_call(77, some_call())))
        first, *body = socket.recv_multipart()
    header = parse_header(first, LIMITS)
    assert (header.kind, header.request) == (Kind.ANSWER, 77)
    assert parse_answer(header, body, LIMITS).hits == 3
    assert wired.servers[EDGE].dropped == len(MALFORMED)
    assert wired.workers[EDGE].calls == 1


def test_malformed_orders_are_dropped_and_counted(wired: Wired) -> None:
    with raw_socket(wired.endpoint.control, wired.endpoint.public_key, wired.keys) as socket:
        for message in (
            [b""], [header_with()], [header_with(kind=6, a=2)], [header_with(kind=6, a=1), b"", b"", b""],
            [header_with(kind=9, a=1)], [header_with(kind=10), b"x"],
        ):  # fmt: skip
            socket.send_multipart(message)
        socket.send(header_with(kind=4))
        assert parse_header(socket.recv_multipart()[0], LIMITS).kind is Kind.PONG
    assert wired.servers[EDGE].dropped == 6
    assert wired.workers[EDGE].orders == wired.workers[EDGE].load_orders == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.binary(max_size=80), min_size=1, max_size=4))
def test_any_bytes_leave_the_server_alive(wired: Wired, frames: list[bytes]) -> None:
    with raw_socket(wired.endpoint.data, wired.endpoint.public_key, wired.keys) as socket:
        socket.send_multipart(frames)
        socket.send_multipart(wire(pack_call(5, some_call())))
        assert parse_header(socket.recv_multipart()[0], LIMITS).request == 5


def test_an_oversized_message_costs_its_sender_the_connection_and_nobody_else(wired: Wired) -> None:
    with raw_socket(wired.endpoint.data, wired.endpoint.public_key, wired.keys) as socket:
        socket.send_multipart([header_with(), bytes(LIMITS.body_bytes * 2), bytes(4), bytes(4)])
        assert not socket.poll(200)
        assert ask(wired.client).hits == 3
    assert wired.workers[EDGE].calls == 1


def test_a_failing_worker_is_told_with_its_reason(wired: Wired) -> None:
    wired.workers[EDGE].error = ValueError("expert 3 is unreadable")
    with pytest.raises(ExpertUnavailableError, match='worker "edge": ValueError: expert 3 is unreadable'):
        ask(wired.client)
    wired.workers[EDGE].error = None
    assert ask(wired.client).hits == 3


def test_a_late_answer_is_dropped_and_counted(wired: Wired) -> None:
    worker = wired.workers[EDGE]
    worker.gate.clear()
    with pytest.raises(ExpertUnavailableError, match=r"no answer from worker edge within 0\.05 s"):
        ask(wired.client, timeout_s=0.05)
    assert worker.entered.wait(TIMEOUT_S)
    worker.gate.set()
    hidden = torch.full((3, 8), 9.0)
    request = wired.client.send(EDGE, some_call(hidden))
    answer = gather(wired.client, {request: EDGE}, TIMEOUT_S)[request]
    assert answer.output_PH.unique().tolist() == [18.0]
    assert wired.client.late_answers == 1


def test_only_the_silent_worker_is_named(wired: Wired) -> None:
    wired.workers[OTHER].gate.clear()
    requests = {wired.client.send(name, some_call()): name for name in (EDGE, OTHER)}
    with pytest.raises(ExpertUnavailableError, match=r"no answer from worker other within"):
        gather(wired.client, requests, 1.0)


def test_heartbeats_are_answered_during_a_long_computation(wired: Wired) -> None:
    wired.workers[EDGE].gate.clear()
    request = wired.client.send(EDGE, some_call())
    assert wired.workers[EDGE].entered.wait(TIMEOUT_S)
    seconds = wired.client.ping(EDGE, TIMEOUT_S)
    assert seconds is not None and 0 < seconds < TIMEOUT_S
    wired.workers[EDGE].gate.set()
    assert gather(wired.client, {request: EDGE}, TIMEOUT_S)


def test_prefetch_orders_arrive_layer_by_layer(wired: Wired) -> None:
    wired.client.prefetch(EDGE, [expert_id(1, 5), expert_id(0, 2), expert_id(1, 3)], [0.5, 0.25, 0.125])
    assert wired.client.ping(EDGE, TIMEOUT_S) is not None, "the control thread works in order"
    assert wired.workers[EDGE].orders == [(0, {2: 0.25}), (1, {5: 0.5, 3: 0.125})]


def test_load_orders_and_ends_of_sequences_arrive_in_order(wired: Wired) -> None:
    step = StepId(sequence=1 << 40, position=7)
    wired.client.order(EDGE, LoadOrder(step=step, epoch=2, layer=1, experts=np.array([5, 3], dtype=np.int32)))
    wired.client.forget(EDGE, step.sequence)
    assert wired.client.ping(EDGE, TIMEOUT_S) is not None, "the control thread works in order"
    assert wired.workers[EDGE].load_orders == [(step, 2, 1, [5, 3])]
    assert wired.workers[EDGE].forgotten == [step.sequence]
    assert wired.workers[OTHER].load_orders == []


def test_an_order_for_a_layer_that_the_model_lacks_is_dropped_and_counted(wired: Wired) -> None:
    step = StepId(sequence=1, position=0)
    wired.client.order(EDGE, LoadOrder(step=step, epoch=0, layer=2, experts=np.zeros(1, dtype=np.int32)))
    assert wired.client.ping(EDGE, TIMEOUT_S) is not None
    assert wired.workers[EDGE].load_orders == [] and wired.servers[EDGE].dropped == 1


def test_a_failing_order_does_not_silence_the_heartbeat(wired: Wired) -> None:
    wired.workers[EDGE].order_error = RuntimeError("no such slot")
    wired.client.prefetch(EDGE, [expert_id(1, 5)], [0.5])
    assert wired.workers[EDGE].ordered.wait(TIMEOUT_S)
    assert wired.client.ping(EDGE, TIMEOUT_S / 10) is not None


@pytest.fixture
def nobody() -> Iterator[WorkerClient]:
    """A client whose worker does not listen: nothing is bound to the port."""
    with zmq.Context() as context:
        socket = context.socket(zmq.ROUTER)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.close(linger=0)
    address = f"tcp://127.0.0.1:{port}"
    endpoint = Endpoint(data=address, control=address, public_key=KeyPair.create().public)
    with closing_client({EDGE: endpoint}, KeyPair.create()) as client:
        yield client


def test_a_dead_worker_neither_blocks_nor_hoards(nobody: WorkerClient) -> None:
    with pytest.raises(
        ExpertUnavailableError, match='worker "edge" takes no calls: it refuses the connection or its queue is full'
    ):
        for _ in range(1000):
            nobody.send(EDGE, some_call())


def test_orders_to_a_dead_worker_are_dropped(nobody: WorkerClient) -> None:
    for _ in range(1000):
        nobody.prefetch(EDGE, [1], [0.5])
        nobody.forget(EDGE, 1)


def test_heartbeats_of_a_dead_worker_fail_even_with_a_full_queue(nobody: WorkerClient) -> None:
    assert nobody.ping(EDGE, 0.01) is None
    for _ in range(1000):
        nobody.prefetch(EDGE, [1], [0.5])
    assert nobody.ping(EDGE, 0.01) is None


@pytest.mark.parametrize(
    "reply",
    [
        [b""],
        [b"\0" * HEADER.size],
        [header_with(kind=2, request=1, pairs=9, hidden=9)],
        [header_with(kind=5, request=1)],
        [header_with(kind=3, request=1, a=5), b"abc"],
    ],
)
def test_a_worker_that_answers_nonsense_has_not_answered(reply: list[bytes]) -> None:
    context, keys, client_keys = zmq.Context(), KeyPair.create(), KeyPair.create()
    door = Door(context, AllowedClients({client_keys.public}))
    socket, address = server_socket(context, "127.0.0.1", keys, LIMITS)
    with closing_client({EDGE: Endpoint(data=address, control=address, public_key=keys.public)}, client_keys) as c:
        request = c.send(EDGE, some_call())
        sender, *_ = socket.recv_multipart()
        socket.send_multipart([sender, *reply])
        assert c.receive(TIMEOUT_S, {request}) == []
    assert c.malformed == 1
    socket.close()
    door.close()
    context.term()


def test_servers_bind_the_named_address_only(wired: Wired) -> None:
    assert wired.endpoint.data.startswith("tcp://127.0.0.1:")
    assert wired.endpoint.control.startswith("tcp://127.0.0.1:")


@contextmanager
def fixed_server(keys: KeyPair, ports: tuple[int, int], **options: Any) -> Iterator[WorkerServer]:
    worker = FakeWorker(name=EDGE)
    server = WorkerServer(worker, "127.0.0.1", LIMITS, {keys.public}, ports=ports, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def test_fixed_ports_are_bound_and_others_may_be_advertised() -> None:
    keys, (calls, orders) = KeyPair.create(), free_ports(2)
    advertised = (f"localhost:{calls}", f"localhost:{orders}")
    with fixed_server(keys, (calls, orders), advertise=advertised) as server:
        assert (server.endpoint.data, server.endpoint.control) == tuple(f"tcp://{place}" for place in advertised)
        with closing_client({EDGE: server.endpoint}, keys) as client:
            assert client.ping(EDGE, TIMEOUT_S) is not None
            ask(client)
    with fixed_server(keys, (calls, orders)) as again:  # the ports of a server that has ended are free for the next
        assert again.endpoint.data == f"tcp://127.0.0.1:{calls}"


def test_a_taken_port_is_named_and_the_other_is_given_back() -> None:
    keys, (first, second, third) = KeyPair.create(), free_ports(3)
    with fixed_server(keys, (first, second)):
        with (
            pytest.raises(OSError, match=rf"127\.0\.0\.1, port {second}: .*in use"),
            fixed_server(keys, (third, second)),
        ):
            pass
        with fixed_server(keys, (third, free_ports(1)[0])) as server:
            assert server.endpoint.data == f"tcp://127.0.0.1:{third}"


def test_closed_servers_answer_no_more(wired: Wired) -> None:
    assert ask(wired.client, OTHER).hits == 3
    wired.servers[OTHER].close()
    with pytest.raises(ExpertUnavailableError):
        ask(wired.client, OTHER, timeout_s=0.1)
    assert ask(wired.client, EDGE).hits == 3


# --- the placement actor's socket -----------------------------------------------------------------------


PRIMARY = {ExpertKey(layer=1, expert=expert): EDGE if expert % 2 else OTHER for expert in range(8)}
FORECAST = (1, np.array([3, 2, 5]), np.array([0.5, 0.25, 0.125], dtype=np.float32))


@contextmanager
def placed(state: ClusterState, keys: KeyPair, *told: OnForecast) -> Iterator[PlacementServer]:
    """A placement actor's socket that admits ``keys``."""
    server = PlacementServer(state, "127.0.0.1", LIMITS, *told)
    server.clients.keys.add(keys.public)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def engine_end(server: PlacementServer, keys: KeyPair) -> Iterator[PlacementClient]:
    client = PlacementClient(server.endpoint, keys, LIMITS)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def desk_of(wired: Wired, state: ClusterState) -> Iterator[OrderDesk]:
    """A desk that both workers admit."""
    desk = OrderDesk(state, LIMITS)
    for server in wired.servers.values():
        server.clients.keys.add(desk.keys.public)
    try:
        yield desk
    finally:
        desk.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    pause = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.01)):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen in time")


def test_residency_reaches_the_placement_state() -> None:
    state, keys = ClusterState(), KeyPair.create()
    with placed(state, keys) as server, engine_end(server, keys) as client:
        client.publish({EDGE: ([1, 2, 3], []), OTHER: ([7], [])})
        client.publish({EDGE: ([4], [2])})
        until(lambda: state.resident.get(EDGE) == {1, 3, 4})
        assert state.resident == {EDGE: {1, 3, 4}, OTHER: {7}}


def test_malformed_news_is_dropped_and_counted() -> None:
    state, keys = ClusterState(), KeyPair.create()
    with placed(state, keys) as server, raw_socket(server.endpoint.data, server.endpoint.public_key, keys) as socket:
        for message in ([header_with()], [header_with(kind=8, a=1)], [header_with(kind=8, layer=8)]):
            socket.send_multipart(message)
        until(lambda: server.dropped == 3)


def test_a_forecast_becomes_orders_to_the_owners_of_what_it_names(wired: Wired) -> None:
    state, keys = ClusterState(primary=PRIMARY), KeyPair.create()
    with desk_of(wired, state) as desk, placed(state, keys, desk.forecast) as server:
        desk.connect({name: s.endpoint for name, s in wired.servers.items()})
        with engine_end(server, keys) as client:
            client.forecast(*FORECAST)
            assert wired.workers[EDGE].ordered.wait(TIMEOUT_S) and wired.workers[OTHER].ordered.wait(TIMEOUT_S)
    assert wired.workers[EDGE].orders == [(1, {3: 0.5, 5: 0.125})]
    assert wired.workers[OTHER].orders == [(1, {2: 0.25})]


def test_devices_without_slots_get_no_orders(wired: Wired) -> None:
    with desk_of(wired, ClusterState(primary=PRIMARY)) as desk:
        desk.forecast(*FORECAST)  # before anybody is connected
        desk.connect({EDGE: wired.endpoint})
        desk.forecast(*FORECAST)
        assert wired.workers[EDGE].ordered.wait(TIMEOUT_S)
    assert not wired.workers[OTHER].ordered.is_set()


def test_a_desk_whose_keys_a_worker_does_not_know_orders_nothing_and_never_waits(wired: Wired) -> None:
    desk = OrderDesk(ClusterState(primary=PRIMARY), LIMITS)
    desk.connect({EDGE: wired.endpoint})
    for _ in range(1000):
        desk.forecast(*FORECAST)
    desk.close()
    assert wired.workers[EDGE].orders == wired.workers[EDGE].load_orders == []


def test_forecasts_beyond_what_a_placement_actor_takes_are_dropped_and_counted() -> None:
    keys = KeyPair.create()
    with placed(ClusterState(), keys) as server, engine_end(server, KeyPair.create()) as stranger:
        for _ in range(1000):
            stranger.forecast(*FORECAST)
        assert stranger.dropped > 0


def test_an_engine_moves_to_the_socket_of_a_restarted_placement_actor() -> None:
    before, after, keys = ClusterState(), ClusterState(), KeyPair.create()
    with placed(before, keys) as first, placed(after, keys) as second, engine_end(first, keys) as client:
        client.publish({EDGE: ([1], [])})
        until(lambda: EDGE in before.resident)
        client.move(second.endpoint)
        client.publish({EDGE: ([2], [])})
        until(lambda: after.resident.get(EDGE) == {2})
    assert before.resident == {EDGE: {1}}
