"""``python -m benchmarks.planning FILE``: what ``raymoe plan`` says of the clusters that another benchmark measured.

FILE is the JSON of ``benchmarks.on_demand``. Of the cluster with everything resident it takes the times of a layer's
parts, of the link and of the shadow what was set; from these the plan follows, and is compared with what was measured
for the same cluster without a cache: by what foretells, by link speed, and by how often the shadow guesses
right.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import figure, report
from raymoe.config import EMBEDDED_MODEL
from raymoe.plan_command import facts_of
from raymoe.planning.cluster import DevicesFile
from raymoe.planning.costs import Costs
from raymoe.planning.facts import ModelFacts
from raymoe.planning.layout import cluster_of
from raymoe.planning.tpot import Choice, resident_s, tpot_s

AIM = 0.15
EXPERT_BYTES = 196_608  # of the embedded model in float32
RESIDENT, AHEAD = "everything resident", "both alignments, run ahead"
VARIANTS = {
    RESIDENT: None,
    AHEAD: {"run_ahead": True},
    "1 both alignments": {"run_ahead": False},
    "6 load after routing": "blind",
}
"""Variants of the benchmark, and what each is to a plan: None: all resident; "blind": without a shadow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One configuration: seconds per token, or both relative to everything resident where only that was kept."""

    name: str
    measured: float
    planned: float

    @property
    def error(self) -> float:
        """How far the plan is off."""
        return self.planned / self.measured - 1


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, help="JSON of benchmarks.on_demand")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    settings = json.loads(options.measured.read_text())["settings"]
    rows = compare(settings, facts_of(str(EMBEDDED_MODEL), "float32"))
    table = Table(title="planned and measured (emulated devices and links)")
    for column in ("configuration", "measured", "planned", "error"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.measured:.4g}", f"{row.planned:.4g}", f"{row.error:+.0%}")
    Console().print(table)
    errors = [abs(row.error) for row in rows]
    within = sum(error <= AIM for error in errors)
    figures = [
        figure("plan_error", errors, "share", f"absolute, {len(rows)} configurations; asked {AIM}"),
        figure("plan_within_aim", [within / len(rows)], "share"),
    ]
    report("planning (emulated devices)", figures, {"measured": str(options.measured), "emulated": True}, options.json)


def compare(settings: dict[str, Any], facts: ModelFacts) -> list[Row]:
    """Every configuration on emulated devices that was measured."""
    found = settings["emulated_devices"]
    base = devices(settings, found["load_s"])
    parts = [found["variants"], settings.get("ablation", {}).get("variants", {})]
    rows = [
        Row(name=f"{name}, s", measured=fastest_s(parts, name), planned=planned_s(facts, base, name))
        for name in VARIANTS
        if any(name in part for part in parts)
    ]
    for row in settings.get("sweep", []):
        slow = devices(settings, row["load_ms"] / 1e3)
        planned = planned_s(facts, slow, AHEAD) / planned_s(facts, slow, RESIDENT)
        name = f"load of {row['load_over_bound']:g} x the bound, x resident"
        rows.append(Row(name=name, measured=row["measured_over_resident"], planned=planned))
    for row in settings.get("run_ahead", []):
        agreement = row["agreement_ahead"]
        guessed = base | {"predictor": base["predictor"] | {"agreement": agreement}}
        planned = planned_s(facts, guessed, AHEAD) / planned_s(facts, base, RESIDENT)
        name = f"guesses right {agreement:.0%}, x resident"
        rows.append(Row(name=name, measured=1 / row["speed_ahead"], planned=planned))
    return rows


def fastest_s(parts: list[dict[str, Any]], name: str) -> float:
    """The fastest answer of a variant: other work on a shared machine only makes them slower."""
    return min(second for part in parts if name in part for second in part[name]["tpot_s"])


def planned_s(facts: ModelFacts, data: dict[str, Any], name: str) -> float:
    """Seconds per token of one variant."""
    how = VARIANTS[name]
    changed = dict(data)
    if how == "blind":
        changed.pop("shadow")
    elif isinstance(how, dict):
        changed["predictor"] = data["predictor"] | how
    costs = Costs(facts=facts, cluster=cluster_of(DevicesFile.parse(changed)))
    if how is None:
        return resident_s(costs)
    return tpot_s("on_demand_shadow", costs, Choice(group_size=data["group_size"]))


def devices(settings: dict[str, Any], load_s: float) -> dict[str, Any]:
    """The measured cluster as a devices file has it."""
    layer = settings["emulated_devices"]["layer"]
    times = {"main_layer_s": layer["main_s"], "head_s": max(0.0, layer["head_s"])}
    shadow = {"shadow_layer_s": settings["emulated_devices"]["pace"]["shadow_s"]}
    worker_times = {"layer_s": layer["worker_s"], "expert_s": 0.0, "load_s": load_s}
    common = {"memory": "8GB", "host_memory": "8GB", "compute": {"flops": 1e12, "bytes_per_s": "1TB"}, "emulated": True}
    link = {"link": {"bytes_per_s": "1GB"}}  # what a load takes is measured
    slots, apart = {"slot_memory": 2 * EXPERT_BYTES}, {"unified": True, "serves_experts": False}
    return {
        "devices": [
            {"name": "main", **common, **apart, "times": times},
            {"name": "shadow", **common, **apart, "times": shadow},
            {"name": "worker", "count": settings["workers"], **common, **link, **slots, "times": worker_times},
        ],
        "trunk": "main",
        "shadow": "shadow",
        "group_size": settings["group_size"],
        "predictor": {"bits": 8},
    }


if __name__ == "__main__":
    main()
