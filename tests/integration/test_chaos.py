"""A seeded slice of ``make chaos``: two minutes of faults upon a real cluster, and nothing is wrong with any answer."""

import asyncio
from pathlib import Path

import pytest

from tests.chaos.cluster import DEVICES, ChaosCluster, kinds_for
from tests.chaos.play import play
from tests.chaos.report import table
from tests.chaos.schedule import draw, write
from tests.chaos.verdict import judge

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

POLICY, SEED, MINUTES, FAULTS = "on_demand", 19, 2.0, 24


def test_two_minutes_of_faults(tmp_path: Path) -> None:
    schedule = draw(seed=SEED, minutes=MINUTES, faults=FAULTS, devices=DEVICES, kinds=kinds_for(POLICY))
    file = tmp_path / "schedule.json"
    write(file, schedule, SEED)
    with ChaosCluster(POLICY, SEED) as cluster:
        run = asyncio.run(play(cluster, schedule, seconds=60 * MINUTES, seed=SEED))
    found = judge(run)
    print(table(found))
    played = "\n".join(map(str, schedule))
    assert found["failures"] == [], f"again: python -m tests.chaos --policy {POLICY} --schedule {file}\n{played}"
    assert found["faults"] == FAULTS
    assert found["answered"] >= FAULTS
