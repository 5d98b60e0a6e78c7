"""Drafts in the engine: a shadow's guesses that a pass reads along, how many of them, and which held.

The shadow guesses with the model's own recipe and noise. So nothing needs to be accepted or rejected by chance, as
where a draft model samples by itself: the model chooses the token after each position by its own sampler, with the
noise of that choice, and goes on for as long as the draft in that place is the token that it has chosen. What it emits
is what it would have emitted one by one, at any temperature; a draft only decides whether the logits are there already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raymoe.experts.costs import Cost
from raymoe.placement.drafting import best_drafts, fitted

MOST_KEPT = 256  # guesses of one sequence; a shadow is some dozens of positions ahead at most
FADING = 0.97  # weight of a guess when one more is known: about the last 30 count
ASSUMED = 0.8  # share of guesses that hold, before any is known
ASSUMED_GUESSES = 8.0  # what that is worth: as much as so many guesses
TRIED_EVERY = 16  # passes of a sequence, after which one of another length shows what that takes


class DraftBook:
    """A shadow's guesses for one sequence, by position."""

    def __init__(self) -> None:
        self._epoch = 0
        self._tokens: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def put(self, position: int, epoch: int, token: int) -> None:
        """Note a guess. One of a later epoch makes void what earlier ones said from its position on."""
        if epoch < self._epoch:
            return
        if epoch > self._epoch:
            self._epoch = epoch
            self._tokens = {other: guess for other, guess in self._tokens.items() if other < position}
        if len(self._tokens) < MOST_KEPT or position in self._tokens:
            self._tokens[position] = token

    def read(self, position: int, token: int) -> bool | None:
        """The model reads this token. Returns whether it was guessed; None where nobody guessed.

        What was said of earlier positions is forgotten; of later ones too, unless it follows from a right guess.
        """
        guess = self._tokens.get(position)
        held = guess == token
        self._tokens = {other: later for other, later in self._tokens.items() if other > position} if held else {}
        return None if guess is None else held

    def after(self, position: int, most: int) -> list[int]:
        """The guesses for the positions that follow without a gap, ``most`` at most."""
        found: list[int] = []
        while len(found) < most and (guess := self._tokens.get(position + 1 + len(found))) is not None:
            found.append(guess)
        return found


class DraftSource(Protocol):
    """Whoever hears the shadow's guesses, and tells it what the model reads.

    Attributes:
        coming: how many drafts the passes to come will read, as the shadow shall be told next.
    """

    coming: int

    def guesses(self, sequence: int, token: int, most: int) -> tuple[list[int], bool | None]:
        """What follows ``token`` by the shadow, ``most`` at most, and whether that had been guessed (None: by nobody).

        ``token`` is what the model reads next.
        """
        ...

    def reads(self, sequence: int, drafts: Sequence[int]) -> None:
        """The next pass reads these along."""
        ...

    def accept(self, sequence: int, tokens: Sequence[int]) -> None:
        """The model has chosen these, which it had read along."""
        ...


@dataclass(slots=True)
class Acceptance:
    """How often guesses hold, given that those before them did; the last ones count most."""

    held: float = ASSUMED * ASSUMED_GUESSES
    guesses: float = ASSUMED_GUESSES

    def add(self, held: bool) -> None:
        """One more is known."""
        self.held = self.held * FADING + held
        self.guesses = self.guesses * FADING + 1.0

    @property
    def rate(self) -> float:
        """From 0 to 1."""
        return self.held / self.guesses


@dataclass(slots=True)
class _Drafted:
    """One sequence.

    Attributes:
        depth: how many drafts its next pass may read: as many as the shadow was told.
        within: how many the shadow had ready lately. Where it is hardly faster than the model, more would be told it
            than it can guess in time, and what it has loads ordered for would be other passes than those that come.
    """

    acceptance: Acceptance
    depth: int
    within: int
    passes: int = 0


@dataclass
class Drafting:
    """Says how many drafts each pass reads. Used by the engine's thread.

    Args:
        most: drafts of one pass.
        vocabulary: a guess beyond it ends the drafts.
        load_s: seconds that one load more costs, with all links at work; 0 where nothing is loaded.
    """

    source: DraftSource
    most: int
    vocabulary: int
    load_s: Callable[[], float] = lambda: 0.0
    overall: Acceptance = field(default_factory=Acceptance)
    _sequences: dict[int, _Drafted] = field(default_factory=dict)
    _seconds: dict[int, Cost] = field(default_factory=dict)
    _loads: dict[int, Cost] = field(default_factory=dict)

    def begin(self, sequence: int) -> None:
        """A prompt is about to be read."""
        acceptance = Acceptance(self.overall.rate * ASSUMED_GUESSES, ASSUMED_GUESSES)
        drafted = _Drafted(acceptance, 0, self.most)
        self.source.coming = drafted.depth = self._depth(drafted)
        self._sequences[sequence] = drafted

    def offer(self, sequence: int, token: int, room: int) -> list[int] | None:
        """The drafts to read after ``token``, the next one: ``room`` at most. None: the sequence never has any."""
        drafted = self._sequences.get(sequence)
        if drafted is None:
            return None
        known, held = self.source.guesses(sequence, token, self.most)
        unknown = (place for place, draft in enumerate(known) if draft >= self.vocabulary)
        known = known[: next(unknown, len(known))]
        drafts = known[: max(0, min(drafted.depth, room))]
        if held is not None:
            self._learn(drafted, held)
        if held is not False:  # where the shadow had to begin anew, it is not known how far ahead it gets
            drafted.within = len(known)
        drafted.passes += 1
        self.source.coming = drafted.depth = self._depth(drafted)
        self.source.reads(sequence, drafts)
        return drafts

    def note(self, sequence: int, drafts: Sequence[int], held: int, took_s: float, loads: int) -> None:
        """A pass has read these drafts, of which the first ``held`` hold; what it took, and how many loads began."""
        positions = 1 + len(drafts)
        self._seconds.setdefault(positions, Cost()).add(took_s)
        self._loads.setdefault(positions, Cost()).add(loads)
        drafted = self._sequences.get(sequence)
        if drafted is not None:
            for _ in range(held):
                self._learn(drafted, True)
            self.source.accept(sequence, drafts[:held])

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self._sequences.pop(sequence, None)

    def _learn(self, drafted: _Drafted, held: bool) -> None:
        drafted.acceptance.add(held)
        self.overall.add(held)

    def _depth(self, drafted: _Drafted) -> int:
        """The best number of drafts; now and then one beside it, for what is never tried is never known."""
        seconds, loads = fitted(_means(self._seconds)), fitted(_means(self._loads))
        best = best_drafts(drafted.acceptance.rate, seconds, loads.times(self.load_s()), self.most)
        turn = drafted.passes % (2 * TRIED_EVERY)
        if drafted.passes and turn in (0, TRIED_EVERY):
            best = min(max(best + (1 if turn else -1), 0), self.most)
        return min(best, drafted.within)


def _means(costs: dict[int, Cost]) -> dict[int, float]:
    return {positions: mean for positions, cost in costs.items() if (mean := cost.mean_s) is not None}
