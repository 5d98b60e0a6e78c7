"""Documents against schemas in which every misspelt field is an error: KubeRay's CRDs, Kubernetes' own kinds, Ray
Serve's configuration and the arguments of our builder.
"""

import functools
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from kubernetes_validate.utils import latest_version, schema_contents
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from deployments.app import BuildArgs, build
from raymoe.config import UserConfig
from raymoe.errors import ConfigError
from raymoe.strict import describe
from tests.manifests.rendering import Document

EXTENSIONS = "ray.io/"  # kinds that CRDs describe
BUILDER = "deployments.app:build"


def strict(schema: Any) -> Any:
    """A schema in which objects that list their properties have no others.

    Kubernetes drops fields that it does not know, in silence, so that a typo looks like an accepted setting.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    listed = isinstance(found.get("properties"), dict) and "$ref" not in found
    if listed and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


class Schemas:
    """All of them, read once.

    Args:
        crds: directory of CustomResourceDefinitions; None: documents of such kinds are not held against any.
    """

    def __init__(self, crds: Path | None) -> None:
        self._extensions: dict[tuple[str, str], Draft202012Validator] = {}
        for file in sorted(crds.glob("*.yaml")) if crds else ():
            self._read(yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        self._knows_extensions = crds is not None

    def _read(self, definition: Document) -> None:
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"$ref": f"{definitions().id()}#/$defs/{METADATA}"}
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            self._extensions[key] = Draft202012Validator(schema, registry=registry())

    def problems(self, document: Document) -> list[str]:
        """What is wrong with one document; empty where nothing is."""
        version, kind = str(document.get("apiVersion")), str(document.get("kind"))
        if version.startswith(EXTENSIONS) and not self._knows_extensions:
            return []
        validator = self._extensions.get((version, kind)) or builtin(version, kind)
        if validator is None:
            return [f"there is no kind {kind} of {version}"]
        name = f"{kind} {(document.get('metadata') or {}).get('name')}"
        return [
            f"{name}: {'.'.join(map(str, error.absolute_path)) or '(whole)'}: {error.message[:300]}"
            for error in validator.iter_errors(document)
        ]


METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


@functools.cache
def definitions() -> Resource[Any]:
    """Types of Kubernetes that kinds share."""
    return Resource.from_contents(schema_contents(f"{directory()}/_definitions.json", latest_version()))


@functools.cache
def registry() -> Registry[Any]:
    """Where references are looked up."""
    return definitions() @ Registry()


def directory() -> str:
    """Of the newest Kubernetes whose schemas the package has; in the strict ones a misspelt field is an error."""
    return f"kubernetes-json-schema/v{latest_version()}-local-strict"


@functools.cache
def builtin(version: str, kind: str) -> Draft202012Validator | None:
    """The schema of one of Kubernetes' own kinds."""
    group, _, number = version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.partition(".")[0], number]))
    try:
        schema = schema_contents(f"{directory()}/{name}.json", latest_version())
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=registry())


# --- what is embedded -----------------------------------------------------------------------------------


@functools.cache
def serve_schema() -> Draft202012Validator:
    """Ray Serve's configuration; its own models let unknown fields pass."""
    return Draft202012Validator(strict(ServeDeploySchema.model_json_schema()))


@functools.cache
def serve_problems(text: str) -> tuple[str, ...]:
    """What is wrong with a Serve configuration: its form, our arguments in it, or what it says of our deployments."""
    data = yaml.safe_load(text)
    found = [f"serveConfigV2: {error.json_path}: {error.message[:300]}" for error in serve_schema().iter_errors(data)]
    if found:
        return tuple(found)
    try:
        ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        return (f"serveConfigV2: {describe(error)}",)
    return tuple(problem for application in data["applications"] for problem in application_problems(application))


def application_problems(application: Document) -> list[str]:
    """What is wrong with one application of a Serve configuration."""
    name = f"serveConfigV2: application {application.get('name')}"
    if application.get("import_path") != BUILDER:
        return [f"{name}: import_path is not {BUILDER}"]
    try:
        args = BuildArgs.model_validate(application.get("args") or {})
        bound = build(args)._bound_deployment
        overridden = {one["name"]: one for one in application.get("deployments") or ()}
        settings = overridden.get("engine", {}).get("user_config") or {}
        UserConfig.settings(settings, args.cluster_config().scheduling)
    except ValidationError as error:
        return [f"{name}: args: {describe(error)}"]
    except ConfigError as error:
        return [f"{name}: {error}"]
    known = {bound.name, *(arg._bound_deployment.name for arg in bound.init_args if hasattr(arg, "_bound_deployment"))}
    return [f"{name}: there is no deployment {other}" for other in sorted(set(overridden) - known)]
