"""An open checkpoint: what it holds, and lazy reads of one expert or of the trunk.

Opening reads configuration and headers only. ``Checkpoint.read_expert`` reads that expert's bytes and
nothing else. What it reads is recorded as a digest; whoever reads it again gets the same bytes, or an error.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raymoe.checkpoint.digests import Digests, Piece, digest_of
from raymoe.checkpoint.layout import ParameterLayout
from raymoe.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from raymoe.errors import CheckpointError
from raymoe.types import ExpertDigests, ExpertKey, LayerSize

log = logging.getLogger(__name__)

WAY_OUT = "put the file back as it was, or end the cluster and start it with the new one"

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

    def pieces(self, expert: int) -> list[Piece]:
        """The tensors, or rows of them, that one expert is made of."""
        return [
            (name, expert if parameter.is_fused else None)
            for parameter in self.parameters
            for name in parameter.tensor_names(expert)
        ]

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
        maps_weights: whether what is stored as it is served is mapped instead of read.
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
        maps_weights: bool = False,
    ) -> None:
        self.path = path
        self.config = config
        self.model_class = model_class
        self.skeleton = skeleton
        self.dtype = dtype
        self.layers = layers
        self.trunk_tensors = trunk_tensors
        self.maps_weights = maps_weights
        self._files = files
        self._digests = Digests()

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
        """One expert in the served dtype. Mapped without a copy where the file has it in that form and that was asked.

        Raises CheckpointError where it can't be read, or is not what was read or expected before.
        """
        tensors = {}
        for parameter in self.layers[key.layer].parameters:
            read = partial(self._read_piece, mapped=self._is_mapped(parameter))
            tensors[parameter.name] = parameter.read(key.expert, read).to(self.dtype).contiguous()
        return tensors

    def is_mapped(self, layer: int) -> bool:
        """Whether experts of this layer need no conversion and are mapped, so that processes share their pages."""
        return all(self._is_mapped(parameter) for parameter in self.layers[layer].parameters)

    def _is_mapped(self, parameter: ParameterLayout) -> bool:
        stored_ready = parameter.converter is None and self.info(parameter.tensor_names(0)[0]).dtype == self.dtype
        return self.maps_weights and stored_ready

    # --- the same bytes every time ----------------------------------------------------------------------

    def expert_digests(self, keys: Iterable[ExpertKey]) -> ExpertDigests:
        """What was recorded of these experts, in the order of ``MoeLayer.pieces``; those not read yet are left out."""
        found = ((key, self._digests.of(self.layers[key.layer].pieces(key.expert))) for key in keys)
        return {key: digests for key, digests in found if digests is not None}

    def expect_experts(self, digests: ExpertDigests) -> None:
        """Take over what others have read.

        Raises CheckpointError where this process has read something else.
        """
        for key, theirs in digests.items():
            for piece, digest in zip(self.layers[key.layer].pieces(key.expert), theirs, strict=True):
                if self._digests.record(piece, digest) != digest:
                    raise self._differs(piece, digest)

    def check_unchanged(self) -> None:
        """Raise CheckpointError where somebody wrote to a file since it was opened."""
        for file in self.weight_files:
            if file.has_changed:
                raise CheckpointError(f"{file.path} was changed while it was read; {WAY_OUT}")

    def _read_piece(self, name: str, row: int | None, *, mapped: bool) -> torch.Tensor:
        """A part of an expert; the file is opened once more where it is not as it was, for it may have come back."""
        try:
            return self._read_checked(name, row, mapped)
        except CheckpointError as error:
            try:
                self._files[name].reopen()
                tensor = self._read_checked(name, row, mapped)
            except CheckpointError as still:
                raise error from still
            log.warning("%s could be read again: %s", self._files[name].path, error)
            return tensor

    def _read_checked(self, name: str, row: int | None, mapped: bool) -> torch.Tensor:
        file, piece = self._files[name], (name, row)
        tensor = file.view(name, row) if mapped else file.read(name, row)
        digest = digest_of(tensor)
        if piece not in self._digests and file.has_changed:
            raise CheckpointError(f"{file.path} was changed before {name} was first read; {WAY_OUT}")
        if self._digests.record(piece, digest) != digest:
            raise self._differs(piece, digest)
        return tensor

    def _differs(self, piece: Piece, digest: int) -> CheckpointError:
        name, row = piece
        place = name if row is None else f"{name}[{row}]"
        return CheckpointError(
            f"{self._files[name].path}: {place} is not what it was when it was first read (CRC-32 {digest:08x}, then "
            f"{self._digests.known(piece) or 0:08x}); {WAY_OUT}"
        )

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
