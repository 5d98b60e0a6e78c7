"""``python -m benchmarks.predictor``: how well predictors foretell routing, on the embedded model in float32.

Recall by kind, precision, alignment and output index, on held-out text and on what the model says itself. Writes
tables, JSON, and with ``--figures`` the plots. ``--quick`` measures the named figures only. Recall is not timed; part
``cheaper`` also tells what a step of a shadow costs that leaves out some of its work.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness import Figure, report
from benchmarks.predicting import tables
from benchmarks.predicting.bench import Bench, OnStep
from benchmarks.predicting.cheap_part import cheaper
from benchmarks.predicting.tables import Measured
from benchmarks.predicting.variants import Variant, aligned, alignments, others, periods, unaligned_kv
from benchmarks.scheduling.setup import DOMAINS
from raymoe.engine.evaluate import Recall

ASKED = {8: ("recall_int8", 0.99), 16: ("recall_bf16", 0.99), 4: ("recall_4bit", 0.98)}
QUICK_ROWS = 5
LEAST_STEPS = 2 * tables.INDICES  # periods get half of them

Run = Callable[[list[Variant], int, int, OnStep], list[Recall]]
"""Runs the model for rows and steps with predictors beside it."""


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    torch.set_num_threads(1)
    console = Console(width=max(120, Console().width))
    bench = Bench()
    settings: dict[str, object] = {
        "held_out_texts": options.rows,
        "alignment_texts": options.free_rows,
        "period_texts": options.sweep_rows,
        "tokens_of_each": options.steps,
        "tokens_of_each_for_periods": options.steps // 2,
    }
    figures = recalls(bench, options, console, settings) if options.part != "cheaper" else []
    if options.part != "recall":
        figures += cheaper(bench, options, console, settings, told("cheaper shadows", console))
    report("shadows, aligned at each step, on held-out text", figures, settings, options.json)


def recalls(bench: Bench, options: argparse.Namespace, console: Console, settings: dict[str, object]) -> list[Figure]:
    """What predictors of all kinds know; nothing is timed."""
    named = [Variant(bits=bits) for bits in ASKED]
    if options.quick:
        held_out = measure("held-out text", named, bench.held_out, options.rows, options.steps, console)
    else:
        kinds = [*aligned(), *others(), *unaligned_kv()]
        held_out = measure("held-out text", kinds, bench.held_out, options.rows, options.steps, console)
        tables.by_kind(console, held_out)
        free = measure("alignments", alignments(), bench.free, options.free_rows, options.steps, console)
        tables.by_alignment(console, free)
        swept = measure("periods", periods(), bench.free, options.sweep_rows, options.steps // 2, console)
        tables.by_period(console, swept)
        settings |= {"free_running": tables.as_list(free), "periods": tables.as_list(swept)}
        if options.figures:
            draw(held_out, free, swept, options.figures)
    settings["held_out"] = tables.as_list(held_out)
    return [figure_of(*ASKED[variant.bits], held_out[variant]) for variant in named]


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("recall", "cheaper", "all"), default="all", help="what to measure")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figures", type=Path, help="write plots into this directory")
    parser.add_argument("--quick", action="store_true", help="the named figures only, over fewer tokens: a minute")
    parser.add_argument(
        "--rows", type=int, default=10, help="held-out texts, decoded in lockstep; a multiple of 5 (domains)"
    )
    parser.add_argument("--free-rows", type=int, default=12, help="generated texts that alignments are compared on")
    parser.add_argument("--sweep-rows", type=int, default=8, help="generated texts that periods are compared on")
    parser.add_argument("--steps", type=int, default=512, help="tokens of each text; for periods half as many")
    parser.add_argument(
        "--synthetic-bytes",
        type=int,
        default=1_000_000_000,
        help="size of the synthetic checkpoint that steps are timed on; 0: none",
    )
    options = parser.parse_args()
    if options.quick:
        options.rows = QUICK_ROWS
    if options.rows < len(DOMAINS) or options.rows % len(DOMAINS):
        parser.error(f"--rows is {options.rows}, which is no multiple of the {len(DOMAINS)} domains of the text")
    if options.steps < LEAST_STEPS:
        parser.error(f"--steps is {options.steps}; curves need at least {LEAST_STEPS}")
    return options


def measure(title: str, variants: list[Variant], run: Run, rows: int, steps: int, console: Console) -> Measured:
    """Run the model once with all of these beside it."""
    return dict(zip(variants, run(variants, rows, steps, told(title, console)), strict=True))


def told(title: str, console: Console) -> OnStep:
    """Says now and then how far it is."""
    began = time.monotonic()

    def on_step(done: int, of: int) -> None:
        if done % 64 == 0 or done == of:
            console.print(f"[dim]{title}: {done} of {of} steps, {time.monotonic() - began:.0f} s[/dim]")

    return on_step


def figure_of(name: str, asked: float, recall: Recall) -> Figure:
    """A mean over tokens, with its 95% interval as spread."""
    return Figure(
        name=name,
        value=recall.mean,
        unit="share",
        n=recall.recall_BNL.shape[0] * recall.recall_BNL.shape[1],
        spread=(recall.mean - recall.interval, recall.mean + recall.interval),
        note=f"asked {asked:g}; 95% interval, n tokens",
    )


def draw(held_out: Measured, free: Measured, swept: Measured, directory: Path) -> None:
    """The plots."""
    from benchmarks.predicting import plots  # matplotlib is needed for nothing else

    plots.by_kind(held_out, directory / "recall-by-kind.png")
    plots.by_index(free, directory / "recall-by-index.png")
    plots.by_alignment(swept, directory / "recall-by-alignment.png")


if __name__ == "__main__":
    main()
