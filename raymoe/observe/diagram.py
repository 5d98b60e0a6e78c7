"""A timing diagram of some decode steps as a picture. Needs matplotlib, which is in the extra "bench"."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from raymoe.observe.trace import MAIN, SHADOW, Recording, Span, aligned
from raymoe.whole_file import whole

WIDTH_IN, ROW_IN, LEGEND_IN, DPI = 14.0, 0.36, 0.5, 130
TEXT_WIDTH = 0.008  # of the axes' width, that a digit needs
PALER = (0.0, 0.3, 0.55)  # towards white, for successive steps: main, shadow and loads are up to three steps apart
TOP, BOTTOM = 0.28, 0.4  # of a row's box, from its middle

TRUNK, SHADOW_LAYER, EXPERTS = "trunk (attention, router)", "shadow's layer", "experts of a layer"
ORDERED, ON_DEMAND, UNUSED = "load ordered by the shadow", "load on demand (miss)", "load cancelled"
WAIT, OTHER = "waits for experts", "sampling, alignment, orders"
COLOURS = {
    TRUNK: "#2f6db3",
    WAIT: "#e3e3e3",
    SHADOW_LAYER: "#8a5aa8",
    OTHER: "#9a9a9a",
    ORDERED: "#3f9b57",
    ON_DEMAND: "#d0342c",
    UNUSED: "#e8b7b4",
    EXPERTS: "#e08a1e",
}
MEANINGS = {"trunk": TRUNK, "layer": SHADOW_LAYER, "compute": EXPERTS, "experts": WAIT, "wait for load": WAIT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One rectangle; ``step`` decides its shade, ``layer`` is written into it. ``is_shadow``: of its row."""

    row: int
    start_s: float
    end_s: float
    meaning: str
    layer: int | None
    step: int | None
    is_shadow: bool


def draw(recordings: Sequence[Recording], path: Path, *, title: str, steps: int) -> str:
    """Write a PNG of ``steps`` decode steps in a row that are like most; returns in words what it shows."""
    recordings = aligned(recordings)
    shown, start_s, end_s = window(recordings, steps)
    names = list(rows(recordings))
    figure, axes = plt.subplots(figsize=(WIDTH_IN, ROW_IN * len(names) + LEGEND_IN + 1.2))
    boxes = [box for box in all_boxes(recordings, names) if box.end_s > start_s and box.start_s < end_s]
    for box in sorted(boxes, key=lambda box: box.start_s):
        draw_box(axes, box, start_s, end_s)
    for number, (step, begin_s) in enumerate(shown):
        axes.axvline((begin_s - start_s) * 1e3, color="black", linewidth=0.9, linestyle="--" if number else "-")
        axes.text((begin_s - start_s) * 1e3, -0.62, f" main reads token {step}", fontsize=9, va="bottom")
    mark_shadow(axes, boxes, start_s)
    emulated = ", emulated link" if any(recording.emulated_link for recording in recordings) else ""
    axes.set_title(f"{title}{emulated}", fontsize=12, pad=18)
    finish(axes, [name for name, _ in names], (end_s - start_s) * 1e3)
    used = {box.meaning for box in boxes}
    handles = [Patch(color=COLOURS[meaning], label=meaning) for meaning in COLOURS if meaning in used]
    note = "number: layer     shade: token, the same for all     small number: token that the shadow reads"
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=9, title=note, loc="lower center")
    figure.tight_layout(rect=(0, LEGEND_IN / figure.get_figheight(), 1, 1))
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=DPI)
    plt.close(figure)
    return f"{len(shown)} decode steps, {(end_s - start_s) * 1e3:.1f} ms"


def window(recordings: Sequence[Recording], steps: int) -> tuple[list[tuple[int, float]], float, float]:
    """The steps to show with their beginnings, and from when to when.

    Of all decode steps but the last, after which nothing is foretold, those in a row that together take as long as
    most do. A step is told by the position of the token that the main model reads.
    """
    main = [span for r in recordings if r.role == MAIN for span in r.spans if span.kind != "sample"]
    begins: dict[int, float] = {}
    for span in main:
        if span.step is not None and span.step.position > 0:
            begins[span.step.position] = min(span.start_s, begins.get(span.step.position, span.start_s))
    order = sorted(begins.items(), key=lambda item: item[1])
    if not order:
        return [], 0.0, 1e-3
    if len(order) <= steps:
        last = [span.end_s for span in main if span.step is not None and span.step.position == order[-1][0]]
        return order, order[0][1], max(last)
    lengths = [order[first + steps][1] - order[first][1] for first in range(len(order) - steps)]
    usual = statistics.median_low(lengths)
    first = len(lengths) - 1 - lengths[::-1].index(usual)
    return order[first : first + steps], order[first][1], order[first + steps][1]


def rows(recordings: Sequence[Recording]) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Labels from top to bottom, with role and whether it is a link's row."""
    for recording in recordings:
        name = recording.role.removeprefix("worker ")
        if recording.role in (MAIN, SHADOW):
            yield name, (recording.role, False)
            continue
        if any(span.lane == "link" for span in recording.spans):
            yield f"{name} link", (recording.role, True)
        yield f"{name} compute", (recording.role, False)


def all_boxes(recordings: Sequence[Recording], names: list[tuple[str, tuple[str, bool]]]) -> Iterator[Box]:
    """Every span that has a length and a place."""
    place = {key: row for row, (_, key) in enumerate(names)}
    for recording in recordings:
        for span in recording.spans:
            if span.kind == "wait for token" or span.end_s <= span.start_s:
                continue
            yield Box(
                row=place[recording.role, span.lane == "link"],
                start_s=span.start_s,
                end_s=span.end_s,
                meaning=meaning_of(span),
                layer=span.layer if span.kind != "orders" else None,
                step=None if span.step is None else span.step.position,
                is_shadow=recording.role == SHADOW,
            )


def meaning_of(span: Span) -> str:
    """What a span is in the legend."""
    if span.kind != "load":
        return MEANINGS.get(span.kind, OTHER)
    if span.facts.get("outcome") != "loaded":
        return UNUSED
    return ORDERED if span.facts.get("order") == "ordered" else ON_DEMAND


def draw_box(axes: Axes, box: Box, start_s: float, end_s: float) -> None:
    """A rectangle, with its layer where that is readable."""
    left_s, right_s = max(box.start_s, start_s), min(box.end_s, end_s)
    left, width = (left_s - start_s) * 1e3, (right_s - left_s) * 1e3
    colour = to_rgb(COLOURS[box.meaning])
    if box.step is not None and box.meaning not in (WAIT, OTHER):
        paler = PALER[box.step % len(PALER)]
        red, green, blue = (part + (1 - part) * paler for part in colour)
        colour = (red, green, blue)
    has_text = box.layer is not None and (right_s - left_s) / (end_s - start_s) > TEXT_WIDTH * len(str(box.layer))
    edge = "white" if has_text else colour  # which makes the shortest ones visible
    corner, height = (left, box.row - TOP), TOP + BOTTOM
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor=edge, linewidth=0.6, zorder=2))
    if has_text:
        ink = "white" if sum(colour) < 1.6 else "#333333"
        middle = left + width / 2, box.row + (BOTTOM - TOP) / 2
        axes.text(*middle, str(box.layer), ha="center", va="center", fontsize=7.5, color=ink, zorder=3)


def mark_shadow(axes: Axes, boxes: Sequence[Box], start_s: float) -> None:
    """Write where the shadow begins each token, above its row."""
    seen: set[int | None] = {None}
    for box in sorted((box for box in boxes if box.is_shadow), key=lambda box: box.start_s):
        if box.step not in seen:
            seen.add(box.step)
            left = max(0.0, (box.start_s - start_s) * 1e3)
            axes.text(left, box.row - TOP - 0.02, str(box.step), fontsize=7, va="bottom", color=COLOURS[SHADOW_LAYER])


def finish(axes: Axes, labels: list[str], end_ms: float) -> None:
    """Scales, and lines between processes."""
    axes.set(xlim=(0, end_ms), ylim=(len(labels) - 0.4, -0.6), xlabel="ms")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    before = ""
    for row, label in enumerate(labels):
        name = label.removesuffix(" link").removesuffix(" compute")
        if row and name != before:
            axes.axhline(row - 0.5, color="#bbbbbb", linewidth=0.6)
        before = name
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
