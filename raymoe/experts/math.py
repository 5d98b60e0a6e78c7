"""One expert's arithmetic, from the architecture's own experts module.

transformers' experts interface describes every architecture by a few flags (gate, bias, transposed layout,
norm after the expert) and a gating function. Following them for a single expert gives what the module's own
forward gives, without its loops over experts, so results are independent of who else is computed where.

Shapes: N rows, H hidden, I intermediate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from raymoe.checkpoint.checkpoint import ExpertTensors


class ExpertMath:
    """Computes single experts of one MoE layer.

    Args:
        module: the layer's experts module; only its flags, activation and gating function are used, so it
            may lie on the meta device.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.has_gate = bool(module.has_gate)
        self.is_transposed = bool(module.is_transposed)
        self.post_norm = (
            getattr(module, "post_expert_norm", None) if getattr(module, "has_post_expert_norm", False) else None
        )
        self.first = "gate_up_proj" if self.has_gate else "up_proj"
        self.activate = module._apply_gate if self.has_gate else module.act_fn

    def __call__(self, weights: ExpertTensors, x_NH: torch.Tensor) -> torch.Tensor:
        """The expert's output for each row, not yet weighted by the router: [N, H] -> [N, H]."""
        inner = self._project(x_NH, weights, self.first)
        output = self._project(self.activate(inner), weights, "down_proj")
        return output if self.post_norm is None else self.post_norm(output)

    def _project(self, x: torch.Tensor, weights: ExpertTensors, name: str) -> torch.Tensor:
        weight = weights[name]
        bias = weights.get(f"{name}_bias")
        if not self.is_transposed:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    @property
    def is_silu_gated(self) -> bool:
        """Whether this is the common form silu(gate) * up without bias, clamp or norm, as fused kernels need it."""
        return (
            self.has_gate
            and not self.module.has_bias
            and not self.is_transposed
            and self.post_norm is None
            and bool(getattr(self.module, "is_concatenated", True))
            and type(self.module)._apply_gate is moe._default_apply_gate
            and isinstance(getattr(self.module, "act_fn", None), (nn.SiLU, SiLUActivation))
        )
