"""What the engine knows of routing to come: it tells the shadow how the model goes on, and books the plans.

A plan says which experts a step is expected to need in a layer, and which worker was told to load each. It may come
late, or be made anew after the shadow took a step back; the last one counts for recall, the one at hand for asking.

T tokens, K experts per token, N experts of a plan.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from predictor.forecast import LayerForecast
from raymoe.config import PredictorConfig
from raymoe.engine.drafting import DraftBook
from raymoe.model.kv import abilities, entries, pack
from raymoe.model.runner import SequenceState
from raymoe.transport.shadow_messages import Begin, Draft, End, FromShadow, News, Plan, Token
from raymoe.types import Routing, SamplingRecipe, StepId

log = logging.getLogger(__name__)

SETTLED_AFTER = 2  # steps: by then the shadow has begun anew what it had to


class ShadowLink(Protocol):
    """The way to the shadow."""

    moves: int

    def tell(self, news: News) -> None:
        """Send; never waits."""
        ...

    def receive(self, on_told: Any) -> None:
        """Hand on every plan, forecast and draft that has come; never waits."""
        ...


class PlanBook:
    """Plans of current and coming steps, and what steps really needed. For recall ([O] equations 2 and 3).

    Attributes:
        lead_s: time by which plans came before their layer, summed over the ``led`` layers that had one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lead_s = 0.0
        self.led = 0
        self._clock = clock
        self._put_s: dict[StepId, dict[int, float]] = {}
        self._plans: dict[StepId, dict[int, Plan]] = {}
        self._needed: dict[StepId, dict[int, np.ndarray]] = {}
        self._named = 0
        self._pairs = 0

    def put(self, plan: Plan) -> None:
        """Book a plan, unless a later epoch's is there."""
        layers = self._plans.setdefault(plan.step, {})
        before = layers.get(plan.layer)
        if before is None or before.epoch <= plan.epoch:
            layers[plan.layer] = plan
            self._put_s.setdefault(plan.step, {}).setdefault(plan.layer, self._clock())

    def add(self, plan: Plan) -> None:
        """Book a plan beside those of its epoch for the same layer: each position of a pass has one."""
        before = self.plan(plan.step, plan.layer)
        self.put(plan if before is None or before.epoch != plan.epoch else joined(before, plan))

    def plan(self, step: StepId, layer: int) -> Plan | None:
        """The plan for a layer of a step, if there is one so far."""
        return self._plans.get(step, {}).get(layer)

    def needed(self, step: StepId, layer: int, experts_TK: np.ndarray) -> None:
        """Note what the router has chosen."""
        self._needed.setdefault(step, {})[layer] = experts_TK
        put_s = self._put_s.get(step, {}).pop(layer, None)
        if put_s is not None:
            self.lead_s += self._clock() - put_s
            self.led += 1

    def settle(self, sequence: int, position: int) -> None:
        """Count and forget the steps of a sequence before ``position``."""
        for step in [s for s in self._needed if s.sequence == sequence and s.position < position]:
            plans = self._plans.get(step, {})
            for layer, experts_TK in self._needed.pop(step).items():
                self._pairs += experts_TK.size
                if layer in plans:
                    self._named += int(np.isin(experts_TK, plans[layer].experts_N).sum())
        for step in [s for s in self._plans if s.sequence == sequence and s.position < position]:
            del self._plans[step]
            self._put_s.pop(step, None)

    def forget(self, sequence: int) -> None:
        """Plans of a sequence that are void, whatever their epoch."""
        for step in [s for s in self._plans if s.sequence == sequence]:
            del self._plans[step]
            self._put_s.pop(step, None)

    def take(self) -> Routing:
        """(token, expert) pairs settled since the last take, and how many of them had been named."""
        named, pairs, self._named, self._pairs = self._named, self._pairs, 0, 0
        return Routing(foretold=named, foretellable=pairs)


def joined(first: Plan, second: Plan) -> Plan:
    """Both plans of a layer of one step as one; an expert that both name is where the first has it."""
    fresh_N = ~np.isin(second.experts_N, first.experts_N)
    if not fresh_N.any():
        return first
    return replace(
        first,
        experts_N=np.concatenate([first.experts_N, second.experts_N[fresh_N]]),
        workers_N=np.concatenate([first.workers_N, second.workers_N[fresh_N]]),
    )


@dataclass(slots=True)
class _Followed:
    """A sequence that the shadow follows.

    Attributes:
        tokens: all so far, the one about to be read too.
        prompt: how many of them the shadow was given to begin with.
        unsent: the first position whose keys and values it lacks.
        moves: of the link, when it was given them.
        recipe: by which its tokens are chosen; answer: how many of its tokens were.
        is_alignable: whether its cache keeps anything by position; None before it is known.
        drafts: what the shadow guesses; reading: how many of them the next pass reads.
    """

    tokens: list[int]
    prompt: int
    unsent: int
    moves: int
    recipe: SamplingRecipe | None
    answer: int = 0
    is_alignable: bool | None = None
    drafts: DraftBook = field(default_factory=DraftBook)
    reading: int = 0


@dataclass
class Foresight:
    """Follows sequences for a predictor. Used by the engine's thread.

    Args:
        config: of the predictor; None where there is none, so that nothing is booked.
        link: to a shadow; None for predictors in this process.

    Attributes:
        step: the forward under way; None where nothing is foretold or ordered.
        in_prompt: whether that reads a prompt, of which nothing is foretold.
        on_plan: told of each plan that comes from the shadow.
        on_forecast: told of each forecast that comes from a shadow which leaves plans to the engine.
        on_anew: told of a sequence that another shadow takes up, which makes all orders for it so far void.
        plans_here: whether plans are made here of what the shadow foretells. Then what was not taken in was not ordered
            either, and a layer that has come does not wait for it to be planned.
        coming: drafts that passes to come will read.
    """

    config: PredictorConfig | None = None
    link: ShadowLink | None = None
    book: PlanBook = field(default_factory=PlanBook)
    step: StepId | None = None
    in_prompt: bool = False
    on_plan: Callable[[Plan], None] = lambda plan: None
    on_forecast: Callable[[LayerForecast], None] = lambda forecast: None
    on_anew: Callable[[int], None] = lambda sequence: None
    plans_here: bool = False
    coming: int = 0
    _followed: dict[int, _Followed] = field(default_factory=dict)

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """The model reads a prompt, and chooses by this recipe what follows."""
        self.step, self.in_prompt = StepId(sequence=sequence, position=0), True
        if self.config is not None:
            self._begin(sequence, list(prompt), recipe)

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """The model is about to read one more token of a sequence."""
        self.step, self.in_prompt = None, False
        followed = self._followed.get(sequence)
        if followed is None:
            return
        position = len(followed.tokens)
        followed.tokens.append(token)
        followed.answer += 1
        self.step = StepId(sequence=sequence, position=position)
        if self.link is not None:
            if self.link.moves != followed.moves:  # another shadow, or the same after a restart, knows nothing
                self.on_anew(sequence)
                self.book.forget(sequence)
                self._begin(sequence, followed.tokens, followed.recipe, followed.answer)
            else:
                self.link.tell(self._news(self.step, token, followed, state))
            followed.reading = 0
        self.book.settle(sequence, position - SETTLED_AFTER)

    def guesses(self, sequence: int, token: int, most: int) -> tuple[list[int], bool | None]:
        """What the shadow takes for the tokens after ``token``, which the model reads next; see ``DraftSource``."""
        followed = self._followed.get(sequence)
        if followed is None or self.link is None or self.link.moves != followed.moves:
            return [], None
        self.link.receive(self._put)
        position = len(followed.tokens)
        held = followed.drafts.read(position, token)
        return followed.drafts.after(position, most), held

    def reads(self, sequence: int, drafts: Sequence[int]) -> None:
        """The next pass reads these along."""
        if sequence in self._followed:
            self._followed[sequence].reading = len(drafts)

    def accept(self, sequence: int, tokens: Sequence[int]) -> None:
        """The model has chosen these, which it had read along."""
        followed = self._followed.get(sequence)
        if followed is not None:
            followed.tokens += tokens
            followed.answer += len(tokens)

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self.step, self.in_prompt = None, False
        if sequence not in self._followed:
            return
        if self.link is not None:
            self.link.receive(self._put)
            self.link.tell(End(sequence=sequence))
        del self._followed[sequence]
        self.book.settle(sequence, 1 << 62)

    def plan(self, layer: int) -> Plan | None:
        """Who was told to load what for a layer of the step under way, as far as is known now."""
        if self.step is None or self.in_prompt:
            return None
        plan = self.book.plan(self.step, layer) if self.plans_here else None
        if plan is None:
            self.listen()
            plan = self.book.plan(self.step, layer)
        return plan

    def listen(self) -> None:
        """Take in what the shadow has told. Never waits."""
        if self.link is not None:
            self.link.receive(self._put)

    def routed(self, layer: int, experts_TK: np.ndarray) -> None:
        """The router has chosen these experts."""
        if self.step is not None and not self.in_prompt:
            self.book.needed(self.step, layer, experts_TK)

    def _put(self, told: FromShadow) -> None:
        followed = self._followed.get(told.step.sequence)
        if followed is None:  # it comes too late for a sequence that has ended
            return
        if isinstance(told, Draft):
            followed.drafts.put(told.step.position, told.epoch, told.token)
        elif isinstance(told, LayerForecast):
            self.on_forecast(told)
        else:
            self.book.add(told)
            self.on_plan(told)

    def _news(self, step: StepId, token: int, followed: _Followed, state: SequenceState) -> Token:
        """The token, and where they are due the keys and values since they were last sent."""
        assert self.config is not None
        start, prompt, every = followed.unsent, followed.prompt, self.config.kv_align_every
        due = every > 0 and (step.position - prompt) // every > (start - prompt) // every
        plain = Token(step=step, token=token, drafts=followed.reading, coming=self.coming)
        cache = state.kwargs.get("past_key_values")
        if followed.is_alignable is None:
            followed.is_alignable = bool(abilities(cache).alignable)
        if not due or cache is None or not followed.is_alignable:
            return plain
        try:
            mine = entries(cache, start, step.position)
        except ValueError:  # a window has moved on: these are lost, and a forecast is worth no request
            log.warning("keys and values from position %d on are gone", start, exc_info=True)
            followed.unsent = step.position
            return plain
        followed.unsent = step.position
        return replace(plain, start=start, count=mine.tokens, dtype=mine.dtype, entries=pack(mine))

    def _begin(self, sequence: int, tokens: list[int], recipe: SamplingRecipe | None, answer: int = 0) -> None:
        """Give the shadow all tokens of a sequence so far, of which ``answer`` were chosen by the recipe."""
        if self.link is not None:
            self.link.tell(
                Begin(sequence=sequence, tokens=tuple(tokens), recipe=recipe, first=answer, coming=self.coming)
            )
        moves = self.link.moves if self.link is not None else 0
        self._followed[sequence] = _Followed(tokens, len(tokens), len(tokens), moves, recipe, answer)
