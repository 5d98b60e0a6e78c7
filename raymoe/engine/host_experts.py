"""Any expert of a checkpoint, computed on this CPU within bounded memory: for calibration, which needs them all.

T tokens, K experts per token, R rows, P (row, expert) pairs, H hidden.
"""

import numpy as np
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.experts.compute import LayerCompute, WeightTable
from raymoe.kernels.native import load_native
from raymoe.types import ExpertKey


class HostExperts:
    """Reads experts when they are needed, and keeps as many as memory allows.

    Calibration comes by all experts in turn, so those that were kept first stay: any other choice would do worse.
    Experts that the file maps cost no memory.

    Args:
        kept_bytes: how much to keep.
    """

    def __init__(self, checkpoint: Checkpoint, kept_bytes: int) -> None:
        self._checkpoint = checkpoint
        self._free_bytes = kept_bytes
        kernels, cpu = load_native(torch.get_num_threads()), torch.device("cpu")
        modules = [module for _, module in experts_modules(checkpoint.skeleton)]
        self._computes = [LayerCompute(module, checkpoint.dtype, cpu, kernels) for module in modules]
        self._tables = [WeightTable(layer.num_experts) for layer in checkpoint.layers]

    def __call__(self, layer: int, experts_P: np.ndarray, hidden_RH: torch.Tensor, rows_P: np.ndarray) -> torch.Tensor:
        """Unweighted output of every pair, [P, H]; int32 experts and rows, equal experts side by side."""
        passing = self._read(layer, np.unique(experts_P).tolist())
        try:
            return self._computes[layer](self._tables[layer], experts_P, hidden_RH, rows_P)
        finally:
            for expert in passing:
                self._tables[layer].put(expert, None)

    def of_tokens(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H]."""
        experts_P = experts_TK.reshape(-1).numpy().astype(np.int32)
        rows_P = np.repeat(np.arange(len(hidden_TH), dtype=np.int32), experts_TK.shape[1])
        order_P = np.argsort(experts_P, kind="stable")
        output_PH = hidden_TH.new_empty((len(experts_P), hidden_TH.shape[1]))
        output_PH[torch.from_numpy(order_P)] = self(layer, experts_P[order_P], hidden_TH, rows_P[order_P])
        return output_PH.view(*experts_TK.shape, -1)

    def _read(self, layer: int, experts: list[int]) -> list[int]:
        """Have these experts in the layer's table; returns those that are not to stay."""
        table, passing = self._tables[layer], []
        for expert in experts:
            if table.tensors[expert] is not None:
                continue
            tensors = self._checkpoint.read_expert(ExpertKey(layer=layer, expert=expert))
            nbytes = 0 if self._checkpoint.is_mapped(layer) else sum(tensor.nbytes for tensor in tensors.values())
            if nbytes <= self._free_bytes:
                self._free_bytes -= nbytes
            else:
                passing.append(expert)
            table.put(expert, tensors)
        return passing
