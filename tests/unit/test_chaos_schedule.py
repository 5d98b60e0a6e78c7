"""Schedules of faults: the same from the same seed, and never more away than experts have owners."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import ACTORS, RULES, TOGETHER_WITHIN_S, Fault, Kind, draw, read, write

DEVICES = ("edge-0", "edge-1", "edge-2")
schedules = st.builds(
    draw,
    seed=st.integers(0, 1 << 32),
    minutes=st.floats(0.1, 60),
    faults=st.integers(1, 60),
    devices=st.just(DEVICES),
    kinds=st.sets(st.sampled_from(Kind), min_size=1),
)


def test_a_seed_draws_the_same_again_and_another_one_something_else() -> None:
    def drawn(seed: int) -> tuple[Fault, ...]:
        return draw(seed=seed, minutes=20, faults=200, devices=DEVICES)

    assert drawn(3) == drawn(3) != drawn(4)


def test_the_default_run_has_every_kind_and_takes_about_its_time() -> None:
    faults = draw(seed=2, minutes=20, faults=200, devices=DEVICES)
    assert {fault.kind for fault in faults} == set(Kind)
    assert len(faults) == 200
    assert 15 * 60 <= faults[-1].at_s <= 25 * 60
    assert 10 <= sum(fault.together for fault in faults) <= 50


def test_times_rise_where_faults_are_closer_than_what_comes_together() -> None:
    for seed in range(50):
        times_s = [fault.at_s for fault in draw(seed=seed, minutes=0.1, faults=60, devices=DEVICES)]
        assert times_s == sorted(times_s)


@given(schedules)
def test_times_rise_and_every_fault_has_what_its_kind_needs(faults: tuple[Fault, ...]) -> None:
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    for fault in faults:
        least_s, most_s = RULES[fault.kind].lasts_s
        assert least_s <= fault.lasts_s <= most_s and 0 <= fault.strength <= 1
        assert set(fault.targets) <= set(DEVICES)
        assert len(fault.targets) == (0 if fault.kind in ACTORS else 2 if fault.kind is Kind.KILL_OWNERS else 1)


@given(schedules)
def test_one_device_at_a_time_is_away_unless_that_is_the_fault(faults: tuple[Fault, ...]) -> None:
    taking = [fault for fault in faults if RULES[fault.kind].takes != "nothing"]
    for first, second in pairwise(taking):
        back_s = first.at_s + first.lasts_s + RULES[first.kind].back_s
        if second.together:
            assert second.targets == first.targets and RULES[second.kind].of_link
            assert RULES[first.kind].takes == "a device"
        else:
            assert second.at_s >= back_s - 0.002  # times are rounded to milliseconds


@given(schedules)
def test_what_comes_together_comes_within_a_moment_of_another_kind(faults: tuple[Fault, ...]) -> None:
    for first, second in pairwise(faults):
        if second.together:
            assert second.kind is not first.kind and not first.together
            assert second.at_s - first.at_s <= TOGETHER_WITHIN_S + 0.002
    assert not faults[0].together


@given(schedules, st.integers(0, 100))
def test_a_written_schedule_is_read_again(tmp_path_factory: pytest.TempPathFactory, faults, seed: int) -> None:
    file = tmp_path_factory.getbasetemp() / "deep" / "schedule.json"
    write(file, faults, seed)
    assert read(file) == (faults, seed)


WRONG = ["{", "[]", '{"seed": 1}', '{"seed": 1, "faults": [{"at_s": 1, "kind": "hug", "targets": []}]}']


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_is_no_schedule_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"schedule\.json is no schedule"):
        read(file)


def test_a_fault_reads_as_a_line() -> None:
    fault = Fault(at_s=12.34, kind=Kind.CUT_LINK, targets=("edge-1",), lasts_s=1.5, strength=0.25, together=True)
    assert str(fault) == "    12.3 s  + cut_link       edge-1           for 1.5 s, strength 0.25"


@pytest.mark.parametrize("changed", [{"kinds": []}, {"faults": 0}, {"minutes": 0}, {"devices": ["edge-0"]}])
def test_nothing_to_draw_from_is_an_error(changed: dict) -> None:
    whole = {"seed": 1, "minutes": 1.0, "faults": 3, "devices": DEVICES}
    with pytest.raises(ValueError, match="nothing to draw from"):
        draw(**{**whole, **changed})
