"""Recordings of the last steps, small enough to send: what the page draws. Pure."""

from collections.abc import Sequence
from typing import Any

from raymoe.observe.trace import MAIN, Recording, Span, aligned

MOST_SPANS = 6000  # some 600 KB of JSON
MOST_LAYERS = 160  # of all recorded steps together; about 20 spans belong to each


def steps_to_record(layers: int) -> int:
    """How many decode steps of a model with so many MoE layers make a picture that can be read."""
    return max(1, min(4, MOST_LAYERS // max(1, layers)))


def timeline(recordings: Sequence[Recording], wall_s: float) -> dict[str, Any] | None:
    """The main process's recorded time, and what all others did in it; None where it recorded nothing.

    Args:
        wall_s: when it was recorded, in seconds since the epoch.
    """
    recordings = aligned(recordings)
    main = [span for recording in recordings if recording.role == MAIN for span in recording.spans]
    if not main:
        return None
    begin_s, end_s = min(span.start_s for span in main), max(span.end_s for span in main)
    steps = len({span.step for span in main if span.step is not None})
    left = MOST_SPANS
    processes = []
    for recording in recordings:
        spans = [span for span in recording.spans if span.end_s > begin_s and span.start_s < end_s][:left]
        left -= len(spans)
        processes.append(
            {
                "role": recording.role,
                "emulated_link": recording.emulated_link,
                "spans": [_span(span, begin_s, end_s) for span in spans],
            }
        )
    return {"recorded_s": wall_s, "duration_s": end_s - begin_s, "steps": steps, "processes": processes}


def _span(span: Span, begin_s: float, end_s: float) -> list[Any]:
    """Lane, kind, begin and end within the window, layer, experts, and the rest in words."""
    note = ", ".join(str(value) for name, value in span.facts.items() if name in ("order", "outcome", "residency"))
    start_s, stop_s = max(span.start_s, begin_s) - begin_s, min(span.end_s, end_s) - begin_s
    return [span.lane, span.kind, round(start_s, 6), round(stop_s, 6), span.layer, list(span.experts), note]


EMPTY: dict[str, Any] = {"recorded_s": 0.0, "duration_s": 0.0, "steps": 0, "processes": []}
"""Before anything was recorded."""
