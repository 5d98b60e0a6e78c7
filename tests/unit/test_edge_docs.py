"""docs/edge.md is in step with the planner, and its section for two boxes is understood by what follows it."""

import runpy
from pathlib import Path

import pytest
import yaml

from raymoe.config import ClusterConfig
from raymoe.hosts.file import HostsConfig
from tests.testbed.follow_docs import StepError, steps_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "edge.md").read_text()


def heredoc(commands: str) -> dict:
    return yaml.safe_load(commands.split("<<'END'\n")[1].split("\nEND\n")[0])


def test_the_table_of_example_clusters_is_the_planners() -> None:
    script = runpy.run_path(str(DOCS / "generate_clusters.py"))
    written = PAGE.split(script["BEGIN"])[1].split(script["END"])[0].strip()
    assert written == script["generated"](), "run python docs/generate_clusters.py"


def test_the_section_for_two_boxes_has_steps_and_what_they_say() -> None:
    steps = steps_of(PAGE)
    assert {box for step in steps for box in step.boxes} == {"box-0", "box-1"}
    assert "raymoe up hosts.yaml" in steps[1].commands and "box-1: started" in steps[1].says
    assert "raymoe down hosts.yaml" in steps[-1].commands


def test_its_files_are_valid() -> None:
    hosts, cluster = [heredoc(step.commands) for step in steps_of(PAGE) if "<<'END'" in step.commands]
    assert [host.name for host in HostsConfig.model_validate(hosts).hosts] == ["box-0", "box-1"]
    assert len(ClusterConfig.parse(cluster).devices) == 2


def test_the_recipe_for_a_real_checkpoint_is_valid_and_has_room_for_its_experts() -> None:
    config = ClusterConfig.parse(yaml.safe_load(PAGE.split('title="qwen.yaml"\n')[1].split("```")[0]))
    routed = 48 * 128 * 3 * 2048 * 768 * 2
    assert sum(device.host_memory or 0 for device in config.devices) > routed
    assert f"{routed / 1e9:.1f} GB ({routed / 2**30:.1f} GiB)" in PAGE


@pytest.mark.parametrize(
    "block", ["```sh\nls\n```", '```yaml title="box-0"\na: 1\n```', '```text title="says"\na\n```']
)
def test_a_block_that_nobody_could_follow_is_an_error(block: str) -> None:
    with pytest.raises(StepError):
        steps_of(f"## Two boxes, step by step\n\n{block}\n")
