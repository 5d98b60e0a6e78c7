"""Who is refused because a first token would come too late: the arithmetic, and a queue in simulated time."""

import heapq
import random

import pytest

from raymoe.config import TrunkConfig
from raymoe.engine.admission import Roster
from raymoe.engine.shedding import ERROR, Pace, latest
from raymoe.errors import OverloadedError
from raymoe.serve.refusals import MOST_S, Refusals
from tests.unit.test_admission import waiting


def gamma_p99(place: int) -> float:
    draw = random.Random(place)
    times = sorted(sum(draw.expovariate(1.0) for _ in range(place)) for _ in range(20_000))
    return times[19_800]


@pytest.mark.parametrize("place", [1, 2, 5, 20, 60])
def test_the_latest_is_the_99th_percentile_of_independent_events(place: int) -> None:
    assert latest(place) == pytest.approx(gamma_p99(place), rel=0.05)


def test_intervals_count_while_others_wait_only() -> None:
    pace = Pace()
    for now_s, others_wait in ((1.0, True), (3.0, True), (4.0, False), (50.0, True), (51.0, True)):
        pace.left(now_s, others_wait)
    assert pace.interval_s(51.0) == pytest.approx((2.0 + 1.0) / 2)


def test_an_interval_that_does_not_end_counts_before_it_has() -> None:
    pace = Pace()
    for second in range(20):
        pace.left(float(second), True)
    assert pace.interval_s(19.5) == pytest.approx(1.0)
    assert pace.interval_s(19.0 + 41.0) == pytest.approx(1.0 + 0.02 * 40.0)


def test_who_is_let_in_at_once_waits_for_its_prompt_only() -> None:
    pace = Pace()
    assert pace.wait(1, 0.0) is None
    first = pace.wait(0, 0.0)
    assert first is not None and first.most_s == 0.0
    for _ in range(100):
        pace.read(0.2)
    steady = pace.wait(0, 0.0)
    assert steady is not None and steady.likely_s == pytest.approx(0.2)
    assert steady.most_s == pytest.approx(0.2)


def test_a_place_costs_its_intervals() -> None:
    pace = Pace()
    for second in range(20):
        pace.left(0.5 * second, True)
    wait = pace.wait(4, 9.5)
    assert wait is not None
    assert wait.likely_s == pytest.approx(2.0) and wait.most_s == pytest.approx(0.5 * latest(4) * (1 + ERROR))


class Clock:
    """Tells the time that it was set to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_while_nothing_is_measured_as_many_may_wait_as_run() -> None:
    place = Roster(TrunkConfig(max_running=2), ttft_slo_s=1.0, clock=Clock())
    for number in range(4):  # two of them are let in with the next step
        place.put(waiting(number))
    with pytest.raises(OverloadedError, match="2 requests go before this one, and how long they take is not known"):
        place.put(waiting(4))


def test_a_refusal_says_how_long_it_would_take() -> None:
    clock = Clock()
    place = Roster(TrunkConfig(max_running=1), ttft_slo_s=6.0, clock=clock)
    for number in range(2):
        place.put(waiting(number))
    for number in range(2, 30):
        place.admit(clock.now_s)
        clock.now_s += 1.0
        place.remove(place.running[0])
        place.put(waiting(number))
    place.admit(clock.now_s)
    with pytest.raises(OverloadedError, match=r"1 requests go before this one.* 7\.3 s, more than the 6 s") as refused:
        place.put(waiting(99))
    assert refused.value.retry_after_s == pytest.approx(2.0)


def test_a_queue_that_is_long_by_number_refuses_without_any_promise() -> None:
    place = Roster(TrunkConfig(max_running=1, max_waiting=1), clock=Clock())
    for number in range(2):
        place.put(waiting(number))
    with pytest.raises(OverloadedError) as refused:
        place.check_room()
    assert refused.value.retry_after_s is None


@pytest.mark.parametrize("load", [0.5, 5.0])
@pytest.mark.parametrize("lengths", ["regular", "spread"])
def test_under_any_load_those_who_are_taken_have_their_first_token_in_time(load: float, lengths: str) -> None:
    """Poisson arrivals on 8 places in simulated time, five times as many as can be served; and half as many."""
    draw, clock, slo_s, holding_s = random.Random(3), Clock(), 2.0, 1.0
    place = Roster(TrunkConfig(max_running=8, max_waiting=1000), ttft_slo_s=slo_s, clock=clock)
    ends: list[tuple[float, int]] = []
    arrivals, waits, refused, running = 0.0, [], 0, {}
    for number in range(6000):
        arrivals += draw.expovariate(load * 8 / holding_s)
        while ends and ends[0][0] <= arrivals:
            clock.now_s, ended = heapq.heappop(ends)
            place.remove(running.pop(ended))
            admit(place, clock.now_s, running, ends, waits, draw, holding_s, lengths)
        clock.now_s = arrivals
        try:
            place.put(waiting(number, arrival_s=arrivals))
        except OverloadedError:
            refused += 1
        admit(place, clock.now_s, running, ends, waits, draw, holding_s, lengths)
    waits.sort()
    assert waits[int(0.99 * len(waits))] <= slo_s
    if load > 1:
        assert 0.75 < refused / 6000 < 0.85, "as many are served as can be"
        assert waits[len(waits) // 2] > slo_s / 4, "the promise is made use of"
    else:
        assert refused < 60


def admit(place: Roster, now_s: float, running, ends, waits, draw, holding_s: float, lengths: str) -> None:
    """Let in who may, and draw when they will have ended."""
    for sequence in place.admit(now_s):
        waits.append(now_s - sequence.arrival_s)
        running[sequence.id] = sequence
        spread = draw.expovariate(1.0) if lengths == "spread" else draw.uniform(0.8, 1.2)
        heapq.heappush(ends, (now_s + holding_s * spread, sequence.id))


def test_an_ingress_remembers_a_refusal_for_as_long_as_nobody_is_expected_to_leave() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    refusals.note(OverloadedError("full", retry_after_s=3.0, full_s=0.2), priority=0)
    for priority in (0, 5):
        with pytest.raises(OverloadedError, match="full") as refused:
            refusals.check(priority)
        assert refused.value.retry_after_s == 3.0
    refusals.check(-1)
    clock.now_s = 0.2
    refusals.check(0)
    refusals.note(OverloadedError("full", full_s=60.0), priority=0)
    clock.now_s = 0.2 + MOST_S
    refusals.check(0)
