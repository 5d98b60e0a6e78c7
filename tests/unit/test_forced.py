"""Teacher-forced decoding: transformers' likelihoods, row by row and in lockstep, and what steps cost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.forced import forced, forced_steps
from raymoe.engine.service import ModelService
from raymoe.errors import RequestError
from tests.local import local_service
from tests.toy_models import PROMPT, save_toy

TOKENS = 20
LAYERS = 8


def random_rows(count: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return generator.integers(200, 4000, size=(count, TOKENS)).tolist()


ROWS = random_rows(3)


@pytest.fixture(scope="module")
def service() -> Iterator[ModelService]:
    """The embedded model in float32, all experts at hand."""
    with local_service(EMBEDDED_MODEL, policy="importance") as service:
        yield service


@pytest.fixture(scope="module")
def tight_service() -> Iterator[ModelService]:
    """The same with slots for six experts per layer, of which a token needs four."""
    with local_service(EMBEDDED_MODEL, slot_memory=6 * LAYERS * 3 * 256 * 64 * 4, policy="importance") as service:
        yield service


@pytest.fixture(scope="module")
def reference_BTV() -> torch.Tensor:
    """Log likelihoods of transformers' own model, after each token of each row."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor(ROWS)).logits, dim=-1)


def reference_nll(reference_BTV: torch.Tensor, row: int) -> np.ndarray:
    following = torch.tensor(ROWS[row][1:])
    return -reference_BTV[row, :-1].gather(1, following[:, None]).squeeze(1).numpy()


def test_likelihoods_are_those_of_a_plain_forward(service: ModelService, reference_BTV: torch.Tensor) -> None:
    service.experts.alpha = 0.0
    result = forced(service.runner, service.experts, ROWS[:1])
    assert result.nll_BN.shape == (1, TOKENS - 1)
    np.testing.assert_allclose(result.nll_BN[0], reference_nll(reference_BTV, 0), atol=1e-3)
    assert result.argmax_BN[0].tolist() == reference_BTV[0, :-1].argmax(dim=-1).tolist()
    assert result.perplexity == pytest.approx(float(np.exp(result.nll_BN.mean())), rel=1e-5)


def test_rows_in_lockstep_are_as_single_ones(service: ModelService, reference_BTV: torch.Tensor) -> None:
    service.experts.alpha = 0.0
    result = forced(service.runner, service.experts, ROWS)
    for row in range(len(ROWS)):
        np.testing.assert_allclose(result.nll_BN[row], reference_nll(reference_BTV, row), atol=1e-3)
    assert result.argmax_BN.tolist() == reference_BTV[:, :-1].argmax(dim=-1).tolist()


def test_a_longer_prefix_predicts_the_rest(service: ModelService) -> None:
    service.experts.alpha = 0.0
    whole = forced(service.runner, service.experts, ROWS[:2])
    rest = forced(service.runner, service.experts, ROWS[:2], prefix=10)
    assert rest.nll_BN.shape == (2, TOKENS - 10)
    np.testing.assert_allclose(rest.nll_BN, whole.nll_BN[:, 9:], atol=1e-3)


def test_each_row_keeps_its_own_alpha(tight_service: ModelService, reference_BTV: torch.Tensor) -> None:
    tight_service.experts.alpha = np.array([0.0, 0.5])
    result = forced(tight_service.runner, tight_service.experts, ROWS[:2])
    assert result.routing.substituted > 0
    np.testing.assert_allclose(result.nll_BN[0], reference_nll(reference_BTV, 0), atol=1e-3)
    assert np.abs(result.nll_BN[1] - reference_nll(reference_BTV, 1)).max() > 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_costs_are_those_of_the_decode_steps(service: ModelService, rows: int) -> None:
    service.experts.alpha = 0.0
    result = forced(service.runner, service.experts, ROWS[:rows], prefix=4)
    steps = TOKENS - 4 - 1
    assert result.step_s.shape == (steps,) and (result.step_s > 0).all() and result.prefill_s > 0
    assert result.routing.decisions == rows * steps * LAYERS
    assert result.routing.hits + result.routing.misses == 4 * rows * steps * LAYERS
    assert result.routing.substituted == 0


def test_every_forward_is_told(service: ModelService) -> None:
    told: list[None] = []
    forced(service.runner, service.experts, ROWS[:1], on_step=lambda: told.append(None))
    assert len(told) == TOKENS - 1


@pytest.mark.parametrize(
    ("rows", "prefix", "message"),
    [
        ([], 1, "at least one sequence"),
        ([[1, 2, 3], [1, 2]], 1, r"all of one length, not of \[2, 3\]"),
        ([[1, 2, 3]], 3, "a prefix of 3 of 3 tokens leaves nothing to decode; allowed is 1 to 2"),
        ([[1, 2, 3]], 0, "a prefix of 0"),
    ],
)
def test_rows_that_cannot_be_decoded_are_refused(
    service: ModelService, rows: list[list[int]], prefix: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        next(forced_steps(service.runner, rows, prefix=prefix))


def test_an_architecture_with_inputs_of_its_own_takes_single_rows_only(tmp_path: Path) -> None:
    with local_service(save_toy("minimax", tmp_path)) as service:
        assert not service.runner.takes_rows
        assert forced(service.runner, service.experts, [PROMPT]).nll_BN.shape == (1, len(PROMPT) - 1)
        with pytest.raises(RequestError, match="one sequence at a time, not 2 in lockstep"):
            forced(service.runner, service.experts, [PROMPT, PROMPT])
