"""The trunk's weights: read, or mapped where the file has them as they are served, so that trunks share them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.checkpoint.opening import SINGLE_FILE, open_checkpoint
from raymoe.errors import CheckpointError
from raymoe.model.router import ProbeExperts
from raymoe.model.trunk import build_trunk
from tests.toy_models import save_toy

CPU = torch.device("cpu")


def addresses(trunk: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in trunk.parameters()}


def test_a_trunk_in_the_files_precision_is_mapped_once_for_all(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy("mixtral", tmp_path / "toy"), "float32", map_weights=True)
    model, shadow = build_trunk(checkpoint, ProbeExperts(), CPU), build_trunk(checkpoint, ProbeExperts(), CPU)
    assert checkpoint.bytes_read == 0
    assert addresses(model) == addresses(shadow)


def test_a_trunk_is_read_once_unless_mapping_was_asked_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy("mixtral", tmp_path / "toy"), "float32")
    build_trunk(checkpoint, ProbeExperts(), CPU)
    assert checkpoint.bytes_read == checkpoint.trunk_bytes


def test_a_trunk_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = save_toy("mixtral", tmp_path / "toy")
    checkpoint = open_checkpoint(path, "float32")
    os.utime(path / SINGLE_FILE, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was read; put the file back"):
        build_trunk(checkpoint, ProbeExperts(), CPU)


def test_a_trunk_in_another_precision_has_weights_of_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy("mixtral", tmp_path / "toy"), "bfloat16")  # stored as float32
    trunk = build_trunk(checkpoint, ProbeExperts(), CPU)
    assert checkpoint.bytes_read == 2 * checkpoint.trunk_bytes
    assert all(parameter.dtype == torch.bfloat16 for parameter in trunk.parameters())


def test_the_file_stays_as_it_was_whatever_is_done_to_a_trunk(tmp_path: Path) -> None:
    path = save_toy("mixtral", tmp_path / "toy")
    trunk = build_trunk(open_checkpoint(path, "float32", map_weights=True), ProbeExperts(), CPU)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    again = build_trunk(open_checkpoint(path, "float32"), ProbeExperts(), CPU)
    assert all(parameter.any() for parameter in again.parameters())
