"""Ray clusters of several nodes on this machine, as tests of whole clusters have them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster


@contextmanager
def ray_nodes(*workers: dict[str, Any]) -> Iterator[Cluster]:
    """A head with two CPUs and such further nodes, which this process has joined; all of it ends at the end."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for worker in workers:
        cluster.add_node(**worker)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
