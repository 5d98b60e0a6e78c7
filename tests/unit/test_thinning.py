"""What a cheaper shadow leaves out: the choice on plain numbers, and whole shadows of toys that are thinned."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from predictor.shadow_model import ShadowModel
from predictor.thinning import Thinning, skipped_layers
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ModelConfig, PredictorConfig
from raymoe.engine.host_experts import HostExperts
from raymoe.engine.shadow_host import build_shadow_model
from raymoe.errors import ConfigError
from raymoe.model.kv import abilities, entries, length_of
from tests.toy_models import PROMPT, save_toy

SEQUENCE = 0
EXPERTS_TK = torch.tensor([[7, 2, 5], [1, 0, 3]])
WEIGHTS_TK = torch.tensor([[0.25, 0.5, 0.25], [0.7, 0.2, 0.1]])

# sliding windows and biases; latent attention and groups; recurrent layers; a router that hands its state on, top-1;
# hash routing, whose router no rule reproduces; experts narrower than the model in layers of their own
TOYS = ["gpt_oss", "deepseek_v3", "qwen3_next", "zaya", "deepseek_v4", "nemotron_h", "mixtral"]
EVERYTHING = 1 << 30


# --- the choice -----------------------------------------------------------------------------------------


def test_the_heaviest_are_kept_with_their_own_weights() -> None:
    experts_Tk, weights_Tk = Thinning(top_k=2).kept(0, EXPERTS_TK, WEIGHTS_TK)
    assert experts_Tk[:, 0].tolist() == [2, 1] and experts_Tk[1, 1] == 0
    torch.testing.assert_close(weights_Tk, torch.tensor([[0.5, 0.25], [0.7, 0.2]]))


@pytest.mark.parametrize("top_k", [None, 3, 8])
def test_nothing_left_out_is_no_change_at_all(top_k: int | None) -> None:
    experts_TK, weights_TK = Thinning(top_k=top_k).kept(0, EXPERTS_TK, WEIGHTS_TK)
    assert experts_TK is EXPERTS_TK and weights_TK is WEIGHTS_TK


def test_a_skipped_layer_keeps_none_and_others_all() -> None:
    thinning = Thinning(skipped=frozenset({1}))
    assert thinning.kept(1, EXPERTS_TK, WEIGHTS_TK)[0].shape == (2, 0)
    assert thinning.kept(0, EXPERTS_TK, WEIGHTS_TK)[0] is EXPERTS_TK


@given(
    rows=st.integers(1, 4), chosen=st.integers(1, 8), top_k=st.integers(1, 9), seed=st.integers(0, 1 << 16)
)  # fmt: skip
def test_what_is_kept_is_the_best_of_what_was_chosen(rows: int, chosen: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts_TK = torch.stack([torch.randperm(16, generator=generator)[:chosen] for _ in range(rows)])
    weights_TK = torch.rand(rows, chosen, generator=generator)
    experts_Tk, weights_Tk = Thinning(top_k=top_k).kept(0, experts_TK, weights_TK)
    assert experts_Tk.shape == weights_Tk.shape == (rows, min(top_k, chosen))
    for row in range(rows):
        own = dict(zip(experts_TK[row].tolist(), weights_TK[row].tolist(), strict=True))
        kept = dict(zip(experts_Tk[row].tolist(), weights_Tk[row].tolist(), strict=True))
        assert len(kept) == min(top_k, chosen) and kept.keys() <= own.keys()
        lightest_kept = min(own[expert] for expert in kept)
        assert all(weight <= lightest_kept for expert, weight in own.items() if expert not in kept)
        assert all(kept[expert] == own[expert] for expert in kept)


@pytest.mark.parametrize(
    ("skip", "layers"), [(0, []), (1, [5]), (3, [3, 4, 5]), (6, [0, 1, 2, 3, 4, 5]), ((4, 0), [0, 4]), ((), [])]
)
def test_layers_are_named_one_by_one_or_counted_from_the_last(skip: Any, layers: list[int]) -> None:
    assert sorted(skipped_layers(skip, 6)) == layers


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (7, "skip_layers is 7, but the model has 6 MoE layers; allowed is 0 to 6"),
        ((0, 6), "skip_layers names layer 6, but the model's MoE layers are 0 to 5"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(skip: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        skipped_layers(skip, 6)


# --- whole shadows --------------------------------------------------------------------------------------


class PlainExperts:
    """A shadow's experts that are not quantised, and how many pairs they computed."""

    nbytes = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.pairs = 0
        self._experts = HostExperts(checkpoint, EVERYTHING)

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        self.pairs += experts_TK.numel()
        return self._experts.of_tokens(layer, hidden_TH, experts_TK)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    directory = tmp_path_factory.mktemp("toys")
    return functools.cache(lambda model_type: open_checkpoint(save_toy(model_type, directory / model_type), "float32"))


def shadow_of(checkpoint: Checkpoint, **thinning: Any) -> tuple[ShadowModel, PlainExperts]:
    experts = PlainExperts(checkpoint)
    return ShadowModel(checkpoint, experts, torch.device("cpu"), depth=3, thinning=Thinning(**thinning)), experts


def decode(shadow: ShadowModel, tokens: list[int]) -> torch.Tensor:
    """The logits after the last of these tokens, [V]."""
    for token in tokens:
        logits_BV = shadow.decode(SEQUENCE, [token])
    return logits_BV[0]


def variants(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    every = frozenset(range(len(checkpoint.layers)))
    return [{"top_k": 1}, {"skipped": every}, {"top_k": 2, "skipped": frozenset({0})}]


@pytest.mark.parametrize("model_type", TOYS)
def test_a_thinned_shadow_names_all_experts_of_every_layer(model_type: str, toy: Callable[[str], Checkpoint]) -> None:
    checkpoint = toy(model_type)
    for thinning in variants(checkpoint):
        shadow, experts = shadow_of(checkpoint, **thinning)
        shadow.prefill(SEQUENCE, [tuple(PROMPT)])
        named: dict[int, np.ndarray] = {}
        shadow.on_routed = lambda layer, experts_TK, _, named=named: named.update({layer: experts_TK})
        before = experts.pairs
        decode(shadow, [5])
        assert {layer: chosen.shape[1] for layer, chosen in named.items()} == {
            layer.index: layer.top_k for layer in checkpoint.layers
        }
        skipped = thinning.get("skipped", frozenset())
        computed = [layer for layer in checkpoint.layers if layer.index not in skipped]
        assert experts.pairs - before == sum(min(layer.top_k, thinning.get("top_k", 99)) for layer in computed)


@pytest.mark.parametrize("model_type", TOYS)
def test_prompts_are_read_in_full(model_type: str, toy: Callable[[str], Checkpoint]) -> None:
    checkpoint = toy(model_type)
    full, _ = shadow_of(checkpoint)
    expected_BV = full.prefill(SEQUENCE, [tuple(PROMPT)])
    for thinning in variants(checkpoint):
        shadow, _ = shadow_of(checkpoint, **thinning)
        assert torch.equal(shadow.prefill(SEQUENCE, [tuple(PROMPT)]), expected_BV)
        expected_V = decode(full, [5])
        full.back_to(SEQUENCE, len(PROMPT))
        if checkpoint.layers[0].top_k > 1 or "skipped" in thinning:
            assert not torch.equal(decode(shadow, [5]), expected_V), "and steps are not"


@pytest.mark.parametrize("model_type", TOYS)
def test_a_thinned_shadow_goes_back_as_any_other(model_type: str, toy: Callable[[str], Checkpoint]) -> None:
    checkpoint = toy(model_type)
    for thinning in variants(checkpoint):
        shadow, _ = shadow_of(checkpoint, **thinning)
        shadow.prefill(SEQUENCE, [tuple(PROMPT)])
        assert shadow.may_run_ahead(SEQUENCE)
        expected_V = decode(shadow, [5, 77])
        shadow.back_to(SEQUENCE, len(PROMPT))
        decode(shadow, [9, 3])
        shadow.back_to(SEQUENCE, len(PROMPT))
        torch.testing.assert_close(decode(shadow, [5, 77]), expected_V, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "mixtral"])  # whose caches align in full
def test_once_aligned_a_thinned_shadow_has_the_models_keys_and_values(
    model_type: str, toy: Callable[[str], Checkpoint]
) -> None:
    checkpoint = toy(model_type)
    full, _ = shadow_of(checkpoint)
    full.prefill(SEQUENCE, [tuple(PROMPT)])
    decode(full, [5, 77])
    model_cache, end = cache_of(full), len(PROMPT) + 2
    theirs = entries(model_cache, end - 2, end)
    for thinning in variants(checkpoint):
        shadow, _ = shadow_of(checkpoint, **thinning)
        shadow.prefill(SEQUENCE, [tuple(PROMPT)])
        decode(shadow, [5, 77])
        cache = cache_of(shadow)
        assert abilities(cache) == abilities(model_cache) and length_of(cache) == end
        assert shadow.align(SEQUENCE, end - 2, theirs)
        torch.testing.assert_close(entries(cache, end - 2, end).flat, theirs.flat)


def cache_of(shadow: ShadowModel) -> Any:
    return shadow._states[SEQUENCE][0].kwargs["past_key_values"]


def test_without_any_experts_a_step_is_the_trunk_alone(toy: Callable[[str], Checkpoint]) -> None:
    checkpoint = toy("mixtral")
    bare, experts = shadow_of(checkpoint)
    bare.prefill(SEQUENCE, [tuple(PROMPT)])
    experts.compute = lambda layer, hidden_TH, experts_TK: hidden_TH.new_zeros((1, 3, hidden_TH.shape[1]))  # type: ignore[method-assign]
    skipping, _ = shadow_of(checkpoint, skipped=frozenset({0, 1, 2}))
    skipping.prefill(SEQUENCE, [tuple(PROMPT)])
    torch.testing.assert_close(decode(skipping, [5, 9]), decode(bare, [5, 9]))


def test_rows_in_lockstep_are_thinned_each(toy: Callable[[str], Checkpoint]) -> None:
    checkpoint = toy("mixtral")
    together, experts = shadow_of(checkpoint, top_k=1)
    together.prefill(SEQUENCE, [tuple(PROMPT), tuple(reversed(PROMPT))])
    before = experts.pairs
    logits_BV = together.decode(SEQUENCE, [5, 9])
    assert experts.pairs - before == 2 * len(checkpoint.layers)
    alone, _ = shadow_of(checkpoint, top_k=1)
    alone.prefill(SEQUENCE, [tuple(reversed(PROMPT))])
    torch.testing.assert_close(alone.decode(SEQUENCE, [9])[0], logits_BV[1], rtol=1e-4, atol=1e-4)


# --- as configured --------------------------------------------------------------------------------------


def test_a_configured_shadow_is_thinned_and_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    source = ModelConfig(path=str(save_toy("mixtral", tmp_path / "toy")), dtype="float32")
    full, thin = (
        build_shadow_model(source, PredictorConfig.model_validate(fields))
        for fields in ({"preset": "light"}, {"preset": "light", "skip_layers": [1]})
    )
    for shadow in (full, thin):
        shadow.prefill(SEQUENCE, [tuple(PROMPT)])
    assert not torch.equal(decode(full, [5]), decode(thin, [5]))
    with pytest.raises(ConfigError, match="the model has 3 MoE layers; allowed is 0 to 3"):
        build_shadow_model(source, PredictorConfig(skip_layers=4))
