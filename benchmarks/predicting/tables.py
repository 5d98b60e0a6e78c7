"""Tables and JSON of what was measured."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.predicting.cheaper import Measured as Cheaper
from benchmarks.predicting.cheaper import on_front
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
            "top_k": variant.top_k,
            "skip_layers": list(variant.skipped),
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


def cheaper(console: Console, measured: Sequence[Cheaper], names: Mapping[Variant, str]) -> None:
    """What each variant knows and costs; ``names`` are those of presets."""
    best = on_front(measured)
    slowest = measured[0].median_ms
    table = Table(title="cheaper shadows on held-out text; a step of one token in ms of processor time")
    for column in ("shadow", "recall", "same likeliest", "same drawn", "ms", "of the first", "experts read", "front"):
        table.add_column(column, justify="left" if column == "shadow" else "right")
    for item in measured:
        name = names.get(item.variant)
        low, high = min(item.step_ms), max(item.step_ms)
        table.add_row(
            item.variant.thinned_name + (f" ({name})" if name else ""),
            with_interval(item.quality.recall),
            f"{item.quality.greedy:.4f}",
            f"{item.quality.sampled:.4f}",
            f"{item.median_ms:.2f} ({low:.2f} to {high:.2f})",
            f"{item.median_ms / slowest:.2f}",
            f"{item.read_bytes / 1e3:,.0f} kB",
            "*" if item in best else "",
        )
    console.print(table)


def cheaper_as_list(measured: Sequence[Cheaper]) -> list[dict[str, object]]:
    """For JSON."""
    return [
        describe(item.variant)
        | figures(item.quality.recall)
        | {"greedy": item.quality.greedy, "sampled": item.quality.sampled}
        | {"step_ms": item.step_ms, "read_bytes": item.read_bytes}
        for item in measured
    ]


def costs(console: Console, title: str, times_ms: Mapping[str, Sequence[float]], read: Mapping[str, float]) -> None:
    """Processor time of a step by variant, against the first."""
    table = Table(title=f"{title}: a step of one token")
    for column in ("shadow", "ms", "of the first", "experts read"):
        table.add_column(column, justify="left" if column == "shadow" else "right")
    first = statistics.median(next(iter(times_ms.values())))
    for name, times in times_ms.items():
        median = statistics.median(times)
        spread = f"{median:.2f} ({min(times):.2f} to {max(times):.2f})"
        table.add_row(name, spread, f"{median / first:.2f}", f"{read[name] / 1e6:,.1f} MB")
    console.print(table)
