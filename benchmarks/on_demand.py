"""``python -m benchmarks.on_demand``: loading without a cache, foretold by a shadow, on a cluster of processes.

One main, one shadow and some workers on this machine, over real sockets; links are emulated, all else is real. Writes
tables, JSON, and with ``--figures`` the plots. ``--quick`` measures the named figures only.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cacheless.cluster import Cluster, Pace, Setup, cluster
from benchmarks.cacheless.measure import (
    ABLATION,
    AHEAD,
    RESIDENT,
    Lead,
    agreeing,
    answer,
    forced_tpot_s,
    in_turns,
    layer_times,
    median_ms,
    predicted_s,
    relative,
)
from benchmarks.harness import Figure, figure, report
from predictor.shadow import RUN_AHEAD, Alignment
from raymoe.checkpoint.synth import write_synthetic
from raymoe.config import EMBEDDED_MODEL

PROMPTS = (
    "It is a truth universally acknowledged, that a single man",
    "In the beginning God created",
    "The asyncio module provides",
    "def __init__(self, name, value):",
    "Elizabeth looked at Mr. Darcy and",
)
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # times the bound
AGREEMENTS = (0.0, 0.5, 0.8, 0.95, 1.0)
PACE = Pace(main_s=12e-3, worker_s=6e-3, shadow_s=9e-3)  # a small board's, some five times this machine's cores
PACED_TOKENS = 40
LATE = Alignment(run_ahead=0)
Say = Callable[[str], None]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figures", type=Path, help="write plots into this directory")
    parser.add_argument("--quick", action="store_true", help="the named figures only")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--part", choices=("embedded", "synthetic", "all"), default="all")
    parser.add_argument("--size", default=1_000_000_000, type=int, help="bytes of the synthetic checkpoint")
    options = parser.parse_args()
    console = Console(width=max(120, Console().width))

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    figures: list[Figure] = []
    settings: dict[str, Any] = {"workers": options.workers, "group_size": options.group_size, "emulated_links": True}
    if options.part != "synthetic":
        setup = Setup(model=EMBEDDED_MODEL, workers=options.workers, group_size=options.group_size, slots=2, bits=8)
        with cluster(setup) as running:
            figures += embedded(running, options, console, settings, say)
    if options.part != "embedded":
        figures += synthetic(options, settings, say)
    report("loading without a cache (emulated links)", figures, settings, options.json)


def embedded(
    running: Cluster, options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say
) -> list[Figure]:
    """The embedded model: speed, ablation, the timing bound, running ahead, time to first token."""
    prompts = [running.cacheless.encode(prompt) for prompt in PROMPTS]
    setup = running.setup
    times = layer_times(running, prompts[0], options.tokens)
    load_s = times.hidden_load_s(setup.workers, setup.group_size)
    running.set_load(load_s)
    settings["layer_times"] = asdict(times) | {"load_s": load_s}
    main, group, load = (f"{seconds * 1e3:.2f} ms" for seconds in (times.main_s, times.worker_s, load_s))
    say(f"a layer: main {main}, group {group}; one load {load}")
    variants = [RESIDENT, AHEAD] if options.quick else [RESIDENT, AHEAD, *ABLATION]
    found = in_turns(running, variants, prompts, options.tokens)
    speeds = {variant.name: relative(found, variant.name) for variant in variants}
    print_speeds(console, found, speeds)
    settings["speed"] = {name: {"of_resident": values} for name, values in speeds.items()}
    counts = running.counts()
    expert_total = sum(size.experts * size.expert_bytes for size in running.sizes)
    figures = [
        figure("decode_vs_resident", speeds[AHEAD.name], "x", "asked 0.9; the paper: 0.75"),
        figure("recall_in_use", [a.routing.recall or 0.0 for a in found[AHEAD.name]], "share"),
        figure("hits_in_use", [a.routing.hit_rate for a in found[AHEAD.name]], "share", "loaded in time"),
        figure("agreement", [counts.right / max(1, counts.guesses)], "share", "guesses of all variants"),
        figure("slot_fraction_embedded", [running.peak_slot_bytes() / (expert_total)], "share", "of the experts"),
    ]
    figures += paced(running, prompts, console, settings, options, say)
    if options.quick:
        return figures
    running.set_pace(Pace())
    running.set_load(load_s)
    sweep = sweep_links(running, prompts, options.tokens, times, load_s, say)
    settings["sweep"] = sweep
    running.set_load(load_s)
    ahead = run_ahead(running, prompts[0], options.tokens, say)
    settings["run_ahead"] = ahead
    settings["ttft"] = first_tokens(running, say)
    print_rows(console, "link speed", sweep)
    print_rows(console, "running ahead", ahead)
    print_rows(console, "time to first token", settings["ttft"])
    if options.figures:
        from benchmarks.cacheless import plots

        plots.ablation(speeds, options.figures / "on-demand-ablation.png")
        plots.links(sweep, load_s, options.figures / "on-demand-links.png")
        plots.ahead(ahead, options.figures / "on-demand-run-ahead.png")
    return figures


def paced(
    running: Cluster,
    prompts: list[list[int]],
    console: Console,
    settings: dict[str, Any],
    options: argparse.Namespace,
    say: Say,
) -> list[Figure]:
    """The same with emulated devices: each process takes at least as long for a layer as a device of its own would."""
    running.set_pace(PACE)
    times = layer_times(running, prompts[0], 24)
    load_s = times.hidden_load_s(running.setup.workers, running.setup.group_size)
    running.set_load(load_s)
    settings["paced"] = asdict(PACE) | {"measured": asdict(times), "load_s": load_s}
    say(f"emulated devices: main {times.main_s * 1e3:.1f} ms, group {times.worker_s * 1e3:.1f} ms a layer")
    variants = [RESIDENT, AHEAD] if options.quick else [RESIDENT, AHEAD, *ABLATION]
    found = in_turns(running, variants, prompts[:3], PACED_TOKENS)
    speeds = {variant.name: relative(found, variant.name) for variant in variants}
    print_speeds(console, found, speeds)
    settings["paced"] |= {"speed": speeds}
    if options.figures and not options.quick:
        from benchmarks.cacheless import plots

        plots.ablation(speeds, options.figures / "on-demand-ablation-paced.png")
    return [figure("decode_vs_resident_paced", speeds[AHEAD.name], "x", "emulated devices too")]


def sweep_links(
    running: Cluster, prompts: list[list[int]], tokens: int, times: Any, bound_s: float, say: Say
) -> list[dict[str, float]]:
    """TPOT against the time of one load: measured, and as the timing model has it."""
    rows = []
    for factor in LOADS:
        running.set_load(factor * bound_s)
        found = in_turns(running, [RESIDENT, AHEAD], prompts[:3], tokens)
        resident_s = statistics.median(a.tpot_s for a in found[RESIDENT.name])
        measured_s = statistics.median(a.tpot_s for a in found[AHEAD.name])
        model_s = predicted_s(running, times, factor * bound_s, steps_ahead=RUN_AHEAD)
        free_s = predicted_s(running, times, 0.0, steps_ahead=RUN_AHEAD)
        rows.append(
            {
                "load_over_bound": factor,
                "load_ms": factor * bound_s * 1e3,
                "measured_over_resident": measured_s / resident_s,
                "predicted_over_resident": model_s / free_s,
                "hit_rate": statistics.median(a.routing.hit_rate for a in found[AHEAD.name]),
            }
        )
        measured = measured_s / resident_s
        say(f"load of {factor:g} x the bound: {measured:.2f} x resident, predicted {model_s / free_s:.2f}")
    return rows


def run_ahead(running: Cluster, prompt: list[int], tokens: int, say: Say) -> list[dict[str, float]]:
    """Layers of lead and TPOT with and without running ahead, on texts whose words are guessed more or less well."""
    rows = []
    for rate in AGREEMENTS:
        text = agreeing(running.resident, prompt, tokens, rate, seed=1)
        row: dict[str, float] = {"agreement_aimed": rate}
        resident_s, _ = forced_tpot_s(running.resident, text, len(prompt))
        for name, alignment in (("late", LATE), ("ahead", AHEAD.alignment)):
            assert alignment is not None
            running.align(alignment)
            before, lead = running.counts(), Lead()
            with lead.watched(running.cacheless, len(running.sizes)):
                tpot_s, routing = forced_tpot_s(running.cacheless, text, len(prompt))
            after = running.counts()
            row[f"agreement_{name}"] = (after.right - before.right) / max(1, after.guesses - before.guesses)
            row[f"lead_{name}"] = float(np.mean(lead.layers))
            row[f"speed_{name}"] = resident_s / tpot_s
            row[f"hits_{name}"] = routing.hit_rate
        rows.append(row)
        say(
            f"agreement {row['agreement_ahead']:.2f}: lead {row['lead_late']:.1f} layers late, {row['lead_ahead']:.1f} "
            f"ahead; speed {row['speed_late']:.2f} and {row['speed_ahead']:.2f} of resident"
        )
    return rows


def first_tokens(running: Cluster, say: Say) -> list[dict[str, float]]:
    """Time to first token with and without mini-batches, in turns; the first prompts teach the costs."""
    rows = []
    planner = running.cacheless.experts.prefill  # type: ignore[union-attr]
    random = np.random.default_rng(0)
    for tokens in (16, 128):
        prompts = [random.integers(200, 4000, tokens).tolist() for _ in range(8)]
        taken: dict[bool, list[float]] = {True: [], False: []}
        for prompt in prompts:
            for whole in (True, False):
                planner.whole = whole
                taken[whole].append(answer(running.cacheless, prompt, 1).ttft_s)
        resident = [answer(running.resident, prompt, 1).ttft_s for prompt in prompts]
        planner.whole = False
        whole_s, cut_s = statistics.median(taken[True][3:]), statistics.median(taken[False][3:])
        rows.append(
            {
                "prompt_tokens": tokens,
                "whole_ms": whole_s * 1e3,
                "minibatches_ms": cut_s * 1e3,
                "minibatches_over_whole": cut_s / whole_s,
                "resident_ms": statistics.median(resident[3:]) * 1e3,
                "messages_per_worker_and_layer": planner.mean_count,
            }
        )
        say(f"{tokens} prompt tokens: whole {whole_s * 1e3:.0f} ms, in mini-batches {cut_s * 1e3:.0f} ms")
    return rows


def synthetic(options: argparse.Namespace, settings: dict[str, Any], say: Say) -> list[Figure]:
    """Random weights of a real model's proportions, and a 4-bit shadow: memory, and speed where experts are large."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        written = write_synthetic(path, like="mixtral", size_bytes=options.size, seed=0, dtype="float32")
        say(f"{written.layers} layers x {written.experts} experts, top-{written.top_k}, hidden {written.hidden}")
        setup = Setup(model=path, workers=8, group_size=2, slots=2, bits=4)
        with cluster(setup) as running:
            prompts = [np.random.default_rng(seed).integers(5, 200, 8).tolist() for seed in range(3)]
            times = layer_times(running, prompts[0], 24)
            load_s = times.hidden_load_s(setup.workers, setup.group_size)
            running.set_load(load_s)
            settings["synthetic"] = asdict(times) | {"load_s": load_s, "workers": 8, "group_size": 2}
            found = in_turns(running, [RESIDENT, AHEAD], prompts, 32)
            trunk = running.checkpoint.trunk_bytes
            total = trunk + running.checkpoint.routed_bytes
            slots = running.peak_slot_bytes()
            say(f"TPOT resident {median_ms([a.tpot_s for a in found[RESIDENT.name]])}")
            return [
                figure(
                    "memory_fraction", [(slots + trunk + running.shadow_bytes) / total], "share", "asked 1/3 at most"
                ),
                figure("slot_fraction", [slots / total], "share", "asked a tenth"),
                figure(
                    "decode_vs_resident_synthetic", relative(found, AHEAD.name), "x", "1 GB, 8 workers in groups of 2"
                ),
                figure("hits_in_use_synthetic", [a.routing.hit_rate for a in found[AHEAD.name]], "share"),
            ]


def print_speeds(console: Console, found: dict[str, Any], speeds: dict[str, list[float]]) -> None:
    """A line per variant."""
    table = Table(title="decode, link as slow as can be hidden")
    for column in ("variant", "TPOT", "of resident", "range", "recall", "in time"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, values in speeds.items():
        answers = found[name]
        recalls = [a.routing.recall for a in answers if a.routing.recall is not None]
        table.add_row(
            name,
            median_ms([a.tpot_s for a in answers]),
            f"{statistics.median(values):.2f}",
            f"{min(values):.2f} to {max(values):.2f}",
            f"{statistics.mean(recalls):.3f}" if recalls else "",
            f"{statistics.mean(a.routing.hit_rate for a in answers):.3f}",
        )
    console.print(table)


def print_rows(console: Console, title: str, rows: list[dict[str, float]]) -> None:
    """Any rows of numbers."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
