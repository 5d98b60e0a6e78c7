"""``python -m benchmarks.importance``: quality of decisions, speed, batches, on the embedded model.

Writes a table, JSON, and with ``--figures`` the plots. ``--quick`` measures the named figures only.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Figure, figure, report
from benchmarks.scheduling import decisions, speed
from benchmarks.scheduling.replay import Times, without_overheads
from benchmarks.scheduling.setup import Bench
from benchmarks.scheduling.speed import FULL, LRU, RESIDENT, Measured
from raymoe.config import SchedulingConfig

DEFAULT = SchedulingConfig(policy="importance")
EXPERTS_SHARE = 1 / 6  # of a layer's computing, spent in its experts: profiled on the embedded model


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figures", type=Path, help="write plots into this directory")
    parser.add_argument("--quick", action="store_true", help="the named figures only")
    parser.add_argument("--tokens", type=int, default=384, help="tokens per domain for the quality of decisions")
    parser.add_argument("--texts", type=int, default=10, help="texts of 128 tokens that are timed")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 3, 8), help="rows decoded in lockstep")
    parser.add_argument("--part", choices=("decisions", "speed", "all"), default="all")
    options = parser.parse_args()
    console = Console(width=max(120, Console().width))

    def progress(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    bench = Bench()
    exact = decisions.record(bench, options.tokens)
    figures: list[Figure] = []
    settings: dict[str, object] = {"tokens_per_domain": options.tokens, "timed_texts": options.texts}
    if options.part != "speed" and not options.quick:
        rows = decisions.replayed(bench, exact)
        rows += decisions.substituted(bench, exact, options.tokens, progress)
        print_decisions(console, rows, bench.top_k)
        settings["decisions"] = [row.as_dict() for row in rows]
        if options.figures:
            from benchmarks.scheduling import plots

            plots.hit_rates(rows, bench.top_k, options.figures / "importance-hits.png")
            plots.quality(rows, options.figures / "importance-quality.png")
    if options.part != "decisions":
        for batch in (1,) if options.quick else options.batches:
            part = "few" if options.quick else "all" if batch == 1 else "ladder"
            texts = options.texts if batch == 1 else max(3, options.texts // 2)
            measured = speed.measure(bench, part, batch, 129 if batch == 1 else 97, texts, progress)
            print_speed(console, measured, batch)
            settings[f"speed_batch_{batch}"] = as_dict(measured)
            if batch == 1:
                figures += named(bench, exact, measured)
            else:
                reduced = measured.reduction(FULL)
                figures.append(figure(f"tpot_reduction_vs_lru_batch_{batch}", reduced, "share", "emulated link"))
                figures += rooflines(measured, f"_batch_{batch}")
            if options.figures:
                from benchmarks.scheduling import plots

                plots.ladder(measured, options.figures / f"importance-speed-batch-{batch}.png")
    report("importance scheduling (emulated link and host)", figures, settings, options.json)


def named(bench: Bench, exact: decisions.Exact, measured: Measured) -> list[Figure]:
    """The figures that the project asks for, with the bounds beside them."""
    full, lru, resident = (measured.by_name[name] for name in (FULL, LRU, RESIDENT))
    reduction = measured.reduction(FULL)
    computing = measured.reduction(RESIDENT)
    layer_s = statistics.median(resident.tpot_s) / bench.layers
    times = Times(
        until_router_s=(1 - EXPERTS_SHARE) * layer_s,
        experts_s=EXPERTS_SHARE * layer_s,
        load_s=measured.link.load_s,
        host_s=measured.link.host_s,
    )
    slots = speed.SLOTS * bench.top_k
    common: dict[str, Any] = {"slots": slots, "times": times, "window": DEFAULT.score_window}
    plain = [
        without_overheads(trace, **common, eviction="lru", alpha=0.0, prefetch=False, assist=False)
        for trace in exact.traces
    ]
    ours = [
        without_overheads(trace, **common, eviction="score", alpha=DEFAULT.alpha, prefetch=True, assist=True)
        for trace in exact.traces
    ]
    free = [1 - mine.layer_s / theirs.layer_s for mine, theirs in zip(ours, plain, strict=True)]
    bound = statistics.median(free)
    waiting = [1 - mine / theirs for mine, theirs in zip(resident.tpot_s, lru.tpot_s, strict=True)]
    perplexity = full.perplexity / resident.perplexity - 1
    return [
        figure("tpot_reduction_vs_lru", reduction, "share", "asked 0.5, aim 0.6; emulated"),
        figure("tpot_reduction_bound_computing", computing, "share", "if nothing ever waited"),
        figure("tpot_reduction_bound_decisions", free, "share", "replay: the same decisions, free of overheads"),
        figure("tpot_reduction_of_bound", [value / bound for value in reduction], "x", "asked 0.85"),
        figure("lru_waiting", waiting, "share", "of LRU's time; set to about 0.7"),
        figure("hit_rate", [full.routing.hit_rate], "share", "asked 0.75, aim 0.8"),
        figure("hit_rate_bound_decisions", [mine.hit_rate for mine in ours], "share", "replay, free of overheads"),
        figure("hit_rate_lru", [lru.routing.hit_rate], "share"),
        figure("perplexity_increase", [perplexity], "share", "asked 0.005 at most"),
        figure("substituted", [full.routing.substituted / (full.routing.hits + full.routing.misses)], "share"),
        *rooflines(measured),
    ]


def rooflines(measured: Measured, place: str = "") -> list[Figure]:
    """Shares of their rooflines that ours and LRU reached."""
    note = "floor: resident path, or loads over the link"
    return [
        figure(f"roofline_fraction{place}", measured.roofline_fraction(FULL), "", note),
        figure(f"roofline_fraction{place}_lru", measured.roofline_fraction(LRU), "", note),
    ]


def as_dict(measured: Measured) -> dict[str, object]:
    """For JSON."""
    return {
        "load_s": measured.link.load_s,
        "host_s": measured.link.host_s,
        "emulated": True,
        "lru_loads_per_layer": measured.loads_per_layer,
        "variants": {
            name: {
                "tpot_s": timed.tpot_s,
                "reduction": measured.reduction(name),
                "roofline_fraction": measured.roofline_fraction(name),
                "moved_bytes_per_step": timed.moved_bytes,
                "hit_rate": timed.routing.hit_rate,
                "perplexity": timed.perplexity,
                "routing": {field: getattr(timed.routing, field) for field in timed.routing.__slots__},
            }
            for name, timed in measured.by_name.items()
        },
    }


def print_decisions(console: Console, rows: list[decisions.Decided], top_k: int) -> None:
    """Quality of decisions, a line per setting."""
    table = Table(title="decisions on held-out text (no link, no clock)")
    for column in ("slots", "rule", "alpha", "hit rate", "loads/layer", "substituted", "mass", "perplexity", "agree"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in sorted(rows, key=lambda row: row.slots):
        replay = row.perplexity == 0.0
        table.add_row(
            f"{row.slots} ({row.slots // top_k}k)",
            row.rule,
            f"{row.alpha:g}",
            f"{row.hit_rate:.3f}",
            f"{row.loads_per_layer:.2f}",
            f"{row.substituted:.1%}",
            f"{row.replaced_mass:.2%}",
            "exact" if replay else f"{100 * (row.perplexity - 1):+.2f}%",
            "1" if replay else f"{row.agreement:.3f}",
        )
    console.print(table)


def print_speed(console: Console, measured: Measured, batch: int) -> None:
    """Time per token, a line per variant."""
    exact = measured.by_name[RESIDENT].perplexity
    table = Table(
        title=f"batch {batch}: emulated link, a load takes {1e3 * measured.link.load_s:.2f} ms, "
        f"an expert on the host {1e3 * measured.link.host_s:.2f} ms"
    )
    columns = (
        "variant",
        "TPOT ms",
        "less than LRU",
        "spread",
        "roofline",
        "hit rate",
        "loads",
        "hosted",
        "subst.",
        "ppl",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, timed in measured.by_name.items():
        reduction = measured.reduction(name)
        routing = timed.routing
        pairs = routing.hits + routing.misses
        table.add_row(
            name,
            f"{1e3 * statistics.median(timed.tpot_s):.1f}",
            f"{100 * statistics.median(reduction):.0f}%",
            f"{100 * min(reduction):.0f} … {100 * max(reduction):.0f}",
            f"{statistics.median(measured.roofline_fraction(name)):.2f}",
            f"{routing.hit_rate:.3f}",
            f"{routing.loads / pairs:.3f}",
            f"{routing.hosted / pairs:.3f}",
            f"{routing.substituted / pairs:.1%}",
            f"{100 * (timed.perplexity / exact - 1):+.2f}%",
        )
    console.print(table)
    console.print(
        "[dim]loads, hosted, subst.: per (token, expert) pair; roofline: the fraction of it that was reached[/dim]"
    )


if __name__ == "__main__":
    main()
