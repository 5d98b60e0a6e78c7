"""Plots of the benchmark of predictors, as PNGs for the docs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.predicting.cheaper import Measured as Cheaper
from benchmarks.predicting.cheaper import front
from benchmarks.predicting.tables import INDICES, Measured, swept
from benchmarks.predicting.variants import PERIODS, PRECISIONS, SWEPT, Variant, bits_name, period_name
from raymoe.engine.evaluate import Recall

COLOURS = {16: "#3b6fb6", 8: "#d97b29", 4: "#4a9c5d", 3: "#a04a8c", 2: "#8a6d3b"}
PERIOD_COLOURS = ("#1f3d66", "#3b6fb6", "#7aa5d8", "#d9a441", "#c0392b", "#8c8c8c")
MARKERS = ("o-", "s-", "^-")
MISSED_TICKS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # shares of experts, on an axis of logarithms
LEAST_MISSED = 0.001  # nothing missed has no place on that axis


def by_index(measured: Measured, path: Path) -> None:
    """Recall over output index by precision, a panel for each alignment."""
    panels = {"no alignment": (0, 0), "token": (1, 0), "token and KV": (1, 1)}
    figure, all_axes = plt.subplots(1, len(panels), figsize=(12, 4.4))
    for axes, (title, (token, kv)) in zip(all_axes, panels.items(), strict=True):
        for bits in PRECISIONS:
            recall = measured[Variant(bits=bits, token_every=token, kv_every=kv)]
            _curve(axes, recall, label=f"{bits_name(bits)}: {recall.mean:.1%}", color=COLOURS[bits])
        axes.set(title=title, xlabel="output index")
        _tidy(axes)
    all_axes[0].set(ylim=(0, 1.02), ylabel="recall")
    least = min(_smooth(measured[Variant(bits=bits, kv_every=0)]).min() for bits in PRECISIONS)
    for axes in all_axes[1:]:
        axes.set_ylim(least - 0.035, 1.003)
    all_axes[0].legend(frameon=False, fontsize=9, title="mean", loc="upper right")
    for axes in all_axes[1:]:
        axes.legend(frameon=False, fontsize=9, title="mean", loc="lower left", ncols=2)
    _save(figure, path)


def by_alignment(measured: Measured, path: Path) -> None:
    """Above, mean recall by period, a panel for each precision; below, the last of them over the output index."""
    figure, (above, below) = plt.subplots(2, len(SWEPT), figsize=(12, 7.8), sharey="row")
    places = range(len(PERIODS))
    for axes, bits in zip(above, SWEPT, strict=True):
        for (what, variants), marker, colour in zip(swept(bits).items(), MARKERS, COLOURS.values(), strict=False):
            missed = [1 - measured[variant].mean for variant in variants]
            axes.plot(places, missed, marker, color=colour, markersize=5, label=what)
        axes.set_xticks(places, [str(every) if every else "never" for every in PERIODS])
        axes.set(title=f"{bits_name(bits)}: mean", xlabel="steps between alignments", yscale="log")
        _tidy(axes)
    above[0].yaxis.set_major_locator(FixedLocator(MISSED_TICKS))
    above[0].yaxis.set_major_formatter(FuncFormatter(lambda missed, place: _percent(1 - missed, place)))
    above[0].yaxis.set_minor_locator(NullLocator())
    above[0].set(ylim=(1.0, 6e-4), ylabel="recall (logarithm of what is missed)")
    above[0].legend(frameon=False, fontsize=9, loc="lower left", title="period of")
    lowest = SWEPT[-1]
    for axes, (what, variants) in zip(below, swept(lowest).items(), strict=True):
        for every, variant, colour in zip(PERIODS, variants, PERIOD_COLOURS, strict=True):
            _curve(axes, measured[variant], label=period_name(every), color=colour)
        axes.set(title=f"{bits_name(lowest)}: period of {what}", xlabel="output index")
        _tidy(axes)
    below[0].set_ylabel("recall")
    below[0].legend(frameon=False, fontsize=9, loc="lower left")
    _save(figure, path)


def by_kind(measured: Measured, path: Path) -> None:
    """On held-out text: recall of each kind with its interval, and by layer."""
    shown = {variant: recall for variant, recall in measured.items() if variant.kv_every}
    figure, (bars_axes, axes) = plt.subplots(1, 2, figsize=(12, 4.4))
    names = [variant.kind_name for variant in shown]
    means = [recall.mean for recall in shown.values()]
    colours = [_colour(variant) for variant in shown]
    intervals = [recall.interval for recall in shown.values()]
    bars = bars_axes.barh(names, means, xerr=intervals, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    labels = [f"{mean:.1%}" for mean in means]
    bars_axes.bar_label(bars, labels, padding=4, fontsize=9)
    bars_axes.invert_yaxis()
    bars_axes.set(xlabel="recall", xlim=(0, 1.12), title="mean over the layers that can be named, 95% interval")
    bars_axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    bars_axes.set_xticks(np.linspace(0, 1, 6))
    for variant, recall in shown.items():
        by_layer = recall.by_layer()
        style = {"shadow": "o-", "gate": "s--", "history": "^:"}[variant.kind]
        axes.plot(range(len(by_layer)), by_layer, style, color=_colour(variant), markersize=4, label=variant.kind_name)
    axes.set(xlabel="MoE layer", title="by layer, in the same colours", ylabel="recall")
    for side in (bars_axes, axes):
        _tidy(side, percent=side is axes)
    _save(figure, path)


def cheaper(measured: Sequence[Cheaper], presets: Mapping[Variant, str], path: Path) -> None:
    """Recall, and accepted drafts, over the experts that a step reads; the front as a line, presets by name."""
    figure, all_axes = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True)
    known = {"recall": lambda item: item.quality.recall.mean, "same token at temperature 1": _accepted}
    for axes, (title, worth) in zip(all_axes, known.items(), strict=True):
        best = [measured[index] for index in front([(item.read_bytes / 1e3, worth(item)) for item in measured])]
        axes.plot(
            [item.read_bytes / 1e3 for item in best],
            [max(1 - worth(item), LEAST_MISSED) for item in best],
            color="#bbbbbb",
            zorder=1,
        )
        for item in measured:
            variant = item.variant
            marker = "s" if variant.skipped else "v^<"[variant.top_k - 1] if variant.top_k in (1, 2, 3) else "o"
            place = item.read_bytes / 1e3, max(1 - worth(item), LEAST_MISSED)
            axes.scatter(*place, color=COLOURS[variant.bits], marker=marker, s=36, zorder=2)
            if variant in presets:
                axes.annotate(presets[variant], place, textcoords="offset points", xytext=(7, 5), fontsize=9)
        axes.set(title=title, xlabel="kB of experts read per step", yscale="log")
        axes.invert_yaxis()
        _tidy(axes)
        axes.yaxis.set_major_locator(FixedLocator(MISSED_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda missed, place: _percent(round(1 - missed, 6), place)))
        axes.yaxis.set_minor_locator(NullLocator())
    kinds = {"all experts": "o", "best 3": "<", "best 2": "^", "best 1": "v", "layers without": "s"}
    handles = [
        Line2D([], [], marker=marker, color="#4d4d4d", linestyle="", label=name) for name, marker in kinds.items()
    ]
    handles += [
        Line2D([], [], marker="o", color=COLOURS[bits], linestyle="", label=bits_name(bits)) for bits in PRECISIONS
    ]
    all_axes[0].legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="upper left")
    _save(figure, path)


def _accepted(item: Cheaper) -> float:
    return item.quality.sampled


def _colour(variant: Variant) -> str:
    if variant.kind == "shadow":
        return COLOURS[variant.bits]
    return {"gate": ("#4d4d4d", "#8c8c8c", "#bfbfbf")[variant.ahead - 1], "history": "#c0392b"}[variant.kind]


def _smooth(recall: Recall) -> np.ndarray:
    """A running mean over ``INDICES`` output indices, over fewer at both ends."""
    window = np.ones(INDICES)
    by_step = recall.by_step()
    return np.convolve(by_step, window, mode="same") / np.convolve(np.ones(len(by_step)), window, mode="same")


def _curve(axes: Axes, recall: Recall, *, label: str, color: str) -> None:
    smooth = _smooth(recall)
    axes.plot(np.arange(1, len(smooth) + 1), smooth, color=color, linewidth=1.4, label=label)


def _percent(share: float, _place: int | None) -> str:
    return f"{100 * share:g}%"


def _tidy(axes: Axes, *, percent: bool = True) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
