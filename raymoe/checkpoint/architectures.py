"""Which transformers architectures can be served, and how their routed experts are recognised.

transformers gathers a layer's routed experts in one module (``*Experts``) that is decorated with
``use_experts_implementation`` and called as ``experts(hidden, top_k_index, top_k_weights)``. Every causal
language model built on it is supported; nothing here names an architecture.
"""

import functools
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@functools.cache
def supported_model_types() -> tuple[str, ...]:
    """Model types of the installed transformers whose module uses the experts interface."""
    models = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        source = models / module / f"modeling_{module}.py"
        if source.exists() and "use_experts_implementation" in source.read_text(encoding="utf-8"):
            found.append(model_type)
    return tuple(sorted(found))


def is_experts_module(module: nn.Module) -> bool:
    """Whether ``module`` holds a layer's routed experts behind the experts interface."""
    return all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed"))


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The routed-experts modules of ``model`` in the order of its layers: (module path, module).

    Their interface is a set of attributes that no type describes.
    """
    return [(path, module) for path, module in model.named_modules() if is_experts_module(module)]
