"""Loads in flight: order, pieces that urgent loads overtake, cancelling, and the time an emulated bus takes."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.errors import LoadCancelledError
from raymoe.experts import link as link_module
from raymoe.experts.link import EMULATED_PIECES, EmulatedLink, MemoryLink
from raymoe.experts.loader import ON_DEMAND, PREFETCH, ThreadLoader

TIMEOUT_S = 30.0


class GatedLink:
    """Copies in two pieces, once the gate opens; notes their order."""

    emulated = False

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.order: list[float] = []

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        self.order.append(source["w"].item())
        yield
        self.order.append(source["w"].item())
        target["w"].copy_(source["w"])


def test_on_demand_loads_overtake_queued_prefetches() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    target = {"w": torch.zeros(1)}
    first = loader.start({"w": torch.tensor([1.0])}, target, 4, PREFETCH)
    assert link.entered.wait(TIMEOUT_S)
    loads = [(2.0, PREFETCH), (3.0, ON_DEMAND), (4.0, PREFETCH), (5.0, ON_DEMAND)]
    tickets = [loader.start({"w": torch.tensor([number])}, target, 4, priority) for number, priority in loads]
    assert not first.is_done()
    link.gate.set()
    for ticket in tickets:
        ticket.wait(TIMEOUT_S)
    loader.close()
    assert link.order == [1.0, 3.0, 3.0, 5.0, 5.0, 1.0, 2.0, 2.0, 4.0, 4.0], "between the pieces of the first"


def test_a_prefetch_that_is_waited_for_overtakes_others() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    tickets = [loader.start({"w": torch.tensor([n])}, {"w": torch.zeros(1)}, 4, PREFETCH) for n in (1.0, 2.0, 3.0)]
    assert link.entered.wait(TIMEOUT_S)
    tickets[2].hurry()
    link.gate.set()
    for ticket in tickets:
        ticket.wait(TIMEOUT_S)
    loader.close()
    assert link.order == [1.0, 3.0, 3.0, 1.0, 2.0, 2.0]


def test_a_cancelled_load_ends_before_its_next_piece() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    target = {"w": torch.zeros(1)}
    ticket = loader.start({"w": torch.ones(1)}, target, 4, PREFETCH)
    assert link.entered.wait(TIMEOUT_S)
    ticket.cancel()
    link.gate.set()
    ticket.wait(TIMEOUT_S)
    loader.close()
    assert isinstance(ticket.error, LoadCancelledError)
    assert target["w"].item() == 0.0 and link.order == [1.0]


def test_cancelled_loads_end_before_anything_else_goes_on_and_the_loader_says_so() -> None:
    link, told = GatedLink(), threading.Event()
    loader = ThreadLoader(link, "test")
    tickets = [loader.start({"w": torch.tensor([n])}, {"w": torch.zeros(1)}, 4, PREFETCH) for n in (1.0, 2.0, 3.0)]
    assert link.entered.wait(TIMEOUT_S)
    ended: list[list[bool]] = []

    def note() -> None:
        ended.append([ticket.is_done() for ticket in tickets])
        told.set()

    loader.on_idle = note
    tickets[2].cancel()
    link.gate.set()
    assert told.wait(TIMEOUT_S)
    for ticket in tickets:
        ticket.wait(TIMEOUT_S)
    loader.close()
    assert ended[0] == [False, False, True], "though it came last"
    assert link.order == [1.0, 1.0, 2.0, 2.0]


def test_the_loader_says_when_it_is_idle() -> None:
    link, idle = GatedLink(), threading.Event()
    link.gate.set()
    loader = ThreadLoader(link, "test")
    loader.on_idle = idle.set
    loader.start({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 4, PREFETCH)
    assert idle.wait(TIMEOUT_S)
    loader.close()


def test_a_load_that_takes_too_long_is_an_error_not_a_hang() -> None:
    link = GatedLink()
    loader = ThreadLoader(link, "test")
    ticket = loader.start({"w": torch.zeros(1)}, {"w": torch.zeros(1)}, 4, ON_DEMAND)
    with pytest.raises(TimeoutError, match=r"not loaded within 0\.001 s"):
        ticket.wait(0.001)
    link.gate.set()
    loader.close()


@dataclass
class FakeTime:
    """A clock that only sleeping moves, by a little more than asked for."""

    now: float = 100.0
    overshoot_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.overshoot_s


def emulated(time: FakeTime, bytes_per_s: float = 1000.0, latency_s: float = 0.5) -> EmulatedLink:
    return EmulatedLink(bytes_per_s, latency_s, clock=lambda: time.now, sleep=time.sleep)


def transfer(link: EmulatedLink, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> None:
    for _ in link.pieces(source, target, nbytes):
        pass


def test_an_emulated_transfer_takes_latency_plus_bytes_over_rate() -> None:
    time = FakeTime()
    target = {"w": torch.zeros(2)}
    transfer(emulated(time), {"w": torch.ones(2)}, target, 2000)
    assert time.now == pytest.approx(100 + 0.5 + 2.0)
    assert target["w"].tolist() == [1.0, 1.0]


def test_emulated_transfers_do_not_begin_before_they_are_asked_for() -> None:
    time = FakeTime()
    link = emulated(time)
    transfer(link, {}, {}, 1000)
    time.now += 60
    transfer(link, {}, {}, 1000)
    assert time.now == pytest.approx(100 + 1.5 + 60 + 1.5)


def test_a_bus_goes_on_by_itself_while_its_imitator_oversleeps() -> None:
    time = FakeTime(overshoot_s=0.01)
    link = emulated(time)
    both = [link.pieces({}, {}, 1000), link.pieces({}, {}, 1000)]
    for pieces in both:
        for _ in pieces:
            pass
    assert time.now == pytest.approx(100 + 1.5 + 1.5 + 0.01), "one overshoot, not one per piece"


def test_an_overtaken_transfer_ends_when_both_are_through() -> None:
    time = FakeTime()
    link = emulated(time)
    slow = link.pieces({}, {}, 1000)
    next(slow)
    transfer(link, {}, {}, 1000)
    assert time.now == pytest.approx(100 + 1.5 / EMULATED_PIECES + 1.5)
    for _ in slow:
        pass
    assert time.now == pytest.approx(100 + 3.0)


def test_a_copy_that_took_longer_than_the_bus_is_not_delayed_further() -> None:
    time = FakeTime()

    class SlowTensor:
        def copy_(self, _source: object) -> None:
            time.now += 9.0

    transfer(emulated(time), {"w": None}, {"w": SlowTensor()}, 1000)  # type: ignore[dict-item]
    assert time.now == pytest.approx(109.0)


def test_a_memory_link_copies_large_tensors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PIECE_BYTES", 64)
    source, target = {"w": torch.arange(50.0).view(5, 10), "b": torch.ones(3)}, {}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    steps = sum(1 for _ in MemoryLink().pieces(source, target, 212))
    assert steps == 5, "five rows of 40 bytes and a small tensor, less one"
    assert all(torch.equal(source[name], target[name]) for name in source)
