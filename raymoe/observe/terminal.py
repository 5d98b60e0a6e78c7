"""Progress and tables on a terminal."""

import math
import sys
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from raymoe.observe.stats import ClusterStats, PredictorStats

STATE_STYLES = {"healthy": "green", "suspect": "yellow", "rejoining": "cyan", "down": "red"}

if TYPE_CHECKING:
    from raymoe.engine.profile import Profile
    from raymoe.engine.tune import Tuned


SUBSTITUTING = ("importance", "joint")  # policies whose alpha is worth a word


class Progress:
    """Long work: a spinner or bar on a terminal, one line per stage in a log. Both go to standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Bars | None = None
        self._line = ""
        self._tenth = ("", -1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stage(self, stage: str) -> None:
        """A new stage whose length is unknown."""
        self.advance(stage, 0, 0)

    def advance(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes; the first call with another stage begins it."""
        self._show(stage, done, total, f"{format_bytes(done)} of {format_bytes(total)}" if total else "", stage)

    def count(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` tokens; a log gets a line for every tenth."""
        size = f"{done:,} of {total:,} tokens"
        if self._console.is_terminal or (stage, 10 * done // max(1, total)) != self._tenth:
            self._tenth = stage, 10 * done // max(1, total)
            self._show(stage, done, total, size, f"{stage}: {size}")

    def _show(self, stage: str, done: int, total: int, size: str, line: str) -> None:
        if self._console.is_terminal:
            if self._bars is None:
                self._bars = self._start_bars()
            self._bars.update(self._task, description=stage, completed=done, total=total or None, size=size)
        elif line != self._line:
            print(line, file=sys.stderr, flush=True)
        self._line = line

    def stop(self) -> None:
        """Take the bar off the terminal; a later stage brings it back."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _start_bars(self) -> Bars:
        text = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[size]}")
        bars = Bars(SpinnerColumn(), *text, TimeElapsedColumn(), console=self._console, transient=True)
        self._task = bars.add_task("", total=None, size="")
        bars.start()
        return bars


def format_bytes(count: int | float) -> str:
    """Bytes with a unit for people, such as "4.2 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def show_checkpoint(facts: dict[str, Any]) -> None:
    """Tables of ``describe_checkpoint``."""
    console = Console()
    console.print(facts["path"], style="bold", markup=False, soft_wrap=True)
    summary = Table(show_header=False, box=None)
    summary.add_column(style="dim")
    summary.add_column()
    rows = {
        "Architecture": f"{facts['model_type']} ({facts['architecture']}), {facts['dtype']}",
        "MoE layers": str(facts["moe_layers"]),
        "Experts": f"{facts['experts_per_layer']} per layer, top-{facts['top_k']}, {facts['experts']:,} in all",
        "One expert": format_bytes(facts["expert_bytes"]),
        "Routed experts": format_bytes(facts["routed_bytes"]),
        "Trunk": format_bytes(facts["trunk_bytes"]),
    }
    for label, value in rows.items():
        summary.add_row(label, value)
    console.print(summary)
    table = Table(title="What slot_memory holds", title_justify="left")
    for column, justify in (("Holds", "left"), ("slot_memory", "right"), ("Bytes", "right"), ("Experts", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for budget in facts["budgets"]:
        size, experts = budget["bytes"], budget["experts"]
        table.add_row(budget["holds"], format_bytes(size), f"{size:,}", f"{experts:,} of {facts['experts']:,}")
    console.print(table)


def show_profile(profile: "Profile") -> None:
    """A table of layers: how alike experts are, and which stand alone."""
    columns = ("Layer", "Experts", "Never chosen", "Best similarity", "Least", "Critical")
    table = plain_table(f"{profile.model_type}, {profile.tokens:,} tokens", columns)
    for index, layer in enumerate(profile.layers):
        table.add_row(
            str(index),
            str(len(layer.chosen_E)),
            str(int((layer.chosen_E == 0).sum())),
            f"{layer.best_E.mean():.3f}",
            f"{layer.best_E.min():.3f}",
            ", ".join(map(str, layer.critical_E.nonzero()[0].tolist())) or "none",
        )
    Console().print(table)


def show_tuned(tuned: "Tuned", tokens: int) -> None:
    """A table of measured alphas."""
    columns = ("alpha", "TPOT", "Perplexity", "Change", "Same top-1", "Hits", "Loads/token")
    table = plain_table(f"{tokens:,} tokens for each alpha", columns)
    for point in tuned.points:
        table.add_row(
            f"{point.alpha:g}",
            f"{point.tpot_s * 1e3:.2f} ms",
            f"{point.perplexity:.3f}",
            f"{point.perplexity_ratio - 1:+.2%}",
            f"{point.top1_agreement:.1%}",
            f"{point.routing.hit_rate:.1%}",
            f"{point.routing.loads / max(1, tokens):.2f}",
        )
    Console().print(table)


def show_recall(facts: dict[str, Any], kind: str) -> None:
    """How well a predictor did: over all, along the answer, and by layer."""
    console = Console()
    interval = f" ± {facts['interval']:.2%}" if not math.isnan(facts["interval"]) else ""
    console.print(f"{kind}: recall {facts['recall']:.2%}{interval} over {facts['tokens']:,} tokens", soft_wrap=True)
    if facts["agreement"] is not None:
        console.print(f"its own next token was the model's in {facts['agreement']:.1%}", soft_wrap=True)
    if facts["bytes_per_token"]:
        console.print(f"{format_bytes(facts['bytes_per_token'])} of keys and values per token", soft_wrap=True)
    for title, shares in (
        ("Tokens", facts["by_output_index"]),
        ("Layer", {str(index): share for index, share in enumerate(facts["by_layer"])}),
    ):
        table = plain_table("", (title, "Recall"))
        for name, share in shares.items():
            table.add_row(name, "none" if share is None else f"{share:.2%}")
        console.print(table)


def plain_table(title: str, columns: tuple[str, ...]) -> Table:
    """A table of figures."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show_status(stats: ClusterStats) -> None:
    """A table of devices, and a line on the answers so far."""
    engine = stats.engine
    alpha = f" (alpha {engine.alpha:.3g})" if engine is not None and stats.policy in SUBSTITUTING else ""
    title = f"{stats.app}: policy {stats.policy}{alpha}, {stats.replication} owner(s) per expert"
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    for column in ("Device", "Kind", "State"):
        table.add_column(column)
    for column in ("Resident", "Slots", "Hits", "Loaded", "PID"):
        table.add_column(column, justify="right", no_wrap=True)
    for device in stats.devices.values():
        table.add_row(
            device.name,
            f"{device.kind} emulated" if device.emulated_link else device.kind,
            Text(device.state, style=STATE_STYLES[device.state]),
            f"{device.resident:,}/{device.owned:,}",
            format_bytes(device.slot_budget_bytes) if device.slot_budget_bytes is not None else "none",
            f"{device.hit_rate:.1%}",
            format_bytes(device.bytes_loaded),
            str(device.pid),
        )
    console = Console()
    console.print(table)
    for device in stats.devices.values():
        if device.reason is not None:
            text = f"{device.name}: {device.state} for {device.since_s or 0.0:.1f} s, {device.reason}"
            console.print(text, style=STATE_STYLES[device.state], markup=False, soft_wrap=True)
    for warning in stats.warnings:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)
    engine = stats.engine
    if stats.predictor is not None:
        recall = engine.recall if engine is not None else None
        text = f"Predictor: {describe_predictor(stats.predictor, recall)}"
        console.print(text, style=None if stats.predictor.state == "healthy" else "red", markup=False, soft_wrap=True)
    if engine is not None:
        console.print(
            f"{engine.finished:,} answers, {engine.completion_tokens:,} tokens; {engine.hit_rate:.1%} of experts were "
            f"resident, {engine.substituted_share:.1%} substituted ({engine.substituted_gate_mass:.1%} of gate mass)",
            soft_wrap=True,
        )
        if engine.refused_settings is not None:
            text = f"New settings were refused: {engine.refused_settings}"
            console.print(text, style="red", markup=False, soft_wrap=True)


def describe_predictor(predictor: PredictorStats, recall: float | None) -> str:
    """What foretells routing, how it is, and how well it does."""
    parts = [predictor.kind, predictor.state]
    if predictor.reason is not None:
        parts.append(" ".join(predictor.reason.split()))
    if recall is not None:
        parts.append(f"recall {recall:.1%}")
    if predictor.steps:
        parts.append(f"{predictor.steps:,} steps ({predictor.wasted:,} wasted)")
    if predictor.nbytes:
        parts.append(f"{format_bytes(predictor.nbytes)}, PID {predictor.pid}")
    return ", ".join(parts)
