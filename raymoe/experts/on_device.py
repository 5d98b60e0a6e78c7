"""A layer's experts for one token, computed from slots by indices that lie on the device: nothing waits for the host.

K experts per token, H hidden, I intermediate, S slots.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.moe import batched_mm_experts_forward

from raymoe.experts.math import ExpertMath
from raymoe.experts.slots import SlotPool
from raymoe.kernels.gpu import GpuKernels

ComputeRow = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(hidden [1, H], index [K], table or None, weights [K]) -> the weighted sum of the experts' outputs [1, H].

``index`` names slots, or, with a table of slots, experts."""


def compute_row(module: Any, pool: SlotPool, kernels: GpuKernels | None) -> ComputeRow:
    """How to compute the experts of one layer: by kernels that read slots in place, where the architecture's are plain
    gated ones; else by transformers' own ``batched_mm`` over the slots, which gathers what it needs (three times the
    traffic).

    Args:
        module: the layer's experts module; the meta device will do.
    """
    if kernels is not None and ExpertMath(module).is_silu_gated and kernels.supports(pool.block.dtype):
        return KernelRow(pool, kernels)
    return ModuleRow(module, pool)


class KernelRow:
    """Two kernels: gate, up and activation of all experts, then the weighted sum of their down projections."""

    def __init__(self, pool: SlotPool, kernels: GpuKernels) -> None:
        self._kernels = kernels
        self._first, self._down = pool.stacked["gate_up_proj"], pool.stacked["down_proj"]
        self._stride = pool.block.stride(0)

    def __call__(
        self, hidden_1H: torch.Tensor, index_K: torch.Tensor, table: torch.Tensor | None, weights_K: torch.Tensor
    ) -> torch.Tensor:
        """See ``ComputeRow``."""
        inner_KI = hidden_1H.new_empty((index_K.numel(), self._down.shape[-1]))
        output_1H = torch.empty_like(hidden_1H)
        self._kernels.gate_up(hidden_1H, self._first, self._stride, index_K, table, inner_KI)
        self._kernels.down(inner_KI, self._down, self._stride, index_K, table, weights_K, output_1H, rows=1)
        return output_1H


class ModuleRow:
    """The architecture's own experts module, with the slots as its experts."""

    def __init__(self, module: Any, pool: SlotPool) -> None:
        self._module = copy.copy(module)
        self._module._parameters = {
            name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in pool.stacked.items()
        }
        self._module.num_experts = pool.count

    def __call__(
        self, hidden_1H: torch.Tensor, index_K: torch.Tensor, table: torch.Tensor | None, weights_K: torch.Tensor
    ) -> torch.Tensor:
        """See ``ComputeRow``."""
        slots_K = index_K if table is None else table[index_K].to(torch.int64)
        weights_1K = weights_K.to(hidden_1H.dtype).view(1, -1)
        return batched_mm_experts_forward(self._module, hidden_1H, slots_K.view(1, -1), weights_1K)
