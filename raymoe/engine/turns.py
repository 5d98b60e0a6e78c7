"""Captured decode steps on one device: what the host decides while a step runs (``model.captured``).

In each MoE layer the device tells what its router says, and waits until the host has told it slots and weights
(``engine.dialogue``). What can be decided at once is answered at once, and entered into the books while the device
computes; where experts are missing the host routes by the policy's pure rule, begins loads, computes what it takes over
itself, and answers when all is there.

L layers, K experts per token, E experts, H hidden.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.engine.dialogue import CLOSED, OPEN, Dialogue, MappedMemory, Share
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.errors import EngineStoppedError
from raymoe.experts.on_device import ComputeRow, KernelRow, compute_row
from raymoe.experts.staging import Staging
from raymoe.experts.worker import ExpertWorker
from raymoe.kernels.gpu import GpuKernels, numel
from raymoe.model.captured import CapturedDecode, GraphRecorder, Recorder
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite

DEVICE_TIMEOUT_S = 60.0  # for a layer of the device, or the end of a step: a guard against one that hangs
LOOKS = 4096  # between two looks at the clock and at how the device is, of some microseconds each


class DeviceTurns:
    """``StepExperts`` over one local worker.

    Args:
        staging: the worker's slots.
        sites: of the MoE layers, for scores and forecasts; None where the policy asks for neither.
        modules: the experts module of each layer.
        top_k: experts per token in each layer.
        is_whole: every expert has a slot for good, so that the host decides nothing.
    """

    def __init__(
        self,
        scheduler: ExpertScheduler,
        staging: Staging,
        kernels: GpuKernels,
        *,
        modules: Sequence[Any],
        top_k: Sequence[int],
        sites: Sequence[MoeSite] | None = None,
        is_whole: bool = False,
        share: Share | None = None,
    ) -> None:
        self._is_whole = is_whole
        self._scheduler = scheduler
        self._staging = staging
        self._kernels = kernels
        self._sites = sites
        self._computes: list[ComputeRow] = [
            compute_row(module, staging.pool(layer), kernels) for layer, module in enumerate(modules)
        ]
        self._layers = len(modules)
        device = staging.device
        if is_whole:
            self._tables = [
                torch.from_numpy(staging.slots_by_expert(layer)).to(device) for layer in range(self._layers)
            ]
            return
        share = share or MappedMemory()
        # the host adds its part to what kernels give, who alone leave its experts out
        self._hidden = [
            staging.hidden(layer) if staging.may_assist and isinstance(compute, KernelRow) else 0
            for layer, compute in enumerate(self._computes)
        ]
        self._talks = [
            Dialogue(share, 2 * k + 2 * staging.most_experts + hidden, k, hidden)
            for k, hidden in zip(top_k, self._hidden, strict=True)
        ]
        self._turns = torch.zeros(self._layers, dtype=torch.int64, device=device)
        self._turn, self._is_open = 0, False
        self._slots = [torch.zeros(k, dtype=torch.int64, device=device) for k in top_k]
        self._weights = [torch.zeros(k, dtype=torch.float32, device=device) for k in top_k]
        self._parts: list[tuple[int, int, int]] = [(k, 0, 0) for k in top_k]

    # --- while a step is captured -------------------------------------------------------------------------

    def compute(
        self, layer: int, hidden_1H: torch.Tensor, experts_1K: torch.Tensor, weights_1K: torch.Tensor
    ) -> torch.Tensor:
        """Enqueue a layer's experts."""
        experts_K, weights_K = experts_1K.view(-1), weights_1K.view(-1)
        if self._is_whole:
            return self._computes[layer](hidden_1H, experts_K, self._tables[layer], weights_K)
        talk, turn = self._talks[layer], self._turns[layer : layer + 1]
        logits_E, coming_E = self._logits(layer), self._forecast(layer)
        k, known, coming, hidden = experts_K.numel(), numel(logits_E), numel(coming_E), self._hidden[layer]
        self._parts[layer] = k, known, coming
        talk.listen_for(2 * k + known + coming + hidden)
        told_H = hidden_1H.view(-1) if hidden else None
        self._kernels.publish(experts_K, weights_K, logits_E, coming_E, told_H, talk.there)
        slots_K, weights_K = self._slots[layer], self._weights[layer]
        self._kernels.fetch(talk.decided, turn, slots_K, weights_K)
        output_1H = self._computes[layer](hidden_1H, slots_K, None, weights_K)
        if hidden:
            self._kernels.assist(talk.sums, turn, slots_K, output_1H)
        return output_1H

    def _logits(self, layer: int) -> torch.Tensor | None:
        router = self._scheduler.router(layer)
        return None if router is None or router.rule is None else router.logits_TE[-1]

    def _forecast(self, layer: int) -> torch.Tensor | None:
        """The next layer's router logits on the state before this layer's norm."""
        if not self._scheduler.foresees or self._sites is None or layer + 1 >= len(self._sites):
            return None
        here, there = self._sites[layer], self._sites[layer + 1]
        if here.state_TH is None or there.gate is None or there.norm is None or there.router.module is None:
            return None
        hidden_1H = there.norm.forward(here.state_TH[-1:])
        logits_E = hidden_1H.new_empty(there.router.experts)
        self._kernels.linear(hidden_1H, cast(torch.Tensor, there.router.module.weight), None, logits_E)
        return logits_E

    def open(self) -> None:
        """Let the device pass without an answer."""
        if not self._is_whole:
            self._is_open = True
            for talk in self._talks:
                talk.pass_all(OPEN)

    # --- while a step runs --------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step is about to be enqueued."""
        if self._is_whole:
            return
        if self._is_open:
            self._is_open, self._turn = False, 0
            self._turns.zero_()
            for talk in self._talks:
                talk.pass_all(CLOSED)
                talk.forget()
        self._turn += 1
        self._staging.begin()

    def serve(self, look: Callable[[], bool]) -> None:
        """Answer for each layer as the device comes to it, and account for the step."""
        if self._is_whole:
            self._until(look, look)
            return
        try:
            for layer, talk in enumerate(self._talks):
                if not talk.heard():
                    self._staging.prepare(layer)
                    self._until(talk.heard, look)
                self.decide(layer)
                self.look_ahead(layer)
                talk.forget()
            self._until(look, look)
        except BaseException:
            self._give_up(look)
            raise
        finally:
            self._scheduler.dispatcher.account(self._staging.name, self._staging.end())

    def _until(self, comes: Callable[[], bool], look: Callable[[], bool]) -> None:
        """Wait for the device; prefetches go on meanwhile.

        Raises EngineStoppedError after a minute, and what has befallen the device.
        """
        looks, deadline_s = 0, 0.0
        while not comes():
            self._staging.pump()
            looks += 1
            if looks % LOOKS == 0:
                look()
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + DEVICE_TIMEOUT_S
                if now_s > deadline_s:
                    raise EngineStoppedError(f"the device did not go on with a step in {DEVICE_TIMEOUT_S:g} s")

    def decide(self, layer: int) -> None:
        """Tell the device slots and weights, once all that is needed is in place."""
        talk, staging, turn = self._talks[layer], self._staging, self._turn
        k, known, coming = self._parts[layer]
        told = talk.told
        experts_K, weights_K = told[:k].astype(np.int32), told[k : 2 * k]
        slots_K = staging.take(layer, experts_K)
        slots = slots_K.tolist()
        is_ready = min(slots) >= 0
        if is_ready:
            talk.answer(turn, slots_K, weights_K)  # what follows is for the books
        else:
            staging.start(layer, self._scheduler.surely(layer, experts_K.tolist(), weights_K.tolist(), slots))
        logits_E = told[2 * k : 2 * k + known] if known else None
        ready_E = None if is_ready else staging.ready(layer)
        experts_K, weights_K, scores_E = self._scheduler.choose_row(layer, experts_K, weights_K, logits_E, ready_E)
        hidden = self._hidden[layer]
        start = 2 * k + known + coming
        state_H = told[start : start + hidden] if hidden else None
        staged = staging.stage(layer, experts_K, scores_E, weights_K, state_H)
        if not is_ready:
            talk.answer(turn, staged.slots_K, weights_K, staged.sum_H)
            staging.order_hosted(layer)

    def look_ahead(self, layer: int) -> None:
        """While the device computes: forecast the next layer."""
        k, known, coming = self._parts[layer]
        if coming:
            start = 2 * k + known
            self._scheduler.foresee(layer + 1, self._talks[layer].told[start : start + coming])

    def _give_up(self, look: Callable[[], bool]) -> None:
        """Let the device run to the step's end, whatever it computes."""
        for talk in self._talks:
            talk.pass_all(self._turn)
        self._until(look, look)
        for talk in self._talks:
            talk.forget()


def captured_decode(
    runner: Runner,
    scheduler: ExpertScheduler,
    checkpoint: Checkpoint,
    sites: Sequence[MoeSite] | None,
    kernels: GpuKernels,
    recorder: Recorder | None = None,
    share: Share | None = None,
) -> CapturedDecode | None:
    """Single tokens as replayed steps; None where the experts are not all on the trunk's device, or a token's are more
    than its slots."""
    worker = scheduler.dispatcher.only_worker
    staging = worker.staging() if isinstance(worker, ExpertWorker) else None
    top_k = [layer.top_k for layer in checkpoint.layers]
    if staging is None or staging.device != runner.device:
        return None
    if any(staging.pool(layer).count < k for layer, k in enumerate(top_k)):
        return None
    turns = DeviceTurns(
        scheduler,
        staging,
        kernels,
        modules=[module for _, module in experts_modules(checkpoint.skeleton)],
        top_k=top_k,
        sites=sites,
        is_whole=all((staging.slots_by_expert(layer) >= 0).all() for layer in range(len(top_k))),
        share=share,
    )
    return CapturedDecode(runner.model, runner.forward_one, turns, recorder or GraphRecorder(runner.device))
