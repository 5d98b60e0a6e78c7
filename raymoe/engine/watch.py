"""Look on while the engine and the shadow work, and record what took how long. Neither knows of it.

T tokens, K experts per token, H hidden.
"""

from collections.abc import Sequence

import numpy as np
import torch

from predictor.forecast import LayerForecast
from predictor.shadow import ShadowCounts
from raymoe.engine.onlooker import Onlooker
from raymoe.engine.scheduler_protocol import RowScheduler, Scheduler
from raymoe.model.runner import SequenceState
from raymoe.model.trunk import ExpertBackend
from raymoe.observe.trace import Fact, Lane, Span, Tracer
from raymoe.types import Routing, SamplingRecipe, StepId


class WatchedScheduler(Onlooker):
    """What lies between two calls of the scheduler was the trunk's time."""

    def __init__(self, scheduler: Scheduler, backend: ExpertBackend, tracer: Tracer) -> None:
        super().__init__(scheduler, backend)
        self.tracer = tracer
        self._step: StepId | None = None
        self._tokens = 0
        self._mark_s: float | None = None

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read."""
        self._step, self._tokens = StepId(sequence=sequence, position=0), len(prompt)
        self._mark_s = self.tracer.now()
        super().begin(sequence, prompt, recipe)
        self._close("compute", "tell predictor")

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token of a sequence is about to be read; since the last forward, tokens were chosen and sent."""
        self._close("compute", "sample")
        self._step, self._tokens = StepId(sequence=sequence, position=state.length), 1
        self._mark_s = self.tracer.now()
        super().read(sequence, token, state)
        self._close("compute", "tell predictor")

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """The trunk has come to a layer's experts, and goes on when it has their outputs [T, K, H]."""
        self._tokens = len(experts_TK)
        self._close("compute", "trunk", layer)
        output_TKH = super().compute(layer, hidden_TH, experts_TK)
        self._close("wait", "experts", layer, tuple(experts_TK.unique().tolist()))
        return output_TKH

    def take_cost(self) -> Routing:
        """A forward has ended."""
        self._close("compute", "head")
        return super().take_cost()

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self._mark_s = None
        super().end(sequence)

    def _close(self, lane: Lane, kind: str, layer: int | None = None, experts: tuple[int, ...] = ()) -> None:
        """What was done since the mark was this; the mark is now."""
        now_s = self.tracer.now()
        if self._mark_s is not None:
            self.tracer.add(
                Span(
                    lane=lane,
                    kind=kind,
                    start_s=self._mark_s,
                    end_s=now_s,
                    layer=layer,
                    experts=experts,
                    step=self._step,
                    facts={"tokens": self._tokens},
                )
            )
            self._mark_s = now_s


class WatchedRows(WatchedScheduler):
    """The same for a policy under which requests may share a step: one span then is all rows'."""

    def take_costs(self, rows: int) -> list[Routing]:
        """A forward of so many rows has ended."""
        self._close("compute", "head")
        scheduler = self._scheduler
        assert isinstance(scheduler, RowScheduler), "it watches only such"
        return scheduler.take_costs(rows)


class ShadowWatch:
    """Spans of the shadow. Used by its thread, but for its making."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._idle_s: float | None = None
        self._start_s: float | None = None
        self._mark_s = 0.0
        self._before = (0, 0)
        self._layers: list[LayerForecast] = []

    def begin(self, counts: ShadowCounts) -> None:
        """It looks for a step to take."""
        self._start_s = self._mark_s = self.tracer.now()
        self._before = counts.steps, counts.wasted
        self._layers = []

    def foretold(self, forecast: LayerForecast) -> None:
        """It has come to a layer's router: since the one before, it has computed."""
        if self._start_s is not None:
            experts = tuple(np.unique(forecast.experts_TK).tolist())
            self._close("layer", forecast, layer=forecast.layer, experts=experts, epoch=forecast.epoch)
            self._layers.append(forecast)

    def ordered(self) -> None:
        """Load orders were sent, and the plan to the engine; news were taken in."""
        if self._start_s is not None and self._layers:
            self._close("orders", self._layers[-1], layer=self._layers[-1].layer)

    def end(self, counts: ShadowCounts, did: bool) -> None:
        """It has taken a step, left one, or had nothing to do."""
        if self._start_s is None:  # it had begun before anybody looked
            return
        if not did:
            self._idle_s = self._start_s if self._idle_s is None else self._idle_s
            return
        if self._idle_s is not None:
            self.tracer.add(Span(lane="wait", kind="wait for token", start_s=self._idle_s, end_s=self._start_s))
            self._idle_s = None
        steps, wasted = counts.steps - self._before[0], counts.wasted - self._before[1]
        left = bool(self._layers) and not steps
        if wasted - left:
            self._moment("roll back", self._start_s, wasted - left)
        if left:
            self._moment("step left", self.tracer.now(), 1)
        else:
            self._close("head" if self._layers else "prompt", self._layers[-1] if self._layers else None)

    def _moment(self, kind: str, at_s: float, steps: int) -> None:
        step = self._layers[-1].step if self._layers else None
        facts: dict[str, Fact] = {"steps": steps}
        self.tracer.add(Span(lane="compute", kind=kind, start_s=at_s, end_s=at_s, step=step, facts=facts))

    def _close(
        self,
        kind: str,
        of: LayerForecast | None,
        *,
        layer: int | None = None,
        experts: tuple[int, ...] = (),
        **facts: int,
    ) -> None:
        now_s = self.tracer.now()
        self.tracer.add(
            Span(
                lane="compute",
                kind=kind,
                start_s=self._mark_s,
                end_s=now_s,
                layer=layer,
                experts=experts,
                step=None if of is None else of.step,
                facts=dict(facts),
            )
        )
        self._mark_s = now_s
