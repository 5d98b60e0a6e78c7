"""Captured decode steps on one device: what the host decides while a step runs (``model.captured``).

In each MoE layer the device tells what its router says, and waits until the host has told it slots and weights
(``engine.dialogue``). Where all experts are in slots that is done at once, and entered into the books later, while
something is loaded anyway. Elsewhere loads that are needed whatever is decided are begun at once (both in
``kernels.turns`` where there is a compiler); then the host routes by the policy's pure rule, begins the other loads,
computes what it takes over itself, and answers when all is there.

L layers, K experts per token, E experts, H hidden.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.engine.dialogue import CLOSED, LAST_TURN, OPEN, Dialogue, MappedMemory, Share, Words
from raymoe.engine.row_books import Row, RowBooks
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.errors import EngineStoppedError
from raymoe.experts.on_device import ComputeRow, KernelRow, compute_row
from raymoe.experts.staging import Staging
from raymoe.experts.worker import ExpertWorker
from raymoe.kernels.gpu import GpuKernels, numel
from raymoe.kernels.turns import NativeTurns, PlainRule, TurnMemory, native_turns
from raymoe.model.captured import CapturedDecode, GraphRecorder, Recorder
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite

DEVICE_TIMEOUT_S = 60.0  # for a layer of the device, or the end of a step: a guard against one that hangs
LOOKS = 1024  # between two looks at the clock and at how the device is
PATIENCE_NS, SHORT_NS = 200_000, 20_000  # to wait for the device, without and with prefetches to look after
ROWS_WORTH = 8  # answered rows that are worth to be entered into the books while a load is waited for
ROWS_DUE = 1024  # answered rows after which they are entered though no load is waited for: with a step's last one


class DeviceTurns:
    """``StepExperts`` over one local worker.

    Args:
        staging: the worker's slots.
        sites: of the MoE layers, for scores and forecasts; None where the policy asks for neither.
        modules: the experts module of each layer.
        top_k: experts per token in each layer.
        is_whole: every expert has a slot for good, so that the host decides nothing.
    """

    rows_due = ROWS_DUE

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
        self._share = share or MappedMemory()
        self._top_k = top_k
        self._begin_talks()
        self._turns = torch.zeros(self._layers, dtype=torch.int64, device=device)
        self._turn, self._must_restart = 0, False
        self._native: NativeTurns | None = None
        self._certainty: float | None = None
        self._rule: PlainRule | None = None  # by which C++ decides rows in this step
        self._sure: list[int] = []  # experts of the row in hand whose loads were begun before it was decided
        self._slots = [torch.zeros(k, dtype=torch.int64, device=device) for k in top_k]
        self._weights = [torch.zeros(k, dtype=torch.float32, device=device) for k in top_k]

    def _begin_talks(self) -> None:
        """Of what is asked for now. The host adds its part to what kernels give, who alone leave its experts out."""
        staging = self._staging
        self._asked = self._asks()
        hidden_L = [
            staging.hidden(layer) if staging.may_assist and isinstance(compute, KernelRow) else 0
            for layer, compute in enumerate(self._computes)
        ]
        self._talks = [
            Dialogue(self._share, Words(k, staging.most_experts, staging.most_experts, hidden))
            for k, hidden in zip(self._top_k, hidden_L, strict=True)
        ]
        self._books = RowBooks(self._scheduler, staging, self._talks)

    def _asks(self) -> tuple[bool, bool]:
        """Whether forecasts and the host's help are wanted, for which the device tells more."""
        return self._scheduler.foresees, self._staging.may_assist

    # --- while a step is captured -------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Whether what was captured tells all that is asked for now: settings may change meanwhile."""
        return self._is_whole or self._asked == self._asks()

    def compute(
        self, layer: int, hidden_1H: torch.Tensor, experts_1K: torch.Tensor, weights_1K: torch.Tensor
    ) -> torch.Tensor:
        """Enqueue a layer's experts."""
        experts_K, weights_K = experts_1K.view(-1), weights_1K.view(-1)
        if self._is_whole:
            return self._computes[layer](hidden_1H, experts_K, self._tables[layer], weights_K)
        talk, turn = self._talks[layer], self._turns[layer : layer + 1]
        logits_E, coming_E = self._logits(layer), self._forecast(layer)
        hidden = talk.words.state
        talk.words = Words(experts_K.numel(), numel(logits_E), numel(coming_E), hidden)
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
        if self._is_whole:
            return
        if not self.is_current:
            self._begin_talks()
        self._must_restart = True
        for talk in self._talks:
            talk.pass_all(OPEN)

    # --- while a step runs --------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step is about to be enqueued."""
        if self._is_whole:
            return
        if self._must_restart or self._turn >= LAST_TURN:
            self._restart()
        self._certainty, self._rule = self._scheduler.certainty(), None
        if self._native is not None and (rule := self._scheduler.plain_rule()) is not None:
            has_logits = all(talk.words.logits for talk in self._talks) or not rule.alpha
            self._rule = rule if has_logits else None
        self._staging.begin()
        self._turn += 1  # last, for the device does the same: it would take an old answer for one of this turn

    def _restart(self) -> None:
        """Count turns from 1 again, on both sides, and forget what was said."""
        self._must_restart, self._turn = False, 0
        self._turns.zero_()
        for talk in self._talks:
            talk.pass_all(CLOSED)
            talk.forget()
        self._native = native_turns(
            [TurnMemory(**talk.memory(), **self._staging.memory(layer)) for layer, talk in enumerate(self._talks)]
        )

    def abandon(self) -> None:
        """The step was not enqueued: the device has counted no turn."""
        if not self._is_whole:
            self._must_restart = True
            self._end()

    def serve(self, look: Callable[[], bool]) -> None:
        """Answer for each layer as the device comes to it, and account for the step."""
        if self._is_whole:
            self._until(look, look)
            return
        try:
            layer = self._pass(0, look)
            while layer < self._layers:
                self.decide(layer)
                layer = self._pass(layer + 1, look)
            self._enter(layer)
            self._until(look, look)
        except BaseException:
            self._give_up(look)
            raise
        finally:
            self._end()

    def _end(self) -> None:
        """The step is over, well or not."""
        self._scheduler.dispatcher.account(self._staging.name, self._staging.end())

    def _until(self, comes: Callable[[], bool], look: Callable[[], bool]) -> None:
        """Wait for the device; prefetches go on meanwhile."""
        patience = Patience(look)
        while not comes():
            self._staging.pump()
            patience.wears()

    def _pass(self, layer: int, look: Callable[[], bool]) -> int:
        """Wait for the device in this layer and those that follow, and answer what can be answered at once.

        Returns the first layer whose row lacks experts, or the number of layers.
        """
        staging, patience = self._staging, Patience(look)
        due = 1 if self._scheduler.foresees else self.rows_due
        while layer < self._layers:
            if patience.is_new:
                staging.prepare(layer)
                if len(self._books) >= due:
                    self._enter(layer)
            reached, is_missing = self._run(layer)
            self._books.add(*(self._row(passed) for passed in range(layer, reached)))
            if is_missing:
                return reached
            if reached > layer:
                layer, patience = reached, Patience(look)
            else:
                staging.pump()
                patience.wears()
        return layer

    def _run(self, layer: int) -> tuple[int, bool]:
        """From this layer on: the first one that isn't answered, and whether that is for want of experts."""
        return self._run_here(layer) if self._native is None else self._run_native(layer, self._native)

    def _run_native(self, layer: int, native: NativeTurns) -> tuple[int, bool]:
        """In C++."""
        staging = self._staging
        most, copy = staging.eager()
        factor = self._certainty if self._certainty is not None else math.inf
        patience_ns = SHORT_NS if staging.is_prefetching else PATIENCE_NS
        with staging.begun_elsewhere():
            passed = native.run(layer, self._turn, self._rule, factor, most, patience_ns, copy)
            if passed.begun:
                staging.adopt(passed.layer, passed.begun)
        self._sure = [expert for expert, _ in passed.begun]
        return passed.layer, passed.is_missing

    def _run_here(self, layer: int) -> tuple[int, bool]:
        """The same without C++, for one layer; nothing is decided."""
        talk, staging = self._talks[layer], self._staging
        if not talk.heard():
            return layer, False
        experts_K, weights_K = talk.words.chosen(talk.told)
        slots_K = staging.take(layer, experts_K)
        if slots_K.min() >= 0:
            talk.answer(self._turn, slots_K, weights_K)
            return layer + 1, False
        self._sure = []
        if self._certainty is not None:
            sure_K = (slots_K < 0) & ~(weights_K < self._certainty * weights_K.min())
            self._sure = np.sort(experts_K[sure_K]).tolist()[: staging.eager()[0]]
            staging.start(layer, self._sure, experts_K)
        return layer, True

    def decide(self, layer: int) -> None:
        """For a row that lacks experts: route, have them loaded or computed, and tell the device slots and weights.

        While it waits, what was answered before is entered into the books.
        """
        talk, staging = self._talks[layer], self._staging
        told, words, row = talk.told, talk.words, self._row(layer)
        experts_K, weights_K = words.chosen(told)
        available_E = staging.ready(layer)
        if row.experts_K is not None and row.weights_K is not None:
            experts_K, weights_K = row.experts_K, row.weights_K
        elif not set(experts_K[~available_E[experts_K]].tolist()) <= set(self._sure):
            experts_K, weights_K, row.scores_E = self._scheduler.choose_row(
                layer, experts_K, weights_K, words.router_logits(told), available_E
            )
            row.experts_K = experts_K
        missing = np.sort(experts_K[~available_E[experts_K]]).tolist()
        row.misses = len(missing)
        assists = words.state > 0 and staging.assists(layer)
        if not assists and staging.start(layer, missing, experts_K):
            slots_K = staging.arrive(layer, experts_K, lambda: self._enter_some(layer))
            talk.answer(self._turn, slots_K, weights_K)
            self._books.add(row)
            return
        self._books.complete([row])
        staged = staging.stage(layer, experts_K, row.scores_E, weights_K, words.row(told))
        talk.answer(self._turn, staged.slots_K, weights_K, staged.sum_H)
        staging.order_hosted(layer)
        self.look_ahead(layer, layer + 1)
        talk.forget()

    def _enter_some(self, here: int) -> None:
        """The same for a good number of rows, for one costs as much as many; there is a little time.

        Args:
            here: the layer that the device waits in, so that a forecast of it is late.
        """
        if len(self._books) >= ROWS_WORTH:
            self._enter(here + 1)

    def _enter(self, before: int) -> None:
        """Enter rows that were answered into the books, and look ahead from them.

        Args:
            before: the first layer that the device may not have come to yet.
        """
        for row in self._books.enter():
            self.look_ahead(row.layer, before)
            self._talks[row.layer].forget()

    def _row(self, layer: int) -> Row:
        """What is known of a layer's row so far."""
        native, k = self._native, self._talks[layer].words.top_k
        if self._rule is None or native is None:
            return Row(layer)
        experts_K, weights_K = native.chosen_LK[layer, :k], native.weights_LK[layer, :k]
        return Row(layer, replaced=int(native.replaced_L[layer]), experts_K=experts_K, weights_K=weights_K)

    def look_ahead(self, layer: int, before: int) -> None:
        """Forecast the layer after this one, unless the device has come to it by now (see ``_enter``)."""
        if layer + 1 < before or not self._scheduler.foresees:
            return
        talk = self._talks[layer]
        logits_E = talk.words.forecast(talk.told)
        if logits_E is not None:
            self._scheduler.foresee(layer + 1, logits_E)

    def _give_up(self, look: Callable[[], bool]) -> None:
        """Let the device run to the step's end, whatever it computes."""
        self._must_restart = True  # as there are words that nobody took, and more to come
        self._books.clear()
        for talk in self._talks:
            talk.pass_all(self._turn)
        self._until(look, look)


class Patience:
    """With a device that is waited for.

    Args:
        look: asks it how it is; raises what has befallen it.
    """

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self._looks = 0
        self._deadline_s = 0.0

    @property
    def is_new(self) -> bool:
        """Whether nobody has looked yet."""
        return self._looks == 0

    def wears(self) -> None:
        """Looked in vain once more. Raises EngineStoppedError after a minute, and what has befallen the device."""
        self._looks += 1
        if self._looks % LOOKS:
            return
        self._look()
        now_s = time.monotonic()
        self._deadline_s = self._deadline_s or now_s + DEVICE_TIMEOUT_S
        if now_s > self._deadline_s:
            raise EngineStoppedError(f"the device did not go on with a step in {DEVICE_TIMEOUT_S:g} s")


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
