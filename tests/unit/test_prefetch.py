"""What a forecast asks for: whom it names, what each is worth, who fetches it, and how far ahead."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.engine.scheduler import LayerTime
from raymoe.placement.prefetch import FARTHEST, lookahead, orders, wanted
from raymoe.types import DeviceName, ExpertKey

A, B, C = DeviceName("a"), DeviceName("b"), DeviceName("c")


def owners(*names: DeviceName, layer: int = 3) -> dict[ExpertKey, DeviceName]:
    return {ExpertKey(layer=layer, expert=expert): name for expert, name in enumerate(names)}


def named(*experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts, best first."""
    return np.array(experts), np.linspace(1.0, 0.5, len(experts), dtype=np.float32)


def test_one_token_wants_its_best_experts() -> None:
    scores = np.array([[0.1, 0.4, 0.2, 0.3]], dtype=np.float32)
    experts, worths = wanted(scores, scores, top_k=2)
    assert experts.tolist() == [1, 3]
    assert worths.tolist() == pytest.approx([1.4, 1.3])


def test_several_tokens_want_what_is_worth_most_in_the_mean() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=np.float32)
    experts, worths = wanted(scores, scores, top_k=1)
    assert experts.tolist() == [2, 0]
    assert worths.tolist() == pytest.approx([0.8, 0.75])


def test_a_forecast_is_split_by_owner_in_its_order() -> None:
    split = orders(3, *named(2, 0, 3, 1), owners(A, B, A, B), {A, B})
    assert {name: experts for name, (experts, _) in split.items()} == {A: [2, 0], B: [3, 1]}
    assert split[B][1] == pytest.approx([2 / 3, 0.5])


def test_owners_that_take_no_orders_and_experts_without_owner_are_left_out() -> None:
    assert orders(3, *named(0, 1, 7), owners(A, C), {A}) == {A: ([0], [1.0])}
    assert orders(2, *named(0, 1), owners(A, C), {A}) == {}
    assert orders(3, *named(), owners(A, C), {A}) == {}


@given(st.permutations(range(12)), st.integers(0, 12), st.lists(st.sampled_from([A, B, C]), min_size=12, max_size=12))
def test_everything_named_is_ordered_once_and_of_its_owner(
    order: list[int], count: int, names: list[DeviceName]
) -> None:
    experts, worths = named(*order[:count])
    split = orders(3, experts, worths, owners(*names), {A, B, C})
    told = [(expert, worth) for mine, scores in split.values() for expert, worth in zip(mine, scores, strict=True)]
    assert sorted(told) == sorted(zip(experts.tolist(), worths.tolist(), strict=True))
    assert all(names[expert] == name for name, (mine, _) in split.items() for expert in mine)


@pytest.mark.parametrize(
    ("load_s", "layer_s", "layers"),
    [(None, 1e-3, 1), (1e-3, None, 1), (0.0, 1e-3, 1), (1e-6, 1e-3, 1), (1.0, 1e-3, FARTHEST)],
)
def test_how_far_to_look_ahead_has_its_bounds(load_s: float | None, layer_s: float | None, layers: int) -> None:
    assert lookahead(load_s, layer_s) == layers


def test_a_load_begins_earlier_the_longer_it_takes() -> None:
    ahead = [lookahead(load_s, 1e-3) for load_s in (0.1e-3, 1e-3, 2e-3, 4e-3)]
    assert ahead == sorted(ahead)


def test_idle_time_between_requests_is_no_layer_time() -> None:
    times = LayerTime()
    for step_s in (0.0, 60.0):
        for layer in range(4):
            times.layer(layer, step_s + layer * 0.005, 1)
    assert times.mean_s == pytest.approx(0.005)
