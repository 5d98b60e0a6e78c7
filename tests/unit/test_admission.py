"""Who is let in, in which order, and what is set aside for caches."""

import random

import pytest

from raymoe.config import TrunkConfig
from raymoe.engine.admission import PRIORITY_STEP_S, KvLedger, Roster, WaitingQueue
from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.engine.sequence import RequestId, Sequence
from raymoe.engine.text import TextStream
from raymoe.errors import OverloadedError


def waiting(number: int, *, priority: int = 0, arrival_s: float = 0.0, kv_bytes: int = 0) -> Sequence:
    return Sequence(
        id=RequestId(number),
        prompt=[1],
        max_tokens=1,
        end_tokens=frozenset(),
        sampler=Sampler(SamplingParams(), SamplingDefaults()),
        text=TextStream(None),
        on_chunk=lambda chunk: None,
        alpha=None,
        kv_bytes=kv_bytes,
        priority=priority,
        arrival_s=arrival_s,
    )


def roster(**config: object) -> Roster:
    return Roster(TrunkConfig.model_validate(config))


def ids(sequences: list[Sequence]) -> list[int]:
    return [sequence.id for sequence in sequences]


def test_who_came_first_is_first_whatever_the_number() -> None:
    queue = WaitingQueue()
    for number, arrival_s in ((5, 1.0), (9, 1.0), (3, 2.0), (7, 0.5)):
        queue.put(waiting(number, arrival_s=arrival_s))
    assert ids(list(queue)) == [7, 5, 9, 3]


def test_less_priority_is_sooner_by_a_bounded_time() -> None:
    queue = WaitingQueue()
    queue.put(waiting(1, arrival_s=0.0))
    queue.put(waiting(2, arrival_s=PRIORITY_STEP_S - 1.0, priority=-1))
    queue.put(waiting(3, arrival_s=PRIORITY_STEP_S + 1.0, priority=-1))
    queue.put(waiting(4, arrival_s=0.0, priority=1))
    assert ids(list(queue)) == [2, 1, 3, 4]


def test_nobody_starves_beneath_a_stream_of_more_urgent_ones() -> None:
    place = roster(max_running=1)
    place.put(waiting(0, arrival_s=0.0, priority=2))
    served = []
    for second in range(60):
        place.put(waiting(1 + second, arrival_s=float(second)))
        served += ids(place.admit(float(second)))
        for sequence in list(place.running):
            place.remove(sequence)
    assert served.index(0) <= 2 * PRIORITY_STEP_S + 1


def test_a_full_queue_sheds() -> None:
    place = roster(max_running=2, max_waiting=1)
    for number in range(3):
        place.put(waiting(number))
    with pytest.raises(OverloadedError, match="3 requests are waiting already"):
        place.put(waiting(3))
    assert ids(place.admit(0.0)) == [0, 1] and len(place.waiting) == 1


def test_a_small_request_does_not_pass_a_large_one() -> None:
    place = roster(kv_memory=100)
    for number, size in ((0, 60), (1, 60), (2, 10)):
        place.put(waiting(number, arrival_s=float(number), kv_bytes=size))
    assert ids(place.admit(3.0)) == [0]
    place.remove(place.running[0])
    assert ids(place.admit(4.0)) == [1, 2]
    assert place.running[0].begun_s == 4.0


def test_what_was_set_aside_comes_back_exactly_once() -> None:
    ledger = KvLedger(100)
    ledger.set_aside(RequestId(1), 70)
    assert not ledger.fits(31) and ledger.fits(30) and ledger.free_bytes == 30
    ledger.give_back(RequestId(1))
    ledger.give_back(RequestId(1))
    assert ledger.set_aside_bytes == 0 and ledger.free_bytes == 100


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_never_exceeded_and_all_of_it_comes_back(seed: int) -> None:
    draw, place = random.Random(seed), roster(kv_memory=1000, max_running=8, max_waiting=100)
    came: list[int] = []
    for number in range(300):
        if draw.random() < 0.5:
            place.put(waiting(number, arrival_s=float(number), kv_bytes=draw.randrange(1, 1001)))
        came += ids(place.admit(float(number)))
        assert place.ledger.set_aside_bytes == sum(each.kv_bytes for each in place.running) <= 1000
        everyone = [*place.running, *place.waiting]
        if everyone and draw.random() < 0.6:
            place.remove(draw.choice(everyone))
    while place.running or len(place.waiting):
        for sequence in [*place.running, *place.waiting]:
            place.remove(sequence)
    assert place.ledger.set_aside_bytes == 0 and came == sorted(came)


def test_cancelling_marks_whoever_it_is() -> None:
    place = roster(max_running=1)
    for number in range(3):
        place.put(waiting(number, arrival_s=float(number)))
    place.admit(0.0)
    place.cancel(RequestId(0))
    place.cancel(RequestId(2))
    place.cancel(RequestId(77))
    assert ids(place.cancelled()) == [0, 2]
