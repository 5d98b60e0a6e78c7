"""Recordings in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process per role, with threads "compute", "link" and "wait"; an arrow from each forecast to the loads it ordered.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raymoe.observe.trace import LANES, SHADOW, Lane, Recording, Span, aligned

Event = dict[str, Any]
Forecasts = dict[tuple[Any, int, int], list[tuple[Span, int]]]
"""By step, layer and expert: the shadow's spans that named it, and whose process they are."""


def chrome_trace(recordings: Sequence[Recording], about: Mapping[str, Any]) -> dict[str, Any]:
    """One JSON object. Times are in microseconds from the first span on.

    Args:
        about: what the trace is of, for its ``otherData``.
    """
    recordings = aligned(recordings)
    events: list[Event] = []
    for process, recording in enumerate(recordings, start=1):
        events.extend(_names(process, recording))
        events.extend(_event(process, span) for span in recording.spans)
    events.extend(_arrows(recordings))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            **about,
            "start_unix_s": recordings[0].offset_s if recordings else None,
            "emulated_link": any(recording.emulated_link for recording in recordings),
            "dropped_spans": {recording.role: recording.dropped for recording in recordings},
        },
    }


def _names(process: int, recording: Recording) -> Iterator[Event]:
    yield _metadata("process_name", process, {"name": recording.label})
    yield _metadata("process_sort_index", process, {"sort_index": process})
    yield _metadata("process_labels", process, {"labels": f"pid {recording.pid}"})
    used = {span.lane for span in recording.spans}
    for lane in LANES:
        if lane in used:
            name = f"{lane} (emulated)" if lane == "link" and recording.emulated_link else lane
            yield _metadata("thread_name", process, {"name": name}, lane)
            yield _metadata("thread_sort_index", process, {"sort_index": _thread(lane)}, lane)


def _metadata(name: str, process: int, args: Event, lane: Lane | None = None) -> Event:
    return {"ph": "M", "name": name, "pid": process, "tid": 0 if lane is None else _thread(lane), "args": args}


def _thread(lane: Lane) -> int:
    return LANES.index(lane) + 1


def _event(process: int, span: Span) -> Event:
    event = {
        "name": span.name,
        "cat": span.kind,
        "pid": process,
        "tid": _thread(span.lane),
        "ts": _microseconds(span.start_s),
        "args": _args(span),
    }
    if span.end_s > span.start_s:
        return event | {"ph": "X", "dur": _microseconds(span.end_s - span.start_s)}
    return event | {"ph": "i", "s": "t"}


def _args(span: Span) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if span.step is not None:
        args |= {"step": span.step.position, "sequence": span.step.sequence}
    if span.layer is not None:
        args["layer"] = span.layer
    if span.experts:
        args["expert"] = span.experts[0] if len(span.experts) == 1 else list(span.experts)
    return args | span.facts


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _arrows(recordings: Sequence[Recording]) -> Iterator[Event]:
    """From the last forecast that named an expert before its load began, to that load."""
    forecasts: Forecasts = {}
    for process, recording in enumerate(recordings, start=1):
        for span in recording.spans if recording.role == SHADOW else ():
            for expert in span.experts if span.layer is not None else ():
                assert span.layer is not None
                forecasts.setdefault((span.step, span.layer, expert), []).append((span, process))
    arrow = 0
    for process, recording in enumerate(recordings, start=1):
        for span in recording.spans:
            if span.kind != "load" or span.facts.get("order") != "ordered" or span.layer is None:
                continue
            named = forecasts.get((span.step, span.layer, span.experts[0]), [])
            before = [item for item in named if item[0].end_s <= span.start_s]
            if before:
                arrow += 1
                origin, of = before[-1]
                yield _flow("s", arrow, of, origin, origin.end_s - 1e-9)
                yield _flow("f", arrow, process, span, span.start_s) | {"bp": "e"}


def _flow(phase: str, number: int, process: int, span: Span, time_s: float) -> Event:
    return {
        "ph": phase,
        "id": number,
        "name": "forecast",
        "cat": "forecast",
        "pid": process,
        "tid": _thread(span.lane),
        "ts": _microseconds(max(span.start_s, time_s)),
    }
