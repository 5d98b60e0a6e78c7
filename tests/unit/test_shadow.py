"""The shadow's logic, with a model of plain numbers: what it reads, when it goes back, and what it foretells."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from predictor.forecast import LayerForecast
from predictor.shadow import Alignment, Shadow, Told, is_due
from raymoe.types import StepId

LAYERS = 2
VOCABULARY = 100


@dataclass
class CountingModel:
    """Its next token is the last one plus one, and it routes a token to the experts of that number.

    ``lies`` maps a token to what it wrongly takes for the next one.
    """

    lies: dict[int, int] = field(default_factory=dict)
    can_go_back: bool = True
    on_routed: Any = None
    cache: dict[int, list[int]] = field(default_factory=dict)
    aligned: list[tuple[int, int]] = field(default_factory=list)
    forwards: int = 0

    def prefill(self, sequence: int, rows: list[tuple[int, ...]]) -> torch.Tensor:
        self.cache[sequence] = list(rows[0])
        return self._logits(rows[0][-1])

    def decode(self, sequence: int, tokens: list[int]) -> torch.Tensor:
        self.forwards += 1
        for layer in range(LAYERS):
            self.on_routed(layer, np.array([tokens]), np.zeros((1, VOCABULARY), dtype=np.float32))
        self.cache[sequence].append(tokens[0])
        return self._logits(tokens[0])

    def may_run_ahead(self, sequence: int) -> bool:
        return self.can_go_back and sequence in self.cache

    def back_to(self, sequence: int, length: int) -> None:
        del self.cache[sequence][length:]

    def align(self, sequence: int, start: int, entries: Any) -> bool:
        self.aligned.append((start, entries.tokens))
        missing = start + entries.tokens - len(self.cache[sequence])
        self.cache[sequence] += [-1] * missing
        return True

    def forget(self, sequence: int) -> None:
        self.cache.pop(sequence, None)

    def _logits(self, token: int) -> torch.Tensor:
        following = self.lies.get(token, token + 1)
        return torch.nn.functional.one_hot(torch.tensor([following]), VOCABULARY).float()


@dataclass
class Entries:
    tokens: int


def shadow_of(model: CountingModel, **alignment: int) -> tuple[Shadow, list[LayerForecast]]:
    forecasts: list[LayerForecast] = []
    return Shadow(model, Alignment(**alignment), forecasts.append), forecasts  # type: ignore[arg-type]


def told(position: int, token: int, entries: int = 0, start: int = 0, *, drafts: int = 0, coming: int = 0) -> Told:
    kept: Any = Entries(entries) if entries else None
    return Told(position=position, tokens=(token,), drafts=drafts, coming=coming, entries=kept, start=start)


def work(shadow: Shadow, steps: int = 50) -> None:
    for _ in range(steps):
        if not shadow.step():
            return


def read(forecasts: list[LayerForecast]) -> list[tuple[int, int, int]]:
    """(position, epoch, token) of each step that was foretold to its last layer."""
    return [(f.step.position, f.epoch, int(f.experts_TK[0, 0])) for f in forecasts if f.layer == LAYERS - 1]


def test_a_forecast_names_step_layer_and_experts() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=0)
    shadow.begin(7, [[10, 11]])
    shadow.tell(7, told(2, 12))
    work(shadow)
    assert [(f.step, f.layer) for f in forecasts] == [
        (StepId(sequence=7, position=2), layer) for layer in range(LAYERS)
    ]
    assert forecasts[0].experts_TK.tolist() == [[12]]


def test_without_running_ahead_it_waits_for_the_models_token() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=0)
    shadow.begin(1, [[10]])
    work(shadow)
    assert forecasts == []
    shadow.tell(1, told(1, 50))
    work(shadow)
    assert [token for _, _, token in read(forecasts)] == [50]
    assert not shadow.step()


def test_it_runs_ahead_as_far_as_allowed_and_no_further() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    assert read(forecasts) == [(1, 0, 11), (2, 0, 12)]


def test_a_right_guess_costs_nothing() -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model, run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    shadow.tell(1, told(1, 11))
    work(shadow)
    assert read(forecasts) == [(1, 0, 11), (2, 0, 12), (3, 0, 13)]
    assert (shadow.counts.wasted, shadow.counts.guesses, shadow.counts.right) == (0, 1, 1)
    assert model.cache[1] == [10, 11, 12, 13]


def test_a_wrong_guess_is_taken_back_and_begins_a_new_epoch() -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model, run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    shadow.tell(1, told(1, 40))
    work(shadow)
    assert read(forecasts)[2:] == [(1, 1, 40), (2, 1, 41), (3, 1, 42)]
    assert model.cache[1] == [10, 40, 41, 42]
    assert shadow.counts.wasted == 2


def test_a_step_under_way_is_left_when_its_token_turns_out_wrong() -> None:
    model = CountingModel()
    seen: list[LayerForecast] = []

    def hear(forecast: LayerForecast) -> None:
        if not seen:
            shadow.tell(1, told(1, 40))
        seen.append(forecast)

    shadow = Shadow(model, Alignment(run_ahead=1), hear)  # type: ignore[arg-type]
    shadow.begin(1, [[10]])
    work(shadow, steps=3)
    assert [(f.epoch, f.layer, int(f.experts_TK[0, 0])) for f in seen[:3]] == [(0, 0, 11), (1, 0, 40), (1, 1, 40)]
    assert model.cache[1][:2] == [10, 40]


def test_what_can_not_be_taken_back_never_runs_ahead() -> None:
    shadow, forecasts = shadow_of(CountingModel(can_go_back=False), run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    assert forecasts == []


def test_with_a_period_it_follows_its_own_tokens_in_between() -> None:
    shadow, forecasts = shadow_of(CountingModel(lies={11: 30}), token_every=2, run_ahead=0)
    shadow.begin(1, [[10]])
    for position, token in enumerate([11, 12, 13, 14], start=1):
        shadow.tell(1, told(position, token))
        work(shadow)
    # step 0 (position 1) and step 2 (position 3) are aligned; position 2 reads the shadow's own 30, position 4 its 14
    assert [token for _, _, token in read(forecasts)] == [11, 30, 13, 14]


def test_never_aligned_it_drifts() -> None:
    shadow, forecasts = shadow_of(CountingModel(lies={10: 20}), token_every=0, run_ahead=0)
    shadow.begin(1, [[10]])
    for position, token in enumerate([11, 12, 13], start=1):
        shadow.tell(1, told(position, token))
        work(shadow)
    assert [token for _, _, token in read(forecasts)] == [20, 21, 22]


def test_entries_are_taken_over() -> None:
    model = CountingModel()
    shadow, _ = shadow_of(model, run_ahead=0)
    shadow.begin(1, [[10]])
    shadow.tell(1, told(1, 11))
    work(shadow)
    shadow.tell(1, told(2, 12, entries=1, start=1))
    work(shadow)
    assert model.aligned == [(1, 1)]


def test_a_shadow_that_lags_takes_over_what_it_has_not_computed() -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model, run_ahead=0)
    shadow.begin(1, [[10]])
    shadow.step()
    for position, token in enumerate([11, 12, 13], start=1):
        shadow.tell(1, told(position, token, entries=int(position > 1), start=position - 1))
    work(shadow)
    assert [(position, token) for position, _, token in read(forecasts)] == [(3, 13)]
    assert model.forwards == 1


def test_the_sequence_that_is_furthest_behind_comes_first() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    shadow.begin(2, [[60]])
    shadow.step()
    shadow.tell(2, told(1, 61))
    shadow.tell(1, told(1, 11))
    shadow.step()
    assert forecasts[-1].step == StepId(sequence=2, position=1)


def test_an_ended_sequence_is_forgotten_and_unknown_ones_are_ignored() -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model)
    shadow.begin(1, [[10]])
    work(shadow)
    shadow.end(1)
    shadow.tell(1, told(1, 11))
    shadow.end(5)
    assert not shadow.step()
    assert model.cache == {}
    assert len(forecasts) == 2 * LAYERS


def test_a_sequence_may_end_in_the_middle_of_its_step() -> None:
    model = CountingModel()

    def hear(forecast: LayerForecast) -> None:
        shadow.end(1)

    shadow = Shadow(model, Alignment(), hear)  # type: ignore[arg-type]
    shadow.begin(1, [[10]])
    work(shadow)
    assert model.cache == {}


# --- drafts ---------------------------------------------------------------------------------------------------


def drafts_of(model: CountingModel, **alignment: int) -> tuple[Shadow, list[LayerForecast], list[tuple[int, int, int]]]:
    """A shadow, its forecasts, and (position, epoch, token) of its guesses."""
    guesses: list[tuple[int, int, int]] = []
    shadow, forecasts = shadow_of(model, **alignment)
    shadow.on_draft = lambda step, epoch, tokens: guesses.append((step.position, epoch, tokens[0]))
    return shadow, forecasts, guesses


def passes_of(forecasts: list[LayerForecast]) -> list[tuple[int, int]]:
    """(first position of the pass, token) of each step."""
    return [(pass_, token) for pass_, _, token in read(forecasts)]


def test_each_guess_is_told_with_its_place_and_epoch() -> None:
    shadow, _, guesses = drafts_of(CountingModel(), run_ahead=2)
    shadow.begin(1, [[10]])
    work(shadow)
    assert guesses == [(1, 0, 11), (2, 0, 12), (3, 0, 13)]
    shadow.tell(1, told(1, 40))
    work(shadow)
    assert guesses[3:] == [(2, 1, 41), (3, 1, 42), (4, 1, 43)]


def test_a_token_that_was_told_before_it_could_be_guessed_is_no_guess() -> None:
    shadow, _, guesses = drafts_of(CountingModel(), run_ahead=0)
    shadow.begin(1, [[10]])
    shadow.tell(1, told(1, 11))
    work(shadow)
    assert guesses == [(2, 0, 12)]


def test_forecasts_are_labelled_by_the_pass_that_will_read_them() -> None:
    shadow, forecasts, _ = drafts_of(CountingModel(), run_ahead=2)
    shadow.begin(1, [[10]], coming=2)
    work(shadow)
    assert passes_of(forecasts) == [(1, 11), (1, 12), (1, 13), (4, 14), (4, 15), (4, 16)]


def test_the_pass_in_hand_is_as_long_as_was_told_and_those_after_it_as_was_said() -> None:
    shadow, forecasts, _ = drafts_of(CountingModel(), run_ahead=2)
    shadow.begin(1, [[10]], coming=0)
    shadow.step()
    shadow.tell(1, told(1, 11, drafts=2, coming=1))
    work(shadow)
    assert passes_of(forecasts) == [(1, 11), (1, 12), (1, 13), (4, 14), (4, 15), (6, 16), (6, 17)]


def test_a_draft_that_does_not_hold_begins_a_new_epoch_and_a_new_pass() -> None:
    model = CountingModel()
    shadow, forecasts, guesses = drafts_of(model, run_ahead=1)
    shadow.begin(1, [[10]], coming=2)
    work(shadow)
    shadow.tell(1, told(1, 11, drafts=2, coming=2))
    work(shadow)
    before = len(forecasts)
    shadow.tell(1, told(2, 50, drafts=0, coming=1))  # the first draft was wrong
    work(shadow)
    assert read(forecasts[before:]) == [(2, 1, 50), (3, 1, 51), (3, 1, 52)]
    assert model.cache[1] == [10, 11, 50, 51, 52]
    assert guesses[-3:] == [(3, 1, 51), (4, 1, 52), (5, 1, 53)]


def test_several_accepted_drafts_cost_nothing() -> None:
    model = CountingModel()
    shadow, forecasts, _ = drafts_of(model, run_ahead=1)
    shadow.begin(1, [[10]], coming=2)
    work(shadow)
    shadow.tell(1, told(1, 11, drafts=2, coming=2))
    work(shadow)
    shadow.tell(1, told(4, 14, entries=3, start=1, drafts=2, coming=2))
    work(shadow)
    assert shadow.counts.wasted == 0 and model.aligned == [(1, 3)]
    assert (shadow.counts.guesses, shadow.counts.right) == (4, 4), "two were read along, and two were told"
    assert [epoch for _, epoch, _ in read(forecasts)] == [0] * 9
    assert model.cache[1] == list(range(10, 20))


def test_alignment_is_due_with_its_period() -> None:
    assert [is_due(3, step) for step in range(5)] == [True, False, False, True, False]
    assert not any(is_due(0, step) for step in range(5))
