"""Recall of predictors: the arithmetic on small numbers, and each kind on a toy model."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from predictor.predictor import Predictor, ShadowPredictor
from predictor.shadow import Alignment, Guess, greedy
from predictor.shadow_model import ShadowModel
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import ModelConfig, PredictorConfig
from raymoe.engine.evaluate import BLOCK, Model, Recall, Sampled, Watch, forced, joined, make_predictor, recalled
from raymoe.engine.host_experts import HostExperts
from raymoe.errors import ConfigError
from tests.toy_models import save_toy

STEPS = 12
ROWS = [[1, 17, 93, 5], [1, 64, 28, 111]]
TEXT = [[(7 * step + 31 * row) % 120 + 3 for step in range(STEPS)] for row in range(len(ROWS))]


def recall_of(recall_BNL: np.ndarray, agreement: float | None = None, bytes_per_token: float = 0.0) -> Recall:
    return Recall(recall_BNL=recall_BNL, agreement=agreement, bytes_per_token=bytes_per_token)


# --- arithmetic -----------------------------------------------------------------------------------------


def test_recalled_is_the_share_of_each_rows_chosen_experts() -> None:
    chosen_BK = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert recalled(chosen_BK, np.array([[4, 9, 2], [1, 2, 3]])).tolist() == [0.5, 0.0]
    assert recalled(chosen_BK, chosen_BK[:, ::-1]).tolist() == [1.0, 1.0]
    assert recalled(chosen_BK, np.empty((2, 0), dtype=int)).tolist() == [0.0, 0.0]


def test_layers_that_are_never_named_are_none_and_count_nothing() -> None:
    recall_BNL = np.array([[[np.nan, 1.0], [np.nan, 0.5]], [[np.nan, 0.0], [np.nan, 0.5]]])
    recall = recall_of(recall_BNL)
    assert math.isnan(recall.by_layer()[0]) and recall.by_layer()[1] == 0.5
    assert recall.by_step().tolist() == [0.5, 0.5]
    assert recall.mean == 0.5


def test_the_interval_follows_from_the_spread_of_blocks() -> None:
    recall_BNL = np.ones((1, 4 * BLOCK, 1))
    recall_BNL[0, : 2 * BLOCK] = 0.0
    # four blocks of mean 0, 0, 1, 1: their deviation is sqrt(1/3), the mean's is half of that
    assert recall_of(recall_BNL).interval == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert recall_of(np.ones((2, 8, 1))).interval == 0.0
    assert math.isnan(recall_of(np.ones((1, BLOCK, 1))).interval), "one block tells nothing of the spread"


def test_several_evaluations_count_as_one() -> None:
    first = recall_of(np.zeros((1, 2, 1)), agreement=0.5, bytes_per_token=100.0)
    second = recall_of(np.ones((1, 2, 1)), agreement=None, bytes_per_token=50.0)
    both = joined([first, second])
    assert both.recall_BNL.shape == (2, 2, 1) and both.mean == 0.5
    assert (both.agreement, both.bytes_per_token) == (0.5, 75.0)
    assert joined([second]).agreement is None


def test_what_is_sampled_is_the_same_each_time_and_follows_the_logits() -> None:
    logits_BV = torch.zeros(2, 50)
    logits_BV[1, 7] = 1000.0
    assert Sampled(3)(5, logits_BV) == Sampled(3)(5, logits_BV)
    assert len({Sampled(3)(step, logits_BV)[0] for step in range(20)}) > 5
    assert all(Sampled(seed)(0, logits_BV)[1] == 7 for seed in range(20))


def test_the_same_noise_makes_alike_logits_agree() -> None:
    logits_BV = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    nearly_BV = logits_BV + 1e-4 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    agreeing = sum(Sampled(0)(step, logits_BV) == Sampled(0)(step, nearly_BV) for step in range(20))
    assert agreeing >= 19


# --- on a toy -------------------------------------------------------------------------------------------


class ExactExperts(Watch):
    """A shadow's experts that are not quantised at all."""

    nbytes = 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("mixtral", tmp_path_factory.mktemp("toys") / "mixtral")


@pytest.fixture(scope="module")
def checkpoint(toy: Path) -> Checkpoint:
    return open_checkpoint(toy, "float32")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    return Model(checkpoint, 1 << 30)


def measured(
    model: Model, predictor: Predictor, rows: Sequence[Sequence[int]] = ROWS, text: Sequence[Sequence[int]] = TEXT
) -> Recall:
    return model.evaluate(predictor, rows, forced(text), STEPS)


def made(model: Model, toy: Path, kind: str, guess: Guess = greedy, **options: object) -> Predictor:
    source = ModelConfig(path=str(toy), dtype="float32")
    config = PredictorConfig.model_validate({"kind": kind, **options})
    return make_predictor(config, model, source, ahead=1, guess=guess)


@pytest.mark.parametrize("alignment", [Alignment(run_ahead=0), Alignment(kv_every=0, run_ahead=0)])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_exact_shadow_names_everything(
    model: Model, checkpoint: Checkpoint, alignment: Alignment, rows: int
) -> None:
    shadow = ShadowModel(checkpoint, ExactExperts(HostExperts(checkpoint, 1 << 30)), torch.device("cpu"))
    recall = measured(model, ShadowPredictor(shadow, alignment), ROWS[:rows], TEXT[:rows])
    assert recall.recall_BNL.shape == (rows, STEPS, 3)
    assert recall.mean == 1.0


def test_a_shadow_in_eight_bits_names_nearly_everything_and_the_fewer_bits_the_less(model: Model, toy: Path) -> None:
    means = [measured(model, made(model, toy, "shadow", bits=bits)).mean for bits in (8, 4, 2)]
    assert means[0] > 0.95 and means[0] >= means[1] > means[2]


def test_without_alignment_a_shadow_loses_its_way(model: Model, toy: Path) -> None:
    lost = made(model, toy, "shadow", bits=2, token_align_every=0, kv_align_every=0)
    assert measured(model, lost).mean < measured(model, made(model, toy, "shadow", bits=2)).mean


def test_the_bytes_of_keys_and_values_are_counted(model: Model, toy: Path) -> None:
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    aligned = measured(model, made(model, toy, "shadow"))
    assert aligned.bytes_per_token == per_token * (STEPS - 1) / STEPS, "the first step has nothing to align yet"
    assert measured(model, made(model, toy, "shadow", kv_align_every=0)).bytes_per_token == 0


def test_agreement_is_told_of_a_shadow_alone(model: Model, toy: Path) -> None:
    knowing = forced([[*row, 0] for row in TEXT])  # it chooses once more than the model reads
    assert measured(model, made(model, toy, "shadow", knowing)).agreement == 1.0
    agreement = measured(model, made(model, toy, "shadow")).agreement
    assert agreement is not None and agreement < 0.5, "what the toy would say is not this text"
    assert measured(model, made(model, toy, "history")).agreement is None


def test_gates_name_no_first_layer(model: Model, toy: Path) -> None:
    recall = measured(model, made(model, toy, "gate"))
    by_layer = recall.by_layer()
    assert math.isnan(by_layer[0]) and not np.isnan(by_layer[1:]).any()
    assert 0 < recall.mean < 1


def test_history_learns_a_text_that_comes_again(model: Model, toy: Path) -> None:
    predictor = made(model, toy, "history")
    first, second = measured(model, predictor), measured(model, predictor)
    assert not np.isnan(first.recall_BNL).any()
    assert second.mean > max(0.9, first.mean)


def test_a_predictor_may_be_used_for_several_texts(model: Model, toy: Path) -> None:
    predictor = made(model, toy, "shadow")
    alone = measured(model, made(model, toy, "shadow"))
    measured(model, predictor, [ROWS[1]], [TEXT[1]])
    assert np.array_equal(measured(model, predictor).recall_BNL, alone.recall_BNL)


def test_steps_are_told_as_they_are_done(model: Model, toy: Path) -> None:
    steps: list[None] = []
    model.evaluate(made(model, toy, "history"), ROWS, forced(TEXT), STEPS, lambda: steps.append(None))
    assert len(steps) == STEPS


def test_the_resident_forecast_is_refused_with_what_is_allowed(model: Model, toy: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kind resident forecasts from the slots .* shadow, gate and history"):
        made(model, toy, "resident")
