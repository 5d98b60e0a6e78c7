"""Whole messages of every kind, as they arrive: what mutations begin with."""

import numpy as np
import torch

from predictor.forecast import LayerForecast
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, expert_id
from raymoe.transport.frames import (
    DTYPES,
    Header,
    Kind,
    pack_answer,
    pack_call,
    pack_experts,
    pack_forecast,
    pack_forget,
    pack_order,
    pack_text,
)
from raymoe.transport.shadow_messages import (
    Begin,
    Draft,
    End,
    Plan,
    Token,
    pack_from_shadow,
    pack_news,
)
from raymoe.types import SamplingRecipe, StepId
from tests.frames import LIMITS, Frames, wire

WORKERS = 5


def corpus(random: np.random.Generator) -> list[Frames]:
    """Several valid messages of each kind."""
    return [wire(message) for _ in range(4) for message in (*_of_workers(random), *_of_the_shadow(random))]


def _of_workers(random: np.random.Generator) -> list[list]:
    rows, hidden, pairs = (int(random.integers(1, most)) for most in (9, 17, 25))
    dtype = DTYPES[random.integers(len(DTYPES))]
    layer, ids = int(random.integers(LIMITS.layers)), _ids(random, 6)
    call = ExpertCall(
        layer=layer,
        hidden_RH=torch.from_numpy(random.random((rows, hidden), dtype=np.float32)).to(dtype),
        experts_P=random.integers(0, LIMITS.experts, pairs, dtype=np.int32),
        rows_P=random.integers(0, rows, pairs, dtype=np.int32),
        scores_E=random.random(LIMITS.experts, dtype=np.float32) if random.random() < 0.5 else None,
        step=_step(random) if random.random() < 0.5 else None,
    )
    answer = ExpertAnswer(
        output_PH=torch.from_numpy(random.random((pairs, hidden), dtype=np.float32)).to(dtype),
        hits=pairs,
        loads=2,
        bytes_loaded=1 << 40,
        loaded=tuple(ids[:4]),
        evicted=tuple(ids[4:]),
        load_s=0.5,
        compute_s=0.001,
    )
    experts = random.integers(0, LIMITS.experts, 5, dtype=np.int32)
    order = LoadOrder(step=_step(random), epoch=1, layer=layer, experts=experts)
    return [
        pack_call(1, call),
        pack_answer(2, answer),
        pack_text(Kind.ERROR, 3, "ValueError: expert 3 is unreadable"),
        [Header(kind=Kind.PING, dtype=torch.float32, request=4).pack()],
        pack_experts(Kind.PREFETCH, 5, ids, [0.5] * len(ids)),
        pack_experts(Kind.RESIDENCY, 0, ids, [1.0] * len(ids), "edge-0"),
        pack_forecast(layer, experts, random.random(5, dtype=np.float32)),
        pack_order(order),
        pack_forget(1 << 40),
    ]


def _of_the_shadow(random: np.random.Generator) -> list[list]:
    step = _step(random)
    tokens = tuple(random.integers(0, 1 << 31, random.integers(1, 40)).tolist())
    recipe = SamplingRecipe(
        seed=1, top_k=40, temperature=0.8, top_p=0.9, min_p=0.0, repetition_penalty=1.1,
        presence_penalty=0.0, frequency_penalty=0.0,
    )  # fmt: skip
    rows, experts = int(random.integers(1, 4)), int(random.integers(1, LIMITS.experts + 1))
    top_k = int(random.integers(1, experts + 1))
    foretold = LayerForecast(
        step=step,
        epoch=1,
        layer=int(random.integers(LIMITS.layers)),
        experts_TK=np.stack([random.permutation(experts)[:top_k] for _ in range(rows)]),
        scores_TE=random.random((rows, experts), dtype=np.float32),
    )
    plan = Plan(
        step=step,
        epoch=1,
        layer=int(random.integers(LIMITS.layers)),
        experts_N=random.integers(0, LIMITS.experts, 4, dtype=np.int32),
        workers_N=random.integers(0, WORKERS, 4, dtype=np.int32),
    )
    entries = random.bytes(48)
    return [
        pack_news(Begin(sequence=1, tokens=tokens)),
        pack_news(Begin(sequence=1, tokens=tokens, recipe=recipe, first=3, coming=2)),
        pack_news(Token(step=step, token=7, drafts=2, coming=1)),
        pack_news(Token(step=StepId(sequence=1, position=9), token=7, start=3, count=4, entries=entries)),
        pack_news(End(sequence=2)),
        pack_from_shadow(plan),
        pack_from_shadow(foretold),
        pack_from_shadow(Draft(step=step, epoch=1, token=5)),
    ]


def _step(random: np.random.Generator) -> StepId:
    return StepId(sequence=int(random.integers(1 << 32)), position=int(random.integers(1 << 32)))


def _ids(random: np.random.Generator, count: int) -> list[int]:
    pairs = zip(random.integers(0, LIMITS.layers, count), random.integers(0, LIMITS.experts, count), strict=True)
    return [expert_id(int(layer), int(expert)) for layer, expert in pairs]
