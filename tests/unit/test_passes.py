"""How a sequence is cut into passes: every position belongs to one, and one position each is as if there were none."""

from hypothesis import given
from hypothesis import strategies as st

from predictor.passes import Passes

cuts = st.builds(Passes, first=st.integers(0, 20), reads=st.integers(1, 9), each=st.integers(1, 9))


@given(cuts, st.integers(0, 80))
def test_a_pass_begins_at_a_position_of_its_own_and_no_pass_overlaps(passes: Passes, position: int) -> None:
    first = passes.of(position)
    assert passes.of(first) == first <= position
    if position >= passes.first:
        size = passes.reads if first == passes.first else passes.each
        assert position < first + size


@given(cuts, st.integers(0, 5))
def test_passes_follow_each_other(passes: Passes, ahead: int) -> None:
    end = passes.end(ahead)
    assert passes.of(end) == end, "a new one begins where one ends"
    assert passes.of(end - 1) < end


@given(st.integers(0, 20), st.integers(0, 40), st.integers(0, 5))
def test_without_drafts_every_position_is_a_pass(first: int, position: int, ahead: int) -> None:
    passes = Passes(first=first)
    assert passes.of(position) == position
    assert passes.end(ahead) == first + 1 + ahead
