"""No memory left on the trunk's device: kept caches go, the work is done once more; then one request fails, not all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.service import ModelService
from raymoe.errors import CapacityError
from tests.local import local_service
from tests.toy_models import PROMPT, reference_at

TOKENS = 8
OTHER = [token + 1 for token in PROMPT]


@pytest.fixture(scope="module")
def path() -> Path:
    """The toys' windows let no caches be kept."""
    return EMBEDDED_MODEL


class Failing:
    """Stands before a method of the runner, and has no memory at the calls that were named."""

    def __init__(self, method: Callable[..., Any], calls: set[int]) -> None:
        self.method, self.calls, self.count = method, calls, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of …")
        return self.method(*arguments, **options)


def without_memory(service: ModelService, monkeypatch: pytest.MonkeyPatch, method: str, *calls: int) -> Failing:
    failing = Failing(getattr(service.runner, method), set(calls))
    monkeypatch.setattr(service.runner, method, failing)
    return failing


def answer(service: ModelService, prompt: list[int]) -> list[int]:
    return service.generate(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True).token_ids


@pytest.mark.parametrize("max_running", [1, 4])
@pytest.mark.parametrize(("method", "call"), [("prefill", 1), ("decode", 1), ("decode", 4)])
def test_one_refusal_costs_kept_caches_and_no_token(
    path: Path, monkeypatch: pytest.MonkeyPatch, max_running: int, method: str, call: int
) -> None:
    with local_service(path, trunk={"max_running": max_running}) as service:
        answer(service, OTHER)
        assert service.report().prefixes == 1
        without_memory(service, monkeypatch, method, call)
        assert answer(service, PROMPT) == reference_at(path, PROMPT, TOKENS)
        assert (service.report().shrunk, service.report().failed) == (1, 0)
        assert answer(service, PROMPT) == reference_at(path, PROMPT, TOKENS)


def test_a_request_without_memory_fails_and_the_next_is_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_service(path) as service:
        without_memory(service, monkeypatch, "prefill", 1, 2, 3)
        with pytest.raises(CapacityError, match=r"'s device \(cpu\) has no memory left for this request.*2\.00"):
            answer(service, PROMPT)
        monkeypatch.undo()
        assert answer(service, PROMPT) == reference_at(path, PROMPT, TOKENS)
        report = service.report()
        assert report.failed == 1 and report.shrunk >= 1 and report.kv_set_aside_bytes == 0


def test_a_step_of_several_without_memory_goes_on_one_by_one_and_then_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_service(path, trunk={"max_running": 4}) as service:
        assert service.runner.joins
        failing = without_memory(service, monkeypatch, "read_together", 3)
        streams = [
            service.stream(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True) for prompt in (PROMPT, OTHER)
        ]
        firsts = [next(stream) for stream in streams]
        rest = [[first, *stream] for first, stream in zip(firsts, streams, strict=True)]
        for prompt, chunks in zip((PROMPT, OTHER), rest, strict=True):
            assert [token for chunk in chunks for token in chunk.token_ids] == reference_at(path, prompt, TOKENS)
        assert service.runner.joins, "a shortage says nothing about rows"
        assert failing.count > 0
