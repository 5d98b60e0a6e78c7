"""Metrics of all nodes in one answer. Ray exports each node's from an agent there; this reads them all.

What is gathered is this application's: ``ray_raymoe_…`` with its name in the label ``app``. A node that does not answer
in time is left out, and counted in ``raymoe_nodes_unreachable``.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Sequence

import aiohttp
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from raymoe.observe.metrics import ALL

log = logging.getLogger(__name__)

MEDIA_TYPE = CONTENT_TYPE_LATEST
NODE_TIMEOUT_S = 3.0
MOST_BYTES = 16 << 20  # of one node: Ray's own metrics are some hundred kB
PREFIX = "ray_raymoe_"
NAME = re.compile(r"ray_raymoe_[a-z0-9_]+")
KEPT_LABELS = {
    *(label for metric in ALL for label in metric.labels),
    "le",
    "NodeAddress",
    "WorkerId",
}  # the others are the same everywhere, or the exporter's
FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)|(\w+)[{ ]")


class Gatherer:
    """Reads the nodes' metrics.

    Args:
        nodes: URLs of the nodes' endpoints, as they are now.
    """

    def __init__(self, app: str, nodes: Callable[[], Sequence[str]]) -> None:
        self._app = app
        self._nodes = nodes

    async def gather(self) -> bytes:
        """Prometheus' text format."""
        urls = await asyncio.to_thread(self._nodes)
        timeout = aiohttp.ClientTimeout(total=NODE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            texts = await asyncio.gather(*(self._read(session, url) for url in urls))
        return merged([text for text in texts if text is not None], self._app, unreachable=texts.count(None))

    async def _read(self, session: aiohttp.ClientSession, url: str) -> str | None:
        try:
            async with session.get(url) as response:
                response.raise_for_status()
                body = await response.content.read(MOST_BYTES)
            return body.decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("no metrics from %s: %s", url, error or type(error).__name__)
            return None


def ray_nodes() -> list[str]:
    """Where the agents of all nodes that are alive serve their metrics."""
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]


def merged(texts: Iterable[str], app: str, unreachable: int = 0) -> bytes:
    """One text of several nodes': the families of this application, each once, with all nodes' samples."""
    families: dict[str, Metric] = {}
    for text in texts:
        for family in text_string_to_metric_families(ours(text)):
            if NAME.fullmatch(family.name) is None:
                continue
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                if sample.labels.get("app") == app:
                    labels = {name: value for name, value in sample.labels.items() if name in KEPT_LABELS}
                    whole.add_sample(sample.name, labels, sample.value)
    silent = Metric("raymoe_nodes_unreachable", "Nodes whose metrics could not be read in time.", "gauge")
    silent.add_sample("raymoe_nodes_unreachable", {"app": app}, unreachable)
    registry = CollectorRegistry()
    registry.register(_Gathered([*(families[name] for name in sorted(families)), silent]))
    return generate_latest(registry)


def ours(text: str) -> str:
    """The lines that are about our metrics; Ray's own are many times as many."""
    kept = []
    for line in text.splitlines():
        found = FAMILY.match(line)
        if found is not None and (found[1] or found[2]).startswith(PREFIX):
            kept.append(line)
    return "\n".join(kept) + "\n"


class _Gathered(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """All of them."""
        return [family for family in self._families if family.samples]
