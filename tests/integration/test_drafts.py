"""A shadow's guesses read along: whatever they are, the tokens are those of plain decoding, in fewer passes.

Workers and the shadow are threads of this process behind real sockets; links are emulated where they are slow.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.service import ModelService
from raymoe.transport.shadow_messages import Draft
from tests.shadows import service_with_shadow
from tests.toy_models import PROMPT, reference_at, save_toy
from tests.waiting import WAIT_S

EMBEDDED_PROMPT = list(range(200, 210))
TOKENS = 40
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
WILD: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 1.0, "seed": 5, "ignore_eos": True}
DRAFTS: dict[str, Any] = {"bits": 8, "drafts": 4}
SLOW = {"bytes_per_s": 20_000_000}  # a load takes 10 ms, so that the shadow is ahead even on a busy machine
CUTTABLE = ["deepseek_v3", "gpt_oss", "mixtral", "lfm2_moe"]  # latent attention, windows, short convolutions
OTHERS = ["qwen3_next", "granitemoehybrid"]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates with the embedded model."""
    return reference_at(EMBEDDED_MODEL, EMBEDDED_PROMPT, TOKENS)


@pytest.fixture(scope="module")
def expected_wild() -> list[int]:
    """What this engine generates at temperature 1 with nothing that foretells anything."""
    with service_with_shadow(EMBEDDED_MODEL, predictor=None) as (service, _, _):
        return service.generate(EMBEDDED_PROMPT, **WILD).token_ids


def passes(service: ModelService) -> int:
    return service.report().steps


@pytest.mark.parametrize(("devices", "slots", "group_size"), [(4, 4, None), (4, 1, 2), (3, None, 1)])
def test_greedy_tokens_are_transformers_in_fewer_passes(
    devices: int, slots: int | None, group_size: int | None, expected: list[int]
) -> None:
    with service_with_shadow(
        EMBEDDED_MODEL, devices, slots, group_size=group_size, predictor=DRAFTS, link=SLOW if slots else None
    ) as (service, workers, host):
        result = service.generate(EMBEDDED_PROMPT, **GREEDY)
        assert host is not None and host.failure is None
        assert result.token_ids == expected
        assert service.report().drafts == "on"
        routing = result.routing
        assert routing.accepted <= routing.drafted
        assert slots is None or (routing.accepted > 5 and passes(service) < TOKENS - 5)
        assert all(worker.report().peak_slot_bytes <= (slots or 0) * 196_608 for worker in workers)


def test_sampled_tokens_are_those_without_drafts(expected_wild: list[int]) -> None:
    with service_with_shadow(EMBEDDED_MODEL, 4, 4, predictor=DRAFTS, link=SLOW) as (service, _, host):
        result = service.generate(EMBEDDED_PROMPT, **WILD)
        assert host is not None and host.failure is None
    assert result.token_ids == expected_wild
    assert result.routing.accepted > 5


@pytest.mark.parametrize("bits", [2, 16])
def test_a_worse_shadow_changes_the_time_and_not_the_tokens(bits: int, expected_wild: list[int]) -> None:
    with service_with_shadow(EMBEDDED_MODEL, 4, 4, predictor={"bits": bits, "drafts": 8}, link=SLOW) as (service, _, _):
        assert service.generate(EMBEDDED_PROMPT, **WILD).token_ids == expected_wild


@pytest.mark.parametrize("model_type", CUTTABLE)
def test_toys_whose_caches_can_be_cut(model_type: str, tmp_path: Path) -> None:
    path = save_toy(model_type, tmp_path / model_type)
    wanted = reference_at(path, PROMPT, TOKENS)
    with service_with_shadow(path, 3, 2, group_size=2, predictor=DRAFTS) as (service, _, host):
        assert service.generate(PROMPT, **GREEDY).token_ids == wanted
        assert service.generate(PROMPT[:3], **GREEDY).token_ids == reference_at(path, PROMPT[:3], TOKENS)
        assert service.report().drafts == "on"
        assert host is not None and host.failure is None


@pytest.mark.parametrize("model_type", OTHERS)
def test_toys_whose_caches_can_not_be_cut_run_without_and_say_so(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_toy(model_type, tmp_path / model_type)
    with service_with_shadow(path, 3, 2, group_size=2, predictor=DRAFTS) as (service, _, _):
        result = service.generate(PROMPT, **GREEDY)
        assert "can't be taken back" in service.report().drafts
    assert result.token_ids == reference_at(path, PROMPT, TOKENS)
    assert result.routing.drafted == 0
    assert caplog.text.count("the model reads no drafts along") == 1


LIES: dict[str, Any] = {
    "another token": lambda draft: replace(draft, token=draft.token ^ 1),
    "no token": lambda draft: replace(draft, token=0xFFFFFFFF),
    "another place": lambda draft: replace(draft, step=replace(draft.step, position=draft.step.position + 1)),
    "another epoch": lambda draft: replace(draft, epoch=draft.step.position % 3),
    "now and then a lie": lambda draft: replace(draft, token=draft.token ^ (draft.step.position % 3 == 0)),
}


@pytest.mark.parametrize("lie", LIES)
def test_drafts_that_lie_change_no_token(lie: str, expected: list[int]) -> None:
    with service_with_shadow(EMBEDDED_MODEL, 4, 2, predictor=DRAFTS, link=SLOW) as (service, _, host):
        assert host is not None
        send = host._server.send
        host._server.send = lambda told: send(  # type: ignore[method-assign]
            LIES[lie](told) if isinstance(told, Draft) else told
        )
        result = service.generate(EMBEDDED_PROMPT, **GREEDY)
        assert result.token_ids == expected
        assert host.failure is None
        assert lie not in ("another token", "no token") or result.routing.accepted == 0


def test_several_at_once_are_each_exact_and_leave_nothing_behind(expected: list[int], expected_wild: list[int]) -> None:
    results: dict[str, Any] = {}
    with service_with_shadow(EMBEDDED_MODEL, 4, 4, predictor=DRAFTS, link=SLOW) as (service, _, host):

        def generate(name: str, options: dict[str, Any]) -> None:
            results[name] = service.generate(EMBEDDED_PROMPT, **options).token_ids

        threads = [threading.Thread(target=generate, args=item) for item in (("greedy", GREEDY), ("wild", WILD))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        for number, _ in enumerate(service.stream(EMBEDDED_PROMPT, **GREEDY)):
            if number == 7:
                break
        assert host is not None and host.failure is None
        foresight: Any = service.experts.foresight
    assert results == {"greedy": expected, "wild": expected_wild}
    assert not foresight._followed and not foresight.book._needed
    assert not service._engine._drafting._sequences


def test_a_stop_string_within_a_pass_ends_the_answer_there() -> None:
    options = {**GREEDY, "max_tokens": TOKENS}
    with service_with_shadow(EMBEDDED_MODEL, predictor=None) as (service, _, _):
        text = service.generate("In the beginning", **options).text
        stop = text[len(text) // 2 :][:4]
        plain = service.generate("In the beginning", **options, stop=stop)
    with service_with_shadow(EMBEDDED_MODEL, 4, 4, predictor=DRAFTS, link=SLOW) as (service, _, _):
        drafted = service.generate("In the beginning", **options, stop=stop)
    assert (drafted.text, drafted.token_ids) == (plain.text, plain.token_ids)
    assert drafted.finish_reason == plain.finish_reason == "stop"
