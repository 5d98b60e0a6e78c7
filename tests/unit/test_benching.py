"""The load of ``raymoe bench serve``, against a server in this process."""

import asyncio
import itertools
import json
import random

import httpx
import pytest

from raymoe.benching import Outcome, Plan, answer, message_of, percentiles, rows_of, summary

PLAN = Plan(rate=4.0, concurrency=2, requests=400, prompt_tokens=10, max_tokens=8, seed=3)


def test_arrivals_are_random_and_the_same_again() -> None:
    arrivals = PLAN.arrivals()
    assert arrivals == PLAN.arrivals() != Plan(**{**_fields(PLAN), "seed": 4}).arrivals()
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / PLAN.rate, rel=0.15)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.2), "as far as its mean: a Poisson process"
    assert {len(prompt) for _, prompt, _ in arrivals} == set(range(5, 11))
    assert {tokens for *_, tokens in arrivals} == set(range(4, 9))


def _fields(plan: Plan) -> dict[str, float]:
    return {name: getattr(plan, name) for name in plan.__slots__}


def test_goodput_counts_what_was_fast_enough() -> None:
    outcomes = [
        Outcome(ttft_s=0.1, total_s=1.0, tokens=10),
        Outcome(ttft_s=0.1, total_s=1.9, tokens=10),
        Outcome(ttft_s=0.6, total_s=1.5, tokens=10),
        Outcome(ttft_s=0.2, total_s=0.2, tokens=1),
        Outcome(error="503: busy"),
    ]
    found = summary(outcomes, 2.0, ttft_s=0.5, tpot_s=0.15)
    assert (found["answered"], found["good"], found["goodput_per_s"]) == (4, 2, 1.0)
    assert found["tokens_per_s"] == 15.5 and found["errors"] == {"503: busy": 1}
    assert found["tpot_ms"]["p50"] == pytest.approx(100.0)
    assert ("1 x", "503: busy") in rows_of(found)


def test_percentiles_of_few_values() -> None:
    assert percentiles([]) == {}
    assert percentiles([0.25]) == {"p50": 250.0, "p90": 250.0, "p99": 250.0}
    draw = random.Random(1)
    values = [draw.random() for _ in range(1000)]
    found = percentiles(values)
    assert found["p50"] < found["p90"] < found["p99"] <= 1e3 * max(values)


def answered(*events: object, status: int = 200) -> Outcome:
    """What is made of a server's events."""
    content = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
        return httpx.Response(status, text=content if status == 200 else json.dumps(events[0]))

    async def ask() -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://test") as client:
            return await answer(client, {"model": "m", "prompt": [1]}, 0.0)

    return asyncio.run(ask())


def test_a_stream_becomes_times_and_tokens() -> None:
    outcome = answered(
        {"choices": [{"text": ""}]},
        {"choices": [{"text": "a"}]},
        {"choices": [{"text": "b", "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    )
    assert outcome.error is None and outcome.tokens == 2 and len(outcome.events_s) == 2
    assert 0 < outcome.ttft_s <= outcome.total_s


def test_errors_are_told_in_the_servers_words() -> None:
    assert answered({"error": {"message": "busy"}}, status=503).error == "503: busy"
    assert answered({"choices": [{"text": "a"}]}, {"error": {"message": "lost"}}).error == "lost"
    assert answered({"choices": []}).error == "the stream ended without an answer"
    assert message_of(b"<html>", 502) == "502: <html>"
