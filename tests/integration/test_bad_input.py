"""A checkpoint that changes under a running cluster: told, never served."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load_file, save_file

import raymoe
from raymoe.actors.names import NAMESPACE, worker_name
from raymoe.checkpoint.opening import SINGLE_FILE
from raymoe.errors import CheckpointError, ExpertOutputError
from raymoe.types import ExpertKey
from tests.toy_models import PROMPT, reference_at, save_toy

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def config(path: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(path), "dtype": "float32"},
        "devices": [{"name": "a"}, {"name": "b"}],
        "replication": 1,
    }


def call(app: str, device: str, method: str, *arguments: Any) -> Any:
    """What a worker answers, or our own error that it raised."""
    handle = ray.get_actor(worker_name(app, device), NAMESPACE)
    try:
        return ray.get(getattr(handle, method).remote(*arguments), timeout=60)
    except RayTaskError as error:
        assert isinstance(error.cause, Exception)
        raise error.cause from None


def test_workers_agree_on_what_they_read(local_ray: None, tmp_path: Path) -> None:
    path = save_toy("qwen3_moe", tmp_path / "model")
    expected = reference_at(path, PROMPT, 8)
    with raymoe.launch(config(path), app="agree") as moe:
        digests = call("agree", "a", "digests")
        key, found = next(iter(digests.items()))
        owned = call("agree", "b", "describe").owned
        assert key not in owned
        assert call("agree", "b", "own", (key,), False, {key: found}) == {key: found}
        other = next(each for each in digests if each != key)
        wrong = tuple(digest ^ 1 for digest in digests[other])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.layers\..* is not what it was"):
            call("agree", "b", "own", (other,), False, {other: wrong})
        assert set(call("agree", "b", "describe").owned) == {*owned, key}
        assert moe.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True).token_ids == expected


def test_a_worker_that_can_not_read_keeps_what_it_has(local_ray: None, tmp_path: Path) -> None:
    path = save_toy("qwen3_moe", tmp_path / "model")
    expected = reference_at(path, PROMPT, 8)
    with raymoe.launch(config(path), app="truncated") as moe:
        owned = call("truncated", "b", "describe").owned
        os.truncate(path / SINGLE_FILE, 1000)
        missing = tuple(key for key in everything() if key not in owned)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: model\.layers\..* has 1,000"):
            call("truncated", "b", "own", missing, False)
        assert call("truncated", "b", "describe").owned == owned
        assert moe.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True).token_ids == expected


def test_an_engine_with_other_weights_than_its_workers_is_refused(local_ray: None, tmp_path: Path) -> None:
    path = save_toy("qwen3_moe", tmp_path / "model")
    other = save_toy("qwen3_moe", tmp_path / "other", seed=1)
    with raymoe.launch(config(path), app="replaced"):
        os.replace(other / SINGLE_FILE, path / SINGLE_FILE)
        with pytest.raises(CheckpointError, match=r'device "[ab]" on node .* serves other weights \(fingerprint'):
            raymoe.launch(config(path), app="replaced")


def test_a_poisoned_expert_is_named_with_its_device_and_counted(local_ray: None, tmp_path: Path) -> None:
    path = save_toy("qwen3_moe", tmp_path / "model")
    tensors = load_file(path / SINGLE_FILE)
    for name, tensor in tensors.items():
        if "layers.3.mlp.experts" in name and "down_proj" in name:  # all of MoE layer 1
            tensor[0, 0] = torch.nan
    save_file(tensors, path / SINGLE_FILE, metadata={"format": "pt"})
    with raymoe.launch(config(path), app="poisoned") as moe:
        with pytest.raises(ExpertOutputError, match=r'layer 1, expert \d on device "[ab]" is to blame'):
            moe.generate(PROMPT, max_tokens=4, temperature=0)
        stats = moe.stats()
        assert stats.engine is not None
        (fault,) = stats.engine.faults
        assert ExpertKey(layer=fault.layer, expert=fault.expert) in call("poisoned", fault.device, "describe").owned
        assert {name: device.bad_outputs for name, device in stats.devices.items()} == {
            name: int(name == fault.device) for name in "ab"
        }


def everything() -> list[ExpertKey]:
    return [ExpertKey(layer=layer, expert=expert) for layer in range(2) for expert in range(8)]
