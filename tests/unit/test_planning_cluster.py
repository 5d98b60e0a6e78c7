"""The devices file: what it accepts, what it says of mistakes, and how it is filled in."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import ConfigError
from raymoe.planning.cluster import DevicesFile
from raymoe.planning.hardware import HARDWARE

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "planning").glob("*.yaml"))
OWN = {
    "name": "own",
    "memory": "8GB",
    "host_memory": "16GB",
    "link": {"bytes_per_s": "1GB", "latency_s": 1e-4},
    "compute": {"flops": 1e12, "bytes_per_s": "100GB"},
}


def parse(*devices: dict[str, Any], **more: Any) -> DevicesFile:
    return DevicesFile.parse({"devices": list(devices), **more})


def message(*devices: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(*devices, **more)
    return str(error.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    assert DevicesFile.load(path).devices_resolved()


@pytest.mark.parametrize("name", sorted(HARDWARE))
def test_known_hardware_needs_no_more_than_its_name(name: str) -> None:
    (device,) = parse({"name": "one", "hardware": name}).devices_resolved()
    known = HARDWARE[name]
    assert device.memory_bytes == known.memory_bytes and device.flops == known.flops
    assert device.is_unified == (known.link_bytes_per_s is None)
    assert known.source.startswith("https://")


def test_devices_are_counted_out_in_order() -> None:
    file = parse({"name": "a", "hardware": "n100"}, {"name": "b", "hardware": "n100", "count": 3})
    assert [device.name for device in file.devices_resolved()] == ["a", "b-0", "b-1", "b-2"]


def test_what_is_given_goes_before_the_table() -> None:
    (device,) = parse({"name": "a", "hardware": "rtx-3080", "memory": "9GB", "overhead_s": 0.25}).devices_resolved()
    assert (device.memory_bytes, device.overhead_s) == (9_000_000_000, 0.25)
    assert device.link_bytes_per_s == HARDWARE["rtx-3080"].link_bytes_per_s


def test_a_load_takes_latency_and_bytes_or_what_was_measured() -> None:
    (device,) = parse(OWN).devices_resolved()
    assert device.load_s(10**9) == pytest.approx(1.0001)
    (device,) = parse({**OWN, "times": {"load_s": 0.5}}).devices_resolved()
    assert device.load_s(10**9) == 0.5


def test_a_unified_device_loads_nothing() -> None:
    (device,) = parse({"name": "a", "hardware": "raspberry-pi-5"}).devices_resolved()
    assert device.is_unified and device.load_s(10**9) == 0.0 and device.host_bytes <= device.memory_bytes


def test_trunk_and_shadow_serve_no_experts_unless_told_or_alone() -> None:
    workers = {"name": "w", "hardware": "rtx-3080", "count": 2}
    file = parse({"name": "main", "hardware": "rtx-3080"}, {"name": "s", "hardware": "rtx-3090"}, workers, shadow="s")
    assert [d.name for d in file.devices_resolved() if d.serves_experts] == ["w-0", "w-1"]
    both = parse({"name": "main", "hardware": "rtx-3080", "serves_experts": True}, workers)
    assert len([d for d in both.devices_resolved() if d.serves_experts]) == 3
    assert parse(OWN).devices_resolved()[0].serves_experts


@pytest.mark.parametrize(
    ("devices", "more", "words"),
    [
        ([{"name": "a", "hardware": "rtx-9999"}], {}, ["rtx-9999", "rtx-3080", "raymoe probe"]),
        ([{"name": "a"}], {}, ["memory", "hardware"]),
        ([{**OWN, "link": None}], {}, ["link", "unified: true"]),
        ([{**OWN, "host_memory": None}], {}, ["host_memory"]),
        ([{**OWN, "unified": True}], {}, ["unified", "remove"]),
        ([OWN, OWN], {}, ["unique", "own"]),
        ([OWN], {"trunk": "b"}, ["trunk", '"b"', "own"]),
        ([OWN], {"shadow": "b"}, ["shadow", '"b"']),
        ([{**OWN, "serves_experts": False}], {}, ["no device serves experts"]),
        ([{**OWN, "count": 10_001}], {}, ["10000"]),
        ([OWN], {"alpha": 2}, ["alpha", "0 to 1"]),
        ([OWN], {"hit_rates": {"lru": [[0.5, 0.7], [0.25, 0.5]]}}, ["lru", "rise"]),
        ([OWN], {"netwrok": {}}, ["netwrok", "no such field"]),
        ([], {}, ["devices"]),
    ],
)
def test_mistakes_are_named_with_the_way_out(devices: list[Any], more: dict[str, Any], words: list[str]) -> None:
    found = message(*devices, **more)
    assert all(word in found for word in words), found


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for text, words in (("- 1", "mapping"), ("a: [", "YAML")):
        path = tmp_path / "devices.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            DevicesFile.load(path)
    with pytest.raises(ConfigError, match="can't read"):
        DevicesFile.load(tmp_path / "absent.yaml")


NAMES = st.sampled_from(["name", "devices", "count", "link", "memory", "hardware"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


@given(st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=4), max_leaves=12))
def test_anything_parses_or_raises_config_error(data: Any) -> None:
    with suppress(ConfigError):
        DevicesFile.parse(data if isinstance(data, dict) else {"devices": data})
