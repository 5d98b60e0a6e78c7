"""Decode steps of a synthetic model under one policy after the other, all over the same trunk and host memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.device.synthetic import GivenRouting, Shape, freed, keys_of, moe_layers, on_device
from raymoe.checkpoint.architectures import experts_modules
from raymoe.config import SchedulingConfig
from raymoe.engine.dialogue import Share
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.engine.turns import DeviceTurns
from raymoe.experts.host_store import HostStore
from raymoe.experts.loader import Loader
from raymoe.experts.worker import ExpertWorker
from raymoe.kernels.gpu import GpuKernels
from raymoe.kernels.native import NativeKernels
from raymoe.model.captured import CapturedDecode, Recorder
from raymoe.model.runner import Runner
from raymoe.placement.prefetch import wanted
from raymoe.types import DeviceName, LayerSize, Routing

NAME = DeviceName("gpu")
PROMPT = 32  # tokens; decode steps read little of the cache beside their weights
SHADOW_ROWS = 6  # layers after which its forecasts go out
SHADOW_AHEAD = 12  # layers: what a shadow foretells is ordered so far ahead of need


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a variant schedules.

    Attributes:
        foreseen: "gate" is forecast one layer ahead on the device, "shadow" several by somebody else; "" not at all.
    """

    name: str
    scheduling: SchedulingConfig
    alpha: float = 0.0
    foreseen: str = ""


RESIDENT = Policy(name="resident", scheduling=SchedulingConfig(policy="all_resident"))
LRU = Policy(name="lru", scheduling=SchedulingConfig(policy="on_demand"))


def importance(alpha: float, prefetch: str, host_assist: bool = False) -> SchedulingConfig:
    """Of policy importance."""
    return SchedulingConfig.model_validate(
        {"policy": "importance", "alpha": alpha, "prefetch": prefetch, "host_assist": host_assist}
    )


def by_importance(alpha: float, prefetch: str, host_assist: bool) -> Policy:
    """One whose name tells all."""
    name = f"importance_{alpha:g}{'_gate' if prefetch == 'gate' else ''}{'_assist' if host_assist else ''}"
    foreseen = "gate" if prefetch == "gate" else ""
    return Policy(name=name, scheduling=importance(alpha, prefetch, host_assist), alpha=alpha, foreseen=foreseen)


SHADOW = Policy(name="shadow", scheduling=importance(0.0, "none"), foreseen="shadow")
POLICIES = (
    LRU,
    by_importance(0.25, "none", False),
    by_importance(0.5, "none", False),
    by_importance(0.25, "none", True),
    by_importance(0.25, "gate", False),
    SHADOW,
    Policy(name="shadow_0.25", scheduling=importance(0.25, "none"), alpha=0.25, foreseen="shadow"),
)
WORST = (LRU, SHADOW)  # where routing has nothing to learn from, only being told helps


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Routing for so many steps, on the host.

    Attributes:
        logits_NLE: the routers'; gate_NLE, shadow_NLE: as forecasts see them.
    """

    name: str
    logits_NLE: np.ndarray
    gate_NLE: np.ndarray
    shadow_NLE: np.ndarray


@dataclass(slots=True, kw_only=True)
class Timed:
    """What decode steps took.

    Attributes:
        step_s: each timed step; decide_s: of it on the host, deciding, per step.
        cost: of all timed steps; slot_bytes: allocated.
        host_s: of computing one expert on the host, where it does.
    """

    step_s: list[float] = field(default_factory=list)
    decide_s: list[float] = field(default_factory=list)
    cost: Routing = field(default_factory=Routing)
    slot_bytes: int = 0
    host_s: float | None = None
    captured: str = ""

    @property
    def tpot_s(self) -> float:
        """Mean: loads differ from step to step."""
        return statistics.mean(self.step_s)

    @property
    def loaded_bytes(self) -> float:
        """Per step."""
        return self.cost.bytes_loaded / len(self.step_s)


@dataclass(frozen=True, slots=True)
class Foretold:
    """Experts that layers will want, best first, and what each is worth."""

    experts_MK: np.ndarray
    worth_MK: np.ndarray


def foretell(logits_ME: np.ndarray, top_k: int) -> Foretold:
    """As a shadow tells it."""
    scores_ME = np.exp(logits_ME - logits_ME.max(axis=1, keepdims=True))
    scores_ME /= scores_ME.sum(axis=1, keepdims=True)
    named = [wanted(scores_1E, scores_1E, top_k) for scores_1E in scores_ME[:, None]]
    return Foretold(np.stack([experts for experts, _ in named]), np.stack([worth for _, worth in named]))


class TimedTurns(DeviceTurns):
    """Turns that note how long decisions take, and whose forecasts are given.

    Attributes:
        decide_s: so far in this step, less what was waited for loads.
        foretold: a shadow's forecasts of this step's layers and of the next's; None where there is no shadow.
    """

    def __init__(self, given: GivenRouting, foreseen: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = given
        self._foreseen = foreseen
        self.rows_due = SHADOW_ROWS if foreseen == "shadow" else self.rows_due
        self.decide_s = 0.0
        self.foretold: Foretold | None = None

    def _forecast(self, layer: int) -> torch.Tensor | None:
        if self._foreseen != "gate" or layer + 1 >= len(self._given.coming_LE):
            return None
        return self._given.coming_LE[layer + 1]

    def decide(self, layer: int) -> None:
        start, waited_s = time.perf_counter(), self._staging.waited_s
        super().decide(layer)
        self.decide_s += time.perf_counter() - start - (self._staging.waited_s - waited_s)

    def look_ahead(self, layer: int, before: int) -> None:
        super().look_ahead(layer, before)
        if self.foretold is None:
            return
        layers = len(self._given.coming_LE)
        for ahead in range(1, SHADOW_AHEAD + 1) if layer == 0 else (SHADOW_AHEAD,):
            place = layer + ahead
            if place < len(self.foretold.experts_MK):
                experts_K, worth_K = self.foretold.experts_MK[place], self.foretold.worth_MK[place]
                self._scheduler.dispatcher.expect(place % layers, experts_K, worth_K)


def scheduler_over(
    worker: ExpertWorker, policy: Policy, shape: Shape, expert_bytes: int, given: GivenRouting
) -> ExpertScheduler:
    """The engine's say over one worker that owns all experts."""
    size = LayerSize(experts=shape.experts, expert_bytes=expert_bytes, top_k=shape.top_k)
    sizes, owners = (size,) * shape.layers, dict.fromkeys(keys_of(shape), NAME)
    dispatcher = Dispatcher(sizes, owners, local={NAME: worker}, remote=None, timeout_s=60.0)
    scheduler = ExpertScheduler(dispatcher, policy.scheduling)
    scheduler.attach(given.routers, {})
    scheduler.alpha = policy.alpha
    return scheduler


@dataclass(kw_only=True)
class Bench:
    """One synthetic model on one device."""

    shape: Shape
    model: Any
    store: HostStore
    kernels: GpuKernels
    new_recorder: Callable[[], Recorder]
    share: Share | None = None
    native: NativeKernels | None = None
    read_expert: Any = None

    def __post_init__(self) -> None:
        self.given = GivenRouting(self.model, self.shape, self.kernels)
        self.runner = Runner(self.model)
        self.dtype: torch.dtype = self.model.dtype
        self.keys = keys_of(self.shape)
        with torch.device("meta"):
            one = self.shape.model_class(self.shape.config(layers=1))
        self._modules = [experts_modules(one)[0][1]] * self.shape.layers

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return self.shape.expert_elements * self.dtype.itemsize

    @property
    def active_bytes(self) -> int:
        """What one token reads at least: the trunk but for its table of embeddings, and the experts of its choice."""
        trunk = sum(parameter.nbytes for parameter in self.model.parameters())
        table = self.model.get_input_embeddings().weight.nbytes
        return trunk - table + self.shape.layers * self.shape.top_k * self.expert_bytes

    @freed()
    def run(
        self,
        policy: Policy,
        slots: int | None,
        trace: Trace,
        warm_up: int,
        steps: int,
        new_loader: Callable[[], Loader] | None = None,
    ) -> Timed:
        """Decode ``warm_up + steps`` tokens; the last ``steps`` are timed."""
        worker = ExpertWorker(
            name=NAME,
            layers=moe_layers(self.shape),
            modules=self._modules,
            read_expert=self.read_expert,
            dtype=self.dtype,
            device=self.model.device,
            slot_budget_bytes=(slots or len(self.keys)) * self.expert_bytes,
            new_loader=new_loader,
            kernels=self.native,
            scheduling=policy.scheduling,
            store=self.store,
        )
        worker.own(self.keys)
        try:
            if slots is None:
                worker.load_all()
            return self._timed(policy, worker, trace, warm_up, steps)
        finally:
            worker.close()
            self.runner.captured = None
            for _, module in experts_modules(self.model):
                module.raymoe_backend = None  # it knows the worker, whose slots the next one needs the memory of

    def _timed(self, policy: Policy, worker: ExpertWorker, trace: Trace, warm_up: int, steps: int) -> Timed:
        scheduler = scheduler_over(worker, policy, self.shape, self.expert_bytes, self.given)
        for _, module in experts_modules(self.model):
            module.raymoe_backend = scheduler
        staging = worker.staging()
        assert staging is not None, "it has slots that cache"
        turns = TimedTurns(
            self.given,
            policy.foreseen,
            scheduler,
            staging,
            self.kernels,
            modules=self._modules,
            top_k=[self.shape.top_k] * self.shape.layers,
            is_whole=policy.scheduling.policy == "all_resident",
            share=self.share,
        )
        captured = CapturedDecode(self.model, self.runner.forward_one, turns, self.new_recorder())
        self.runner.captured = captured
        found = Timed(slot_bytes=worker.report().peak_slot_bytes)
        device = self.model.device
        logits_NLE, gate_NLE = on_device(trace.logits_NLE, device), on_device(trace.gate_NLE, device)
        self.given.step(logits_NLE[0], gate_NLE[0])
        logits_V, state = self.runner.prefill(list(range(1, PROMPT + 1)))
        scheduler.take_cost()
        token, layers = int(logits_V.argmax()), self.shape.layers
        for number in range(warm_up + steps):
            if number == warm_up:
                scheduler.take_cost()
            step = number % (len(logits_NLE) - 1)
            self.given.step(logits_NLE[step], gate_NLE[step])
            turns.decide_s = 0.0
            if policy.foreseen == "shadow":
                turns.foretold = foretell(trace.shadow_NLE[step : step + 2].reshape(2 * layers, -1), self.shape.top_k)
            start = time.perf_counter()
            token = int(self.runner.decode(state, token).argmax())
            took_s = time.perf_counter() - start
            if number >= warm_up:
                found.step_s.append(took_s)
                found.decide_s.append(turns.decide_s)
        found.cost = scheduler.take_cost()
        found.host_s = worker.host_s
        found.captured = captured.refused or "captured"
        return found
