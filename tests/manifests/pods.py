"""The pods that rendered documents will make, each as the checks want to look at it."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import yaml

from tests.manifests.rendering import Document

SIZE = re.compile(r"(\d+)(Ki|Mi|Gi|Ti)?")
UNITS = {None: 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class Pod:
    """Pods alike.

    Attributes:
        labels, spec: of the pod's template.
        claims: templates of volumes that each pod gets for itself.
        group: of the RayService: "head" or the worker group; None: of another kind.
        ray_labels, ray_resources, start: what its Ray node offers, and options of ``ray start``.
    """

    where: str
    replicas: int
    labels: dict[str, str]
    spec: dict[str, Any]
    claims: tuple[str, ...] = ()
    group: str | None = None
    ray_labels: dict[str, str]
    ray_resources: dict[str, float]
    start: dict[str, str]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Its containers."""
        return list(self.spec["containers"])

    @property
    def ports(self) -> dict[str, int]:
        """Its containers' ports by name."""
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports") or ()}

    def limit(self, resource: str) -> str:
        """Of its first container; "0" where there is none."""
        return str(((self.containers[0].get("resources") or {}).get("limits") or {}).get(resource, "0"))

    @property
    def memory_bytes(self) -> int:
        """Its memory's limit."""
        match = SIZE.fullmatch(self.limit("memory"))
        return int(match[1]) * UNITS[match[2]] if match else 0


def pods(documents: list[Document]) -> list[Pod]:
    """All that documents make."""
    found = []
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "RayService":
            found += ray_pods(name, document["spec"]["rayClusterConfig"])
        elif document["kind"] == "StatefulSet":
            spec = document["spec"]
            claims = tuple(claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates") or ())
            found.append(_pod(name, spec["replicas"], spec["template"], claims=claims))
    return found


def ray_pods(name: str, cluster: Document) -> list[Pod]:
    """Of a RayService: the head first."""
    head = cluster["headGroupSpec"]
    found = [_pod(f"{name}, head", 1, head["template"], group="head", offers=head)]
    for group in cluster["workerGroupSpecs"]:
        where = f"{name}, group {group['groupName']}"
        found.append(_pod(where, group["replicas"], group["template"], group=group["groupName"], offers=group))
    return found


def _pod(where: str, replicas: int, template: Document, offers: Document | None = None, **fields: Any) -> Pod:
    offers = offers or {}
    return Pod(
        where=where,
        replicas=replicas,
        labels=template["metadata"].get("labels") or {},
        spec=template["spec"],
        ray_labels=offers.get("labels") or {},
        ray_resources={key: number(value) for key, value in (offers.get("resources") or {}).items()},
        start=offers.get("rayStartParams") or {},
        **fields,
    )


def number(text: str) -> float:
    """Of a Ray resource; 0 where it is none, so that whoever needs it misses it."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def service(documents: list[Document]) -> Document:
    """The one RayService."""
    (found,) = (document for document in documents if document["kind"] == "RayService")
    return found


def application(documents: list[Document]) -> Document:
    """The one application of its Serve configuration."""
    (found,) = serve_config(documents)["applications"]
    return dict(found)


def serve_config(documents: list[Document]) -> Document:
    """The Serve configuration of the RayService."""
    return embedded(service(documents)["spec"]["serveConfigV2"])


@functools.cache
def embedded(text: str) -> Document:
    """A Serve configuration from its text; callers must not change it."""
    return dict(yaml.safe_load(text))
