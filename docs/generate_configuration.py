"""Write docs/configuration.md from the configuration models: python docs/generate_configuration.py"""

from pathlib import Path

from pydantic_core import PydanticUndefined

from raymoe.config import (
    ClusterConfig,
    DeviceConfig,
    LinkConfig,
    ModelConfig,
    PredictorConfig,
    SchedulingConfig,
    ServingConfig,
    TrunkConfig,
    UserConfig,
)
from raymoe.hosts.file import HostConfig, HostsConfig
from raymoe.planning.cluster import (
    ComputeSpec,
    DevicesFile,
    DeviceSpec,
    HitRatesSpec,
    LinkSpec,
    NetworkSpec,
    PredictorSpec,
    TimesSpec,
)
from raymoe.strict import StrictModel

SECTIONS: dict[str, type[StrictModel]] = {
    "the file": ClusterConfig,
    "model": ModelConfig,
    "devices (a list)": DeviceConfig,
    "devices: link": LinkConfig,
    "trunk": TrunkConfig,
    "scheduling": SchedulingConfig,
    "predictor": PredictorConfig,
    "serving": ServingConfig,
    "user_config of the engine in a Ray Serve config": UserConfig,
    "the hosts file of `raymoe up`": HostsConfig,
    "hosts file: hosts (a list)": HostConfig,
    "the devices file of `raymoe plan`": DevicesFile,
    "devices file: devices (a list)": DeviceSpec,
    "devices file: link": LinkSpec,
    "devices file: compute": ComputeSpec,
    "devices file: times": TimesSpec,
    "devices file: network": NetworkSpec,
    "devices file: predictor": PredictorSpec,
    "devices file: hit_rates": HitRatesSpec,
}
HEAD = """# Configuration

Every field of a cluster configuration, written by `python docs/generate_configuration.py`. Sizes are numbers of
bytes or texts like "4MiB", "200MB", "1.5GiB". A field that is not listed is refused.
"""


def default(field) -> str:
    """A field's default in words."""
    if field.default_factory is not None:
        return "see its section"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, tuple):
        return "one cpu device"
    return "none" if field.default is None else f"`{field.default}`"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, model in SECTIONS.items():
        parts.append(f"## {title}\n\n{(model.__doc__ or '').strip().splitlines()[0]}\n")
        parts.append("| field | default | meaning |\n| --- | --- | --- |")
        rows = [
            f"| {name} | {default(field)} | {field.description or ''} |" for name, field in model.model_fields.items()
        ]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
