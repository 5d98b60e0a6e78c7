"""The whole path over several hosts: client, ingress and engine, workers, each behind a cable of its own."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymoe.config import EMBEDDED_MODEL
from tests.testbed.client import Client, Streamed
from tests.testbed.cluster import Cluster, cluster
from tests.testbed.network import Link, Network, run, testbed
from tests.testbed.wire import Call, link_bytes
from tests.toy_models import reference_tokens
from tests.waiting import until

pytestmark = pytest.mark.integration

PROMPT = "In the beginning God created the heaven and the earth"
LAYERS, EXPERTS = 8, 256
BEFORE, LATER = ("box-1", "box-2"), "box-3"
CONFIG = {
    "model": {"dtype": "float32"},
    "devices": [
        *({"name": name, "node_labels": {"host": name}} for name in BEFORE),
        {"name": LATER, "node_labels": {"host": LATER}, "optional": True},
    ],
    "replication": 2,
    "trunk": {"prefix_memory": 0},  # so that each answer reads its prompt, and bytes can be counted
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    network: Network
    cluster: Cluster
    url: str

    def ask(self, tokens: int) -> Streamed:
        return self.begin(tokens).streamed()

    def begin(self, tokens: int) -> Client:
        return Client(self.network["client"], self.url, PROMPT, tokens)

    def devices(self) -> dict[str, dict]:
        found = self.network["client"].run("curl", "--silent", "--fail", f"{self.url}/v1/stats").stdout
        return json.loads(found)["devices"]

    def owned(self) -> dict[str, int]:
        return {name: device["owned"] for name, device in self.devices().items()}

    def states(self) -> dict[str, str]:
        return {name: device["state"] for name, device in self.devices().items()}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with testbed(("box-0", *BEFORE, LATER, "client"), Link()) as network:
        hosts = [network[name] for name in ("box-0", *BEFORE)]
        with cluster(network, hosts) as running, running.serving(CONFIG) as url:
            yield Served(network=network, cluster=running, url=url)


@pytest.fixture(scope="module")
def reference() -> str:
    """What transformers continues the prompt with."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return str(tokenizer.decode(reference_tokens(model, tokenizer(PROMPT)["input_ids"], 200)))


def test_a_client_elsewhere_gets_transformers_own_tokens(served: Served, reference: str) -> None:
    answer = served.ask(60)
    assert answer.errors == () and reference.startswith(answer.text) and len(answer.text) > 60


def test_what_repairs_lives_with_the_engine(served: Served) -> None:
    def lives_on(kind: str) -> list[str]:
        hosts = [served.network[name] for name in ("box-0", *BEFORE)]
        pids = {host.name: run("ip", "netns", "pids", host.namespace).split() for host in hosts}
        return [name for name, all_of in pids.items() for pid in all_of if kind in title(pid)]

    def title(pid: str) -> str:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()

    assert lives_on("ray::PlacementShell") == ["box-0"]
    assert lives_on("ray::ServeReplica:raymoe:engine") == lives_on("ray::ServeReplica:raymoe:ingress") == ["box-0"]


def test_the_data_plane_listens_at_the_hosts_addresses_alone(served: Served) -> None:
    for name in BEFORE:
        host = served.network[name]
        listening = run("ip", "netns", "exec", host.namespace, "ss", "-ltnpH")
        ours = [line.split()[3] for line in listening.splitlines() if "ray::WorkerShel" in line]
        sockets = [address for address in ours if not address.startswith("0.0.0.0:")]  # Ray's own listen to all
        assert len(sockets) == 2 and all(host.address in address for address in sockets), listening


def test_bytes_of_each_cable_are_those_of_the_arithmetic(served: Served) -> None:
    tokens, hosts = 150, [served.network[name] for name in BEFORE]
    quiet_s = 5.0
    before = [host.counters() for host in hosts]
    time.sleep(quiet_s)
    idle = [
        tuple((b - a) / quiet_s for a, b in zip(x, host.counters(), strict=True))
        for x, host in zip(before, hosts, strict=True)
    ]
    calls, start_s = served.devices(), time.monotonic()
    before = [host.counters() for host in hosts]
    served.ask(tokens)
    after, took_s = [host.counters() for host in hosts], time.monotonic() - start_s
    prompt_tokens = len(AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(PROMPT)["input_ids"])
    decode, prompt = Call(rows=1, pairs=4, hidden=256), Call(rows=prompt_tokens, pairs=4 * prompt_tokens, hidden=256)
    later = served.devices()
    for index, (host, name) in enumerate(zip(hosts, BEFORE, strict=True)):
        layers = (later[name]["calls"] - calls[name]["calls"]) / tokens
        assert layers == int(layers) and 0 < layers < LAYERS, "a layer is one worker's"
        for way in (0, 1):
            expected = layers * ((tokens - 1) * link_bytes(decode)[way] + link_bytes(prompt)[way])
            counted = after[index][way] - before[index][way] - idle[index][way] * took_s
            assert counted == pytest.approx(expected, rel=0.05), (host.name, way)


def test_a_host_that_is_cut_off_in_mid_answer_changes_no_token(served: Served, reference: str) -> None:
    until(lambda: served.states()["box-2"] == "healthy", "health")
    under_way = served.begin(200)
    under_way.wait_for(40)
    served.network["box-2"].cut()
    try:
        answer = under_way.streamed()
        assert answer.errors == () and answer.text == reference
        assert answer.longest_pause_s < 3.0
        print(f"longest pause {answer.longest_pause_s:.2f} s")
        until(lambda: served.states()["box-2"] == "down", "the end of its health")
    finally:
        served.network["box-2"].mend()
    until(lambda: served.states()["box-2"] == "healthy", "its return")
    assert reference.startswith(served.ask(40).text)


def test_a_host_that_is_added_gets_a_shard_and_work(served: Served, reference: str) -> None:
    assert served.owned()[LATER] == 0
    served.cluster.add([served.network[name] for name in ("box-0", *BEFORE, LATER)])
    until(lambda: served.states()[LATER] == "healthy" and served.owned()[LATER] > EXPERTS // 4, "its shard")
    calls = served.devices()[LATER]["calls"]

    def is_at_work() -> bool:
        assert reference.startswith(served.ask(20).text)
        return served.devices()[LATER]["calls"] > calls

    until(is_at_work, "its share of the work")
    assert served.states()[LATER] == "healthy"
