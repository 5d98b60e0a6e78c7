"""Models of real shapes without weights on disk: a trunk of random weights on the device, experts in host memory.

Everything computes as it would; only what the routers say is replaced, by logits given for each step, so that routing
is as skewed and as local as wanted. Their own products are computed too.

L layers, E experts, K experts per token.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import ExpertTensors, MoeLayer
from raymoe.checkpoint.layout import ParameterLayout
from raymoe.experts.arena import HostArena, Pinning
from raymoe.experts.call import expert_id
from raymoe.experts.host_store import HostStore
from raymoe.experts.packing import Packing
from raymoe.kernels.gpu import GpuKernels
from raymoe.model.router import Router
from raymoe.model.router_rule import RouterRule
from raymoe.model.trunk import IMPLEMENTATION, without_experts
from raymoe.types import ExpertKey

DEVIATION = 0.02  # of random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to imitate.

    Attributes:
        layers: as many as memory takes, which may be fewer than the model has; ``all_layers`` is how many that are.
    """

    name: str
    layers: int
    all_layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    architecture: str

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.inner

    def config(self, layers: int | None = None) -> PreTrainedConfig:
        """For transformers."""
        common: dict[str, Any] = {
            "num_hidden_layers": layers or self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        }
        if self.architecture == "mixtral":
            return MixtralConfig(
                **common, num_local_experts=self.experts, intermediate_size=self.inner, sliding_window=None
            )
        return Qwen3MoeConfig(
            **common,
            num_experts=self.experts,
            moe_intermediate_size=self.inner,
            intermediate_size=3 * self.hidden,
            norm_topk_prob=True,
            use_sliding_window=False,
        )

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Of transformers."""
        return MixtralForCausalLM if self.architecture == "mixtral" else Qwen3MoeForCausalLM


QWEN3 = Shape(
    name="Qwen3-30B-A3B",
    layers=48,
    all_layers=48,
    experts=128,
    top_k=8,
    hidden=2048,
    inner=768,
    heads=32,
    kv_heads=4,
    head_dim=128,
    vocabulary=151_936,
    architecture="qwen3_moe",
)
MIXTRAL = Shape(
    name="Mixtral-8x7B",
    layers=20,
    all_layers=32,
    experts=8,
    top_k=2,
    hidden=4096,
    inner=14_336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=32_000,
    architecture="mixtral",
)


def make_trunk(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Random weights, no routed experts, straight on the device."""
    config = shape.config()
    config._attn_implementation = "sdpa"
    trunk_class: Any = without_experts(shape.model_class)
    with torch.device("meta"):
        model = trunk_class(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, DEVIATION, generator=generator)
    model.set_experts_implementation(IMPLEMENTATION)
    for index, (_, module) in enumerate(experts_modules(model)):
        module.raymoe_layer = index
    return model


def keys_of(shape: Shape) -> list[ExpertKey]:
    """All experts."""
    return [ExpertKey(layer=layer, expert=e) for layer in range(shape.layers) for e in range(shape.experts)]


def moe_layers(shape: Shape) -> tuple[MoeLayer, ...]:
    """The MoE layers as workers know them; there is no file behind them."""
    sizes = {
        "gate_up_proj": (2 * shape.inner, shape.hidden),
        "down_proj": (shape.hidden, shape.inner),
    }
    parameters = tuple(
        ParameterLayout(name=name, full_name=name, shape=size, sources={}, converter=None)
        for name, size in sizes.items()
    )
    return tuple(
        MoeLayer(
            index=i,
            path=f"model.layers.{i}.mlp.experts",
            num_experts=shape.experts,
            top_k=shape.top_k,
            parameters=parameters,
        )
        for i in range(shape.layers)
    )


class RandomExperts:
    """Reads experts that exist nowhere: random weights, made on the device since that is faster."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = moe_layers(shape)[0].shapes
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(1)

    def __call__(self, key: ExpertKey) -> ExpertTensors:
        """One expert."""
        make = lambda size: torch.empty(size, dtype=self._dtype, device=self._device)  # noqa: E731
        return {
            name: make(size).normal_(0.0, DEVIATION, generator=self._generator) for name, size in self._shapes.items()
        }


class ReusedMemory(HostArena):
    """An arena whose pieces another model's experts may take over, for pinning memory takes longer than filling it."""

    def __init__(self, pinning: Pinning, piece_bytes: int) -> None:
        super().__init__(pinning, piece_bytes)
        self.pieces: list[torch.Tensor] = []

    def _piece(self, nbytes: int) -> torch.Tensor:
        piece = super()._piece(nbytes)
        self.pieces.append(piece)
        return piece


def store_over(pieces: list[torch.Tensor], shape: Shape, dtype: torch.dtype, arena: HostArena) -> HostStore:
    """A store whose experts are whatever lies in this memory; as many layers of ``shape`` as it holds must fit."""
    packing = Packing(moe_layers(shape)[0].shapes)
    nbytes = packing.numel * dtype.itemsize
    places = [
        piece[start : start + nbytes] for piece in pieces for start in range(0, piece.numel() - nbytes + 1, nbytes)
    ]
    store = HostStore(lambda key: {}, arena)
    keys = [(layer, expert) for layer in range(shape.layers) for expert in range(shape.experts)]
    for (layer, expert), place in zip(keys, places[: len(keys)], strict=True):
        store.experts[expert_id(layer, expert)] = packing.views(place.view(dtype))
    return store


class GivenRouting:
    """Puts logits in place of what routers say.

    Attributes:
        logits_LE, coming_LE: of the step under way, on the device; the second are a forecast's.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape, kernels: GpuKernels) -> None:
        device = model.device
        self.logits_LE = torch.zeros((shape.layers, shape.experts), dtype=torch.float32, device=device)
        self.coming_LE = torch.zeros_like(self.logits_LE)
        self.routers: list[Router] = []
        rule = RouterRule(score="softmax", renormalised=True, scale=1.0)
        for layer, (path, _) in enumerate(experts_modules(model)):
            module: Any = model.get_submodule(path.rpartition(".")[0]).gate
            router = Router(path, rule, shape.experts, module, 0)
            module.register_forward_hook(router.capture)
            module.forward = _given(module, self.logits_LE[layer], shape.top_k, kernels)
            self.routers.append(router)

    def step(self, logits_LE: torch.Tensor, coming_LE: torch.Tensor) -> None:
        """The next step routes by these, which lie on the device already."""
        self.logits_LE.copy_(logits_LE)
        self.coming_LE.copy_(coming_LE)


def _given(module: Any, logits_E: torch.Tensor, top_k: int, kernels: GpuKernels) -> Any:
    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        own = hidden_states.new_empty((len(rows), len(logits_E)))
        if len(rows) > 1:  # a prompt, which is not measured: all its tokens as the step's
            torch.nn.functional.linear(rows, module.weight, None)
        else:
            kernels.linear(rows, module.weight, None, own)
        experts = torch.empty((1, top_k), dtype=torch.int64, device=rows.device)
        weights = torch.empty((1, top_k), dtype=rows.dtype, device=rows.device)
        kernels.route(logits_E, False, True, 1.0, experts, weights)
        return (
            logits_E.expand(len(rows), -1),
            weights.expand(len(rows), -1),
            experts.expand(len(rows), -1),
        )

    return forward


@contextmanager
def freed() -> Iterator[None]:
    """Afterwards the device has its memory back."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy there."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
