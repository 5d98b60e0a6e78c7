"""Take the small operations out of the trunk's decode step on a CPU.

One row through a linear layer is a matrix-vector product; the native kernel streams the weights once where
torch's general path spends more on setting up. Modules keep their own forward for every other shape, so
prefill and all architectures work as before.
"""

import torch
from torch import nn

from raymoe.kernels.native import NativeKernels, load_native


def use_native_kernels(model: nn.Module) -> int:
    """Route one-row calls of plain linear layers through native kernels. Returns how many layers were changed.

    Only exact ``nn.Linear`` modules with contiguous weights on the CPU are touched.
    """
    kernels = load_native(torch.get_num_threads())
    if kernels is None:
        return 0
    changed = 0
    for module in model.modules():
        if type(module) is nn.Linear and kernels.supports(module.weight.dtype, module.weight.device):
            module.forward = OneRowLinear(module, kernels)  # type: ignore[method-assign]
            changed += 1
    return changed


class OneRowLinear:
    """Replaces a linear layer's forward."""

    def __init__(self, module: nn.Linear, kernels: NativeKernels) -> None:
        self._module = module
        self._kernels = kernels
        self._columns = module.in_features

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``input`` [..., in], as [..., out]."""
        weight, bias = self._module.weight, self._module.bias
        if input.numel() != self._columns or input.dtype != weight.dtype or not weight.is_contiguous():
            return nn.functional.linear(input, weight, bias)
        output = input.new_empty((*input.shape[:-1], weight.shape[0]))
        self._kernels.linear(input.contiguous(), weight, bias, output)
        return output
