"""The trunk's weights: mapped where the file has them as they are served, so that several trunks share them."""

from pathlib import Path
from typing import Any

import torch

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.model.router import ProbeExperts
from raymoe.model.trunk import build_trunk
from tests.toy_models import save_toy

CPU = torch.device("cpu")


def addresses(trunk: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in trunk.parameters()}


def test_a_trunk_in_the_files_precision_is_mapped_once_for_all(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy("mixtral", tmp_path / "toy"), "float32")
    model, shadow = build_trunk(checkpoint, ProbeExperts(), CPU), build_trunk(checkpoint, ProbeExperts(), CPU)
    assert checkpoint.bytes_read == 0
    assert addresses(model) == addresses(shadow)


def test_a_trunk_in_another_precision_has_weights_of_its_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy("mixtral", tmp_path / "toy"), "bfloat16")  # stored as float32
    trunk = build_trunk(checkpoint, ProbeExperts(), CPU)
    assert checkpoint.bytes_read == 2 * checkpoint.trunk_bytes
    assert all(parameter.dtype == torch.bfloat16 for parameter in trunk.parameters())


def test_the_file_stays_as_it_was_whatever_is_done_to_a_trunk(tmp_path: Path) -> None:
    path = save_toy("mixtral", tmp_path / "toy")
    trunk = build_trunk(open_checkpoint(path, "float32"), ProbeExperts(), CPU)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    again = build_trunk(open_checkpoint(path, "float32"), ProbeExperts(), CPU)
    assert all(parameter.any() for parameter in again.parameters())
