"""Policy joint: exact where alpha is 0 whatever is foretold and kept, bounded where it is not, fewer loads than either.

Workers and the shadow are threads of this process behind real sockets, or devices of this process.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymoe.actors.session import Session
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.forced import forced
from raymoe.engine.service import ModelService
from raymoe.errors import ConfigError
from raymoe.experts.worker import ExpertWorker
from raymoe.launcher import Moe
from tests.batches import answered_together
from tests.integration.test_on_demand_shadow import LIES
from tests.shadows import service_with_shadow
from tests.toy_models import PROMPT, reference_at, save_toy

EMBEDDED_PROMPT = list(range(200, 210))
TOKENS = 24
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
ONE_EXPERT = 196_608  # bytes in float32, of the embedded model
TOP_K, LAYERS = 4, 8
JOINT = {"policy": "joint"}
EVAL = Path(__file__).parents[2] / "benchmarks" / "data" / "eval"
EVAL_TOKENS = 256
MOST_LOSS = 0.005  # of perplexity, at the default alpha

# devices, slots of each, group size
LAYOUTS = [(4, 8, 2), (4, 3, 2), (3, 16, None), (2, 5, 1), (3, None, 2), (1, 6, None), (4, 1, 4)]
TOYS = ["deepseek_v3", "gpt_oss", "qwen3_next", "mixtral"]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates with the embedded model."""
    return reference_at(EMBEDDED_MODEL, EMBEDDED_PROMPT, TOKENS)


def check_slots(workers: list[ExpertWorker], slots: int | None) -> None:
    for worker in workers:
        assert worker.report().peak_slot_bytes <= (slots or 0) * ONE_EXPERT


# --- exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "slots", "group_size"), LAYOUTS)
def test_exact_is_transformers_own_on_every_layout(
    devices: int, slots: int | None, group_size: int | None, expected: list[int]
) -> None:
    shape: dict[str, Any] = {"devices": devices, "slots": slots, "group_size": group_size, "scheduling": JOINT}
    with service_with_shadow(EMBEDDED_MODEL, **shape, predictor={"bits": 8}) as (service, workers, host):
        for _ in range(2):  # the second time slots hold what is left of the first
            result = service.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
            assert result.token_ids == expected
            assert result.routing.substituted == 0 and result.routing.foretellable > 0
        check_slots(workers, slots)
        assert host is not None and host.failure is None


@pytest.mark.parametrize("model_type", TOYS)
def test_exact_is_transformers_own_for_other_architectures(model_type: str, tmp_path: Path) -> None:
    path = save_toy(model_type, tmp_path / model_type)
    expected = reference_at(path, PROMPT, TOKENS)
    for predictor in ({"bits": 8}, {"bits": 2, "token_align_every": 4}, {"kind": "gate"}, {"kind": "history"}, None):
        with service_with_shadow(path, 3, 4, group_size=2, predictor=predictor, scheduling=JOINT) as (service, _, _):
            exact = service.generate(PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
            fast = service.generate(PROMPT, max_tokens=TOKENS, quality="fast", **GREEDY)
        assert exact.token_ids == expected, predictor
        assert len(fast.token_ids) == TOKENS and fast.routing.substituted_gate_mass < 0.5


@pytest.mark.parametrize(("devices", "slots", "group_size"), [(4, 8, 2), (4, 1, 4)])
def test_drafts_are_read_along_and_exact_is_exact(
    devices: int, slots: int, group_size: int, expected: list[int]
) -> None:
    """Passes of several positions under one plan; links are emulated and slow, so that the shadow is ahead."""
    shape: dict[str, Any] = {"devices": devices, "slots": slots, "group_size": group_size, "scheduling": JOINT}
    predictor, link = {"bits": 8, "drafts": 8}, {"bytes_per_s": 20_000_000}
    with service_with_shadow(EMBEDDED_MODEL, **shape, predictor=predictor, link=link) as (service, workers, host):
        exact = service.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
        fast = service.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality="fast", **GREEDY)
        assert service.report().drafts == "on"
        assert exact.token_ids == expected and exact.routing.substituted == 0
        assert exact.routing.accepted > 3 and exact.routing.accepted <= exact.routing.drafted
        assert fast.routing.substituted > 0 and fast.routing.drafted > 0
        check_slots(workers, slots)
        assert host is not None and host.failure is None
        check_forgotten(service)


@pytest.mark.parametrize("slots", [1, 6])
def test_a_shadow_that_lies_changes_no_exact_token(slots: int, expected: list[int]) -> None:
    telling = ["nothing"]
    with service_with_shadow(
        EMBEDDED_MODEL,
        4,
        slots,
        group_size=2,
        predictor={"bits": 8},
        lie=lambda truth: LIES[telling[0]](truth),
        scheduling=JOINT,
    ) as (service, workers, host):
        for lie in LIES:
            telling[0] = lie
            result = service.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
            assert result.token_ids == expected, lie
            assert host is not None and host.failure is None
        check_slots(workers, slots)


# --- fewer loads ----------------------------------------------------------------------------------------


def test_what_stays_and_what_gives_way_saves_loads(expected: list[int]) -> None:
    """Loads of decode steps: without a cache, with kept experts, and with substitutions as well."""
    link = {"bytes_per_s": 40_000_000}  # emulated; a load takes 5 ms, so that the shadow is ahead
    loads: dict[str, int] = {}
    for policy, qualities in (("on_demand_shadow", ["exact"]), ("joint", ["exact", "fast"])):
        with service_with_shadow(
            EMBEDDED_MODEL, 4, 16, group_size=2, predictor={"bits": 8}, link=link, scheduling={"policy": policy}
        ) as (service, workers, _):
            for quality in qualities:
                before = sum(worker.report().loads for worker in workers)
                result = service.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality=quality, **GREEDY)
                loads[f"{policy} {quality}"] = sum(worker.report().loads for worker in workers) - before
                assert quality == "fast" or result.token_ids == expected
                assert (result.routing.substituted > 0) == (quality == "fast")
    assert loads["joint exact"] < 0.8 * loads["on_demand_shadow exact"]
    assert loads["joint fast"] < loads["joint exact"]


def test_perplexity_stays_within_half_a_percent() -> None:
    """A few hundred tokens that the model was not trained on, at the default alpha."""
    with service_with_shadow(
        EMBEDDED_MODEL, 4, 8, group_size=2, predictor={"bits": 8}, scheduling={**JOINT, "alpha": 0.25}
    ) as (service, _, _):
        text = (EVAL / "austen.txt").read_text()
        ids = service.tokenizer.encode(text)[:EVAL_TOKENS]
        perplexity, substituted = {}, {}
        for alpha in (0.0, 0.25):
            service.experts.alpha = alpha
            run = forced(service.runner, service.experts, [ids], prefix=16)
            perplexity[alpha], substituted[alpha] = run.perplexity, run.routing.substituted
    assert substituted[0.0] == 0 < substituted[0.25]
    assert perplexity[0.25] <= (1 + MOST_LOSS) * perplexity[0.0]


# --- requests and settings ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[Moe]:
    """Two devices of this process, foretold to by the gates."""
    config = {
        "model": {"dtype": "float32"},
        "devices": [{"name": f"d{i}", "transport": "local", "slot_memory": 24 * ONE_EXPERT} for i in range(2)],
        "scheduling": {"alpha": 0.5},
        "predictor": {"kind": "gate"},
    }
    parsed = ClusterConfig.parse(config)
    assert parsed.scheduling.policy == "joint"
    with Moe(Session(parsed, "joint"), owns_ray=False) as moe:
        yield moe


def test_local_devices_are_exact_too(local: Moe, expected: list[int]) -> None:
    exact = local.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, quality="exact", **GREEDY)
    free = local.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, **GREEDY)
    assert exact.token_ids == expected and exact.routing.substituted == 0
    assert free.routing.substituted > 0 and 0 < free.routing.substituted_gate_mass < 0.5
    assert exact.routing.recall is not None and exact.routing.recall > 0.4
    stats = local.stats()
    assert stats.policy == "joint" and stats.engine is not None and stats.engine.alpha == 0.5
    assert all(0 < device.peak_slot_bytes <= 24 * ONE_EXPERT for device in stats.devices.values())


def test_requests_of_one_batch_keep_their_own_alpha(local: Moe, expected: list[int]) -> None:
    answers = answered_together(local, EMBEDDED_PROMPT, ("exact", 0.5), max_tokens=TOKENS, **GREEDY)
    tokens, exact = answers["exact"]
    _, free = answers[0.5]
    assert tokens == expected
    assert exact.substituted == 0 < free.substituted


def test_settings_change_while_it_runs(local: Moe, expected: list[int]) -> None:
    local.reconfigure(alpha=0.0, eviction="lru", score_window=3)
    try:
        result = local.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, **GREEDY)
        assert result.token_ids == expected and result.routing.substituted == 0
        with pytest.raises(ConfigError, match="policy can't be changed while the model runs"):
            local.reconfigure(policy="on_demand_shadow")
    finally:
        local.reconfigure(alpha=0.5, eviction="score", score_window=64)
    assert local.generate(EMBEDDED_PROMPT, max_tokens=TOKENS, **GREEDY).routing.substituted > 0


def test_memory_of_plans_and_sequences_does_not_grow() -> None:
    with service_with_shadow(EMBEDDED_MODEL, 4, 8, predictor={"bits": 8}, scheduling=JOINT) as (service, _, _):
        for _ in range(3):
            service.generate(EMBEDDED_PROMPT, max_tokens=8, **GREEDY)
        check_forgotten(service)


def check_forgotten(service: ModelService) -> None:
    joint: Any = service.experts
    assert not joint._joint.alphas and not joint._joint._epochs and not joint._joint._cadences
    assert not any(joint._joint._booked.values()) and not joint.foresight._followed
    assert np.isfinite(joint._joint._links._free_s).all()
