"""Which checkpoint tensors make up which expert, from transformers' own conversion mapping.

A fused parameter of a layer's experts module, such as ``gate_up_proj [E, 2I, H]``, comes either from one
tensor per expert and projection, or from fused tensors with the experts in the first dimension. Applying the
same ``WeightConverter`` to one expert's tensors (or rows) yields that expert's slice of the parameter.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from raymoe.errors import CheckpointError

ReadTensor = Callable[[str, int | None], torch.Tensor]
"""``(tensor name, row or None) -> tensor``; a row keeps its dimension, as size 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterLayout:
    """One parameter of an experts module: its shape per expert and the tensors it is made of.

    ``sources`` maps a converter's source pattern to tensor names: as many as experts (in the order of the
    experts), or a single fused one.
    """

    name: str
    full_name: str
    shape: tuple[int, ...]
    sources: dict[str, tuple[str, ...]]
    converter: WeightConverter | None

    @property
    def is_fused(self) -> bool:
        """Whether the experts lie in the first dimension of the source tensors."""
        return all(len(names) == 1 for names in self.sources.values())

    @property
    def numel(self) -> int:
        """Elements per expert."""
        return torch.Size(self.shape).numel()

    def tensor_names(self, expert: int) -> tuple[str, ...]:
        """The checkpoint tensors that hold this parameter of ``expert``."""
        return tuple(names[0] if self.is_fused else names[expert] for names in self.sources.values())

    def read(self, expert: int, read_tensor: ReadTensor) -> torch.Tensor:
        """This expert's slice of the parameter, of ``self.shape``, in the checkpoint's dtype."""
        row = expert if self.is_fused else None
        tensors = {
            pattern: [read_tensor(names[0] if self.is_fused else names[expert], row)]
            for pattern, names in self.sources.items()
        }
        if self.converter is None:
            value = next(iter(tensors.values()))[0]
            return value.view(self.shape) if self.is_fused else value
        converter = deepcopy(self.converter)
        shape_of_one = torch.empty((1, *self.shape), device="meta")
        converted: dict = dict(tensors)
        for operation in converter.operations:
            converted = operation.convert(
                converted,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.full_name,
                model=_ShapeOfOne(shape_of_one),
                config=None,
            )
        value = next(iter(converted.values()))
        value = value[0] if isinstance(value, list) else value
        return value[0] if value.dim() == len(self.shape) + 1 else value


@dataclass(frozen=True, slots=True)
class _ShapeOfOne:
    """Stands in for the model where a conversion asks for the shape of its target."""

    parameter: torch.Tensor

    def get_parameter(self, _name: str) -> torch.Tensor:
        return self.parameter


@dataclass(slots=True, kw_only=True)
class _Collected:
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)


def map_tensors(
    skeleton: PreTrainedModel, tensor_names: list[str], expert_parameters: set[str]
) -> tuple[dict[str, _Collected], list[str]]:
    """Split checkpoint tensors into those of routed experts, by target parameter, and the trunk's.

    Follows the renaming that transformers applies on loading, so that both always agree.
    """
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    targets = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    experts: dict[str, _Collected] = {}
    trunk: list[str] = []
    for name in sorted(tensor_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], prefix, targets)
        if target not in expert_parameters:
            if target in targets:  # else of no use here: vision towers, extra prediction heads
                trunk.append(name)
            continue
        collected = experts.setdefault(target, _Collected(converter=by_pattern[pattern] if pattern else None))
        collected.sources.setdefault(pattern or name, []).append(name)
    return experts, trunk


def expert_parameters(path: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full name -> shape per expert, for every parameter of an experts module.

    Raises CheckpointError for a parameter without an expert dimension: it can't be split into experts.
    """
    shapes = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or parameter.shape[0] != module.num_experts:
            raise CheckpointError(
                f"{path}.{name} has shape {list(parameter.shape)}, which has no first dimension of "
                f"{module.num_experts} experts; this architecture keeps something else among its experts"
            )
        shapes[f"{path}.{name}"] = tuple(parameter.shape[1:])
    return shapes
