"""Faults upon a real cluster while users ask it things; every answer is checked by teacher-forcing transformers on it.

    python -m tests.chaos [--minutes 20] [--faults 200] [--seed 1] [--policy on_demand] [--kinds kill_worker,cut_link]
    python -m tests.chaos --schedule out/chaos-schedule.json    # the same faults again

The schedule is printed as it is played, and written to a file at the start, from which it can be replayed.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.chaos.cluster import DEVICES, POLICIES, ChaosCluster, kinds_for
from tests.chaos.play import play
from tests.chaos.report import table
from tests.chaos.schedule import Fault, Kind, draw, read, write
from tests.chaos.verdict import judge

SCHEDULE = Path("out/chaos-schedule.json")


def chosen(options: argparse.Namespace) -> tuple[tuple[Fault, ...], int, float]:
    """Schedule, seed and seconds."""
    if options.schedule is not None:
        faults, seed = read(options.schedule)
        return faults, seed, faults[-1].at_s if faults else 0.0
    faults = draw(
        seed=options.seed,
        minutes=options.minutes,
        faults=options.faults,
        devices=DEVICES,
        kinds=[Kind(kind) for kind in options.kinds.split(",")] if options.kinds else kinds_for(options.policy),
    )
    write(options.write, faults, options.seed)
    return faults, options.seed, 60 * options.minutes


def main() -> int:
    """Start a cluster, play, check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", choices=POLICIES, default="on_demand")
    parser.add_argument("--kinds", help="only these, with commas between")
    parser.add_argument("--schedule", type=Path, help="play this file instead of drawing")
    parser.add_argument("--write", type=Path, default=SCHEDULE, help="where a drawn schedule is written")
    parser.add_argument("--json", type=Path, help="where the results are written")
    options = parser.parse_args()
    schedule, seed, seconds = chosen(options)
    with ChaosCluster(options.policy, seed) as cluster:
        run = asyncio.run(play(cluster, schedule, seconds=seconds, seed=seed))
    print(f"{len(run.client.asked)} requests; checking their answers", *run.failures, sep="\n", flush=True)
    found: dict[str, Any] = {"policy": options.policy, "seed": seed, **judge(run)}
    print(table(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    for line in found["failures"]:
        print("wrong:", line)
    if found["failures"]:
        file = options.schedule or options.write
        print("\n".join(map(str, schedule)))
        print(f"this schedule again: python -m tests.chaos --policy {options.policy} --schedule {file}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
