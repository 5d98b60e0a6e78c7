"""Metrics of a real cluster: every name comes out of Ray's exporters, with the numbers that the stats have."""

import asyncio
from collections.abc import Iterator

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import raymoe
from raymoe.launcher import Moe
from raymoe.observe.metrics import ALL
from raymoe.serve.gathering import Gatherer, ray_nodes
from tests.waiting import until

pytestmark = pytest.mark.integration

APP = "measured"
CONFIG = {
    "model": {"dtype": "float32"},
    "devices": [{"name": f"edge-{index}", "slot_memory": "1536KiB"} for index in range(2)],
    "trunk": {"kv_memory": "64MiB"},
    "predictor": {"kind": "shadow", "bits": 8},
}


@pytest.fixture(scope="module")
def moe() -> Iterator[Moe]:
    """Two workers and a shadow, on a cluster whose agents export once a second instead of every ten."""
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    try:
        with raymoe.launch(CONFIG, app=APP) as launched:
            yield launched
    finally:
        ray.shutdown()


def gathered(app: str = APP) -> str:
    return asyncio.run(Gatherer(app, ray_nodes).gather()).decode()


def total(text: str, sample_name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    )


def test_every_metric_is_exported_and_agrees_with_the_stats(moe: Moe) -> None:
    for prompt in ("In the beginning", "It is a truth"):
        moe.generate(prompt, max_tokens=16, ignore_eos=True)

    def missing() -> list[str]:
        return [metric.exported for metric in ALL if f"\n{metric.exported}" not in gathered()]

    until(lambda: not missing(), "the export of every metric")
    engine = moe.stats().engine
    assert engine is not None
    until(
        lambda: total(gathered(), "ray_raymoe_completion_tokens_total") == engine.completion_tokens == 32,
        "the export of all tokens",
    )
    until(
        lambda: total(gathered(), "ray_raymoe_time_to_first_token_seconds_count") == 2,
        "the export of both requests",
    )
    text = gathered()
    for name, device in moe.stats().devices.items():
        assert total(text, "ray_raymoe_device_up", device=name) == 1.0
        assert total(text, "ray_raymoe_device_slot_budget_bytes", device=name) == device.slot_budget_bytes
        assert total(text, "ray_raymoe_device_hits_total", device=name) <= device.hits
        assert total(text, "ray_raymoe_device_heartbeat_age_seconds", device=name) < 30.0
    assert total(text, "ray_raymoe_device_loads_total") > 0
    assert total(text, "ray_raymoe_device_link_busy_seconds_total") > 0
    assert 0.0 < total(text, "ray_raymoe_predictor_recall") <= 1.0
    assert total(text, "raymoe_nodes_unreachable") == 0.0


def test_another_application_sees_none_of_it(moe: Moe) -> None:
    text = gathered("another")
    assert "ray_raymoe_" not in text and 'raymoe_nodes_unreachable{app="another"} 0.0' in text


def test_the_last_steps_of_all_processes_and_where_experts_are(moe: Moe) -> None:
    observer = moe._session.observer
    assert observer.timeline()["processes"] == []
    stream = moe.stream("In the beginning", max_tokens=600, ignore_eos=True, temperature=0.0)
    next(stream)
    told = observer.timeline()
    stream.close()
    assert told["steps"] >= 1 and told["duration_s"] > 0
    roles = {process["role"]: process["spans"] for process in told["processes"]}
    assert set(roles) == {"main", "shadow", "worker edge-0", "worker edge-1"}
    assert {span[1] for span in roles["main"]} >= {"trunk", "experts"}
    assert any(span[0] == "link" for span in roles["worker edge-0"] + roles["worker edge-1"])
    assert observer.timeline() is told, "nothing new while nothing runs"
    until(lambda: set(observer.residency()["devices"]) == {"edge-0", "edge-1"}, "maps of both devices")
    residency = observer.residency()
    assert (residency["layers"], residency["experts"]) == (8, 32)
