"""Scheduling without a cache: whatever foretells routing, rightly, wrongly or no more, the tokens are transformers'.

Workers and the shadow are threads of this process behind real sockets here; as Ray actors they are in
test_shadow_cluster.py.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from predictor.forecast import LayerForecast
from raymoe.actors.session import Session
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.experts.worker import ExpertWorker
from raymoe.launcher import Moe
from raymoe.transport.shadow import ShadowClient
from tests.shadows import Lie, service_with_shadow
from tests.toy_models import PROMPT, Toys, reference_at
from tests.waiting import WAIT_S, until

NEW_TOKENS = 12
EMBEDDED_PROMPT = list(range(200, 210))
SHORT, LONG = 16, 32
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
ONE_EXPERT = 196_608  # bytes in float32, of the embedded model
TOP_K, LAYERS, EXPERTS = 4, 8, 32

TOYS = ["gpt_oss", "deepseek_v3", "qwen3_next", "mixtral", "minimax", "lfm2_moe", "granitemoe"]
PREDICTORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "shadow-16": {"kind": "shadow", "bits": 16},
    "shadow-8": {"kind": "shadow", "bits": 8},
    "shadow-4": {"kind": "shadow", "bits": 4, "kv_align_every": 4},
    "shadow-2": {"kind": "shadow", "bits": 2, "token_align_every": 4, "run_ahead": False},
    "gate": {"kind": "gate"},
    "history": {"kind": "history"},
    "shadow-light": {"preset": "light", "top_k": 1, "skip_layers": 1},
}
# devices, slots of each, group size
LAYOUTS = [(4, 2, None), (3, 1, 1), (5, 1, 2), (1, 2, None), (4, 1, 4), (3, None, 2), (5, 2, 4), (4, 2, 2)]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates with the embedded model."""
    return reference_at(EMBEDDED_MODEL, EMBEDDED_PROMPT, LONG)


def check_slots(workers: list[ExpertWorker], slots: int | None, expert_bytes: int = ONE_EXPERT) -> None:
    """No worker ever held more than its budget, and none keeps anything once all sequences have ended."""
    for worker in workers:
        assert worker.report().peak_slot_bytes <= (slots or 0) * expert_bytes
    if slots is not None:
        until(lambda: not any(worker.report().resident for worker in workers), "slots were given back")


# --- exact, whoever foretells ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TOYS)
def test_every_predictor_leaves_the_tokens_of_a_toy_alone(model_type: str, toys: Toys) -> None:
    path, short = toys(model_type), PROMPT[:3]
    expected, after_short = reference_at(path, PROMPT, NEW_TOKENS), reference_at(path, short, NEW_TOKENS)
    for index, (name, predictor) in enumerate(PREDICTORS.items()):
        devices, slots, group_size = LAYOUTS[(index + TOYS.index(model_type)) % len(LAYOUTS)]
        shape: dict[str, Any] = {"devices": devices, "slots": slots, "group_size": group_size}
        with service_with_shadow(path, **shape, predictor=predictor) as (service, _, host):
            first = service.generate(PROMPT, max_tokens=NEW_TOKENS, **GREEDY)
            second = service.generate(short, max_tokens=NEW_TOKENS, **GREEDY)
            assert (first.token_ids, second.token_ids) == (expected, after_short), f"{name} on {devices} devices"
            assert (first.routing.recall is None) == (predictor is None)
            assert host is None or host.failure is None


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_leaves_the_embedded_models_tokens_alone(name: str, expected: list[int]) -> None:
    devices, slots, group_size = LAYOUTS[list(PREDICTORS).index(name)]
    with service_with_shadow(EMBEDDED_MODEL, devices, slots, group_size=group_size, predictor=PREDICTORS[name]) as (
        service,
        workers,
        _,
    ):
        result = service.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        assert result.token_ids == expected
        check_slots(workers, slots)
    assert (result.routing.recall is None) == (name == "none")
    assert name not in ("gate", "history") or result.routing.recall > 0.2


@pytest.mark.parametrize("run_ahead", [True, False])
@pytest.mark.parametrize(("token_every", "kv_every"), [(1, 1), (0, 0), (4, 1), (1, 4)])
@pytest.mark.parametrize("model_type", ["gpt_oss", "lfm2_moe"])  # sliding windows, short convolutions
def test_every_alignment_leaves_the_tokens_alone(
    model_type: str, token_every: int, kv_every: int, run_ahead: bool, toys: Toys
) -> None:
    path = toys(model_type)
    predictor = {"bits": 4, "token_align_every": token_every, "kv_align_every": kv_every, "run_ahead": run_ahead}
    with service_with_shadow(path, 3, 2, group_size=2, predictor=predictor) as (service, _, host):
        result = service.generate(PROMPT, max_tokens=LONG, **GREEDY)
        assert host is not None and host.failure is None
    assert result.token_ids == reference_at(path, PROMPT, LONG)
    assert result.routing.foretellable > 0


@pytest.mark.parametrize(("devices", "slots", "group_size"), [(3, 1, 1), (5, 1, 2), (3, None, 2)])
def test_every_layout_leaves_the_tokens_alone(
    devices: int, slots: int | None, group_size: int | None, expected: list[int]
) -> None:
    with service_with_shadow(EMBEDDED_MODEL, devices, slots, group_size=group_size, predictor={"bits": 8}) as (
        service,
        workers,
        _,
    ):
        result = service.generate(EMBEDDED_PROMPT, max_tokens=SHORT, **GREEDY)
        check_slots(workers, slots)
        assert result.token_ids == expected[:SHORT]
        assert all(worker.report().calls for worker in workers), "every worker has its share"


def test_a_shadow_that_keeps_up_names_nearly_all(expected: list[int]) -> None:
    link = {"bytes_per_s": 20_000_000}  # a load takes 10 ms, so that the shadow is ahead even on a busy machine
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}, link=link) as (service, workers, host):
        result = service.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        assert host is not None
        counts = host.shadow.counts
        reports = [worker.report() for worker in workers]
    assert result.token_ids == expected
    assert result.routing.recall is not None and result.routing.recall > 0.9
    assert counts.steps >= LONG - 1 and counts.right > 0.8 * counts.guesses
    assert sum(report.prefetches for report in reports) > 0.8 * (LONG - 1) * LAYERS * TOP_K


@pytest.mark.parametrize("kind", ["gate", "resident", "history"])
def test_devices_of_this_process_are_foretold_to_by_this_process(kind: str, expected: list[int]) -> None:
    config = {
        "model": {"dtype": "float32"},
        "devices": [{"name": f"d{i}", "transport": "local", "slot_memory": 4 * ONE_EXPERT} for i in range(2)],
        "scheduling": {"policy": "on_demand_shadow"},
        "predictor": {"kind": kind},
    }
    with Moe(Session(ClusterConfig.parse(config), "local"), owns_ray=False) as moe:
        result = moe.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        stats = moe.stats()
    assert result.token_ids == expected
    assert result.routing.recall is not None and result.routing.recall > 0.4
    assert stats.predictor is not None and (stats.predictor.kind, stats.predictor.state) == (kind, "healthy")
    assert stats.engine is not None and stats.engine.recall == result.routing.recall
    assert all(0 < device.peak_slot_bytes <= 4 * ONE_EXPERT for device in stats.devices.values())


def test_sampled_tokens_are_those_of_a_model_without_a_predictor() -> None:
    wild = {"max_tokens": SHORT, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    answers = []
    for predictor in (None, {"bits": 8}):
        with service_with_shadow(EMBEDDED_MODEL, predictor=predictor) as (service, _, _):
            answers.append(service.generate(EMBEDDED_PROMPT, **wild))
    assert answers[0].token_ids == answers[1].token_ids


# --- a shadow that lies ---------------------------------------------------------------------------------


class AnotherLayers:
    """Says of each layer what was true of the one before."""

    def __init__(self) -> None:
        self.before = np.arange(TOP_K)[None]

    def __call__(self, forecast: LayerForecast) -> LayerForecast:
        experts, self.before = self.before, forecast.experts_TK
        return replace(forecast, experts_TK=experts)


def naming(experts: Callable[[np.ndarray], np.ndarray]) -> Lie:
    return lambda forecast: replace(forecast, experts_TK=experts(forecast.experts_TK))


LIES: dict[str, Lie] = {
    "permuted": naming(lambda experts_TK: (experts_TK + 1) % EXPERTS),
    "constant": naming(lambda experts_TK: np.arange(TOP_K)[None]),
    "nothing": naming(lambda experts_TK: experts_TK[:, :0]),
    "another layer's": AnotherLayers(),
    "everything": naming(lambda experts_TK: np.arange(EXPERTS)[None]),
    "one of four": naming(lambda experts_TK: experts_TK[:, :1]),
    "another step's": lambda forecast: replace(
        forecast, step=replace(forecast.step, position=forecast.step.position + 1)
    ),
    "an early epoch's": lambda forecast: replace(forecast, epoch=forecast.step.position % 3),
}


@pytest.mark.parametrize("slots", [1, 2])
def test_a_shadow_that_lies_changes_no_token(slots: int, expected: list[int]) -> None:
    telling = ["nothing"]
    with service_with_shadow(
        EMBEDDED_MODEL, 4, slots, group_size=2, predictor={"bits": 8}, lie=lambda truth: LIES[telling[0]](truth)
    ) as (service, workers, host):
        for lie in LIES:
            telling[0] = lie
            result = service.generate(EMBEDDED_PROMPT, max_tokens=SHORT, **GREEDY)
            assert result.token_ids == expected[:SHORT], lie
            assert host is not None and host.failure is None
            assert lie != "nothing" or result.routing.recall == 0.0
            assert lie != "permuted" or result.routing.recall < 0.6
        check_slots(workers, slots)


# --- a shadow that is gone ------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 10])
def test_a_shadow_that_stops_does_not_stop_generation(after: int, expected: list[int]) -> None:
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}) as (service, workers, host):
        assert host is not None
        tokens: list[int] = []
        if not after:
            host.stop()
        for chunk in service.stream(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY):
            tokens += chunk.token_ids
            if len(tokens) == after:
                host.stop()
        assert tokens == expected
        assert chunk.routing is not None and chunk.routing.recall is not None
        assert chunk.routing.recall < 0.8
        again = service.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        assert (again.token_ids, again.routing.recall) == (expected, 0.0)
        check_slots(workers, 2)


def test_a_shadow_that_fails_does_not_stop_generation(expected: list[int]) -> None:
    def fail(forecast: LayerForecast) -> LayerForecast:
        if forecast.step.position > len(EMBEDDED_PROMPT) + 8:
            raise ArithmeticError("the shadow has a fault")
        return forecast

    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}, lie=fail) as (service, _, host):
        assert host is not None
        result = service.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        assert result.token_ids == expected
        until(lambda: isinstance(host.failure, ArithmeticError), "the fault is told")


def test_a_shadow_that_comes_back_takes_up_the_request_under_way(expected: list[int]) -> None:
    link = {"bytes_per_s": 20_000_000}
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}, link=link) as (service, workers, host):
        way: Any = service.experts.foresight.link
        assert host is not None and isinstance(way, ShadowClient)
        endpoint, tokens = host._server.endpoint, []
        for chunk in service.stream(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY):
            tokens += chunk.token_ids
            if len(tokens) == 8:
                way.move(None)
            if len(tokens) == 16:
                way.move(endpoint)
        check_slots(workers, 2)
    assert tokens == expected
    assert way.moves == 2
    assert chunk.routing is not None and chunk.routing.recall is not None
    assert 0.4 < chunk.routing.recall < 0.95, "all but what was asked for while it was away"


# --- several at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", [{"bits": 8}, {"kind": "history"}, {"kind": "gate"}], ids=lambda p: str(p))
def test_concurrent_requests_are_each_exact(predictor: dict[str, Any], expected: list[int]) -> None:
    other = EMBEDDED_PROMPT[::-1][:7]
    wanted = {"first": expected, "second": reference_at(EMBEDDED_MODEL, other, LONG)}
    prompts = {"first": EMBEDDED_PROMPT, "second": other}
    results: dict[str, Any] = {}
    with service_with_shadow(EMBEDDED_MODEL, 4, 2, predictor=predictor) as (service, workers, host):

        def generate(name: str) -> None:
            results[name] = service.generate(prompts[name], max_tokens=LONG, **GREEDY)

        threads = [threading.Thread(target=generate, args=(name,)) for name in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        check_slots(workers, 2)
        assert host is None or host.failure is None
    assert {name: result.token_ids for name, result in results.items()} == wanted
    for result in results.values():
        assert result.routing.foretellable == (LONG - 1) * LAYERS * TOP_K


def test_a_cancelled_request_leaves_nothing_behind(expected: list[int]) -> None:
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}) as (service, workers, host):
        assert host is not None
        for _ in range(3):
            for number, _chunk in enumerate(service.stream(EMBEDDED_PROMPT, max_tokens=200, **GREEDY)):
                if number == 5:
                    break
        until(lambda: service.report().running == 0, "the requests end")
        check_slots(workers, 2)
        until(lambda: not host.shadow._sequences and not host._model._states, "the shadow forgets them")
        result = service.generate(EMBEDDED_PROMPT, max_tokens=LONG, **GREEDY)
        assert result.token_ids == expected


def test_memory_of_plans_and_sequences_does_not_grow() -> None:
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}) as (service, _, host):
        assert host is not None
        for _ in range(5):
            service.generate(EMBEDDED_PROMPT, max_tokens=8, **GREEDY)
        foresight = service.experts.foresight
        assert not foresight._followed and not foresight.book._needed
        assert len({step.sequence for step in foresight.book._plans}) <= 1
        until(lambda: not host.shadow._sequences, "the shadow forgets them")
