"""Entries of a model's cache, shipped and written into another's, for every kind of cache that the toys have."""

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from raymoe.errors import FrameError
from raymoe.model.kv import Abilities, KvEntries, abilities, align, entries, length_of, nbytes, pack, unpack
from raymoe.model.runner import Runner, SequenceState
from tests.toy_models import PROMPT, TOYS, build_toy

OTHER = [3, 118, 99, 12, 70, 7, 101, 25, 53, 88, 110, 31]
STEPS = [77]
END = len(PROMPT) + len(STEPS)  # 13, past the toys' sliding windows of 8
WINDOW_HOLDS = 7

# layers with a state that is not kept by position; the architectures that are missing here align in full
OWN_STATES = {
    "bailing_hybrid": (0, 2),
    # compressed windows of all earlier tokens
    "deepseek_v4": (1, 2, 3),
    "granitemoehybrid": (0, 2),
    "jamba": (0, 2, 3),
    "kimi_linear": (0, 2),
    # in a list of the cache's own
    "minimax": (1, 3),
    "nemotron_h": (0,),
    "qwen3_5_moe": (0, 1, 2),
    "qwen3_5_moe_text": (0, 1, 2),
    "qwen3_next": (0, 1, 2),
    "qwen4_exp": (0, 1, 2),
    "qwen4_exp_text": (0, 1, 2),
    # the last token's values
    "zaya": (0, 1, 2, 3),
}
IN_FULL = [model_type for model_type in TOYS if model_type not in OWN_STATES]


@functools.cache
def toy(model_type: str) -> Any:
    """Not to be changed."""
    return build_toy(model_type)


def perturbed(model: Any) -> Any:
    """The same model with every weight off by some percent, as quantisation would have it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def read(runner: Runner, prompt: list[int] = PROMPT, tokens: list[int] = STEPS) -> SequenceState:
    _, state = runner.prefill(prompt)
    for token in tokens:
        runner.decode(state, token)
    return state


def cache_of(state: SequenceState) -> Any:
    return state.kwargs["past_key_values"]


@pytest.fixture
def cache() -> Any:
    """Of a toy with full and sliding layers: 13 positions, the windows hold 7."""
    return cache_of(read(Runner(toy("gpt_oss"))))


@pytest.mark.parametrize("model_type", TOYS)
def test_every_architecture_says_which_layers_align(model_type: str) -> None:
    found = abilities(cache_of(read(Runner(toy(model_type)), tokens=[])))

    assert found.own == OWN_STATES.get(model_type, ())
    assert found.alignable
    assert found.full is (model_type in IN_FULL)


@pytest.mark.parametrize("model_type", TOYS)
def test_an_aligned_cache_holds_the_other_models_entries(model_type: str) -> None:
    exact = cache_of(read(Runner(toy(model_type))))
    shadow = cache_of(read(Runner(perturbed(build_toy(model_type)))))
    theirs = entries(exact, END - 3, END)
    assert not torch.equal(entries(shadow, END - 3, END).flat, theirs.flat)

    assert align(shadow, END - 3, theirs)

    assert torch.equal(entries(shadow, END - 3, END).flat, theirs.flat)


@pytest.mark.parametrize("model_type", IN_FULL)
def test_where_alignment_is_full_the_cache_is_the_other_ones(model_type: str) -> None:
    runner = Runner(toy(model_type))
    state, other = read(runner), read(runner, OTHER)
    align(cache_of(other), 0, entries(cache_of(state), 0, END))

    other.ids = state.ids

    assert torch.equal(runner.decode(other, 5), runner.decode(state, 5))


@pytest.mark.parametrize("model_type", TOYS)
def test_an_entry_stays_the_same_while_the_cache_grows(model_type: str) -> None:
    runner = Runner(toy(model_type))
    state = read(runner)
    before = entries(cache_of(state), END - 1, END)

    runner.decode(state, 5)

    assert torch.equal(entries(cache_of(state), END - 1, END).flat, before.flat)


@pytest.mark.parametrize("model_type", IN_FULL)
def test_a_lagging_cache_takes_over_what_it_has_not_read(model_type: str) -> None:
    runner = Runner(toy(model_type))
    state, behind = read(runner, tokens=[*STEPS, 8, 15]), read(runner)

    assert align(cache_of(behind), END - 1, entries(cache_of(state), END - 1, state.length), append=True)

    behind.ids, behind.length = state.ids, state.length
    behind.kwargs = {**state.kwargs, "past_key_values": cache_of(behind)}
    assert torch.equal(runner.decode(behind, 5), runner.decode(state, 5))


def test_without_being_asked_nothing_is_appended(cache: Any) -> None:
    ahead = cache_of(read(Runner(toy("gpt_oss")), tokens=[*STEPS, 8]))

    assert not align(cache, END - 1, entries(ahead, END - 1, END + 1))
    assert length_of(cache) == END


def test_a_cache_with_states_of_its_own_is_never_extended() -> None:
    runner = Runner(toy("qwen3_next"))
    ahead, behind = cache_of(read(runner, tokens=[*STEPS, 8])), cache_of(read(runner))

    assert not align(behind, END, entries(ahead, END, END + 1), append=True)
    assert length_of(behind) == END


def test_positions_after_a_gap_are_not_appended(cache: Any) -> None:
    ahead = cache_of(read(Runner(toy("gpt_oss")), tokens=[*STEPS, 8, 9]))

    assert not align(cache, END + 1, entries(ahead, END + 1, END + 2), append=True)
    assert length_of(cache) == END


def counting(length: int, offset: float = 0.0) -> DynamicCache:
    """A full and a sliding layer whose keys and values at a position are that position, and the offset."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=WINDOW_HOLDS + 1)]
    for layer in cache.layers:
        positions = (torch.arange(length) + offset).view(1, 1, length, 1)
        layer.update(positions, positions)
    return cache


def test_what_has_slid_out_is_skipped_and_the_rest_overwritten() -> None:
    """A shadow is ahead of what came: it has positions 8 to 14 in its window, and entries of 4 to 9 come."""
    mine = counting(15)

    align(mine, 4, entries(counting(10, offset=0.5), 4, 10))

    full, sliding = (layer.keys.flatten().tolist() for layer in mine.layers)
    assert full == [0, 1, 2, 3, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10, 11, 12, 13, 14]
    assert sliding == [8.5, 9.5, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("start", [8, 10])
def test_a_window_may_go_on_by_more_than_it_holds(start: int) -> None:
    mine = counting(10)

    assert align(mine, start, entries(counting(19, offset=0.5), start, 19), append=True)

    full, sliding = (layer.keys.flatten().tolist() for layer in mine.layers)
    assert full == [*range(start), *(position + 0.5 for position in range(start, 19))]
    assert sliding == [12.5, 13.5, 14.5, 15.5, 16.5, 17.5, 18.5]
    assert [layer.get_seq_length() for layer in mine.layers] == [19, 19]


def test_a_window_that_has_moved_on_has_no_entries_any_more(cache: Any) -> None:
    with pytest.raises(ValueError, match="layer 1 holds 7 positions before 13"):
        entries(cache, 2, 9)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (4, 4), (12, 14)])
def test_positions_that_the_cache_does_not_have(cache: Any, start: int, end: int) -> None:
    with pytest.raises(ValueError, match="holds 13"):
        entries(cache, start, end)


@given(
    start=st.integers(0, END - 1), tokens=st.integers(1, END), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_packed_entries_have_the_length_that_is_expected(start: int, tokens: int, dtype: torch.dtype) -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 2, END, 4).to(dtype), torch.randn(1, 2, END, 3).to(dtype), layer)
    tokens = min(tokens, END - start)

    taken = entries(cache, start, start + tokens)
    packed = pack(taken)

    assert packed.nbytes == nbytes(cache, tokens, dtype) == 2 * 2 * (4 + 3) * tokens * dtype.itemsize
    assert torch.equal(unpack(packed, tokens, dtype).flat, taken.flat)


def test_entries_take_no_more_of_a_window_than_it_holds(cache: Any) -> None:
    sizes = [nbytes(cache, tokens, torch.float32) for tokens in range(1, 10)]
    steps = [after - before for before, after in pairwise(sizes)]

    full, sliding = 2 * 2 * 8 * 4, 2 * (2 * 2 * 8 * 4)  # one layer, two layers; keys and values of 2 heads of 8
    assert steps == [full + sliding] * (WINDOW_HOLDS - 1) + [full] * 2


def test_entries_of_another_precision_are_converted() -> None:
    mine = cache_of(read(Runner(toy("mixtral"))))
    theirs = entries(cache_of(read(Runner(build_toy("mixtral").bfloat16()))), END - 2, END)
    assert theirs.dtype == torch.bfloat16

    align(mine, END - 2, theirs)

    found = entries(mine, END - 2, END)
    assert found.dtype == torch.float32
    assert torch.equal(found.flat, theirs.flat.float())


def test_several_rows_are_aligned_together() -> None:
    exact, shadow = Runner(toy("gpt_oss")), Runner(perturbed(build_toy("gpt_oss")))
    (_, state), (_, other) = (runner.prefill_rows([PROMPT, OTHER]) for runner in (exact, shadow))
    theirs = entries(cache_of(state), 10, 12)

    align(cache_of(other), 10, theirs)

    assert torch.equal(cache_of(other).layers[1].keys[:, :, -2:], cache_of(state).layers[1].keys[:, :, -2:])


@pytest.mark.parametrize("elements", [1, 191, 193])
def test_entries_of_another_size_change_nothing(cache: Any, elements: int) -> None:
    before = entries(cache, END - 2, END)

    with pytest.raises(FrameError, match="2 positions are 192 elements here"):
        align(cache, END - 2, KvEntries(tokens=2, flat=torch.zeros(elements)))

    assert torch.equal(entries(cache, END - 2, END).flat, before.flat)


@pytest.mark.parametrize("size", [0, 3, 6])
def test_bytes_that_are_no_elements(size: int) -> None:
    with pytest.raises(FrameError, match=f"{size} bytes"):
        unpack(bytes(size), 1, torch.float32)


def test_no_cache_means_tokens_only() -> None:
    assert abilities(None).words == "tokens only: the cache keeps nothing by position"


def test_partial_alignment_says_what_stays_behind() -> None:
    found = Abilities(layers=4, alignable=(1, 3), own=(0, 2))

    assert found.words.startswith("tokens, and keys and values in 2 of 4 layers; in 2 a state")
