"""How long an answer may take before its worker is doubted."""

from raymoe.placement.patience import FIRST_S, FLOOR_S, TIMES, Patience


def test_before_anything_was_measured_it_is_long_and_never_below_the_floor() -> None:
    patience = Patience()
    assert patience.limit_s(4, 0) == FIRST_S
    patience.note(0.001, 0.0005, 4, 0)
    assert patience.limit_s(4, 0) == FLOOR_S


def test_it_follows_what_calls_took_by_pairs_and_loads() -> None:
    patience = Patience()
    patience.note(0.05, 0.01, 10, 0)  # 40 ms on the way, 1 ms a pair
    patience.note(0.22, 0.02, 20, 2)  # 100 ms a load
    assert abs(patience.limit_s(100, 3) - TIMES * (0.04 + 0.1 + 0.3)) < 1e-9


def test_a_peak_wears_off() -> None:
    patience = Patience()
    patience.note(1.0, 0.0, 1, 0)
    for _ in range(200):
        patience.note(0.001, 0.0, 1, 0)
    assert patience.limit_s(1, 0) == FLOOR_S
