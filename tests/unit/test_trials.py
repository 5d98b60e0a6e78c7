"""Passes of several tokens, some of which are forgotten again: as if only the others had been read, or not offered."""

from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.model.router import ProbeExperts
from raymoe.model.runner import Runner, SequenceState, Trial
from raymoe.model.trials import make_cuttable, why_no_trials
from raymoe.model.trunk import build_trunk
from tests.toy_models import PROMPT, TOYS, save_toy
from tests.unit.test_kv import toy

# architectures that keep states which can't be cut
WITHOUT = {
    "bailing_hybrid",
    "deepseek_v4",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "minimax",
    "nemotron_h",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "zaya",
}
# They attend to the positions that an indexer scores best. Many scores are 0 in a toy, and which of equals is chosen
# depends on the shape of the pass: even a prompt differs from single tokens. The proof says whether one may.
SPARSE = {"axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"}
WINDOW_HOLDS = 7


def begin(model: Any) -> tuple[Runner, SequenceState]:
    runner = Runner(model)
    _, state = runner.prefill(PROMPT)
    return runner, state


def singly(model: Any, tokens: list[int]) -> torch.Tensor:
    runner, state = begin(model)
    return torch.stack([runner.decode(state, token) for token in tokens])


@pytest.mark.parametrize("model_type", [name for name in TOYS if name not in WITHOUT | SPARSE])
def test_a_pass_of_several_tokens_gives_what_single_ones_give(model_type: str) -> None:
    model = toy(model_type)
    runner, state = begin(model)
    assert make_cuttable(state) is None
    kept = [5, 77, 79, 41, 8, 101, 64]
    found = []
    for tokens, wrong in (([5, 77], [9, 9]), ([79], [9]), ([41], []), ([8, 101, 64], [3, 3, 3, 3])):
        trial = runner.read(state, [*tokens, *wrong])
        runner.keep(state, trial, len(tokens))
        found.append(trial.logits_TV[: len(tokens)])
    assert state.length == len(PROMPT) + len(kept)
    torch.testing.assert_close(torch.cat(found), singly(model, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(WITHOUT))
def test_what_keeps_other_states_says_so(model_type: str) -> None:
    _, state = begin(toy(model_type))
    reason = make_cuttable(state)
    assert reason is not None and "can't be taken back" in reason


def test_a_window_never_holds_more_than_itself_and_one_pass() -> None:
    runner, state = begin(toy("mixtral"))
    assert make_cuttable(state) is None
    layers = state.kwargs["past_key_values"].layers
    for _ in range(20):
        trial = runner.read(state, [5, 6, 7, 8])
        assert max(layer.keys.shape[-2] for layer in layers) <= WINDOW_HOLDS + 4
        runner.keep(state, trial, 2)
        assert max(layer.keys.shape[-2] for layer in layers) == WINDOW_HOLDS
    for _ in range(20):
        runner.keep(state, runner.read(state, [5]), 1)
        assert max(layer.keys.shape[-2] for layer in layers) == WINDOW_HOLDS


def test_a_sequence_without_a_cache_can_not_be_cut() -> None:
    assert make_cuttable(SequenceState(torch.empty(0), {}, 0)) == "the model keeps no cache that could be cut"


# --- the proof --------------------------------------------------------------------------------------------


def trunk_runner(model_type: str, directory: Path, dtype: str = "float32") -> Runner:
    checkpoint = open_checkpoint(save_toy(model_type, directory / model_type), dtype)
    return Runner(build_trunk(checkpoint, ProbeExperts(), torch.device("cpu")))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "lfm2_moe", "qwen3_next", "minimax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_agrees(model_type: str, dtype: str, tmp_path: Path) -> None:
    reason = why_no_trials(trunk_runner(model_type, tmp_path, dtype))
    assert (reason is not None) == (model_type in WITHOUT), reason


@pytest.mark.parametrize("model_type", sorted(SPARSE))
def test_the_proof_takes_no_sparse_architecture_on_trust(model_type: str, tmp_path: Path) -> None:
    reason = why_no_trials(trunk_runner(model_type, tmp_path))
    assert reason in (None, "a pass of several tokens gives other logits than single ones")
    assert (model_type, reason) != ("deepseek_v32", None)


def test_a_pass_that_forgets_what_came_before_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trunk_runner("mixtral", tmp_path)

    def forgetful(state: SequenceState, tokens: list[int]) -> Trial:
        trial = read(state, tokens)
        logits_TV = trial.logits_TV.clone()
        logits_TV[-1:] = runner.prefill(tokens)[0]
        return Trial(logits_TV=logits_TV, tokens=trial.tokens, outputs=trial.outputs)

    read = runner.read
    monkeypatch.setattr(runner, "read", forgetful)
    assert why_no_trials(runner) == "a pass of several tokens gives other logits than single ones"


def test_a_pass_that_fails_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = trunk_runner("mixtral", tmp_path)

    def fail(state: SequenceState, tokens: list[int]) -> Trial:
        raise NotImplementedError("one token at a time")

    monkeypatch.setattr(runner, "read", fail)
    assert why_no_trials(runner) == "a pass of several tokens fails: NotImplementedError"
