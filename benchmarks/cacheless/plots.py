"""Plots of the cacheless benchmark, as PNGs for the docs. Links are emulated, and every title says so."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, RED, GREY = "#3b6fb6", "#c0392b", "#888888"


def ablation(speeds: dict[str, list[float]], path: Path) -> None:
    """Speed over that with everything resident, by what foretells."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    names = [name for name in speeds if name != "everything resident"]
    for place, name in enumerate(reversed(names)):
        values = speeds[name]
        median = statistics.median(values)
        axes.barh(place, median, color=RED if "ahead" in name else BLUE, height=0.6)
        axes.plot([min(values), max(values)], [place, place], color="black", linewidth=1)
        axes.text(max(*values, median) + 0.015, place, f"{median:.2f}", va="center")
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("decode speed, 1 = everything resident")
    axes.set_title("What foretelling is worth (emulated links and devices)")
    axes.set_xlim(0, max(1.0, *(max(speeds[name]) for name in names)) + 0.15)
    finish(figure, path)


def links(rows: list[dict[str, float]], bound_s: float, path: Path) -> None:
    """Time per token against the time of one load: measured, and as the timing model says."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    x = [row["load_over_bound"] for row in rows]
    axes.plot(x, [row["measured_over_resident"] for row in rows], "o-", color=RED, label="measured")
    axes.plot(x, [row["predicted_over_resident"] for row in rows], "--", color="black", label="timing model")
    axes.axvline(1.0, color=GREY, linestyle=":", label=f"bound: {bound_s * 1e3:.1f} ms per load")
    axes.set(
        xlabel="time of one load, in multiples of the bound",
        ylabel="time per token, 1 = everything resident",
        title="Flat until the bound, then linear (emulated links and devices)",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    finish(figure, path)


def ahead(rows: list[dict[str, float]], path: Path) -> None:
    """Lead and speed against how often the shadow guesses the token, with and without running ahead."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, label, colour in (("late", "waits for the token", BLUE), ("ahead", "runs ahead", RED)):
        x = [row["agreement_ahead"] for row in rows]
        left.plot(x, [row[f"lead_{name}"] for row in rows], "o-", color=colour, label=label)
        right.plot(x, [row[f"speed_{name}"] for row in rows], "o-", color=colour, label=label)
    left.set(xlabel="share of tokens guessed", ylabel="layers of lead", title="Lead of the shadow", ylim=(0, None))
    right.set(
        xlabel="share of tokens guessed",
        ylabel="speed, 1 = everything resident",
        title="Decode speed (emulated links and devices)",
        ylim=(0, 1.1),
    )
    for axes in (left, right):
        axes.legend(frameon=False)
    finish(figure, path)


def finish(figure: plt.Figure, path: Path) -> None:
    """Make it plain, and save it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
