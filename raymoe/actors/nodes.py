"""Which devices the alive nodes of a Ray cluster can take: by labels and resources, as Ray itself chooses."""

from collections.abc import Mapping, Sequence
from typing import Any

from raymoe.config import DeviceConfig


def is_offered(device: DeviceConfig, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an alive node has the labels and the resources that the device asks for, be they taken or not.

    Args:
        nodes: as ``ray.nodes()`` tells them.
    """
    return any(node["Alive"] and _has(node, device) for node in nodes)


def wishes(device: DeviceConfig) -> str:
    """What the device asks for, in words."""
    return str({**device.node_labels, **device.resources} or "any node")


def _has(node: Mapping[str, Any], device: DeviceConfig) -> bool:
    labels, resources = node.get("Labels", {}), node.get("Resources", {})
    return all(_matches(labels.get(name), wanted) for name, wanted in device.node_labels.items()) and all(
        resources.get(name, 0.0) >= amount for name, amount in device.resources.items()
    )


def _matches(value: str | None, wanted: str) -> bool:
    """Ray's label selectors: ``a``, ``!a``, ``in(a, b)``, ``!in(a, b)``."""
    negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    inside = wanted.removeprefix("in(").removesuffix(")") if wanted.startswith("in(") else wanted
    return (value in [part.strip() for part in inside.split(",")]) is not negated
