"""The front of cheaper shadows: whoever is on it can't be had cheaper, and nobody else is needed."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.predicting.cheaper import alike, front

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Cheaper or as cheap, worth more or as much, and not the same."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(POINTS)
def test_no_point_of_the_front_is_beaten_and_every_other_is_or_is_there_already(
    points: list[tuple[int, int]],
) -> None:
    kept = [points[index] for index in front(points)]
    assert not any(beats(point, other) for point in points for other in kept)
    assert all(point in kept or any(beats(other, point) for other in kept) for point in points)
    assert kept == sorted(set(kept))


def test_agreement_counts_rows_of_the_steps_that_both_have_seen() -> None:
    assert alike({0: (1, 2), 1: (3, 4), 2: (5, 5)}, {0: (1, 9), 1: (3, 4)}) == 0.75
