"""Prompts in pieces, beside others' tokens and from copies: as good as whole ones, where an architecture bears it."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.engine import Engine
from raymoe.engine.piece_size import FEWEST_TOKENS, FIRST_TOKENS, MOST_TOKENS, PieceSize
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.model.kv_size import Held, KvSize, measure_kv
from raymoe.model.pieces_proof import prove_pieces
from raymoe.model.roomy import ROOM_TOKENS, RoomyLayer, held_bytes, new_cache
from raymoe.model.router import ProbeExperts
from raymoe.model.rows_proof import join_rows, rotates_by_length
from raymoe.model.runner import Runner, tensors_within
from raymoe.model.trunk import build_trunk
from tests.local import local_service
from tests.toy_models import TOYS, Toys
from tests.unit.test_rows import Answer, check_by_transformers, stepped, submit

# --- what architectures bear ----------------------------------------------------------------------------------


def proved(path: Path) -> tuple[Runner, dict[str, str]]:
    checkpoint = open_checkpoint(path, "float32")
    runner = Runner(build_trunk(checkpoint, ProbeExperts(), torch.device("cpu")))
    join_rows(runner)
    return runner, prove_pieces(runner)


@pytest.mark.parametrize("model_type", list(TOYS))
def test_what_is_proved_is_as_good_with_other_tokens_and_lengths(model_type: str, toys: Toys) -> None:
    runner, reasons = proved(toys(model_type))
    assert runner.reads_on == ("pieces" not in reasons) and runner.copies == ("copies" not in reasons)
    vocabulary = runner.model.config.get_text_config(decoder=True).vocab_size
    draw = random.Random(3)
    tokens = [draw.randrange(vocabulary // 4, vocabulary // 2) for _ in range(51)]
    expected_V, whole = runner.prefill(tokens)
    size = measure_kv(runner)
    assert size.at(len(tokens), len(tokens)) >= Runner.held_bytes(whole)
    if not runner.reads_on:
        return
    state, found_V = runner.empty(), torch.empty(0)
    for start in range(0, 51, 11):
        found_V = runner.read_on(state, tokens[start : start + 11])
    assert state.length == 51 and float((found_V - expected_V).abs().max()) < 1e-3 * float(expected_V.std())
    assert size.at(len(tokens), 11) >= Runner.held_bytes(state)
    if runner.copies:
        copy = runner.copied(whole, 30)
        found_V = runner.read_on(copy, tokens[30:])
        assert float((found_V - expected_V).abs().max()) < 1e-3 * float(expected_V.std())


def test_most_architectures_bear_pieces(toys: Toys) -> None:
    assert all(proved(toys(name))[0].reads_on for name in ("mixtral", "qwen3_moe", "gpt_oss", "olmoe"))
    assert proved(toys("minimax"))[1]["pieces"] == "the architecture prepares its inputs in a way of its own"
    windows = proved(toys("gpt_oss"))[1]
    assert windows["copies"] == "the cache holds more than keys and values of all positions"


def test_a_trunk_that_forgets_between_pieces_is_found_out(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(toys("mixtral"), "float32")
    runner = Runner(build_trunk(checkpoint, ProbeExperts(), torch.device("cpu")))
    join_rows(runner)
    read_on = runner.read_on

    def forgetful(state, tokens):  # type: ignore[no-untyped-def]
        state.length = 0
        return read_on(state, tokens)

    monkeypatch.setattr(runner, "read_on", forgetful)
    assert prove_pieces(runner)["pieces"] == "a prompt in pieces gives other logits than a whole one"
    assert not (runner.reads_on or runner.mixes or runner.copies)


def test_rotations_that_depend_on_the_length_are_known_by_name() -> None:
    def of(**parameters: object) -> SimpleNamespace:
        return SimpleNamespace(rope_parameters=parameters)

    assert rotates_by_length(of(rope_type="longrope"))
    assert rotates_by_length(of(full_attention={"rope_type": "dynamic"}, other=None))
    assert not rotates_by_length(of(rope_type="yarn"))
    assert not rotates_by_length(SimpleNamespace())


# --- caches with room -------------------------------------------------------------------------------------------


def test_a_cache_grows_in_place_and_holds_what_it_was_given() -> None:
    draw = torch.Generator().manual_seed(1)
    layer, given, moved = RoomyLayer(), [], set()
    for count in (3, 1, ROOM_TOKENS, 1, 1, 5):
        keys, values = torch.randn((2, 1, 2, count, 4), generator=draw).unbind(0)
        given.append((keys, values))
        found = layer.update(keys, values)
        assert all(
            torch.equal(mine, torch.cat([pair[side] for pair in given], dim=2)) for side, mine in enumerate(found)
        )
        moved.add(layer.keys.data_ptr())
    assert len(moved) == 2 and layer.get_seq_length() == 75
    assert held_bytes([layer.keys, layer.values]) == 2 * 2 * ROOM_TOKENS * 2 * 4 * 4


def test_what_was_cut_or_replaced_from_outside_is_not_written_over() -> None:
    layer, keys = RoomyLayer(), torch.arange(40.0).view(1, 1, 10, 4)
    layer.update(keys, keys)
    layer.crop(-4)
    layer.update(keys[:, :, :1] + 100, keys[:, :, :1])
    assert torch.equal(layer.keys, torch.cat([keys[:, :, :6], keys[:, :, :1] + 100], dim=2))
    foreign = torch.zeros(1, 1, 64, 4)
    layer.keys = foreign[:, :, :7]
    layer.update(keys[:, :, :1], keys[:, :, :1])
    assert float(foreign.abs().sum()) == 0.0 and layer.keys.shape[2] == 8


def test_a_cache_knows_its_memory() -> None:
    runner, _ = proved(EMBEDDED_MODEL)
    size = measure_kv(runner)
    state = runner.empty()
    for length in (1, ROOM_TOKENS, ROOM_TOKENS + 1):
        runner.read_on(state, [40] * (length - state.length))
        assert (
            size.at(length) == Runner.held_bytes(state) == held_bytes(tensors_within(state.kwargs["past_key_values"]))
        )
    assert new_cache(runner.model.config).get_seq_length() == 0


def test_bytes_of_windows_and_states() -> None:
    size = KvSize(
        held=(
            Held(token_bytes=10, most_tokens=None, block_tokens=8),
            Held(token_bytes=2, most_tokens=5, block_tokens=1),
        ),
        fixed_bytes=100,
        token_bytes=0.5,
    )
    assert size.at(3) == 80 + 6 + 100 + 2
    assert size.at(20, at_once=3) == 240 + 16 + 100 + 10
    assert size.tokens_within(size.at(20), at_once=1) >= 20
    assert size.at(size.tokens_within(1000)) <= 1000 < size.at(size.tokens_within(1000) + 1)


# --- how large they are ---------------------------------------------------------------------------------------


def test_pieces_lengthen_a_step_by_half() -> None:
    size = PieceSize()
    assert size.tokens(7, 64) == FIRST_TOKENS
    for _ in range(40):
        size.note(7, 0, 0.010)
        size.note(7, size.tokens(7, 64), 0.010 + 0.001 + 0.0002 * size.tokens(7, 64))
    assert size.tokens(7, 64) in (19, 20, 21), "1 ms for beginning, and 4 ms for 20 tokens"
    for _ in range(40):
        size.note(7, size.tokens(7, 64), 0.010 + 0.01 * size.tokens(7, 64))
    assert size.tokens(7, 64) == FEWEST_TOKENS
    for _ in range(60):
        size.note(7, size.tokens(7, 64), 0.010)
    assert size.tokens(7, 64) == 64 and size.tokens(7, 10_000) == MOST_TOKENS


def test_what_pieces_cost_is_not_mixed_up_with_how_many_decode() -> None:
    size = PieceSize()
    size.note(1, 0, 0.004)
    size.note(8, 0, 0.010)
    size.note(1, 10, 0.005)
    assert size.tokens(1, 512) == 20 and size.tokens(8, 512) == 50
    assert size.tokens(3, 512) == FIRST_TOKENS, "not measured"
    size.note(3, 10, 1.0)
    assert size.tokens(8, 512) == 50


def test_pieces_of_a_fixed_size_stay_so() -> None:
    size = PieceSize(700)
    size.note(1, 0, 1.0)
    size.note(1, 7, 100.0)
    assert size.tokens(1, 64) == 700


# --- in the engine ------------------------------------------------------------------------------------------------


def run(engine: Engine) -> None:
    while engine.step():
        pass


def test_a_long_prompt_lets_others_go_on() -> None:
    draw = random.Random(1)
    long = [draw.randrange(20, 2000) for _ in range(300)]
    with local_service(EMBEDDED_MODEL, policy="all_resident", trunk={"prefill_chunk": 32}) as service:
        engine = stepped(service)._engine
        assert service.runner.mixes and service.runner.copies
        others = [submit(service, [draw.randrange(20, 2000) for _ in range(5)], max_tokens=40) for _ in range(3)]
        for _ in range(6):
            engine.step()
        late = submit(service, long, max_tokens=8)
        made = []
        while not late.tokens:
            before = [len(other.tokens) for other in others]
            engine.step()
            made.append([len(other.tokens) - count for other, count in zip(others, before, strict=True)])
        assert len(made) == 10 and all(each == [1, 1, 1] for each in made), "300 tokens, 32 beside each step"
        run(engine)
    assert check_by_transformers(EMBEDDED_MODEL, long, late.tokens) == []


@pytest.mark.parametrize("policy", ["all_resident", "importance"])
def test_a_chat_goes_on_from_what_was_read(policy: str) -> None:
    draw = random.Random(2)
    scheduling = {"policy": policy, "alpha": 0.0} if policy == "importance" else {"policy": policy}
    history, known = [draw.randrange(20, 2000) for _ in range(40)], 0
    with local_service(EMBEDDED_MODEL, **scheduling) as service:
        engine = stepped(service)._engine
        for _ in range(4):
            answer = submit(service, history, max_tokens=10)
            run(engine)
            assert isinstance(answer.last, Chunk) and answer.last.usage is not None
            assert check_by_transformers(EMBEDDED_MODEL, history, answer.tokens) == []
            assert answer.last.usage.cached_tokens == known
            known = len(history) + len(answer.tokens) - 1  # the last token was chosen, not read
            history = [*history, *answer.tokens, *(draw.randrange(20, 2000) for _ in range(20))]
        report = engine.report()
        assert report.kv_bytes == report.kv_set_aside_bytes == 0 and report.prefixes == 1 and report.prefix_bytes > 0
        assert report.cached_tokens > 0


def test_the_same_prompt_again_is_read_from_a_running_request() -> None:
    prompt = list(range(300, 340))
    with local_service(EMBEDDED_MODEL, policy="all_resident") as service:
        engine = stepped(service)._engine
        first = submit(service, prompt, max_tokens=20)
        engine.step()
        second = submit(service, prompt, max_tokens=20)
        run(engine)
    assert isinstance(second.last, Chunk) and second.last.usage is not None and second.last.usage.cached_tokens == 39
    assert first.tokens == second.tokens


def test_no_exact_request_starts_from_substituted_experts() -> None:
    prompt = list(range(300, 340))
    with local_service(EMBEDDED_MODEL, slot_memory=40 * 196_608, policy="importance", alpha=0.5) as service:
        engine = stepped(service)._engine
        answers: list[Answer] = []
        for quality in ("fast", "exact", "fast"):
            answers.append(submit(service, prompt, max_tokens=5, quality=quality))
            run(engine)
    usages = [answer.last.usage for answer in answers if isinstance(answer.last, Chunk)]
    assert [usage.cached_tokens for usage in usages if usage is not None] == [0, 0, 39]
    assert check_by_transformers(EMBEDDED_MODEL, prompt, answers[1].tokens) == []


def test_a_cancelled_prompt_is_let_go_in_the_middle() -> None:
    with local_service(EMBEDDED_MODEL, policy="all_resident") as service:
        engine = stepped(service)._engine
        other = submit(service, [50, 60, 70], max_tokens=30)
        engine.step()
        long = submit(service, list(range(100, 500)), max_tokens=8)
        engine.step()
        reading = engine._roster.running[-1]
        assert reading.state is not None and 0 < reading.state.length < 400
        engine.cancel(reading.id)
        engine.step()
        assert isinstance(long.last, Chunk) and long.last.finish_reason == "cancelled" and long.tokens == []
        assert engine.report().running == 1
        run(engine)
        report = engine.report()
    assert (report.running, report.kv_bytes, report.kv_set_aside_bytes) == (0, 0, 0)
    assert check_by_transformers(EMBEDDED_MODEL, [50, 60, 70], other.tokens) == []


def test_a_listener_that_fails_ends_its_own_request_only() -> None:
    def deaf(chunk: object) -> None:
        raise OSError("gone")

    with local_service(EMBEDDED_MODEL, policy="all_resident") as service:
        engine = stepped(service)._engine
        engine.submit([70, 71], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20), deaf)
        other = submit(service, [50, 60, 70], max_tokens=8)
        run(engine)
        assert engine.report().running == 0
    assert len(other.tokens) == 8 and check_by_transformers(EMBEDDED_MODEL, [50, 60, 70], other.tokens) == []
