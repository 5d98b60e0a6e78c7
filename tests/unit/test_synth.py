"""Synthetic checkpoints: the size asked for, the published layout, the same bytes for the same seed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.checkpoint.synth import PROPORTIONS, choose_config, draw, published_tensors, write_synthetic
from raymoe.errors import CheckpointError

SIZE = 8_000_000


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe checkpoint of 8 MB in several shards."""
    out = tmp_path_factory.mktemp("synth") / "qwen3_moe"
    write_synthetic(out, like="qwen3_moe", size_bytes=SIZE, shard_bytes=3_000_000)
    return out


def digest(directory: Path) -> str:
    files = sorted(directory.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("like", PROPORTIONS)
def test_uses_at_least_nine_tenths_of_the_size_and_no_more(like: str) -> None:
    config = choose_config(like, SIZE, torch.bfloat16)
    total = sum(tensor.nbytes for tensor in published_tensors(config, torch.bfloat16))
    assert 0.9 * SIZE <= total <= SIZE


def test_one_gigabyte_has_24_layers_and_about_a_tenth_active_per_token() -> None:
    config = choose_config("qwen3_moe", 10**9, torch.bfloat16)
    tensors = published_tensors(config, torch.bfloat16)
    routed = sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
    embeddings = sum(tensor.nbytes for tensor in tensors if "embed_tokens" in tensor.name)
    total = sum(tensor.nbytes for tensor in tensors)
    active = total - embeddings - routed + routed * config.num_experts_per_tok // config.num_local_experts
    assert config.num_hidden_layers == 24
    assert 0.95e9 <= total <= 1e9
    assert 85e6 <= active <= 100e6


@pytest.mark.parametrize("like", PROPORTIONS)
def test_loads_in_transformers_and_here_with_finite_varied_output(like: str, tmp_path: Path) -> None:
    out = tmp_path / like
    report = write_synthetic(out, like=like, size_bytes=SIZE)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    with torch.inference_mode():
        logits = model(torch.arange(24).unsqueeze(0)).logits[0]
    checkpoint = open_checkpoint(out)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == checkpoint.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert len(logits.argmax(dim=-1).unique()) > 12
    assert {layer.num_experts for layer in checkpoint.layers} == {report.experts}
    assert checkpoint.trunk_bytes + checkpoint.routed_bytes == report.nbytes


def test_routing_varies_by_token(synthetic: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(synthetic)
    with torch.inference_mode():
        output = model(torch.arange(48).unsqueeze(0), output_router_logits=True)
    for logits_TE in output.router_logits:
        assert len(logits_TE.topk(4).indices.unique()) >= 24  # of 64, by 48 tokens x 4


def test_keeps_the_published_layout_of_one_tensor_per_expert(synthetic: Path) -> None:
    index = json.loads((synthetic / "model.safetensors.index.json").read_text())
    assert "model.layers.0.mlp.experts.63.gate_proj.weight" in index["weight_map"]
    assert not any("gate_up_proj" in name for name in index["weight_map"])


def test_shards_stay_within_their_size(synthetic: Path) -> None:
    sizes = [file.stat().st_size for file in synthetic.glob("*.safetensors")]
    assert len(sizes) >= 3
    assert max(sizes) < 3_000_000 + 100_000  # headers come on top


def test_bytes_depend_on_the_seed_only(synthetic: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "same", like="qwen3_moe", size_bytes=SIZE, shard_bytes=3_000_000)
    write_synthetic(tmp_path / "other", like="qwen3_moe", size_bytes=SIZE, shard_bytes=3_000_000, seed=1)
    assert digest(tmp_path / "same") == digest(synthetic)
    assert digest(tmp_path / "other") != digest(synthetic)


def test_matrices_have_the_deviation_of_their_fan_in() -> None:
    assert draw("mlp.up_proj.weight", (512, 256), 0, torch.float32).std().item() == pytest.approx(1 / 16, rel=0.02)
    assert draw("input_layernorm.weight", (8,), 0, torch.float32).tolist() == [1.0] * 8
    assert draw("q_proj.bias", (8,), 0, torch.float32).tolist() == [0.0] * 8


def test_generation_never_ends_by_itself_and_is_greedy(synthetic: Path) -> None:
    assert json.loads((synthetic / "generation_config.json").read_text()) == {"do_sample": False, "eos_token_id": None}
    assert json.loads((synthetic / "config.json").read_text())["eos_token_id"] is None


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = write_synthetic(
        tmp_path / "out",
        like="mixtral",
        size_bytes=SIZE,
        report=lambda stage, done, total: calls.append((stage, done, total)),
    )
    assert calls[0][0] == "choosing sizes"
    assert calls[-1] == ("done", report.nbytes, report.nbytes)


def test_refuses_a_directory_with_files(synthetic: Path) -> None:
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        write_synthetic(synthetic, like="qwen3_moe", size_bytes=SIZE)


def test_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='no proportions are known for "llama"; choose one of deepseek_v3'):
        write_synthetic(tmp_path / "out", like="llama", size_bytes=SIZE)


def test_refuses_a_size_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1,000 bytes are too few for qwen3_moe: the least is [\d,]+ bytes"):
        write_synthetic(tmp_path / "out", like="qwen3_moe", size_bytes=1000)
    assert not (tmp_path / "out").exists()
