"""Plots of the importance benchmark, as PNGs for the docs."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.scheduling.decisions import Decided
from benchmarks.scheduling.speed import LRU, RESIDENT, Measured

COLOURS = ("#3b6fb6", "#d97b29", "#4a9c5d", "#a04a8c")


def hit_rates(rows: list[Decided], top_k: int, path: Path) -> None:
    """Hit rate over slots per layer, by rule; substitution by alpha."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    slots = sorted({row.slots for row in rows})
    styles = {
        "clairvoyant": ("clairvoyant bound", "k--"),
        "lru": ("LRU", "o-"),
        "lfu": ("LFU", "s-"),
        "score n=64": ("score, window 64", "^-"),
    }
    for rule, (label, style) in styles.items():
        rates = [next(row.hit_rate for row in rows if row.rule == rule and row.slots == count) for count in slots]
        axes.plot(slots, rates, style, label=label)
    for alpha, colour in ((0.25, "#c0392b"), (0.5, "#e59a8f")):
        rates = [
            next(
                row.hit_rate
                for row in rows
                if row.slots == count and row.alpha == alpha and row.rule.endswith("+ substitution")
            )
            for count in slots
        ]
        axes.plot(slots, rates, "D-", color=colour, label=f"score + substitution, alpha {alpha:g}")
    axes.set(
        xlabel=f"slots per layer (top-{top_k})",
        ylabel="hit rate",
        title="Hit rate by eviction rule and substitution (no prefetch, no host)",
    )
    _finish(figure, axes, path)


def quality(rows: list[Decided], path: Path) -> None:
    """Perplexity against exact over alpha, a line per number of slots; random substitution beside it."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for colour, slots in zip(COLOURS, sorted({row.slots for row in rows}), strict=False):
        mine = [row for row in rows if row.slots == slots and row.rule.endswith("+ substitution")]
        axes.plot(
            [0.0, *(row.alpha for row in mine)],
            [0.0, *(100 * (row.perplexity - 1) for row in mine)],
            "o-",
            color=colour,
            label=f"{slots} slots",
        )
        for row in rows:
            if row.slots == slots and row.rule == "random substitution":
                axes.plot(row.alpha, 100 * (row.perplexity - 1), "x", color=colour, markersize=9)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="alpha",
        ylabel="perplexity over exact (%)",
        title="What substitution costs in quality (crosses: substitutes drawn at random)",
    )
    _finish(figure, axes, path)


def ladder(measured: Measured, path: Path) -> None:
    """TPOT of every variant relative to LRU."""
    names = list(measured.by_name)
    kept = [100 * (1 - statistics.median(measured.reduction(name))) for name in names]
    figure, axes = plt.subplots(figsize=(7.5, 0.4 * len(names) + 1.4))
    colours = ["#8c8c8c" if name in (LRU, RESIDENT) else "#3b6fb6" for name in names]
    bars = axes.barh(names, kept, color=colours)
    axes.bar_label(bars, fmt="%.0f%%", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="time per output token, LRU on-demand = 100% (emulated link)", xlim=(0, 1.12 * max(kept)))
    _finish(figure, axes, path, legend=False)


def _finish(figure: plt.Figure, axes: Axes, path: Path, *, legend: bool = True) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
