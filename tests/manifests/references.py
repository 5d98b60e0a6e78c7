"""Whether what documents name is there: releases of images, volumes, Secrets and their keys, selected pods, ports."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from tests.manifests.pods import Pod, pods, service
from tests.manifests.rendering import K8S, ROOT, Document

LABELS = {"app", "component"}  # the only ones that documents and pods have
OUTSIDE = {  # of others' pods and namespaces
    "raymoe-client": ("true",),
    "k8s-app": ("kube-dns",),
    "app.kubernetes.io/name": ("kuberay-operator",),
    "kubernetes.io/metadata.name": ("kube-system", "monitoring"),
}
RESOURCES = {"cpu", "memory", "nvidia.com/gpu"}
NODE_LABELS = {"kubernetes.io/arch": {"amd64", "arm64"}, "nvidia.com/gpu.present": {"true"}}
TOLERATED = ("nvidia.com/gpu", "Exists", "NoSchedule")
PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+[\w.-]*")


def problems(documents: list[Document]) -> list[str]:
    """What is named and not there."""
    found = list(names(documents))
    found += versions(documents)
    gcs = service(documents)["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions") or {}
    found += secret_key((gcs.get("redisPassword") or {}).get("valueFrom") or {}, documents)
    for pod in pods(documents):
        found += [f"{pod.where}: {problem}" for problem in (*volumes(pod, documents), *on_node(pod), *guarded(pod))]
    found += selectors(documents)
    return found


def names(documents: list[Document]) -> Iterator[str]:
    """Documents have names of their own, known labels, and no namespace: whoever applies them chooses it."""
    seen = set()
    for document in documents:
        metadata = document["metadata"]
        key = document["kind"], metadata["name"]
        if key in seen:
            yield f"there are two of {key}"
        seen.add(key)
        unknown = set(metadata.get("labels") or {}) - LABELS
        if unknown or set(metadata) - {"name", "labels"}:
            yield f"{key}: labels {unknown}, fields {sorted(metadata)}"
        if document["kind"] == "Secret" and not all((document.get("data") or {"": ""}).values()):
            yield f"{key} holds nothing"
        if document["kind"] == "Secret" and document.get("type") != "Opaque":
            yield f"{key} is of type {document.get('type')}"
        templates = (document.get("spec") or {}).get("volumeClaimTemplates") or ()
        for claim in [document] if document["kind"] == "PersistentVolumeClaim" else templates:
            if set(claim["spec"]["resources"]["requests"]) != {"storage"}:
                yield f"{key} asks for no storage"
            if not set(claim["spec"]["accessModes"]) <= {"ReadOnlyMany", "ReadWriteOnce"}:
                yield f"{key}: accessModes {claim['spec']['accessModes']}"


# --- images ---------------------------------------------------------------------------------------------


def release() -> str:
    """raymoe's own."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def pinned(package: str) -> str:
    """The release of a package that constraints.txt names."""
    (found,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(found)


def variants() -> set[str]:
    """Of the image, as the Dockerfiles say what they are for."""
    files = (K8S / "images").glob("*Dockerfile*")
    return {name for file in files for name in re.findall(r"raymoe:VERSION-(\w+)", file.read_text())}


def versions(documents: list[Document]) -> Iterator[str]:
    """Images are those that the Dockerfiles make of this release, and Ray's version is theirs."""
    ray = service(documents)["spec"]["rayClusterConfig"].get("rayVersion")
    if ray != pinned("ray"):
        yield f"rayVersion is {ray}, but constraints.txt has {pinned('ray')}"
    ours = set()
    for pod in pods(documents):
        for container in pod.containers:
            image = container.get("image", "")
            if pod.group is None:
                if not PINNED.fullmatch(image):
                    yield f"{pod.where}: image {image} has no release"
            elif image not in {f"raymoe:{release()}-{variant}" for variant in variants()}:
                yield f"{pod.where}: image {image}, but the Dockerfiles make raymoe:{release()}- and {variants()}"
            else:
                ours.add(image)
            arm = (pod.spec.get("nodeSelector") or {}).get("kubernetes.io/arch") == "arm64"
            if pod.group not in (None, "head") and arm != image.endswith("-jetson"):
                yield f"{pod.where}: image {image} on nodes of another kind"
    if len(ours) > 1:
        yield f"nodes of one cluster run the same image; here are {sorted(ours)}"


# --- a pod ----------------------------------------------------------------------------------------------


def volumes(pod: Pod, documents: list[Document]) -> Iterator[str]:
    """Each mount has its volume, each volume its mount and its source; Secrets have the keys that are asked for."""
    declared = {volume["name"] for volume in pod.spec.get("volumes") or ()} | set(pod.claims)
    mounted = {mount["name"] for one in pod.containers for mount in one.get("volumeMounts") or ()}
    if declared != mounted:
        yield f"volumes {sorted(declared)}, mounts {sorted(mounted)}"
    for volume in pod.spec.get("volumes") or ():
        if "secret" in volume and not has(documents, "Secret", volume["secret"].get("secretName")):
            yield f"there is no Secret {volume['secret']}"
        if volume.get("hostPath", {"type": "Directory"}).get("type") != "Directory":
            yield f"{volume} may be made where it is not"
        claim = volume.get("persistentVolumeClaim")
        if claim and not has(documents, "PersistentVolumeClaim", claim.get("claimName")):
            yield f"there is no claim {claim}"
    for container in pod.containers:
        for mount in container.get("volumeMounts") or ():
            if mount["name"] not in pod.claims and mount.get("readOnly") is not True:
                yield f"{mount['name']} is not mounted read-only"
        environment = container.get("env") or []
        given = [one["name"] for one in environment]
        if len(set(given)) != len(given):
            yield f"variables twice: {given}"
        for one in environment:
            yield from secret_key(one.get("valueFrom") or {}, documents)
        for argument in container.get("args") or ():
            if set(re.findall(r"\$\((\w+)\)", argument)) - set(given):
                yield f"{argument} names no variable of it"
        port = ((container.get("readinessProbe") or {}).get("tcpSocket") or {}).get("port")
        if port is not None and port not in pod.ports:
            yield f"its readinessProbe asks port {port}"


def secret_key(source: dict[str, Any], documents: list[Document]) -> Iterator[str]:
    """The Secret that a value comes from is there and has the key."""
    asked = source.get("secretKeyRef")
    if asked and asked.get("key") not in has(documents, "Secret", asked.get("name")).get("data", {}):
        yield f"no Secret has {asked}"


def on_node(pod: Pod) -> Iterator[str]:
    """Nodes are chosen by labels that nodes have, and asked for what they can give."""
    for key, value in (pod.spec.get("nodeSelector") or {}).items():
        if value not in NODE_LABELS.get(key, ()):
            yield f"no node has {key}={value}"
    for toleration in pod.spec.get("tolerations") or ():
        if (toleration.get("key"), toleration.get("operator"), toleration.get("effect")) != TOLERATED:
            yield f"toleration {toleration}"
    for container in pod.containers:
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        if not {"cpu", "memory"} <= set(requests) <= RESOURCES or not {"memory"} <= set(limits) <= RESOURCES:
            yield f"resources {resources}"
        if any(requests.get(name) != value for name, value in limits.items()):
            yield f"limits are not what is requested: {resources}"


def guarded(pod: Pod) -> Iterator[str]:
    """No pod runs as root, gains privileges or talks to Kubernetes; all carry the labels that policies select."""
    security = pod.spec.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "it may run as root"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "it has no seccomp profile"
    if security.get("fsGroup") != security.get("runAsUser") or security.get("runAsGroup") != security.get("runAsUser"):
        yield "its user can't read what is mounted"
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "it can ask Kubernetes"
    for container in pod.containers:
        own = container.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            yield "its container may gain privileges"
    if "app" not in pod.labels or set(pod.labels) - LABELS:
        yield f"labels {pod.labels}"


# --- selectors ------------------------------------------------------------------------------------------


def selectors(documents: list[Document]) -> Iterator[str]:
    """Whoever selects pods finds some, at ports that they have; and nobody is left out of a policy."""
    all_pods = pods(documents)
    for document in documents:
        name, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec") or {}
        if document["kind"] == "Service":
            found = selected(all_pods, spec.get("selector") or {})
            yield from (f"{name}: {problem}" for problem in service_ports(spec, found))
        elif document["kind"] == "StatefulSet":
            if not selected(all_pods, spec["selector"]["matchLabels"]):
                yield f"{name} selects nothing"
            if not has(documents, "Service", spec["serviceName"]):
                yield f"{name}: there is no Service {spec['serviceName']}"
        elif document["kind"] == "PodDisruptionBudget":
            count = sum(pod.replicas for pod in selected(all_pods, spec["selector"]["matchLabels"]))
            if spec.get("minAvailable") != count - 1:
                yield f"{name}: of {count} pods it wants {spec.get('minAvailable')}; all but one may be wanted"
        elif document["kind"] == "NetworkPolicy":
            yield from (f"{name}: {problem}" for problem in policy(spec, all_pods))
    yield from unguarded(documents, all_pods)


def service_ports(spec: dict[str, Any], found: list[Pod]) -> Iterator[str]:
    """A Service has pods behind it, each with the ports it leads to."""
    if not found:
        yield f"selects no pod: {spec.get('selector')}"
    for port in spec.get("ports") or ():
        yield from (f"{pod.where} has no port {port}" for pod in found if port.get("targetPort") not in pod.ports)
        yield from (f"port {port} is another" for pod in found if pod.ports.get(port.get("targetPort")) != port["port"])


def policy(spec: dict[str, Any], all_pods: list[Pod]) -> Iterator[str]:
    """A policy is for some pods, lets pods that are there in or out, and at ports that they have."""
    targets = selected(all_pods, spec["podSelector"].get("matchLabels") or {})
    if not targets:
        yield f"is for no pod: {spec['podSelector']}"
    for direction, key in (("ingress", "from"), ("egress", "to")):
        if (direction.capitalize() in spec["policyTypes"]) != (direction in spec):
            yield f"policyTypes {spec['policyTypes']}, but has {sorted(spec)}"
        for rule in spec.get(direction) or ():
            peers = [peer for one in rule.get(key) or () for peer in known_peers(one, all_pods)]
            if not peers or None in peers:
                yield f"{direction} {key} nobody: {rule}"
            at = targets if direction == "ingress" else [pod for pod in peers if pod is not None and pod != OTHERS]
            open_ports = {number for pod in at for number in pod.ports.values()} | ({53} if OTHERS in peers else set())
            asked = {port.get("port") for port in rule.get("ports") or ()}
            if {port.get("protocol") for port in rule.get("ports") or ()} - {"TCP", "UDP"}:
                yield f"{direction} by another protocol: {rule}"
            if asked - open_ports:
                yield f"{direction} to ports {asked - open_ports} that nothing listens on"


OTHERS = Pod(where="others", replicas=0, labels={}, spec={"containers": []}, ray_labels={}, ray_resources={}, start={})


def known_peers(peer: dict[str, Any], all_pods: list[Pod]) -> list[Pod | None]:
    """Pods that a peer of a policy means; None where it means nobody that we know."""
    within = "namespaceSelector" not in peer
    labels = {**(peer.get("podSelector") or {}).get("matchLabels", {})}
    labels |= (peer.get("namespaceSelector") or {}).get("matchLabels", {})
    ours: list[Pod | None] = [*selected(all_pods, labels)] if within and labels else []
    known = all(value in OUTSIDE.get(key, ()) for key, value in labels.items())
    return ours or ([OTHERS] if labels and known else [None])


def unguarded(documents: list[Document], all_pods: list[Pod]) -> Iterator[str]:
    """Pods to which no policy of both directions applies are open to everybody."""
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    closed = [spec for spec in policies if set(spec["policyTypes"]) == {"Ingress", "Egress"}]
    for pod in all_pods:
        if not any(pod in selected(all_pods, spec["podSelector"].get("matchLabels") or {}) for spec in closed):
            yield f"{pod.where}: no NetworkPolicy is for it"


def selected(all_pods: list[Pod], labels: dict[str, str]) -> list[Pod]:
    """Pods with all of some labels; of no labels none, for nothing here is meant for all."""
    return [pod for pod in all_pods if labels and labels.items() <= pod.labels.items()]


def has(documents: list[Document], kind: str, name: str | None) -> Document:
    """A document; empty where it is not there."""
    return next((one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)), {})
