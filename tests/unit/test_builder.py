"""The Serve builder: typed arguments, config files, and no Ray while it builds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as serve_builds
from ray.serve.schema import ServeDeploySchema

from deployments import app as module
from deployments.app import BuildArgs, build, find
from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError
from raymoe.serve.app import engine_options, ingress_options

DEPLOYMENTS = Path(module.__file__).parent
EXPERT_BYTES = 256 * 98_304 * 2  # the embedded model's experts in float32


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("building an application must not touch Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("ray._private.worker.init", refuse)


def config_of(application: Application) -> ClusterConfig:
    """The cluster config that the ingress was bound to."""
    return application._bound_deployment.init_args[0]


def test_a_config_file_becomes_an_application() -> None:
    application = build(BuildArgs.model_validate({"config": str(DEPLOYMENTS / "local.yaml")}))
    assert [device.name for device in config_of(application).devices] == ["edge-0", "edge-1"]


def test_inline_fields_become_an_application() -> None:
    args = BuildArgs.model_validate({"devices": [{"name": "a", "slot_memory": "1MiB"}], "replication": 1})
    config = config_of(build(args))
    assert (config.devices[0].slot_memory, config.replication) == (1 << 20, 1)
    assert type(config) is ClusterConfig


def test_no_arguments_mean_the_embedded_model() -> None:
    assert config_of(build(BuildArgs.model_validate({}))) == ClusterConfig()


def test_both_ways_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match='either "config" or inline fields, not both; found config and trunk'):
        BuildArgs.model_validate({"config": "local.yaml", "trunk": {"device": "cpu"}})


@pytest.mark.parametrize("args", [{"confg": "x"}, {"config": "deployments/local.yaml", "replicaton": 2}])
def test_serve_refuses_a_misspelt_argument(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        serve_builds(build, args)


def test_serve_hands_the_builder_its_own_type() -> None:
    assert isinstance(serve_builds(build, {"config": "deployments/local.yaml"}), Application)


def test_the_bound_application_is_local_yaml() -> None:
    assert config_of(module.app) == ClusterConfig.load(DEPLOYMENTS / "local.yaml")


@pytest.mark.parametrize("path", ["deployments/local.yaml", "local.yaml", str(DEPLOYMENTS / "local.yaml")])
def test_relative_paths_work_from_anywhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(path) == DEPLOYMENTS / "local.yaml"


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.yaml").write_text("replication: 1\n")
    assert find("local.yaml") == tmp_path / "local.yaml"


def test_a_missing_file_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no cluster config nowhere\.yaml; looked for .*nowhere\.yaml, "):
        build(BuildArgs.model_validate({"config": "nowhere.yaml"}))


def test_a_wrong_file_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("devices: [{name: a, slot_memroy: 1MiB}]\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: devices\.0\.slot_memroy: no such field"):
        build(BuildArgs.model_validate({"config": str(tmp_path / "bad.yaml")}))


@pytest.mark.parametrize("name", ["local.yaml", "edge.yaml"])
def test_every_cluster_config_in_the_repository_is_valid(name: str) -> None:
    assert ClusterConfig.load(DEPLOYMENTS / name).devices


def test_every_serve_config_in_the_repository_is_valid() -> None:
    raw = yaml.safe_load((DEPLOYMENTS / "serve-local.yaml").read_text())
    config = ServeDeploySchema.model_validate(raw)
    [application] = config.applications
    assert config.http_options.host == "127.0.0.1"
    assert application.import_path == "deployments.app:build"
    inline = BuildArgs.model_validate(application.args).cluster_config()
    assert inline == ClusterConfig.load(DEPLOYMENTS / "local.yaml")


def test_local_slots_hold_a_third_of_the_experts() -> None:
    config = ClusterConfig.load(DEPLOYMENTS / "local.yaml")
    assert config.model.dtype == "float32"
    assert sum(device.slot_memory or 0 for device in config.devices) * 3 == EXPERT_BYTES


def test_the_engine_sheds_before_serve_queues() -> None:
    config = ClusterConfig.model_validate({"trunk": {"max_running": 4, "max_waiting": 100}})
    assert engine_options(config)["max_ongoing_requests"] > 104
    assert ingress_options(config)["max_ongoing_requests"] > 104
    assert engine_options(config)["num_replicas"] == 1


def test_gpus_stay_visible_to_an_engine_that_uses_one() -> None:
    config = ClusterConfig.model_validate({"trunk": {"device": "cuda:0"}})
    assert engine_options(config)["ray_actor_options"]["runtime_env"]["env_vars"] == {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"
    }
    assert "runtime_env" not in engine_options(ClusterConfig())["ray_actor_options"]


def test_the_engine_goes_where_the_trunk_shall_be() -> None:
    config = ClusterConfig.model_validate({"trunk": {"node_labels": {"part": "trunk"}, "resources": {"trunk": 1}}})
    options = engine_options(config)["ray_actor_options"]
    assert (options["label_selector"], options["resources"]) == ({"part": "trunk"}, {"trunk": 1.0})
    anywhere = engine_options(ClusterConfig())["ray_actor_options"]
    assert "label_selector" not in anywhere and not anywhere["resources"]


def test_neither_building_nor_the_ingress_needs_torch() -> None:
    code = "import sys, deployments.app, raymoe.serve.ingress; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(DEPLOYMENTS.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
