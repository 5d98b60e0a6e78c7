"""Open a model directory, and say clearly what is wrong with it before anything is started."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class

from raymoe.checkpoint.architectures import experts_modules, supported_model_types
from raymoe.checkpoint.checkpoint import Checkpoint, MoeLayer
from raymoe.checkpoint.layout import ParameterLayout, expert_parameters, map_tensors
from raymoe.checkpoint.safetensors_file import SafetensorsFile
from raymoe.config import ModelConfig
from raymoe.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOP_K_FIELDS = (
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
)


def open_checkpoint(
    source: str | Path, dtype: str = "auto", *, trust_remote_code: bool = False, map_weights: bool = False
) -> Checkpoint:
    """Open a local Hugging Face MoE directory, or a hub id where the network allows.

    Args:
        map_weights: what is stored as it is served is mapped, so that processes on a node share its pages. Only for
            files that nobody changes meanwhile.

    Raises CheckpointError that says what was found, what was expected and what to do.
    """
    path = resolve(source)
    config = read_config(path, trust_remote_code)
    files = open_files(path)
    model_class = find_class(path, config, trust_remote_code)
    config = text_part(config, model_class)
    served = served_dtype(dtype, config, files)
    skeleton = build_skeleton(model_class, config, served)
    layers, trunk = read_layout(path, config, skeleton, files)
    return Checkpoint(
        path=path,
        config=config,
        model_class=model_class,
        skeleton=skeleton,
        dtype=served,
        files=files,
        layers=layers,
        trunk_tensors=trunk,
        maps_weights=map_weights,
    )


def open_configured(model: ModelConfig, dtype: str | None = None) -> Checkpoint:
    """Open what a cluster configuration serves; in another precision where ``dtype`` names one.

    Raises as ``open_checkpoint`` does.
    """
    return open_checkpoint(
        model.source,
        dtype or model.dtype,
        trust_remote_code=model.trust_remote_code,
        map_weights=model.map_weights,
    )


def resolve(source: str | Path) -> Path:
    """The local directory of ``source``; a hub id is fetched (safetensors and configuration only)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the directory that holds config.json and the .safetensors files")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"no such model directory: {path}; give a local directory or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise CheckpointError(
            f'"{source}" is neither a local directory nor could it be fetched from the hub '
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def read_config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's configuration. Raises CheckpointError where it is missing, unknown or quantised."""
    if not (path / "config.json").exists():
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} has no config.json (found: {found}); is it a Hugging Face model directory?")
    try:
        raw = json.loads((path / "config.json").read_text())
        model_type = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'config.json'} is not a valid model configuration: {error}") from error
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{path} is quantised ({method}); raymoe serves float32, bfloat16 and float16 weights: "
            "use the unquantised release or dequantise it first"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises ValueError, KeyError, OSError, …: all mean an unusable config
        raise CheckpointError(
            f'{path} has model_type "{model_type}", which the installed transformers cannot read '
            f"({str(error).splitlines()[0]}); supported: {', '.join(supported_model_types())}"
        ) from error


def open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Every tensor's file, with headers read. Raises CheckpointError for missing shards and pickle checkpoints."""
    if (path / INDEX_FILE).exists():
        try:
            weight_map: dict[str, str] = dict(json.loads((path / INDEX_FILE).read_text())["weight_map"])
            outside = [name for name in weight_map.values() if Path(name).name != name]
            if not weight_map:
                raise ValueError("its weight_map is empty")
            if outside:
                raise ValueError(f"{outside[0]} is not the name of a file beside it")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / INDEX_FILE} is not a valid index: {error}") from error
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if SINGLE_FILE in names:
            names = [SINGLE_FILE]
        weight_map = {}
    if not names:
        raise CheckpointError(_no_safetensors(path))
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(names)} weight files, the first is {missing[0]}; download them again"
        )
    opened = {name: SafetensorsFile(path / name) for name in names}
    tensors = {tensor: file for file in opened.values() for tensor in file.tensors}
    for tensor, name in weight_map.items():
        if tensor not in opened[name].tensors:
            raise CheckpointError(f"{path / name} lacks the tensor {tensor} that {INDEX_FILE} promises")
    return tensors


def _no_safetensors(path: Path) -> str:
    pickles = sorted(item.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for item in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds a pickle checkpoint ({pickles[0]}); it could run code on loading and is refused: "
            "convert it to safetensors with save_pretrained(..., safe_serialization=True) in a safe place"
        )
    return f"{path} has no .safetensors file; expected {SINGLE_FILE} or shards with {INDEX_FILE}"


def find_class(path: Path, config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The causal language model class for ``config``."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return _get_model_class(config, mapping)
    auto_map = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in auto_map and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], str(path))
    if "AutoModelForCausalLM" in auto_map:
        raise CheckpointError(
            f"{path} needs Python code of its own to run; if you trust it, set model.trust_remote_code: true"
        )
    raise CheckpointError(
        f'{path} has model_type "{config.model_type}", which is no causal language model; '
        f"supported: {', '.join(supported_model_types())}"
    )


def text_part(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """Of a multimodal checkpoint only the language model is served, as AutoModelForCausalLM does it."""
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class == text_class:
        return config.get_text_config()
    return config


def served_dtype(wanted: str, config: PreTrainedConfig, files: dict[str, SafetensorsFile]) -> torch.dtype:
    """The precision to serve in: as configured, else as the checkpoint's config says, else as it is stored."""
    if wanted != "auto":
        return getattr(torch, wanted)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if named in (torch.float32, torch.bfloat16, torch.float16):
        return named
    for name, file in files.items():
        if file.tensors[name].dtype in (torch.float32, torch.bfloat16, torch.float16):
            return file.tensors[name].dtype
    return torch.float32


def build_skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules without memory: every parameter on the meta device."""
    from transformers import initialization as init
    from transformers.modeling_utils import local_torch_dtype

    with (
        local_torch_dtype(dtype, model_class.__name__),
        torch.device("meta"),
        init.no_init_weights(),
        init.no_tie_weights(),
        init.meta_device_safe_creation_ops(),
    ):
        return model_class(config)


def read_layout(
    path: Path, config: PreTrainedConfig, skeleton: PreTrainedModel, files: dict[str, SafetensorsFile]
) -> tuple[tuple[MoeLayer, ...], tuple[str, ...]]:
    """Find the MoE layers, and which tensors make up their experts; check names, counts, shapes and dtypes."""
    modules = experts_modules(skeleton)
    if not modules:
        raise CheckpointError(_no_experts(path, config))
    shapes = {name: shape for item in modules for name, shape in expert_parameters(*item).items()}
    experts, trunk = map_tensors(skeleton, list(files), set(shapes))
    top_k = top_k_of(config)
    layers = []
    for index, (module_path, module) in enumerate(modules):
        parameters = []
        for name, _ in module.named_parameters():
            full_name = f"{module_path}.{name}"
            if full_name not in experts:
                raise CheckpointError(
                    f"{path} lacks the weights of {full_name} (MoE layer {index}); the files hold "
                    f"{len(files):,} tensors, none maps to it: incomplete download, or another architecture"
                )
            collected = experts[full_name]
            parameter = ParameterLayout(
                name=name,
                full_name=full_name,
                shape=shapes[full_name],
                sources={pattern: tuple(names) for pattern, names in collected.sources.items()},
                converter=collected.converter,
            )
            check_parameter(path, parameter, module.num_experts, files)
            parameters.append(parameter)
        layers.append(
            MoeLayer(
                index=index,
                path=module_path,
                num_experts=module.num_experts,
                top_k=min(top_k, module.num_experts),
                parameters=tuple(parameters),
            )
        )
    return tuple(layers), tuple(trunk)


def check_parameter(
    path: Path, parameter: ParameterLayout, num_experts: int, files: dict[str, SafetensorsFile]
) -> None:
    """Check that a parameter's tensors are all there, of one dtype, and convert to its shape."""
    expected_patterns = parameter.converter.source_patterns if parameter.converter else list(parameter.sources)
    for pattern in expected_patterns:
        names = parameter.sources.get(pattern, ())
        if len(names) not in (1, num_experts) or (len(names) == 1) != parameter.is_fused:
            raise CheckpointError(
                f"{path} has {len(names)} of {num_experts} tensors for {parameter.full_name} "
                f'(pattern "{pattern}"); some experts are missing: download it again'
            )
        if not parameter.is_fused and not _numbered_from_zero(names):
            raise CheckpointError(
                f"{path}: the {len(names)} tensors from {names[0]} to {names[-1]} are not numbered from 0 to "
                f"{num_experts - 1}; some experts are missing: download it again"
            )
    first = {pattern: files[names[0]].tensors[names[0]] for pattern, names in parameter.sources.items()}
    for pattern, names in parameter.sources.items():
        for name in names:
            info = files[name].tensors[name]
            if info.shape != first[pattern].shape:
                raise CheckpointError(
                    f"{files[name].path}: {name} has shape {list(info.shape)}, "
                    f"its siblings {list(first[pattern].shape)}"
                )
            dtypes = {item.dtype for item in first.values()}
            if (
                info.dtype not in dtypes
                or len(dtypes) > 1
                or not info.dtype.is_floating_point
                or info.dtype.itemsize < 2
            ):
                raise CheckpointError(
                    f"{files[name].path}: {name} is stored as {_name(info.dtype)}; "
                    f"expected float32, bfloat16 or float16, the same for all of {parameter.full_name}: "
                    "convert the checkpoint to one floating dtype"
                )
    shape = converted_shape(parameter, files, num_experts)
    if shape != parameter.shape:
        name = parameter.tensor_names(0)[0]
        raise CheckpointError(
            f"{files[name].path}: {name} of shape {list(files[name].tensors[name].shape)} gives {list(shape)} for one "
            f"expert of {parameter.full_name}, but config.json asks for {list(parameter.shape)}"
        )


def _numbered_from_zero(names: tuple[str, ...]) -> bool:
    """Whether names that differ in the expert's number are those of experts 0, 1, 2, … in order."""
    columns = zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    return any(column == tuple(map(str, range(len(names)))) for column in columns)


def converted_shape(parameter: ParameterLayout, files: dict[str, SafetensorsFile], num_experts: int) -> tuple[int, ...]:
    """Shape of one expert's slice, found by converting tensors without memory."""

    def on_meta(name: str, row: int | None) -> torch.Tensor:
        shape = files[name].tensors[name].shape
        if row is not None and (not shape or shape[0] != num_experts):
            raise CheckpointError(
                f"{files[name].path}: {name} has shape {list(shape)}; "
                f"expected {num_experts} experts in the first dimension"
            )
        return torch.empty(shape if row is None else (1, *shape[1:]), device="meta")

    try:
        return tuple(parameter.read(0, on_meta).shape)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        names = ", ".join(parameter.tensor_names(0))
        raise CheckpointError(f"the tensors {names} do not combine into {parameter.full_name}: {error}") from error


def top_k_of(config: PreTrainedConfig) -> int:
    """Experts per token, by whichever name the architecture gives it."""
    text: Any = config.get_text_config()
    for name in TOP_K_FIELDS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, (list, tuple)) and value:
            return max(value)
    return 1


def _no_experts(path: Path, config: PreTrainedConfig) -> str:
    text = config.get_text_config()
    looks_moe = any(
        getattr(text, name, None) for name in (*TOP_K_FIELDS, "num_experts", "num_local_experts", "n_routed_experts")
    )
    if looks_moe:
        return (
            f"{path} ({config.model_type}) has experts, but its transformers code lacks the experts interface "
            f"(use_experts_implementation); supported: {', '.join(supported_model_types())}"
        )
    return (
        f"{path} ({config.model_type}) is a dense model: it has no routed experts to spread over devices; "
        f"supported: {', '.join(supported_model_types())}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
