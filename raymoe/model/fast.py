"""Take small operations out of the trunk's decode step on a CPU.

At one token a linear layer is a matrix-vector product, and a norm is eight tiny operations. Native kernels do
each in one call. Modules keep their own forward for every other shape, so prefill and all architectures work
as before. A norm is replaced only if, on random input, the kernel gives what the module gives.
"""

import torch
from torch import nn

from raymoe.kernels.native import NativeKernels, load_native

MAX_NORM_ELEMENTS = 1 << 15  # one token's states and heads; more is prefill, where torch does well
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # relative, about an ulp of bfloat16


def use_native_kernels(model: nn.Module) -> int:
    """Route one-token calls of linear layers and norms through native kernels. Returns how many were changed.

    Only exact ``nn.Linear`` modules and proven norms on the CPU are touched.
    """
    kernels = load_native(torch.get_num_threads())
    if kernels is None:
        return 0
    changed = 0
    for module in model.modules():
        replacement = replacement_for(module, kernels)
        if replacement is not None:
            module.forward = replacement
            changed += 1
    return changed


def replacement_for(module: nn.Module, kernels: NativeKernels) -> "OneRowLinear | SmallNorm | None":
    """A fast forward for ``module``, or None where it keeps its own."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not kernels.supports(weight.dtype, weight.device):
        return None
    if type(module) is nn.Linear and weight.is_contiguous():
        return OneRowLinear(module, kernels)
    if type(module).__name__.endswith("RMSNorm") and weight.dim() == 1:
        return small_norm(module, kernels)
    return None


class OneRowLinear:
    """Replaces a linear layer's forward."""

    def __init__(self, module: nn.Linear, kernels: NativeKernels) -> None:
        self._module = module
        self._kernels = kernels
        self._columns = module.in_features

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``input`` [..., in], as [..., out]."""
        weight, bias = self._module.weight, self._module.bias
        if input.numel() != self._columns or input.dtype != weight.dtype:
            return nn.functional.linear(input, weight, bias)
        output = input.new_empty((*input.shape[:-1], weight.shape[0]))
        self._kernels.linear(input.contiguous(), weight, bias, output)
        return output


class SmallNorm:
    """Replaces the forward of a root mean square norm.

    Args:
        weight: float32, as it multiplies (some modules store it minus one).
    """

    def __init__(
        self, module: nn.Module, kernels: NativeKernels, weight: torch.Tensor, epsilon: float, early: bool
    ) -> None:
        self._own_forward = module.forward
        self._dtype = module.weight.dtype
        self._kernels = kernels
        self._weight = weight
        self._epsilon = epsilon
        self._early = early

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm of ``hidden_states`` over the last dimension."""
        columns = self._weight.shape[0]
        if (
            hidden_states.dtype != self._dtype
            or hidden_states.shape[-1] != columns
            or hidden_states.numel() > MAX_NORM_ELEMENTS
        ):
            return self._own_forward(hidden_states)
        hidden_states = hidden_states.contiguous()
        output = torch.empty_like(hidden_states)
        self._kernels.rms_norm(hidden_states, self._weight, self._epsilon, self._early, output)
        return output


@torch.no_grad()
def small_norm(module: nn.Module, kernels: NativeKernels) -> SmallNorm | None:
    """The variant of the kernel that does what ``module`` does on random rows, or None."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    stored = module.weight
    if not isinstance(epsilon, float) or not isinstance(stored, torch.Tensor):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, 3, stored.shape[0]), generator=generator).mul_(3.0).to(stored.dtype)
    try:
        expected = module(probe)
    except Exception:  # a norm that wants more than the hidden states: it keeps its own forward
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != probe.shape or expected.dtype != probe.dtype:
        return None
    for offset in (0.0, 1.0):
        for early in (True, False):
            norm = SmallNorm(module, kernels, (stored.float() + offset).contiguous(), epsilon, early)
            if torch.allclose(norm(probe).float(), expected.float(), rtol=TOLERANCE[stored.dtype], atol=1e-6):
                return norm
    return None
