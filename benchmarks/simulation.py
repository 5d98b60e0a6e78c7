"""``python -m benchmarks.simulation``: how fast clusters are simulated, and how well the result fits what was measured.

``speed``: 1,000 devices and 1,000 steps, and the cost per step against the number of devices.
``measured``: the figures that ``benchmarks.on_demand`` or ``benchmarks.joint`` wrote with ``--json FILE``, beside the
simulation of the same clusters.
``drafts``: what reading a shadow's guesses along gives on devices of their own. ``paper``: the ten nodes of OD-MoE
(arXiv 2512.03927). ``--quick`` makes fewer steps.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cacheless.cluster import ROW_MORE
from benchmarks.cacheless.measure import AHEAD
from benchmarks.harness import Figure, figure, report
from benchmarks.joint import (
    DEPTHS,
    DRAFT_GROUP_SIZES,
    DRAFT_SPARE,
    DRAFT_WORKERS,
    GROUP_SIZE,
    SPARE,
    WORKERS,
    drafts_name,
)
from benchmarks.on_demand import PACE
from raymoe.placement.pipelining import hidden_load_s
from raymoe.planning.cluster import DevicesFile
from raymoe.simulation.result import SimResult
from raymoe.simulation.run import SimPolicy, simulate, with_agreement
from raymoe.simulation.setting import MainTimes, Setting, ShadowTimes, WorkerTimes, setting_of
from raymoe.simulation.shape import SHAPES, ModelShape
from raymoe.simulation.synthetic import Habits, synthetic
from raymoe.simulation.trace import RoutingTrace, load
from raymoe.types import DeviceName

DEVICES = (10, 100, 1000)
PAPER = Path(__file__).parent.parent / "docs" / "planning" / "od-moe.yaml"
PAPER_TOKENS_PER_S, PAPER_RESIDENT_PER_S = 3.69, 4.89


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--part", choices=("speed", "measured", "drafts", "paper", "all"), default="all")
    parser.add_argument("--measured", type=Path, help="what benchmarks.on_demand or .joint wrote")
    parser.add_argument("--trace", type=Path, help="a routing trace of the embedded model; else a synthetic one")
    parser.add_argument("--acceptance", type=float, default=0.97, help="of each draft, in part drafts")
    options = parser.parse_args()
    console = Console(width=max(110, Console().width))
    figures: list[Figure] = []
    settings: dict[str, Any] = {}
    if options.part in ("speed", "all"):
        figures += speed(100 if options.quick else 1000, console, settings)
    if options.part in ("drafts", "all"):
        figures += drafts(64 if options.quick else 512, options, console, settings)
    if options.part in ("paper", "all"):
        figures += paper(64 if options.quick else 512, console, settings)
    if options.measured is not None:
        figures += measured(options.measured, options.trace, console, settings)
    report(
        "simulation of clusters (nothing here is measured but the simulator itself)", figures, settings, options.json
    )


# --- how fast -------------------------------------------------------------------------------------------


def speed(steps: int, console: Console, settings: dict[str, Any]) -> list[Figure]:
    """Processor time of a simulation by the number of devices; Mixtral's layers, policies with and without a cache."""
    rows, figures = [], []
    trace = synthetic(SHAPES["mixtral-8x7b"], 256)
    for policy in ("on_demand_shadow", "on_demand"):
        per_step = {}
        for count in DEVICES:
            setting = alike(trace.shape, count)
            start = time.process_time()
            simulate(trace, setting, policy, steps=8)  # handing out experts, once
            setup_s = time.process_time() - start
            start = time.process_time()
            found = simulate(trace, setting, policy, steps=steps)
            took_s = time.process_time() - start
            per_step[count] = (took_s - setup_s) / (steps - 8)
            rows.append(
                {
                    "policy": policy,
                    "devices": count,
                    "processor_s": took_s,
                    "setup_s": setup_s,
                    "ms_per_step": per_step[count] * 1e3,
                    "events_per_step": found.events_per_step,
                }
            )
        whole = f"{steps} steps"
        figures.append(
            figure(
                f"simulate_1000_devices_{policy}", [float(rows[-1]["processor_s"])], "s", f"{whole}; asked 60 for 1,000"
            )
        )
        growth = per_step[DEVICES[-1]] / per_step[DEVICES[0]] / (DEVICES[-1] / DEVICES[0])
        figures.append(figure(f"cost_growth_{policy}", [growth], "x", "per step, over the growth in devices; asked 1"))
    settings["speed"] = rows
    table(console, "cost of simulating", rows)
    return figures


def alike(shape: ModelShape, count: int) -> Setting:
    """So many workers alike, each with memory for everything."""
    workers = tuple(
        WorkerTimes(name=DeviceName(f"w{index}"), call_s=0.5e-3, expert_s=1e-3, load_s=28e-3, slots=2)
        for index in range(count)
    )
    return Setting(shape=shape, workers=workers, main=MainTimes(layer_s=4e-3), shadow=ShadowTimes(layer_s=3e-3))


# --- against measurements -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One configuration: seconds per token with everything resident and as the policy, both measured and simulated."""

    name: str
    measured_x: float
    simulated_x: float

    @property
    def error(self) -> float:
        """Of the simulated time per token, as a share of the measured one."""
        return self.simulated_x / self.measured_x - 1


def measured(file: Path, trace: Path | None, console: Console, settings: dict[str, Any]) -> list[Figure]:
    """Time per token over that with everything resident, as benchmarks measured it on emulated devices.

    Main, group and head are those that it measured with everything resident; the shadow's pace is the one that was
    set. Ratios are compared, for the machine's own speed drifts by more than the effects.
    """
    found = json.loads(file.read_text())["settings"]
    routing = routing_of(trace)
    compared = compare(found, routing) if "variants" in devices_of(found) else []
    compared += compare_policies(found, routing) if "policies" in found else []
    compared += compare_drafts(found, routing)
    if not compared:
        raise SystemExit(f"{file} holds nothing that can be compared: write it with all parts of its benchmark")
    rows = [
        {"configuration": c.name, "measured": c.measured_x, "simulated": c.simulated_x, "error": c.error}
        for c in compared
    ]
    settings["measured"] = rows
    table(console, "time per token over everything resident, emulated devices", rows)
    errors = [abs(c.error) for c in compared]
    return [figure("simulation_error", errors, "share", "median and range over configurations; asked 0.15 at most")]


def routing_of(trace: Path | None) -> RoutingTrace:
    """The embedded model's, recorded or invented."""
    if trace is not None:
        return load(trace)
    return synthetic(SHAPES["tiny-moe"], 256, Habits(recall=0.999, agreement=0.99))


def devices_of(found: dict[str, Any]) -> dict[str, Any]:
    """What a measurement has of emulated devices, where it is that of ``benchmarks.on_demand``."""
    devices = found.get("emulated_devices")
    return devices if isinstance(devices, dict) else {}


def compare(found: dict[str, Any], routing: RoutingTrace) -> list[Compared]:
    """Every configuration of a measurement, and its simulation."""
    devices = found["emulated_devices"]
    setting = as_measured(found, routing.shape)
    resident_s = simulate(routing, setting, "on_demand_shadow", resident=True).tpot_s
    compared = []

    def add(name: str, measured_x: float, of: Setting, routing: RoutingTrace = routing) -> None:
        tpot_s = simulate(routing, of, "on_demand_shadow").tpot_s
        compared.append(Compared(name=name, measured_x=measured_x, simulated_x=tpot_s / resident_s))

    assert setting.shadow is not None
    late = replace(setting, shadow=replace(setting.shadow, run_ahead=0))
    variants = devices["variants"]
    for name, of in (("both alignments, run ahead", setting), ("1 both alignments", late)):
        if name in variants:
            add(name, middle([1 / speed for speed in variants[name]["of_resident"]]), of)
    ablation = found.get("ablation", {}).get("variants", {})
    for name, of in (("1 both alignments", late), ("6 load after routing", replace(setting, shadow=None))):
        if name in ablation:
            add(f"{name}, held-out text", middle([1 / speed for speed in ablation[name]["of_resident"]]), of)
    for row in found.get("sweep", ()):
        load_s = row["load_ms"] / 1e3
        name = f"run ahead, load {row['load_over_bound']:g} x the bound"
        add(name, row["measured_over_resident"], with_load(setting, load_s))
    random = np.random.default_rng(0)
    for row in found.get("run_ahead", ()):
        for kind, of in (("late", late), ("ahead", setting)):
            rate = row[f"agreement_{kind}"]
            guessed = replace(routing, guessed_N=random.random(routing.steps) < rate)
            add(f"{kind}, guesses right {rate:.2f}", 1 / row[f"speed_{kind}"], of, guessed)
    return compared


def as_measured(found: dict[str, Any], shape: ModelShape) -> Setting:
    """The cluster of ``benchmarks.on_demand`` with emulated devices."""
    devices, layer = found["emulated_devices"], found["emulated_devices"]["layer"]
    loads = -(-shape.top_k // found["group_size"])
    workers = tuple(
        WorkerTimes(
            name=DeviceName(f"w{index}"), expert_s=layer["worker_s"] / loads, load_s=devices["load_s"], slots=loads + 1
        )
        for index in range(found["workers"])
    )
    return Setting(
        shape=shape,
        workers=workers,
        main=MainTimes(layer_s=layer["main_s"], head_s=max(0.0, layer["head_s"])),
        shadow=ShadowTimes(layer_s=devices["pace"]["shadow_s"]),
        group_size=found["group_size"],
        emulated=True,
    )


PLANNED: tuple[tuple[str, SimPolicy, float], ...] = (
    ("on_demand_shadow", "on_demand_shadow", 0.0),
    ("joint, exact", "joint", 0.0),
    ("joint", "joint", 0.25),
)
"""Of ``benchmarks.joint``: an arm, its policy, its alpha. Importance hands out experts otherwise than its sim does."""


def compare_policies(found: dict[str, Any], routing: RoutingTrace) -> list[Compared]:
    """The policies of ``benchmarks.joint`` that load as forecasts say, at each speed of links that it measured."""
    policies = found["policies"]
    compared = []
    for place, measured in policies.items():
        if not isinstance(measured, dict) or "arms" not in measured:
            continue
        setting = paced(routing.shape, policies["layer"], measured["load_s"], WORKERS, GROUP_SIZE, spare=SPARE)
        resident_s = simulate(routing, setting, "on_demand_shadow", resident=True).tpot_s
        for arm, policy, alpha in PLANNED:
            if arm in measured["arms"]:
                tpot_s = simulate(routing, setting, policy, alpha=alpha).tpot_s
                measured_x = middle(measured["arms"][arm]["over_resident"])
                compared.append(
                    Compared(name=f"{arm}, {place}", measured_x=measured_x, simulated_x=tpot_s / resident_s)
                )
    return compared


def compare_drafts(found: dict[str, Any], routing: RoutingTrace) -> list[Compared]:
    """Passes of ``benchmarks.joint`` with drafts; as many are right as were accepted there.

    The engine reads as many as pay by what it has measured, the simulation always as many as there are.
    """
    compared = []
    for group_size in DRAFT_GROUP_SIZES:
        for depth in DEPTHS:
            name = drafts_name(depth, group_size)
            measured = found.get(name)
            if measured is None:
                continue
            load_s, layer = measured["load_s"], measured["layer"]
            setting = paced(routing.shape, layer, load_s, DRAFT_WORKERS, group_size, spare=DRAFT_SPARE)
            guessed = with_agreement(routing, middle(measured["accepted"])) if depth else routing
            resident_s = simulate(routing, setting, "on_demand_shadow", resident=True).tpot_s
            tpot_s = simulate(guessed, setting, "on_demand_shadow", drafts=depth).tpot_s
            measured_x = middle([1 / speed for speed in measured["variants"][AHEAD.name]["of_resident"]])
            compared.append(
                Compared(name=name.replace("_", " "), measured_x=measured_x, simulated_x=tpot_s / resident_s)
            )
    return compared


def paced(
    shape: ModelShape, layer: dict[str, float], load_s: float, workers: int, group_size: int, *, spare: int
) -> Setting:
    """The devices that benchmarks emulate; what a layer takes beyond its experts' time is that of messages."""
    loads = -(-shape.top_k // group_size)
    worker = WorkerTimes(
        name=DeviceName("w"),
        call_s=max(0.0, layer["worker_s"] - loads * PACE.worker_s),
        expert_s=PACE.worker_s,
        row_s=ROW_MORE * PACE.worker_s,
        load_s=load_s,
        slots=1,
    )
    return Setting(
        shape=shape,
        workers=tuple(replace(worker, name=DeviceName(f"w{index}")) for index in range(workers)),
        main=MainTimes(layer_s=layer["main_s"], row_s=ROW_MORE * layer["main_s"], head_s=max(0.0, layer["head_s"])),
        shadow=ShadowTimes(layer_s=PACE.shadow_s),
        group_size=group_size,
        emulated=True,
    ).with_spare_slots(spare)


def with_load(setting: Setting, load_s: float) -> Setting:
    """The same with other links."""
    return replace(setting, workers=tuple(replace(worker, load_s=load_s) for worker in setting.workers))


def middle(values: list[float]) -> float:
    """The median."""
    return sorted(values)[len(values) // 2]


# --- drafts ---------------------------------------------------------------------------------------------


def drafts(steps: int, options: argparse.Namespace, console: Console, settings: dict[str, Any]) -> list[Figure]:
    """Speed over plain decoding with everything resident, by the most drafts of a pass, on ten devices of their own.

    They are those that ``benchmarks.joint`` emulates, without the time that its messages take.
    """
    routing = with_agreement(routing_of(options.trace), options.acceptance)
    layer = {"main_s": PACE.main_s, "worker_s": PACE.worker_s, "head_s": 0.0}
    rows, figures = [], []
    for group_size in DRAFT_GROUP_SIZES:
        bound_s = hidden_load_s(DRAFT_WORKERS, group_size, PACE.main_s, PACE.worker_s)
        for share in (1.0, 0.25):
            setting = paced(routing.shape, layer, share * bound_s, DRAFT_WORKERS, group_size, spare=DRAFT_SPARE)
            resident_s = simulate(routing, setting, "on_demand_shadow", steps=steps, resident=True).tpot_s
            for depth in DEPTHS:
                found = simulate(routing, setting, "on_demand_shadow", steps=steps, drafts=depth)
                rows.append(
                    {
                        "group size": group_size,
                        "load_over_bound": share,
                        "drafts": depth,
                        "of_resident": resident_s / found.tpot_s,
                        "tokens_per_pass": found.tokens_per_pass,
                        "loads_per_token": found.loads_per_token,
                        "shadow": found.shadow or 0.0,
                        "ready": found.hit_rate,
                        "bottleneck": found.bottleneck,
                    }
                )
                if share == 1.0:
                    name = f"simulated_drafts_{depth}_groups_of_{group_size}"
                    figures.append(figure(name, [resident_s / found.tpot_s], "x", "simulated; of plain resident"))
    settings["drafts"] = rows
    table(console, f"drafts of which {options.acceptance:g} are right (simulated)", rows)
    return figures


# --- the paper's ten nodes ------------------------------------------------------------------------------


def paper(steps: int, console: Console, settings: dict[str, Any]) -> list[Figure]:
    """Mixtral-8x7B in float32 on a main node, a shadow and eight RTX 3080s, by what its times are taken from."""
    devices, shape = DevicesFile.load(PAPER), SHAPES["mixtral-8x7b"]
    routing = synthetic(shape, 512, Habits(popularity=0.2, persistence=0.25, recall=0.9734, agreement=0.95))
    data_sheet = setting_of(devices, shape)
    fitted = fitted_to(routing, data_sheet, 1 / PAPER_RESIDENT_PER_S)
    rows, figures = [], []
    for name, setting in (("data sheets", data_sheet), ("fitted to 4.89 tokens/s resident", fitted)):
        for title, of, more in variants_of(setting):
            found = simulate(routing, of, "on_demand_shadow", steps=steps, **more)
            rows.append(
                {
                    "times": name,
                    "variant": title,
                    "tokens_per_s": found.tokens_per_s,
                    "ready": found.hit_rate,
                    "bottleneck": found.bottleneck,
                }
            )
            if setting is fitted:
                note = "the paper measured 3.69" if title.startswith("late") else "simulated"
                figures.append(
                    figure(f"paper_{title.split(',')[0].replace(' ', '_')}", [found.tokens_per_s], "1/s", note)
                )
    settings["paper"] = rows
    table(console, "ten nodes, Mixtral-8x7B in float32 (simulated)", rows)
    return figures


def variants_of(setting: Setting) -> list[tuple[str, Setting, dict[str, Any]]]:
    """As in the paper, and what this project adds."""
    assert setting.shadow is not None
    late = replace(setting, shadow=replace(setting.shadow, run_ahead=0))
    return [
        ("everything resident", setting, {"resident": True}),
        ("late departure, as in the paper", late, {}),
        ("running ahead", setting, {}),
        ("no forecasts", replace(setting, shadow=None), {}),
    ]


def fitted_to(routing: RoutingTrace, setting: Setting, resident_s: float) -> Setting:
    """The same with the main node's time per layer such that everything resident takes ``resident_s`` per token."""
    found: SimResult = simulate(routing, setting, "on_demand_shadow", steps=32, resident=True)
    missing_s = (resident_s - found.tpot_s) / setting.shape.layers
    main = replace(setting.main, layer_s=max(0.0, setting.main.layer_s + missing_s))
    return replace(setting, main=main)


def table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Any rows."""
    drawn = Table(title=title)
    for column in rows[0]:
        drawn.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        drawn.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()))
    console.print(drawn)


if __name__ == "__main__":
    main()
