"""Quantised experts stand for the right values, compute what they stand for, and never hold full precision whole."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictor.quantize import GROUP, GroupForm, as_blocks, from_blocks, matrix_form
from predictor.quantized_experts import QuantizedExperts, QuantizedLayer
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint, ExpertTensors
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.errors import ConfigError
from raymoe.experts.math import ExpertMath
from raymoe.kernels.native import load_native
from raymoe.types import ExpertKey
from tests.toy_models import save_toy

CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
PACKED = pytest.mark.parametrize("bits", [4, 3, 2])
SHAPES = pytest.mark.parametrize("shape", [(4, 32), (128, 64), (5, 33), (1, 1), (7, 200)])
FUSED_SILU = "qwen3_moe"
TRANSPOSED_WITH_BIAS = "gpt_oss"
WITHOUT_GATE = "nemotron_h"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def round_trip(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    form = matrix_form(bits)
    rows, columns = weight_OI.shape
    return form.restore(form.store(weight_OI), (rows, columns), torch.float32)


@BITS
@SHAPES
def test_any_shape_comes_back_as_near_as_the_bits_allow(bits: int, shape: tuple[int, int]) -> None:
    weight_OI = random(*shape)
    restored_OI = round_trip(weight_OI, bits)
    assert restored_OI.shape == weight_OI.shape
    if bits == 16:
        assert torch.equal(restored_OI, weight_OI.bfloat16().float())
        return
    largest_step = weight_OI.abs().max() / 127 if bits == 8 else (weight_OI.max() - weight_OI.min()) / (2**bits - 1)
    rounding = weight_OI.abs().max() * 2**-9  # of scales and minima to float16
    assert (restored_OI - weight_OI).abs().max() <= largest_step / 2 + rounding


@PACKED
def test_values_on_the_grid_come_back_exactly(bits: int) -> None:
    codes_OI = torch.arange(8 * 64).view(8, 64) % 2**bits
    weight_OI = codes_OI * 0.25 - 0.5
    assert torch.equal(round_trip(weight_OI, bits), weight_OI)


def test_int8_codes_of_an_output_share_its_scale_alone() -> None:
    weight_OI = torch.tensor([[127.0, -64.0, 1.0], [0.5, 0.25, -0.5]])
    assert torch.equal(round_trip(weight_OI, 8)[0], weight_OI[0])
    assert torch.allclose(round_trip(weight_OI, 8)[1], weight_OI[1], atol=0.5 / 127)


@BITS
def test_zeros_stay_zeros(bits: int) -> None:
    assert torch.equal(round_trip(torch.zeros(4, 40), bits), torch.zeros(4, 40))


@PACKED
def test_packed_codes_take_their_bits_and_a_scale_and_minimum_per_group(bits: int) -> None:
    stored = matrix_form(bits).store(random(128, 256))
    assert stored.codes.nbytes == 128 * 256 * bits // 8
    assert stored.scales.nbytes == 128 * 256 // GROUP * 2 * 2


@PACKED
@given(data=st.data())
def test_every_code_survives_packing(bits: int, data: st.DataObject) -> None:
    blocks, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (blocks, groups, 4, 32), dtype=torch.int32, generator=generator)
    form = GroupForm(bits)
    assert torch.equal(form._unpack(form._pack(codes)), codes)


@given(rows=st.integers(1, 9), columns=st.integers(1, 70))
def test_blocks_cover_every_weight_once(rows: int, columns: int) -> None:
    weight_OI = torch.arange(rows * columns).view(rows, columns)
    assert torch.equal(from_blocks(as_blocks(weight_OI), (rows, columns)), weight_OI)


def test_padding_widens_no_group() -> None:
    weight_OI = torch.full((1, 33), 5.0)
    weight_OI[0, 32] = 6.0
    assert torch.equal(round_trip(weight_OI, 2), weight_OI)


def test_other_numbers_of_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="not 5"):
        matrix_form(5)


# --- experts of checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    types = (FUSED_SILU, TRANSPOSED_WITH_BIAS, WITHOUT_GATE)
    return {name: open_checkpoint(save_toy(name, tmp_path_factory.mktemp(name)), "float32") for name in types}


def own_math(checkpoint: Checkpoint, layer: int) -> ExpertMath:
    return ExpertMath(experts_modules(checkpoint.skeleton)[layer][1])


def random_hidden(checkpoint: Checkpoint, tokens: int) -> torch.Tensor:
    """As wide as the experts are, which need not be the model's width."""
    return random(tokens, checkpoint.layers[-1].shapes["down_proj"][own_math(checkpoint, -1).is_transposed])


def expected_outputs(
    checkpoint: Checkpoint, experts: QuantizedExperts, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor
) -> torch.Tensor:
    """Pair by pair, by the architecture's arithmetic on restored weights."""
    math = own_math(checkpoint, layer)
    return torch.stack(
        [
            torch.stack(
                [math(experts.dequantize(layer, expert), hidden_H[None])[0] for expert in chosen_K.tolist()],
            )
            for hidden_H, chosen_K in zip(hidden_TH, experts_TK, strict=True)
        ]
    )


@BITS
@pytest.mark.parametrize("model_type", [FUSED_SILU, TRANSPOSED_WITH_BIAS, WITHOUT_GATE])
@pytest.mark.parametrize("tokens", [1, 3, 90])
def test_outputs_are_those_of_the_restored_weights(
    toys: dict[str, Checkpoint], bits: int, model_type: str, tokens: int
) -> None:
    checkpoint = toys[model_type]
    layer = checkpoint.layers[-1]
    experts = QuantizedExperts(checkpoint, bits, CPU)
    hidden_TH = random_hidden(checkpoint, tokens)
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.stack([torch.randperm(layer.num_experts, generator=generator)[:3] for _ in range(tokens)])
    output_TKH = experts.compute(layer.index, hidden_TH, experts_TK)
    expected_TKH = expected_outputs(checkpoint, experts, layer.index, hidden_TH, experts_TK)
    assert output_TKH.shape == expected_TKH.shape
    assert torch.allclose(output_TKH, expected_TKH, rtol=1e-4, atol=1e-4 * expected_TKH.abs().max().item())


@BITS
def test_without_kernels_outputs_are_the_same(
    toys: dict[str, Checkpoint], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = toys[FUSED_SILU]
    hidden_TH = random_hidden(checkpoint, 2)
    experts_TK = torch.tensor([[4, 1, 7], [0, 4, 2]])
    native_TKH = QuantizedExperts(checkpoint, bits, CPU).compute(1, hidden_TH, experts_TK)
    monkeypatch.setattr("predictor.quantized_experts.load_native", lambda _threads: None)
    torch_TKH = QuantizedExperts(checkpoint, bits, CPU).compute(1, hidden_TH, experts_TK)
    assert torch.allclose(native_TKH, torch_TKH, rtol=1e-4, atol=1e-4 * torch_TKH.abs().max().item())


def test_a_few_tokens_restore_no_weights(toys: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    if load_native(1) is None:
        pytest.skip("no C++ compiler")
    checkpoint = toys[FUSED_SILU]
    experts = QuantizedExperts(checkpoint, 4, CPU)
    monkeypatch.setattr(QuantizedLayer, "restore", lambda *_: pytest.fail("restored"))
    experts.compute(0, random_hidden(checkpoint, 2), torch.tensor([[4, 1, 7], [0, 4, 2]]))


def test_each_expert_of_a_prompt_is_restored_once(toys: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = toys[FUSED_SILU]
    experts = QuantizedExperts(checkpoint, 4, CPU)
    restored: list[int] = []
    restore = QuantizedLayer.restore

    def watched(layer: QuantizedLayer, chosen: list[int], dtype: torch.dtype) -> list[ExpertTensors]:
        restored.extend(chosen)
        return restore(layer, chosen, dtype)

    monkeypatch.setattr(QuantizedLayer, "restore", watched)
    experts.compute(0, random_hidden(checkpoint, 80), torch.tensor([[4, 1], [1, 6]]).repeat(40, 1))
    assert restored == [1, 4, 6]


@pytest.mark.parametrize("tokens", [1, 90])
def test_outputs_have_the_type_of_the_hidden_state(toys: dict[str, Checkpoint], tokens: int) -> None:
    checkpoint = toys[FUSED_SILU]
    experts = QuantizedExperts(checkpoint, 4, CPU)
    hidden_TH = random_hidden(checkpoint, tokens)
    experts_TK = torch.tensor([[5, 0, 2]]).expand(tokens, 3)
    wide_TKH = experts.compute(0, hidden_TH, experts_TK)
    narrow_TKH = experts.compute(0, hidden_TH.bfloat16(), experts_TK)
    assert narrow_TKH.dtype == torch.bfloat16
    assert (narrow_TKH.float() - wide_TKH).norm() < 0.02 * wide_TKH.norm()


def test_experts_of_bfloat16_files_are_exact_with_16_bits() -> None:
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    experts = QuantizedExperts(checkpoint, 16, CPU)
    for name, tensor in checkpoint.read_expert(ExpertKey(layer=3, expert=5)).items():
        assert torch.equal(experts.dequantize(3, 5)[name], tensor)


@BITS
def test_transposed_weights_are_grouped_along_their_inputs(toys: dict[str, Checkpoint], bits: int) -> None:
    checkpoint = toys[TRANSPOSED_WITH_BIAS]
    read = checkpoint.read_expert(ExpertKey(layer=0, expert=1))
    restored = QuantizedExperts(checkpoint, bits, CPU).dequantize(0, 1)
    assert {name: value.shape for name, value in restored.items()} == {
        name: value.shape for name, value in read.items()
    }
    for name, value in read.items():
        expected = round_trip(value.T, bits).T if name.endswith("_proj") else value
        assert torch.allclose(restored[name], expected, atol=1e-6)


def test_bytes_are_those_of_codes_and_scales() -> None:
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    weights = checkpoint.routed_bytes // 4
    assert QuantizedExperts(checkpoint, 4, CPU).nbytes == weights * 5 // 8


def test_experts_are_read_one_by_one_and_none_is_kept(
    toys: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = toys[FUSED_SILU]
    alive: list[ExpertTensors] = []
    read_expert = checkpoint.read_expert

    def watched(key: ExpertKey) -> ExpertTensors:
        for tensors in alive:
            tensors.clear()  # what was read before is needed no more
        alive.append({name: tensor.clone() for name, tensor in read_expert(key).items()})
        return alive[-1]

    expected = QuantizedExperts(checkpoint, 8, CPU)
    monkeypatch.setattr(checkpoint, "read_expert", watched)
    told: list[int] = []
    experts = QuantizedExperts(checkpoint, 8, CPU, progress=told.append)
    assert told == list(range(1, sum(layer.num_experts for layer in checkpoint.layers) + 1))
    for name, tensor in experts.dequantize(0, 0).items():
        assert torch.equal(tensor, expected.dequantize(0, 0)[name])


def test_the_file_is_not_written_to(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_toy(TRANSPOSED_WITH_BIAS, tmp_path), "float32")
    before = {name: tensor.clone() for name, tensor in checkpoint.read_expert(ExpertKey(layer=0, expert=0)).items()}
    QuantizedExperts(checkpoint, 4, CPU)
    for name, tensor in checkpoint.read_expert(ExpertKey(layer=0, expert=0)).items():
        assert torch.equal(tensor, before[name])
