"""The shadow where news get lost or a sequence begins again: it finds its way back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from predictor.forecast import LayerForecast
from predictor.shadow import Alignment, Shadow
from tests.unit.test_shadow import CountingModel, read, shadow_of, told, work


def test_tokens_that_were_lost_while_it_lagged_leave_none_in_the_wrong_place() -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model, run_ahead=0)
    shadow.begin(1, [[10]])
    shadow.step()
    shadow.tell(1, told(1, 11))
    # position 2 was lost; at 4 the entries of all since 1 come
    shadow.tell(1, told(3, 53))
    shadow.tell(1, told(4, 54, entries=3, start=1))
    work(shadow)
    assert read(forecasts) == [(4, 0, 54)]
    shadow.tell(1, told(5, 55))
    work(shadow)
    assert read(forecasts)[1:] == [(5, 0, 55)] or read(forecasts)[1:] == [(5, 1, 55)]


def test_a_lost_token_costs_no_more_than_its_own_step() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=0)
    shadow.begin(1, [[10]])
    work(shadow)
    for position, token in ((1, 11), (3, 63), (4, 64)):
        shadow.tell(1, told(position, token))
        work(shadow)
    assert [(position, token) for position, _, token in read(forecasts)] == [(1, 11), (2, 12), (3, 63), (4, 64)]


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_sequence_that_begins_again_begins_a_new_epoch(run_ahead: int) -> None:
    model = CountingModel()
    shadow, forecasts = shadow_of(model, run_ahead=run_ahead)
    shadow.begin(1, [[10]])
    work(shadow)
    shadow.tell(1, told(1, 40))
    work(shadow)
    before = max((forecast.epoch for forecast in forecasts), default=-1)
    forecasts.clear()
    shadow.begin(1, [[10, 40, 50]])
    work(shadow)
    shadow.tell(1, told(3, 51))
    work(shadow)
    assert read(forecasts)[0][::2] == (3, 51)
    assert all(forecast.epoch > before for forecast in forecasts)
    assert model.cache[1][:4] == [10, 40, 50, 51]


def test_a_sequence_that_ended_is_another_when_it_begins_again() -> None:
    shadow, forecasts = shadow_of(CountingModel(), run_ahead=1)
    for _ in range(2):
        shadow.begin(1, [[10]])
        work(shadow)
        shadow.end(1)
    assert read(forecasts) == [(1, 0, 11), (1, 0, 11)]


@dataclass
class Restarting:
    """Begins the sequence again in the middle of its first step."""

    seen: list[LayerForecast]
    shadow: Any = None

    def __call__(self, forecast: LayerForecast) -> None:
        if not self.seen:
            self.shadow.begin(1, [[10, 30]])
        self.seen.append(forecast)


@pytest.mark.parametrize("can_go_back", [True, False])
def test_a_step_under_way_is_left_when_its_sequence_begins_again(can_go_back: bool) -> None:
    model, hear = CountingModel(can_go_back=can_go_back), Restarting([])
    hear.shadow = shadow = Shadow(model, Alignment(run_ahead=1), hear)  # type: ignore[arg-type]
    shadow.begin(1, [[10]])
    shadow.tell(1, told(1, 11))
    work(shadow)
    shadow.tell(1, told(2, 31))
    work(shadow)
    steps = [(f.step.position, int(np.ravel(f.experts_TK)[0])) for f in hear.seen]
    assert steps[:3] == [(1, 11), (2, 31), (2, 31)]
    assert model.cache[1][:3] == [10, 30, 31]
