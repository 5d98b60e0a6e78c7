"""Several Ray nodes on one machine: workers go where labels and resources say, and a client elsewhere streams."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray
import torch
from ray import serve
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM

import raymoe
from raymoe.actors.crew import Crew
from raymoe.actors.names import NAMESPACE, placement_name, worker_name
from raymoe.actors.session import cluster_status
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.errors import CapacityError, CheckpointError, StartError
from raymoe.observe.stats import DeviceStats
from raymoe.serve.app import build_application
from raymoe.transport.frames import Limits
from tests.ray_nodes import ray_nodes
from tests.toy_models import reference_tokens
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

PROMPT = list(range(200, 216))
ONE_EXPERT = 196_608

CLIENT = """
import json, sys, urllib.request
body = {"model": "tiny-moe", "prompt": json.loads(sys.argv[2]), "max_tokens": 12, "temperature": 0, "stream": True,
        "ignore_eos": True, "logprobs": 0}
request = urllib.request.Request(sys.argv[1] + "/v1/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=60) as answer:
    for line in answer:
        if line.startswith(b"data: "):
            print(line[6:].decode().strip())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and two edge nodes, told apart by a label and by a resource."""
    mini_pc, jetson = {"num_cpus": 1, "labels": {"box": "mini-pc"}}, {"num_cpus": 1, "resources": {"jetson": 1}}
    with ray_nodes(mini_pc, jetson) as cluster:
        yield cluster


def raymoe_actors() -> list[str]:
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE
    ]


def wait_until_no_actors() -> None:
    until(lambda: raymoe_actors() == [], "the end of all actors")


def status_once_it_answers(app: str) -> dict[str, DeviceStats]:
    """The devices that the placement actor of ``app`` knows, once it has come back."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return cluster_status(app).devices
        except StartError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def two_boxes(**more) -> dict:
    return {
        "model": {"dtype": "float32"},
        "devices": [
            {"name": "mini-pc", "node_labels": {"box": "mini-pc"}, "slot_memory": 40 * ONE_EXPERT},
            {"name": "jetson", "resources": {"jetson": 1}, "slot_memory": 8 * ONE_EXPERT},
        ],
        **more,
    }


def test_workers_sit_on_the_nodes_that_were_asked_for_and_answer_over_http(cluster: Cluster) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        handle = serve.run(build_application(ClusterConfig.parse(two_boxes())), name="boxes")
        stats = handle.stats.remote().result(timeout_s=WAIT_S)
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        assert nodes[stats.devices["mini-pc"].node]["Labels"]["box"] == "mini-pc"
        assert nodes[stats.devices["jetson"].node]["Resources"]["jetson"] == 1
        assert stats.devices["mini-pc"].peak_slot_bytes <= 40 * ONE_EXPERT

        command = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{port}", json.dumps(PROMPT)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT_S).stdout.split("\n")
        events = [json.loads(line) for line in lines if line and line != "[DONE]"]
        text = "".join(event["choices"][0]["text"] for event in events if event["choices"])
        result = handle.generate.remote(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True).result()
        reference = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        assert result.token_ids == reference_tokens(reference, PROMPT, 12)
        assert len(events) > 1, "the answer came in one piece, not as a stream"
        assert text == result.text and lines[-2] == "[DONE]"
    finally:
        serve.shutdown()
    wait_until_no_actors()


def test_leaving_launch_ends_every_actor(cluster: Cluster) -> None:
    with raymoe.launch(two_boxes()) as moe:
        assert len(raymoe_actors()) == 3
        assert moe.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2
    wait_until_no_actors()


def test_a_placement_actor_that_dies_comes_back_and_asks_the_workers(cluster: Cluster) -> None:
    with raymoe.launch(two_boxes(), app="rebuilt") as moe:
        before = moe.stats().devices
        ray.kill(ray.get_actor(placement_name("rebuilt"), NAMESPACE), no_restart=False)
        assert moe.generate(PROMPT, max_tokens=4).usage.completion_tokens == 4
        after = status_once_it_answers("rebuilt")
        assert {name: device.pid for name, device in after.items()} == {n: d.pid for n, d in before.items()}
        assert sum(device.owned for device in after.values()) == sum(device.owned for device in before.values())
    wait_until_no_actors()


def test_a_worker_that_is_gone_is_shown_as_down(cluster: Cluster) -> None:
    with raymoe.launch(two_boxes(), app="lossy") as moe:
        ray.kill(ray.get_actor(worker_name("lossy", "jetson"), NAMESPACE), no_restart=True)
        until(lambda: moe.stats().devices["jetson"].state == "down", "the end of the device's health")
        assert moe.stats().devices["mini-pc"].state == "healthy"
    wait_until_no_actors()


def test_a_shard_that_does_not_fit_fails_with_the_arithmetic_and_ends_every_actor(cluster: Cluster) -> None:
    config = two_boxes()
    for device in config["devices"]:
        device["host_memory"] = 3 * ONE_EXPERT
    with pytest.raises(CapacityError, match=r"256 experts x 1 owners take 50,331,648 bytes.*1,179,648 bytes"):
        raymoe.launch(config)
    wait_until_no_actors()


def test_a_budget_below_one_expert_fails_on_the_worker_and_ends_every_actor(cluster: Cluster) -> None:
    config = two_boxes()
    config["devices"][1]["slot_memory"] = ONE_EXPERT - 1
    with pytest.raises(CapacityError, match=r'"jetson": slot_memory of 196,607 bytes.*at least 196,608'):
        raymoe.launch(config)
    wait_until_no_actors()


def test_a_bad_checkpoint_fails_before_any_actor_starts(cluster: Cluster, tmp_path) -> None:
    before = raymoe_actors()
    with pytest.raises(CheckpointError, match="no such model directory"):
        raymoe.launch(two_boxes(model={"path": str(tmp_path / "nothing")}))
    assert raymoe_actors() == before


def test_a_label_that_no_node_has_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew("pending", ClusterConfig.parse(two_boxes()), (), Limits())
    monkeypatch.setattr("raymoe.actors.crew.START_TIMEOUT_S", 0.2)

    class Pending:
        class describe:
            @staticmethod
            def remote():
                return ray.remote(lambda: time.sleep(30)).remote()

    with pytest.raises(StartError, match=r'device "mini-pc" was not scheduled.*box.*mini-pc'):
        crew._describe("mini-pc", Pending)  # type: ignore[arg-type]


def test_a_driver_that_is_killed_leaves_no_workers(cluster: Cluster) -> None:
    code = (
        "import os, sys, ray, raymoe, json, time\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "moe = raymoe.launch(json.loads(sys.argv[2]))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, cluster.address, json.dumps(two_boxes())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == "up"
        assert len(raymoe_actors()) == 3
    finally:
        process.kill()
        process.wait()
    wait_until_no_actors()
