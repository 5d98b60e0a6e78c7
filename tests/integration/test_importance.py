"""Scheduling by importance on devices of the engine's own process, behind sockets, and as Ray actors.

What it may change is bounded: quality "exact" is the router's own choice, whatever the slots hold.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

import raymoe
from raymoe.actors.names import NAMESPACE, placement_name, worker_name
from raymoe.actors.session import Session, cluster_status
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.request import Result
from raymoe.engine.service import ModelService
from raymoe.errors import ConfigError, ExpertUnavailableError, RequestError
from raymoe.launcher import Moe
from raymoe.observe.stats import EngineStats
from tests.batches import answered_together
from tests.toy_models import reference_at
from tests.waiting import until
from tests.workers import service_over_sockets

ONE_EXPERT = 196_608  # bytes in float32
TOP_K, LAYERS = 4, 8
FEW_SLOTS = 2 * TOP_K * LAYERS * ONE_EXPERT
PROMPT = list(range(200, 216))
TOKENS = 24
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
IMPORTANCE = {"policy": "importance", "alpha": 0.5}


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates on its own."""
    return reference_at(EMBEDDED_MODEL, PROMPT, TOKENS)


def engine_of(moe: Moe) -> EngineStats:
    engine = moe.stats().engine
    assert engine is not None
    return engine


def check_costs(result: Result, *, substitutes: bool) -> None:
    """Every pair of the answer is accounted for, and its substitutions are as expected."""
    routing = result.routing
    passes = len(PROMPT) + TOKENS - 1
    assert routing.decisions == passes * LAYERS
    assert routing.hits + routing.misses == passes * LAYERS * TOP_K
    assert (routing.substituted > 0) == substitutes == (routing.substituted_gate_mass > 0)
    assert routing.substituted_gate_mass < 0.5


# --- in the engine's process ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[Moe]:
    """One device with slots of twice the top-k, in this process."""
    config = {
        "model": {"dtype": "float32"},
        "devices": [{"name": "edge", "transport": "local", "slot_memory": FEW_SLOTS}],
        "scheduling": IMPORTANCE,
    }
    with Moe(Session(ClusterConfig.parse(config), "importance"), owns_ray=False) as moe:
        yield moe


def test_exact_is_transformers_own_and_alpha_saves_loads(local: Moe, expected: list[int]) -> None:
    exact = local.generate(PROMPT, quality="exact", **GREEDY)
    free = local.generate(PROMPT, **GREEDY)
    assert exact.token_ids == expected
    check_costs(exact, substitutes=False)
    check_costs(free, substitutes=True)
    assert free.routing.hit_rate > exact.routing.hit_rate


def test_requests_of_one_batch_keep_their_own_alpha(local: Moe, expected: list[int]) -> None:
    answers = answered_together(local, PROMPT, ("exact", 0.5), **GREEDY)
    tokens, exact = answers["exact"]
    _, free = answers[0.5]
    assert tokens == expected
    assert exact.substituted == 0 < free.substituted


def test_a_wrong_quality_is_refused_with_what_is_allowed(local: Moe) -> None:
    with pytest.raises(RequestError, match=r"quality is 0\.7; allowed are .* from 0 to 0\.5") as caught:
        local.generate(PROMPT, quality=0.7, max_tokens=1)
    assert caught.value.param == "quality"


def test_settings_change_while_it_runs(local: Moe, expected: list[int]) -> None:
    assert engine_of(local).alpha == 0.5
    local.reconfigure(alpha=0.0, prefetch="none", eviction="lru", score_window=3)
    try:
        before = local.stats().devices["edge"]
        assert engine_of(local).alpha == 0.0
        result = local.generate(PROMPT, **GREEDY)
        assert result.token_ids == expected
        check_costs(result, substitutes=False)
        assert local.stats().devices["edge"].prefetches == before.prefetches
    finally:
        local.reconfigure(alpha=0.5, prefetch="gate", eviction="score", score_window=64)
    check_costs(local.generate(PROMPT, **GREEDY), substitutes=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1}, "alpha: is -1; allowed is 0 to 1"),
        ({"alpha": 0.1, "score_window": 0}, "score_window: is 0; allowed is 1 to 1024"),
        ({"policy": "on_demand"}, "policy can't be changed while the model runs"),
        ({"alfa": 0.1}, "alfa: no such field"),
    ],
)
def test_wrong_changes_change_nothing(local: Moe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local.reconfigure(**changes)
    assert engine_of(local).alpha == 0.5


def test_settings_that_the_placement_actor_does_not_take_change_nothing(
    local: Moe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_reference: Any, timeout: float) -> None:
        raise GetTimeoutError(f"nothing within {timeout:g} s")

    placement = SimpleNamespace(reconfigure=SimpleNamespace(remote=lambda settings: None))
    with monkeypatch.context() as patch:
        patch.setattr(local._session, "_placement", placement)
        patch.setattr("raymoe.actors.session.ray.get", silent)
        with pytest.raises(ExpertUnavailableError, match="did not take the new settings, nothing was changed"):
            local.reconfigure(alpha=0.1)
    assert (engine_of(local).alpha, local._session.scheduling.alpha) == (0.5, 0.5)


def test_a_time_budget_moves_alpha_and_shows_it(local: Moe) -> None:
    local.reconfigure(tpot_budget_s=1e-6, alpha=0.1)  # out of reach: alpha only rises
    try:
        local.generate(PROMPT, max_tokens=100, temperature=0.0, ignore_eos=True)
        assert 0.1 < engine_of(local).alpha <= 0.5
    finally:
        local.reconfigure(tpot_budget_s=None, alpha=0.5)


# --- behind sockets -------------------------------------------------------------------------------------


def answer_of(service: ModelService, quality: Any) -> Result:
    return service.generate(PROMPT, quality=quality, **GREEDY)


@pytest.mark.parametrize("spread", [1, 2])
def test_workers_elsewhere_are_scheduled_alike(spread: int, expected: list[int]) -> None:
    with service_over_sockets(Path(EMBEDDED_MODEL), 2, FEW_SLOTS // 2, spread, IMPORTANCE) as (service, workers):
        exact, free = answer_of(service, "exact"), answer_of(service, "fast")
        assert exact.token_ids == expected
        check_costs(exact, substitutes=False)
        check_costs(free, substitutes=True)
        reports = [worker.report() for worker in workers]
    assert all(report.prefetches > 0 for report in reports)
    assert all(report.peak_slot_bytes <= FEW_SLOTS // 2 for report in reports)


def test_the_engine_knows_what_its_workers_hold_and_how_long_they_load() -> None:
    with service_over_sockets(Path(EMBEDDED_MODEL), 2, FEW_SLOTS // 2, 1, IMPORTANCE | {"prefetch": "none"}) as made:
        service, workers = made
        answer_of(service, "fast")
        known = [service.experts.dispatcher.available(layer) for layer in range(LAYERS)]
        held = [workers[0].ready(layer) | workers[1].ready(layer) for layer in range(LAYERS)]
        assert [row.tolist() for row in known] == [row.tolist() for row in held]
        load_s = service.experts.dispatcher.load_s()
        assert load_s is not None and 0 < load_s < 1


# --- as Ray actors --------------------------------------------------------------------------------------

SMALL = {
    "model": {"dtype": "float32"},
    "devices": [
        {"name": "box-0", "slot_memory": FEW_SLOTS // 2},
        {"name": "box-1", "slot_memory": FEW_SLOTS // 2},
    ],
    "scheduling": IMPORTANCE,
}


@pytest.fixture(scope="module")
def remote(ray_session: None) -> Iterator[Moe]:
    """Two workers in processes of their own, with a placement actor."""
    with raymoe.launch(SMALL, app="boxes") as moe:
        yield moe


def worker_alphas() -> list[float]:
    """What the workers themselves say is in force."""
    handles = [ray.get_actor(worker_name("boxes", device), NAMESPACE) for device in ("box-0", "box-1")]
    return [info.scheduling.alpha for info in ray.get([handle.describe.remote() for handle in handles])]


@pytest.mark.integration
def test_exact_answers_of_actors_are_transformers_own(remote: Moe, expected: list[int]) -> None:
    exact = remote.generate(PROMPT, quality="exact", **GREEDY)
    assert exact.token_ids == expected
    check_costs(exact, substitutes=False)


@pytest.mark.integration
def test_actors_prefetch_what_the_placement_actor_orders(remote: Moe) -> None:
    before = {name: device.prefetches for name, device in remote.stats().devices.items()}
    check_costs(remote.generate(PROMPT, **GREEDY), substitutes=True)
    after = {name: device.prefetches for name, device in remote.stats().devices.items()}
    assert all(after[name] > before[name] for name in before)


@pytest.mark.integration
def test_settings_reach_the_workers(remote: Moe, expected: list[int]) -> None:
    pids = {name: device.pid for name, device in remote.stats().devices.items()}
    remote.reconfigure(alpha=0.0)
    assert (engine_of(remote).alpha, worker_alphas()) == (0.0, [0.0, 0.0])
    assert remote.generate(PROMPT, **GREEDY).token_ids == expected
    with pytest.raises(ConfigError, match="alpha: is 2; allowed is 0 to 1"):
        remote.reconfigure(alpha=2)
    assert worker_alphas() == [0.0, 0.0]
    remote.reconfigure(alpha=0.5)
    assert {name: device.pid for name, device in remote.stats().devices.items()} == pids


@pytest.mark.integration
def test_status_tells_what_the_engine_tells(remote: Moe) -> None:
    remote.generate(PROMPT, **GREEDY)
    tokens = engine_of(remote).completion_tokens

    def told() -> bool:
        engine = cluster_status("boxes").engine
        return engine is not None and engine.completion_tokens == tokens

    until(told, "the engine's counts at the placement actor")
    engine = cluster_status("boxes").engine
    assert engine is not None and (engine.alpha, engine.substituted > 0) == (0.5, True)


@pytest.mark.integration
def test_a_second_engine_finds_settings_and_residency(remote: Moe, expected: list[int]) -> None:
    remote.reconfigure(alpha=0.4)
    remote.generate(PROMPT, **GREEDY)
    pids = {name: device.pid for name, device in remote.stats().devices.items()}
    with raymoe.launch(SMALL, app="boxes") as second:
        assert {name: device.pid for name, device in second.stats().devices.items()} == pids
        assert engine_of(second).alpha == 0.4
        available = second.service.experts.dispatcher.available
        assert sum(int(available(layer).sum()) for layer in range(LAYERS)) == 2 * TOP_K * LAYERS
        assert second.generate(PROMPT, quality="exact", **GREEDY).token_ids == expected
    remote.reconfigure(alpha=0.5)


@pytest.mark.integration
def test_a_restarted_placement_actor_gets_settings_and_forecasts_again(remote: Moe) -> None:
    remote.reconfigure(alpha=0.3)
    ray.kill(ray.get_actor(placement_name("boxes"), NAMESPACE), no_restart=False)

    def prefetches() -> int:
        return sum(device.prefetches for device in cluster_status("boxes").devices.values())

    def ordered() -> bool:
        before = prefetches()
        remote.generate(PROMPT, **GREEDY)
        return prefetches() > before

    until_answers(prefetches)
    until(ordered, "a prefetch after the restart")
    assert worker_alphas() == [0.3, 0.3]
    with raymoe.launch(SMALL, app="boxes") as second:
        assert engine_of(second).alpha == 0.3


def until_answers(ask: Callable[[], Any]) -> None:
    """Wait until the placement actor answers again."""

    def answers() -> bool:
        try:
            ask()
            return True
        except raymoe.errors.StartError:
            return False

    until(answers, "an answer of the placement actor")
