"""Configuration: sizes, strictness, and messages that name the file and the field."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import deployments
from raymoe.config import (
    EMBEDDED_MODEL,
    ClusterConfig,
    DeviceConfig,
    ModelConfig,
    PredictorConfig,
    SchedulingConfig,
    ShadowPreset,
    UserConfig,
)
from raymoe.errors import ConfigError
from raymoe.presets import SHADOW_PRESETS
from raymoe.strict import parse_size_bytes

DEPLOYMENTS = sorted(Path(deployments.__file__).parent.glob("*.yaml"))


def device(**fields: Any) -> dict[str, Any]:
    return {"name": "edge-0", **fields}


def refused(data: dict[str, Any]) -> str:
    """The message of a configuration that must not pass."""
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.parse(data)
    return str(caught.value)


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4MiB", 4 << 20),
        ("200MB", 200_000_000),
        ("1.5GiB", 3 << 29),
        ("1GB", 10**9),
        ("2TiB", 2 << 40),
        ("64KiB", 65_536),
        ("64kb", 64_000),
        ("17", 17),
        ("17B", 17),
        (" 4 mib ", 4 << 20),
    ],
)
def test_sizes_in_words(text: str, count: int) -> None:
    assert DeviceConfig.model_validate(device(slot_memory=text)).slot_memory == count


@given(st.integers(1, 10**15))
def test_sizes_in_numbers_stay_as_they_are(count: int) -> None:
    assert parse_size_bytes(count) == parse_size_bytes(str(count)) == count


@pytest.mark.parametrize("text", ["", "MiB", "4 M i B", "4MiBs", "-4MiB", "4,5MiB", "1e6", "0x10", "4Mi"])
def test_what_is_not_a_size_is_refused_with_examples(text: str) -> None:
    message = refused({"devices": [device(slot_memory=text)]})
    assert f'devices.0.slot_memory: "{text}" is not a size; write bytes as a number or as "4MiB"' in message


@pytest.mark.parametrize("value", [0, "0MiB", -5])
def test_a_size_is_at_least_one_byte(value: Any) -> None:
    assert "devices.0.slot_memory: Input should be greater than 0" in refused({"devices": [device(slot_memory=value)]})


# --- strictness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"modle": {}}, "modle"),
        ({"model": {"pth": "x"}}, "model.pth"),
        ({"devices": [{"name": "a", "slotmemory": 1}]}, "devices.0.slotmemory"),
        ({"devices": [device(link={"bytes_per_s": 1, "latency": 0})]}, "devices.0.link.latency"),
        ({"trunk": {"devise": "cpu"}}, "trunk.devise"),
        ({"scheduling": {"polcy": "on_demand"}}, "scheduling.polcy"),
        ({"serving": {"port": 8000}}, "serving.port"),
    ],
)
def test_unknown_fields_are_refused_by_name(data: dict[str, Any], place: str) -> None:
    assert f"{place}: no such field; check the spelling" in refused(data)


def test_one_wrong_field_is_one_line() -> None:
    """The list of devices is not called empty because its only device is wrong."""
    assert "at least 1 item" not in refused({"devices": [{"name": "a", "slotmemory": 1}]})


def test_every_wrong_field_is_named() -> None:
    message = refused({"model": {"dtype": "int8"}, "replication": 0, "trunk": {"max_running": 0}})
    assert "model.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'" in message
    assert "replication" in message
    assert "trunk.max_running: Input should be greater than or equal to 1" in message


def test_device_names_are_unique() -> None:
    message = refused({"devices": [device(), device(name="b"), device(), device(name="b"), device(name="c")]})
    assert "device names must be unique, but b, edge-0 is used more than once" in message


def test_the_resident_forecast_needs_local_devices() -> None:
    devices = [device(transport="local"), device(name="far")]
    message = refused({"devices": devices, "scheduling": {"prefetch": "resident"}})
    assert 'scheduling.prefetch "resident"' in message and "but far has another transport" in message
    assert 'set transport "local" for every device, or prefetch "gate"' in message
    ClusterConfig.parse({"devices": devices[:1], "scheduling": {"prefetch": "resident"}})


def test_other_scheduling_is_checked_against_the_devices() -> None:
    config = ClusterConfig()
    with pytest.raises(ConfigError, match=r"^scheduling: .*resident.*cpu-0 has another transport"):
        config.rescheduled(SchedulingConfig(prefetch="resident"))
    assert config.rescheduled(SchedulingConfig(prefetch="none")).scheduling.prefetch == "none"


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a:b", "x" * 64, "é"])
def test_device_names_are_plain(name: str) -> None:
    assert "devices.0.name" in refused({"devices": [{"name": name}]})


@pytest.mark.parametrize("kind", ["gpu", "cuda", "cuda:x", "cuda:-1", "CPU", "mps"])
def test_kinds_are_cpu_or_a_numbered_gpu(kind: str) -> None:
    assert "devices.0.kind" in refused({"devices": [device(kind=kind)]})


def test_an_emulated_link_on_a_gpu_is_refused() -> None:
    message = refused({"devices": [device(kind="cuda:0", slot_memory="1GiB", link={"bytes_per_s": "1GB"})]})
    assert 'device "edge-0": "link" emulates a bus and works on kind "cpu" only, not "cuda:0"; a real GPU' in message


def test_a_gpu_needs_a_budget() -> None:
    message = refused({"devices": [device(kind="cuda:0")]})
    assert 'device "edge-0" of kind "cuda:0" needs "slot_memory", for example "2GiB"' in message


@pytest.mark.parametrize("link", [{}, {"bytes_per_s": 0}, {"bytes_per_s": 1, "latency_s": -1}, {"latency_s": 0.1}])
def test_a_link_needs_a_rate(link: dict[str, Any]) -> None:
    assert "devices.0.link." in refused({"devices": [device(link=link)]})


def test_a_cluster_needs_a_device() -> None:
    assert "devices" in refused({"devices": []})


def test_more_owners_than_devices_are_refused() -> None:
    message = refused({"devices": [device()], "replication": 2})
    assert "replication 2 needs as many devices, but only 1 are listed" in message


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ClusterConfig().model = ModelConfig()  # type: ignore[misc]


# --- scheduling -----------------------------------------------------------------------------------------

WRONG_SCHEDULING = [
    ({"policy": "lru"}, "policy: Input should be 'on_demand', 'all_resident', 'importance', 'on_demand_shadow' or 'j"),
    ({"alpha": -0.1}, "alpha: is -0.1; allowed is 0 to 1"),
    ({"alpha": 1.5}, "alpha: is 1.5; allowed is 0 to 1"),
    ({"alpha": float("nan")}, "alpha: is nan; allowed is 0 to 1"),
    ({"alpha": "much"}, "alpha: Input should be a valid number"),
    ({"alpha_max": 2}, "alpha_max: is 2; allowed is 0 to 1"),
    ({"alpha": 0.6}, "alpha is 0.6, but alpha_max 0.5; allowed is 0 to alpha_max"),
    ({"tpot_budget_s": 0}, "tpot_budget_s: Input should be greater than 0"),
    ({"tpot_budget_s": float("inf")}, "tpot_budget_s: Input should be a finite number"),
    ({"eviction": "oldest"}, "eviction: Input should be 'score', 'lru' or 'lfu'"),
    ({"score_window": 0}, "score_window: is 0; allowed is 1 to 1024"),
    ({"score_window": 1025}, "score_window: is 1025; allowed is 1 to 1024"),
    ({"prefetch": "all"}, "prefetch: Input should be 'gate', 'resident' or 'none'"),
    ({"lookahead": 0}, "lookahead: is 0; allowed is 1 to 8"),
    ({"group_size": 0}, "group_size: Input should be greater than or equal to 1"),
    ({"group_size": -1}, "group_size: Input should be greater than or equal to 1"),
    ({"similarity": "weights"}, "similarity: Input should be 'score', 'coactivation' or 'output'"),
    ({"similarity": "output"}, 'similarity "output" needs "profile": make one with `raymoe calibrate MODEL -o FILE`'),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_SCHEDULING)
def test_wrong_scheduling_is_refused_with_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    told = refused({"scheduling": fields})
    assert "scheduling" in told and message in told


CHANGEABLE = [case for case in WRONG_SCHEDULING if not {"policy", "group_size"} & set(case[0])]


@pytest.mark.parametrize(("fields", "message"), CHANGEABLE)
def test_wrong_changes_are_refused_alike(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SchedulingConfig().changed(fields)
    assert str(caught.value).startswith("scheduling: ") and message in str(caught.value)


FIXED = [{"policy": "importance"}, {"profile": "x"}, {"call_timeout_s": 3.0}, {"group_size": 2}]


@pytest.mark.parametrize("fields", FIXED)
def test_what_is_fixed_while_the_model_runs_is_named(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ConfigError, match=rf"scheduling\.{name} can't be changed while the model runs; restart it"):
        SchedulingConfig().changed(fields)


def test_a_change_leaves_the_rest_and_may_repeat_what_is_fixed() -> None:
    before = SchedulingConfig(policy="importance", alpha=0.1, prefetch="none")
    assert before.changed({"alpha": 0.3, "policy": "importance"}) == SchedulingConfig(
        policy="importance", alpha=0.3, prefetch="none"
    )


QUALITY_ALPHA = [(None, 0.2), ("exact", 0.0), ("balanced", 0.25), ("fast", 0.4), (0, 0.0), (0.3, 0.3), (0.4, 0.4)]


@pytest.mark.parametrize(("quality", "alpha"), QUALITY_ALPHA)
def test_a_quality_is_an_alpha_under_importance_and_nothing_elsewhere(quality: Any, alpha: float) -> None:
    assert SchedulingConfig(policy="importance", alpha=0.2, alpha_max=0.4).alpha_of(quality) == alpha
    assert SchedulingConfig(policy="on_demand", alpha=0.2, alpha_max=0.4).alpha_of(quality) == 0.0


@pytest.mark.parametrize("quality", ["best", "", -0.1, 0.41, float("nan"), float("inf"), True, [0.1]])
def test_a_wrong_quality_names_what_is_allowed(quality: Any) -> None:
    allowed = r'quality is .*; allowed are "exact", "balanced", "fast", or an alpha from 0 to 0\.4'
    with pytest.raises(ValueError, match=allowed):
        SchedulingConfig(policy="importance", alpha=0.2, alpha_max=0.4).alpha_of(quality)


@pytest.mark.parametrize(
    ("fields", "has_slots"),
    [
        ({}, False),
        ({"slot_memory": "1MiB"}, True),
        ({"link": {"bytes_per_s": 1}}, True),
        ({"kind": "cuda:0", "slot_memory": 1}, True),
    ],
)
def test_which_devices_have_slots(fields: dict[str, Any], has_slots: bool) -> None:
    assert DeviceConfig.model_validate(device(**fields)).has_slots == has_slots


WRONG_PLACES = [
    ({"advertise": ["nat:1", "nat:2"]}, 'device "edge-0": "advertise" needs "ports"'),
    ({"ports": [7001, 7001]}, 'device "edge-0": both ports are 7001; they must differ'),
    ({"ports": [0, 7001]}, "is 0; allowed is 1 to 65535"),
    ({"ports": [7001]}, "devices.0.ports"),
    ({"ports": [7001, 7002], "advertise": ["tcp://nat:1", "nat:2"]}, "devices.0.advertise"),
    ({"ports": [7001, 7002], "advertise": ["nat", "nat:2"]}, "devices.0.advertise"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_PLACES)
def test_wrong_ports_are_refused(fields: dict[str, Any], message: str) -> None:
    assert message in refused({"devices": [device(**fields)]})


def test_fixed_ports_and_advertised_ones() -> None:
    [found] = ClusterConfig.parse(
        {"devices": [device(ports=[7001, 7002], advertise=["nat.example:17001", "[fe80::1]:17002"])]}
    ).devices
    assert (found.ports, found.advertise) == ((7001, 7002), ("nat.example:17001", "[fe80::1]:17002"))


# --- what foretells routing -----------------------------------------------------------------------------

CACHELESS = {"policy": "on_demand_shadow"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "oracle"}, "predictor.kind: Input should be 'shadow', 'gate', 'resident' or 'history'"),
        ({"bits": 5}, "predictor.bits: Input should be 16, 8, 4, 3 or 2"),
        ({"bits": "eight"}, "predictor.bits: Input should be 16, 8, 4, 3 or 2"),
        ({"token_align_every": -1}, "predictor.token_align_every: Input should be greater than or equal to 0"),
        ({"kv_align_every": -1}, "predictor.kv_align_every: Input should be greater than or equal to 0"),
        ({"kv_align_every": 0.5}, "predictor.kv_align_every: Input should be a valid integer"),
        ({"run_ahead": "far"}, "predictor.run_ahead: Input should be a valid boolean"),
        ({"device": "gpu"}, "predictor.device: String should match pattern"),
        ({"device": "cuda"}, "predictor.device: String should match pattern"),
        ({"threads": 0}, "predictor.threads: Input should be greater than or equal to 1"),
        ({"preset": "cheap"}, "predictor.preset: Input should be 'exact', 'balanced' or 'light'"),
        ({"preset": ["light"]}, "predictor.preset: Input should be 'exact', 'balanced' or 'light'"),
        ({"top_k": 0}, "predictor.top_k: Input should be greater than or equal to 1"),
        ({"skip_layers": -1}, "predictor.skip_layers: is -1; allowed is how many layers, or a list of their numbers"),
        ({"skip_layers": [1, "two"]}, "predictor.skip_layers: is [1, 'two']; allowed is how many layers, or a list"),
        ({"skip_layers": True}, "predictor.skip_layers: is True; allowed is how many layers, or a list"),
        ({"kind": "gate", "top_k": 2}, 'predictor: top_k is of kind "shadow", not "gate": remove it'),
        ({"kind": "history", "preset": "light"}, 'predictor: preset is of kind "shadow", not "history"'),
        ({"bit": 8}, "predictor.bit: no such field; check the spelling"),
    ],
)
def test_a_wrong_predictor_is_refused_with_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    assert message in refused({"scheduling": CACHELESS, "predictor": fields})


@pytest.mark.parametrize("policy", ["on_demand", "all_resident", "importance"])
def test_a_predictor_needs_the_policy_that_uses_it(policy: str) -> None:
    message = refused({"scheduling": {"policy": policy}, "predictor": {}})
    assert f'"predictor" is of policies "on_demand_shadow" and "joint", but scheduling.policy is "{policy}"' in message
    assert "change the policy, or remove the predictor" in message


@pytest.mark.parametrize("scheduling", [None, {}, {"alpha": 0.1, "group_size": 2}])
def test_with_a_predictor_and_no_policy_the_policy_is_joint(scheduling: dict[str, Any] | None) -> None:
    data = {"predictor": {}} if scheduling is None else {"predictor": {}, "scheduling": scheduling}
    config = ClusterConfig.parse(data)
    assert config.scheduling == SchedulingConfig(policy="joint", **(scheduling or {}))
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config
    assert ClusterConfig.parse({**data, "predictor": None}).scheduling.policy == "on_demand"


@pytest.mark.parametrize("policy", ["joint", "on_demand_shadow"])
def test_a_policy_that_is_named_stays_with_and_without_a_predictor(policy: str) -> None:
    for predictor in (None, {}, {"kind": "gate"}):
        config = ClusterConfig.parse({"scheduling": {"policy": policy}, "predictor": predictor})
        assert config.scheduling.policy == policy


@pytest.mark.parametrize(
    ("policy", "substitutes", "follows_orders"),
    [
        ("on_demand", False, False),
        ("all_resident", False, False),
        ("importance", True, False),
        ("on_demand_shadow", False, True),
        ("joint", True, True),
    ],
)
def test_what_policies_do(policy: Any, substitutes: bool, follows_orders: bool) -> None:
    scheduling = SchedulingConfig(policy=policy, alpha=0.2)
    assert (scheduling.substitutes, scheduling.follows_orders) == (substitutes, follows_orders)
    assert scheduling.alpha_of(None) == (0.2 if substitutes else 0.0)


def test_the_resident_predictor_needs_local_devices() -> None:
    data = {"devices": [device(), device(name="b", transport="local")], "scheduling": CACHELESS}
    message = refused({**data, "predictor": {"kind": "resident"}})
    assert 'predictor.kind "resident" computes with the slots of the engine\'s own process' in message
    assert 'but edge-0 has another transport: set transport "local" for every device, or kind "gate"' in message
    local = {**data, "devices": [device(transport="local")], "predictor": {"kind": "resident"}}
    assert ClusterConfig.parse(local).predictor_kind == "resident"


def test_a_predictor_keeps_its_policy() -> None:
    config = ClusterConfig.parse({"scheduling": CACHELESS, "predictor": {"kind": "gate"}})
    with pytest.raises(ConfigError, match='"predictor" is of policies "on_demand_shadow" and "joint"'):
        config.rescheduled(SchedulingConfig())
    assert config.rescheduled(SchedulingConfig(policy="on_demand_shadow", alpha=0.1)).predictor == config.predictor


def test_the_predictor_is_a_shadow_in_eight_bits_that_is_always_aligned_unless_told() -> None:
    assert ClusterConfig.parse({"scheduling": CACHELESS}).predictor_kind is None
    predictor = ClusterConfig.parse({"scheduling": CACHELESS, "predictor": {}}).predictor
    assert predictor == PredictorConfig(
        kind="shadow", bits=8, token_align_every=1, kv_align_every=1, run_ahead=True, device="cpu"
    )


def test_a_configuration_with_a_predictor_survives_json() -> None:
    config = ClusterConfig.parse(
        {"scheduling": {**CACHELESS, "group_size": 4}, "predictor": {"bits": 3, "node_labels": {"box": "a"}}}
    )
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("preset", SHADOW_PRESETS)
def test_a_preset_fills_what_is_not_given(preset: str) -> None:
    fields = SHADOW_PRESETS[preset]
    predictor = PredictorConfig.model_validate({"preset": preset})
    assert {name: getattr(predictor, name) for name in fields} == fields
    other = PredictorConfig.model_validate({"preset": preset, "bits": 3, "skip_layers": [0, 2]})
    assert (other.bits, other.top_k, other.skip_layers) == (3, fields["top_k"], (0, 2))


def test_the_exact_preset_is_what_nothing_configured_is() -> None:
    assert PredictorConfig.model_validate({"preset": "exact"}) == PredictorConfig(preset="exact")
    assert PredictorConfig(preset="exact").model_copy(update={"preset": None}) == PredictorConfig()


def test_every_preset_is_known_by_name() -> None:
    assert list(SHADOW_PRESETS) == list(get_args(ShadowPreset))


@pytest.mark.parametrize("skip_layers", [0, 3, [1], [0, 5]])
def test_a_cheaper_predictor_survives_json(skip_layers: Any) -> None:
    predictor = PredictorConfig.model_validate({"preset": "light", "top_k": 1, "skip_layers": skip_layers})
    assert PredictorConfig.model_validate(predictor.model_dump(mode="json")) == predictor


# --- defaults -------------------------------------------------------------------------------------------


def test_nothing_configured_is_the_embedded_model_on_one_cpu() -> None:
    config = ClusterConfig()
    assert config.model.source == str(EMBEDDED_MODEL)
    assert config.model.served_name == "tiny-moe"
    assert [(item.kind, item.link, item.slot_memory) for item in config.devices] == [("cpu", None, None)]
    assert (config.replication, config.scheduling.policy) == ("auto", "on_demand")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"path": "/models/Qwen3-30B-A3B/"}, "Qwen3-30B-A3B"),
        ({"path": "Qwen/Qwen3-30B-A3B"}, "Qwen3-30B-A3B"),
        ({"path": "/models/x", "name": "mine"}, "mine"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_path(model: dict[str, str], name: str) -> None:
    assert ModelConfig.model_validate(model).served_name == name


def test_a_configuration_survives_json() -> None:
    config = ClusterConfig.model_validate(
        {"devices": [device(slot_memory="4MiB", link={"bytes_per_s": "200MB"}), device(name="b")], "replication": 2}
    )
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config


def test_configuration_loads_without_torch_and_ray() -> None:
    code = (
        "import sys, raymoe.config, raymoe; sys.exit(len({'torch', 'ray', 'transformers', 'zmq'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- files ----------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the cluster config .*absent\.yaml: No such file"):
        ClusterConfig.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [", r"(?s)cluster\.yaml is not valid YAML: .*line 1"),
        ("devices: 2024-99-99", r"(?s)cluster\.yaml is not valid YAML: month must be in 1..12"),
        ("- a\n- b\n", r"cluster\.yaml must hold a mapping with keys such as model, devices; found list"),
        ("", r"must hold a mapping .* found NoneType"),
        ("devices:\n- name: a\n  slot_memory: lots\n", r'cluster\.yaml: devices\.0\.slot_memory: "lots" is not a size'),
        ("model: tiny\n", r"cluster\.yaml: model: "),
        ("1: 2\n", r"cluster\.yaml: 1: "),
    ],
)
def test_a_wrong_file_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.load(file)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cluster\.yaml"):
        ClusterConfig.load(file)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the cluster config .*: Is a directory"):
        ClusterConfig.load(tmp_path)


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda file: file.name)
def test_every_deployment_file_parses(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    if "applications" in data:  # a Serve config: the cluster configuration is in its arguments
        for application in data["applications"]:
            config = ClusterConfig.parse(application["args"], where=file.name)
            for deployment in application.get("deployments", ()):
                assert deployment["name"] in ("engine", "ingress")
                UserConfig.settings(deployment.get("user_config", {}), config.scheduling)
    else:
        ClusterConfig.load(file)


def test_there_are_deployment_files() -> None:
    named = {"local.yaml", "edge.yaml", "serve-local.yaml", "importance.yaml"}
    assert named <= {file.name for file in DEPLOYMENTS}


def test_the_importance_example_has_slots_for_twice_the_experts_of_a_token() -> None:
    config = ClusterConfig.load(Path(deployments.__file__).parent / "importance.yaml")
    [only] = config.devices
    layers, top_k, expert_bytes = 8, 4, 96 << 10
    assert (config.scheduling.policy, only.slot_memory) == ("importance", 2 * top_k * layers * expert_bytes)


def test_the_configuration_page_is_up_to_date() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "generate_configuration.py"))["page"]()
    assert (docs / "configuration.md").read_text() == page, "run python docs/generate_configuration.py"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gate"}, "they need kind 'shadow', not 'gate'; change it, or set drafts 0"),
        ({"run_ahead": False}, "they need run_ahead True, not False"),
        ({"token_align_every": 2}, "they need token_align_every 1, not 2"),
        ({"drafts": 9}, "less than or equal to 8"),
    ],
)
def test_drafts_need_a_shadow_that_is_ahead_and_aligned(fields: dict[str, Any], message: str) -> None:
    raw = {"scheduling": {"policy": "on_demand_shadow"}, "predictor": {"drafts": 4, **fields}}
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.parse(raw)


# --- what is open to others -----------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "[::]", "*", "0"])
def test_no_socket_is_bound_to_all_interfaces(bind: str) -> None:
    message = refused({"bind": bind})
    assert message.startswith(f'cluster config: bind: "{bind}" is every interface of a node')
    assert "omit bind" in message


@pytest.mark.parametrize("bind", [None, "127.0.0.1", "192.168.1.7", "::1", "fe80::1%eth0"])
def test_an_address_of_its_own_may_be_bound(bind: str | None) -> None:
    assert ClusterConfig.parse({"bind": bind}).bind == bind


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.name)
def test_every_deployment_serves_this_machine_only(path: Path) -> None:
    """Those without ``http_options`` are cluster configurations, whose address is the command's: see its default."""
    data = yaml.safe_load(path.read_text())
    assert data.get("http_options", {}).get("host", "127.0.0.1") == "127.0.0.1"
    assert data.get("bind") is None
    assert not data.get("model", {}).get("trust_remote_code", False)


def test_the_server_command_listens_on_loopback_unless_told_otherwise() -> None:
    from raymoe.cli import serve

    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"
    assert inspect.signature(serve).parameters["port"].default == 8000


def test_code_of_a_checkpoint_is_not_trusted_by_default() -> None:
    assert ModelConfig().trust_remote_code is False
