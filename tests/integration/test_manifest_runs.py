"""The cpu-demo overlay as it would run: its Serve configuration on nodes that offer what its pods would.

The nodes are on one machine, so there is one proxy, the head's, at a port of the test's.
"""

import copy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util.state import list_actors

from raymoe.serve.key_source import add_key
from tests.manifests.pods import Pod, pods, serve_config
from tests.manifests.rendering import Document, copied, kubectl, rendered
from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    if kubectl() is None:
        pytest.skip("kubectl, which renders the manifests, is not here")
    return rendered(copied(tmp_path_factory.mktemp("k8s")) / "overlays" / "cpu-demo")


def node(pod: Pod) -> dict[str, Any]:
    """What a pod's Ray node offers."""
    cpus = int(pod.start.get("num-cpus", "2"))
    return {"num_cpus": cpus, "labels": pod.ray_labels, "resources": pod.ray_resources}


@pytest.fixture(scope="module")
def nodes(documents: list[Document]) -> Iterator[dict[str, str]]:
    """A Ray cluster of the pods; what each node is, by its id."""
    head, *workers = pods(documents)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": node(head)["num_cpus"]})
    for pod in workers:
        for _ in range(pod.replicas):
            cluster.add_node(**node(pod))
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield {one["NodeID"]: one["Labels"].get("part", "head") for one in ray.nodes()}
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_each_part_comes_to_its_pod(documents: list[Document], nodes: dict[str, str], tmp_path: Path) -> None:
    assert sorted(nodes.values()) == ["expert", "expert", "head", "trunk"]
    key = add_key(tmp_path / "keys.yaml", "me")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = copy.deepcopy(serve_config(documents))
    config["applications"][0]["args"]["serving"]["keys_file"] = str(tmp_path / "keys.yaml")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": config["applications"]}))
    until(lambda: serve.status().applications["raymoe"].status == "RUNNING", "the start of the application")

    url, body = f"http://127.0.0.1:{port}/v1/completions", {"prompt": "In the beginning", "max_tokens": 4}
    assert httpx.post(url, json=body, timeout=WAIT_S).status_code == 401
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=WAIT_S)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4

    places: dict[str, list[str]] = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")]):
        places.setdefault(actor.class_name.rpartition(":")[2], []).append(nodes[actor.node_id])
    replicas = {name: homes for name, homes in places.items() if name in ("ingress", "engine")}
    assert replicas == {"ingress": ["trunk"], "engine": ["trunk"]}, places
    workers = [homes for name, homes in places.items() if "Worker" in name]
    assert workers == [["expert", "expert"]], places
    free = ray.available_resources()
    assert free.get("expert") == 1.0  # the trunk's: each expert pod has its worker
