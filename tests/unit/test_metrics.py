"""Metrics: what is observed, what becomes of it, and that dashboard and documentation know the same ones. No Ray."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge, Histogram

from raymoe.observe import metrics
from raymoe.observe.metrics import ALL, DEVICES, ENGINE, PREDICTOR, REQUESTS, SEEN_DEVICES, Metric
from raymoe.observe.ray_metrics import Publisher, RayExporter, ray_metric
from raymoe.observe.sink import Meter, Observations, Silent
from raymoe.observe.stats import DeviceStats, EngineStats, PredictorStats
from raymoe.serve.gathering import merged

ROOT = Path(__file__).parents[2]


class Ticks:
    """A clock that shows what it was set to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def by_name(name: str) -> Metric:
    return next(metric for metric in ALL if metric.name == name)


# --- what is observed -----------------------------------------------------------------------------------


def test_a_request_is_timed_from_its_arrival() -> None:
    clock = Ticks()
    meter = Meter(clock)
    meter.submitted(1)
    for at_s, tell in ((2.0, meter.admitted), (3.0, meter.token), (3.5, meter.token), (4.5, meter.token)):
        clock.now_s = at_s
        tell(1)
    clock.now_s = 5.0
    meter.ended(1)
    meter.step(3)
    taken = meter.take()
    assert taken == Observations(queue_s=(2.0,), ttft_s=(3.0,), tpot_s=(0.75,), duration_s=(5.0,), rows=(3,))
    assert meter.take() == Observations()


def test_a_request_that_ends_before_its_second_token_tells_no_time_between_tokens() -> None:
    meter = Meter(Ticks())
    meter.submitted(1)
    meter.admitted(1)
    meter.token(1)
    meter.ended(1)
    meter.ended(1)
    meter.token(2)
    taken = meter.take()
    assert taken.tpot_s == () and taken.duration_s == (0.0,) and taken.ttft_s == (0.0,)


def test_what_nobody_takes_does_not_pile_up() -> None:
    meter = Meter(Ticks())
    for request in range(10_000):
        meter.submitted(request)
        meter.step(1)
        meter.ended(request)
    taken = meter.take()
    assert len(taken.duration_s) == len(taken.rows) == 4096


def test_a_silent_sink_takes_everything() -> None:
    sink = Silent()
    for tell in (sink.submitted, sink.admitted, sink.token, sink.ended, sink.step):
        assert tell(1) is None


# --- what becomes of it ---------------------------------------------------------------------------------


class Recorded:
    """Stands in for Ray's metric."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def begin(self, tags: dict[str, str]) -> None:
        self.calls.append(("begin", 0.0, tags))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("inc", value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("set", value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("observe", value, tags))


def exporter() -> tuple[RayExporter, Mapping[str, Recorded]]:
    made: dict[str, Recorded] = {}

    def make(metric: Metric) -> Recorded:
        return made.setdefault(metric.name, Recorded())

    return RayExporter("demo", make), made


def test_counters_go_up_by_what_was_added_and_begin_anew_after_a_fall() -> None:
    export, made = exporter()
    steps = by_name("raymoe_decode_steps")
    for total in (0.0, 5.0, 5.0, 12.0, 4.0):
        export.put([(steps, {}, total)])
    assert [(kind, value) for kind, value, _ in made["raymoe_decode_steps"].calls] == [
        ("begin", 0.0), ("inc", 5.0), ("inc", 7.0), ("inc", 4.0),
    ]  # fmt: skip


def test_devices_are_counted_apart_and_gauges_are_set() -> None:
    export, made = exporter()
    hits, alpha = by_name("raymoe_device_hits"), by_name("raymoe_alpha")
    export.put([(hits, {"device": "a"}, 1.0), (hits, {"device": "b"}, 2.0), (alpha, {}, 0.25), (alpha, {}, 0.1)])
    assert made["raymoe_device_hits"].calls[1] == ("inc", 1.0, {"app": "demo", "device": "a"})
    assert made["raymoe_device_hits"].calls[3] == ("inc", 2.0, {"app": "demo", "device": "b"})
    assert [value for _, value, _ in made["raymoe_alpha"].calls] == [0.25, 0.1]


def test_a_publisher_outlives_what_fails() -> None:
    export, made = exporter()
    looks = iter([[(by_name("raymoe_alpha"), {}, 0.5)]])
    observed = [(REQUESTS[0], (0.1, 0.2))]
    publisher = Publisher(export, lambda: next(looks), lambda: observed, every_s=0.001)
    publisher.publish()
    assert [value for _, value, _ in made[REQUESTS[0].name].calls] == [0.1, 0.2]
    publisher.start()
    publisher.close()
    assert len(made["raymoe_alpha"].calls) == 1


@pytest.mark.parametrize(
    ("record", "fields"),
    [(EngineStats, ENGINE), (DeviceStats, DEVICES), (PredictorStats, PREDICTOR), (Observations, REQUESTS)],
    ids=["engine", "devices", "predictor", "requests"],
)
def test_every_metric_comes_from_a_field_that_exists(record: type, fields: tuple[Metric, ...]) -> None:
    known = set(record.__dataclass_fields__) | {"up"}
    assert [metric.field for metric in fields if metric.field not in known] == []


def test_what_is_not_known_is_left_out() -> None:
    values = metrics.of_health("a", "down", heartbeat_age_s=None, restarts=2)
    assert [(metric.name, labels.get("state"), value) for metric, labels, value in values] == [
        ("raymoe_device_up", None, 0.0),
        ("raymoe_device_restarts", None, 2.0),
        ("raymoe_device_state", "healthy", 0.0),
        ("raymoe_device_state", "suspect", 0.0),
        ("raymoe_device_state", "down", 1.0),
        ("raymoe_device_state", "rejoining", 0.0),
    ]
    down = metrics.of_predictor(PredictorStats(kind="shadow", state="down"))
    assert [(metric.name, value) for metric, _, value in down] == [("raymoe_predictor_up", 0.0)]
    assert metrics.of_predictor(None) == []


# --- names ----------------------------------------------------------------------------------------------


def test_names_are_unique_and_ray_takes_every_one(caplog: pytest.LogCaptureFixture) -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)
    kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
    for metric in ALL:
        made: Any = ray_metric(metric)
        assert isinstance(made, kinds[metric.kind])
        assert not made._discard_metric, f"Ray refuses the name {metric.name}"
        assert made.info["tag_keys"] == metric.labels
    assert caplog.records == []


def exported_names() -> set[str]:
    """All that Prometheus sees, with a histogram's three."""
    names = {metric.exported for metric in ALL if metric.kind != "histogram"} | {"raymoe_nodes_unreachable"}
    return names | {f"{m.exported}_{part}" for m in REQUESTS for part in ("bucket", "sum", "count")}


def test_the_dashboard_asks_for_metrics_that_exist_and_shows_every_one() -> None:
    dashboard = json.loads((ROOT / "deployments" / "grafana-dashboard.json").read_text())
    asked = "\n".join(
        target["expr"] for panel in dashboard["panels"] if panel["type"] != "row" for target in panel["targets"]
    )
    names = set(re.findall(r"\b(?:ray_)?raymoe_\w+", asked))
    assert names - exported_names() == set()
    for metric in ALL:
        assert any(name.startswith(metric.exported) for name in names), f"no panel shows {metric.exported}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert "label_values(ray_raymoe_requests_running, app)" in json.dumps(dashboard["templating"])


def test_the_documentation_has_a_row_for_every_metric() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([\w, ]+) \| (.+) \|$", text, re.MULTILINE)
    wanted = [(metric.exported, metric.kind, ", ".join(metric.labels), metric.help) for metric in ALL]
    assert [row for row in rows if row[0] != "raymoe_nodes_unreachable"] == wanted


def test_devices_tell_what_an_operator_asks_for() -> None:
    fields = {metric.field for metric in (*DEVICES, *SEEN_DEVICES)}
    assert {"resident", "hits", "misses", "substituted", "prefetches_used", "prefetches_late"} <= fields
    assert {"prefetches_wasted", "bytes_loaded", "link_busy_s", "peak_slot_bytes", "heartbeat_age_s"} <= fields


# --- all nodes in one -----------------------------------------------------------------------------------

NODE = """\
# HELP ray_raymoe_alpha Width.
# TYPE ray_raymoe_alpha gauge
ray_raymoe_alpha{{Component="core_worker",NodeAddress="{node}",WorkerId="w",app="{app}",otel_scope_name="x"}} {value}
# HELP ray_raymoe_decode_steps_total Passes.
# TYPE ray_raymoe_decode_steps_total counter
ray_raymoe_decode_steps_total{{NodeAddress="{node}",WorkerId="w",app="{app}"}} 7.0
# HELP ray_node_cpu Ray's own.
# TYPE ray_node_cpu gauge
ray_node_cpu{{NodeAddress="{node}"}} 3.0
"""


def test_nodes_are_merged_into_one_text_of_one_application() -> None:
    first = NODE.format(node="10.0.0.1", app="demo", value=0.25)
    second = NODE.format(node="10.0.0.2", app="demo", value=0.5)
    other = NODE.format(node="10.0.0.3", app="other", value=0.75)
    lines = merged([first, second, other], "demo", unreachable=1).decode().splitlines()
    assert lines.count("# TYPE ray_raymoe_alpha gauge") == 1
    assert 'ray_raymoe_alpha{NodeAddress="10.0.0.1",WorkerId="w",app="demo"} 0.25' in lines
    assert 'ray_raymoe_alpha{NodeAddress="10.0.0.2",WorkerId="w",app="demo"} 0.5' in lines
    assert sum(line.startswith("ray_raymoe_decode_steps_total{") for line in lines) == 2
    assert not any("other" in line or "ray_node_cpu" in line for line in lines)
    assert 'raymoe_nodes_unreachable{app="demo"} 1.0' in lines


def test_merged_series_keep_every_label_that_tells_them_apart() -> None:
    for metric in ALL:
        labels = ",".join(f'{label}="{"demo" if label == "app" else label}"' for label in metric.labels)
        text = f"# TYPE {metric.exported} gauge\n{metric.exported}{{{labels}}} 1.0\n"
        line = next(line for line in merged([text], "demo").decode().splitlines() if line.startswith(metric.exported))
        assert all(f'{label}="' in line for label in metric.labels), metric.name


def test_a_node_that_says_something_else_adds_nothing() -> None:
    lines = merged(["<html>no metrics</html>", 'ray_raymoe_UPPER{app="demo"} 1\n'], "demo").decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ['raymoe_nodes_unreachable{app="demo"} 0.0']
