"""Look on while the engine decodes, and note what was routed where: routing traces for ``raymoe simulate``.

T tokens, L MoE layers, E experts, K experts per token, N steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from predictor.forecast import LayerForecast
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.engine.foresight import Foresight
from raymoe.engine.onlooker import Onlooker
from raymoe.engine.scheduler_protocol import Scheduler
from raymoe.errors import ConfigError
from raymoe.model.router import Router, attach_routers, backend_of
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.trunk import ExpertBackend
from raymoe.placement.assignment import in_order_of_need
from raymoe.simulation.shape import ModelShape
from raymoe.simulation.trace import RoutingTrace
from raymoe.transport.shadow_messages import Plan
from raymoe.types import SamplingRecipe


@dataclass(slots=True)
class _Step:
    """One decode step: the token that it reads, and by layer what was chosen, and the gate scores where known."""

    position: int
    token: int
    chosen: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Named:
    """What the shadow named for a layer of a step, best first."""

    epoch: int
    experts_N: np.ndarray


class RecordingScheduler(Onlooker):
    """Notes every decode step of one token.

    Attributes:
        on_step: told how many steps there are so far.
    """

    def __init__(self, scheduler: Scheduler, backend: ExpertBackend, routers: Sequence[Router]) -> None:
        super().__init__(scheduler, backend)
        self.on_step: Callable[[int], None] = lambda done: None
        self._routers = routers
        self._scored = all(router.rule is not None for router in routers)
        self._steps: list[_Step] = []
        self._named: dict[tuple[int, int], _Named] = {}
        self._reads = False
        self._kv_bytes = 1

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read; of it nothing is noted."""
        self._reads = False
        super().begin(sequence, prompt, recipe)

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token is about to be read."""
        self._reads = True
        self._steps.append(_Step(state.length, token))
        self._kv_bytes = max(1, Runner.cache_bytes(state) // max(1, state.length))
        self.on_step(len(self._steps))
        super().read(sequence, token, state)

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's say on a router's choice, of which the choice itself is noted."""
        if self._reads and experts_TK.shape[0] == 1:
            step, router = self._steps[-1], self._routers[layer]
            step.chosen.append(_best_first(experts_TK, weights_TK))
            if self._scored:
                step.scores.append(router.scores_of(router.logits_TE)[0].astype(np.float16))
        return super().route(layer, experts_TK, weights_TK)

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self._reads = False
        super().end(sequence)

    def planned(self, plan: Plan) -> None:
        """What the shadow named for a layer of a step, and had loaded; the last word counts."""
        self._name((plan.step.position, plan.layer), _Named(plan.epoch, plan.experts_N))

    def foretold(self, forecast: LayerForecast) -> None:
        """What it named where it leaves plans to the engine, as it is before anything is replaced."""
        named = _Named(forecast.epoch, in_order_of_need(forecast.experts_TK))
        self._name((forecast.step.position, forecast.layer), named)

    def _name(self, place: tuple[int, int], named: _Named) -> None:
        before = self._named.get(place)
        if before is None or before.epoch <= named.epoch:
            self._named[place] = named

    # --- afterwards -------------------------------------------------------------------------------------

    def trace(self, checkpoint: Checkpoint, about: dict[str, str], *, has_shadow: bool) -> RoutingTrace:
        """What was recorded.

        Raises ConfigError for a model whose layers differ in how many experts they choose, or where nothing was.
        """
        shape = self._shape(checkpoint)
        steps = [step for step in self._steps if len(step.chosen) == shape.layers]
        if not steps:
            raise ConfigError("no decode step was recorded; ask for more --tokens")
        return RoutingTrace(
            shape=shape,
            chosen_NLK=np.stack([np.stack(step.chosen) for step in steps]).astype(np.int32),
            scores_NLE=np.stack([np.stack(step.scores) for step in steps]) if self._scored else None,
            tokens_N=np.array([step.token for step in steps], dtype=np.int32),
            foretold_NLK=self._foretold(steps, shape) if has_shadow else None,
            guessed_N=self._guessed(steps, shape.layers) if has_shadow else None,
            about=about,
        )

    def _shape(self, checkpoint: Checkpoint) -> ModelShape:
        sizes = checkpoint.sizes()
        kinds = {(size.experts, size.top_k) for size in sizes}
        if len(kinds) > 1:
            raise ConfigError(f"layers that differ in experts and top-k ({sorted(kinds)}) can't be simulated yet")
        config = checkpoint.config.get_text_config(decoder=True)
        return ModelShape(
            name=str(checkpoint.config.model_type),
            layers=len(sizes),
            experts=sizes[0].experts,
            top_k=sizes[0].top_k,
            expert_bytes=max(size.expert_bytes for size in sizes),
            trunk_bytes=checkpoint.trunk_bytes,
            row_bytes=int(config.hidden_size) * checkpoint.dtype.itemsize,
            kv_bytes=self._kv_bytes,
            weight_bytes=checkpoint.dtype.itemsize,
        )

    def _foretold(self, steps: Sequence[_Step], shape: ModelShape) -> np.ndarray:
        foretold_NLK = np.full((len(steps), shape.layers, shape.top_k), -1, dtype=np.int32)
        for n, step in enumerate(steps):
            for layer in range(shape.layers):
                named = self._named.get((step.position, layer))
                if named is not None:
                    experts_K = named.experts_N[: shape.top_k]
                    foretold_NLK[n, layer, : len(experts_K)] = experts_K
        return foretold_NLK

    def _guessed(self, steps: Sequence[_Step], layers: int) -> np.ndarray:
        """A guess was wrong where the shadow began anew with its step: the epoch of what it named has risen."""
        guessed_N = np.ones(len(steps), dtype=bool)
        before = 0
        for n, step in enumerate(steps):
            named = [self._named.get((step.position, layer)) for layer in range(layers)]
            epoch = max((one.epoch for one in named if one is not None), default=before)
            guessed_N[n] = epoch <= before
            before = epoch
        return guessed_N


@contextmanager
def recording(
    model: torch.nn.Module,
    scheduler: Scheduler,
    backend: ExpertBackend,
    put: Callable[[Scheduler], None],
    foresight: Foresight | None,
) -> Iterator[RecordingScheduler]:
    """While open, note what the trunk routes. No request may be under way at either end.

    Args:
        put: makes the engine use another scheduler.
        foresight: of the engine, where a shadow tells it plans or forecasts.
    """
    routers = attach_routers(model)
    recorder = RecordingScheduler(scheduler, backend, routers)
    modules = [module for _, module in experts_modules(model)]
    told = None if foresight is None else (foresight.on_plan, foresight.on_forecast)
    if foresight is not None and told is not None:
        on_plan, on_forecast = told

        def both(plan: Plan) -> None:
            on_plan(plan)
            recorder.planned(plan)

        def both_of(forecast: LayerForecast) -> None:
            on_forecast(forecast)
            recorder.foretold(forecast)

        foresight.on_plan, foresight.on_forecast = both, both_of
    put(recorder)
    try:
        with backend_of(modules, recorder):
            yield recorder
    finally:
        put(scheduler)
        if foresight is not None and told is not None:
            foresight.on_plan, foresight.on_forecast = told


def _best_first(experts_1K: torch.Tensor, weights_1K: torch.Tensor) -> np.ndarray:
    order_K = torch.argsort(-weights_1K[0].float(), stable=True)
    return experts_1K[0][order_K].cpu().numpy().astype(np.int32)
