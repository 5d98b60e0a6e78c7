"""Tiny models of every causal mixture-of-experts architecture in transformers.

Each toy keeps what makes its architecture hard to serve: at least two MoE layers, eight routed
experts, a dense first layer, shared experts, grouped top-k, short sliding windows and both kinds
of attention in hybrids, wherever the architecture has them. The weights are random, but drawn so
that greedy decoding depends on the context and the routing differs from token to token.

Comments in the table name what a system that intercepts `experts(hidden_states, top_k_index,
top_k_weights)` has to expect of that architecture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PROMPT = [17, 93, 5, 64, 28, 111, 42, 9, 76, 120, 33, 58]

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The names that families of architectures share for the same settings.
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
ROUTED = {"n_routed_experts": 8, "moe_intermediate_size": 16}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 8, "intermediate_size": 16}
SHARED = {"n_shared_experts": 1, "routed_scaling_factor": 1.5}
GROUPS = {"n_group": 4, "topk_group": 2}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
GATED_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 8}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
GRANITE = {
    **LOCAL_EXPERTS,
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.35,
}

INKLING = {
    **ROUTED,
    "num_hidden_layers": 4,
    "unpadded_vocab_size": 120,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "route_scale": 1.5,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
}

QWEN3_5_TEXT = {**EXPERTS, **GATED_DELTA, "shared_expert_intermediate_size": 16}
QWEN4_TEXT = {
    **QWEN3_5_TEXT,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
GEMMA4_TEXT = {
    **EXPERTS,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "top_k_experts": 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "final_logit_softcapping": 30.0,
}
DOTS3_TEXT = {
    **MLA,
    **INDEXER,
    **ROUTED,
    **SHARED,
    **GROUPS,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "shared_experts_intermediate_size": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "sliding_window": 8,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

TOYS: dict[str, dict[str, Any]] = {
    "afmoe": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "head_dim": 8,
        "num_shared_experts": 1,
        "route_scale": 1.5,
        "global_attn_every_n_layers": 2,
        "sliding_window": 8,
        "mup_enabled": True,
    },
    # Expert weights lie transposed, (experts, in, out), and are always SiLU-gated.
    "aria_text": {"moe_num_experts": 8, "moe_topk": 3, "intermediate_size": 16},
    # A norm follows the sum of the routed and the shared experts.
    "axk1": {**MLA, **ROUTED, **SHARED, **GROUPS, **DENSE_FIRST},
    "axk2": {**MLA, **INDEXER, **ROUTED, **SHARED, **GROUPS, **DENSE_FIRST, "gated_norm_rank": 4},
    # Recurrent layers: the cache cannot be cropped.
    "bailing_hybrid": {
        **MLA,
        **SHARED,
        **GROUPS,
        "num_local_experts": 8,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "num_mtp_layers": 0,
    },
    # The gate is computed in float32; the scaling factor applies after the experts, not in the weights.
    "beam": {**EXPERTS, **GROUPS, **SLIDING, **DENSE_FIRST, "head_dim": 8},
    # Attention and MoE read the same normed input in parallel; the shared expert is averaged in.
    "cohere2_moe": {
        "num_experts": 8,
        "intermediate_size": 16,
        "prefix_dense_intermediate_size": 48,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "logit_scale": 1.0,
    },
    "deepseek_v2": {
        **MLA,
        **ROUTED,
        **SHARED,
        **GROUPS,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**MLA, **ROUTED, **SHARED, **GROUPS, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "deepseek_v32": {**MLA, **INDEXER, **ROUTED, **SHARED, **GROUPS, "first_k_dense_replace": 1},
    # The hash layer routes by token id, so its MoE block needs `input_ids`; the expert gate clamps.
    "deepseek_v4": {
        **INDEXER,
        **ROUTED,
        **SHARED,
        "intermediate_size": 16,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "index_topk": 2,
        "hc_mult": 2,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "sliding_window": 8,
        "num_nextn_predict_layers": 0,
    },
    "dots1": {**ROUTED, **SHARED, **GROUPS, **SLIDING, "first_k_dense_replace": 1},
    # The causal class is the text part; only the vision tower, which it lacks, has its own experts.
    "dots3_note": {
        "text_config": DOTS3_TEXT,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pyramid_num_routed": [-1, 4],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
        },
    },
    "dots3_note_text": DOTS3_TEXT,
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
    },
    "exaone_moe": {
        **EXPERTS,
        **GROUPS,
        "num_hidden_layers": 4,
        "num_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "flex_olmo": {"num_experts": 8, "intermediate_size": 16},
    "flint": {
        **EXPERTS,
        **SLIDING,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    # Router and experts hang on the decoder layer itself, beside a dense MLP, in every layer. They live under
    # `model.language_model`, as the causal class is the multimodal one.
    "gemma4": {
        "text_config": GEMMA4_TEXT,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
    },
    "gemma4_text": GEMMA4_TEXT,
    "glm4_moe": {
        **ROUTED,
        **SHARED,
        **GROUPS,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    "glm4_moe_lite": {**MLA, **ROUTED, **SHARED, **GROUPS, **DENSE_FIRST},
    "glm_moe_dsa": {
        **MLA,
        **INDEXER,
        **ROUTED,
        **SHARED,
        **GROUPS,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "indexer_types": ["full", "shared", "full", "shared"],
    },
    # Interleaved gate and up rows, transposed weights, expert biases, a clamped gate and no `act_fn`.
    "gpt_oss": {**LOCAL_EXPERTS, **SLIDING, "head_dim": 8},
    "granitemoe": GRANITE,
    "granitemoe_swa": {
        **GRANITE,
        **SLIDING,
        "shared_intermediate_size": 16,
        "layer_rope_theta": [0, 10000.0, 500.0],
    },
    "granitemoehybrid": {
        **GRANITE,
        **HYBRID,
        "shared_intermediate_size": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 3, "intermediate_size": 16, "head_dim": 8},
    "hy_v3": {**EXPERTS, **DENSE_FIRST, "head_dim": 8, "num_shared_experts": 1, "router_scaling_factor": 1.5},
    # The expert gate clamps and there is no `act_fn` attribute.
    "hy_v4": {
        **MLA,
        **INDEXER,
        **ROUTED,
        **SHARED,
        **GROUPS,
        **DENSE_FIRST,
        "indexer_types": ["full", "full", "shared"],
        "hc_mult": 2,
    },
    # `act_fn` takes gate and up as two arguments; the eager sum over experts runs in float32.
    "inkling2_text": {**INKLING, "intermediate_size": 16, "n_layers_per_attn_res_block": 2},
    # Gate scores are normalised over the chosen routed and the shared experts together.
    "inkling_text": {
        **INKLING,
        "n_shared_experts": 2,
        "logits_mup_width_multiplier": 1.5,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    # MoE in every other layer, as `feed_forward`; recurrent layers: the cache cannot be cropped.
    "jamba": {
        "num_experts": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    # Recurrent layers: the cache cannot be cropped.
    "kimi_linear": {
        **MLA,
        **SHARED,
        **GROUPS,
        "num_local_experts": 8,
        "moe_intermediate_size": 16,
        **HYBRID,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {**EXPERTS, **SLIDING, "head_dim": 8, "shared_expert_intermediate_size": 16},
    # Scaling happens after the experts; each layer may have its own number of attention heads.
    "laguna": {
        **EXPERTS,
        **SLIDING,
        **DENSE_FIRST,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
        "num_attention_heads_per_layer": [4, 2, 4],
        "moe_routed_scaling_factor": 1.5,
        "moe_router_logit_softcapping": 20.0,
    },
    # MoE as `feed_forward`; the selection bias is a buffer of the MoE block.
    "lfm2_moe": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
        "routed_scaling_factor": 1.5,
    },
    "mellum": {**EXPERTS, **SLIDING, **DENSE_FIRST, "head_dim": 8},
    "mimo_v2_flash": {
        **ROUTED,
        **GROUPS,
        **SLIDING,
        **DENSE_FIRST,
        "head_dim": 12,
        "v_head_dim": 8,
        "routed_scaling_factor": 1.5,
    },
    # Its own `MiniMaxCache`, made by the model; it cannot be cropped.
    "minimax": {
        **LOCAL_EXPERTS,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "block_size": 4,
        "full_attn_alpha_factor": 1.2,
        "mlp_beta_factor": 0.9,
    },
    "minimax_m2": {**LOCAL_EXPERTS, "head_dim": 8, "rotary_dim": 4},
    # Scaling happens after the experts; the expert gate clamps and there is no `act_fn` attribute.
    "minimax_m3_vl_text": {
        **LOCAL_EXPERTS,
        **DENSE_FIRST,
        "head_dim": 8,
        "rotary_dim": 4,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "routed_scaling_factor": 1.5,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mixtral": {**LOCAL_EXPERTS, "sliding_window": 8},
    # A layer is either attention, recurrent, dense or MoE, as `mixer`. Experts have no gate (`up_proj`)
    # and work in a latent narrower than the hidden size; the eager sum takes the gate scores' dtype.
    "nemotron_h": {
        **ROUTED,
        **SHARED,
        **GROUPS,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": 24,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    # Sparsemixer: always two experts, and weights that do not sum to one.
    "phimoe": {**LOCAL_EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen2_moe": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    # The causal class is the text part; recurrent layers: the cache cannot be cropped.
    "qwen3_5_moe": {"text_config": QWEN3_5_TEXT, "vision_config": QWEN_VISION},
    "qwen3_5_moe_text": QWEN3_5_TEXT,
    "qwen3_moe": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0, 2],
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    # Recurrent layers: the cache cannot be cropped.
    "qwen3_next": {**QWEN3_5_TEXT, "mlp_only_layers": [0]},
    # As qwen3_5_moe; an n-gram embedding also reads the token ids, and needs `eos_token_id` in the config.
    "qwen4_exp": {"text_config": QWEN4_TEXT, "vision_config": QWEN_VISION},
    "qwen4_exp_text": QWEN4_TEXT,
    "solar_open": {**ROUTED, **SHARED, **GROUPS, "head_dim": 8},
    # Top-1 only. A token that picks the skip expert arrives as expert 0 with weight 0. The router hands its
    # state to the next layer, and the cache cannot be cropped.
    "zaya": {
        **EXPERTS,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "router_hidden_size": 16,
        "tie_word_embeddings": False,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": 8,
    },
}

EXCLUDED: dict[str, str] = {}

Toys = Callable[[str], Path]
"""The saved toy of a model type."""


def causal_moe_types() -> dict[str, str]:
    """Model type to causal class name, for every architecture whose experts can be swapped out."""
    return {
        model_type: class_name
        for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if "use_experts_implementation" in _modeling_source(model_type)
    }


def build_toy(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 toy of `model_type` in eval mode; the same `seed` gives the same weights. `changes`: of its config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **_config_arguments(model_type) | changes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _redraw(model)
    return model


def save_toy(model_type: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the toy as a checkpoint that `from_pretrained` reads back, and return its directory."""
    model = build_toy(model_type, seed, **changes)
    if model.config.model_type != model_type:
        model = _with_other_modalities(model_type, model)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def reference_tokens(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The new token ids of plain greedy decoding, which never stops early."""
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def reference_at(path: Path, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The same of a checkpoint, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return reference_tokens(model, prompt, max_new_tokens)


def _modeling_source(model_type: str) -> str:
    """The text of the architecture's modeling file, empty where there is none."""
    module = model_type_to_module_name(model_type)
    path = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return path.read_text() if path.exists() else ""


def _with_other_modalities(model_type: str, text_model: PreTrainedModel) -> PreTrainedModel:
    """The multimodal model round `text_model`, which is what a published checkpoint holds.

    The causal class of such a type is its text part alone, built from `config.text_config`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **_config_arguments(model_type))
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    return model


def _config_arguments(model_type: str) -> dict[str, Any]:
    toy = TOYS[model_type]
    if "text_config" in toy:
        return {**toy, "text_config": {**BASE, **toy["text_config"]}}
    return {**BASE, **toy}


@torch.no_grad()
def _redraw(model: PreTrainedModel) -> None:
    """Replace the near-zero initial weights by ones that make tokens and routes vary."""
    config = model.config.get_text_config()
    tied = getattr(config, "tie_word_embeddings", False)
    embedding_std = 0.5 * config.hidden_size**-0.5 if tied else 1.0  # or a token predicts itself
    transposed = [name for name, module in model.named_modules() if getattr(module, "is_transposed", False)]
    for name, parameter in model.named_parameters():
        axis = -2 if name.rpartition(".")[0] in transposed else -1
        fan_in = parameter.shape[axis] if parameter.dim() > 1 else 1
        _redraw_parameter(name, parameter, fan_in, embedding_std)
    for name, buffer in model.named_buffers():
        _redraw_buffer(name, buffer)


def _redraw_parameter(name: str, parameter: torch.Tensor, fan_in: int, embedding_std: float) -> None:
    """Draw by what the parameter is; convolutions and decays keep the start of their architecture."""
    path = name.split(".")
    if "correction_bias" in path[-1] or path[-1] == "expert_bias":
        parameter.normal_(std=0.05)
    elif "conv" in name or path[-1] in {"A_log", "dt_bias", "D"}:
        return
    elif parameter.dim() == 1 or path[-1].endswith("bias"):
        parameter.add_(torch.randn_like(parameter), alpha=0.03)
    elif "embed" in name:
        parameter.normal_(std=embedding_std)
    else:
        gain = 3.0 if {"gate", "router", "wg"} & set(path) else 1.0
        parameter.normal_(std=gain * fan_in**-0.5)


def _redraw_buffer(name: str, buffer: torch.Tensor) -> None:
    """Give the router buffers that a checkpoint would bring something to say."""
    leaf = name.rpartition(".")[2]
    if leaf in {"e_score_correction_bias", "expert_bias"}:
        buffer.normal_(std=0.05)
    elif leaf == "balancing_biases":  # zaya: from_pretrained resets the last one, for skipping, to -1
        buffer[:-1].normal_(mean=-1.4, std=0.05)
    elif leaf == "tid2eid":
        vocabulary, top_k = buffer.shape
        buffer.copy_(torch.rand(vocabulary, 8).argsort(dim=-1)[:, :top_k])
