"""A short slice of ``make soak``: requests of every kind at once, and nothing is left of them."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from raymoe.benching import Plan, load, summary
from raymoe.config import ClusterConfig
from raymoe.serve.app import build_application
from tests.soak import SERVED, Soak, check, stats_of, what_is_left

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(ClusterConfig.model_validate(SERVED)), name="raymoe")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def test_good_answers_are_right_and_nothing_is_left(url: str) -> None:
    before = stats_of(url)
    soak = Soak(url, ClusterConfig.model_validate(SERVED).model.served_name, seed=7)
    asyncio.run(soak.play(40, seconds=2.0, at_once=16))
    assert what_is_left(url, before) == []
    assert check(soak.tally) == []
    assert len(soak.tally.answers) >= 15 and len(soak.tally.kinds) >= 5


def test_an_open_loop_load_is_answered(url: str) -> None:
    """What ``raymoe bench serve`` does."""
    plan = Plan(rate=20.0, concurrency=8, requests=12, prompt_tokens=20, max_tokens=6, seed=1)
    outcomes, took_s = asyncio.run(load(url, plan, None, None))
    found = summary(outcomes, took_s, ttft_s=60.0, tpot_s=60.0)
    answered = [outcome for outcome in outcomes if outcome.error is None]
    assert found["good"] == found["answered"] == len(answered) >= 8
    assert all("shed by the client" in error for error in found["errors"]), found["errors"]
    assert all(1 <= outcome.tokens <= 6 and outcome.ttft_s <= outcome.total_s for outcome in answered)
