"""The command that shows what happens when: ``raymoe trace``. torch, Ray and matplotlib come in only when it runs."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raymoe.errors import ConfigError, StartError
from raymoe.observe import terminal
from raymoe.observe.trace import MAIN, Recording, Span, aligned, busy_s
from raymoe.whole_file import write_whole

if TYPE_CHECKING:
    from raymoe.config import ClusterConfig

PROMPT = "It is a truth universally acknowledged, that"
PROMPT_IDS = list(range(1, 17))  # for models without a tokenizer
WARM_TOKENS = 6  # decoded before anything is recorded: kernels and pages are cold


def trace(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A cluster configuration in YAML.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trace to write, as JSON.")],
    tokens: Annotated[int, typer.Option(min=1, max=10_000, help="Decode steps to record.")] = 8,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the timing diagram.")] = None,
    png_steps: Annotated[int, typer.Option(min=1, max=8, help="Decode steps in the diagram.")] = 2,
) -> None:
    """Record what every process of a cluster does when, over a prompt and some decode steps.

    Starts CONFIG, warms up, decodes greedily. The file is in Chrome's trace event format: open it in
    https://ui.perfetto.dev or chrome://tracing.
    """
    check_outputs(output, png)
    from raymoe.config import ClusterConfig

    cluster = ClusterConfig.load(config)
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        recordings, silent = record(cluster, prompt, tokens, progress)
        progress.stage("writing the trace")
        from raymoe.observe.chrome import chrome_trace

        about = {"config": config.name, "model": cluster.model.served_name, "policy": cluster.scheduling.policy}
        written = chrome_trace(recordings, about)
        write_whole(output, json.dumps(written) + "\n")
    typer.echo(f"wrote {output}: {len(written['traceEvents']):,} events of {len(recordings)} processes")
    if png is not None:
        from raymoe.observe.diagram import draw

        title = f"{config.stem} ({cluster.model.served_name}, {cluster.scheduling.policy})"
        typer.echo(f"wrote {png}: {draw(recordings, png, title=title, steps=png_steps)}")
    show_summary(recordings, tokens)
    if silent:
        raise StartError(f"no recording came from {', '.join(silent)}; it did not run, or did not answer in time")


def check_outputs(output: Path, png: Path | None) -> None:
    """Raise ConfigError, before anything starts, where a file can't be written."""
    for option, file in (("--output", output), ("--png", png)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option}: there is no directory {file.absolute().parent}")
    if png is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('--png needs matplotlib, which is not installed: pip install "raymoe[bench]", or omit --png')


def record(
    cluster: "ClusterConfig", prompt: str | None, tokens: int, progress: terminal.Progress
) -> tuple[tuple[Recording, ...], tuple[str, ...]]:
    """Start a cluster, warm it up, and record; also tells whose recordings are missing."""
    import raymoe

    with raymoe.launch(cluster, on_stage=progress.stage) as moe:
        asked: Any = prompt or (PROMPT if moe.service.tokenizer is not None else PROMPT_IDS)
        options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        progress.stage("warming up")
        moe.generate(asked, max_tokens=WARM_TOKENS, **options)
        progress.stage("recording")
        with moe.trace() as trace:
            moe.generate(asked, max_tokens=tokens + 1, **options)  # the first one comes from the prompt
    return trace.recordings, trace.silent


def show_summary(recordings: Sequence[Recording], tokens: int) -> None:
    """A table: who was busy for how much of the decode steps, what was loaded, who waited."""
    recordings = aligned(recordings)
    start_s, end_s = decode_window(recordings)
    emulated = any(recording.emulated_link for recording in recordings)
    table = terminal.plain_table(
        f"{tokens} decode steps in {(end_s - start_s) * 1e3:.1f} ms{', emulated links' * emulated}",
        ("Process", "Computes", "Link busy", "Ordered", "On demand", "Cancelled", "Waits/step"),
    )
    for recording in recordings:
        spans = [span for span in recording.spans if span.end_s > start_s and span.start_s < end_s]
        loads = [span for span in spans if span.kind == "load"]
        arrived = [span for span in loads if span.facts["outcome"] == "loaded"]
        waits_s = busy_s([span for span in spans if span.lane == "wait"], start_s, end_s)
        is_worker = recording.role.startswith("worker ")
        table.add_row(
            recording.role,
            share([span for span in spans if span.lane == "compute"], start_s, end_s),
            share(loads, start_s, end_s) if is_worker else "",
            str(sum(span.facts["order"] == "ordered" for span in arrived)) if is_worker else "",
            str(sum(span.facts["order"] == "on demand" for span in arrived)) if is_worker else "",
            str(len(loads) - len(arrived)) if is_worker else "",
            f"{waits_s / tokens * 1e3:.2f} ms",
        )
        if recording.dropped:
            typer.echo(f"{recording.role}: {recording.dropped:,} older spans found no room; record fewer tokens")
    Console().print(table)


def share(spans: Sequence[Span], start_s: float, end_s: float) -> str:
    """How much of the time between was covered."""
    return f"{busy_s(spans, start_s, end_s) / max(1e-9, end_s - start_s):.0%}"


def decode_window(recordings: Sequence[Recording]) -> tuple[float, float]:
    """When the main process began its first decode step, and ended the last."""
    main = [
        span
        for recording in recordings
        if recording.role == MAIN
        for span in recording.spans
        if span.step is not None and span.step.position > 0 and span.kind != "sample"
    ]
    return min((span.start_s for span in main), default=0.0), max((span.end_s for span in main), default=0.0)
