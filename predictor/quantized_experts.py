"""All routed experts of a model, quantised, in one memory: what a shadow computes with.

Experts are quantised one by one as they are read, so that full precision is never there whole. A token's experts
of a layer are one call of a kernel that reads the codes themselves; where no kernel fits (another gate, biases,
CUDA, long prompts), the experts in question are restored for the moment and computed as the architecture says.

Neither torchao 0.18 nor bitsandbytes 0.50 does this on a CPU. Four experts of hidden 1024 and inner 512, one row in
float32, one core: float32 weights 2.5 ms, these kernels 0.7 ms with int8, 0.6 ms with 4 bits, 0.9 ms with 3; torchao's
int8 6.6 ms, its int4 not at all (it needs mslk, which is for CUDA); bitsandbytes' nf4 9.2 ms from 2-D weights, and
19 ms from a fused parameter of eight experts, all of which it restores. torch's own int8 and int4 products need 9.6 and
22 ms; they are fast (1.5 and 0.9 ms) for bfloat16 alone. On CUDA none of these has been compared.

T tokens, K experts per token, P pairs of both, H hidden, E experts, O outputs and I inputs of a matrix.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from predictor.quantize import BLOCK, MatrixForm, StoredMatrix, matrix_form
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint, ExpertTensors, MoeLayer
from raymoe.experts.math import ExpertMath
from raymoe.kernels.native import NativeKernels, load_native
from raymoe.types import ExpertKey

TINY = 256  # values; what is smaller saves nothing
PAIRS_PER_EXPERT = 16  # about where restoring an expert once begins to cost less than reading its codes for each pair
RESTORED_TOGETHER = 8  # experts; on a GPU fewer would be many small operations, more would be memory for nothing


class QuantizedExperts:
    """The routed experts of every MoE layer. Not thread safe.

    Args:
        checkpoint: read while this is made, one expert after the other; not kept.
        bits: 16 (bfloat16), 8, 4, 3 or 2 per weight.
        device: where the codes lie and experts are computed.
        threads: of the kernels on a CPU; None takes as many as torch does.
        progress: told how many experts have been read.

    Raises ConfigError for another number of bits.

    Attributes:
        nbytes: of all that is stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bits: int,
        device: torch.device,
        *,
        threads: int | None = None,
        progress: Callable[[int], None] = lambda _experts: None,
    ) -> None:
        form = matrix_form(bits)
        kernels = load_native(threads or torch.get_num_threads()) if device.type == "cpu" else None
        modules = [module for _, module in experts_modules(checkpoint.skeleton)]
        self._layers = [
            QuantizedLayer(layer, module, form, device, kernels)
            for layer, module in zip(checkpoint.layers, modules, strict=True)
        ]
        done = 0
        for layer in checkpoint.layers:
            for expert in range(layer.num_experts):
                self._layers[layer.index].put(
                    expert, checkpoint.read_expert(ExpertKey(layer=layer.index, expert=expert))
                )
                done += 1
                progress(done)
        self.nbytes = sum(layer.nbytes for layer in self._layers)

    def dequantize(self, layer: int, expert: int, dtype: torch.dtype = torch.float32) -> ExpertTensors:
        """One expert's parameters as the codes have them, in the architecture's shapes."""
        return self._layers[layer].restore([expert], dtype)[0]

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H] in the type of ``hidden_TH``."""
        return self._layers[layer].compute(hidden_TH, experts_TK)


class QuantizedLayer:
    """The routed experts of one layer: each parameter of all experts in one allocation."""

    def __init__(
        self,
        layer: MoeLayer,
        module: nn.Module,
        form: MatrixForm,
        device: torch.device,
        kernels: NativeKernels | None,
    ) -> None:
        self.math = ExpertMath(module)
        self._layer = layer
        self._form = form
        self._device = device
        self._kernels = kernels
        self._matrices: dict[str, StoredMatrix] = {}
        self._plain: dict[str, torch.Tensor] = {}
        self._addresses = np.zeros((layer.num_experts, 4), dtype=np.uint64)
        self._inner = layer.shapes["down_proj"][-1]
        self._fits_kernel = (
            self.math.is_silu_gated
            and all(is_matrix(shape) for shape in layer.shapes.values())
            and all(size % BLOCK == 0 for size in layer.shapes["down_proj"])
        )

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        matrices = sum(matrix.nbytes for matrix in self._matrices.values())
        return matrices + sum(values.nbytes for values in self._plain.values())

    def put(self, expert: int, tensors: ExpertTensors) -> None:
        """Quantise one expert into its place. Nothing of ``tensors`` is kept."""
        for name, tensor in tensors.items():
            tensor = tensor.to(self._device)
            if is_matrix(tensor.shape):
                stored = self._form.store(tensor.T if self.math.is_transposed else tensor)
                if name not in self._matrices:
                    self._matrices[name] = self._room_for_all(stored)
                self._matrices[name].codes[expert] = stored.codes
                self._matrices[name].scales[expert] = stored.scales
            else:
                if name not in self._plain:
                    self._plain[name] = tensor.new_zeros((self._layer.num_experts, *tensor.shape))
                self._plain[name][expert] = tensor
        if self._fits_kernel:
            matrices = self._matrices[self.math.first], self._matrices["down_proj"]
            self._addresses[expert] = [
                part[expert].data_ptr() for matrix in matrices for part in (matrix.codes, matrix.scales)
            ]

    def restore(self, experts: list[int], dtype: torch.dtype) -> list[ExpertTensors]:
        """Parameters of these experts as the codes have them."""
        index = torch.tensor(experts, device=self._device)
        together = {name: values[index].to(dtype) for name, values in self._plain.items()}
        for name, matrix in self._matrices.items():
            shape = self._shape(name)
            if self._kernels is not None and self._form.bits < 16:
                values = torch.empty((len(experts), *shape))
                for place, expert in enumerate(experts):
                    self._kernels.restore(self._form.bits, matrix.codes[expert], matrix.scales[expert], values[place])
                values = values.to(dtype)
            else:
                chosen = StoredMatrix(codes=matrix.codes[index], scales=matrix.scales[index])
                values = self._form.restore(chosen, shape, dtype)
            together[name] = values.transpose(1, 2) if self.math.is_transposed else values
        return [{name: values[place] for name, values in together.items()} for place in range(len(experts))]

    def compute(self, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Outputs of all pairs, [T, K, H]."""
        tokens, top_k = experts_TK.shape
        experts_P = experts_TK.reshape(-1).cpu().numpy().astype(np.int32)
        if tokens == 1:  # nothing to sort, and every operation counts
            return self._sorted(experts_P, hidden_TH, np.zeros(top_k, dtype=np.int32)).view(1, top_k, -1)
        order_P = np.argsort(experts_P, kind="stable")
        sorted_PH = self._sorted(experts_P[order_P], hidden_TH, (order_P // top_k).astype(np.int32))
        output_PH = torch.empty_like(sorted_PH)
        output_PH[torch.from_numpy(order_P).to(self._device)] = sorted_PH
        return output_PH.view(tokens, top_k, -1)

    def _sorted(self, experts_P: np.ndarray, hidden_TH: torch.Tensor, rows_P: np.ndarray) -> torch.Tensor:
        """Outputs [P, H], given pairs whose equal experts lie together."""
        native = self._fits_kernel and self._kernels is not None
        if not native or not NativeKernels.supports(hidden_TH.dtype, self._device):
            return self._restored(experts_P, hidden_TH, rows_P)
        if len(hidden_TH) > PAIRS_PER_EXPERT and len(experts_P) > PAIRS_PER_EXPERT * len(run_starts(experts_P)):
            return self._restored(experts_P, hidden_TH, rows_P)
        return self._natively(experts_P, hidden_TH, rows_P)

    def _natively(self, experts_P: np.ndarray, hidden_TH: torch.Tensor, rows_P: np.ndarray) -> torch.Tensor:
        assert self._kernels is not None
        hidden_TH = hidden_TH.contiguous()
        output_PH = hidden_TH.new_empty((len(experts_P), hidden_TH.shape[1]))
        self._kernels.quantized_experts(
            self._form.bits, self._addresses.ctypes.data, experts_P, hidden_TH, rows_P, self._inner, output_PH
        )
        return output_PH

    def _restored(self, experts_P: np.ndarray, hidden_TH: torch.Tensor, rows_P: np.ndarray) -> torch.Tensor:
        inputs_PH = hidden_TH[torch.from_numpy(rows_P).to(self._device)]
        starts = run_starts(experts_P)
        ends = np.append(starts[1:], len(experts_P))
        distinct = experts_P[starts]
        outputs = []
        for at in range(0, len(distinct), RESTORED_TOGETHER):
            some = slice(at, at + RESTORED_TOGETHER)
            weights = self.restore(distinct[some].tolist(), hidden_TH.dtype)
            for tensors, start, end in zip(weights, starts[some].tolist(), ends[some].tolist(), strict=True):
                outputs.append(self.math(tensors, inputs_PH[start:end]))
        return torch.cat(outputs)

    def _shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a matrix, whichever way round the architecture has it."""
        first, last = self._layer.shapes[name]
        return (last, first) if self.math.is_transposed else (first, last)

    def _room_for_all(self, stored: StoredMatrix) -> StoredMatrix:
        codes, scales = (
            part.new_zeros((self._layer.num_experts, *part.shape)) for part in (stored.codes, stored.scales)
        )
        return StoredMatrix(codes=codes, scales=scales)


def is_matrix(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a parameter of this shape is quantised: biases and tiny ones stay as they are."""
    return len(shape) == 2 and shape[0] * shape[1] >= TINY


def run_starts(experts_P: np.ndarray) -> np.ndarray:
    """Where each run of one expert begins; the order of experts does not matter."""
    return np.flatnonzero(np.diff(experts_P, prepend=-1))
