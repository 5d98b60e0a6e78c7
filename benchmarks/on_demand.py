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
    LATE,
    RESIDENT,
    Found,
    LayerTimes,
    Lead,
    agreeing,
    in_turns,
    layer_times,
    median_ms,
    predicted_s,
    reading,
    relative,
    roofline_fraction,
    roofline_fractions,
    saying,
)
from benchmarks.harness import Figure, figure, report
from benchmarks.scheduling.setup import DOMAINS, EVAL
from predictor.shadow import RUN_AHEAD
from raymoe.checkpoint.synth import write_synthetic
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.corpus import text_pieces

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
FLOOR = "floor: resident path, or loads over all links"
PREFIX, GIVEN = 16, 64  # of a text that is read: prompt, and tokens after it
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
    console = Console(width=max(140, Console().width))

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    figures: list[Figure] = []
    settings: dict[str, Any] = {"workers": options.workers, "group_size": options.group_size, "emulated_links": True}
    if options.part != "synthetic":
        setup = Setup(model=EMBEDDED_MODEL, workers=options.workers, group_size=options.group_size, top_k=4, bits=8)
        with cluster(setup) as running:
            figures += embedded(running, options, console, settings, say)
    if options.part != "embedded":
        figures += synthetic(options, console, settings, say)
    report("loading without a cache (emulated links)", figures, settings, options.json)


def embedded(
    running: Cluster, options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say
) -> list[Figure]:
    """The embedded model: processes that share this machine's cores, then the same with emulated devices."""
    prompts = [running.foretold.encode(prompt) for prompt in PROMPTS]
    set_link(running, prompts[0], options.tokens, settings, say)
    found = in_turns(running, [RESIDENT, AHEAD, LATE], [saying(p, options.tokens, seed=1) for p in prompts])
    settings["shared_cores"] |= print_speeds(running, console, "ten processes on this machine's cores", found)
    counts = running.counts()
    expert_bytes = sum(size.experts * size.expert_bytes for size in running.sizes)
    ahead = found.answers[AHEAD.name]
    figures = [
        figure("decode_vs_resident", relative(found, AHEAD.name), "x", "asked 0.9; the paper: 0.75; cores are shared"),
        figure("processor_vs_resident", busy(found), "x", "processor time per token, of the resident cluster's"),
        figure("recall_in_use", [a.routing.recall or 0.0 for a in ahead], "share"),
        figure("hits_in_use", [a.routing.hit_rate for a in ahead], "share", "loaded in time"),
        *rooflines(running, found, "shared_cores"),
        figure("agreement", [counts.right / max(1, counts.guesses)], "share", "guesses of all variants"),
        figure("slot_fraction_embedded", [running.peak_slot_bytes() / expert_bytes], "share", "of the experts"),
    ]
    if not options.quick:
        settings["ttft"] = first_tokens(running, say)
        print_rows(console, "time to first token", settings["ttft"])
    rates = () if options.quick else AGREEMENTS
    texts = {rate: agreeing(running.resident, prompts[0], GIVEN, rate, seed=1) for rate in rates}
    return figures + on_devices(running, prompts, texts, console, settings, options, say)


def set_link(
    running: Cluster, prompt: list[int], tokens: int, settings: dict[str, Any], say: Say, name: str = "shared_cores"
) -> tuple[LayerTimes, float]:
    """Measure a layer with everything resident, and make links as slow as can just be hidden behind that."""
    times = layer_times(running, prompt, tokens)
    load_s = running.setup.hidden_load_s(times.main_s, times.worker_s)
    running.set_load(load_s)
    settings[name] = {"layer": asdict(times), "load_s": load_s}
    main, group, load = (f"{seconds * 1e3:.2f} ms" for seconds in (times.main_s, times.worker_s, load_s))
    say(f"a layer: main {main}, group {group}; one load {load}")
    return times, load_s


def on_devices(
    running: Cluster,
    prompts: list[list[int]],
    texts: dict[float, list[int]],
    console: Console,
    settings: dict[str, Any],
    options: argparse.Namespace,
    say: Say,
) -> list[Figure]:
    """With emulated devices: each process takes at least as long for a layer as a device of its own would.

    Args:
        texts: to read, by how often they are guessed.
    """
    running.set_pace(PACE)
    times, load_s = set_link(running, prompts[0], 24, settings, say, "emulated_devices")
    settings["emulated_devices"] |= {"pace": asdict(PACE)}
    variants = [RESIDENT, AHEAD, LATE]
    found = in_turns(running, variants, [saying(prompt, PACED_TOKENS, seed=1) for prompt in prompts])
    settings["emulated_devices"] |= print_speeds(running, console, "emulated devices", found)
    speeds = relative(found, AHEAD.name)
    figures = [
        figure("decode_vs_resident_devices", speeds, "x", "emulated devices"),
        figure("decode_vs_resident_late", relative(found, LATE.name), "x", "emulated devices; as in the paper"),
        *rooflines(running, found, "devices"),
    ]
    if options.quick:
        return figures
    tokenizer = running.foretold.tokenizer
    pieces = [text_pieces((EVAL / f"{domain}.txt").read_text(), tokenizer, 1, PREFIX + GIVEN)[0] for domain in DOMAINS]
    ablated = in_turns(running, [RESIDENT, AHEAD, *ABLATION], [reading(piece, PREFIX) for piece in pieces])
    settings["ablation"] = print_speeds(
        running, console, "what foretells, on held-out text (emulated devices)", ablated
    )
    sweep = sweep_links(running, prompts, times, load_s, say)
    settings["sweep"] = sweep
    running.set_load(load_s)
    ahead = run_ahead(running, texts, len(prompts[0]), say)
    settings["run_ahead"] = ahead
    print_rows(console, "link speed", sweep)
    print_rows(console, "running ahead", ahead)
    if options.figures:
        from benchmarks.cacheless import plots

        speeds_by_name = {name: relative(ablated, name) for name in ablated.answers}
        plots.ablation(speeds_by_name, options.figures / "on-demand-ablation.png")
        plots.links(sweep, load_s, options.figures / "on-demand-links.png")
        plots.ahead(ahead, options.figures / "on-demand-run-ahead.png")
    return figures


def sweep_links(
    running: Cluster, prompts: list[list[int]], times: LayerTimes, bound_s: float, say: Say
) -> list[dict[str, float]]:
    """TPOT against the time of one load: measured, and as the timing model has it."""
    rows = []
    for factor in LOADS:
        running.set_load(factor * bound_s)
        found = in_turns(running, [RESIDENT, AHEAD], [saying(prompt, PACED_TOKENS) for prompt in prompts[:3]])
        measured = statistics.median(1 / speed for speed in relative(found, AHEAD.name))
        more = {"steps_ahead": RUN_AHEAD, "shadow_s": PACE.shadow_s}
        model_s, free_s = (predicted_s(running, times, load_s, **more) for load_s in (factor * bound_s, 0.0))
        rows.append(
            {
                "load_over_bound": factor,
                "load_ms": factor * bound_s * 1e3,
                "measured_over_resident": measured,
                "predicted_over_resident": model_s / free_s,
                "roofline_fraction": statistics.median(roofline_fractions(running, found, AHEAD.name)),
                "hit_rate": statistics.median(a.routing.hit_rate for a in found.answers[AHEAD.name]),
                "disturbed_rounds": found.disturbed_rounds,
            }
        )
        say(f"load of {factor:g} x the bound: {measured:.2f} x resident, predicted {model_s / free_s:.2f}")
    return rows


def run_ahead(running: Cluster, texts: dict[float, list[int]], prefix: int, say: Say) -> list[dict[str, float]]:
    """Layers of lead and TPOT with and without running ahead, on texts whose words are guessed more or less well."""
    rows = []
    for rate, text in texts.items():
        row: dict[str, float] = {"agreement_aimed": rate}
        resident_s = RESIDENT.run(running, reading(text, prefix)).tpot_s
        for name, variant in (("late", LATE), ("ahead", AHEAD)):
            before, lead = running.counts(), Lead()
            with lead.watched(running.foretold, len(running.sizes)):
                found = variant.run(running, reading(text, prefix))
            after = running.counts()
            row[f"agreement_{name}"] = (after.right - before.right) / max(1, after.guesses - before.guesses)
            row[f"lead_{name}"] = float(np.mean(lead.layers))
            row[f"speed_{name}"] = resident_s / found.tpot_s
            row[f"hits_{name}"] = found.routing.hit_rate
            row[f"roofline_{name}"] = roofline_fraction(running, found, resident_s)
        rows.append(row)
        say(
            f"agreement {row['agreement_ahead']:.2f}: lead {row['lead_late']:.1f} layers late, {row['lead_ahead']:.1f} "
            f"ahead; speed {row['speed_late']:.2f} and {row['speed_ahead']:.2f} of resident"
        )
    return rows


def first_tokens(running: Cluster, say: Say) -> list[dict[str, float]]:
    """Time to first token with and without mini-batches, in turns; the first prompts teach the costs."""
    rows = []
    planner = running.foretold.experts.prefill  # type: ignore[union-attr]
    random = np.random.default_rng(0)
    for tokens in (16, 128):
        prompts = [random.integers(200, 4000, tokens).tolist() for _ in range(8)]
        taken: dict[bool, list[float]] = {True: [], False: []}
        for prompt in prompts:
            for whole in (True, False):
                planner.whole = whole
                taken[whole].append(saying(prompt, 1)(running.foretold).ttft_s)
        resident = [saying(prompt, 1)(running.resident).ttft_s for prompt in prompts]
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


def synthetic(options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say) -> list[Figure]:
    """Random weights of a real model's proportions, and a 4-bit shadow: memory, and speed where experts are large."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        written = write_synthetic(path, like="mixtral", size_bytes=options.size, seed=0, dtype="float32")
        say(f"{written.layers} layers x {written.experts} experts, top-{written.top_k}, hidden {written.hidden}")
        setup = Setup(model=path, workers=8, group_size=2, top_k=written.top_k, bits=4)
        with cluster(setup) as running:
            prompts = [np.random.default_rng(seed).integers(5, 200, 8).tolist() for seed in range(3)]
            set_link(running, prompts[0], 24, settings, say, "synthetic")
            found = in_turns(running, [RESIDENT, AHEAD, LATE], [saying(prompt, 32) for prompt in prompts])
            settings["synthetic"] |= print_speeds(running, console, "1 GB synthetic, 8 workers in groups of 2", found)
            trunk = running.checkpoint.trunk_bytes
            total = trunk + running.checkpoint.routed_bytes
            slots = running.peak_slot_bytes()
            memory = (slots + trunk + running.shadow_bytes) / total
            return [
                figure("memory_fraction", [memory], "share", "slots, trunk and shadow; asked 1/3 at most"),
                figure("slot_fraction", [slots / total], "share", "asked a tenth"),
                figure("decode_vs_resident_synthetic", relative(found, AHEAD.name), "x", "1 GB, groups of 2"),
                *rooflines(running, found, "synthetic"),
                figure("hits_in_use_synthetic", [a.routing.hit_rate for a in found.answers[AHEAD.name]], "share"),
            ]


def busy(found: Found) -> list[float]:
    """Processor time per token of the whole cluster with a shadow, over that with everything resident."""
    pairs = zip(found.answers[AHEAD.name], found.answers[RESIDENT.name], strict=True)
    return [sum(mine.processor_s.values()) / sum(theirs.processor_s.values()) for mine, theirs in pairs]


def rooflines(running: Cluster, found: Found, place: str) -> list[Figure]:
    """Share of its roofline that each variant with a shadow reached."""
    return [
        figure(f"roofline_fraction_{place}{suffix}", roofline_fractions(running, found, name), "", FLOOR)
        for name, suffix in ((AHEAD.name, ""), (LATE.name, "_late"))
    ]


def print_speeds(running: Cluster, console: Console, title: str, found: Found) -> dict[str, Any]:
    """A line per variant; returns them for JSON."""
    table = Table(title=f"{title}; the last columns are processor time per token", caption=found.caption())
    columns = (
        "variant",
        "TPOT",
        "of resident",
        "range",
        "of roofline",
        "recall",
        "in time",
        "main",
        "shadow",
        "workers",
    )
    for column in columns:
        table.add_column(
            column, justify="left" if column == "variant" else "right", no_wrap=column in ("variant", "range")
        )
    lines = {}
    for name, answers in found.answers.items():
        speeds = relative(found, name)
        recalls = [a.routing.recall for a in answers if a.routing.recall is not None]
        processor = {who: statistics.median(a.processor_s[who] for a in answers) for who in answers[0].processor_s}
        hit_rate = statistics.mean(a.routing.hit_rate for a in answers)
        fractions = roofline_fractions(running, found, name)
        table.add_row(
            name,
            median_ms([a.tpot_s for a in answers]),
            f"{statistics.median(speeds):.2f}",
            f"{min(speeds):.2f} to {max(speeds):.2f}",
            f"{statistics.median(fractions):.2f}",
            f"{statistics.mean(recalls):.3f}" if recalls else "",
            f"{hit_rate:.3f}",
            *(median_ms([seconds]) for seconds in processor.values()),
        )
        lines[name] = {
            "of_resident": speeds,
            "tpot_s": [a.tpot_s for a in answers],
            "roofline_fraction": fractions,
            "loaded_bytes_per_token": statistics.mean(a.loaded_bytes for a in answers),
            "hit_rate": hit_rate,
            "recall": statistics.mean(recalls) if recalls else None,
            "processor_s": processor,
        }
    console.print(table)
    return {"variants": lines, **found.about_rounds()}


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
