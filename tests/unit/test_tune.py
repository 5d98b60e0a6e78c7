"""Tuning: which alphas are measured, what is chosen, and what quality is against."""

from pathlib import Path

import numpy as np
import pytest

from raymoe.config import SchedulingConfig
from raymoe.engine.corpus import generated_sequences, lengths, text_sequences
from raymoe.engine.forced import Forced
from raymoe.engine.tune import TunePoint, alphas_to_measure, choose, summarise, tune
from raymoe.errors import ConfigError
from raymoe.types import Routing
from tests.local import local_service
from tests.toy_models import save_toy

IMPORTANCE = SchedulingConfig(policy="importance")


@pytest.mark.parametrize(
    ("alpha_max", "alphas"),
    [
        (0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.3, [0, 0.1, 0.2, 0.3]),
        (0.25, [0, 0.1, 0.2, 0.25]),
        (0.05, [0, 0.05]),
    ],
)
def test_alphas_go_up_to_the_largest_allowed(alpha_max: float, alphas: list[float]) -> None:
    assert alphas_to_measure(SchedulingConfig(policy="importance", alpha=0, alpha_max=alpha_max)) == alphas


@pytest.mark.parametrize(
    ("scheduling", "message"),
    [
        (SchedulingConfig(), r'scheduling.policy is "on_demand"'),
        (SchedulingConfig(policy="importance", alpha=0, alpha_max=0), "scheduling.alpha_max is 0"),
    ],
)
def test_settings_without_room_for_alpha_are_refused(scheduling: SchedulingConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        alphas_to_measure(scheduling)


def point(alpha: float, tpot_s: float) -> TunePoint:
    return TunePoint(
        alpha=alpha, tpot_s=tpot_s, perplexity=2.0, perplexity_ratio=1.0, top1_agreement=1.0, routing=Routing()
    )


LINE = [point(alpha / 10, 0.060 - 0.040 * alpha / 10) for alpha in range(6)]


@pytest.mark.parametrize(("budget_s", "alpha"), [(0.07, 0.0), (0.050, 0.25), (0.0501, 0.248), (0.0395, None)])
def test_the_smallest_alpha_within_the_budget_is_chosen(budget_s: float, alpha: float | None) -> None:
    tuned = choose(LINE, budget_s, 0.5)
    assert tuned.alpha == alpha
    assert tuned.fastest == LINE[-1]
    assert alpha is None or tuned.fit.at(alpha) <= budget_s + 1e-9


def run(nll: list[float], argmax: list[int], step_s: list[float]) -> Forced:
    return Forced(
        nll_BN=np.array([nll], dtype=np.float32),
        argmax_BN=np.array([argmax]),
        prefill_s=1.0,
        step_s=np.array(step_s),
        routing=Routing(hits=3, misses=1),
    )


def test_quality_is_against_the_exact_model_and_first_steps_do_not_count() -> None:
    exact = [run([1.0] * 4, [1, 2, 3, 4], []), run([1.0] * 4, [5, 6, 7, 8], [])]
    runs = [run([1.1] * 4, [1, 2, 3, 9], [9.0] * 8 + [0.1]), run([1.1] * 4, [5, 6, 7, 8], [9.0] * 8 + [0.3, 0.2])]
    found = summarise(0.3, runs, exact)
    assert found.tpot_s == pytest.approx(0.2)
    assert found.perplexity_ratio == pytest.approx(np.exp(0.1), rel=1e-6)
    assert found.top1_agreement == 7 / 8
    assert (found.routing.hits, found.routing.misses) == (6, 2)


def test_a_model_is_tuned_on_text_of_its_own(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    scheduling = SchedulingConfig(policy="importance", alpha=0, alpha_max=0.2)
    settings = scheduling.model_dump(exclude_unset=True)
    with local_service(save_toy("qwen3_moe", tmp_path), slot_memory=8 * 3 * 32 * 16 * 4, **settings) as service:
        sequences = generated_sequences(service.runner, 64, seed=5)
        assert sequences == generated_sequences(service.runner, 64, seed=5)
        assert sequences[0][0] == 1 and len(sequences[0]) == 64
        tuned = tune(
            service.runner, service.experts, sequences, scheduling, 1.0, lambda *progress: told.append(progress)
        )
    exact = tuned.points[0]
    assert (exact.perplexity_ratio, exact.top1_agreement, exact.routing.substituted) == (1.0, 1.0, 0)
    assert [point.alpha for point in tuned.points] == [0, 0.1, 0.2]
    assert tuned.points[-1].routing.substituted > 0
    assert tuned.alpha == 0.0
    assert told[-1] == (3 * 63, 3 * 63)


# --- text -----------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with one token per character, and one (token 1) before every text where asked."""

    def __init__(self, head: bool) -> None:
        self.head = head

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [1] * (self.head and add_special_tokens) + [ord(letter) for letter in text]


TEXT = "".join(chr(300 + place) for place in range(1000))


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(64, [64]), (256, [256]), (257, [129, 128]), (600, [200, 200, 200]), (2048, [256] * 8)]
)
def test_sequences_are_about_equally_long(tokens: int, sizes: list[int]) -> None:
    assert lengths(tokens) == sizes


@pytest.mark.parametrize("head", [False, True])
def test_pieces_are_spread_over_the_text(head: bool) -> None:
    pieces = text_sequences(TEXT, Letters(head), 600)
    assert [len(piece) for piece in pieces] == [200, 200, 200]
    assert [piece[head] for piece in pieces] == [300, 700, 1100]
    assert not head or all(piece[0] == 1 for piece in pieces)


def test_a_short_text_is_used_whole() -> None:
    assert text_sequences(TEXT[:100], Letters(False), 2048) == [list(range(300, 400))]


def test_text_needs_a_tokenizer_and_some_length() -> None:
    with pytest.raises(ConfigError, match="has 10 tokens; at least 64 are needed"):
        text_sequences(TEXT[:10], Letters(False), 2048)
    with pytest.raises(ConfigError, match="--text needs a tokenizer, and the model has none"):
        text_sequences(TEXT, None, 2048)
