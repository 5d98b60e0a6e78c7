"""The trunk: a transformers model built without its routed experts.

Its memory never contains them: modules are built on the meta device, the experts' parameters are taken out,
and only the trunk's tensors are read. In each MoE layer the architecture's own router runs, and the experts
module hands hidden states and choices to an ``ExpertBackend``.

T tokens, K experts per token, H hidden.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.errors import CheckpointError

IMPLEMENTATION = "raymoe"


class ExpertBackend(Protocol):
    """Whoever has the last word on routing, and computes routed experts."""

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts to compute and their weights, given the router's; the same tensors where nothing changes."""
        ...

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H]."""
        ...


def remote_experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for transformers: ask the backend, then combine.

    The sum runs over K in the router's order and in the precision of transformers' own ``grouped_mm``, so the
    result does not depend on who computed what.
    """
    step = getattr(module, "raymoe_step", None)
    if step is not None:  # one is being captured
        combined: torch.Tensor = step(module.raymoe_layer, hidden_states, top_k_index, top_k_weights)
        return combined
    backend: ExpertBackend = module.raymoe_backend
    experts_TK, weights_TK = backend.route(module.raymoe_layer, top_k_index, top_k_weights)
    output_TKH = backend.compute(module.raymoe_layer, hidden_states, experts_TK)
    weighted_TKH = output_TKH * weights_TK.unsqueeze(-1)
    return weighted_TKH.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts_forward)


class LazyTensor:
    """A checkpoint tensor that is read when transformers' loader asks for it, as ``tensor[...]``.

    With ``map_weights``, where the file has it as it is served it is mapped, so that a shadow and a model on one node
    share its pages.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, _index: Any) -> torch.Tensor:
        checkpoint = self._checkpoint
        if checkpoint.maps_weights and checkpoint.info(self._name).dtype == checkpoint.dtype:
            return checkpoint.view_tensor(self._name)
        return checkpoint.read_tensor(self._name)


def build_trunk(checkpoint: Checkpoint, backend: ExpertBackend, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode on ``device``, its routed experts behind ``backend``.

    Raises CheckpointError where trunk tensors are missing, mis-shaped, or were changed meanwhile.
    """
    trunk_class: Any = without_experts(checkpoint.model_class)
    state = {name: LazyTensor(checkpoint, name) for name in checkpoint.trunk_tensors}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = trunk_class.from_pretrained(
            None, config=checkpoint.config, state_dict=state, dtype=checkpoint.dtype, output_loading_info=True
        )
    except RuntimeError as error:  # transformers' word for shapes that do not fit
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    check_report(checkpoint, report)
    checkpoint.check_unchanged()
    if (checkpoint.path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    model.set_experts_implementation(IMPLEMENTATION)
    for index, (_, module) in enumerate(experts_modules(model)):
        module.raymoe_layer = index
        module.raymoe_backend = backend
    return model.to(device).requires_grad_(False).eval()


def without_experts(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class like ``model_class`` whose instances have no parameters in their experts modules.

    It keeps name and module, by which transformers finds the architecture's weight conversions.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for _, module in experts_modules(self):
            for name, _parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, None)
            module._is_hf_initialized = True

    members = {
        "__init__": __init__,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), members)


def check_report(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Raise CheckpointError for what transformers' loader found wrong with the trunk."""
    mismatched = report.get("mismatched_keys") or ()
    for name, found, expected in mismatched:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has shape {list(found)}, but config.json asks for {list(expected)}"
        )
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{checkpoint.path} lacks the tensor {missing[0]}{more}: incomplete download?")


def tokenizer_path(checkpoint: Checkpoint) -> Path | None:
    """The directory to load a tokenizer from, or None where the checkpoint has none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return checkpoint.path if any((checkpoint.path / name).exists() for name in names) else None
