"""The shadow as a Ray actor: it is started with the workers, may fail, die and come back, and never stops an answer."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

import raymoe
from raymoe.actors.names import NAMESPACE, shadow_name
from raymoe.actors.session import cluster_status
from raymoe.config import EMBEDDED_MODEL
from raymoe.launcher import Moe
from raymoe.observe import terminal
from raymoe.observe.stats import PredictorStats
from tests.toy_models import reference_at
from tests.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ONE_EXPERT = 196_608  # bytes in float32
TOP_K, LAYERS = 4, 8
PROMPT = list(range(200, 216))
TOKENS, LONG = 32, 400
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
LINK = {"bytes_per_s": 40_000_000}  # a load takes 5 ms, so that a shadow on a busy machine keeps up


def cluster(predictor: dict[str, Any] | None, devices: int = 4, transport: str = "zmq") -> dict[str, Any]:
    return {
        "model": {"dtype": "float32"},
        "devices": [
            {"name": f"d{i}", "transport": transport, "slot_memory": 2 * ONE_EXPERT, "link": LINK}
            for i in range(devices)
        ],
        "scheduling": {"policy": "on_demand_shadow"},
        "predictor": predictor,
    }


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates on its own."""
    return reference_at(EMBEDDED_MODEL, PROMPT, LONG)


@pytest.fixture(scope="module")
def shadowed(ray_session: None) -> Iterator[Moe]:
    """Four workers and a shadow, each a process."""
    with raymoe.launch(cluster({"bits": 8}), app="shadowed") as moe:
        yield moe


def predictor_of(moe: Moe) -> PredictorStats:
    predictor = moe.stats().predictor
    assert predictor is not None
    return predictor


def recall_of(moe: Moe, expected: list[int], **options: Any) -> float:
    """Of an answer that is exact."""
    result = moe.generate(PROMPT, max_tokens=TOKENS, **GREEDY, **options)
    assert result.token_ids == expected[:TOKENS]
    assert result.routing.recall is not None
    return result.routing.recall


def becomes_right(moe: Moe, expected: list[int], **options: Any) -> None:
    """Nearly all is named in time, once the shadow gets its share of a busy machine; every answer is exact."""
    until(lambda: recall_of(moe, expected, **options) > 0.9, "the shadow names nearly all in time")


def test_the_shadow_foretells_what_is_loaded(shadowed: Moe, expected: list[int]) -> None:
    def counted() -> bool:  # an answer that is over before a late shadow is through leaves fewer steps: ask again
        in_time = recall_of(shadowed, expected) > 0.9 and predictor_of(shadowed).steps >= TOKENS - 1
        engine = shadowed.stats().engine
        return in_time and engine is not None and (engine.recall or 0.0) > 0.9

    until(counted, "nearly all is named in time, and counted")
    stats = shadowed.stats()
    predictor = predictor_of(shadowed)
    assert (predictor.kind, predictor.state, predictor.reason) == ("shadow", "healthy", None)
    assert 0 < predictor.nbytes < sum(device.owned for device in stats.devices.values()) * ONE_EXPERT
    assert 0.9 * predictor.guesses < predictor.right <= predictor.guesses
    assert predictor.pid not in (os.getpid(), *(device.pid for device in stats.devices.values()))
    assert all(0 < device.peak_slot_bytes <= 2 * ONE_EXPERT for device in stats.devices.values())
    assert sum(device.prefetches for device in stats.devices.values()) > 0
    assert stats.engine is not None and stats.engine.recall is not None and stats.engine.recall > 0.9


def test_status_shows_the_predictor(shadowed: Moe, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_status(cluster_status("shadowed"))
    assert "Predictor: shadow, healthy" in capsys.readouterr().out


def test_a_shadow_that_is_killed_comes_back_and_no_answer_stops(shadowed: Moe, expected: list[int]) -> None:
    before = predictor_of(shadowed)
    tokens: list[int] = []
    states: set[str] = set()
    for chunk in shadowed.stream(PROMPT, max_tokens=LONG, **GREEDY):
        tokens += chunk.token_ids
        if len(tokens) == TOKENS:
            os.kill(before.pid, signal.SIGKILL)
        if len(tokens) > TOKENS and "down" not in states:
            states.add(predictor_of(shadowed).state)
    assert tokens == expected
    assert "down" in states
    assert chunk.routing is not None and chunk.routing.recall is not None and chunk.routing.recall < 1.0
    until(lambda: predictor_of(shadowed).state == "healthy", "the shadow comes back")
    after = predictor_of(shadowed)
    assert after.pid != before.pid and after.reason is None
    becomes_right(shadowed, expected)


def test_a_shadow_that_failed_is_started_again(shadowed: Moe, expected: list[int]) -> None:
    until(lambda: predictor_of(shadowed).state == "healthy", "the shadow is well")
    before = predictor_of(shadowed)

    def break_it(shell: Any) -> None:
        def fail() -> None:
            raise ArithmeticError("a fault of the shadow")

        shell._host.shadow.step = fail

    handle = ray.get_actor(shadow_name("shadowed"), NAMESPACE)
    ray.get(handle.__ray_call__.remote(break_it))
    assert shadowed.generate(PROMPT, max_tokens=TOKENS, **GREEDY).token_ids == expected[:TOKENS]
    until(lambda: predictor_of(shadowed).pid not in (0, before.pid), "another life of the shadow")
    becomes_right(shadowed, expected)


def test_a_shadow_that_can_not_start_says_why_and_the_model_answers(
    expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with raymoe.launch(cluster({"device": "cuda:7"}, devices=2), app="lightless") as moe:
        assert recall_of(moe, expected) == 0.0
        predictor = predictor_of(moe)
        assert predictor.state == "down" and predictor.pid == 0
        assert predictor.reason is not None and "cuda:7" in predictor.reason and "\n" not in predictor.reason
        terminal.show_status(moe.stats())
        shown = " ".join(capsys.readouterr().out.split())
        assert "Predictor: shadow, down" in shown and "cuda:7" in shown


def test_devices_of_this_process_have_a_shadow_too(expected: list[int]) -> None:
    with raymoe.launch(cluster({"bits": 8}, devices=2, transport="local"), app="homely") as moe:
        becomes_right(moe, expected)
        stats = moe.stats()
    assert {device.pid for device in stats.devices.values()} == {os.getpid()}
    assert stats.predictor is not None and stats.predictor.state == "healthy" != stats.predictor.pid


def test_status_names_a_predictor_that_is_no_process(expected: list[int]) -> None:
    with raymoe.launch(cluster({"kind": "history"}, devices=2), app="bookish") as moe:
        assert recall_of(moe, expected) > 0.2
        predictor = cluster_status("bookish").predictor
        assert predictor is not None and (predictor.kind, predictor.state) == ("history", "healthy")


def test_leaving_ends_the_shadow_with_the_workers(ray_session: None) -> None:
    with raymoe.launch(cluster({"bits": 8}, devices=1), app="leaving") as moe:
        assert predictor_of(moe).state == "healthy"

    def names() -> list[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and "leaving" in actor["name"]]

    until(lambda: not names(), "the actors end")


def test_under_policy_joint_the_engine_orders_what_the_shadow_foretells(expected: list[int]) -> None:
    config = cluster({"bits": 8})
    config["scheduling"] = {"policy": "joint", "alpha": 0.5}
    for device in config["devices"]:
        device["slot_memory"] = 8 * ONE_EXPERT
    with raymoe.launch(config, app="joint") as moe:
        becomes_right(moe, expected, quality="exact")
        exact = moe.generate(PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
        free = moe.generate(PROMPT, max_tokens=TOKENS, **GREEDY)
        stats = moe.stats()
    assert exact.token_ids == expected[:TOKENS] and exact.routing.substituted == 0 < free.routing.substituted
    assert sum(device.prefetches for device in stats.devices.values()) > 0
    assert all(device.peak_slot_bytes <= 8 * ONE_EXPERT for device in stats.devices.values())
