"""What engine and shadow tell each other, as frames: tokens and KV entries go there; plans or forecasts, and drafts,
come back.

Plans where the shadow itself tells workers what to load, forecasts with scores where the engine decides.
"""

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from predictor.forecast import LayerForecast
from raymoe.errors import FrameError
from raymoe.transport.frames import Buffer, Header, Kind, Limits, Message, exact_frames
from raymoe.types import SamplingRecipe, StepId

MOST_TOKENS = 1 << 20  # of a prompt
MOST_DRAFTS = 64  # that one pass reads; a configuration allows fewer
RECIPE = struct.Struct("<Qq6d")  # the fields of a SamplingRecipe in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A sequence begins: the model reads this prompt.

    Attributes:
        recipe: by which its next tokens are chosen, the first with ``first`` as its number; None: greedily.
        coming: drafts that the first passes will read at most.
    """

    sequence: int
    tokens: tuple[int, ...]
    recipe: SamplingRecipe | None = None
    first: int = 0
    coming: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """The model is about to read ``token`` at ``step.position``, and drafts at the positions after it.

    Attributes:
        drafts: of the shadow that this pass reads along.
        coming: drafts that the passes to come will read, as far as is known now.
        start: first position of the keys and values that come along; count: of how many positions, 0 for none.
        entries: their bytes, in ``dtype``, as ``raymoe.model.kv`` packs them.
    """

    step: StepId
    token: int
    start: int = 0
    drafts: int = 0
    coming: int = 0
    count: int = 0
    dtype: torch.dtype = torch.float32
    entries: Buffer = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A sequence is finished."""

    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which experts a step is expected to need in a layer, and which worker was told to load each.

    Attributes:
        experts_N: int32, those needed most first.
        workers_N: int32, places in the configuration's list of devices.
    """

    step: StepId
    epoch: int
    layer: int
    experts_N: np.ndarray
    workers_N: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The shadow takes ``token`` for the one that the model will read at ``step.position``.

    Attributes:
        epoch: a draft of a later one makes void what earlier ones said of its position and those after it.
    """

    step: StepId
    epoch: int
    token: int


News = Begin | Token | End
"""What the engine tells."""

FromShadow = Plan | LayerForecast | Draft
"""What the shadow tells."""


def pack_news(news: News) -> Message:
    """A message to the shadow."""
    if isinstance(news, Begin):
        tokens = np.array(news.tokens, dtype=np.int32)
        recipe = b"" if news.recipe is None else RECIPE.pack(*astuple(news.recipe))
        header = Header(
            kind=Kind.BEGIN,
            dtype=torch.float32,
            request=0,
            a=news.sequence,
            b=len(tokens),
            c=int(news.recipe is not None),
            d=news.first,
            e=news.coming,
        )
        return [header.pack(), tokens.data, recipe]
    if isinstance(news, End):
        return [Header(kind=Kind.END, dtype=torch.float32, request=0, a=news.sequence).pack()]
    header = Header(
        kind=Kind.TOKEN,
        dtype=news.dtype,
        request=0,
        a=news.step.sequence,
        b=news.step.position,
        c=news.token,
        d=news.start,
        e=news.count,
        rows=news.drafts,
        pairs=news.coming,
        big=len(memoryview(news.entries).cast("B")) if news.count else 0,
    )
    return [header.pack(), news.entries] if news.count else [header.pack()]


def parse_news(header: Header, body: Sequence[Buffer], limits: Limits) -> News:
    """What the engine told. Raises FrameError for what is malformed."""
    if header.kind is Kind.BEGIN:
        if not 0 < header.b <= MOST_TOKENS:
            raise FrameError(f"a prompt of {header.b:,} tokens; allowed is 1 to {MOST_TOKENS:,}")
        frames = exact_frames(body, [4 * header.b, RECIPE.size if header.c else 0], limits)
        tokens = np.frombuffer(frames[0], dtype=np.int32)
        if tokens.min() < 0:
            raise FrameError("token ids can't be negative")
        names = SamplingRecipe.__dataclass_fields__
        recipe = SamplingRecipe(**dict(zip(names, RECIPE.unpack(frames[1]), strict=True))) if header.c else None
        _check_drafts(header.e, 0)
        return Begin(sequence=header.a, tokens=tuple(tokens.tolist()), recipe=recipe, first=header.d, coming=header.e)
    if header.kind is Kind.END:
        exact_frames(body, [], limits)
        return End(sequence=header.a)
    if header.kind is not Kind.TOKEN:
        raise FrameError(f"{header.kind.name} does not belong on the shadow's socket")
    if bool(header.e) != bool(header.big) or header.d + header.e > header.b:
        raise FrameError(f"keys and values of {header.e} positions from {header.d} on, before position {header.b}")
    _check_drafts(header.rows, header.pairs)
    frames = exact_frames(body, [header.big] if header.e else [], limits)
    return Token(
        step=StepId(sequence=header.a, position=header.b),
        token=header.c,
        drafts=header.rows,
        coming=header.pairs,
        start=header.d,
        count=header.e,
        dtype=header.dtype,
        entries=frames[0] if frames else b"",
    )


def _check_drafts(drafts: int, coming: int) -> None:
    if max(drafts, coming) > MOST_DRAFTS:
        raise FrameError(f"{drafts:,} drafts now and {coming:,} to come; allowed are {MOST_DRAFTS}")


def pack_plan(plan: Plan) -> Message:
    """A message to the engine."""
    header = Header(
        kind=Kind.PLAN,
        dtype=torch.float32,
        request=0,
        layer=plan.layer,
        a=plan.step.sequence,
        b=plan.step.position,
        c=plan.epoch,
        d=len(plan.experts_N),
    )
    return [
        header.pack(),
        np.ascontiguousarray(plan.experts_N, dtype=np.int32).data,
        np.ascontiguousarray(plan.workers_N, dtype=np.int32).data,
    ]


def parse_plan(header: Header, body: Sequence[Buffer], limits: Limits, workers: int) -> Plan:
    """The plan in a message. Raises FrameError where indices are wrong."""
    if header.kind is not Kind.PLAN:
        raise FrameError(f"{header.kind.name} is no plan")
    if header.layer >= limits.layers or header.d > limits.experts:
        raise FrameError(f"a plan of {header.d:,} experts for layer {header.layer}")
    frames = exact_frames(body, [4 * header.d, 4 * header.d], limits)
    experts, chosen = np.frombuffer(frames[0], dtype=np.int32), np.frombuffer(frames[1], dtype=np.int32)
    if header.d and (
        experts.min() < 0 or experts.max() >= limits.experts or chosen.min() < 0 or chosen.max() >= workers
    ):
        raise FrameError(
            f"a plan's experts lie within 0 and {limits.experts - 1}, its workers within 0 and {workers - 1}"
        )
    step = StepId(sequence=header.a, position=header.b)
    return Plan(step=step, epoch=header.c, layer=header.layer, experts_N=experts, workers_N=chosen)


def pack_foretold(forecast: LayerForecast) -> Message:
    """A forecast with its scores, to the engine."""
    header = Header(
        kind=Kind.FORETOLD,
        dtype=torch.float32,
        request=0,
        layer=forecast.layer,
        rows=len(forecast.scores_TE),
        a=forecast.step.sequence,
        b=forecast.step.position,
        c=forecast.epoch,
        d=forecast.experts_TK.shape[1],
        e=forecast.scores_TE.shape[1],
    )
    return [
        header.pack(),
        np.ascontiguousarray(forecast.experts_TK, dtype=np.int32).reshape(-1).data,
        np.ascontiguousarray(forecast.scores_TE, dtype=np.float32).reshape(-1).data,
    ]


def parse_foretold(header: Header, body: Sequence[Buffer], limits: Limits) -> LayerForecast:
    """The forecast in a message. Raises FrameError where sizes, experts or scores are wrong."""
    if header.kind is not Kind.FORETOLD:
        raise FrameError(f"{header.kind.name} is no forecast")
    rows, top_k, experts = header.rows, header.d, header.e
    if header.layer >= limits.layers or not rows or not 0 < experts <= limits.experts or top_k > experts:
        raise FrameError(f"a forecast of {top_k:,} of {experts:,} experts in {rows:,} rows for layer {header.layer}")
    frames = exact_frames(body, [4 * rows * top_k, 4 * rows * experts], limits)
    experts_TK = np.frombuffer(frames[0], dtype=np.int32).reshape(rows, top_k).astype(np.int64)
    scores_TE = np.frombuffer(frames[1], dtype=np.float32).reshape(rows, experts)
    if top_k and (experts_TK.min() < 0 or experts_TK.max() >= experts):
        raise FrameError(f"a forecast's experts lie within 0 and {experts - 1}")
    if not np.isfinite(scores_TE).all():
        raise FrameError("a forecast's scores must be finite")
    step = StepId(sequence=header.a, position=header.b)
    return LayerForecast(step=step, epoch=header.c, layer=header.layer, experts_TK=experts_TK, scores_TE=scores_TE)


def pack_draft(draft: Draft) -> Message:
    """A message to the engine."""
    header = Header(
        kind=Kind.DRAFT,
        dtype=torch.float32,
        request=0,
        a=draft.step.sequence,
        b=draft.step.position,
        c=draft.epoch,
        d=draft.token,
    )
    return [header.pack()]


def parse_draft(header: Header, body: Sequence[Buffer], limits: Limits) -> Draft:
    """The draft in a message. Whether there is such a token, only the engine knows."""
    if header.kind is not Kind.DRAFT:
        raise FrameError(f"{header.kind.name} is no draft")
    exact_frames(body, [], limits)
    return Draft(step=StepId(sequence=header.a, position=header.b), epoch=header.c, token=header.d)


def pack_from_shadow(told: FromShadow) -> Message:
    """A message to the engine."""
    if isinstance(told, Draft):
        return pack_draft(told)
    return pack_foretold(told) if isinstance(told, LayerForecast) else pack_plan(told)


def parse_from_shadow(header: Header, body: Sequence[Buffer], limits: Limits, workers: int) -> FromShadow:
    """What the shadow told. Raises FrameError for what is malformed."""
    if header.kind is Kind.DRAFT:
        return parse_draft(header, body, limits)
    if header.kind is Kind.FORETOLD:
        return parse_foretold(header, body, limits)
    return parse_plan(header, body, limits, workers)
