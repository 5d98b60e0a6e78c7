"""Drafts: how many are read, which of them hold, and that what comes out is what plain decoding chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymoe.engine.drafting import MOST_KEPT, TRIED_EVERY, Acceptance, DraftBook, Drafting
from raymoe.engine.request import SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.placement.drafting import Line, best_drafts, expected_tokens, fitted

shares = st.floats(0.0, 1.0)
costs = st.floats(1e-4, 10.0)
lines = st.builds(Line, first=costs, more=st.floats(0.0, 10.0))
MOST = 8


# --- how many ---------------------------------------------------------------------------------------------


def test_tokens_of_a_pass() -> None:
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(1.0, 5) == 6.0
    assert expected_tokens(0.5, 2) == 1.75


@given(shares, lines, lines)
def test_no_other_depth_makes_more_tokens_per_second(acceptance: float, seconds: Line, loading: Line) -> None:
    def rate(drafts: int) -> float:
        return expected_tokens(acceptance, drafts) / max(seconds.at(1 + drafts), loading.at(1 + drafts))

    best = best_drafts(acceptance, seconds, loading, MOST)
    assert 0 <= best <= MOST
    assert all(rate(other) <= rate(best) for other in range(MOST + 1))
    assert all(rate(fewer) < rate(best) for fewer in range(best)), "the fewest of those that are equal"


@given(shares, shares, lines, lines)
def test_the_more_guesses_hold_the_more_are_read(first: float, second: float, seconds: Line, loading: Line) -> None:
    low, high = sorted((first, second))
    fewer, more = (best_drafts(acceptance, seconds, loading, MOST) for acceptance in (low, high))
    assert fewer <= more or expected_tokens(high, fewer) == pytest.approx(expected_tokens(high, more), rel=1e-9)


@pytest.mark.parametrize(
    ("acceptance", "seconds", "loading", "expected"),
    [
        (0.0, Line(first=1.0, more=0.1), Line(first=0.0, more=0.0), 0),  # none holds
        (1.0, Line(first=1.0, more=0.1), Line(first=0.0, more=0.0), 8),  # all hold, each costs a tenth
        (0.9, Line(first=1.0, more=0.0), Line(first=0.0, more=0.0), 8),  # they cost nothing
        (0.9, Line(first=1.0, more=1.0), Line(first=0.0, more=0.0), 0),  # as much as passes of their own
        (0.9, Line(first=1.0, more=0.0), Line(first=0.5, more=0.5), 1),  # loads are hidden for one more position
    ],
)
def test_what_a_longer_pass_costs_decides(acceptance: float, seconds: Line, loading: Line, expected: int) -> None:
    assert best_drafts(acceptance, seconds, loading, MOST) == expected


@given(lines, st.sets(st.integers(1, 9), min_size=2))
def test_a_line_is_found_again(line: Line, positions: set[int]) -> None:
    found = fitted({count: line.at(count) for count in positions})
    for count in range(1, 10):
        assert found.at(count) == pytest.approx(line.at(count), rel=1e-6, abs=1e-6)


@given(st.dictionaries(st.integers(1, 9), costs))
def test_a_line_never_falls_and_begins_above_nothing(means: dict[int, float]) -> None:
    found = fitted(means)
    assert found.more >= 0.0
    assert found.first > 0.0 or not means


def test_with_one_length_measured_the_line_goes_through_it() -> None:
    assert fitted({3: 6.0}).at(3) == pytest.approx(6.0)
    assert fitted({3: 6.0}).more > 0.0


# --- which there are --------------------------------------------------------------------------------------


def book(*guesses: tuple[int, int, int]) -> DraftBook:
    made = DraftBook()
    for position, epoch, token in guesses:
        made.put(position, epoch, token)
    return made


def test_drafts_follow_a_right_guess_without_a_gap() -> None:
    guessed = book((5, 0, 50), (6, 0, 60), (7, 0, 70), (9, 0, 90))
    assert guessed.read(5, 50) is True
    assert guessed.after(5, 8) == [60, 70]
    assert guessed.after(5, 1) == [60]


def test_what_follows_a_wrong_guess_is_forgotten() -> None:
    guessed = book((5, 0, 50), (6, 0, 60))
    assert guessed.read(5, 51) is False
    assert guessed.after(5, 8) == [] and len(guessed) == 0


def test_what_follows_a_token_that_nobody_guessed_is_no_draft() -> None:
    guessed = book((6, 0, 60))
    assert guessed.read(5, 50) is None
    assert guessed.after(5, 8) == []


def test_a_later_epoch_replaces_from_its_first_position_on() -> None:
    guessed = book((5, 0, 50), (6, 0, 60), (7, 0, 70), (6, 1, 61), (7, 0, 70))
    assert guessed.read(5, 50) is True
    assert guessed.after(5, 8) == [61], "what an earlier epoch says later is void too"


def test_it_does_not_grow_without_end() -> None:
    guessed = book(*((position, 0, 1) for position in range(10 * MOST_KEPT)))
    assert len(guessed) == MOST_KEPT


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 5)), max_size=30),
    st.integers(0, 12),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_drafts_are_the_newest_guesses_in_a_row(
    guesses: list[tuple[int, int, int]], position: int, token: int, most: int
) -> None:
    valid: dict[int, int] = {}
    last = 0
    for place, epoch, guess in guesses:
        if epoch >= last:
            valid = {p: t for p, t in valid.items() if epoch == last or p < place} | {place: guess}
            last = epoch
    guessed = book(*guesses)
    assert guessed.read(position, token) == (valid[position] == token if position in valid else None)
    expected: list[int] = []
    while valid.get(position) == token and len(expected) < most and position + 1 + len(expected) in valid:
        expected.append(valid[position + 1 + len(expected)])
    assert guessed.after(position, most) == expected


# --- how many are read ------------------------------------------------------------------------------------


@dataclass
class Source:
    """Guesses one token after the other, and notes what it is told."""

    coming: int = 0
    held: bool | None = True
    offers: list[int] = field(default_factory=lambda: list(range(100, 120)))
    read: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)

    def guesses(self, sequence: int, token: int, most: int) -> tuple[list[int], bool | None]:
        return self.offers[:most], self.held

    def reads(self, sequence: int, drafts: Sequence[int]) -> None:
        self.read.append(list(drafts))

    def accept(self, sequence: int, tokens: Sequence[int]) -> None:
        self.accepted.append(list(tokens))


def drafting(source: Source, most: int = 4, vocabulary: int = 1000) -> Drafting:
    return Drafting(source, most, vocabulary)


def test_the_shadow_is_told_of_a_depth_one_pass_before_it_is_used() -> None:
    source = Source()
    reading = drafting(source)
    reading.begin(1)
    for _ in range(200):
        told = source.coming
        drafts = reading.offer(1, 7, 10)
        assert drafts is not None and len(drafts) <= told
        assert source.read[-1] == drafts
        reading.note(1, drafts, len(drafts), 0.01 * (1 + 0.1 * len(drafts)), 4)
        assert source.accepted[-1] == drafts
    assert source.coming == 4


def test_guesses_that_never_hold_end_drafts_and_those_that_do_again_bring_them_back() -> None:
    source = Source(held=False)
    reading = drafting(source)
    reading.begin(1)

    def read(passes: int) -> list[int]:
        lengths = []
        for _ in range(passes):
            drafts = reading.offer(1, 7, 10) or []
            lengths.append(len(drafts))
            held = len(drafts) if source.held else 0
            reading.note(1, drafts, held, 0.01 * (1 + 0.5 * len(drafts)), 4)
        return lengths

    read(200)
    assert sum(read(2 * TRIED_EVERY)) <= 2, "but for one that is tried now and then"
    source.held = True
    read(200)
    assert sum(read(2 * TRIED_EVERY)) > 2 * TRIED_EVERY


def test_no_more_are_told_than_the_shadow_has_lately_had_ready() -> None:
    def told(offers: int) -> set[int]:
        source.offers = source.offers[:offers] if offers < len(source.offers) else list(range(100, 100 + offers))
        depths = set()
        for _ in range(50):
            drafts = reading.offer(1, 7, 10) or []
            reading.note(1, drafts, len(drafts), 0.01 * (1 + 0.1 * len(drafts)), 4)
            depths.add(source.coming)
        return depths

    source = Source()
    reading = drafting(source)
    reading.begin(1)
    told(20)
    assert told(2) <= {1, 2} and source.coming == 2
    source.held = False  # it had to begin anew: no news of how far ahead it gets
    source.offers = []
    reading.offer(1, 7, 10)
    assert source.coming == 2
    source.held = True
    told(20)
    assert source.coming == 4


def test_no_more_are_read_than_the_answer_has_room_for() -> None:
    reading = drafting(Source())
    reading.begin(1)
    assert reading.offer(1, 7, 2) == [100, 101]
    assert reading.offer(1, 7, 0) == []
    assert reading.offer(1, 7, -1) == []


def test_a_guess_that_is_no_token_ends_the_drafts() -> None:
    source = Source(offers=[5, 1000, 6])
    reading = drafting(source)
    reading.begin(1)
    assert reading.offer(1, 7, 10) == [5]
    assert source.read == [[5]]


def test_a_sequence_that_never_began_or_has_ended_has_none() -> None:
    reading = drafting(Source())
    assert reading.offer(1, 7, 10) is None
    reading.begin(1)
    reading.end(1)
    assert reading.offer(1, 7, 10) is None
    reading.note(1, [], 0, 0.01, 0)


@given(st.lists(st.booleans(), max_size=300))
def test_acceptance_is_a_share(guesses: list[bool]) -> None:
    acceptance = Acceptance()
    for held in guesses:
        acceptance.add(held)
    assert 0.0 <= acceptance.rate <= 1.0
    if len(guesses) == 300 and len(set(guesses)) == 1:
        assert acceptance.rate == pytest.approx(guesses[0], abs=1e-3)


# --- what is chosen ---------------------------------------------------------------------------------------

VOCABULARY = 16


def logits_after(tokens: Sequence[int]) -> torch.Tensor:
    """A model that looks at its last two tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens[-2:])) & 0xFFFF)
    return 2.0 * torch.randn(VOCABULARY, generator=generator)


def sampler(temperature: float, seed: int) -> Sampler:
    return Sampler(SamplingParams(temperature=temperature, seed=seed, presence_penalty=0.3), SamplingDefaults())


def plainly(temperature: float, seed: int, tokens: int) -> list[int]:
    choosing, answer = sampler(temperature, seed), [3]
    while len(answer) <= tokens:
        answer.append(choosing.choose(logits_after(answer), [1], answer[1:])[0])
    return answer[1:]


def with_drafts(temperature: float, seed: int, tokens: int, draw: np.random.Generator) -> tuple[list[int], int]:
    """The same with guesses, half of which are right; also how many held."""
    choosing, answer, held = sampler(temperature, seed), [3], 0
    shadow = sampler(temperature, seed)
    while len(answer) <= tokens:
        drafts: list[int] = []
        for _ in range(draw.integers(0, 5)):
            so_far = answer + drafts
            guess = shadow.choose(logits_after(so_far), [1], so_far[1:], len(so_far) - 1)[0]
            drafts.append(guess if draw.random() < 0.7 else int(draw.integers(VOCABULARY)))
        read = len(answer)
        for place in range(len(drafts) + 1):
            logits_V = logits_after(answer[:read] + drafts[:place])
            answer.append(choosing.choose(logits_V, [1], answer[1:])[0])
            if drafts[place : place + 1] != [answer[-1]]:
                break
            held += 1
    return answer[1:], held


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_drafts_change_no_choice(temperature: float, seed: int) -> None:
    expected = plainly(temperature, seed, 60)
    found, held = with_drafts(temperature, seed, 60, np.random.default_rng(seed))
    assert found[:60] == expected
    assert held > 10


def test_the_choices_are_distributed_as_the_softmax_says() -> None:
    """Drafts that hold and drafts that do not are each a biased choice of tokens; both together are the model's own."""
    after_draft, after_mistake = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for seed in range(4000):
        choosing = Sampler(SamplingParams(temperature=1.0, seed=seed), SamplingDefaults())
        first = choosing.choose(logits_after([3, 4]), [1], [3, 4])[0]
        # a shadow with other logits but the same noise, as where it is quantised
        guess = Sampler.by(choosing.recipe).choose(logits_after([3, 4]) * 0.9, [1], [3, 4], 0)[0]
        (after_draft if guess == first else after_mistake)[first] += 1
    both = after_draft + after_mistake
    probabilities = torch.softmax(logits_after([3, 4]), dim=-1).double().numpy()
    expected = probabilities / probabilities.sum() * both.sum()
    chi_square = float(((both - expected) ** 2 / expected).sum())
    assert chi_square < 37.7, "the 0.1% point for 15 degrees of freedom"
    assert after_draft.sum() > 0.5 * both.sum() and after_mistake.sum() > 0
