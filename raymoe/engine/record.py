"""Look on while the engine decodes, and note what was routed where: routing traces for ``raymoe simulate``.

Stands between the engine and its trunk, and their scheduler, as ``WatchedScheduler`` does; neither knows of it.

T tokens, L MoE layers, E experts, K experts per token, N steps, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import SchedulingConfig
from raymoe.engine.foresight import Foresight
from raymoe.engine.scheduler_protocol import Scheduler
from raymoe.errors import ConfigError
from raymoe.model.router import Router, attach_routers, backend_of
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.trunk import ExpertBackend
from raymoe.simulation.shape import ModelShape
from raymoe.simulation.trace import RoutingTrace
from raymoe.transport.shadow import Plan
from raymoe.types import Routing, SamplingRecipe


@dataclass(slots=True)
class _Step:
    """One decode step: the token that it reads, and by layer what was chosen, and the gate scores where known."""

    position: int
    token: int
    chosen: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)


class RecordingScheduler:
    """Notes every decode step of one token, and changes nothing. Used by the engine's thread.

    Attributes:
        on_step: told how many steps there are so far.
    """

    def __init__(self, scheduler: Scheduler, backend: ExpertBackend, routers: Sequence[Router]) -> None:
        self.on_step: Callable[[int], None] = lambda done: None
        self._scheduler = scheduler
        self._backend = backend
        self._routers = routers
        self._scored = all(router.rule is not None for router in routers)
        self._steps: list[_Step] = []
        self._plans: dict[tuple[int, int], Plan] = {}
        self._reads = False
        self._kv_bytes = 1

    @property
    def alpha(self) -> float | np.ndarray:
        """The scheduler's."""
        return self._scheduler.alpha

    @alpha.setter
    def alpha(self, alpha: float | np.ndarray) -> None:
        self._scheduler.alpha = alpha

    def begin(self, sequence: int, prompt: Sequence[int], recipe: SamplingRecipe | None = None) -> None:
        """A prompt is about to be read; of it nothing is noted."""
        self._reads = False
        self._scheduler.begin(sequence, prompt, recipe)

    def read(self, sequence: int, token: int, state: SequenceState) -> None:
        """One more token is about to be read."""
        self._reads = True
        self._steps.append(_Step(state.length, token))
        self._kv_bytes = max(1, Runner.cache_bytes(state) // max(1, state.length))
        self.on_step(len(self._steps))
        self._scheduler.read(sequence, token, state)

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scheduler's say on a router's choice, of which the choice itself is noted."""
        if self._reads and experts_TK.shape[0] == 1:
            step, router = self._steps[-1], self._routers[layer]
            step.chosen.append(_best_first(experts_TK, weights_TK))
            if self._scored:
                step.scores.append(router.scores_of(router.logits_TE)[0].astype(np.float16))
        return self._backend.route(layer, experts_TK, weights_TK)

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Outputs of experts [T, K, H]."""
        return self._backend.compute(layer, hidden_TH, experts_TK)

    def take_cost(self) -> Routing:
        """A forward has ended."""
        return self._scheduler.take_cost()

    def end(self, sequence: int) -> None:
        """A sequence is finished."""
        self._reads = False
        self._scheduler.end(sequence)

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings."""
        self._scheduler.reconfigure(scheduling)

    def planned(self, plan: Plan) -> None:
        """What the shadow named for a layer of a step; the last word counts."""
        place = plan.step.position, plan.layer
        before = self._plans.get(place)
        if before is None or before.epoch <= plan.epoch:
            self._plans[place] = plan

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
                plan = self._plans.get((step.position, layer))
                if plan is not None:
                    named = plan.experts_N[: shape.top_k]
                    foretold_NLK[n, layer, : len(named)] = named
        return foretold_NLK

    def _guessed(self, steps: Sequence[_Step], layers: int) -> np.ndarray:
        """A guess was wrong where the shadow began anew with its step: the epoch of its plans has risen."""
        guessed_N = np.ones(len(steps), dtype=bool)
        before = 0
        for n, step in enumerate(steps):
            plans = [self._plans.get((step.position, layer)) for layer in range(layers)]
            epoch = max((plan.epoch for plan in plans if plan is not None), default=before)
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
        foresight: of the engine, where a shadow tells it plans.
    """
    routers = attach_routers(model)
    recorder = RecordingScheduler(scheduler, backend, routers)
    modules = [module for _, module in experts_modules(model)]
    on_plan = None if foresight is None else foresight.on_plan
    if foresight is not None and on_plan is not None:
        own = on_plan

        def both(plan: Plan) -> None:
            own(plan)
            recorder.planned(plan)

        foresight.on_plan = both
    put(recorder)
    try:
        with backend_of(modules, recorder):
            yield recorder
    finally:
        put(scheduler)
        if foresight is not None and on_plan is not None:
            foresight.on_plan = on_plan


def _best_first(experts_1K: torch.Tensor, weights_1K: torch.Tensor) -> np.ndarray:
    order_K = torch.argsort(-weights_1K[0].float(), stable=True)
    return experts_1K[0][order_K].cpu().numpy().astype(np.int32)
