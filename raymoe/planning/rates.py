"""How often experts are at hand, foretold and guessed: measured on the embedded model, to be replaced by your own.

All of it is from docs/benchmarks.md ("importance", decision quality; "predictor"). The embedded model has 32 experts
and takes 4. Hit rates are by the share of a layer's experts that its slots hold, which is how they carry over best:
where experts are used evenly, and independently of the token before, a cache hits exactly that share. How much better
it does depends on the model. Measure yours for plans that hang on it.
"""

from bisect import bisect_right
from itertools import pairwise

Points = tuple[tuple[float, float], ...]

LRU: Points = ((0.0, 0.0), (0.125, 0.359), (0.25, 0.587), (0.375, 0.745), (0.5, 0.852), (1.0, 1.0))
SCORE: Points = ((0.0, 0.0), (0.125, 0.359), (0.25, 0.652), (0.375, 0.801), (0.5, 0.889), (1.0, 1.0))
CLAIRVOYANT: Points = ((0.0, 0.0), (0.125, 0.359), (0.25, 0.726), (0.375, 0.856), (0.5, 0.923), (1.0, 1.0))
SUBSTITUTED: dict[float, Points] = {
    0.0: SCORE,
    0.1: ((0.0, 0.0), (0.125, 0.379), (0.25, 0.675), (0.375, 0.821), (0.5, 0.905), (1.0, 1.0)),
    0.25: ((0.0, 0.0), (0.125, 0.410), (0.25, 0.709), (0.375, 0.847), (0.5, 0.921), (1.0, 1.0)),
    0.35: ((0.0, 0.0), (0.125, 0.434), (0.25, 0.731), (0.375, 0.861), (0.5, 0.931), (1.0, 1.0)),
    0.5: ((0.0, 0.0), (0.125, 0.475), (0.25, 0.763), (0.375, 0.881), (0.5, 0.942), (1.0, 1.0)),
}
"""By alpha; wider windows are taken as 0.5, beyond which nothing was measured."""

RECALL = {16: 0.9967, 8: 0.9990, 4: 0.9877, 3: 0.9748, 2: 0.9427}
AGREEMENT = {16: 0.992, 8: 0.997, 4: 0.971, 3: 0.938, 2: 0.861}
"""By bits of the shadow's experts, aligned at each step: experts named, and next tokens guessed at temperature 1."""


def interpolated(points: Points, share: float) -> float:
    """The rate at ``share``, on straight lines between the points; from (0, 0) and to (1, 1) where they end before."""
    if share <= 0:
        return 0.0
    inner = [(x, y) for x, y in points if 0 < x < 1]
    last = points[-1][1] if points and points[-1][0] >= 1 else 1.0
    known = [(0.0, 0.0), *inner, (1.0, last)]
    place = min(bisect_right([x for x, _ in known], share), len(known) - 1)
    (low, before), (high, after) = known[place - 1], known[place]
    return before + (after - before) * (min(share, high) - low) / (high - low)


def substituted(share: float, alpha: float) -> float:
    """Hit rate of importance scheduling at ``alpha``, between the windows that were measured."""
    alphas = sorted(SUBSTITUTED)
    alpha = min(alpha, alphas[-1])
    for low, high in pairwise(alphas):
        if low <= alpha <= high:
            below, above = (interpolated(SUBSTITUTED[end], share) for end in (low, high))
            return below + (above - below) * (alpha - low) / (high - low)
    return interpolated(SCORE, share)


def union(tokens: int, top_k: int, experts: float, lru: Points = LRU) -> float:
    """Distinct experts of a layer that so many consecutive tokens use.

    Those of one token more are among the ones before as often as a cache that holds just these would hit: that is what
    the curve of the least recently used one says.
    """
    distinct = float(min(top_k, experts))
    for _ in range(tokens - 1):
        if experts - distinct < 1e-3:
            return float(experts)
        distinct += top_k * (1.0 - interpolated(lru, distinct / experts))
        distinct = min(distinct, experts)
    return distinct
