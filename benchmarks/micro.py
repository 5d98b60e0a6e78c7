"""Microseconds per decision: routing with substitution, scores, victims, and the split between link and host.

Routing is for 128 experts and top-8, at 1 and at 64 tokens. ``route_t1_us`` and ``route_t64_us`` are the worst case:
all eight choices of every token are missing, low-score, and replaced, with half of all experts in the window. At most
100 µs and 1 ms are meant to go into a layer. The other figures say what less work costs.

    python -m benchmarks.micro [--quick] [--json PATH]
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core, as a decision has it

import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness import arguments, figure, in_turns, report
from raymoe.placement.eviction import ScoreWindow, UseCounts, least_recently_used, lowest_value
from raymoe.placement.host_assist import fastest_split, two_ended_walk
from raymoe.placement.routing import route
from raymoe.placement.similarity import MatrixSimilarity

LAYERS, EXPERTS, TOP_K = 24, 128, 8
SLOTS = LAYERS * 2 * TOP_K
BATCHES = (1, 64)
ALPHA, NARROW_ALPHA = 0.25, 0.01  # with the narrow one, every choice of the examples is top-score
SLICE_S = 0.01  # seconds of calls behind one value; a figure is the median of many

Action = Callable[[], object]


def routing(tokens: int, missing: int, alpha: float = ALPHA, similarity: MatrixSimilarity | None = None) -> Action:
    """``route`` for tokens that each miss ``missing`` low-score experts and find a substitute for each.

    Missing experts are even ones of the lower half, the others odd ones of it: top-score and resident. The upper half
    is resident, not chosen, and in the window.
    """
    random = np.random.default_rng(0)
    even, odd = np.arange(0, EXPERTS // 2, 2), np.arange(1, EXPERTS // 2, 2)
    chosen_TK = np.array(
        [[*random.permutation(even)[:missing], *random.permutation(odd)[: TOP_K - missing]] for _ in range(tokens)]
    )
    scores_TE = random.uniform(0.008, 0.010, size=(tokens, EXPERTS)).astype(np.float32)
    scores_TE[:, : EXPERTS // 2] = 0.004
    np.put_along_axis(scores_TE, chosen_TK, np.where(chosen_TK % 2 == 0, 0.0105, 0.1).astype(np.float32), axis=1)
    available_E = np.ones(EXPERTS, dtype=bool)
    available_E[chosen_TK[:, :missing]] = False
    alpha_T = np.full(tokens, alpha, dtype=np.float32)

    result = route(scores_TE, chosen_TK, available_E, alpha_T, similarity=similarity)
    expected = missing if alpha == ALPHA else 0
    assert (result.replaced_TK.sum(axis=1) == expected).all(), "the example is what it claims to be"
    return lambda: route(scores_TE, chosen_TK, available_E, alpha_T, similarity=similarity)


def routing_cases() -> dict[str, tuple[Action, str]]:
    """Every routing figure: what to time, and what it is."""
    random = np.random.default_rng(0)
    matrix_LEE = random.random((1, EXPERTS, EXPERTS), dtype=np.float32)
    similarity = MatrixSimilarity(matrix_LEE, np.zeros((1, EXPERTS), dtype=bool))
    cases: dict[str, tuple[Action, str]] = {}
    for tokens in BATCHES:
        name = f"route_t{tokens}"
        cases |= {
            f"{name}_us": (routing(tokens, TOP_K), f"all {TOP_K} replaced, by score"),
            f"{name}_similarity_us": (routing(tokens, TOP_K, similarity=similarity), f"all {TOP_K}, by a matrix"),
            f"{name}_replaced_4_us": (routing(tokens, 4), "4 missing and replaced"),
            f"{name}_replaced_1_us": (routing(tokens, 1), "1 missing and replaced"),
            f"{name}_top_score_us": (routing(tokens, 1, NARROW_ALPHA), "1 missing, but top-score"),
            f"{name}_resident_us": (routing(tokens, 0), "none missing"),
            f"{name}_exact_us": (routing(tokens, TOP_K, 0.0), "alpha = 0"),
        }
    return cases


def other_cases() -> dict[str, tuple[Action, str]]:
    """The figures of eviction and of host assist."""
    random = np.random.default_rng(0)
    scores_E = random.random(EXPERTS, dtype=np.float32)
    used_K = np.arange(TOP_K)
    window, counts = ScoreWindow(LAYERS, EXPERTS, 8), UseCounts(LAYERS, EXPERTS)
    layers_S, experts_S = random.integers(LAYERS, size=SLOTS), random.integers(EXPERTS, size=SLOTS)
    evictable_S = random.random(SLOTS) < 0.9
    last_use_S = random.permutation(SLOTS)
    missing = np.arange(TOP_K, 0, -1) / 100
    remaining_s = np.where(np.arange(TOP_K) % 2 == 0, np.nan, 0.002)
    return {
        "observe_scores_us": (lambda: window.observe(0, scores_E), "a layer's scores into the window of 8"),
        "observe_uses_us": (lambda: counts.observe(0, used_K), "a layer's uses, for LFU"),
        "victim_score_us": (
            lambda: lowest_value(window.mean_LE[layers_S, experts_S], evictable_S),
            f"of {SLOTS} slots, values gathered",
        ),
        "victim_lru_us": (lambda: least_recently_used(last_use_S, evictable_S), f"of {SLOTS} slots"),
        "host_walk_us": (lambda: two_ended_walk(missing, 0.003, 0.001), f"{TOP_K} missing"),
        "host_split_us": (lambda: fastest_split(missing, 0.003, 0.001), f"{TOP_K} missing"),
        "host_split_in_flight_us": (
            lambda: fastest_split(missing, 0.003, 0.001, load_worth_s=missing, remaining_s=remaining_s),
            f"{TOP_K} missing, half of them in flight, with worth",
        ),
    }


def timed(action: Action) -> Callable[[], float]:
    """A variant for ``in_turns``: the mean microseconds of ``action`` over a slice of calls."""
    action()
    start = time.perf_counter()
    action()
    calls = max(1, int(SLICE_S / (time.perf_counter() - start)))

    def variant() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - start) / calls * 1e6

    return variant


def main() -> None:
    """Measure everything and report it."""
    options = arguments(__doc__ or "")
    cases = routing_cases() | other_cases()
    rounds = 20 if options.quick else 60
    values = in_turns({name: timed(action) for name, (action, _) in cases.items()}, rounds)
    figures = [figure(name, values[name], "µs", note) for name, (_, note) in cases.items()]
    settings = {"experts": EXPERTS, "top_k": TOP_K, "layers": LAYERS, "slots": SLOTS, "rounds": rounds}
    report("Cost of deciding", figures, settings, options.json)


if __name__ == "__main__":
    main()
