"""The part about cheaper shadows: quality on the embedded model, cost on it and on a synthetic one of real widths."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import Figure, figure, in_turns, ratios
from benchmarks.predicting import tables
from benchmarks.predicting.bench import CPU, Bench, OnStep
from benchmarks.predicting.cheaper import Measured, presets, read_bytes, timed, variants
from benchmarks.predicting.variants import Variant
from predictor.quantized_experts import QuantizedExperts
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.checkpoint.synth import write_synthetic
from raymoe.presets import SHADOW_PRESETS

ROUNDS = 5
SYNTHETIC = "qwen3_moe"
SYNTHETIC_BITS = (8, 4)


def cheaper(
    bench: Bench, options: argparse.Namespace, console: Console, settings: dict[str, object], on_step: OnStep
) -> list[Figure]:
    """Measure, print, draw; returns the figures of the presets."""
    names = presets(bench.layers, bench.top_k)
    chosen = list(dict.fromkeys(names.values())) if options.quick else variants(bench.layers, bench.top_k)
    if not options.quick:
        chosen = [names["exact"], *(variant for variant in chosen if variant != names["exact"])]
    quality = bench.cheaper(chosen, options.rows, options.steps, on_step)
    runs = {variant.thinned_name: bench.timed(variant) for variant in chosen}
    times_ms = in_turns(runs, ROUNDS)
    measured = [
        Measured(
            variant=variant,
            quality=known,
            step_ms=times_ms[variant.thinned_name],
            read_bytes=bench.read_bytes(variant),
        )
        for variant, known in zip(chosen, quality, strict=True)
    ]
    tables.cheaper(console, measured, {variant: name for name, variant in names.items()})
    settings["cheaper"] = tables.cheaper_as_list(measured)
    if options.figures and not options.quick:
        from benchmarks.predicting import plots  # matplotlib is needed for nothing else

        plots.cheaper(measured, {variant: name for name, variant in names.items()}, options.figures / "cheaper.png")
    figures = figures_of(names, measured)
    if options.quick or not options.synthetic_bytes:
        return figures
    return [*figures, *synthetic(options.synthetic_bytes, console, settings)]


def figures_of(names: dict[str, Variant], measured: Sequence[Measured]) -> list[Figure]:
    """Of each preset."""
    found = {item.variant: item for item in measured}
    exact, figures = found[names["exact"]], []
    for name in SHADOW_PRESETS:
        item = found[names[name]]
        recall, note = item.quality.recall, item.variant.thinned_name
        tokens = recall.recall_BNL.shape[0] * recall.recall_BNL.shape[1]
        half = recall.interval
        figures += [
            Figure(
                name=f"recall_{name}",
                value=recall.mean,
                unit="share",
                n=tokens,
                spread=(recall.mean - half, recall.mean + half),
                note=note,
            ),
            Figure(
                name=f"acceptance_{name}",
                value=item.quality.sampled,
                unit="share",
                n=tokens,
                spread=(item.quality.sampled, item.quality.sampled),
                note=f"greedily {item.quality.greedy:.4f}",
            ),
            figure(f"step_{name}_vs_exact", ratios(item.step_ms, exact.step_ms), "x", "processor time"),
        ]
    return figures


def synthetic(size_bytes: int, console: Console, settings: dict[str, object]) -> list[Figure]:
    """What a step costs where experts are as wide as in published models; its random weights know nothing."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        written = write_synthetic(path, like=SYNTHETIC, size_bytes=size_bytes)
        checkpoint = open_checkpoint(path, "bfloat16")
        began_s, runs, read = time.monotonic(), {}, {}
        for bits in SYNTHETIC_BITS:
            experts = QuantizedExperts(checkpoint, bits, CPU)
            fewer = range(written.top_k - 1, 0, -1)
            for top_k in (None, *fewer):
                variant = Variant(bits=bits, top_k=top_k)
                runs[variant.thinned_name] = timed(checkpoint, experts, variant)
                read[variant.thinned_name] = read_bytes(checkpoint, experts, variant)
            none = Variant(bits=bits, skipped=tuple(range(written.layers)))
            runs[none.thinned_name] = timed(checkpoint, experts, none)
            read[none.thinned_name] = read_bytes(checkpoint, experts, none)
            console.print(f"[dim]synthetic: {bits} bits ready, {time.monotonic() - began_s:.0f} s[/dim]")
        times_ms = in_turns(runs, ROUNDS)
    first = next(iter(runs))
    tables.costs(console, f"synthetic, {written.layers} layers, hidden {written.hidden}", times_ms, read)
    settings["cheaper_synthetic"] = {
        "model": SYNTHETIC,
        "bytes": written.nbytes,
        "layers": written.layers,
        "hidden": written.hidden,
        "step_ms": times_ms,
        "read_bytes": read,
    }
    return [
        figure(
            f"synthetic_step_{name.replace(', ', '_').replace(' ', '_')}",
            times,
            "ms",
            f"{statistics.median(ratios(times, times_ms[first])):.2f} of {first}",
        )
        for name, times in times_ms.items()
    ]
