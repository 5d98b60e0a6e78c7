"""A sequence that was taken back goes on as if the steps had never been, in every architecture."""

from typing import Any

import pytest
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.model.kv import entries
from raymoe.model.rewind import Rewind
from raymoe.model.runner import Runner, SequenceState
from tests.toy_models import PROMPT, TOYS, build_toy
from tests.unit.test_kv import perturbed, toy

DEPTH = 3
START = len(PROMPT)


def begin(model: Any, depth: int = DEPTH) -> tuple[Runner, SequenceState, Rewind]:
    runner = Runner(model)
    _, state = runner.prefill(PROMPT)
    return runner, state, Rewind(state, depth)


def steps(runner: Runner, state: SequenceState, rewind: Rewind, tokens: list[int]) -> torch.Tensor:
    """The logits after the last token."""
    for token in tokens:
        with rewind.step():
            logits_V = runner.decode(state, token)
    return logits_V


def never_taken_back(runner: Runner, tokens: list[int]) -> torch.Tensor:
    logits_V, state = runner.prefill(PROMPT)
    for token in tokens:
        logits_V = runner.decode(state, token)
    return logits_V


@pytest.mark.parametrize("model_type", TOYS)
def test_other_tokens_after_going_back_give_what_they_give_alone(model_type: str) -> None:
    runner, state, rewind = begin(toy(model_type))
    assert rewind.possible

    steps(runner, state, rewind, [5, 9, 3])
    rewind.back_to(START + 1)  # by two
    steps(runner, state, rewind, [77, 78])
    rewind.back_to(START + 2)  # by one
    found_V = steps(runner, state, rewind, [79, 41])

    assert state.length == START + 4
    torch.testing.assert_close(found_V, never_taken_back(runner, [5, 77, 79, 41]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", TOYS)
def test_a_forward_that_is_left_in_its_last_layer_leaves_no_trace(model_type: str) -> None:
    model = toy(model_type)
    runner, state, rewind = begin(model)
    steps(runner, state, rewind, [5])

    def leave(_module: Any, _inputs: Any) -> None:
        raise InterruptedError

    hook = experts_modules(model)[-1][1].register_forward_pre_hook(leave)
    with pytest.raises(InterruptedError):
        steps(runner, state, rewind, [9])
    hook.remove()
    found_V = steps(runner, state, rewind, [77, 78])

    torch.testing.assert_close(found_V, never_taken_back(runner, [5, 77, 78]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", TOYS)
def test_alignment_outlasts_going_back(model_type: str) -> None:
    """Entries of a position that was read two steps ago: the states to go back to must have them as well."""
    exact_runner, exact, _ = begin(toy(model_type))
    exact_runner.decode(exact, 5)
    theirs = entries(exact.kwargs["past_key_values"], START, START + 1)
    runner, state, rewind = begin(perturbed(build_toy(model_type)))
    steps(runner, state, rewind, [5, 9, 3])

    assert rewind.align(START, theirs)
    rewind.back_to(START + 1)

    assert torch.equal(entries(state.kwargs["past_key_values"], START, START + 1).flat, theirs.flat)


def test_positions_taken_over_from_the_model_need_no_way_back() -> None:
    runner, state, rewind = begin(toy("gpt_oss"))
    _, ahead, _ = begin(toy("gpt_oss"))
    for token in (5, 9):
        runner.decode(ahead, token)

    assert rewind.align(START, entries(ahead.kwargs["past_key_values"], START, START + 2), append=True)

    assert state.length == START + 2
    found_V = steps(runner, state, rewind, [77])
    torch.testing.assert_close(found_V, never_taken_back(runner, [5, 9, 77]), rtol=1e-5, atol=1e-5)


def test_recording_keeps_the_window_and_the_way_back_only() -> None:
    runner, state, rewind = begin(toy("mixtral"))  # windows of 8, which hold 7

    steps(runner, state, rewind, list(range(3, 40)))

    held = {layer.keys.shape[-2] for layer in state.kwargs["past_key_values"].layers}
    assert held == {7 + DEPTH + 1}


@pytest.mark.parametrize("length", [START, START + 5])
def test_out_of_reach(length: int) -> None:
    runner, state, rewind = begin(toy("mixtral"))
    steps(runner, state, rewind, [5, 9, 3, 8])

    with pytest.raises(ValueError, match="within reach are 13 to 16"):
        rewind.back_to(length)


def test_going_back_to_where_it_is_changes_nothing() -> None:
    runner, state, rewind = begin(toy("qwen3_next"))
    steps(runner, state, rewind, [5])

    rewind.back_to(START + 1)
    found_V = steps(runner, state, rewind, [9])

    torch.testing.assert_close(found_V, never_taken_back(runner, [5, 9]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reason", ["no depth", "no cache", "an unknown kind of state"])
def test_where_there_is_no_way_back_steps_run_all_the_same(reason: str) -> None:
    runner = Runner(toy("mixtral"))
    _, state = runner.prefill(PROMPT)
    cache = state.kwargs["past_key_values"]
    if reason == "no cache":
        rewind = Rewind(SequenceState(state.ids, {}, state.length), DEPTH)
    elif reason == "no depth":
        rewind = Rewind(state, 0)
    else:
        cache.layers[0].history = iter(())
        rewind = Rewind(state, DEPTH)

    assert not rewind.possible
    found_V = steps(runner, state, rewind, [5, 9])
    assert torch.equal(found_V, never_taken_back(runner, [5, 9]))
    with pytest.raises(ValueError, match="within reach are 14 only"):
        Rewind(state, 0).back_to(START)
