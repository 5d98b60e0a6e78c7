"""Recording routing: what a trace holds is what the routers did, and a recording changes no token."""

from pathlib import Path

import numpy as np
import pytest

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.record import RecordingScheduler
from raymoe.engine.service import ModelService
from raymoe.simulation.trace import RoutingTrace
from tests.local import local_service
from tests.shadows import service_with_shadow
from tests.toy_models import save_toy

pytestmark = pytest.mark.integration

PROMPT = [7, 11, 13, 17, 19]
TOKENS = 12


def recorded(service: ModelService, has_shadow: bool = False) -> tuple[RoutingTrace, list[int]]:
    with service.recorded() as recorder:
        result = service.generate(PROMPT, max_tokens=TOKENS, temperature=1.0, seed=3, ignore_eos=True)
    return recorder.trace(service.checkpoint, {}, has_shadow=has_shadow), result.token_ids


def test_a_trace_holds_what_the_routers_chose_and_scored() -> None:
    with local_service(EMBEDDED_MODEL) as service:
        before = service.generate(PROMPT, max_tokens=TOKENS, temperature=1.0, seed=3, ignore_eos=True)
        trace, tokens = recorded(service)
        after = service.generate(PROMPT, max_tokens=TOKENS, temperature=1.0, seed=3, ignore_eos=True)
    assert before.token_ids == tokens == after.token_ids
    assert trace.steps == TOKENS - 1
    assert trace.tokens_N is not None and trace.tokens_N.tolist() == tokens[:-1]
    assert (trace.shape.layers, trace.shape.experts, trace.shape.top_k) == (8, 32, 4)
    assert (trace.shape.expert_bytes, trace.shape.row_bytes, trace.shape.kv_bytes) == (196_608, 1024, 8192)
    assert trace.scores_NLE is not None and trace.foretold_NLK is None
    best_NLK = np.argsort(-trace.scores_NLE.astype(np.float32), axis=2, kind="stable")[..., :4]
    same = [set(a) == set(b) for a, b in zip(best_NLK.reshape(-1, 4), trace.chosen_NLK.reshape(-1, 4), strict=True)]
    assert np.mean(same) > 0.97, "scores are rounded to float16, so that a few are equal"


def test_under_importance_the_routers_own_choice_is_recorded() -> None:
    """With slots for few experts much is substituted; the trace holds what the routers wanted."""
    with local_service(EMBEDDED_MODEL, slot_memory=64 * 196_608, policy="importance", alpha=0.5) as service:
        trace, _ = recorded(service)
    assert trace.scores_NLE is not None
    best_NLK = np.argsort(-trace.scores_NLE.astype(np.float32), axis=2, kind="stable")[..., :4]
    same = [set(a) == set(b) for a, b in zip(best_NLK.reshape(-1, 4), trace.chosen_NLK.reshape(-1, 4), strict=True)]
    assert np.mean(same) > 0.97


def test_a_shadows_forecasts_are_in_the_trace() -> None:
    with service_with_shadow(EMBEDDED_MODEL, predictor={"bits": 8}) as (service, _, _):
        trace, tokens = recorded(service, has_shadow=True)
    assert trace.tokens_N is not None and trace.tokens_N.tolist() == tokens[:-1]
    assert trace.recall is not None and trace.recall > 0.9
    assert trace.guessed_N is not None and trace.guessed_N.mean() > 0.7


def test_under_joint_it_is_what_the_shadow_named_before_anything_was_replaced() -> None:
    joint = {"policy": "joint", "alpha": 0.5}
    with service_with_shadow(EMBEDDED_MODEL, slots=8, predictor={"bits": 8}, scheduling=joint) as (service, _, _):
        trace, _ = recorded(service, has_shadow=True)
    assert trace.recall is not None and trace.recall > 0.9
    assert trace.guessed_N is not None and trace.guessed_N.mean() > 0.7


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_other_architectures_are_recorded_as_well(model_type: str, tmp_path: Path) -> None:
    with local_service(save_toy(model_type, tmp_path)) as service:
        trace, _ = recorded(service)
    assert trace.steps == TOKENS - 1
    assert trace.shape.name == model_type


def test_nothing_is_left_behind() -> None:
    with local_service(EMBEDDED_MODEL) as service:
        own = service._engine.experts
        recorded(service)
        assert service._engine.experts is own
        assert not isinstance(own, RecordingScheduler)
