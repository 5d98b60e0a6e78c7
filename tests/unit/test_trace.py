"""What processes record, how recordings line up, and what the files say."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from predictor.forecast import LayerForecast
from predictor.shadow import ShadowCounts
from raymoe import cli, tracing
from raymoe.engine.watch import ShadowWatch, WatchedScheduler
from raymoe.errors import ConfigError
from raymoe.experts.call import expert_id
from raymoe.experts.conveyor import Conveyor
from raymoe.experts.loader import ThreadTicket
from raymoe.model.runner import SequenceState
from raymoe.observe.chrome import chrome_trace
from raymoe.observe.diagram import all_boxes, draw, rows, window
from raymoe.observe.trace import Recording, Span, Tracer, aligned, busy_s
from raymoe.types import Routing, StepId
from tests.conveyors import begin, call, deliver, make, order
from tests.local import local_service
from tests.toy_models import save_toy

STEP = StepId(sequence=1, position=5)


def clock_of(times: Iterable[float]) -> Callable[[], float]:
    """A clock that shows these times in turn."""
    left = iter(times)
    return lambda: next(left)


def ticking() -> Callable[[], float]:
    """A clock that goes on by one second whenever it is read."""
    return clock_of(float(number) for number in range(1000))


def span(start_s: float, end_s: float, **fields: Any) -> Span:
    return Span(**{"lane": "compute", "kind": "work", "start_s": start_s, "end_s": end_s, **fields})


def recording(role: str, *spans: Span, offset_s: float = 0.0, emulated_link: bool = False) -> Recording:
    return Recording(role=role, emulated_link=emulated_link, spans=spans, offset_s=offset_s, dropped=0, pid=1)


def told(tracer: Tracer) -> list[tuple[str, float, float]]:
    return [(span.name, span.start_s, span.end_s) for span in tracer.recording().spans]


# --- the recorder ---------------------------------------------------------------------------------------


def test_a_full_ring_keeps_the_last_spans_and_counts_the_others() -> None:
    tracer = Tracer("main", capacity=2)
    for number in range(5):
        tracer.add(span(number, number + 1))
    kept = tracer.recording()
    assert [span.start_s for span in kept.spans] == [3, 4]
    assert kept.dropped == 3


def test_the_offset_comes_from_the_readings_that_lie_closest_together() -> None:
    slow, quick = [0.0, 4.0], [10.0, 10.5]
    tracer = Tracer("main", clock=clock_of([*slow, *quick, *slow * 7]), wall=clock_of([107.0, 110.25, *[0.0] * 7]))
    assert tracer.recording().offset_s == 100.0


def test_a_name_says_layer_experts_and_kind() -> None:
    assert span(0, 1, layer=3, experts=(5, 7), kind="load").name == "L3 E5 E7 load"
    assert span(0, 1, kind="sample").name == "sample"


# --- lining up ------------------------------------------------------------------------------------------


def test_processes_with_other_clocks_line_up_by_wall_time() -> None:
    first = recording("main", span(2, 3), offset_s=100)
    second = recording("shadow", span(51, 52), offset_s=50)
    one, other = aligned([first, second])
    assert [(span.start_s, span.end_s) for span in (*one.spans, *other.spans)] == [(1, 2), (0, 1)]
    assert one.offset_s == other.offset_s == 101


def test_a_worker_that_was_not_told_the_step_has_that_of_the_wait_it_works_in() -> None:
    waits = [span(position, position + 0.5, kind="experts", layer=2, step=step(position)) for position in (1, 2)]
    mine = [span(at, at + 0.1, layer=layer) for at, layer in ((2.25, 2), (1.75, 2), (2.25, 3), (0.5, 2))]
    worker = aligned([recording("main", span(0, 0.1), *waits), recording("worker a", *mine)])[1]
    assert [span.step for span in worker.spans] == [step(2), None, None, None]


def step(position: int) -> StepId:
    return StepId(sequence=1, position=position)


def test_overlapping_spans_count_once_and_only_within_the_window() -> None:
    assert busy_s([span(0, 4), span(3, 6), span(3.5, 4), span(9, 20)], 1, 10) == 6


@given(st.lists(st.tuples(st.integers(-5, 25), st.integers(0, 10))))
def test_a_window_is_never_busier_than_it_is_long(spans: list[tuple[int, int]]) -> None:
    covered = {second for start, length in spans for second in range(max(0, start), min(20, start + length))}
    assert busy_s([span(start, start + length) for start, length in spans], 0, 20) == len(covered)


# --- what workers tell ----------------------------------------------------------------------------------


def watched(slots: int) -> tuple[Conveyor, Any, Tracer]:
    conveyor, loader = make(slots)
    tracer = Tracer("worker a")
    conveyor.trace(tracer)
    return conveyor, loader, tracer


def loads(tracer: Tracer) -> list[tuple[int | None, tuple[int, ...], StepId | None, Any, Any]]:
    spans = tracer.recording().spans
    assert all((span.lane, span.kind) == ("link", "load") for span in spans)
    return [(span.layer, span.experts, span.step, span.facts["order"], span.facts["outcome"]) for span in spans]


def test_a_load_tells_for_which_step_it_was_ordered() -> None:
    conveyor, loader, tracer = watched(slots=2)
    order(conveyor, [3], position=7, layer=2)
    loader.tickets[expert_id(2, 3)].finish()
    assert call(conveyor, [3], layer=2, step=step(7)) == [3]
    assert loads(tracer) == [(2, (3,), step(7), "ordered", "loaded")]
    assert tracer.recording().spans[0].start_s == 1.0


def test_a_miss_is_loaded_on_demand() -> None:
    conveyor, _, tracer = watched(slots=2)
    call(conveyor, [4], layer=1, step=step(7))
    assert loads(tracer) == [(1, (4,), step(7), "on demand", "loaded")]


def test_a_wrong_forecast_that_gives_way_is_a_cancelled_load() -> None:
    conveyor, _, tracer = watched(slots=1)
    order(conveyor, [3], position=7)
    deliver(conveyor, begin(conveyor, [4], step=step(7)))
    assert loads(tracer) == [(0, (3,), step(7), "ordered", "cancelled"), (0, (4,), step(7), "on demand", "loaded")]


def test_loads_that_began_before_anybody_looked_are_not_told() -> None:
    conveyor, loader = make(2)
    order(conveyor, [3], position=7)
    tracer = Tracer("worker a")
    conveyor.trace(tracer)
    loader.tickets[3].finish()
    call(conveyor, [3, 4], step=step(7))
    assert loads(tracer) == [(0, (4,), step(7), "on demand", "loaded")]


def test_a_load_lasts_from_its_first_piece_to_its_last() -> None:
    ticket = ThreadTicket(iter([None]), 0, lambda ticket: None)
    assert not ticket.advance() and ticket.span_s() is None
    assert ticket.advance()
    begun_s, ended_s = ticket.span_s() or (0.0, 0.0)
    assert 0 < begun_s <= ended_s and ended_s - begun_s >= ticket.busy_s


def test_a_load_that_was_cancelled_before_it_began_took_no_time() -> None:
    ticket = ThreadTicket(iter([None]), 1, lambda ticket: None)
    ticket.cancel()
    assert ticket.advance() and ticket.span_s() is None


# --- what the trunk and the shadow tell -----------------------------------------------------------------


class Asked:
    """A scheduler that notes what it is asked."""

    def __init__(self) -> None:
        self.alpha: Any = 0.5
        self.asked: list[Any] = []

    def begin(self, *arguments: Any) -> None:
        self.asked.append(("begin", *arguments))

    def read(self, *arguments: Any) -> None:
        self.asked.append(("read", *arguments[:2]))

    def end(self, *arguments: Any) -> None:
        self.asked.append(("end", *arguments))

    def take_cost(self) -> Routing:
        return Routing(hits=3)

    def reconfigure(self, *arguments: Any) -> None:
        self.asked.append("reconfigure")

    def route(self, layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> Any:
        return experts_TK + 1, weights_TK

    def compute(self, layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        return hidden_TH * 2


def test_a_watched_scheduler_says_what_the_other_says() -> None:
    asked = Asked()
    between = WatchedScheduler(asked, asked, Tracer("main"))
    between.alpha = 0.25
    experts_TK, hidden_TH = torch.tensor([[3, 1]]), torch.ones(1, 4)
    between.begin(1, [8, 9], None)
    assert between.route(0, experts_TK, hidden_TH)[0].tolist() == [[4, 2]]
    assert between.compute(0, hidden_TH, experts_TK).tolist() == [[2.0] * 4]
    assert between.take_cost() == Routing(hits=3)
    between.read(1, 7, SequenceState(torch.tensor([[8, 9]]), {}, 2))
    between.end(1)
    assert (asked.alpha, between.alpha) == (0.25, 0.25)
    assert asked.asked == [("begin", 1, [8, 9], None), ("read", 1, 7), ("end", 1)]


def test_a_decode_step_is_trunk_and_waits_layer_by_layer() -> None:
    tracer = Tracer("main", clock=ticking(), wall=lambda: 0.0)
    between = WatchedScheduler(Asked(), Asked(), tracer)
    between.read(1, 7, SequenceState(torch.tensor([[8, 9]]), {}, 5))
    for layer in (0, 1):
        between.compute(layer, torch.ones(1, 4), torch.tensor([[3, 1]]))
    between.take_cost()
    start_s = tracer.recording().spans[0].start_s
    names = ["tell predictor", "L0 trunk", "L0 E1 E3 experts", "L1 trunk", "L1 E1 E3 experts", "head"]
    assert told(tracer) == [(name, start_s + index, start_s + index + 1) for index, name in enumerate(names)]
    assert {span.step for span in tracer.recording().spans} == {STEP}
    assert [span.name for span in tracer.recording().spans if span.lane == "wait"] == [names[2], names[4]]


def test_between_sequences_nothing_is_counted() -> None:
    tracer = Tracer("main")
    between = WatchedScheduler(Asked(), Asked(), tracer)
    between.begin(1, [8])
    between.end(1)
    between.take_cost()
    between.begin(2, [8])
    assert [span.name for span in tracer.recording().spans] == ["tell predictor"] * 2


def forecast(layer: int, position: int = 5, epoch: int = 0) -> LayerForecast:
    experts_TK, scores_TE = np.array([[6, 2]]), np.zeros((1, 8), dtype=np.float32)
    return LayerForecast(step=step(position), epoch=epoch, layer=layer, experts_TK=experts_TK, scores_TE=scores_TE)


def shadow_step(watch: ShadowWatch, counts: ShadowCounts, layers: int, **after: int) -> None:
    watch.begin(counts)
    for layer in range(layers):
        watch.foretold(forecast(layer))
        watch.ordered()
    for name, value in after.items():
        setattr(counts, name, value)
    watch.end(counts, did=True)


def test_a_step_of_the_shadow_is_its_layers_and_orders() -> None:
    tracer = Tracer("shadow", clock=ticking(), wall=lambda: 0.0)
    shadow_step(ShadowWatch(tracer), ShadowCounts(), 2, steps=1)
    start_s = tracer.recording().spans[0].start_s
    names = ["L0 E2 E6 layer", "L0 orders", "L1 E2 E6 layer", "L1 orders", "head"]
    assert told(tracer) == [(name, start_s + index, start_s + index + 1) for index, name in enumerate(names)]
    assert tracer.recording().spans[0].facts == {"epoch": 0}


def test_a_step_that_is_left_says_so() -> None:
    tracer = Tracer("shadow")
    shadow_step(ShadowWatch(tracer), ShadowCounts(steps=4), 1, wasted=1)
    assert [span.name for span in tracer.recording().spans] == ["L0 E2 E6 layer", "L0 orders", "step left"]


def test_steps_taken_back_are_told_with_their_number() -> None:
    tracer = Tracer("shadow")
    shadow_step(ShadowWatch(tracer), ShadowCounts(steps=4, wasted=1), 1, wasted=3, steps=5)
    moments = [span for span in tracer.recording().spans if span.start_s == span.end_s]
    assert [(span.name, span.facts) for span in moments] == [("roll back", {"steps": 2})]


def test_waiting_for_the_model_ends_with_the_next_step() -> None:
    tracer, counts = Tracer("shadow", clock=ticking(), wall=lambda: 0.0), ShadowCounts()
    watch = ShadowWatch(tracer)
    for _ in range(3):
        watch.begin(counts)
        watch.end(counts, did=False)
    shadow_step(watch, counts, 1, steps=1)
    (wait,) = [span for span in tracer.recording().spans if span.lane == "wait"]
    assert (wait.name, wait.end_s - wait.start_s) == ("wait for token", 3.0)


# --- the file -------------------------------------------------------------------------------------------


def example() -> list[Recording]:
    """One layer of one step: foretold twice, ordered, computed."""
    named: dict[str, Any] = {"layer": 2, "experts": (6,), "step": STEP}
    return [
        recording("main", span(3, 5, lane="wait", kind="experts", **named), offset_s=10),
        recording(
            "shadow",
            span(0, 1, kind="layer", **named),
            span(1, 1.5, kind="layer", **named),
            span(1.5, 1.5, kind="roll back", step=STEP, facts={"steps": 1}),
            offset_s=10,
        ),
        recording(
            "worker a",
            span(12, 14, lane="link", kind="load", facts={"order": "ordered", "outcome": "loaded"}, **named),
            span(14.25, 14.75, kind="compute", facts={"residency": "hit", "pairs": 1}, **named),
            emulated_link=True,
        ),
    ]


def events(phase: str, of: list[Recording]) -> list[dict[str, Any]]:
    written = json.loads(json.dumps(chrome_trace(of, {"config": "x.yaml"})))
    return [event for event in written["traceEvents"] if event["ph"] == phase]


def test_a_file_has_a_process_per_role_and_says_which_link_is_emulated() -> None:
    names = {event["pid"]: event["args"]["name"] for event in events("M", example()) if event["name"] == "process_name"}
    assert names == {1: "main", 2: "shadow", 3: "worker a (emulated link)"}
    threads = [
        (event["pid"], event["tid"], event["args"]["name"])
        for event in events("M", example())
        if event["name"] == "thread_name"
    ]
    assert threads == [(1, 3, "wait"), (2, 1, "compute"), (3, 1, "compute"), (3, 2, "link (emulated)")]


def test_spans_are_complete_events_in_microseconds() -> None:
    load = next(event for event in events("X", example()) if event["name"] == "L2 E6 load")
    assert (load["ts"], load["dur"], load["pid"], load["tid"]) == (2e6, 2e6, 3, 2)
    assert load["args"] == {
        "step": 5,
        "sequence": 1,
        "layer": 2,
        "expert": 6,
        "order": "ordered",
        "outcome": "loaded",
    }


def test_a_moment_is_an_instant_event() -> None:
    (moment,) = events("i", example())
    assert (moment["name"], moment["ts"], moment["args"]["steps"]) == ("roll back", 1.5e6, 1)


def test_an_arrow_leads_from_the_last_forecast_before_a_load_to_it() -> None:
    (start,), (finish) = events("s", example()), events("f", example())
    assert start["id"] == finish[0]["id"] and 1e6 < start["ts"] <= 1.5e6 and start["pid"] == 2
    assert (finish[0]["ts"], finish[0]["pid"], finish[0]["bp"]) == (2e6, 3, "e")


def test_a_file_says_what_it_is_of_and_what_was_dropped() -> None:
    other = chrome_trace(example(), {"config": "x.yaml"})["otherData"]
    assert other == {
        "config": "x.yaml",
        "start_unix_s": 10.0,
        "emulated_link": True,
        "dropped_spans": {"main": 0, "shadow": 0, "worker a": 0},
    }


# --- the picture ----------------------------------------------------------------------------------------


def steps_of(*begins: float) -> Recording:
    spans = [span(at, at + 0.5, layer=0, step=step(number + 5), kind="trunk") for number, at in enumerate(begins)]
    return recording("main", *spans)


def test_a_picture_leaves_out_the_last_step_where_there_are_more() -> None:
    assert window([steps_of(1, 2, 3)], 2) == ([(5, 1), (6, 2)], 1, 3)
    assert window([steps_of(1, 2)], 2) == ([(5, 1), (6, 2)], 1, 2.5)


def test_a_picture_shows_steps_that_take_as_long_as_most() -> None:
    assert window([steps_of(0, 1, 3, 6, 20, 21, 22)], 1) == ([(10, 21)], 21, 22)
    assert window([steps_of(0, 1, 3, 6, 20, 21, 22)], 2) == ([(6, 1), (7, 3)], 1, 6)


def test_every_lane_of_a_worker_has_its_row() -> None:
    names = list(rows(example()))
    assert [name for name, _ in names] == ["main", "shadow", "a link", "a compute"]
    meanings = {(box.row, box.meaning) for box in all_boxes(example(), names)}
    assert meanings == {
        (0, "waits for experts"),
        (1, "shadow's layer"),
        (2, "load ordered by the shadow"),
        (3, "experts of a layer"),
    }


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.png"
    assert draw(example(), path, title="example", steps=2) == "1 decode steps, 2000.0 ms"
    assert path.read_bytes().startswith(b"\x89PNG")


# --- the command ----------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--png: there is no directory {tmp_path / 'none'}"):
        tracing.check_outputs(tmp_path / "trace.json", tmp_path / "none" / "trace.png")


def test_a_picture_without_matplotlib_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'--png needs matplotlib.* pip install "raymoe\[bench\]", or omit --png'):
        tracing.check_outputs(tmp_path / "trace.json", tmp_path / "trace.png")
    tracing.check_outputs(tmp_path / "trace.json", None)


def test_the_command_traces_devices_of_this_process_without_ray(tmp_path: Path) -> None:
    model = save_toy("qwen3_moe", tmp_path / "toy")
    config, output = tmp_path / "local.yaml", tmp_path / "trace.json"
    devices = "[{name: edge, transport: local, slot_memory: 64KiB}]"
    config.write_text(f"model: {{path: {model}, dtype: float32}}\ndevices: {devices}\n")
    result = CliRunner().invoke(cli.app, ["trace", str(config), "-o", str(output), "--tokens", "3"])
    assert result.exit_code == 0, result.output
    assert f"wrote {output}" in result.stdout and "3 decode steps" in result.stdout
    spans = [event for event in json.loads(output.read_text())["traceEvents"] if event["ph"] == "X"]
    steps = {event["args"].get("step") for event in spans if event["cat"] == "trunk"}
    assert steps == {0, 16, 17, 18}
    computed = [event for event in spans if event["cat"] == "compute"]
    assert {event["args"]["step"] for event in computed} == steps
    assert any(event["args"].get("order") == "on demand" for event in spans)


def test_a_model_that_is_no_longer_traced_answers_as_before(tmp_path: Path) -> None:
    with local_service(save_toy("qwen3_moe", tmp_path)) as service:
        expected = service.generate([1, 2, 3], max_tokens=4, temperature=0.0).token_ids
        service.trace(True)
        assert service.generate([1, 2, 3], max_tokens=4, temperature=0.0).token_ids == expected
        recorded = service.trace(False)
        assert recorded is not None and {span.layer for span in recorded.spans} == {None, 0, 1}
        assert service.generate([1, 2, 3], max_tokens=4, temperature=0.0).token_ids == expected
        assert service.trace(False) is None
