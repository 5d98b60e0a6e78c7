"""How well predictors foretell routing: recall, step by step, on given text or on what the model itself says.

The model runs on this CPU with all of its experts at hand. B rows decode in lockstep; a predictor follows them, and
what it named for a layer before the model got there is compared with what the router chose (OD-MoE, arXiv 2512.03927,
equations 2 and 3).

B rows, N steps, L MoE layers, K experts per token, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from predictor.gate import GateForecast
from predictor.predictor import HistoryPredictor, LookaheadPredictor, Predictor, ShadowPredictor
from predictor.shadow import Guess, Rows
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import ModelConfig, PredictorConfig
from raymoe.engine.host_experts import HostExperts
from raymoe.engine.shadow_host import alignment_of, build_shadow_model
from raymoe.errors import ConfigError
from raymoe.model.fast import use_native_kernels
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite, attach_sites
from raymoe.model.trunk import build_trunk

BLOCK = 64  # steps whose mean counts as one sample: routing of neighbouring tokens is alike
PREFIX = 8  # tokens of each text that are read at once before the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Shares of the chosen experts that were named, with NaN where the predictor names none by nature.

    Attributes:
        recall_BNL: of each row, step and layer.
        agreement: share of the shadow's own next tokens that were the model's; None for other kinds.
        bytes_per_token: of keys and values given to the predictor, per token.
    """

    recall_BNL: np.ndarray
    agreement: float | None
    bytes_per_token: float

    @property
    def mean(self) -> float:
        """Over all."""
        return float(np.nanmean(self.recall_BNL))

    @property
    def interval(self) -> float:
        """Half the width of the mean's 95% interval, from the spread of blocks of steps."""
        blocks = [
            float(np.nanmean(row_NL[start : start + BLOCK]))
            for row_NL in self.recall_BNL
            for start in range(0, row_NL.shape[0], BLOCK)
        ]
        return 1.96 * float(np.std(blocks, ddof=1)) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.nan

    def by_step(self) -> np.ndarray:
        """Float64 [N], over rows and layers."""
        return np.nanmean(self.recall_BNL, axis=(0, 2))

    def by_layer(self) -> np.ndarray:
        """Float64 [L]; NaN for layers that the predictor can't name."""
        return np.array(
            [
                math.nan if np.isnan(self.recall_BNL[:, :, layer]).all() else np.nanmean(self.recall_BNL[:, :, layer])
                for layer in range(self.recall_BNL.shape[2])
            ]
        )


@dataclass(slots=True)
class Watch:
    """An ``ExpertBackend`` that computes experts at hand, and notes what was routed where.

    Attributes:
        routed: experts [T, K] by layer, of the forward under way.
        during: called with each layer before its experts are computed.
    """

    experts: HostExperts
    routed: list[np.ndarray] = field(default_factory=list)
    during: Callable[[int], None] = lambda layer: None

    def route(
        self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The router's own choice."""
        self.routed.append(experts_TK.numpy().copy())
        return experts_TK, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """Unweighted output of every chosen expert for every token, [T, K, H]."""
        self.during(layer)
        return self.experts.of_tokens(layer, hidden_TH, experts_TK)


class Model:
    """The model whose routing is foretold.

    Attributes:
        sites: its MoE layers, for forecasts that look at them.
        top_k: experts per token of each layer.
    """

    def __init__(self, checkpoint: Checkpoint, kept_bytes: int) -> None:
        self._watch = Watch(HostExperts(checkpoint, kept_bytes))
        trunk = build_trunk(checkpoint, self._watch, torch.device("cpu"))
        native = use_native_kernels(trunk) > 0
        self.sites: list[MoeSite] = attach_sites(trunk)
        self.top_k = [layer.top_k for layer in checkpoint.layers]
        self.runner = Runner(trunk, single_threaded_decode=native)

    def evaluate(
        self,
        predictor: Predictor,
        prompts: Sequence[Sequence[int]],
        following: Guess,
        steps: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Recall:
        """Decode ``steps`` tokens after prompts of one length, in lockstep."""
        rows = [list(prompt) for prompt in prompts]
        counts: Any = getattr(predictor, "counts", None)
        before = (counts.guesses, counts.right) if counts is not None else (0, 0)
        sent_before = predictor.bytes_sent
        self._watch.during = lambda layer: None
        logits_BV, state = self.runner.start(rows)
        predictor.begin(rows)
        named: dict[int, np.ndarray] = {}
        self._watch.during = lambda layer: named.update(predictor.during(layer))
        recall_BNL = np.full((len(rows), steps, len(self.top_k)), np.nan)
        for step in range(steps):
            tokens = following(step, logits_BV)
            self._watch.routed = []
            named.clear()
            named.update(predictor.before(state.length, tokens, state.kwargs.get("past_key_values")))
            logits_BV = self.runner.go_on(state, list(tokens))
            for layer, experts_BK in enumerate(self._watch.routed):
                if layer in named:
                    recall_BNL[:, step, layer] = recalled(experts_BK, named[layer])
            predictor.after(tokens, self._watch.routed)
            on_step()
        self._watch.during = lambda layer: None
        guesses = counts.guesses - before[0] if counts is not None else 0
        return Recall(
            recall_BNL=recall_BNL,
            agreement=(counts.right - before[1]) / guesses if guesses else None,
            bytes_per_token=(predictor.bytes_sent - sent_before) / (steps * len(rows)),
        )


def forced(rows: Sequence[Sequence[int]]) -> Guess:
    """Given text: the tokens after the prompt."""
    return lambda step, logits_BV: tuple(row[step] for row in rows)


class Sampled:
    """What the model itself says at temperature 1, the same each time.

    Noise is added to the logits and the largest taken (Gumbel's way to sample): a shadow that guesses with the same
    noise would choose as the model does where their logits are alike.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._noise: tuple[int, torch.Tensor] | None = None  # of the last step: model and shadows ask for the same

    def __call__(self, step: int, logits_BV: torch.Tensor) -> Rows:
        """The model's choice."""
        noise_BV = self._noise_of(step, logits_BV.shape)
        return tuple((torch.log_softmax(logits_BV.float().cpu(), dim=-1) + noise_BV).argmax(dim=-1).tolist())

    def _noise_of(self, step: int, shape: torch.Size) -> torch.Tensor:
        if self._noise is None or self._noise[0] != step or self._noise[1].shape != shape:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            self._noise = step, -torch.empty(shape).exponential_(generator=generator).log()
        return self._noise[1]


def joined(parts: Sequence[Recall]) -> Recall:
    """Several evaluations of as many steps as one."""
    agreements = [part.agreement for part in parts if part.agreement is not None]
    return Recall(
        recall_BNL=np.concatenate([part.recall_BNL for part in parts]),
        agreement=float(np.mean(agreements)) if agreements else None,
        bytes_per_token=float(np.mean([part.bytes_per_token for part in parts])),
    )


def recalled(chosen_BK: np.ndarray, named_BN: np.ndarray) -> np.ndarray:
    """Share of each row's chosen experts that were named, [B]."""
    return (chosen_BK[:, :, None] == named_BN[:, None, :]).any(axis=2).mean(axis=1)


def make_predictor(
    config: PredictorConfig, model: Model, source: ModelConfig, *, ahead: int, guess: Guess
) -> Predictor:
    """A predictor of the configured kind for a model under evaluation.

    Args:
        ahead: layers that kind gate looks ahead.
        guess: how a shadow chooses its own next token.
    """
    routers = [site.router for site in model.sites]
    if config.kind == "shadow":
        lockstep = config.model_copy(update={"run_ahead": False})
        return ShadowPredictor(build_shadow_model(source, lockstep), alignment_of(lockstep), guess)
    if config.kind == "history":
        return HistoryPredictor(len(routers), max(router.experts for router in routers), model.top_k)
    if config.kind == "gate":
        gate = GateForecast([site if site.router.rule is not None else None for site in model.sites])
        return LookaheadPredictor(gate, routers, ahead, model.top_k)
    raise ConfigError(
        "--kind resident forecasts from the slots of a device that lacks some experts, so its recall depends on them: "
        '`result.routing.recall` of a configuration with predictor.kind "resident" tells it; allowed here are '
        "shadow, gate and history"
    )
