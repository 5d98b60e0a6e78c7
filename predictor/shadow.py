"""The shadow: a quantised copy of the model that runs ahead of it and so knows its routing (SEP of OD-MoE,
arXiv 2512.03927, section on the emulative predictor).

The model tells each token that it will read, and the keys and values of those that it has read. With that the shadow
aligns itself: it continues from the model's token, and overwrites its own keys and values. Both have a period of their
own; without any alignment it drifts off within some dozens of tokens.

The paper's shadow departs late: it waits for the model's token, so that the first layers of a step are foretold no
sooner than they are reached. Here it goes on from *its own* next token. Where the model's differs, it takes the step
back (crops its caches) and begins it anew, in a new epoch of the sequence; a step under way is left at its next layer.

Its own next tokens are drafts: the model may read them along and see which of them it would have chosen itself. Its
passes then read several positions each, and forecasts are labelled by passes (``Passes``).

B rows decoded in lockstep (one where a model is served), K experts per token, E experts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from predictor.forecast import LayerForecast
from predictor.passes import Passes
from predictor.shadow_model import ShadowModel
from raymoe.model.kv import KvEntries
from raymoe.types import StepId

RUN_AHEAD = 2  # passes beyond the one in hand; workers' few slots hold no more, and guesses get worse

Rows = tuple[int, ...]
"""One token of each row."""

Guess = Callable[[int, torch.Tensor], Rows]
"""The token of each row that a step reads, from its number, counted from the prompt on, and logits [B, vocabulary]."""

OnDraft = Callable[[StepId, int, Rows], None]
"""Told of each token that the shadow has chosen itself: where it is read, the epoch, and the token of each row."""


class Overtaken(Exception):
    """The step under way reads another token than the model. Never leaves ``Shadow``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How the shadow follows the model; periods in steps, 0 is never.

    Attributes:
        run_ahead: passes of the model that it may be ahead.
        drafts: most of its own tokens that a pass of the model reads along; 0: nobody wants to know them.
    """

    token_every: int = 1
    kv_every: int = 1
    run_ahead: int = RUN_AHEAD
    drafts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the model told of a sequence: it is about to read ``tokens`` at ``position``, and drafts after it.

    Attributes:
        drafts: that it reads along; coming: those that its next passes will read, as far as is known.
        entries: its keys and values of positions before that, from ``start`` on; None where none came along.
    """

    position: int
    tokens: Rows
    drafts: int = 0
    coming: int = 0
    entries: KvEntries | None = None
    start: int = 0


@dataclass(slots=True)
class _Sequence:
    """One sequence, or several in lockstep.

    Attributes:
        tokens: by position, as the shadow reads them: the model's where it aligns, else its own.
        heard: the model's, by position, as far as the shadow has none of its own yet.
        computed: positions that are in the caches; known: positions whose token the model has told.
        passes: of the model, as far as is known.
        epoch: how often forecasts have begun anew.
        guess: how the next token is chosen.
    """

    id: int
    prompt: int
    tokens: list[Rows]
    known: int
    passes: Passes
    guess: Guess
    computed: int = 0
    epoch: int = 0
    told: deque[Told] = field(default_factory=deque)
    heard: dict[int, Rows] = field(default_factory=dict)


@dataclass(slots=True)
class ShadowCounts:
    """Totals since the start: steps run, those that were left or taken back, tokens guessed as the model had them."""

    steps: int = 0
    wasted: int = 0
    guesses: int = 0
    right: int = 0


class Shadow:
    """Runs a shadow model for several sequences. Used by one thread.

    ``step`` does the work; ``begin``, ``tell`` and ``end`` only note what it shall do, so that they may be called from
    within ``on_forecast``.

    Args:
        on_forecast: told of each layer's routing as soon as it is known.
        on_draft: told of each token that the shadow has chosen itself.
        guess: how the shadow chooses its own next token; greedily where omitted.

    Attributes:
        counts: totals.
        alignment: may be changed between sequences.
    """

    def __init__(
        self,
        model: ShadowModel,
        alignment: Alignment,
        on_forecast: Callable[[LayerForecast], None],
        guess: Guess | None = None,
        on_draft: OnDraft = lambda step, epoch, tokens: None,
    ) -> None:
        self.counts = ShadowCounts()
        self._model = model
        self.alignment = alignment
        self.on_forecast = on_forecast
        self.on_draft = on_draft
        self._guess = guess or greedy
        self._sequences: dict[int, _Sequence] = {}
        self._current: _Sequence | None = None
        model.on_routed = self._routed

    # --- what is told -----------------------------------------------------------------------------------

    def begin(
        self, sequence: int, rows: Sequence[Sequence[int]], guess: Guess | None = None, *, coming: int = 0
    ) -> None:
        """The model reads these prompts, all of one length.

        Args:
            guess: how the sequence's next tokens are chosen, where not as the shadow's otherwise are.
            coming: drafts that the first passes after the prompt will read.
        """
        tokens = [tuple(column) for column in zip(*rows, strict=True)]
        before = self._sequences.get(sequence)
        epoch = 0 if before is None else before.epoch + 1  # orders of the life before may still be on their way
        self.end(sequence)
        passes = Passes(first=0, reads=len(tokens), each=1 + coming)
        begun = _Sequence(sequence, len(tokens), tokens, len(tokens), passes, guess or self._guess, epoch=epoch)
        self._sequences[sequence] = begun

    def tokens(self, sequence: int) -> list[Rows]:
        """All tokens of a sequence so far, by position, as the shadow reads them."""
        return self._sequences[sequence].tokens

    def tell(self, sequence: int, told: Told) -> None:
        """The model goes on. Positions come one by one; sequences that are not known are ignored."""
        if sequence in self._sequences:
            self._sequences[sequence].told.append(told)

    def end(self, sequence: int) -> None:
        """The sequence is finished."""
        if self._sequences.pop(sequence, None) is not None:
            self._model.forget(sequence)

    # --- the work ---------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Read one more token of the sequence that is furthest behind. Returns whether there was anything to do."""
        for sequence in self._sequences.values():
            while sequence.told:
                self._follow(sequence, sequence.told.popleft())
        ready = [sequence for sequence in self._sequences.values() if self._may_step(sequence)]
        if not ready:
            return False
        sequence = min(ready, key=lambda other: other.computed - other.known)
        try:
            self._advance(sequence)
        except Overtaken:
            self.counts.wasted += 1
        finally:
            self._current = None
            if sequence.id not in self._sequences:  # it ended meanwhile
                self._model.forget(sequence.id)
        return True

    def _may_step(self, sequence: _Sequence) -> bool:
        ahead = self.alignment.run_ahead if self._model.may_run_ahead(sequence.id) else 0
        return sequence.computed < min(sequence.passes.end(ahead), len(sequence.tokens))

    def _advance(self, sequence: _Sequence) -> None:
        if not sequence.computed:
            logits_BV = self._model.prefill(sequence.id, list(zip(*sequence.tokens[: sequence.prompt], strict=True)))
            sequence.computed = sequence.prompt
        else:
            self._current = sequence
            logits_BV = self._model.decode(sequence.id, list(sequence.tokens[sequence.computed]))
            sequence.computed += 1
            self.counts.steps += 1
        if len(sequence.tokens) == sequence.computed:
            step = sequence.computed - sequence.prompt
            guessed, heard = sequence.guess(step, logits_BV), sequence.heard.pop(sequence.computed, None)
            if heard is not None:
                self._count(guessed, heard)
            follows = heard is not None and is_due(self.alignment.token_every, step)
            sequence.tokens.append(heard if follows and heard is not None else guessed)
            if not follows:
                self.on_draft(StepId(sequence=sequence.id, position=sequence.computed), sequence.epoch, guessed)

    def _routed(self, layer: int, experts_TK: np.ndarray, scores_TE: np.ndarray) -> None:
        """The model's router has chosen; in a prompt it is not asked for."""
        sequence = self._current
        if sequence is None:
            return
        step = StepId(sequence=sequence.id, position=sequence.passes.of(sequence.computed))
        self.on_forecast(
            LayerForecast(step=step, epoch=sequence.epoch, layer=layer, experts_TK=experts_TK, scores_TE=scores_TE)
        )
        if self._sequences.get(sequence.id) is not sequence or self._is_overtaken(sequence):
            raise Overtaken

    def _is_overtaken(self, sequence: _Sequence) -> bool:
        """Whether what was told meanwhile makes the step under way read a wrong token."""
        if not self._model.may_run_ahead(sequence.id):  # what can't be taken back must be finished
            return False
        return any(
            told.position <= sequence.computed
            and is_due(self.alignment.token_every, told.position - sequence.prompt)
            and sequence.tokens[told.position] != told.tokens
            for told in sequence.told
        )

    # --- alignment --------------------------------------------------------------------------------------

    def _follow(self, sequence: _Sequence, told: Told) -> None:
        """Align with what was told: the token, then keys and values."""
        held = min(told.position - sequence.known, sequence.passes.reads - 1)  # drafts that the model went past
        if held > 0:
            self._count(told.tokens * held, told.tokens * held)
        if told.position < len(sequence.tokens):
            self._compare(sequence, told)
        elif told.position == len(sequence.tokens) and is_due(
            self.alignment.token_every, told.position - sequence.prompt
        ):
            sequence.tokens.append(told.tokens)
        else:
            sequence.heard[told.position] = told.tokens
        sequence.known = told.position + 1
        sequence.passes = Passes(first=told.position, reads=1 + told.drafts, each=1 + told.coming)
        if told.entries is not None and sequence.computed:
            self._align_entries(sequence, told.entries, told.start)

    def _compare(self, sequence: _Sequence, told: Told) -> None:
        guessed = sequence.tokens[told.position]
        self._count(guessed, told.tokens)
        if guessed == told.tokens or not is_due(self.alignment.token_every, told.position - sequence.prompt):
            return
        del sequence.tokens[told.position :]
        sequence.tokens.append(told.tokens)
        sequence.epoch += 1
        if sequence.computed > told.position:
            self.counts.wasted += sequence.computed - told.position
            sequence.computed = told.position
            self._model.back_to(sequence.id, told.position)

    def _align_entries(self, sequence: _Sequence, entries: KvEntries, start: int) -> None:
        """Overwrite what is in the caches; positions not computed so far are taken over instead, where that is all."""
        end = start + entries.tokens
        if self._model.align(sequence.id, start, entries) and start <= sequence.computed < end:
            self._catch_up(sequence, end)

    def _catch_up(self, sequence: _Sequence, end: int) -> None:
        """The model's keys and values were appended, so the shadow has read what the model has, for nothing."""
        sequence.computed = end
        for position in range(len(sequence.tokens), end + 1):  # where the news of one were lost, any keeps its place
            sequence.tokens.append(sequence.heard.pop(position, sequence.tokens[-1]))

    def _count(self, guessed: Rows, heard: Rows) -> None:
        self.counts.guesses += len(guessed)
        self.counts.right += sum(mine == theirs for mine, theirs in zip(guessed, heard, strict=True))


def is_due(every: int, step: int) -> bool:
    """Whether an alignment of this period is due in a step, counted from the prompt on; a period of 0 never is."""
    return every > 0 and step % every == 0


def greedy(_step: int, logits_BV: torch.Tensor) -> Rows:
    """The likeliest token of each row."""
    return tuple(logits_BV.argmax(dim=-1).tolist())
