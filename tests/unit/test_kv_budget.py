"""The engine within a budget for caches: it waits, refuses and sheds, and never takes more."""

import random

import pytest

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.request import Chunk
from raymoe.errors import OverloadedError, RequestError
from raymoe.model.kv_size import measure_kv
from tests.local import local_service
from tests.unit.test_rows import check_by_transformers, stepped, submit

TOKEN_BYTES = 8192  # of the embedded model in float32: 8 layers, keys and values of 4 heads of 32
BLOCK = 64 * TOKEN_BYTES


def test_requests_wait_for_memory_and_the_budget_holds() -> None:
    draw = random.Random(4)
    with local_service(EMBEDDED_MODEL, trunk={"kv_memory": 6 * BLOCK, "prefix_memory": 2 * BLOCK}) as service:
        engine = stepped(service)._engine
        asked = []
        for _ in range(12):
            prompt = [draw.randrange(20, 2000) for _ in range(draw.randrange(1, 100))]
            asked.append((prompt, submit(service, prompt, max_tokens=draw.randrange(1, 60))))
        most = 0
        while engine.step():
            report = engine.report()
            assert report.kv_bytes <= report.kv_set_aside_bytes
            assert report.kv_set_aside_bytes + report.prefix_bytes <= 6 * BLOCK
            assert report.prefix_bytes <= 2 * BLOCK
            most = max(most, report.running)
            if draw.random() < 0.05:
                engine.cancel(draw.choice([*engine._roster.running, *engine._roster.waiting]).id)
        report = engine.report()
        assert (report.running, report.waiting, report.kv_bytes, report.kv_set_aside_bytes) == (0, 0, 0, 0)
        assert 2 <= most < 12 and report.admitted <= 12 and report.failed == 0
    for prompt, answer in asked:
        assert isinstance(answer.last, Chunk)
        if answer.tokens:
            assert check_by_transformers(EMBEDDED_MODEL, prompt, answer.tokens) == []


def test_what_can_never_fit_is_refused_at_once() -> None:
    with local_service(EMBEDDED_MODEL, trunk={"kv_memory": 2 * BLOCK}) as service:
        stepped(service)
        with pytest.raises(RequestError, match="100 prompt and 60 new tokens need 1,572,864 bytes of cache") as refused:
            submit(service, list(range(100, 200)), max_tokens=60)
        assert "raise trunk.kv_memory" in str(refused.value) and refused.value.param == "max_tokens"


def test_who_names_no_number_of_tokens_gets_what_fits() -> None:
    with local_service(EMBEDDED_MODEL, trunk={"kv_memory": 2 * BLOCK}) as service:
        engine = stepped(service)._engine
        answer = submit(service, list(range(100, 200)), max_tokens=None)
        while engine.step():
            pass
    assert isinstance(answer.last, Chunk) and answer.last.finish_reason == "length" and len(answer.tokens) == 28


def test_a_full_queue_sheds_and_a_cancelled_place_is_free_again() -> None:
    with local_service(EMBEDDED_MODEL, trunk={"max_running": 1, "max_waiting": 1}) as service:
        engine = stepped(service)._engine
        submit(service, [40], max_tokens=5)
        engine.step()
        waiting = submit(service, [41], max_tokens=5)
        with pytest.raises(OverloadedError, match="1 requests are waiting already"):
            submit(service, [42], max_tokens=5)
        engine.cancel(next(iter(engine._roster.waiting)).id)
        engine.step()
        assert isinstance(waiting.last, Chunk) and waiting.last.finish_reason == "cancelled"
        submit(service, [42], max_tokens=5)
        while engine.step():
            pass
        assert engine.report().finished == 3


def test_the_more_urgent_is_served_first() -> None:
    with local_service(EMBEDDED_MODEL, trunk={"max_running": 1}) as service:
        engine = stepped(service)._engine
        order: list[str] = []
        answers = {}
        for name, priority in (("first", 0), ("later", 5), ("urgent", -1)):
            answers[name] = submit(service, [40, 41], max_tokens=2, priority=priority)
        while engine.step():
            order += [name for name, answer in answers.items() if answer.last is not None and name not in order]
        order += [name for name in answers if name not in order]
        assert order == ["urgent", "first", "later"]
        with pytest.raises(RequestError, match=r"priority is 2000, allowed is -1000 \(first\) to 1000 \(last\)"):
            submit(service, [40], priority=2000)


def test_a_token_takes_what_was_measured() -> None:
    with local_service(EMBEDDED_MODEL) as service:
        assert measure_kv(stepped(service).runner).at(65) == 2 * BLOCK
