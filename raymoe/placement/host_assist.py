"""Missing experts: which to load over the link, which to compute on the host's CPU meanwhile.

Two rules, both pure. ``two_ended_walk`` is the published one (SMoE, arXiv 2508.18983, algorithm 2), kept as the
baseline. ``fastest_split`` finds the exact optimum: loads all take as long, and so do computations, so that it is
enough to try how many experts are loaded and how many of those in flight the host takes over.

N missing experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True, slots=True)
class Split:
    """What happens to each missing expert; in neither tuple: it is in flight already, and waited for.

    Attributes:
        load: experts to load, in the order in which to start.
        host: experts to compute on the host.
        finish_s: when the last of all is loaded or computed, in seconds from now.
    """

    load: tuple[int, ...]
    host: tuple[int, ...]
    finish_s: float


def two_ended_walk(scores_N: np.ndarray, load_s: float, host_s: float | None) -> Split:
    """Walk the experts, sorted by score, from both ends: the best to the link, the rest to the host.

    Whichever side would have less to do until now takes the next one, the link in case of a tie; so the link always
    gets a lone miss, even where the host is faster.

    Args:
        scores_N: gate scores; ties go to the lower index.
        load_s: seconds to load one expert, as measured lately.
        host_s: seconds to compute one on the host; None where it has no core to spare.
    """
    order = np.argsort(-scores_N, kind="stable").tolist()
    if host_s is None:
        return Split(tuple(order), (), len(order) * load_s)
    loads = hosted = 0
    while loads + hosted < len(order):
        if loads * load_s <= hosted * host_s:
            loads += 1
        else:
            hosted += 1
    return Split(tuple(order[:loads]), tuple(order[loads:]), max(loads * load_s, hosted * host_s))


def fastest_split(
    scores_N: np.ndarray,
    load_s: float,
    host_s: float | None,
    *,
    link_busy_s: float = 0.0,
    host_busy_s: float = 0.0,
    load_worth_s: np.ndarray | None = None,
    remaining_s: np.ndarray | None = None,
) -> Split:
    """The split that minimises the time until all are done, less what the loads are worth later. Exact.

    ``max(link_busy_s + loads·load_s, host_busy_s + hosted·host_s, longest wait for one in flight) - Σ worth``, where
    a side without work does not count. Among equals: more loads, for they stay useful; then less work on the host.

    Args:
        scores_N: gate scores; of experts worth the same the better-scored are loaded, and first.
        load_s: seconds to load one expert.
        host_s: seconds to compute one on the host; None where it has no core to spare: everything is loaded.
        link_busy_s: seconds until the link is free for these loads, experts in flight included.
        host_busy_s: seconds until the host is free.
        load_worth_s: seconds that each expert saves later by being loaded; None: nothing.
        remaining_s: for experts in flight the seconds until they are there; NaN for the others; None: none is in
            flight. They are not loaded again; the host may compute them if that is faster, and they arrive anyway.
    """
    worth_N = np.zeros(len(scores_N)) if load_worth_s is None else load_worth_s
    new, flying, waits = np.lexsort((-scores_N, -worth_N)).tolist(), [], [0.0]  # the sort is stable: then by index
    if remaining_s is not None:
        left = remaining_s.tolist()
        flying = sorted((n for n in new if not math.isnan(left[n])), key=lambda n: -left[n])
        new = [n for n in new if math.isnan(left[n])]
        waits = [*(left[n] for n in flying), 0.0]
    if host_s is None:
        return Split(_by_score(new, scores_N), (), max(_busy_s(len(new), link_busy_s, load_s), waits[0]))

    best_cost, best = math.inf, (0, 0, 0.0)
    gains = list(accumulate(worth_N[new].tolist(), initial=0.0))
    for loads in range(len(new), -1, -1):
        link_s = _busy_s(loads, link_busy_s, load_s)
        for taken, wait_s in enumerate(waits):  # the host takes over those that are longest in coming
            finish_s = max(link_s, _busy_s(len(new) - loads + taken, host_busy_s, host_s), wait_s)
            if finish_s - gains[loads] < best_cost:
                best_cost, best = finish_s - gains[loads], (loads, taken, finish_s)
            if finish_s > wait_s:
                break  # waiting is no longer what takes longest
    loads, taken, finish_s = best
    return Split(_by_score(new[:loads], scores_N), _by_score([*new[loads:], *flying[:taken]], scores_N), finish_s)


def _busy_s(count: int, busy_s: float, each_s: float) -> float:
    """Seconds until ``count`` tasks are done; 0 where there is nothing to do."""
    return busy_s + count * each_s if count else 0.0


def _by_score(experts: Sequence[int], scores_N: np.ndarray) -> tuple[int, ...]:
    scores = scores_N.tolist()
    return tuple(sorted(experts, key=lambda n: (-scores[n], n)))
