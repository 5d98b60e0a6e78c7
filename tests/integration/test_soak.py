"""A short slice of ``make soak``: requests of every kind at once, and nothing is left of them."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import ray
from ray import serve

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
