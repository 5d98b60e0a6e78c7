"""Similarity profiles: what calibration measures, that it survives interruption, and which profiles are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.fingerprint import fingerprint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import SchedulingConfig
from raymoe.engine.calibrate import calibrate, sample_rows
from raymoe.engine.host_experts import HostExperts
from raymoe.engine.profile import LayerProfile, Profile, critical_experts, load_similarity
from raymoe.errors import ConfigError
from tests.local import local_service
from tests.toy_models import save_toy

EXPERTS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("qwen3_moe", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


SEQUENCES: list[list[int]] = np.random.default_rng(0).integers(3, 128, size=(4, 40)).tolist()


@pytest.fixture(scope="module")
def profile_path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profile") / "similar.safetensors"
    calibrate(checkpoint, file, sequences=SEQUENCES, tokens=0)
    return file


# --- what is measured -----------------------------------------------------------------------------------


class Seen:
    """What the experts of one layer of a plain model are given."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.path, self.module = experts_modules(model)[layer]
        self.hidden_TH = torch.empty(0)
        self.experts_TK = torch.empty(0)
        self.module.register_forward_pre_hook(self.keep)

    def keep(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.hidden_TH, self.experts_TK = args[0].reshape(-1, args[0].shape[-1]), args[1]

    def output(self, expert: int, rows: np.ndarray) -> torch.Tensor:
        gate, up = (self.hidden_TH[rows] @ self.module.gate_up_proj[expert].T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ self.module.down_proj[expert].T


@pytest.mark.parametrize("layer", [0, 1])
def test_a_profile_is_what_brute_force_gives(
    layer: int, path: Path, checkpoint: Checkpoint, profile_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen = Seen(model, layer)
    cosines, together = [], np.zeros((EXPERTS, EXPERTS), dtype=np.int64)
    for sequence in SEQUENCES:
        with torch.inference_mode():
            model(torch.tensor([sequence]))
            outputs = [seen.output(expert, sample_rows(40, EXPERTS, 32)) for expert in range(EXPERTS)]
            cosines.append(
                [[torch.cosine_similarity(one, other).mean().item() for other in outputs] for one in outputs]
            )
        for chosen_K in seen.experts_TK.tolist():
            together[np.ix_(chosen_K, chosen_K)] += 1
    found = Profile.load(profile_path, checkpoint).layers[layer]
    np.testing.assert_allclose(found.output_EE, np.mean(cosines, axis=0), atol=1e-5)
    assert found.chosen_E.tolist() == together.diagonal().tolist()
    norm_EE = np.sqrt(np.outer(together.diagonal(), together.diagonal()))
    np.testing.assert_allclose(found.coactivation_EE, together / np.maximum(norm_EE, 1), atol=1e-6)


def test_a_profile_says_what_it_was_made_of(checkpoint: Checkpoint, profile_path: Path) -> None:
    profile = Profile.load(profile_path, checkpoint)
    assert (profile.model_type, profile.tokens, len(profile.layers)) == ("qwen3_moe", 160, 2)
    assert profile.fingerprint == fingerprint(checkpoint)
    assert all(layer.chosen_E.sum() == 3 * 160 for layer in profile.layers)


def test_samples_are_spread_and_leave_out_the_first_token() -> None:
    assert sample_rows(256, EXPERTS, 32).tolist() == list(range(3, 256, 4))
    assert sample_rows(5, EXPERTS, 32).tolist() == [1, 4]
    assert sample_rows(256, 1024, 8192).tolist() == [31, 63, 95, 127, 159, 191, 223, 255]  # 256 MiB of outputs


def test_experts_that_do_not_fit_memory_are_read_again(checkpoint: Checkpoint) -> None:
    hidden_RH, rows_P = torch.randn(4, 32), np.array([0, 1, 2, 3], dtype=np.int32)
    experts_P = np.array([0, 0, 5, 7], dtype=np.int32)
    rich, poor = HostExperts(checkpoint, 1 << 30), HostExperts(checkpoint, 0)
    assert torch.equal(rich(1, experts_P, hidden_RH, rows_P), poor(1, experts_P, hidden_RH, rows_P))
    kept = 0 if not checkpoint.is_mapped(1) else 3
    assert sum(tensors is not None for tensors in poor._tables[1].tensors) == kept
    assert sum(tensors is not None for tensors in rich._tables[1].tensors) == 3


def matrix(*pairs: tuple[int, int, float]) -> np.ndarray:
    """Six experts with cosine 0.5 to each other, but for some pairs."""
    output_EE = np.full((6, 6), 0.5, dtype=np.float32)
    np.fill_diagonal(output_EE, 1.0)
    for one, other, value in pairs:
        output_EE[one, other] = output_EE[other, one] = value
    return output_EE


def test_only_an_expert_far_from_all_others_is_critical() -> None:
    alone = [(2, other, 0.1) for other in range(6) if other != 2]
    assert critical_experts(matrix(*alone)).nonzero()[0].tolist() == [2]
    assert not critical_experts(matrix()).any()
    assert not critical_experts(matrix((0, 1, 0.9), (2, 3, 0.1))).any()
    slightly = [(2, other, 0.45) for other in range(6) if other != 2]
    assert not critical_experts(matrix(*slightly)).any()


# --- interruption ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands in for Ctrl-C."""


def after(tokens: int) -> Callable[[str, int, int], None]:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibrating" and done >= tokens:
            raise Interrupted

    return stop


@pytest.mark.parametrize("sequences", [SEQUENCES, None])
def test_an_interrupted_calibration_continues_to_the_same_result(
    sequences: list[list[int]] | None, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    calibrate(checkpoint, whole, sequences=sequences, tokens=258)
    with pytest.raises(Interrupted):
        calibrate(checkpoint, resumed, sequences=sequences, tokens=258, on_tokens=after(80))
    assert not resumed.exists()
    stages: list[str] = []
    progress: list[tuple[str, int, int]] = []
    calibrate(
        checkpoint,
        resumed,
        sequences=sequences,
        tokens=258,
        on_stage=stages.append,
        on_tokens=lambda *told: progress.append(told),
    )
    first, total = (80, 160) if sequences else (129, 258)
    assert stages[0] == f"continuing after {first} of {total} tokens ({resumed}.part)"
    assert progress[0] == ("calibrating", first, total) and progress[-1] == ("calibrating", total, total)
    expected, found = load_file(whole), load_file(resumed)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert sorted(tmp_path.iterdir()) == [resumed, whole]


@pytest.mark.parametrize("other", ["weights", "text"])
def test_what_is_left_of_another_calibration_is_not_used(
    other: str, checkpoint: Checkpoint, profile_path: Path, tmp_path: Path
) -> None:
    output, stages = tmp_path / "p.safetensors", []
    before = open_checkpoint(save_toy("qwen3_moe", tmp_path / "b", seed=1)) if other == "weights" else checkpoint
    with pytest.raises(Interrupted):
        text = SEQUENCES if other == "weights" else SEQUENCES[::-1]
        calibrate(before, output, sequences=text, tokens=0, on_tokens=after(80))
    calibrate(checkpoint, output, sequences=SEQUENCES, tokens=0, on_stage=stages.append)
    assert stages[0] == f"{output}.part is of other weights or another text: starting anew"
    assert all(np.array_equal(tensor, load_file(output)[name]) for name, tensor in load_file(profile_path).items())


def test_a_place_that_cannot_be_written_to_is_told_first(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't write .*p\.safetensors\.part: No such file or directory"):
        calibrate(checkpoint, tmp_path / "none" / "p.safetensors", sequences=SEQUENCES, tokens=0, on_tokens=after(0))


# --- fingerprints and refusals --------------------------------------------------------------------------


def test_a_fingerprint_follows_the_weights_not_the_place(path: Path, tmp_path: Path) -> None:
    copy, changed = tmp_path / "copy", tmp_path / "changed"
    assert fingerprint(open_checkpoint(save_toy("qwen3_moe", copy))) == fingerprint(open_checkpoint(path))
    assert fingerprint(open_checkpoint(save_toy("qwen3_moe", changed, seed=1))) != fingerprint(open_checkpoint(path))


def test_a_profile_of_other_weights_is_refused(profile_path: Path, path: Path, tmp_path: Path) -> None:
    other = open_checkpoint(save_toy("qwen3_moe", tmp_path, seed=1))
    made, own = fingerprint(open_checkpoint(path))[:12], fingerprint(other)[:12]
    message = rf"made for other weights \(qwen3_moe, fingerprint {made}…\) than .* \(qwen3_moe, {own}…\); run"
    with pytest.raises(ConfigError, match=message):
        Profile.load(profile_path, other)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """A profile with something wrong."""
    tensors = load_file(source)
    with safe_open(source, framework="numpy") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def wrong_shape(tensors: dict[str, Any], _metadata: dict[str, str]) -> None:
    tensors["output.1"] = tensors["output.1"][:3]


def missing_tensor(tensors: dict[str, Any], _metadata: dict[str, str]) -> None:
    del tensors["critical.0"]


def other_format(_tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["format"] = "raymoe-profile-0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_shape, r"is damaged: output.1 is float32 \[3, 8\], expected float32 \[8, 8\]; run `raymoe calibrate`"),
        (missing_tensor, "is damaged: 'critical.0'"),
        (other_format, 'format "raymoe-profile-0", expected "raymoe-profile-1"'),
    ],
)
def test_a_damaged_profile_is_refused(
    change: Any, message: str, profile_path: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = rewritten(profile_path, tmp_path / "p.safetensors", change)
    with pytest.raises(ConfigError, match=message):
        Profile.load(file, checkpoint)


def test_a_missing_or_truncated_profile_is_refused(profile_path: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; make it with `raymoe calibrate MODEL -o FILE`"):
        Profile.load(tmp_path / "none.safetensors", checkpoint)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(profile_path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged, or no safetensors file"):
        Profile.load(cut, checkpoint)


# --- what scheduling takes from it ----------------------------------------------------------------------


def scheduling(measure: str, profile: Path | None) -> SchedulingConfig:
    return SchedulingConfig.model_validate(
        {"policy": "importance", "similarity": measure, "profile": str(profile) if profile else None}
    )


@pytest.mark.parametrize("measure", ["coactivation", "output"])
def test_a_profile_ranks_substitutes(measure: str, profile_path: Path, checkpoint: Checkpoint) -> None:
    similarity = load_similarity(scheduling(measure, profile_path), checkpoint)
    assert similarity is not None
    layer = Profile.load(profile_path, checkpoint).layers[1]
    preference = similarity.preference(1, 4, np.zeros(EXPERTS, dtype=np.float32))
    assert preference.tolist() == getattr(layer, f"{measure}_EE")[4].tolist()
    assert similarity.critical_E(1) is not None
    assert similarity.critical_E(1).tolist() == layer.critical_E.tolist()


def test_by_score_no_profile_is_read(checkpoint: Checkpoint) -> None:
    assert load_similarity(scheduling("score", Path("/no/such")), checkpoint) is None


def test_a_wrong_profile_is_refused_with_the_name_of_its_field(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"^scheduling\.profile: can't read the profile"):
        load_similarity(scheduling("output", Path("/no/such")), checkpoint)


def test_layers_may_have_different_numbers_of_experts() -> None:
    def layer(experts: int) -> LayerProfile:
        square = np.eye(experts, dtype=np.float32)
        chosen = np.zeros(experts, dtype=np.int64)
        return LayerProfile(
            coactivation_EE=square, output_EE=square, chosen_E=chosen, critical_E=np.arange(experts) == experts - 1
        )

    profile = Profile(layers=(layer(3), layer(5)), fingerprint="", model_type="", tokens=0, text_sha256="")
    similarity = profile.similarity("output")
    for index, experts in enumerate((3, 5)):
        window_RE = np.zeros((2, experts), dtype=np.float32)
        assert similarity.preference(index, np.array([0, 2]), window_RE).shape == (2, experts)
        assert similarity.critical_E(index).tolist() == [False] * (experts - 1) + [True]


def test_a_running_model_changes_its_similarity(path: Path, profile_path: Path) -> None:
    changed = scheduling("output", profile_path)
    with local_service(path, policy="importance", profile=str(profile_path)) as service:
        assert service.experts.similarity is None
        service.reconfigure(changed)
        kept = service.experts.similarity
        assert kept is not None
        service.reconfigure(changed.changed({"alpha": 0.1}))
        assert service.experts.similarity is kept
        service.reconfigure(changed.changed({"similarity": "score"}))
        assert service.experts.similarity is None
