"""When layers come, by when those before came."""

import pytest

from raymoe.placement.cadence import Cadence

LAYERS = 4


class Clock:
    """Says what it is told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def passes(clock: Clock, starts: list[int], layer_s: float = 1.0) -> Cadence:
    """Some passes came to all of their layers; the last call was just now."""
    cadence = Cadence(LAYERS, clock)
    for start in starts:
        for layer in range(LAYERS):
            clock.now_s += layer_s
            cadence.called(start, layer)
    return cadence


@pytest.mark.parametrize(
    ("position", "layer", "expected"), [(11, 0, 1.0), (11, 3, 4.0), (12, 1, 6.0), (10, 3, 0.0), (9, 3, 0.0)]
)
def test_layers_come_one_after_the_other(position: int, layer: int, expected: float) -> None:
    assert passes(Clock(), [8, 9, 10]).until_s(position, layer) == pytest.approx(expected)


def test_time_goes_on() -> None:
    clock = Clock()
    cadence = passes(clock, [8, 9])
    clock.now_s += 0.75
    assert cadence.until_s(10, 1) == pytest.approx(1.25)
    clock.now_s += 9.0
    assert cadence.until_s(10, 1) == 0.0


def test_passes_of_several_positions_are_counted_as_passes() -> None:
    cadence = passes(Clock(), [0, 5, 9, 13, 18])
    assert cadence.until_s(23, 0) == pytest.approx(1.0)
    assert cadence.until_s(20, 0) == pytest.approx(1.0), "whatever begins later is no earlier than the next one"
    assert cadence.until_s(27, 2) == pytest.approx(7.0)


def test_before_a_whole_pass_has_come_nobody_knows() -> None:
    clock = Clock()
    cadence = Cadence(LAYERS, clock)
    assert cadence.last is None and cadence.until_s(0, 0) is None
    for layer in range(LAYERS - 1):
        cadence.called(0, layer)
        assert cadence.last == (0, layer) and cadence.until_s(1, 0) is None
    clock.now_s = 3.0
    cadence.called(0, LAYERS - 1)
    assert cadence.until_s(1, 0) == pytest.approx(1.0)


def test_it_follows_a_link_that_changed() -> None:
    clock = Clock()
    cadence = passes(clock, list(range(20)))
    for start in range(20, 40):
        for layer in range(LAYERS):
            clock.now_s += 3.0
            cadence.called(start, layer)
    assert cadence.until_s(40, 0) == pytest.approx(3.0)
