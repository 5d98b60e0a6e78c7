"""What the host takes away is read from the system's count, and decides alone which round of a benchmark is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cacheless.measure import Answer, Found
from benchmarks.harness import MOST_REPEATS, ProcessorTime, StolenTime, least_disturbed, processor_time
from raymoe.types import Routing

TICKS = 100  # of a round


class Host:
    """Counts processor time; each round takes as much of it, of which the host steals the next share."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)
        self.rounds = 0
        self.now = ProcessorTime(total=1000, stolen=500)

    def read(self) -> ProcessorTime:
        """The clock."""
        return self.now

    def run(self) -> int:
        """A round; returns its number."""
        stolen = round(TICKS * self.shares[self.rounds])
        self.now = ProcessorTime(total=self.now.total + TICKS, stolen=self.now.stolen + stolen)
        self.rounds += 1
        return self.rounds


def test_a_calm_round_is_run_once() -> None:
    host = Host(0.05)
    kept = least_disturbed(host.run, host.read)
    assert (kept.result, kept.stolen, kept.is_disturbed, host.rounds) == (1, 0.05, False, 1)


def test_a_disturbed_round_is_repeated_until_one_is_calm() -> None:
    host = Host(0.3, 0.06, 0.01, 0.0)
    kept = least_disturbed(host.run, host.read)
    assert (kept.result, kept.is_disturbed, host.rounds) == (3, False, 3)


def test_of_rounds_that_all_are_disturbed_the_least_is_kept_and_says_so() -> None:
    host = Host(0.5, 0.2, 0.4, 0.3, 0.0)
    kept = least_disturbed(host.run, host.read)
    assert (kept.result, kept.stolen, kept.is_disturbed) == (2, 0.2, True)
    assert host.rounds == 1 + MOST_REPEATS


def test_what_a_round_gave_has_no_say() -> None:
    def kept(result_of: Callable[[int], float]) -> float:
        host = Host(0.5, 0.2, 0.4, 0.3)
        return least_disturbed(lambda: result_of(host.run()), host.read).result

    assert (kept(lambda number: float(number)), kept(lambda number: -float(number))) == (2.0, -2.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("cpu  10 20 30 40 5 0 5 90 7 3\ncpu0 1 1 1 1 1 1 1 1 1 1\n", ProcessorTime(total=200, stolen=90)),
        ("cpu  10 20 30 40\n", ProcessorTime()),
        ("", ProcessorTime()),
    ],
)
def test_guests_count_once_and_missing_columns_are_nothing(
    tmp_path: Path, content: str, expected: ProcessorTime
) -> None:
    path = tmp_path / "stat"
    path.write_text(content)
    assert processor_time(path) == expected


def test_no_count_no_share(tmp_path: Path) -> None:
    assert StolenTime(lambda: processor_time(tmp_path / "nothing")).share() == 0.0


def test_rounds_that_stayed_disturbed_are_counted() -> None:
    answer = Answer(tpot_s=1.0, ttft_s=0.0, tokens=(), routing=Routing())
    found = Found(answers={"one": [answer] * 3}, stolen=[0.0, 0.2, 0.05])
    assert found.about_rounds() == {"rounds": 3, "disturbed_rounds": 1, "stolen_by_round": [0.0, 0.2, 0.05]}
    assert found.caption() == "stolen by the host: 20% of a round at most, 1 of 3 disturbed"
