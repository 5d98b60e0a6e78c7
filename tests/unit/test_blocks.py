"""Blocks of the trunk done in one call give what they gave, and are left alone where they are anything special."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import DynamicCache

from raymoe.kernels.native import NativeKernels, load_native
from raymoe.model.blocks import MOST_ROWS, FewRowsMlp, OneTokenAttention, fused_attention, fused_mlp
from raymoe.model.fast import use_native_kernels
from raymoe.model.runner import Runner
from tests.toy_models import PROMPT, TOYS, build_toy

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = [77, 5, 104]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    loaded = load_native(1)
    if loaded is None:
        pytest.skip("no C++ compiler")
    return loaded


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(40, 24, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(40, 24, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(24, 40, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x).clamp(max=0.1)) * self.up_proj(x))


class Normed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(40)  # which is all ones, and used where nobody sees it


class Routed(Mlp):
    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * indices


# --- gated MLPs -----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("hidden,inner", [(40, 24), (256, 768), (33, 7)])
def test_the_kernel_is_a_gated_mlp(kernels: NativeKernels, dtype: torch.dtype, hidden: int, inner: int) -> None:
    gate, up = (
        random(inner, hidden, dtype=dtype) / hidden**0.5,
        random(inner, hidden + 1, dtype=dtype)[:, 1:] / hidden**0.5,
    )
    down, x = random(hidden, inner, dtype=dtype) / inner**0.5, random(1, hidden, dtype=dtype)
    out = torch.full((1, hidden), torch.nan, dtype=dtype)
    kernels.gated(gate, up.contiguous(), down, x, out)
    wide = x.float()
    expected = (silu(wide @ gate.float().T) * (wide @ up.float().T)) @ down.float().T
    assert torch.allclose(out.float(), expected, rtol=0, atol=ROUNDING[dtype] * 4)


@DTYPES
@torch.no_grad()
def test_a_gated_mlp_is_replaced_for_few_rows(kernels: NativeKernels, dtype: torch.dtype) -> None:
    module = Mlp(dtype)
    replacement = fused_mlp(module, kernels)
    assert isinstance(replacement, FewRowsMlp)
    for shape in ((40,), (1, 40), (1, 1, 40), (3, 40), (MOST_ROWS, 1, 40)):
        x = random(*shape, dtype=dtype)
        assert replacement(x).shape == x.shape
        assert torch.allclose(replacement(x).float(), module(x).float(), rtol=0, atol=ROUNDING[dtype])
    rows = random(MOST_ROWS + 1, 40, dtype=dtype)
    assert torch.equal(replacement(rows), module(rows)), "its own forward"
    alone = torch.cat([replacement(row) for row in rows[:5].split(1)])
    assert torch.equal(replacement(rows[:5]), alone), "a row has the same bits among others"


@pytest.mark.parametrize("module", [Mlp(bias=True), Clamped(), Normed(), Routed(), nn.Linear(4, 4)], ids=str)
def test_what_is_no_plain_gated_mlp_keeps_its_forward(kernels: NativeKernels, module: nn.Module) -> None:
    assert fused_mlp(module, kernels) is None


# --- attention ------------------------------------------------------------------------------------------


def attention_of(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj")]


def fused_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module.forward, OneTokenAttention)]


@DTYPES
@pytest.mark.parametrize("heads,kv_heads,width,hidden,bias", [(8, 4, 32, 256, True), (4, 1, 6, 33, False)])
def test_the_kernel_projects_and_rotates(
    kernels: NativeKernels, dtype: torch.dtype, heads: int, kv_heads: int, width: int, hidden: int, bias: bool
) -> None:
    weights = [random(rows * width, hidden, dtype=dtype) / hidden**0.5 for rows in (heads, kv_heads, kv_heads)]
    biases = [random(len(weight), dtype=dtype) if bias else None for weight in weights]
    parts = [part for pair in zip(weights, biases, strict=True) for part in pair]
    addresses = np.array([0 if part is None else part.data_ptr() for part in [*parts, None, None]], dtype=np.uint64)
    x, cos, sin = random(1, hidden, dtype=dtype), random(width, dtype=dtype), random(1, width, dtype=dtype)[0]
    among = torch.full((3, heads + 2 * kv_heads, width), torch.nan, dtype=dtype)
    epsilons = torch.zeros(2).numpy()
    rows = (torch.cat([tensor.view(1, -1) * factor for factor in (2, 1, -1)]) for tensor in (x, cos, sin))
    kernels.projections(addresses, *rows, heads, among, epsilons, False)
    out = torch.full((1, heads + 2 * kv_heads, width), torch.nan, dtype=dtype)
    kernels.projections(addresses, x, cos, sin, heads, out, epsilons, False)
    out = out[0]
    assert torch.equal(among[1], out), "a token has the same bits among others"
    plain = torch.cat(
        [
            nn.functional.linear(x, weight, part_bias).view(-1, width).float()
            for weight, part_bias in zip(weights, biases, strict=True)
        ]
    )
    turned = torch.cat([-plain[:, width // 2 :], plain[:, : width // 2]], dim=1)
    expected = torch.cat([plain[:-kv_heads] * cos.float() + turned[:-kv_heads] * sin.float(), plain[-kv_heads:]])
    assert torch.allclose(out.float(), expected, rtol=0, atol=ROUNDING[dtype] * 4)


@pytest.mark.parametrize("model_type", TOYS)
def test_replaced_blocks_leave_an_architectures_steps_alone(kernels: NativeKernels, model_type: str) -> None:
    model = build_toy(model_type)
    before = logits_of_steps(model)
    use_native_kernels(model)
    torch.testing.assert_close(logits_of_steps(model), before, rtol=1e-4, atol=1e-4)


def logits_of_steps(model: Any) -> torch.Tensor:
    runner = Runner(model)
    _, state = runner.prefill(PROMPT)
    return torch.stack([runner.decode(state, token) for token in STEPS])


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_plain_attention_is_replaced_in_every_layer_that_has_it(kernels: NativeKernels, model_type: str) -> None:
    model = build_toy(model_type)
    use_native_kernels(model)
    plain = attention_of(model)
    assert plain and len(fused_modules(model)) == len(plain)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_next", "deepseek_v3", "minimax_m3_vl_text", "afmoe"])
def test_attention_with_sinks_gates_norms_or_indexers_keeps_its_forward(
    kernels: NativeKernels, model_type: str
) -> None:
    model = build_toy(model_type)
    use_native_kernels(model)
    assert not fused_modules(model)


def test_a_mask_or_more_tokens_take_the_blocks_own_way(kernels: NativeKernels) -> None:
    model = build_toy("mixtral")
    use_native_kernels(model)
    module = fused_modules(model)[0]
    replacement: OneTokenAttention = module.forward
    calls: list[tuple[Any, ...]] = []
    replacement._own_forward = lambda *args, **kwargs: calls.append(kwargs)  # type: ignore[assignment]
    rotation = random(1, 1, 8), random(1, 1, 8)
    given: dict[str, Any] = {"position_embeddings": rotation, "attention_mask": None, "past_key_values": DynamicCache()}
    module(hidden_states=random(1, 1, 32), **given)
    assert not calls
    for more in (
        {"attention_mask": torch.zeros(1, 1, 1, 5)},
        {"past_key_values": None},
        {"shared_states": {}},
        {"position_embeddings": (random(2, 3, 8), random(2, 3, 8))},
    ):
        module(hidden_states=random(1, 1, 32), **given | more)
    module(hidden_states=random(1, 3, 32), **given)
    assert len(calls) == 5


def test_a_block_that_caps_its_scores_is_found_out(kernels: NativeKernels) -> None:
    model = build_toy("mixtral")
    use_native_kernels(model)
    module = attention_of(model)[0]
    own = type(module).forward
    assert fused_attention(module, kernels) is not None or isinstance(module.forward, OneTokenAttention)

    def capped(
        self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any
    ) -> Any:
        output, weights = own(self, hidden_states, position_embeddings, attention_mask, past_key_values)
        return 50.0 * torch.tanh(output / 50.0), weights

    module.forward = capped.__get__(module)
    assert fused_attention(module, kernels) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tokens_of_several_sequences_attend_each_to_its_own_past(kernels: NativeKernels, dtype: torch.dtype) -> None:
    heads, kv_heads, width, room = 4, 2, 6, 9
    lengths, counts = (5, 0, 7), (1, 3, 2)
    caches = random(len(lengths), 2, kv_heads, room, width, dtype=dtype)
    before, mixed = caches.clone(), random(sum(counts), heads + 2 * kv_heads, width, dtype=dtype)
    places = np.array(
        [
            (cache[0].data_ptr(), cache[1].data_ptr(), room * width, length + token)
            for cache, length, count in zip(caches, lengths, counts, strict=True)
            for token in range(count)
        ],
        dtype=np.int64,
    )
    out = torch.full((sum(counts), heads, width), torch.nan, dtype=dtype)
    kernels.attention_rows(mixed, places, heads, 9, 0.4, out)
    token = 0
    for cache, old, length, count in zip(caches, before, lengths, counts, strict=True):
        mine = mixed[token : token + count]
        keys, values = mine[:, heads:].view(count, 2, kv_heads, width).permute(1, 2, 0, 3)
        expected = torch.cat([old[:, :, :length], torch.stack([keys, values])], dim=2)
        assert torch.equal(cache[:, :, : length + count], expected)
        assert torch.equal(cache[:, :, length + count :], old[:, :, length + count :]), "nothing beyond is touched"
        for number in range(count):
            past = expected[:, :, : length + number + 1].float().repeat_interleave(heads // kv_heads, dim=1)
            query = mine[number, :heads].float().unsqueeze(1)
            weights = torch.softmax(0.4 * query @ past[0].transpose(1, 2), dim=-1)
            found = out[token + number].float()
            assert torch.allclose(found, (weights @ past[1])[:, 0], rtol=0, atol=ROUNDING[dtype] * 4)
        token += count
