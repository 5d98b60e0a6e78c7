"""One layer's pairs on one device, through native kernels where they fit and torch elsewhere.

R rows, P pairs, H hidden.
"""

import numpy as np
import torch
from torch import nn

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.experts.math import ExpertMath
from raymoe.kernels.native import NativeKernels

MAX_NATIVE_PAIRS = 32  # beyond a few rows per expert, torch's matrix products beat row by row reading


class WeightTable:
    """Weights by a small index (expert of a layer, or slot), with their addresses for the kernels."""

    def __init__(self, entries: int) -> None:
        self.tensors: list[ExpertTensors | None] = [None] * entries
        self._first = np.zeros(entries, dtype=np.uint64)
        self._down = np.zeros(entries, dtype=np.uint64)
        self.first_pointers = self._first.ctypes.data
        self.down_pointers = self._down.ctypes.data

    def put(self, index: int, tensors: ExpertTensors | None) -> None:
        """Set or clear one entry; its tensors are kept alive here."""
        self.tensors[index] = tensors
        first = (
            next((tensors[name] for name in ("gate_up_proj", "up_proj") if name in tensors), None) if tensors else None
        )
        self._first[index] = first.data_ptr() if first is not None else 0
        self._down[index] = tensors["down_proj"].data_ptr() if tensors else 0


class LayerCompute:
    """Computes any of a layer's experts, given their weights."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, kernels: NativeKernels | None
    ) -> None:
        self.math = ExpertMath(module)
        fits = kernels is not None and kernels.supports(dtype, device) and self.math.is_silu_gated
        self._kernels = kernels if fits else None

    def __call__(
        self, table: WeightTable, index_P: np.ndarray, hidden_RH: torch.Tensor, rows_P: np.ndarray
    ) -> torch.Tensor:
        """Outputs of all pairs, [P, H].

        Args:
            index_P: int32, each pair's entry in ``table``. Equal entries that lie together are computed together.
            rows_P: int32, each pair's row.
        """
        if self._kernels is not None and len(index_P) <= MAX_NATIVE_PAIRS:
            return self._natively(self._kernels, table, index_P, hidden_RH, rows_P)
        starts = np.flatnonzero(np.diff(index_P, prepend=-1)).tolist()
        inputs_PH = hidden_RH[torch.from_numpy(rows_P).to(hidden_RH.device)]
        outputs = []
        for start, end in zip(starts, [*starts[1:], len(index_P)], strict=True):
            weights = table.tensors[index_P[start]]
            assert weights is not None, "computed an expert that is not here"
            outputs.append(self.math(weights, inputs_PH[start:end]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _natively(
        self,
        kernels: NativeKernels,
        table: WeightTable,
        index_P: np.ndarray,
        hidden_RH: torch.Tensor,
        rows_P: np.ndarray,
    ) -> torch.Tensor:
        hidden_RH = hidden_RH.contiguous()
        output_PH = hidden_RH.new_empty((len(index_P), hidden_RH.shape[1]))
        weights = table.tensors[index_P[0]]
        assert weights is not None, "computed an expert that is not here"
        inner = weights["down_proj"].shape[-1]
        kernels.experts(table.first_pointers, table.down_pointers, index_P, hidden_RH, rows_P, inner, output_PH)
        return output_PH
