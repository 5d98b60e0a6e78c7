"""A layer's calls while workers die, stop, come back, refuse and move, by a clock of the test's own."""

import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from raymoe.engine.directory import View
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.exchange import DOUBTS
from raymoe.engine.suspects import MUTE_S, PONG_S, SURE_S, UNSURE_S
from raymoe.errors import ExpertLostError, ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder
from raymoe.placement.patience import FIRST_S
from raymoe.transport.client import Received
from raymoe.transport.sockets import Endpoint
from raymoe.types import DeviceName, ExpertKey, LayerSize

A, B, C = DeviceName("a"), DeviceName("b"), DeviceName("c")
EXPERTS, HIDDEN = 6, 4
SIZES = (LayerSize(experts=EXPERTS, expert_bytes=8, top_k=3),)
KEYS = tuple(ExpertKey(layer=0, expert=expert) for expert in range(EXPERTS))
ANSWER_S, PING_S = 0.002, 0.001
NEVER = 1e9


@dataclass
class Worker:
    """How one behaves.

    Attributes:
        answer_s: to answer a call; alive: whether it answers at all.
        error: what it answers instead.
        lost: calls that it never sees.
    """

    answer_s: float = ANSWER_S
    alive: bool = True
    error: str | None = None
    lost: int = 0


@dataclass
class Wire:
    """Workers whose answers are expert + row value, when the test's clock comes to them."""

    workers: dict[DeviceName, Worker] = field(default_factory=lambda: {A: Worker(), B: Worker(), C: Worker()})
    now_s: float = 100.0
    late_answers: int = 0
    sent: list[tuple[DeviceName, list[int]]] = field(default_factory=list)
    closed: set[DeviceName] = field(default_factory=set)
    connected: list[Mapping[DeviceName, Endpoint]] = field(default_factory=list)
    at: dict[float, Callable[[], None]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _waiting: dict[int, tuple[float, DeviceName, ExpertCall]] = field(default_factory=dict)
    _pings: list[tuple[float, DeviceName]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def send(self, device: DeviceName, call: ExpertCall) -> int:
        number = next(self._numbers)
        self.sent.append((device, call.experts_P.tolist()))
        worker = self.workers[device]
        due_s = self.now_s + worker.answer_s
        if worker.lost:
            worker.lost -= 1
            due_s = NEVER
        self._waiting[number] = due_s, device, call
        return number

    def receive(self, wait_s: float, awaited: Container[int]) -> list[Received]:
        due = [(due_s, n) for n, (due_s, device, _) in self._waiting.items() if self.workers[device].alive]
        first_s = min((due_s for due_s, _ in due), default=NEVER)
        self.now_s = max(self.now_s, min(first_s, self.now_s + wait_s))
        for at_s in [at_s for at_s in self.at if at_s <= self.now_s]:
            self.at.pop(at_s)()
        came = []
        for due_s, number in sorted(due):
            if due_s <= self.now_s:
                _, device, call = self._waiting.pop(number)
                if number in awaited:
                    came.append(self._answer(number, device, call))
                else:
                    self.late_answers += 1
        return came

    def _answer(self, number: int, device: DeviceName, call: ExpertCall) -> Received:
        if (error := self.workers[device].error) is not None:
            return Received(request=number, error=error)
        experts_P1 = torch.from_numpy(call.experts_P).view(-1, 1)
        output_PH = call.hidden_RH[torch.from_numpy(call.rows_P)] + experts_P1
        return Received(request=number, answer=ExpertAnswer(output_PH=output_PH, hits=len(call.experts_P)))

    def probe(self, device: DeviceName) -> None:
        self._pings.append((self.now_s + PING_S, device))

    def signs(self) -> tuple[set[DeviceName], set[DeviceName]]:
        heard = {device for at_s, device in self._pings if at_s <= self.now_s and self.workers[device].alive}
        self._pings = [(at_s, device) for at_s, device in self._pings if device not in heard]
        closed, self.closed = self.closed, set()
        return heard, closed

    def connect(self, endpoints: Mapping[DeviceName, Endpoint]) -> set[DeviceName]:
        self.connected.append(endpoints)
        return {device for device, (endpoint) in endpoints.items() if endpoint.data == "moved"}

    def order(self, device: DeviceName, order: LoadOrder) -> None:
        raise AssertionError("nothing is ordered here")

    def forget(self, device: DeviceName, sequence: int) -> None:
        raise AssertionError("nothing is forgotten here")

    def kill(self, device: DeviceName) -> None:
        """Its connection closes."""
        self.workers[device].alive = False
        self.closed.add(device)


def endpoint(data: str = "same") -> Endpoint:
    return Endpoint(data=data, control="", public_key=b"")


def made(wire: Wire, ownership: dict[DeviceName, tuple[ExpertKey, ...]], timeout_s: float = 60.0) -> Dispatcher:
    """Experts are asked of the first owner in this order."""
    primary = {key: next(name for name, keys in ownership.items() if key in keys) for key in KEYS}
    return Dispatcher(
        SIZES,
        primary,
        ownership=ownership,
        local={},
        remote=wire,
        timeout_s=timeout_s,
        devices=(A, B, C),
        clock=wire.clock,
    )


def twice() -> dict[DeviceName, tuple[ExpertKey, ...]]:
    return {A: KEYS, B: KEYS, C: ()}


def ask(dispatcher: Dispatcher, rows: int = 1) -> None:
    """Three experts for each row; the answer must be right."""
    hidden_TH = torch.arange(float(rows)).view(-1, 1).expand(-1, HIDDEN).contiguous() * 10
    experts_TK = torch.tensor([[(row + k) % EXPERTS for k in (0, 2, 3)] for row in range(rows)])
    output_TKH = dispatcher.compute(0, hidden_TH, experts_TK)
    assert torch.equal(output_TKH, hidden_TH.unsqueeze(1) + experts_TK.unsqueeze(2))


def test_while_all_are_well_each_pair_is_asked_once() -> None:
    wire = Wire()
    ask(made(wire, twice()))
    assert wire.sent == [(A, [0, 2, 3])]
    assert wire.now_s == pytest.approx(100.0 + ANSWER_S)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_worker_that_falls_silent_is_doubted_then_others_are_asked_in_its_place(rows: int) -> None:
    wire = Wire()
    dispatcher, told = made(wire, twice()), list[int]()
    dispatcher.on_suspect = lambda: told.append(1)
    wire.workers[A].alive = False
    ask(dispatcher, rows)
    assert wire.now_s - 100.0 < FIRST_S + PONG_S + 0.1
    assert [name for name, _ in wire.sent] == [A, B]
    assert (dispatcher.suspects, dispatcher.rerouted, told) == ((A,), 1, [1])
    wire.sent.clear()
    ask(dispatcher, rows)
    assert [name for name, _ in wire.sent] == [B], "a suspect is not asked"


def test_a_closed_connection_needs_no_doubt() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    wire.kill(A)
    ask(dispatcher)
    assert wire.now_s - 100.0 < 0.05


def test_patience_follows_from_measured_times() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    ask(dispatcher)
    wire.workers[A].alive = False
    before_s = wire.now_s
    ask(dispatcher)
    assert wire.now_s - before_s < 0.1 + PONG_S + 0.1


def test_a_suspect_that_answers_again_is_used_again_and_its_late_answer_is_dropped() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    wire.workers[A].alive = False
    ask(dispatcher)
    wire.workers[A].alive = True
    wire.now_s += 1.0
    dispatcher.look()  # asks
    wire.now_s += 1.0
    dispatcher.look()  # hears
    assert dispatcher.suspects == ()
    wire.sent.clear()
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A]
    assert wire.late_answers == 1


def test_a_slow_worker_that_lives_is_waited_for() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    wire.workers[A].answer_s = 3 * FIRST_S
    ask(dispatcher)
    assert dispatcher.suspects == () and dispatcher.rerouted == 0
    assert wire.sent == [(A, [0, 2, 3])]


def test_a_lost_message_is_sent_to_another_owner_though_its_worker_lives() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    ask(dispatcher)
    wire.workers[A].lost = 1
    before_s = wire.now_s
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A, A, B]
    assert wire.now_s - before_s < 0.1 * 2**DOUBTS + 0.1


def test_a_worker_that_answers_pings_but_no_calls_is_left_alone_for_a_while() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    ask(dispatcher)
    wire.workers[A].lost = 2
    before_s = wire.now_s
    ask(dispatcher)
    for _ in range(8):  # what follows does not wait again
        ask(dispatcher)
        dispatcher.look()
    assert dispatcher.suspects == (A,)
    assert wire.now_s - before_s < 0.1 * 2**DOUBTS + 0.2
    for _ in range(4):
        wire.now_s += MUTE_S / 2
        dispatcher.look()
    assert dispatcher.suspects == ()
    wire.workers[A].lost = 0
    wire.sent.clear()
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A]


def test_a_lost_message_goes_to_its_worker_again_where_it_is_the_only_owner() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS})
    wire.workers[A].lost = 1
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A, A]


def test_two_that_die_at_once_are_both_replaced() -> None:
    wire = Wire()
    ownership = {A: KEYS[:3], B: KEYS[3:], C: KEYS}
    dispatcher = made(wire, ownership)
    wire.workers[A].alive = wire.workers[B].alive = False
    ask(dispatcher, 4)
    assert [name for name, _ in wire.sent][:2] == [A, B]
    assert {name for name, _ in wire.sent[2:]} == {C}
    assert dispatcher.suspects == (A, B)


def test_the_one_asked_instead_may_die_too() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS, B: KEYS, C: KEYS})
    wire.workers[A].alive = wire.workers[B].alive = False
    ask(dispatcher, 3)
    assert [name for name, _ in wire.sent] == [A, B, C]


def test_only_what_others_own_is_asked_of_them_and_the_suspect_may_still_bring_the_rest() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS, B: KEYS[:3]})  # A alone has expert 3
    wire.workers[A].alive = False
    back_s = 100.0 + FIRST_S + PONG_S + 0.5
    wire.at[back_s] = lambda: setattr(wire.workers[A], "alive", True)
    ask(dispatcher)
    assert wire.sent == [(A, [0, 2, 3]), (B, [0, 2])]
    assert wire.now_s == pytest.approx(back_s, abs=0.1)


def test_an_expert_without_another_owner_is_lost_after_a_short_hope() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS[:3], B: KEYS[3:]})
    wire.workers[A].alive = False
    with pytest.raises(ExpertLostError, match="layer 0: experts 0, 2 can't be reached: their owner a is silent") as hit:
        ask(dispatcher)
    assert hit.value.experts == ((0, 0), (0, 2)) and hit.value.devices == ("a",)
    assert wire.now_s - 100.0 < FIRST_S + PONG_S + UNSURE_S + 0.2
    assert not dispatcher.has(hit.value.experts)
    before_s = wire.now_s
    with pytest.raises(ExpertLostError):
        ask(dispatcher)
    assert wire.now_s - before_s < 0.1, "what is known to be lost is not waited for again"


def test_a_worker_that_is_gone_for_sure_is_hoped_for_less() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS[:3], B: KEYS[3:]})
    wire.kill(A)
    with pytest.raises(ExpertLostError):
        ask(dispatcher)
    assert wire.now_s - 100.0 < SURE_S + 0.1


def test_a_new_owner_that_is_told_of_meanwhile_is_asked() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS[:3], B: KEYS[3:]})
    wire.kill(A)
    new = {B: KEYS[3:], C: KEYS[:3]}
    primary = {key: C if key in KEYS[:3] else B for key in KEYS}
    wire.at[100.2] = lambda: dispatcher.adopt(
        View(ownership=new, primary=primary, endpoints={B: endpoint(), C: endpoint()})
    )
    ask(dispatcher)
    assert wire.sent[-1] == (C, [0, 2])
    assert wire.connected == [{B: endpoint(), C: endpoint()}]


def test_calls_to_a_worker_that_moved_are_sent_to_it_again() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS})
    wire.kill(A)

    def moves() -> None:
        wire.workers[A].alive = True
        wire._waiting.clear()
        dispatcher.adopt(View(ownership={A: KEYS}, primary=dict.fromkeys(KEYS, A), endpoints={A: endpoint("moved")}))

    wire.at[100.1] = moves
    ask(dispatcher)
    assert wire.sent == [(A, [0, 2, 3])] * 2
    assert dispatcher.suspects == ()


def test_a_worker_that_does_not_own_what_it_should_is_not_asked_for_it_again() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    wire.workers[A].error = 'ExpertUnavailableError: device "a" does not own all experts asked for in layer 0'
    ask(dispatcher)
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A, B, B]


def test_a_call_that_fails_at_one_owner_is_tried_at_another_and_its_error_told_where_there_is_none() -> None:
    wire = Wire()
    dispatcher = made(wire, twice())
    wire.workers[A].error = "RuntimeError: out of memory"
    ask(dispatcher)
    assert [name for name, _ in wire.sent] == [A, B]
    wire.workers[B].error = "RuntimeError: so am I"
    with pytest.raises(ExpertUnavailableError, match='worker "b": RuntimeError: so am I'):
        ask(dispatcher)


def test_a_worker_that_lives_and_never_answers_ends_with_the_timeout() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS}, timeout_s=5.0)
    wire.workers[A].lost = 10
    with pytest.raises(ExpertUnavailableError, match="no answer from worker a within 5 s"):
        ask(dispatcher)
    assert wire.now_s - 100.0 < 6.0


def test_nothing_of_a_failed_layer_is_left() -> None:
    wire = Wire()
    dispatcher = made(wire, {A: KEYS}, timeout_s=5.0)
    wire.workers[A].lost = 10
    with pytest.raises(ExpertUnavailableError):
        ask(dispatcher)
    wire.workers[A].lost = 0
    wire._waiting.clear()
    ask(dispatcher)
