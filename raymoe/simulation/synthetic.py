"""Routing traces out of thin air, for clusters and models that nobody has at hand.

Every layer has favourites: expert popularities fall as ``rank^-popularity`` (Zipf), in an order of its own. And routing
persists: with probability ``persistence`` an expert of the step before is chosen again, each for itself. Gate scores
fall geometrically over the chosen experts, the others share what is left, popular ones first.

On the embedded model's held-out text (docs/benchmarks.md, importance) LRU with slots for 2 x top-k of 32 experts has a
hit rate of 0.587 and the previous token names 0.38 of the experts; the defaults below give about that.

N steps, L MoE layers, E experts, K experts per token.
"""

from dataclasses import dataclass

import numpy as np

from raymoe.errors import ConfigError
from raymoe.simulation.shape import ModelShape
from raymoe.simulation.trace import RoutingTrace

SCORE_RATIO = 0.8  # of one chosen expert's gate score to the next better one's


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a synthetic model routes, and how well it is foretold.

    Attributes:
        popularity: exponent of Zipf's law; 0 is no favourites.
        persistence: probability that an expert of the step before is chosen again.
        recall: share of the chosen experts that the shadow names.
        agreement: share of the tokens that it guesses.
        seed: the same numbers give the same trace.

    Raises:
        ConfigError: a share that is none.
    """

    popularity: float = 0.6
    persistence: float = 0.3
    recall: float = 0.99
    agreement: float = 0.97
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("persistence", "recall", "agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is {getattr(self, name):g}; allowed is 0 to 1")
        if not 0 <= self.popularity <= 10:
            raise ConfigError(f"--popularity is {self.popularity:g}; allowed is 0 to 10")


def synthetic(shape: ModelShape, steps: int, habits: Habits | None = None) -> RoutingTrace:
    """A trace of ``steps`` decode steps."""
    habits = habits or Habits()
    random = np.random.default_rng(habits.seed)
    layers, experts = shape.layers, shape.experts
    rank_LE = random.permuted(np.tile(np.arange(1, experts + 1), (layers, 1)), axis=1)
    liking_LE = -habits.popularity * np.log(rank_LE)
    chosen_NLK = np.empty((steps, layers, shape.top_k), dtype=np.int32)
    for step in range(steps):
        # the largest of log weight + Gumbel noise are a draw without replacement (Gumbel-top-k)
        drawn_LE = liking_LE + random.gumbel(size=(layers, experts))
        if step:
            again_LK = random.random((layers, shape.top_k)) < habits.persistence
            bonus_LK = np.where(again_LK, 1e6, 0.0)
            held_LK = np.take_along_axis(drawn_LE, chosen_NLK[step - 1], axis=1)
            np.put_along_axis(drawn_LE, chosen_NLK[step - 1], held_LK + bonus_LK, axis=1)
        best_LK = np.argpartition(-drawn_LE, shape.top_k - 1, axis=1)[:, : shape.top_k]
        order_LK = np.argsort(-np.take_along_axis(drawn_LE, best_LK, axis=1), axis=1)
        chosen_NLK[step] = np.take_along_axis(best_LK, order_LK, axis=1)
    foretold_NLK = foretold(chosen_NLK, experts, habits.recall, random)
    about = {
        "source": "synthetic",
        **{name: f"{getattr(habits, name):g}" for name in ("popularity", "persistence", "recall", "agreement", "seed")},
    }
    return RoutingTrace(
        shape=shape,
        chosen_NLK=chosen_NLK,
        scores_NLE=_scores(chosen_NLK, liking_LE, random),
        foretold_NLK=foretold_NLK,
        guessed_N=random.random(steps) < habits.agreement,
        about=about,
    )


def foretold(chosen_NLK: np.ndarray, experts: int, recall: float, random: np.random.Generator) -> np.ndarray:
    """What a predictor of this recall names: each chosen expert with that probability, else another one."""
    right_NLK = random.random(chosen_NLK.shape) < recall
    found_NLK = np.where(right_NLK, chosen_NLK, -1)
    if experts == chosen_NLK.shape[-1]:
        return np.ascontiguousarray(chosen_NLK)
    for n, layer, k in np.argwhere(~right_NLK):  # few, for a predictor that is worth simulating
        others = np.setdiff1d(np.arange(experts), np.concatenate([chosen_NLK[n, layer], found_NLK[n, layer]]))
        if others.size:
            found_NLK[n, layer, k] = random.choice(others)
    return found_NLK.astype(np.int32)


def _scores(chosen_NLK: np.ndarray, liking_LE: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Gate scores that fit the choice; each layer's sum to 1."""
    steps, _, top_k = chosen_NLK.shape
    popular_LE = np.exp(liking_LE - liking_LE.max(axis=1, keepdims=True))
    worst = SCORE_RATIO ** (top_k - 1)
    scores_NLE = worst * popular_LE * random.random((steps, *liking_LE.shape))
    ratio_NLK = np.broadcast_to(SCORE_RATIO ** np.arange(top_k), chosen_NLK.shape)
    np.put_along_axis(scores_NLE, chosen_NLK.astype(np.int64), ratio_NLK, axis=2)
    return (scores_NLE / scores_NLE.sum(axis=2, keepdims=True)).astype(np.float16)
