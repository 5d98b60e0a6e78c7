"""All copies of an expert are made of the same bytes, and all nodes have the same weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import CheckpointError
from raymoe.placement.digest_book import DigestBook, check_same_weights
from raymoe.types import DeviceName, ExpertKey

A, B = DeviceName("a"), DeviceName("b")
KEYS = [ExpertKey(layer=layer, expert=expert) for layer in range(2) for expert in range(3)]


def test_what_one_worker_read_the_next_is_told_to_expect() -> None:
    book = DigestBook()
    book.add(A, {KEYS[0]: (1, 2), KEYS[1]: (3, 4)})
    assert book.of(KEYS) == {KEYS[0]: (1, 2), KEYS[1]: (3, 4)}
    book.add(B, {KEYS[1]: (3, 4), KEYS[2]: (5, 6)})
    assert book.of([KEYS[2]]) == {KEYS[2]: (5, 6)}


def test_workers_that_have_read_different_weights_are_named() -> None:
    book = DigestBook()
    book.add(A, {KEYS[4]: (1, 2)})
    with pytest.raises(CheckpointError, match='layer 1, expert 1: device "b" has read other weights than "a"; give'):
        book.add(B, {KEYS[4]: (1, 3)})
    assert book.of(KEYS) == {KEYS[4]: (1, 2)}


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from([A, B]), st.integers(0, 2)), max_size=20))
def test_the_first_record_always_stays(records: list[tuple[ExpertKey, DeviceName, int]]) -> None:
    book, first = DigestBook(), dict[ExpertKey, int]()
    for key, device, digest in records:
        expected = first.setdefault(key, digest)
        try:
            book.add(device, {key: (digest,)})
            assert digest == expected
        except CheckpointError:
            assert digest != expected
    assert book.of(KEYS) == {key: (digest,) for key, digest in first.items()}


def test_a_node_with_another_checkpoint_is_named() -> None:
    check_same_weights("abc", [(A, "10.0.0.1", "abc")])
    with pytest.raises(CheckpointError, match=r'device "b" on node 10\.0\.0\.2 serves other weights \(fingerprint xyz'):
        check_same_weights("abc", [(A, "10.0.0.1", "abc"), (B, "10.0.0.2", "xyz")])
