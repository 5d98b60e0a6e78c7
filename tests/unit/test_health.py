"""The state machine of a device's health, by scenarios and by any course of events."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raymoe.placement.health import DOWN_S, SUSPECT_S, DeviceHealth, HealthState


def healthy() -> DeviceHealth:
    """Process "p" appeared at 0 s, and was heard at 1 s with its whole shard."""
    health = DeviceHealth(since_s=0.0)
    health.appeared("p", 0.0)
    health.asked(0.5)
    health.completed("p")
    health.heard("p", 1.0)
    return health


def test_a_device_is_down_until_a_process_of_it_answers() -> None:
    health = DeviceHealth(since_s=0.0)
    assert (health.state, health.reason, health.serves) == (HealthState.DOWN, "not started yet", False)
    health.appeared("p", 1.0)
    assert (health.state, health.since_s, health.serves) == (HealthState.REJOINING, 1.0, False)


def test_a_complete_shard_makes_healthy_only_with_the_next_heartbeat() -> None:
    health = DeviceHealth(since_s=0.0)
    health.appeared("p", 0.0)
    health.asked(0.5)
    health.heard("p", 0.7)
    health.completed("p")
    assert health.state is HealthState.REJOINING
    health.heard("p", 1.0)
    assert (health.state, health.reason, health.serves) == (HealthState.HEALTHY, None, True)


def test_silence_makes_suspect_and_then_down() -> None:
    health = healthy()
    health.look(1.0 + SUSPECT_S)
    assert health.state is HealthState.HEALTHY
    health.look(1.01 + SUSPECT_S)
    assert health.state is HealthState.SUSPECT and health.serves
    health.look(1.0 + DOWN_S)
    assert health.state is HealthState.SUSPECT
    health.look(1.01 + DOWN_S)
    assert health.state is HealthState.DOWN and not health.serves


def test_a_paused_process_is_healthy_with_its_first_answer() -> None:
    health = healthy()
    for now_s in (2.0, 4.0):
        health.look(now_s)
    assert health.state is HealthState.DOWN
    health.heard("p", 9.0)
    assert (health.state, health.restarts) == (HealthState.HEALTHY, 0)


def test_a_new_process_is_counted_and_reads_its_shard_first() -> None:
    health = healthy()
    health.appeared("q", 3.0)
    assert (health.state, health.restarts, health.serves) == (HealthState.REJOINING, 1, False)
    health.heard("p", 3.1)
    assert health.heard_s is None, "what is heard of the earlier process means nothing"
    health.asked(3.2)
    health.completed("q")
    health.heard("q", 3.3)
    assert health.state is HealthState.HEALTHY


def test_a_process_that_could_not_be_taken_in_comes_again_without_being_counted() -> None:
    health = healthy()
    health.died("p", "it could not be taken in", 2.0)
    assert (health.state, health.reason) == (HealthState.DOWN, "it could not be taken in")
    health.appeared("p", 3.0)
    assert (health.state, health.restarts) == (HealthState.REJOINING, 0)


def test_an_engines_suspicion_ends_with_the_next_heartbeat() -> None:
    health = healthy()
    health.suspected("an engine", 1.1)
    assert health.state is HealthState.SUSPECT and health.serves
    health.heard("p", 1.2)
    assert health.state is HealthState.HEALTHY


def test_the_end_of_an_earlier_process_changes_nothing() -> None:
    health = healthy()
    health.died("o", "its node is gone", 2.0)
    health.missing("no node offers it", 2.0)
    assert health.state is HealthState.HEALTHY


def test_a_pause_of_the_listener_is_nobodys_silence() -> None:
    health = healthy()
    health.excuse(30.0)
    health.look(31.5)
    assert health.state is HealthState.HEALTHY


def test_a_worker_that_is_not_asked_yet_is_not_silent() -> None:
    health = DeviceHealth(since_s=0.0)
    health.appeared("p", 0.0)
    health.look(100.0)
    assert health.state is HealthState.REJOINING and health.silence_s(100.0) is None


class AnyCourse(RuleBasedStateMachine):
    """Events in any order, with a clock that only goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.health = DeviceHealth(since_s=0.0)
        self.before = self.health.state
        self.silence_s: float | None = None
        self.event = ""

    def at(self, step_s: float, event: str) -> float:
        self.now_s += step_s
        self.before, self.event = self.health.state, event
        self.silence_s = self.health.silence_s(self.now_s)
        return self.now_s

    steps = st.floats(0.0, 1.5)
    processes = st.sampled_from("pqr")

    @rule(step_s=steps, process=processes)
    def appears(self, step_s: float, process: str) -> None:
        known = self.health.incarnation
        self.health.appeared(process, self.at(step_s, "appeared"))
        if known != process:
            assert self.health.state is HealthState.REJOINING and not self.health.complete

    @rule(step_s=steps)
    def is_asked(self, step_s: float) -> None:
        self.health.asked(self.at(step_s, "asked"))

    @rule(process=processes)
    def completes(self, process: str) -> None:
        self.at(0.0, "completed")
        self.health.completed(process)

    @rule(step_s=steps, process=processes)
    def answers(self, step_s: float, process: str) -> None:
        self.health.heard(process, self.at(step_s, "heard"))

    @rule(step_s=steps, process=processes)
    def dies(self, step_s: float, process: str) -> None:
        self.health.died(process, "gone", self.at(step_s, "died"))

    @rule(step_s=steps)
    def is_suspected(self, step_s: float) -> None:
        self.health.suspected("an engine", self.at(step_s, "suspected"))

    @rule(step_s=steps)
    def is_missing(self, step_s: float) -> None:
        self.health.missing("no node offers it", self.at(step_s, "missing"))

    @rule(step_s=steps)
    def time_passes(self, step_s: float) -> None:
        self.health.look(self.at(step_s, "look"))

    @rule(gap_s=steps)
    def the_listener_was_away(self, gap_s: float) -> None:
        self.at(gap_s, "excused")
        self.health.excuse(gap_s)

    @invariant()
    def only_an_answer_makes_healthy(self) -> None:
        if self.health.state is HealthState.HEALTHY:
            assert self.health.complete and self.health.incarnation is not None
            assert self.before is HealthState.HEALTHY or self.event == "heard"

    @invariant()
    def only_long_silence_of_a_suspect_or_a_death_brings_down(self) -> None:
        if self.health.state is HealthState.DOWN and self.before is not HealthState.DOWN:
            silent = self.before is HealthState.SUSPECT and self.event == "look"
            assert self.event in ("died", "missing") or (silent and (self.silence_s or 0.0) > DOWN_S)

    @invariant()
    def whoever_serves_has_a_whole_shard(self) -> None:
        if self.health.serves:
            assert self.health.complete and self.health.incarnation is not None

    @invariant()
    def whoever_is_not_healthy_has_a_reason(self) -> None:
        assert (self.health.reason is None) == (self.health.state is HealthState.HEALTHY)
        assert self.health.since_s <= self.now_s


TestAnyCourse = AnyCourse.TestCase


@pytest.mark.parametrize("silence_s, state", [(0.5, "healthy"), (0.8, "suspect"), (1.9, "suspect")])
def test_states_by_silence(silence_s: float, state: str) -> None:
    health = healthy()
    health.look(1.0 + silence_s)
    assert health.state == state
