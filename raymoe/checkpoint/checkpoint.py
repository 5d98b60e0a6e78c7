"""An open checkpoint: what it holds, and lazy reads of one expert or of the trunk.

Opening reads configuration and headers only. ``Checkpoint.read_expert`` reads that expert's bytes and
nothing else.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raymoe.checkpoint.layout import ParameterLayout
from raymoe.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from raymoe.types import ExpertKey, LayerSize

ExpertTensors = dict[str, torch.Tensor]
"""One expert's parameters by name within its experts module, each without the expert dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One MoE layer: ``index`` counts MoE layers from 0, ``path`` is its experts module in the model."""

    index: int
    path: str
    num_experts: int
    top_k: int
    parameters: tuple[ParameterLayout, ...]

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert in ``dtype``."""
        return sum(parameter.numel for parameter in self.parameters) * dtype.itemsize

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one expert."""
        return {parameter.name: parameter.shape for parameter in self.parameters}


class Checkpoint:
    """An opened model directory. Create it with ``open_checkpoint``.

    Attributes:
        path: the local directory.
        config: the transformers configuration.
        model_class: the causal language model's class.
        dtype: precision in which the model is served; weights are converted to it as they are read.
        layers: the MoE layers in order.
        trunk_tensors: names of all tensors that belong to no routed expert.
    """

    def __init__(
        self,
        *,
        path: Path,
        config: PreTrainedConfig,
        model_class: type[PreTrainedModel],
        skeleton: PreTrainedModel,
        dtype: torch.dtype,
        files: dict[str, SafetensorsFile],
        layers: tuple[MoeLayer, ...],
        trunk_tensors: tuple[str, ...],
    ) -> None:
        self.path = path
        self.config = config
        self.model_class = model_class
        self.skeleton = skeleton
        self.dtype = dtype
        self.layers = layers
        self.trunk_tensors = trunk_tensors
        self._files = files

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor."""
        return self._files[name].tensors[name]

    def read_tensor(self, name: str, row: int | None = None) -> torch.Tensor:
        """One tensor as it is stored, or one row of its first dimension, in fresh memory."""
        return self._files[name].read(name, row)

    def view_tensor(self, name: str, row: int | None = None) -> torch.Tensor:
        """Like ``read_tensor``, but mapped: read when touched, its pages shared between processes."""
        return self._files[name].view(name, row)

    def read_expert(self, key: ExpertKey) -> ExpertTensors:
        """One expert in the served dtype. Mapped without a copy where the file already has it in that form."""
        layer = self.layers[key.layer]
        tensors = {}
        for parameter in layer.parameters:
            value = parameter.read(
                key.expert, self.view_tensor if self._is_stored_ready(parameter) else self.read_tensor
            )
            tensors[parameter.name] = value.to(self.dtype).contiguous()
        return tensors

    def is_mapped(self, layer: int) -> bool:
        """Whether experts of this layer need no conversion, so that reads map the file and share its pages."""
        return all(self._is_stored_ready(parameter) for parameter in self.layers[layer].parameters)

    def _is_stored_ready(self, parameter: ParameterLayout) -> bool:
        name = parameter.tensor_names(0)[0]
        return parameter.converter is None and self.info(name).dtype == self.dtype

    @property
    def weight_files(self) -> list[SafetensorsFile]:
        """The safetensors files, by name."""
        files = {id(file): file for file in self._files.values()}
        return sorted(files.values(), key=lambda file: file.path.name)

    @property
    def bytes_read(self) -> int:
        """Bytes copied out of the files so far (mapped tensors are not counted)."""
        return sum(file.bytes_read for file in self.weight_files)

    @cached_property
    def trunk_bytes(self) -> int:
        """Bytes of the trunk in the served dtype."""
        return sum(
            self.info(name).nbytes // self.info(name).dtype.itemsize * self.dtype.itemsize
            for name in self.trunk_tensors
        )

    @cached_property
    def routed_bytes(self) -> int:
        """Bytes of all routed experts in the served dtype."""
        return sum(layer.num_experts * layer.expert_bytes(self.dtype) for layer in self.layers)

    def sizes(self) -> tuple[LayerSize, ...]:
        """What placement needs to know of every MoE layer."""
        return tuple(
            LayerSize(experts=layer.num_experts, expert_bytes=layer.expert_bytes(self.dtype), top_k=layer.top_k)
            for layer in self.layers
        )

    def close(self) -> None:
        """Close all files. Mapped tensors stay valid."""
        for file in self._files.values():
            file.close()
