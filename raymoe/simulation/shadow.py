"""A simulated shadow: when it knows what, and how often it has to begin anew.

As the real one (``predictor/shadow.py``) it goes on from its own guess of the next token, some steps beyond the last
token that is known; where the guess was wrong it takes the steps back and leaves the one under way at its next layer.
What it names comes from the trace; while it reads a wrong token, from another step of it.

K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raymoe.simulation.loop import EventLoop
from raymoe.simulation.setting import ShadowTimes
from raymoe.simulation.trace import RoutingTrace

ELSEWHERE = 7919  # a prime, so that wrong tokens lead to steps all over the trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """One layer of one step to come.

    Attributes:
        start: first position of the pass that will read it; with drafts a pass reads several.
        experts_K: best first.
        scores_E: gate scores of all experts; None where nobody asks for them.
    """

    position: int
    start: int
    epoch: int
    layer: int
    experts_K: np.ndarray
    scores_E: np.ndarray | None = None


class Routes:
    """A trace without an end: after its last step comes its first one again."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self._foretold = trace.chosen_NLK if trace.foretold_NLK is None else trace.foretold_NLK

    def guessed(self, position: int) -> bool:
        """Whether the shadow guesses the token that is read there."""
        guessed_N = self.trace.guessed_N
        return guessed_N is None or bool(guessed_N[position % self.trace.steps])

    def foretold(self, position: int, layer: int, *, lost: bool) -> np.ndarray:
        """What it names."""
        step = self.elsewhere(position) if lost else position % self.trace.steps
        named_K = self._foretold[step, layer]
        return named_K[named_K >= 0]

    def foretold_scores(self, position: int, layer: int, *, lost: bool) -> np.ndarray:
        """The gate scores that it has when it names that. A trace holds the true ones, and they stand for them.

        An expert that is named in place of a chosen one has changed scores with it: the best with the best.
        """
        assert self.trace.scores_NLE is not None, "checked before"
        step = self.elsewhere(position) if lost else position % self.trace.steps
        scores_E = self.trace.scores_NLE[step, layer].astype(np.float32)
        named_K, chosen_K = self._foretold[step, layer], self.trace.chosen_NLK[step, layer]
        wrong = [expert for expert in named_K.tolist() if expert >= 0 and expert not in chosen_K]
        missed = [expert for expert in chosen_K.tolist() if expert not in named_K]
        for mine, other in zip(missed, wrong, strict=False):
            scores_E[mine], scores_E[other] = scores_E[other], scores_E[mine]
        return scores_E

    def elsewhere(self, position: int) -> int:
        """The step that a wrong token leads to instead."""
        return (position * ELSEWHERE + 1) % self.trace.steps


class SimShadow:
    """Runs ahead.

    Args:
        drafts: how many tokens beside the first a pass reads at most.
        tells_scores: whether forecasts carry gate scores.

    Attributes:
        foretell: told of each layer as soon as it is known.
        busy_s: seconds of computing so far; steps: taken; wasted: taken or begun in vain.
        guessed_s: when the token of a position was guessed, for those that are not known yet.
    """

    def __init__(
        self,
        loop: EventLoop,
        times: ShadowTimes,
        routes: Routes,
        foretell: Callable[[Foretold], None],
        drafts: int = 0,
        *,
        tells_scores: bool = False,
    ) -> None:
        self.busy_s = 0.0
        self.steps = self.wasted = 0
        self.guessed_s: dict[int, float] = {}
        self._loop, self._times, self._routes, self._foretell = loop, times, routes, foretell
        self._layers = routes.trace.shape.layers
        self._depth = drafts + 1
        self._tells_scores = tells_scores
        self._position = 0  # the one to be read next
        self._pass = (0, 0)  # first position and count of the pass in hand
        self._epoch = 0
        self._lost = False
        self._reading: tuple[int, int, bool] | None = None  # position, epoch, whether by a wrong token
        self._overtaken = False

    def told(self, start: int, count: int) -> None:
        """The model reads ``count`` positions from here on, of which the first one's token is known now."""
        self._pass = start, count
        reached = self._position if self._reading is None else self._reading[0]
        if start <= reached and not self._routes.guessed(start):
            self._epoch += 1
            self._lost = False
            self.wasted += reached - start + (self._reading is not None)
            self._overtaken = self._reading is not None
            self._position = start
            self.guessed_s = {}
        self.guessed_s = {position: at_s for position, at_s in self.guessed_s.items() if position > start}
        self._begin()

    def drafts(self, start: int, most: int, by_s: float) -> int:
        """How many tokens after ``start`` had been guessed by then, one after the other."""
        count = 0
        while count < most and self.guessed_s.get(start + 1 + count, by_s + 1) <= by_s:
            count += 1
        return count

    def _begin(self) -> None:
        if self._reading is not None:
            return
        start, count = self._pass
        if self._position < start:  # keys and values of what the model has read were taken over
            self._position = start
            self._lost = False
        if self._position >= start + count + self._times.run_ahead * self._depth:
            return
        if self._position > start and not self._routes.guessed(self._position):
            self._lost = True
        self._reading = self._position, self._epoch, self._lost
        self._loop.at(self._loop.now_s + self._times.layer_s, self._layer, 0)

    def _layer(self, layer: int) -> None:
        assert self._reading is not None
        position, epoch, lost = self._reading
        self.busy_s += self._times.layer_s
        self._foretell(
            Foretold(
                position=position,
                start=self._first(position),
                epoch=epoch,
                layer=layer,
                experts_K=self._routes.foretold(position, layer, lost=lost),
                scores_E=self._routes.foretold_scores(position, layer, lost=lost) if self._tells_scores else None,
            )
        )
        if self._left():
            return
        if layer + 1 < self._layers:
            self._loop.at(self._loop.now_s + self._times.layer_s, self._layer, layer + 1)
        else:
            self._loop.at(self._loop.now_s + self._times.head_s, self._ended)

    def _ended(self) -> None:
        assert self._reading is not None
        self.busy_s += self._times.head_s
        if self._left():
            return
        position = self._reading[0]
        self.steps += 1
        self._reading = None
        self._position = max(self._position, position + 1)
        self.guessed_s[position + 1] = self._loop.now_s
        self._begin()

    def _left(self) -> bool:
        """Leave the step under way if it reads a wrong token."""
        if not self._overtaken:
            return False
        self._overtaken, self._reading = False, None
        self._begin()
        return True

    def _first(self, position: int) -> int:
        """First position of the pass that will read it, if all goes as it does."""
        start, count = self._pass
        after = start + count
        return start if position < after else after + (position - after) // self._depth * self._depth
