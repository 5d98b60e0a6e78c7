"""An engine whose thread is stuck, and one that takes nothing new. A real model, no Ray."""

import queue
import threading
from collections.abc import Iterator

import pytest

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.engine.service import ModelService
from raymoe.errors import DrainingError, EngineStoppedError
from tests.local import local_service

PARAMS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
PATIENCE_S = 60.0


@pytest.fixture
def service() -> Iterator[ModelService]:
    with local_service(EMBEDDED_MODEL) as service:
        yield service


def test_everybody_hears_of_a_stuck_thread_without_its_help(service: ModelService) -> None:
    stuck, loose = threading.Event(), threading.Event()
    ends: list[queue.SimpleQueue[Chunk | BaseException]] = [queue.SimpleQueue(), queue.SimpleQueue()]

    def holds_it_up(item: Chunk | BaseException) -> None:
        ends[0].put(item)
        if not stuck.is_set():
            stuck.set()
            assert loose.wait(PATIENCE_S)

    service.submit([1, 2, 3], PARAMS, holds_it_up)
    assert stuck.wait(PATIENCE_S)
    service.submit([4, 5, 6], PARAMS, ends[1].put)
    service.give_up(EngineStoppedError("stuck"))
    assert isinstance(ends[0].get(timeout=PATIENCE_S), Chunk)
    for end in ends:
        assert str(end.get(timeout=PATIENCE_S)) == "stuck"
    with pytest.raises(EngineStoppedError, match="has failed: stuck"):
        service.submit([7], PARAMS, print)
    loose.set()
    service.close()
    assert str(service.failure) == "stuck"


def test_a_thread_that_works_or_waits_for_work_is_not_stalled(service: ModelService) -> None:
    service.generate([1, 2, 3], max_tokens=4)
    clock = service._engine._clock
    service._engine._clock = lambda: clock() + 100.0
    beat_s = service.stalled_s
    assert 99.0 < beat_s < 101.0, "it looks for work twice a second"


def test_draining_refuses_what_is_new_and_finishes_what_is_not(service: ModelService) -> None:
    stream = service.stream([1, 2, 3], max_tokens=20, ignore_eos=True)
    first = next(stream)
    service.drain()
    with pytest.raises(DrainingError, match="takes no new requests"):
        service.submit([4], PARAMS, print)
    tokens = [*first.token_ids, *(token for chunk in stream for token in chunk.token_ids)]
    assert len(tokens) == 20
    assert service.failure is None
