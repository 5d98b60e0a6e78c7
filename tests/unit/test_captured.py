"""Captured decode steps, with what replays them on a GPU played by threads, and its kernels by torch operations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.device.played import share
from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.engine import turns
from raymoe.engine.dialogue import Dialogue
from raymoe.engine.scheduler import ExpertScheduler
from raymoe.engine.service import ModelService
from raymoe.engine.turns import captured_decode
from raymoe.errors import EngineStoppedError
from raymoe.experts.call import expert_id
from raymoe.experts.costs import Cost
from raymoe.experts.link import MemoryLink
from raymoe.model import fixed_cache
from raymoe.model.captured import CapturedDecode
from raymoe.model.fixed_cache import FixedCache
from raymoe.model.gpu_blocks import use_gpu_kernels
from raymoe.model.runner import Runner, SequenceState
from raymoe.model.sites import attach_sites
from raymoe.types import ExpertKey
from tests.local import local_service
from tests.replayed import ReplayRecorder
from tests.torch_kernels import TorchKernels
from tests.toy_models import PROMPT, Toys, reference_at, save_toy


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose heads are wide enough for the kernels."""
    path = tmp_path_factory.mktemp("wide")
    save_toy("qwen3_moe", path, head_dim=16, use_sliding_window=False, layer_types=None)
    return path


LAYERS, EXPERTS, TOP_K = 3, 8, 3
EXPERT_BYTES = 3 * 16 * 32 * 4


def captured(service: ModelService) -> ReplayRecorder:
    """Let a service on a CPU decode as one on a GPU does."""
    kernels, recorder = TorchKernels(), ReplayRecorder()
    assert isinstance(service.experts, ExpertScheduler)
    use_gpu_kernels(service.runner.model, kernels)
    sites = attach_sites(service.runner.model) if service.config.scheduling.substitutes else None
    if sites is not None:
        service.experts.attach([site.router for site in sites], {})
    service.runner.captured = captured_decode(
        service.runner, service.experts, service.checkpoint, sites, kernels, recorder=recorder, share=share
    )
    assert service.runner.captured is not None
    return recorder


def tokens_of(service: ModelService, prompt: list[int], count: int) -> list[int]:
    return [*service.generate(prompt, max_tokens=count, temperature=0.0, ignore_eos=True).token_ids]


def begin(runner: Runner) -> tuple[SequenceState, list[int]]:
    """A sequence that has read the prompt, and its first token."""
    logits, state = runner.prefill(PROMPT)
    return state, [int(logits.argmax())]


def go_on(runner: Runner, state: SequenceState, answer: list[int], count: int) -> None:
    """Decode until the answer has so many tokens."""
    while len(answer) < count:
        answer.append(int(runner.decode(state, answer[-1]).argmax()))


POLICIES: dict[str, dict[str, Any]] = {
    "on_demand": {"slot_memory": 4 * EXPERT_BYTES},
    "all_resident": {"slot_memory": LAYERS * EXPERTS * EXPERT_BYTES, "policy": "all_resident"},
    "importance, exact": {"slot_memory": 12 * EXPERT_BYTES, "policy": "importance", "alpha": 0.0},
}


@pytest.fixture(params=["in C++", "in Python"])
def first_moments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers rows that are all there."""
    if request.param == "in Python":
        monkeypatch.setattr(turns, "native_turns", lambda memories: None)


@pytest.mark.usefixtures("first_moments")
@pytest.mark.parametrize(
    ("policy", "model_type"),
    [*((policy, "wide") for policy in POLICIES), *(("on_demand", name) for name in ("deepseek_v3", "gpt_oss"))],
)
def test_captured_steps_give_the_tokens_of_transformers(policy: str, model_type: str, wide: Path, toys: Toys) -> None:
    path = wide if model_type == "wide" else toys(model_type)
    with local_service(path, **POLICIES[policy]) as service:
        if policy == "all_resident":
            service.experts.dispatcher.only_worker.load_all()
        recorder = captured(service)
        assert tokens_of(service, PROMPT, 4) == reference_at(path, PROMPT, 4)
        decode = service.runner.captured
        assert isinstance(decode, CapturedDecode)
        if model_type == "gpt_oss":
            assert decode.refused == "its cache has layers of type DynamicSlidingWindowLayer"
        else:
            assert decode.refused is None and recorder.captures == 1


def test_sequences_take_turns_in_the_fixed_cache(wide: Path) -> None:
    other = PROMPT[::-1]
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        runner = service.runner
        expected = {0: reference_at(wide, PROMPT, 4), 1: reference_at(wide, other, 4)}
        states, answers = [], []
        for prompt in (PROMPT, other):
            logits, state = runner.prefill(prompt)
            states.append(state)
            answers.append([int(logits.argmax())])
        for _ in range(3):
            for number, state in enumerate(states):
                answers[number].append(int(runner.decode(state, answers[number][-1]).argmax()))
        assert {0: answers[0], 1: answers[1]} == expected


def test_a_longer_sequence_is_captured_anew(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_cache, "LEAST_CAPACITY", 16)
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        recorder = captured(service)
        assert tokens_of(service, PROMPT, 7) == reference_at(wide, PROMPT, 7)
        assert recorder.captures == 2, "of capacity 16 for the first four tokens, then of 32"


def test_without_memory_for_a_longer_cache_decoding_goes_on_uncaptured(
    wide: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fixed_cache, "LEAST_CAPACITY", 16)
    take = FixedCache.take

    def bounded(self: FixedCache, cache: Any, length: int) -> None:
        if self.capacity > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        take(self, cache, length)

    monkeypatch.setattr(FixedCache, "take", bounded)
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        recorder = captured(service)
        assert tokens_of(service, PROMPT, 7) == reference_at(wide, PROMPT, 7)
        assert recorder.captures == 1 and service.report().shrunk == 0
    assert "uncaptured, kernel by kernel: no memory is left for a cache of 32 tokens" in caplog.text


def test_a_released_sequence_goes_on_uncaptured(wide: Path) -> None:
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        runner = service.runner
        logits, state = runner.prefill(PROMPT)
        answer = [int(logits.argmax())]
        for number in range(4):
            if number == 2:
                runner.captured.release(state)
                runner.captured = None
            answer.append(int(runner.decode(state, answer[-1]).argmax()))
        assert answer == reference_at(wide, PROMPT, 5)


@pytest.mark.usefixtures("first_moments")
def test_what_steps_cost_is_what_they_cost_uncaptured(wide: Path) -> None:
    costs = []
    for replayed in (True, False):
        with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
            if replayed:
                captured(service)
            result = service.generate(PROMPT, max_tokens=4, temperature=0.0, ignore_eos=True)
            costs.append(result.routing)
    assert (costs[0].hits, costs[0].misses, costs[0].loads) == (costs[1].hits, costs[1].misses, costs[1].loads)
    assert costs[0].misses > 0


@pytest.mark.usefixtures("first_moments")
def test_experts_are_substituted_in_captured_steps(wide: Path) -> None:
    settings = {"policy": "importance", "alpha": 0.5, "prefetch": "none", "host_assist": False}
    answers = []
    for replayed in (True, False):
        with local_service(wide, slot_memory=8 * EXPERT_BYTES, **settings) as service:
            if replayed:
                captured(service)
            result = service.generate(PROMPT, max_tokens=5, temperature=0.0, ignore_eos=True)
            answers.append((result.token_ids, result.routing.substituted, result.routing.hits))
    assert answers[0] == answers[1] and answers[0][1] > 0


def test_forecasts_of_the_device_are_those_of_the_gates(wide: Path) -> None:
    settings = {"policy": "importance", "alpha": 0.0, "prefetch": "gate", "host_assist": False}
    told: list[list[tuple[int, list[int]]]] = []
    for replayed in (True, False):
        with local_service(wide, slot_memory=8 * EXPERT_BYTES, **settings) as service:
            if replayed:
                captured(service)
            notes: list[tuple[int, list[int]]] = []
            told.append(notes)
            expect = service.experts.dispatcher.expect
            service.experts.dispatcher.expect = lambda layer, experts, worth, expect=expect, notes=notes: (
                notes.append((layer, experts.tolist())),
                expect(layer, experts, worth),
            )
            service.generate(PROMPT, max_tokens=4, temperature=0.0, ignore_eos=True)
    assert told[0] and told[0] == told[1][-len(told[0]) :]


@pytest.mark.usefixtures("first_moments")
@pytest.mark.parametrize("host_s", [1e-9, 10.0])
def test_the_host_computes_a_part_of_captured_steps_where_that_pays(wide: Path, host_s: float) -> None:
    settings = {"policy": "importance", "alpha": 0.0, "prefetch": "none", "host_assist": True}
    with local_service(wide, slot_memory=12 * EXPERT_BYTES, **settings) as service:
        worker = service.experts.dispatcher.only_worker
        for shelf in worker._shelves:
            shelf.host_cost = Cost(host_s)  # on a CPU there is no host beside the device, unless one is imitated
            shelf.load_cost = Cost(1.0)
            worker._note_host_cost = lambda *_: None
        captured(service)
        result = service.generate(PROMPT, max_tokens=6, temperature=0.0, ignore_eos=True)
        assert service.runner.captured.refused is None
    assert [*result.token_ids] == reference_at(wide, PROMPT, 6)
    assert result.routing.misses > 0 and (result.routing.hosted > 0) == (host_s < 1.0)


def test_what_leaves_the_shard_within_a_step_leaves_after_it(wide: Path) -> None:
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        worker = service.experts.dispatcher.only_worker
        staging = service.runner.captured._experts._staging
        staging.begin()
        worker.disown([ExpertKey(layer=0, expert=0)])
        assert expert_id(0, 0) in worker.store.experts
        staging.end()
        assert expert_id(0, 0) not in worker.store.experts


@pytest.mark.usefixtures("first_moments")
def test_a_step_whose_load_fails_ends_and_the_next_goes_on(wide: Path) -> None:
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        runner, loader = service.runner, service.experts.dispatcher.only_worker._loader
        state, answer = begin(runner)
        go_on(runner, state, answer, 2)
        link, loader._link = loader._link, BrokenLink()
        with pytest.raises(OSError, match="the bus is gone"):
            runner.decode(state, answer[-1])
        loader._link = link
        go_on(runner, state, answer, 5)
        assert runner.captured.refused is None
    assert answer == reference_at(wide, PROMPT, 5)


class BrokenLink(MemoryLink):
    """Moves nothing."""

    def pieces(self, source: ExpertTensors, target: ExpertTensors, nbytes: int) -> Iterator[None]:
        raise OSError("the bus is gone")
        yield


def test_a_device_that_does_not_go_on_is_noticed(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "DEVICE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(turns, "LOOKS", 1)
    monkeypatch.setattr(turns, "native_turns", lambda memories: None)
    heard = monkeypatch.context()
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service, heard as patched:
        captured(service)
        logits, state = service.runner.prefill(PROMPT)
        patched.setattr(Dialogue, "heard", lambda self: False)
        with pytest.raises(EngineStoppedError, match="the device did not go on with a step"):
            service.runner.decode(state, int(logits.argmax()))


def test_a_change_of_what_is_asked_for_is_captured(wide: Path) -> None:
    settings = {"policy": "importance", "alpha": 0.0, "host_assist": False}
    with local_service(wide, slot_memory=8 * EXPERT_BYTES, prefetch="none", **settings) as service:
        recorder = captured(service)
        runner, scheduler = service.runner, service.experts
        told: list[int] = []
        expect = scheduler.dispatcher.expect
        scheduler.dispatcher.expect = lambda layer, *args: (told.append(layer), expect(layer, *args))
        state, answer = begin(runner)
        told.clear()
        go_on(runner, state, answer, 3)
        assert recorder.captures == 1 and not told
        scheduler.reconfigure(service.config.scheduling.model_copy(update={"prefetch": "gate"}))
        go_on(runner, state, answer, 5)
        assert recorder.captures == 2 and told
        scheduler.reconfigure(service.config.scheduling)
        told.clear()
        go_on(runner, state, answer, 7)
        assert recorder.captures == 3 and not told
        assert answer == reference_at(wide, PROMPT, 7)


@pytest.mark.usefixtures("first_moments")
def test_turns_are_counted_anew_before_their_number_ends(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LAST_TURN", 2)
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        assert tokens_of(service, PROMPT, 7) == reference_at(wide, PROMPT, 7)
        assert service.runner.captured._experts._turn <= 2


def test_a_device_that_is_still_at_an_earlier_step_gets_no_other(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        runner = service.runner
        state, answer = begin(runner)
        go_on(runner, state, answer, 2)
        step = runner.captured._step
        with monkeypatch.context() as patched:
            patched.setattr(step, "is_done", lambda: False)
            with pytest.raises(EngineStoppedError, match="an earlier step"):
                runner.decode(state, answer[-1])
        go_on(runner, state, answer, 3)
        assert answer == reference_at(wide, PROMPT, 3)


@pytest.mark.usefixtures("first_moments")
def test_a_step_that_could_not_be_enqueued_leaves_host_and_device_in_step(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_service(wide, slot_memory=4 * EXPERT_BYTES) as service:
        captured(service)
        runner, worker = service.runner, service.experts.dispatcher.only_worker
        state, answer = begin(runner)
        go_on(runner, state, answer, 2)

        def full() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with monkeypatch.context() as patched:
            patched.setattr(runner.captured._step, "run", full)
            with pytest.raises(torch.OutOfMemoryError):
                runner.decode(state, answer[-1])
        assert not worker._in_hand
        go_on(runner, state, answer, 6)
        assert answer == reference_at(wide, PROMPT, 6)
