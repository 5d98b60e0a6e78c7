"""Root mean square norms of a few rows in one call of a native kernel, where that does what the module does."""

import torch
from torch import nn

from raymoe.kernels.native import NativeKernels

MAX_NORM_ELEMENTS = 1 << 15  # one token's states and heads; more is prefill, where torch does well
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # relative, about an ulp of bfloat16


class SmallNorm:
    """Replaces the forward of a root mean square norm.

    Attributes:
        weight: float32, as it multiplies (some modules store it minus one).
        epsilon: added to the mean square.
        early: whether the normalised value is rounded to the type of the states before the weight is applied.
    """

    def __init__(
        self, module: nn.Module, kernels: NativeKernels, weight: torch.Tensor, epsilon: float, early: bool
    ) -> None:
        self._own_forward = module.forward
        self._dtype = module.weight.dtype
        self._kernels = kernels
        self.weight = weight
        self.epsilon = epsilon
        self.early = early

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm of ``hidden_states`` over the last dimension."""
        columns = self.weight.shape[0]
        if (
            hidden_states.dtype != self._dtype
            or hidden_states.shape[-1] != columns
            or hidden_states.numel() > MAX_NORM_ELEMENTS
        ):
            return self._own_forward(hidden_states)
        hidden_states = hidden_states.contiguous()
        output = torch.empty_like(hidden_states)
        self._kernels.rms_norm(hidden_states, self.weight, self.epsilon, self.early, output)
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
