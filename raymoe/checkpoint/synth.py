"""Random checkpoints of any size in an architecture's published layout, for benchmarks and tests.

Tensor names and shapes come from transformers' own reverse conversion, run on a model without memory. Weights
are drawn and written one tensor at a time, so the largest tensor is the most that is ever held. Every tensor
has a generator of its own, seeded by its name: the bytes do not depend on shards or order.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from raymoe.checkpoint.opening import INDEX_FILE, SINGLE_FILE, build_skeleton, find_class
from raymoe.checkpoint.safetensors_file import DTYPES
from raymoe.errors import CheckpointError
from raymoe.whole_file import whole, write_whole

SHARD_BYTES = 256_000_000  # small enough that a 1 GB checkpoint has several, as published ones do
HEADER_ALIGNMENT = 64  # so that every tensor of even size can be mapped
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYERS_FROM_BYTES = ((8e9, 48), (2e8, 24), (3e7, 12), (0, 4))
"""Published models of 1 to 8 GB have about 24 layers; smaller ones need fewer to keep sensible widths."""

Report = Callable[[str, int, int], None]
"""``(stage, bytes written, bytes in all)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportions:
    """An architecture's shape relative to its hidden size, after its published models.

    Attributes:
        inner: intermediate size of a routed expert per hidden size.
        extra: configuration beyond the common fields; a float is a multiple of the hidden size.
    """

    experts: int
    top_k: int
    inner: float
    inner_field: str = "moe_intermediate_size"
    experts_field: str = "num_experts"
    extra: dict[str, Any]


PROPORTIONS = {
    "qwen3_moe": Proportions(  # Qwen3-30B-A3B: one expert in 16 active, inner 3/8 of hidden
        experts=64, top_k=4, inner=0.375, extra={"norm_topk_prob": True, "intermediate_size": 3.0}
    ),
    "qwen2_moe": Proportions(  # Qwen1.5-MoE-A2.7B: 4 of 60, a shared expert as wide as the active ones
        experts=60,
        top_k=4,
        inner=0.6875,
        extra={"shared_expert_intermediate_size": 2.75, "intermediate_size": 2.75, "norm_topk_prob": False},
    ),
    "mixtral": Proportions(  # Mixtral-8x7B
        experts=8, top_k=2, inner=3.5, inner_field="intermediate_size", experts_field="num_local_experts", extra={}
    ),
    "deepseek_v3": Proportions(  # DeepSeek-V3, with fewer groups of experts
        experts=64,
        top_k=4,
        inner=0.2857,
        experts_field="n_routed_experts",
        extra={
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "intermediate_size": 2.5,
            "q_lora_rank": 0.25,
            "kv_lora_rank": 0.125,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthReport:
    """What was written; sizes in bytes."""

    path: Path
    nbytes: int
    tensors: int
    shards: int
    layers: int
    experts: int
    top_k: int
    hidden: int


def write_synthetic(
    out: str | Path,
    *,
    like: str,
    size_bytes: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    report: Report = lambda _stage, _done, _total: None,
) -> SynthReport:
    """Write a random checkpoint of architecture ``like`` and at most about ``size_bytes`` into ``out``.

    Raises CheckpointError for an unknown architecture, a size that is too small for it, an ``out`` that is
    not empty, or a full disk.
    """
    path = Path(out).expanduser()
    if like not in PROPORTIONS:
        raise CheckpointError(f'no proportions are known for "{like}"; choose one of {", ".join(sorted(PROPORTIONS))}')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty directory; name a new one")
    precision = getattr(torch, dtype)
    report("choosing sizes", 0, size_bytes)
    config = choose_config(like, size_bytes, precision)
    tensors = published_tensors(config, precision)
    total = sum(tensor.nbytes for tensor in tensors)
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if total > free:
        raise CheckpointError(f"{path}: the checkpoint takes {total:,} bytes, but the disk has {free:,} free")
    shards = split_shards(tensors, shard_bytes)
    done = 0
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        stage = f"writing {name}"
        report(stage, done, total)
        for nbytes in write_shard(path / name, shard, seed, precision):
            done += nbytes
            report(stage, done, total)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(path / INDEX_FILE, json.dumps(index_data, indent=2) + "\n")
    write_configs(path, config, dtype)
    report("done", total, total)
    proportions = PROPORTIONS[like]
    return SynthReport(
        path=path,
        nbytes=total,
        tensors=len(tensors),
        shards=len(shards),
        layers=config.num_hidden_layers,
        experts=proportions.experts,
        top_k=proportions.top_k,
        hidden=config.hidden_size,
    )


def choose_config(like: str, size_bytes: int, dtype: torch.dtype) -> PreTrainedConfig:
    """The widest configuration of ``like`` whose weights take at most ``size_bytes``.

    Widths come in steps; experts then grow beyond their proportion until 95% of the bytes are used.

    Raises CheckpointError where not even the narrowest fits.
    """
    layers = next(count for least, count in LAYERS_FROM_BYTES if size_bytes >= least)

    def fits(hidden: int) -> bool:
        return weight_bytes(make_config(like, hidden, layers), dtype) <= size_bytes

    narrowest = 64
    if not fits(narrowest):
        least = weight_bytes(make_config(like, narrowest, layers), dtype)
        raise CheckpointError(f"{size_bytes:,} bytes are too few for {like}: the least is {least:,} bytes")
    low, high = narrowest, narrowest * 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 32:
        middle = (low + high) // 64 * 32
        low, high = (middle, high) if fits(middle) else (low, middle)
    best = make_config(like, low, layers)
    inner = getattr(best, PROPORTIONS[like].inner_field)
    while weight_bytes(best, dtype) < 0.95 * size_bytes:
        inner += 8
        wider = make_config(like, low, layers, inner)
        if weight_bytes(wider, dtype) > size_bytes:
            break
        best = wider
    return best


def make_config(like: str, hidden: int, layers: int, inner: int | None = None) -> PreTrainedConfig:
    """A configuration of ``like`` with its published proportions at this hidden size, a multiple of 32.

    Args:
        inner: intermediate size of an expert, if not by proportion.
    """
    proportions = PROPORTIONS[like]
    head = 64 if hidden % 64 == 0 and hidden >= 256 else 32
    heads = hidden // head
    extra = {
        name: _multiple_of_8(value * hidden) if isinstance(value, float) else value
        for name, value in proportions.extra.items()
    }
    if like == "deepseek_v3":
        extra |= {"qk_nope_head_dim": head, "qk_rope_head_dim": head // 2, "v_head_dim": head}
    elif like == "qwen3_moe":
        extra |= {"head_dim": head}
    grouped = next(count for count in (heads // 4, heads // 3, heads // 2, heads) if count and heads % count == 0)
    return AutoConfig.for_model(
        like,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if like == "deepseek_v3" else grouped,
        vocab_size=16 * hidden,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        num_experts_per_tok=proportions.top_k,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{
            proportions.experts_field: proportions.experts,
            proportions.inner_field: inner or _multiple_of_8(proportions.inner * hidden),
        },
        **extra,
    )


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the model's weights, from two small models: every layer after the second is alike."""
    layers = config.num_hidden_layers
    two, three = (_elements(config, count) for count in (2, 3))
    return (two + (layers - 2) * (three - two)) * dtype.itemsize


def _elements(config: PreTrainedConfig, layers: int) -> int:
    values = {**config.to_dict(), "num_hidden_layers": layers}
    values.pop("layer_types", None)
    small = type(config).from_dict(values)
    return sum(tensor.numel() for tensor in _skeleton(small, torch.bfloat16).state_dict().values())


def published_tensors(config: PreTrainedConfig, dtype: torch.dtype) -> list[TensorPlan]:
    """Names and shapes as ``save_pretrained`` would write them, in the order of the model's layers."""
    skeleton = _skeleton(config, dtype)
    published = revert_weight_conversion(skeleton, skeleton.state_dict())
    return [
        TensorPlan(name, tuple(tensor.shape), tensor.numel() * dtype.itemsize) for name, tensor in published.items()
    ]


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return build_skeleton(find_class(Path(), config, trust_remote_code=False), config, dtype)


def split_shards(tensors: list[TensorPlan], shard_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive tensors in shards of at most ``shard_bytes``, or of one larger tensor."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_shard(file: Path, tensors: list[TensorPlan], seed: int, dtype: torch.dtype) -> Iterator[int]:
    """Write one safetensors file, tensor by tensor; yields the bytes of each as it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    with whole(file) as unfinished, unfinished.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            stream.write(draw(tensor.name, tensor.shape, seed, dtype).view(torch.uint8).numpy().data)
            yield tensor.nbytes


def draw(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as at the start of training: norms one, biases zero, matrices of deviation 1/sqrt(fan in).

    Embeddings have deviation one, like what norms hand to the layers, so that activations keep their scale and
    routing follows the token.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    deviation = 1.0 if "embed" in name else 1 / math.sqrt(shape[-1])
    return torch.empty(shape).normal_(std=deviation, generator=generator).to(dtype)


def write_configs(path: Path, config: PreTrainedConfig, dtype: str) -> None:
    """config.json and generation_config.json; written last, so that a broken attempt is no checkpoint."""
    named = {"architectures": [find_class(path, config, trust_remote_code=False).__name__], "dtype": dtype}
    generation = {"do_sample": False, "eos_token_id": None}
    write_whole(path / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_whole(path / "config.json", json.dumps({**config.to_dict(), **named}, indent=2, sort_keys=True) + "\n")


def _multiple_of_8(value: float) -> int:
    return max(8, round(value / 8) * 8)
