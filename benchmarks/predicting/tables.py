"""Tables and JSON of what was measured."""

import math

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.predicting.variants import (
    PERIODS,
    PRECISIONS,
    SWEPT,
    Variant,
    bits_name,
    period_name,
)
from raymoe.engine.evaluate import Recall

Measured = dict[Variant, Recall]

INDICES = 32  # output indices whose mean is one point of a curve


def by_kind(console: Console, measured: Measured) -> None:
    """Kinds and precisions on held-out text; each shadow with and without alignment of KV."""
    table = Table(title="held-out text (recall, and half of its 95% interval)")
    for column in ("predictor", "recall", "KV never", "index 1-32", "last 32", "KV bytes/token"):
        table.add_column(column, justify="left" if column == "predictor" else "right")
    for variant, recall in measured.items():
        if variant.kv_every == 0:
            continue
        curve = curve_of(recall)
        own = measured.get(Variant(bits=variant.bits, kv_every=0)) if variant.kind == "shadow" else None
        table.add_row(
            variant.kind_name,
            with_interval(recall),
            with_interval(own) if own else "",
            f"{curve[0]:.4f}",
            f"{curve[-1]:.4f}",
            f"{recall.bytes_per_token:,.0f}" if variant.kind == "shadow" else "",
        )
    console.print(table)


def by_alignment(console: Console, measured: Measured) -> None:
    """Each precision without alignment, with one of the two, and with both."""
    table = Table(title="free-running generation: recall, then how often the shadow's next token is the model's")
    table.add_column("shadow")
    for column in ("none", "token", "KV", "token + KV"):
        table.add_column(column, justify="right")
    for bits in PRECISIONS:
        cells = []
        for token, kv in ((0, 0), (1, 0), (0, 1), (1, 1)):
            recall = measured[Variant(bits=bits, token_every=token, kv_every=kv)]
            cells.append(f"{with_interval(recall)}  {recall.agreement:.3f}")
        table.add_row(bits_name(bits), *cells)
    console.print(table)


def by_period(console: Console, measured: Measured) -> None:
    """Recall by period."""
    table = Table(title="free-running generation: recall by steps between alignments")
    for column in ("shadow", "aligned"):
        table.add_column(column)
    for every in PERIODS:
        table.add_column(period_name(every), justify="right")
    for bits in SWEPT:
        for what, variants in swept(bits).items():
            table.add_row(bits_name(bits), what, *(f"{measured[variant].mean:.4f}" for variant in variants))
    console.print(table)


def swept(bits: int) -> dict[str, list[Variant]]:
    """Variants by what has the period, in the order of ``PERIODS``."""
    return {
        "token, KV always": [Variant(bits=bits, token_every=every) for every in PERIODS],
        "KV, token always": [Variant(bits=bits, kv_every=every) for every in PERIODS],
        "both": [Variant(bits=bits, token_every=every, kv_every=every) for every in PERIODS],
    }


def with_interval(recall: Recall) -> str:
    """Mean and half of its interval."""
    return f"{recall.mean:.4f} ± {recall.interval:.4f}"


def curve_of(recall: Recall) -> np.ndarray:
    """Means of ``INDICES`` output indices each."""
    by_step = recall.by_step()
    return by_step[: len(by_step) // INDICES * INDICES].reshape(-1, INDICES).mean(axis=1)


def as_list(measured: Measured) -> list[dict[str, object]]:
    """For JSON."""
    return [describe(variant) | figures(recall) for variant, recall in measured.items()]


def describe(variant: Variant) -> dict[str, object]:
    """What was measured."""
    if variant.kind == "shadow":
        return {
            "kind": variant.kind,
            "bits": variant.bits,
            "token_align_every": variant.token_every,
            "kv_align_every": variant.kv_every,
        }
    return {"kind": variant.kind} | ({"ahead": variant.ahead} if variant.kind == "gate" else {})


def figures(recall: Recall) -> dict[str, object]:
    """What came of it."""
    rows, steps, _ = recall.recall_BNL.shape
    return {
        "recall": recall.mean,
        "interval": recall.interval,
        "tokens": rows * steps,
        "agreement": recall.agreement,
        "kv_bytes_per_token": recall.bytes_per_token,
        "by_layer": [None if math.isnan(value) else value for value in recall.by_layer().tolist()],
        f"by_{INDICES}_output_indices": curve_of(recall).tolist(),
    }
