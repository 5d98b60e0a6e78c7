"""``raymoe plan`` and ``raymoe probe``: sizes from headers and from configurations agree; words, JSON, exit codes."""

import json
import shutil
import socket
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymoe import plan_command, probing
from raymoe.config import EMBEDDED_MODEL
from raymoe.errors import ConfigError, StartError
from raymoe.plan_command import facts_of
from raymoe.planning.cluster import DevicesFile
from raymoe.planning.pods import pod_groups, resources_of
from tests.planning import device, embedded, mixtral
from tests.toy_models import save_toy
from tests.unit.test_cli import error_of, run

GROUPS = "/spec/rayClusterConfig/workerGroupSpecs/"
DOCS = Path(__file__).parents[2] / "docs" / "planning"


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    path = tmp_path / "devices.yaml"
    path.write_text(yaml.safe_dump({"devices": [device()]}))
    return path


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "qwen3_next", "gpt_oss", "gemma4_text"])
def test_a_configuration_alone_gives_the_sizes_of_the_headers(model_type: str, tmp_path: Path) -> None:
    whole = save_toy(model_type, tmp_path / "whole")
    bare = tmp_path / "bare" / "whole"
    bare.mkdir(parents=True)
    shutil.copy(whole / "config.json", bare)
    headers, configuration = facts_of(str(whole), "float32"), facts_of(str(bare), "float32")
    assert (headers.known_from, configuration.known_from) == ("headers", "configuration")
    fields = ("sizes", "hidden", "trunk_bytes", "head_bytes", "table_bytes", "kv_bytes", "element_bytes")
    assert [getattr(headers, name) for name in fields] == [getattr(configuration, name) for name in fields]


def test_the_embedded_model_has_the_sizes_that_inspect_shows() -> None:
    facts = facts_of(str(EMBEDDED_MODEL), "float32")
    shown = json.loads(run("inspect", "--dtype", "float32", "--json").stdout)
    assert (facts.trunk_bytes, facts.routed_bytes) == (shown["trunk_bytes"], shown["routed_bytes"])
    assert (facts.layers, facts.top_k, facts.expert_bytes) == (8, 4, 196_608)
    assert facts.kv_bytes == 8192  # docs/benchmarks.md, "predictor"
    assert facts.table_bytes == 0 and facts.head_bytes == 4096 * 256 * 4


def test_the_published_mixtral_has_its_published_sizes() -> None:
    facts = facts_of(str(DOCS / "mixtral-8x7b" / "config.json"), "auto")
    expected = mixtral()
    assert (facts.sizes, facts.hidden, facts.kv_bytes) == (expected.sizes, expected.hidden, expected.kv_bytes)
    assert facts.trunk_bytes == pytest.approx(expected.trunk_bytes, rel=1e-3)  # norms and routers are small
    assert (facts.head_bytes, facts.table_bytes) == (expected.head_bytes, expected.table_bytes)


def test_weights_that_are_not_all_there_yet_do_not_matter(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED_MODEL / "config.json", tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert facts_of(str(tmp_path), "auto").known_from == "configuration"


# --- the command ----------------------------------------------------------------------------------------


def test_a_plan_in_words(devices: Path) -> None:
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(devices))
    assert result.exit_code == 0, result.output
    for words in (
        "tiny-moe",
        "8 MoE layers of 32 experts, top-4",
        "on_demand",
        "importance",
        "Fastest:",
        "no room",
        "Kept by joint",
    ):
        assert words in result.stdout


def test_a_plan_as_json_and_a_budget(devices: Path) -> None:
    arguments = ("plan", str(EMBEDDED_MODEL), "--cluster", str(devices), "--json")
    found = json.loads(run(*arguments).stdout)
    assert found["fits"] and found["model"]["known_from"] == "headers" and found["within_budget"] is None
    by_name = {policy["policy"]: policy for policy in found["policies"]}
    assert by_name["all_resident"]["tpot_s"] is None
    (worker,) = found["devices"]
    in_use = 2 * -(-found["model"]["top_k"] // by_name["joint"]["group_size"])
    assert worker["keeps"] == max(0, worker["slots"] - in_use)
    best = by_name[found["best"]]["tpot_s"]
    met = run(*arguments, "--tpot-ms", str(best * 1e3 * 1.01))
    assert met.exit_code == 0 and found["best"] in json.loads(met.stdout)["within_budget"]
    missed = run(*arguments, "--tpot-ms", str(best * 1e3 * 0.5))
    assert missed.exit_code == 1 and json.loads(missed.stdout)["within_budget"] == []


def test_a_missed_budget_says_what_would_do(devices: Path) -> None:
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(devices), "--tpot-ms", "1")
    assert result.exit_code == 1 and "No policy meets 1 ms" in result.stdout


def test_a_model_that_does_not_fit_says_how_many_devices_lack(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"devices": [device(host_memory="10MB")]}))
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(path), "--dtype", "float32")
    assert result.exit_code == 1
    assert "It does not fit" in result.stdout and '5 more like "worker" would do' in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tpot-ms", "0"), ["--tpot-ms", "more than 0"]),
        (("--dtype", "int3"), ["--dtype", "int3"]),
        (("--cluster", "absent.yaml"), ["absent.yaml", "can't read"]),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: list[str], devices: Path) -> None:
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(devices), *arguments)
    assert result.exit_code == 2
    assert all(word in error_of(result) for word in words)


def test_a_dense_model_is_refused(tmp_path: Path, devices: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    result = run("plan", str(tmp_path), "--cluster", str(devices))
    assert result.exit_code == 2 and "no routed experts" in error_of(result)


# --- probe ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ARRAY_BYTES": 2**16, "EDGE": 32, "BULK_BYTES": 2**16, "ROUNDS": 1}.items():
        monkeypatch.setattr(probing, name, value)


def test_a_probe_is_a_devices_file(small: None, tmp_path: Path) -> None:
    path = tmp_path / "probed.yaml"
    result = run("probe", "--name", "here", "-o", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == yaml.safe_load(path.read_text())
    (found,) = DevicesFile.load(path).devices_resolved()
    assert found.name == "here" and found.flops > 0 and found.memory_bytes_per_s > 0 and found.overhead_s > 0
    assert "loopback" in result.stderr


def test_best_is_the_fastest_round_after_the_first() -> None:
    ticks = iter([0.0, 0.1, 1.0, 4.0, 5.0, 7.0])
    assert probing.best_s(lambda: None, lambda: None, rounds=2, clock=lambda: next(ticks)) == 2.0


def test_a_peer_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port}.*--listen"):
        probing.to_peer(("127.0.0.1", port))


@given(st.binary(max_size=40) | st.integers(probing.MOST_BYTES + 1, 2**64 - 1).map(probing.LENGTH.pack))
def test_whatever_comes_the_listener_ends_in_peace(data: bytes) -> None:
    with probing.listening("127.0.0.1", 0) as (server, port):
        thread = threading.Thread(target=probing.answer_one, args=(server,))
        thread.start()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("text", ["", "host", "host:", ":7", "host:0", "host:65536", "host:x"])
def test_addresses_are_checked(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        probing.address(text, "--peer")


def test_an_address() -> None:
    assert probing.address("[::1]:70", "--peer") == ("::1", 70)
    assert plan_command.milliseconds(0.01234) == "12.3 ms"


# --- pods -----------------------------------------------------------------------------------------------


def test_what_a_pod_asks_for_is_the_sum_of_what_runs_in_it(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    cpu = {
        "unified": True,
        "compute": {"flops": 1e10, "bytes_per_s": "10GB"},
        "memory": "1GiB",
        "host_memory": "100MiB",
    }
    front = {**cpu, "name": "front", "serves_experts": False}
    path.write_text(yaml.safe_dump({"devices": [front, {**cpu, "name": "worker", "count": 2}], "trunk": "front"}))
    result = run("plan", str(EMBEDDED_MODEL), "--dtype", "float32", "--cluster", str(path), "--k8s")
    assert result.exit_code == 0, result.output
    patch = {(one["op"], one["path"].removeprefix(GROUPS)): one["value"] for one in yaml.safe_load(result.stdout)}
    assert (patch["test", "0/groupName"], patch["test", "1/groupName"]) == ("front", "worker")
    assert patch["add", "0/replicas"] == 1 and patch["add", "1/replicas"] == patch["add", "1/maxReplicas"] == 2
    worker = patch["add", "1/template/spec/containers/0/resources"]
    # a shard of 100 MiB and a tenth; Ray's daemons, its object store and one process with torch
    assert worker == {"requests": {"cpu": "1500m", "memory": "1134Mi"}, "limits": {"memory": "1134Mi"}}
    facts = facts_of(str(EMBEDDED_MODEL), "float32")
    fixed_mib = (facts.trunk_bytes + 2048 * facts.kv_bytes) * 1.1 / 2**20
    front_mib = int(patch["add", "0/template/spec/containers/0/resources"]["limits"]["memory"].removesuffix("Mi"))
    assert 0 <= front_mib - (fixed_mib + 512 + 256 + 256 + 512) < 1


def test_a_card_is_asked_for_and_its_slots_are_not_host_memory(tmp_path: Path) -> None:
    small, large = (
        pod_groups(embedded(), DevicesFile.parse({"devices": [device(slot_memory=size)]})) for size in ("1MB", "512MB")
    )
    assert small == large and small[0].gpus == 1
    assert small[0].memory_bytes > 10**9 * 1.1
    assert resources_of(small[0])["limits"]["nvidia.com/gpu"] == "1"


def test_what_does_not_fit_gets_no_patch(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"devices": [device(host_memory="10MB")]}))
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(path), "--dtype", "float32", "--k8s")
    assert result.exit_code == 2 and not result.stdout and "does not fit" in error_of(result)


def test_a_patch_comes_alone(devices: Path) -> None:
    result = run("plan", str(EMBEDDED_MODEL), "--cluster", str(devices), "--k8s", "--json")
    assert result.exit_code == 2 and "--json" in error_of(result)
