"""The manifests in k8s/: each is right, and a typo in any of its blocks is found."""

import copy
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.app import BuildArgs
from raymoe.planning.cluster import DevicesFile
from tests.manifests import placement, references
from tests.manifests.pods import application
from tests.manifests.rendering import K8S, OVERLAYS, ROOT, Document, copied, kubectl, rendered
from tests.manifests.schemas import Schemas, serve_problems
from tests.unit.test_cli import run

SERVE = "serveConfigV2"
QWEN = "docs/planning/qwen3-30b-a3b"
SLOTS = {"cpu-demo": 8 << 20, "jetson": 8 << 30, "edge-gpu": 0}  # of devices that have shard and slots in one memory


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    directory = os.environ.get("KUBERAY_CRDS")
    if not directory:
        pytest.skip("KUBERAY_CRDS names no directory with KubeRay's CustomResourceDefinitions")
    return Schemas(Path(directory))


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Document]]:
    if kubectl() is None:
        pytest.skip("kubectl, which renders the manifests, is not here")
    made = copied(tmp_path_factory.mktemp("manifests"))
    return {name: rendered(made / "overlays" / name) for name in OVERLAYS}


def problems(documents: list[Document], schemas: Schemas) -> list[str]:
    """What is wrong with documents: first each alone, then what one says of another."""
    found = [problem for document in documents for problem in schemas.problems(document)]
    if found:
        return found
    for document in documents:
        if SERVE in document.get("spec", {}):
            found += serve_problems(document["spec"][SERVE])
    return found or references.problems(documents) + placement.problems(documents)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_right(overlay: str, overlays: dict[str, list[Document]], schemas: Schemas) -> None:
    assert problems(overlays[overlay], schemas) == []


def test_every_kind_of_cluster_has_an_overlay(overlays: dict[str, list[Document]]) -> None:
    assert {"cpu-demo", "edge-gpu", "ft", "jetson"} <= set(overlays)
    kinds = {document["kind"] for document in overlays["ft"]}
    assert {"RayService", "Service", "Secret", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet"} <= kinds
    (claim,) = (document for document in overlays["jetson"] if document["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadOnlyMany"]


PLANNED = {"cpu-demo": ("raymoe/assets/tiny-moe", "float32"), "edge-gpu": (QWEN, "auto"), "jetson": (QWEN, "auto")}


@pytest.mark.parametrize("overlay", PLANNED)
def test_resources_are_those_that_are_planned(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model, dtype = PLANNED[overlay]
    directory = f"k8s/overlays/{overlay}"
    result = run("plan", model, "--dtype", dtype, "--cluster", f"{directory}/devices.yaml", "--k8s")
    assert result.stdout == (ROOT / directory / "resources.yaml").read_text()


@pytest.mark.parametrize("overlay", PLANNED)
def test_the_plan_is_of_the_devices_that_are_configured(overlay: str, overlays: dict[str, list[Document]]) -> None:
    config = BuildArgs.model_validate(application(overlays[overlay])["args"]).cluster_config()
    planned = [one for one in DevicesFile.load(K8S / "overlays" / overlay / "devices.yaml").devices_resolved()]
    shards = sorted(
        (one.host_bytes - (0 if one.slot_bytes else SLOTS[overlay]), one.slot_bytes or SLOTS[overlay])
        for one in planned
        if one.serves_experts
    )
    assert shards == sorted((one.host_memory, one.slot_memory) for one in config.devices)


# --- typos ----------------------------------------------------------------------------------------------


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in documents, an embedded configuration included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        inner = yaml.safe_load(value) if key == SERVE else value
        yield from places(inner, (*at, key))


def value_at(data: Any, at: tuple[Any, ...]) -> Any:
    """What stands at a path."""
    for key in at:
        data = yaml.safe_load(data[key]) if key == SERVE and at[-1] != SERVE else data[key]
    return data


def changed(data: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy in which ``change`` was made to the container and the key at a path."""
    key, rest = at[0], at[1:]
    found = copy.copy(data)
    if not rest:
        change(found, key)
    elif key == SERVE:
        found[key] = yaml.safe_dump(changed(yaml.safe_load(found[key]), rest, change))
    else:
        found[key] = changed(found[key], rest, change)
    return found


def misspell_key(container: Any, key: Any) -> None:
    container[f"{key}x"] = container.pop(key)


def misspell_value(container: Any, key: Any) -> None:
    container[key] = f"{container[key]}x"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_misspelt_key_anywhere_is_found(overlay: str, overlays: dict[str, list[Document]], schemas: Schemas) -> None:
    documents = overlays[overlay]
    tried = [at for at in places(documents) if isinstance(at[-1], str)]
    passed = [at for at in tried if not problems(changed(documents, at, misspell_key), schemas)]
    assert len(tried) > 200
    assert passed == []


FREE = (  # texts that anybody may choose, and that nothing here can know to be wrong
    r"metadata\.(name|labels\.app)$",  # names of documents that nobody refers to
    r"data\.",  # content of Secrets
    r"\.env\.\d+\.(name|value)$",  # a program may read any variable
    r"\.args\.\d+$",  # of Redis
    r"\.name$",  # of containers, ports and the application, where nobody refers to them
    r"\.(image|hostPath\.path|runtimeClassName|storage|cpu)$",
    r"model\.path$",  # below the place where models are mounted
    r"redisAddress$",
    r"containers\.0\.volumeMounts\.\d+\.mountPath$",  # of Redis
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_misspelt_value_is_found_unless_anything_may_stand_there(
    overlay: str, overlays: dict[str, list[Document]], schemas: Schemas
) -> None:
    documents = overlays[overlay]
    texts = [at for at in places(documents) if isinstance(value_at(documents, at), str) and at[-1] != SERVE]
    passed = [".".join(map(str, at)) for at in texts if not problems(changed(documents, at, misspell_value), schemas)]
    assert [at for at in passed if not any(re.search(free, at) for free in FREE)] == []
    assert len(passed) < len(texts) / 3
