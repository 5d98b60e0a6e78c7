"""Captured decode steps on one device: what the host decides between two parts of a step (``model.captured``).

In each MoE layer the device publishes what its router says into host memory and goes on when it is told slots and
weights. Between the two the host routes by the policy's pure rule, begins what loads are missing, and lets the device
wait for them; decisions for layers to come are made while the device computes.

L layers, K experts per token, E experts, H hidden.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.experts.arena import CudaPinning, Pinning, pages
from raymoe.experts.on_device import ComputeRow, compute_row
from raymoe.experts.staging import Staging
from raymoe.experts.worker import ExpertWorker
from raymoe.kernels.gpu import GpuKernels, numel
from raymoe.model.captured import CapturedDecode, Cut, GraphRecorder, Recorder
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite


@dataclass(frozen=True, slots=True)
class Shared:
    """Memory that host and device both see: as a numpy array, and as a tensor of the device."""

    host: np.ndarray
    device: torch.Tensor


Share = Callable[[int], Shared]
"""Makes so many float32 of it."""


class MappedMemory:
    """Pinned host memory under the address that the device knows it by: a kernel's small reads and writes go straight
    over the link, where a copy would queue behind experts.

    Attributes:
        pinning: what pins it.
    """

    def __init__(self, pinning: Pinning | None = None) -> None:
        self.pinning = pinning or CudaPinning()

    def __call__(self, elements: int) -> Shared:
        """Raises RuntimeError where host memory can't be mapped."""
        memory = pages(4 * elements).view(torch.float32)
        if not self.pinning.pin(memory.data_ptr(), memory.nbytes):
            raise RuntimeError("host memory could not be mapped for the device")
        weakref.finalize(memory, self.pinning.unpin, memory.data_ptr())
        seen = torch.as_tensor(_Seen(memory), device="cuda")
        return Shared(memory.numpy(), seen)


class _Seen:
    """Host memory described as a device's."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": "<f4",
            "data": (memory.data_ptr(), False),
            "version": 3,
        }


class DeviceTurns:
    """``StepExperts`` over one local worker.

    Args:
        staging: the worker's slots.
        sites: of the MoE layers, for scores and forecasts; None where the policy asks for neither.
        modules: the experts module of each layer.
        top_k: experts per token in each layer.

    Attributes:
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
        self.is_whole = is_whole
        self._scheduler = scheduler
        self._staging = staging
        self._kernels = kernels
        self._sites = sites
        self._computes: list[ComputeRow] = [
            compute_row(module, staging.pool(layer), kernels) for layer, module in enumerate(modules)
        ]
        self._coming: dict[int, np.ndarray] = {}
        device = staging.device
        if is_whole:
            self._tables = [
                torch.from_numpy(staging.slots_by_expert(layer)).to(device) for layer in range(len(modules))
            ]
            return
        share = share or MappedMemory()
        self._told = [share(2 * k + 2 * staging.most_experts) for k in top_k]
        self._decided = [share(2 * k) for k in top_k]
        self._slots = [torch.zeros(k, dtype=torch.int64, device=device) for k in top_k]
        self._weights = [torch.zeros(k, dtype=torch.float32, device=device) for k in top_k]
        self._parts: list[tuple[int, int, int]] = [(k, 0, 0) for k in top_k]

    # --- while a step is captured -------------------------------------------------------------------------

    def compute(
        self, layer: int, hidden_1H: torch.Tensor, experts_1K: torch.Tensor, weights_1K: torch.Tensor, cut: Cut
    ) -> torch.Tensor:
        """Enqueue a layer's experts."""
        experts_K, weights_K = experts_1K.view(-1), weights_1K.view(-1)
        if self.is_whole:
            return self._computes[layer](hidden_1H, experts_K, self._tables[layer], weights_K)
        logits_E, coming_E = self._logits(layer), self._forecast(layer)
        self._parts[layer] = experts_K.numel(), numel(logits_E), numel(coming_E)
        self._kernels.publish(experts_K, weights_K, logits_E, coming_E, self._told[layer].device)
        cut()
        self._kernels.fetch(self._decided[layer].device, self._slots[layer], self._weights[layer])
        return self._computes[layer](hidden_1H, self._slots[layer], None, self._weights[layer])

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

    # --- while a step runs --------------------------------------------------------------------------------

    def decide(self, layer: int) -> None:
        """Route, begin loads, tell the device slots and weights, and let it wait for the loads."""
        staging, told, decided = self._staging, self._told[layer].host, self._decided[layer].host
        if layer == 0:
            staging.begin()
        k, known, coming = self._parts[layer]
        experts_K = told[:k].astype(np.int32)
        logits_E = told[2 * k : 2 * k + known] if known else None
        experts_K, weights_K, scores_E = self._scheduler.choose_row(layer, experts_K, told[k : 2 * k], logits_E)
        decided[:k] = staging.stage(layer, experts_K, scores_E)
        decided[k : 2 * k] = weights_K
        if coming:
            self._coming[layer] = told[2 * k + known : 2 * k + known + coming].copy()

    def meanwhile(self) -> None:
        """Let prefetches go on."""
        self._staging.pump()

    def launched(self, layer: int) -> None:
        """Look ahead while the device computes."""
        logits_E = self._coming.pop(layer, None)
        if logits_E is not None:
            self._scheduler.foresee(layer + 1, logits_E)

    def end(self) -> None:
        """Account for the step."""
        if not self.is_whole:
            self._scheduler.dispatcher.account(self._staging.name, self._staging.end())


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
