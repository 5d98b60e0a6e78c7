"""Entry points for Ray Serve.

``serve run --name raymoe deployments.app:build config=deployments/local.yaml`` serves a cluster config file,
``serve run --name raymoe deployments.app:app`` the embedded model on this machine, and
``serve deploy deployments/serve-local.yaml`` a cluster config written inline as ``args``.
"""

# No postponed annotations in this module: Serve reads the builder's annotation as it is, and would hand over a raw
# dict in place of BuildArgs if it were a text. A misspelt argument would then slip through.

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from ray.serve import Application

from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError
from raymoe.serve.app import build_application

HERE = Path(__file__).resolve().parent


class BuildArgs(ClusterConfig):
    """Either ``config``, the path of a cluster config file, or the fields of a cluster config themselves."""

    config: str | None = Field(
        None, description="Path of a ClusterConfig in YAML; relative to the working directory or the repository."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        others = sorted(self.model_fields_set - {"config"})
        if self.config is not None and others:
            raise ValueError(f'give either "config" or inline fields, not both; found config and {", ".join(others)}')
        return self

    def cluster_config(self) -> ClusterConfig:
        """The cluster that is meant. Raises ConfigError for a file that can't be read or is wrong."""
        if self.config is None:
            return ClusterConfig.model_validate(self.model_dump(exclude={"config"}, exclude_unset=True))
        return ClusterConfig.load(find(self.config))


def find(path: str) -> Path:
    """A config file relative to the working directory, to the repository, or beside this module.

    Raises ConfigError naming every place it was looked for.
    """
    places = [Path(path).expanduser(), HERE.parent / path, HERE / path]
    for place in places:
        if place.is_file():
            return place.absolute()
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise ConfigError(f"there is no cluster config {path}; looked for {looked}")


def build(args: BuildArgs) -> Application:
    """The application that ``args`` describe. Starts nothing: Serve does, once it runs it."""
    return build_application(args.cluster_config())


app = build(BuildArgs.model_validate({"config": str(HERE / "local.yaml")}))
"""The embedded model on two devices of this machine, for ``serve run deployments.app:app``."""
