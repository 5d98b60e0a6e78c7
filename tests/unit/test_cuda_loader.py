"""A GPU's loads over a copy stream that the test plays: order, urgent loads overtaking pieces, who waits for what."""

from dataclasses import dataclass, field

import pytest
import torch

from raymoe.errors import LoadCancelledError
from raymoe.experts.cuda_loader import TIMED_EVERY, WINDOW, CudaLoader
from raymoe.experts.loader import ON_DEMAND, PREFETCH
from raymoe.experts.packing import PackedExpert, Packing

ELEMENTS = 8
PIECE = 2  # elements; so an expert is four pieces


@dataclass
class PlayedMark:
    """Passed once the device has come by."""

    stream: "PlayedStream"
    place: int

    def query(self) -> bool:
        return self.stream.done > self.place

    def elapsed_time(self, end: "PlayedMark") -> float:
        return float(end.place - self.place)


@dataclass
class PlayedStream:
    """Notes what is enqueued; ``run`` lets the device do so much of it."""

    enqueued: list[tuple[str, object]] = field(default_factory=list)
    done: int = 0

    def copy(self, source: PackedExpert, target: PackedExpert, start: int, end: int) -> None:
        self.enqueued.append(("copy", (source.flat[start:end], target.flat[start:end])))

    def mark(self) -> PlayedMark:
        self.enqueued.append(("mark", None))
        return PlayedMark(self, len(self.enqueued) - 1)

    def after_compute(self) -> None:
        self.enqueued.append(("after compute", None))

    def compute_after(self, mark: PlayedMark) -> None:
        self.enqueued.append(("compute waits", mark.place))

    def synchronize(self) -> None:
        self.run()

    def run(self, steps: int | None = None) -> None:
        end = len(self.enqueued) if steps is None else min(len(self.enqueued), self.done + steps)
        for kind, what in self.enqueued[self.done : end]:
            if kind == "copy":
                source, target = what  # type: ignore[misc]
                target.copy_(source)
        self.done = end

    def copied(self) -> list[float]:
        """The value of each copy so far, in the order of the stream."""
        return [float(what[0][0]) for kind, what in self.enqueued if kind == "copy"]  # type: ignore[index]

    def waits(self) -> list[object]:
        return [what for kind, what in self.enqueued if kind == "compute waits"]


PACKING = Packing({"up_proj": (ELEMENTS,)})


def expert(value: float) -> PackedExpert:
    return PACKING.views(torch.full((ELEMENTS,), value))


def loader_over(stream: PlayedStream) -> CudaLoader:
    loader = CudaLoader(stream, piece_bytes=4 * PIECE)
    loader.follows_host = True
    return loader


def test_a_load_on_demand_is_one_copy() -> None:
    stream = PlayedStream()
    target = expert(0.0)
    ticket = loader_over(stream).start(expert(5.0), target, 32, ON_DEMAND)
    assert stream.copied() == [5.0] and not ticket.is_done()
    stream.run()
    assert ticket.is_done() and target["up_proj"].tolist() == [5.0] * ELEMENTS


def test_on_demand_overtakes_what_of_a_prefetch_is_not_enqueued_yet() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    target = expert(0.0)
    ahead = loader.start(expert(1.0), target, 32, PREFETCH)
    assert stream.copied() == [1.0] * WINDOW, "a few pieces"
    loader.start(expert(2.0), expert(0.0), 32, ON_DEMAND)
    stream.run()
    loader.pump()
    stream.run()
    assert ahead.is_done()
    assert stream.copied() == [1.0] * WINDOW + [2.0] + [1.0] * (ELEMENTS // PIECE - WINDOW)
    assert target["up_proj"].tolist() == [1.0] * ELEMENTS


def test_pieces_follow_as_others_are_done() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    first = loader.start(expert(1.0), expert(0.0), 32, PREFETCH)
    second = loader.start(expert(2.0), expert(0.0), 32, PREFETCH)
    most = 0
    while not (first.is_done() and second.is_done()):
        before = len(stream.copied())
        stream.run(1)
        most = max(most, before - sum(kind == "copy" for kind, _ in stream.enqueued[: stream.done]))
    assert stream.copied() == [1.0] * 4 + [2.0] * 4, "the first one first"
    assert most <= WINDOW


def test_a_prefetch_that_is_needed_is_enqueued_to_its_end() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    other = loader.start(expert(1.0), expert(0.0), 32, PREFETCH)
    needed = loader.start(expert(2.0), expert(0.0), 32, PREFETCH)
    needed.wait(1.0)
    assert stream.copied() == [1.0] * WINDOW + [2.0] and len(stream.waits()) == 1
    stream.run()
    assert needed.is_done() and not other.is_done()


def test_a_cancelled_prefetch_gives_its_slot_up_at_once() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    target = expert(0.0)
    ticket = loader.start(expert(1.0), target, 32, PREFETCH)
    ticket.cancel()
    assert ticket.is_done() and isinstance(ticket.error, LoadCancelledError)
    loader.start(expert(2.0), target, 32, ON_DEMAND)
    stream.run()
    assert target["up_proj"].tolist() == [2.0] * ELEMENTS, "its pieces under way come before"
    assert ticket.link_s() is None


def test_what_has_ended_is_not_cancelled() -> None:
    stream = PlayedStream()
    ticket = loader_over(stream).start(expert(1.0), expert(0.0), 32, ON_DEMAND)
    ticket.cancel()
    stream.run()
    assert ticket.is_done() and ticket.error is None


def test_computing_waits_for_the_last_of_several_loads_only() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    tickets = [loader.start(expert(float(n)), expert(0.0), 32, ON_DEMAND) for n in range(3)]
    for ticket in reversed(tickets):
        ticket.wait(1.0)
    assert len(stream.waits()) == 1
    last = tickets[-1].ended
    assert isinstance(last, PlayedMark) and stream.waits() == [last.place]


@pytest.mark.parametrize("follows", [True, False])
def test_copies_wait_for_computing_unless_the_host_has_seen_its_end(follows: bool) -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    loader.follows_host = follows
    loader.start(expert(1.0), expert(0.0), 32, ON_DEMAND)
    assert (("after compute", None) in stream.enqueued) == (not follows)


def test_some_loads_are_timed_and_all_while_somebody_looks() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    tickets = [loader.start(expert(1.0), expert(0.0), 32, ON_DEMAND) for _ in range(2 * TIMED_EVERY)]
    stream.run()
    assert sum(ticket.link_s() is not None for ticket in tickets) == 2
    assert all(ticket.span_s() is None for ticket in tickets)
    loader.watch(True)
    later = [loader.start(expert(1.0), expert(0.0), 32, ON_DEMAND) for _ in range(3)]
    stream.run()
    assert all(ticket.span_s() is not None for ticket in later)
    loader.watch(False)
    again = [loader.start(expert(1.0), expert(0.0), 32, ON_DEMAND) for _ in range(TIMED_EVERY)]
    stream.run()
    assert sum(ticket.link_s() is not None for ticket in again) == 1


def test_closing_waits_for_what_is_under_way() -> None:
    stream = PlayedStream()
    loader = loader_over(stream)
    loader.start(expert(1.0), expert(0.0), 32, ON_DEMAND)
    loader.close()
    assert stream.done == len(stream.enqueued)
