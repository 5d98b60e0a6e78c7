"""Checkpoints: experts equal transformers' own, reads are lazy and exact, and bad input is told clearly."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import INDEX_FILE, SINGLE_FILE, open_checkpoint
from raymoe.checkpoint.safetensors_file import SafetensorsFile
from raymoe.config import EMBEDDED_MODEL
from raymoe.errors import CheckpointError
from raymoe.types import ExpertKey
from tests.toy_models import TOYS, Toys, save_toy

PER_EXPERT = "qwen3_moe"  # one tensor per expert and projection
FUSED = "gpt_oss"  # one tensor for all experts of a layer, stored in the form that is served
CONVERTED = "granitemoe_swa"  # likewise, but its own names for what transformers calls gate_up_proj


@pytest.fixture
def editable(tmp_path: Path) -> Path:
    """A per-expert toy that a test may damage."""
    return save_toy(PER_EXPERT, tmp_path / "model")


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def split_in_two(directory: Path) -> None:
    """Turn a single file into two shards with an index."""
    tensors = load_file(directory / SINGLE_FILE)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / file, metadata={"format": "pt"})
    (directory / SINGLE_FILE).unlink()
    weight_map = {name: file for file, members in shards.items() for name in members}
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def expert_tensor(directory: Path, part: str = "down_proj") -> str:
    return sorted(name for name in load_file(directory / SINGLE_FILE) if f"experts.3.{part}" in name)[0]


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every length that is read from a file descriptor meanwhile."""
    lengths: list[int] = []
    pread, preadv = os.pread, os.preadv

    def counting_pread(fd: int, n: int, offset: int) -> bytes:
        data = pread(fd, n, offset)
        lengths.append(len(data))
        return data

    def counting_preadv(fd: int, buffers: Any, offset: int) -> int:
        got = preadv(fd, buffers, offset)
        lengths.append(got)
        return got

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counting_pread)
        patch.setattr(os, "preadv", counting_preadv)
        yield lengths


# --- what is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(TOYS))
def test_experts_equal_those_of_the_model_that_transformers_loads(model_type: str, toys: Toys) -> None:
    checkpoint = open_checkpoint(toys(model_type), "float32")
    reference = AutoModelForCausalLM.from_pretrained(toys(model_type), dtype=torch.float32)
    for layer in checkpoint.layers:
        module = reference.get_submodule(layer.path)
        for expert in (0, 3, layer.num_experts - 1):
            tensors = checkpoint.read_expert(ExpertKey(layer=layer.index, expert=expert))
            assert set(tensors) == {name for name, _ in module.named_parameters()}
            for name, parameter in module.named_parameters():
                assert torch.equal(tensors[name], parameter[expert]), f"{layer.path}.{name}[{expert}]"


@pytest.mark.parametrize("model_type", sorted(TOYS))
def test_trunk_and_experts_together_are_the_whole_text_model(model_type: str, toys: Toys) -> None:
    checkpoint = open_checkpoint(toys(model_type), "float32")
    stored = {name for file in toys(model_type).glob("*.safetensors") for name in load_file(file)}
    routed = {
        name
        for layer in checkpoint.layers
        for parameter in layer.parameters
        for names in parameter.sources.values()
        for name in names
    }
    left_out = stored - routed - set(checkpoint.trunk_tensors)
    assert routed.isdisjoint(checkpoint.trunk_tensors)
    assert routed | set(checkpoint.trunk_tensors) <= stored
    assert all("visual" in name or "vision" in name or "audio" in name for name in left_out)


def test_the_embedded_model_is_described() -> None:
    checkpoint = open_checkpoint(EMBEDDED_MODEL)
    assert checkpoint.dtype == torch.bfloat16
    assert [layer.num_experts for layer in checkpoint.layers] == [32] * 8
    assert [layer.top_k for layer in checkpoint.layers] == [4] * 8
    assert checkpoint.layers[0].expert_bytes(torch.bfloat16) == 3 * 256 * 64 * 2
    assert checkpoint.routed_bytes == 8 * 32 * 3 * 256 * 64 * 2
    assert checkpoint.trunk_bytes + checkpoint.routed_bytes <= (EMBEDDED_MODEL / SINGLE_FILE).stat().st_size


def test_shards_hold_the_same_experts_as_one_file(editable: Path, toys: Toys) -> None:
    split_in_two(editable)
    key = ExpertKey(layer=1, expert=5)
    expected = open_checkpoint(toys(PER_EXPERT)).read_expert(key)
    for name, tensor in open_checkpoint(editable).read_expert(key).items():
        assert torch.equal(tensor, expected[name])


def test_experts_are_converted_to_the_served_dtype(toys: Toys) -> None:
    key = ExpertKey(layer=0, expert=2)
    exact = open_checkpoint(toys(PER_EXPERT), "float32").read_expert(key)
    for name, tensor in open_checkpoint(toys(PER_EXPERT), "bfloat16").read_expert(key).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16())


# --- laziness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [PER_EXPERT, FUSED, CONVERTED])
def test_opening_reads_headers_only(model_type: str, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toys(model_type) / SINGLE_FILE
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    with counted_reads(monkeypatch) as lengths:
        checkpoint = open_checkpoint(toys(model_type))
    assert sum(lengths) == 8 + header_bytes
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize("model_type", [PER_EXPERT, FUSED, CONVERTED])
def test_one_expert_costs_its_own_bytes_and_nothing_else(
    model_type: str, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(toys(model_type), "bfloat16")  # stored as float32, so nothing is mapped
    with counted_reads(monkeypatch) as lengths:
        checkpoint.read_expert(ExpertKey(layer=1, expert=6))
    stored_bytes = checkpoint.layers[1].expert_bytes(torch.float32)
    assert sum(lengths) == stored_bytes
    assert checkpoint.bytes_read == stored_bytes


@pytest.mark.parametrize("model_type", [PER_EXPERT, CONVERTED])
def test_reads_lie_within_the_expert(model_type: str, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of other experts of a fused tensor are not touched, whatever the count says."""
    checkpoint = open_checkpoint(toys(model_type), "bfloat16")
    layer, key = checkpoint.layers[1], ExpertKey(layer=1, expert=6)
    allowed = set()
    for parameter in layer.parameters:
        for name in parameter.tensor_names(key.expert):
            info = checkpoint.info(name)
            row_bytes = info.nbytes // info.shape[0]
            start = info.start + key.expert * row_bytes if parameter.is_fused else info.start
            allowed |= {(start, start + (row_bytes if parameter.is_fused else info.nbytes))}
    ranges = set()
    preadv = os.preadv

    def noting(fd: int, buffers: Any, offset: int) -> int:
        got = preadv(fd, buffers, offset)
        ranges.add((offset, offset + got))
        return got

    monkeypatch.setattr(os, "preadv", noting)
    checkpoint.read_expert(key)
    assert ranges == allowed


def mapping_range(checkpoint: Checkpoint, name: str) -> range:
    mapping = checkpoint._files[name]._mapping
    assert mapping is not None
    base = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    return range(base, base + len(mapping))


def test_experts_stored_as_served_can_be_mapped_without_a_copy(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(toys(FUSED), map_weights=True)
    with counted_reads(monkeypatch) as lengths:
        tensors = checkpoint.read_expert(ExpertKey(layer=1, expert=6))
    assert checkpoint.is_mapped(1)
    assert lengths == [] and checkpoint.bytes_read == 0
    for parameter in checkpoint.layers[1].parameters:
        assert tensors[parameter.name].data_ptr() in mapping_range(checkpoint, parameter.tensor_names(6)[0])


def test_experts_that_need_conversion_are_not_mapped(toys: Toys) -> None:
    assert not open_checkpoint(toys(FUSED), "bfloat16", map_weights=True).is_mapped(0)
    assert not open_checkpoint(toys(PER_EXPERT), map_weights=True).is_mapped(0)


def test_nothing_is_mapped_unless_that_was_asked_for(toys: Toys) -> None:
    checkpoint = open_checkpoint(toys(FUSED))
    tensors = checkpoint.read_expert(ExpertKey(layer=1, expert=6))
    assert not checkpoint.is_mapped(1)
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    assert all(file._mapping is None for file in checkpoint.weight_files)


def test_mapped_tensors_outlive_the_closed_checkpoint(toys: Toys) -> None:
    checkpoint = open_checkpoint(toys(FUSED), map_weights=True)
    key = ExpertKey(layer=0, expert=1)
    expected = {name: tensor.clone() for name, tensor in checkpoint.read_expert(key).items()}
    tensors = checkpoint.read_expert(key)
    checkpoint.close()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# --- bad input ------------------------------------------------------------------------------------------


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such model directory: .*/absent; give a local directory or a hub"):
        open_checkpoint(tmp_path / "absent")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_arguments: Any, **_options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r'"owner/name" is neither a local directory nor .*no route to host'):
        open_checkpoint("owner/name")


def test_a_file_instead_of_a_directory(editable: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; name the directory"):
        open_checkpoint(editable / SINGLE_FILE)


def test_no_config(editable: Path) -> None:
    (editable / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json \(found: .*model\.safetensors"):
        open_checkpoint(editable)


@pytest.mark.parametrize("text", ["{", "[]", '"text"'])
def test_a_config_that_is_no_configuration(editable: Path, text: str) -> None:
    (editable / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not a valid model configuration"):
        open_checkpoint(editable)


def test_an_unknown_model_type(editable: Path) -> None:
    edit_config(editable, model_type="gpt_imaginary")
    with pytest.raises(
        CheckpointError, match=r'model_type "gpt_imaginary", which .* cannot read .*supported: .*mixtral'
    ):
        open_checkpoint(editable)


def test_a_model_that_is_no_causal_language_model(editable: Path) -> None:
    (editable / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match=r'model_type "vit", which is no causal language model; supported: '):
        open_checkpoint(editable)


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"\(llama\) is a dense model: it has no routed experts .*supported: "):
        open_checkpoint(tmp_path)


def test_experts_without_the_experts_interface(tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig

    SwitchTransformersConfig(num_experts=4).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"supported: .*mixtral"):
        open_checkpoint(tmp_path)


def test_a_pickle_checkpoint(editable: Path) -> None:
    (editable / SINGLE_FILE).unlink()
    (editable / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pickle checkpoint \(pytorch_model\.bin\).*convert it to safetensors"):
        open_checkpoint(editable)


def test_no_weights_at_all(editable: Path) -> None:
    (editable / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file; expected model\.safetensors or shards"):
        open_checkpoint(editable)


def test_a_missing_shard(editable: Path) -> None:
    split_in_two(editable)
    (editable / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files, the first is model-00002-of-00002"):
        open_checkpoint(editable)


def test_a_shard_without_a_promised_tensor(editable: Path) -> None:
    split_in_two(editable)
    index = json.loads((editable / INDEX_FILE).read_text())
    index["weight_map"]["model.absent.weight"] = "model-00001-of-00002.safetensors"
    (editable / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors lacks the tensor model\.absent\.weight"):
        open_checkpoint(editable)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(editable: Path, text: str) -> None:
    split_in_two(editable)
    (editable / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a valid index"):
        open_checkpoint(editable)


def test_an_index_that_points_out_of_the_directory(editable: Path) -> None:
    split_in_two(editable)
    index = json.loads((editable / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (editable / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is not a valid index"):
        open_checkpoint(editable)


def test_a_truncated_file(editable: Path) -> None:
    file = editable / SINGLE_FILE
    size = file.stat().st_size
    os.truncate(file, size - 10)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is truncated: .* the file has {size - 10:,}"):
        open_checkpoint(editable)


def test_a_file_that_shrinks_after_opening(editable: Path) -> None:
    checkpoint = open_checkpoint(editable, "bfloat16")
    os.truncate(editable / SINGLE_FILE, 8 + 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: .* the file has 108; download"):
        checkpoint.read_expert(ExpertKey(layer=0, expert=0))


@pytest.mark.parametrize("content", [b"", b"\x01\x00", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_whole_header(editable: Path, content: bytes) -> None:
    (editable / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        open_checkpoint(editable)


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        '"text"',
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.5, 8.5]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}',
    ],
)
def test_a_damaged_header(editable: Path, header: str) -> None:
    body = len(header).to_bytes(8, "little") + header.encode() + bytes(64)
    (editable / SINGLE_FILE).write_bytes(body)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a damaged safetensors header"):
        open_checkpoint(editable)


def test_a_refused_file_leaves_no_descriptor_open(editable: Path) -> None:
    (editable / SINGLE_FILE).write_bytes(b"")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        SafetensorsFile(editable / SINGLE_FILE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_misshapen_expert(editable: Path) -> None:
    name = expert_tensor(editable)
    edit_tensors(editable, lambda tensors: tensors.update({name: torch.zeros(5, 7)}))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {name} has shape \[5, 7\], its siblings \[32, 16\]"
    ):
        open_checkpoint(editable)


def test_experts_of_another_width_than_the_config_says(editable: Path) -> None:
    edit_config(editable, moe_intermediate_size=24)
    with pytest.raises(
        CheckpointError,
        match=r"gives \[32, 32\] for one expert of .*gate_up_proj, but config\.json asks for \[48, 32\]",
    ):
        open_checkpoint(editable)


def test_a_fused_tensor_with_too_few_experts(tmp_path: Path) -> None:
    directory = save_toy(FUSED, tmp_path / "model")
    name = next(name for name in load_file(directory / SINGLE_FILE) if "experts.down_proj" in name)
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(CheckpointError, match=r"has shape \[5, .*\]; expected 8 experts in the first dimension"):
        open_checkpoint(directory)


def test_a_missing_expert_tensor(editable: Path) -> None:
    name = expert_tensor(editable)
    edit_tensors(editable, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"has 7 of 8 tensors for .*down_proj .*some experts are missing"):
        open_checkpoint(editable)


def test_experts_with_wrong_numbers(editable: Path) -> None:
    """As many tensors as experts, but not the right ones, as after a conversion that counts from 1."""
    name = expert_tensor(editable)

    def renumber(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.replace("experts.3.", "experts.8.")] = tensors.pop(name)

    edit_tensors(editable, renumber)
    with pytest.raises(CheckpointError, match=r"not numbered from 0 to 7; some experts are missing"):
        open_checkpoint(editable)


def test_a_layer_without_experts(editable: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.3.mlp.experts" in name]:
            del tensors[name]

    edit_tensors(editable, drop)
    with pytest.raises(CheckpointError, match=r"lacks the weights of model\.layers\.3\.mlp\.experts\.gate_up_proj"):
        open_checkpoint(editable)


def test_integer_experts(editable: Path) -> None:
    name = expert_tensor(editable)
    edit_tensors(editable, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name} is stored as int8; expected float32, bfloat16 or float16"):
        open_checkpoint(editable)


def test_experts_of_mixed_precision(editable: Path) -> None:
    name = expert_tensor(editable)
    edit_tensors(editable, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=r"stored as bfloat16; .*convert the checkpoint to one floating dtype"):
        open_checkpoint(editable)


def test_eight_bit_floating_experts(editable: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(editable, shrink)
    with pytest.raises(CheckpointError, match=r"stored as float8_e4m3fn; expected float32, bfloat16 or float16"):
        open_checkpoint(editable)


def test_a_quantised_release(editable: Path) -> None:
    edit_config(editable, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"is quantised \(gptq\); .*use the unquantised release"):
        open_checkpoint(editable)


def test_code_in_the_checkpoint_is_not_run_unasked(editable: Path) -> None:
    edit_config(
        editable, model_type="homemade", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    (editable / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError):
        open_checkpoint(editable)
