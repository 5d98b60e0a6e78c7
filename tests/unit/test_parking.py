"""Requests that lack an expert: who goes on, who has waited too long, and what they hold meanwhile."""

from collections.abc import Collection
from dataclasses import dataclass, field

from raymoe.config import TrunkConfig
from raymoe.engine.admission import Roster
from raymoe.engine.parking import Parking
from raymoe.engine.sequence import RequestId, Sequence
from raymoe.errors import ExpertLostError, ExpertUnavailableError

LOST = ExpertLostError("layer 1: experts 2 can't be reached", experts=((1, 2),), devices=("edge",))


@dataclass
class Owners:
    """Who can be asked for what, by hand."""

    there: set[tuple[int, int]] = field(default_factory=set)
    looks: int = 0

    def look(self) -> None:
        self.looks += 1

    def serves(self, experts: Collection[tuple[int, int]]) -> bool:
        return set(experts) <= self.there


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def sequence(number: int, kv_bytes: int = 10) -> Sequence:
    return Sequence(
        id=RequestId(number),
        prompt=[1],
        max_tokens=1,
        end_tokens=frozenset(),
        sampler=None,  # type: ignore[arg-type]
        text=None,  # type: ignore[arg-type]
        on_chunk=lambda chunk: None,
        alpha=None,
        kv_bytes=kv_bytes,
    )


def test_a_request_goes_on_when_somebody_can_be_asked_for_what_it_lacked() -> None:
    owners, first = Owners(), sequence(1)
    parking = Parking(owners, 30.0, Clock())
    parking.park(first, LOST)
    assert parking.look() == [] and owners.looks == 1
    owners.there = {(1, 2)}
    assert parking.look() == [first]
    parking.remove(first)
    assert len(parking) == 0 and first.lost_s == 0.0


def test_it_is_overdue_by_the_time_since_its_last_token_however_often_it_tried() -> None:
    clock, first = Clock(), sequence(1)
    parking = Parking(Owners(), 30.0, clock)
    parking.park(first, LOST)
    clock.now_s = 20.0
    parking.remove(first)
    parking.park(first, LOST)  # it tried again in vain
    clock.now_s = 30.0
    assert parking.overdue() == []
    clock.now_s = 30.5
    ((late, error),) = parking.overdue()
    assert late is first and error.experts == ((1, 2),) and error.devices == ("edge",)
    assert str(error) == "layer 1: experts 2 can't be reached (waited 30 s, scheduling.recovery_timeout_s)"


def test_only_lost_experts_park_a_request_and_only_where_somebody_knows_of_owners() -> None:
    assert Parking(Owners(), 30.0, Clock()).takes(LOST)
    assert not Parking(Owners(), 30.0, Clock()).takes(ExpertUnavailableError("no answer"))
    nobody = Parking(None, 30.0, Clock())
    assert not nobody.takes(LOST) and nobody.look() == []


def test_a_cancelled_one_is_told_apart() -> None:
    parking = Parking(Owners(), 30.0, Clock())
    first, second = sequence(1), sequence(2)
    parking.park(first, LOST)
    parking.park(second, LOST)
    parking.cancel(2)
    parking.cancel(3)
    assert parking.cancelled() == [second]


def test_who_leaves_gives_back_memory_and_comes_back_in_the_place_of_its_arrival() -> None:
    roster = Roster(TrunkConfig(kv_memory=10, max_running=2))
    first, second = sequence(1), sequence(2)
    first.arrival_s, second.arrival_s = 1.0, 2.0
    roster.put(first)
    roster.put(second)
    assert roster.admit(5.0) == [first]
    roster.leave(first)
    assert roster.ledger.set_aside_bytes == 0
    assert roster.admit(6.0) == [second]
    roster.come_back(first)
    roster.remove(second)
    assert roster.admit(7.0) == [], "it was counted when it came"
    assert roster.running == [first] and first.begun_s == 5.0
