"""Take small operations out of the trunk's decode step on a CPU.

At one token, or a few where drafts are read along, a linear layer is little more than reading its weights, and a norm
is eight tiny operations. Native kernels do each in one call. Modules keep their own forward for every other shape, so
prefill and all architectures work as before. A norm is replaced only if, on random input, the kernel gives what the
module gives.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raymoe.kernels.native import NativeKernels, load_native
from raymoe.model.blocks import MOST_ROWS, fused
from raymoe.model.norms import SmallNorm, small_norm

ATTENTION = "raymoe_sdpa"
SPECIAL_ATTENTION = ("position_bias", "cache", "softcap")  # what sdpa knows beyond masks; the kernel does not


def use_native_kernels(model: PreTrainedModel) -> int:
    """Route calls of one token through native kernels: linear layers (of a few tokens too), norms, attention, and whole
    blocks of these.

    Only exact ``nn.Linear`` modules, proven norms and ``sdpa`` attention on the CPU are touched. Returns how many
    modules were changed.
    """
    kernels = load_native(torch.get_num_threads())
    if kernels is None:
        return 0
    if takes_any_attention(model) and kernels.supports(model.dtype, model.device):
        model.set_attn_implementation(ATTENTION)
        for module in model.modules():
            module.raymoe_kernels = kernels  # type: ignore[assignment]
    changed = 0
    for module in model.modules():
        replacement = replacement_for(module, kernels) or fused(module, kernels)
        if replacement is not None:
            module.forward = replacement
            changed += 1
    return changed


def takes_any_attention(model: PreTrainedModel) -> bool:
    """Whether the model attends through ``sdpa`` and does not care for the implementation's name.

    Architectures with sparse attention, for example, build their masks by that name; they keep what they have.
    """
    source = Path(inspect.getfile(type(model).__mro__[1])).read_text(encoding="utf-8")
    by_name = re.search(r"_attn_implementation\s*(in\b|==|!=|not\b)", source)
    return model.config._attn_implementation == "sdpa" and by_name is None


def replacement_for(module: nn.Module, kernels: NativeKernels) -> "FewRowsLinear | SmallNorm | None":
    """A fast forward for ``module``, or None where it keeps its own."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not kernels.supports(weight.dtype, weight.device):
        return None
    if type(module) is nn.Linear and weight.is_contiguous():
        return FewRowsLinear(module, kernels)
    if type(module).__name__.endswith("RMSNorm") and weight.dim() == 1:
        return small_norm(module, kernels)
    return None


def one_token_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention implementation for transformers: the kernel for a single token without a mask, else ``sdpa``.

    Args:
        query: [batch, heads, tokens, d]; key and value: [batch, kv heads, length, d].
    """
    kernels: NativeKernels | None = getattr(module, "raymoe_kernels", None)
    plain = attention_mask is None and all(kwargs.get(name) is None for name in SPECIAL_ATTENTION)
    if (
        kernels is None
        or not plain
        or query.shape[0] != 1
        or query.shape[2] != 1
        or query.dtype != key.dtype
        or key.stride(-1) != 1
        or value.stride(-1) != 1
        or not kernels.supports(query.dtype, query.device)
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    heads, d = query.shape[1], query.shape[3]
    output = query.new_empty((1, 1, heads, value.shape[3]))
    scale = d**-0.5 if scaling is None else scaling
    kernels.attention(query.reshape(heads, d), key[0], value[0], scale, output)
    return output, None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, one_token_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


class FewRowsLinear:
    """Replaces a linear layer's forward."""

    def __init__(self, module: nn.Linear, kernels: NativeKernels) -> None:
        self._module = module
        self._kernels = kernels
        self._columns = module.in_features

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for ``input`` [..., in], as [..., out]."""
        weight, bias = self._module.weight, self._module.bias
        rows = input.numel() // self._columns
        if not 1 <= rows <= MOST_ROWS or input.shape[-1] != self._columns or input.dtype != weight.dtype:
            return nn.functional.linear(input, weight, bias)
        output = input.new_empty((*input.shape[:-1], weight.shape[0]))
        self._kernels.linear(input.contiguous(), weight, bias, output)
        return output
