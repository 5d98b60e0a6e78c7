"""From a devices file to times, and the command line of the simulation."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from raymoe import cli
from raymoe.errors import ConfigError
from raymoe.planning.cluster import DevicesFile
from raymoe.simulation.setting import setting_of
from raymoe.simulation.shape import SHAPES
from raymoe.simulation.synthetic import synthetic
from raymoe.simulation.trace import save

GPU: dict[str, Any] = {
    "memory": "10GB",
    "host_memory": "64GB",
    "link": {"bytes_per_s": "25GB"},
    "compute": {"flops": 1e13, "bytes_per_s": "600GB"},
    "overhead_s": 0.001,
}
FILE: dict[str, Any] = {
    "devices": [
        {"name": "main", **GPU},
        {"name": "shadow", **GPU, "memory": "48GB"},
        {"name": "w", "count": 8, **GPU, "slot_memory": "1GB"},
    ],
    "trunk": "main",
    "shadow": "shadow",
    "network": {"bytes_per_s": "125MB", "latency_s": 0.0002},
}
MIXTRAL = SHAPES["mixtral-8x7b"]


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, arguments)


# --- settings -------------------------------------------------------------------------------------------


def test_times_follow_from_bytes_and_rates() -> None:
    setting = setting_of(DevicesFile.parse(FILE), MIXTRAL)
    assert [str(worker.name) for worker in setting.workers] == [f"w-{index}" for index in range(8)]
    worker = setting.workers[0]
    assert worker.load_s == pytest.approx(704_643_072 / 25e9)
    assert worker.expert_s == pytest.approx(704_643_072 / 600e9)
    assert (worker.slots, worker.call_s, worker.is_local) == (1, 0.001, False)
    assert setting.main.layer_s == pytest.approx(MIXTRAL.trunk_bytes / 33 / 600e9 + 0.001, rel=1e-3)
    assert setting.shadow is not None and setting.shadow.run_ahead == 2
    assert setting.network.takes_s(125_000_000) == 1.0


def test_measured_times_count_before_all_others() -> None:
    measured = {"main_layer_s": 0.004, "head_s": 0.002, "layer_s": 0.003, "load_s": 0.03, "shadow_layer_s": 0.005}
    file = {**FILE, "devices": [{**device, "times": measured} for device in FILE["devices"]]}
    setting = setting_of(DevicesFile.parse(file), MIXTRAL)
    assert (setting.main.layer_s, setting.main.head_s) == (0.004, 0.002)
    assert (setting.workers[0].call_s, setting.workers[0].expert_s, setting.workers[0].load_s) == (0.0, 0.003, 0.03)
    assert setting.network.latency_s == 0.0, "a measured layer has its messages in it"
    assert setting.shadow is not None and setting.shadow.layer_s == 0.005


def test_slots_too_small_for_an_expert_are_named() -> None:
    file = {**FILE, "devices": [{**device, "slot_memory": "500MB"} for device in FILE["devices"]]}
    with pytest.raises(ConfigError, match='device "w-0": 500,000,000 bytes for slots hold no expert of 704,643,072'):
        setting_of(DevicesFile.parse(file), MIXTRAL)


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    file = tmp_path / "devices.yaml"
    file.write_text(json.dumps(FILE))
    return str(file)


def test_simulate_prints_a_row_per_policy(cluster: str) -> None:
    found = run("simulate", "synthetic", "--like", "mixtral-8x7b", "--cluster", cluster, "--steps", "4")
    assert found.exit_code == 0, found.output
    for words in (
        "all_resident",
        "on_demand",
        "importance",
        "on_demand_shadow",
        "joint",
        "Of roofline",
        "simulated, not measured",
    ):
        assert words in found.stdout


def test_simulate_reads_a_trace_and_prints_json(cluster: str, tmp_path: Path) -> None:
    save(synthetic(SHAPES["tiny-moe"], 6), tmp_path / "t.npz")
    trace = str(tmp_path / "t.npz")
    found = run("simulate", trace, "--cluster", cluster, "--policy", "on_demand_shadow", "--drafts", "2", "--json")
    assert found.exit_code == 0, found.output
    (result,) = json.loads(found.stdout)
    assert result["policy"] == "on_demand_shadow" and result["model"] == "tiny-moe"
    assert result["tpot_s"] > 0 and result["tokens_per_pass"] > 1 and len(result["devices"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic"], "a synthetic trace needs --like"),
        (["synthetic", "--like", "x"], '--like is "x"; known are'),
        (["/no/such.npz"], "can't read the trace /no/such.npz"),
        (["synthetic", "--like", "tiny-moe", "--policy", "best"], '--policy is "best"; allowed are all_resident'),
        (["synthetic", "--like", "tiny-moe", "--steps", "0"], "--steps is 0"),
        (["synthetic", "--like", "tiny-moe", "--spare-slots", "-1"], "--spare-slots is -1; allowed is 0 to"),
        (["synthetic", "--like", "tiny-moe", "--drafts", "9"], "--drafts is 9; allowed is 0 to 8"),
        (["synthetic", "--like", "tiny-moe", "--persistence", "2"], "--persistence is 2; allowed is 0 to 1"),
    ],
)
def test_simulate_says_what_is_wrong(cluster: str, arguments: list[str], message: str) -> None:
    found = run("simulate", *arguments, "--cluster", cluster)
    assert found.exit_code == 2 and message in found.stderr


@pytest.mark.parametrize(
    ("output", "message"),
    [("/no/such/t.npz", "there is no directory /no/such"), ("t.json", "a trace is called NAME.npz")],
)
def test_record_checks_its_output_before_anything_starts(output: str, message: str) -> None:
    found = run("record", "deployments/local.yaml", "-o", output)
    assert found.exit_code == 2 and message in found.stderr
