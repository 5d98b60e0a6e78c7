"""The fuzzers' own parts: the corpus is valid, mutations are not idle, and a seeded slice of the million holds."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.transport.frames import Kind, parse_header
from tests.frames import LIMITS
from tests.fuzz.corpus import corpus
from tests.fuzz.guided import decoded, encoded
from tests.fuzz.million import hammer
from tests.fuzz.mutations import MUTATIONS, mutated
from tests.fuzz.target import PARSERS, read, read_measured

SLICE = 3000  # messages; `python -m tests.fuzz.million` parses a million
EMPTY_KINDS = {Kind.PING, Kind.PONG}  # have no body


@pytest.mark.parametrize("seed", range(3))
def test_a_slice_of_the_million(seed: int) -> None:
    outcomes = hammer(SLICE, seed)
    assert outcomes.total() == SLICE
    assert 0.5 * SLICE < outcomes["refused"] < SLICE, "mutations leave some messages whole, and most not"


def test_the_corpus_has_every_kind_and_all_of_it_is_understood() -> None:
    messages = corpus(np.random.default_rng(0))
    assert all(read_measured(frames) is not None for frames in messages)
    kinds = {parse_header(frames[0], LIMITS).kind for frames in messages}
    assert kinds == set(Kind) - {Kind.PONG}
    assert set(PARSERS) == set(Kind) - EMPTY_KINDS


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_changes_something(mutation: object) -> None:
    rng, whole = random.Random(0), corpus(np.random.default_rng(0))
    changed = sum(mutation(frames, rng) != frames for frames in whole)  # type: ignore[operator]
    assert changed > len(whole) / 4
    assert all(isinstance(mutation([], rng), list) for _ in range(3)), "nothing stays nothing"  # type: ignore[operator]


def test_a_seed_makes_the_same_messages_again() -> None:
    whole = corpus(np.random.default_rng(5))
    assert whole == corpus(np.random.default_rng(5))
    first, second = random.Random(7), random.Random(7)
    assert all(mutated(whole, first) == mutated(whole, second) for _ in range(200))


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_inputs_of_the_guided_fuzzer_are_whole_messages(frames: list[bytes]) -> None:
    assert decoded(encoded(frames)) == frames
    read(frames)


def test_a_message_of_very_many_frames_is_refused_before_they_are_looked_at() -> None:
    whole = corpus(np.random.default_rng(0))[0]
    assert read_measured([*whole, *[b""] * 10_000]) is None
