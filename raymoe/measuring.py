"""The commands that measure a model: ``raymoe calibrate`` and ``raymoe tune``.

Like the others they import torch, Ray and transformers only when they run.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymoe.errors import ConfigError
from raymoe.observe import terminal
from raymoe.whole_file import write_whole

if TYPE_CHECKING:
    from raymoe.config import SchedulingConfig
    from raymoe.engine.tune import Tuned

MeasuredText = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text like that to be served, in UTF-8 (recommended); omitted: what the model itself says at temperature "
        "1, from fixed seeds.",
    ),
]


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The profile to write.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory or hub id; omitted: the embedded model.")
    ] = None,
    text: MeasuredText = None,
    tokens: Annotated[int, typer.Option(help="How much of the text to use.")] = 2048,
) -> None:
    """Measure which experts of a model are alike, for `scheduling: {similarity: output, profile: FILE}`.

    Runs text through the model on this CPU and writes a similarity profile, which holds for these weights only. A
    calibration that was interrupted continues where it was: start it again with the same arguments.
    """
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        from raymoe.checkpoint.opening import open_checkpoint
        from raymoe.config import EMBEDDED_MODEL
        from raymoe.engine.calibrate import calibrate as make_profile
        from raymoe.engine.corpus import check_tokens, read_text, text_sequences
        from raymoe.engine.service import load_tokenizer

        check_tokens(tokens)
        written = read_text(text) if text is not None else None
        checkpoint = open_checkpoint(model or EMBEDDED_MODEL)
        sequences = None if written is None else text_sequences(written, load_tokenizer(checkpoint), tokens)
        profile = make_profile(
            checkpoint,
            output,
            sequences=sequences,
            tokens=tokens,
            on_stage=progress.stage,
            on_tokens=progress.count,
        )
    terminal.show_profile(profile)
    typer.echo(f"wrote {output}")


def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A cluster configuration in YAML.")],
    tpot_ms: Annotated[float, typer.Option("--tpot-ms", help="Milliseconds per output token to stay within.")],
    text: MeasuredText = None,
    tokens: Annotated[int, typer.Option(help="How much of the text to decode, once for each alpha.")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure time and quality against alpha on a cluster, and name the smallest alpha within a time budget.

    CONFIG needs policy importance or joint. Use text that the model was not trained on. The exit code is 1 where no
    alpha up to alpha_max meets the budget.
    """
    if not tpot_ms > 0:
        raise ConfigError(f"--tpot-ms is {tpot_ms:g}; it must be more than 0")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no directory {json_file.absolute().parent}")
    from raymoe.config import ClusterConfig

    cluster = ClusterConfig.load(config)
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        import raymoe
        from raymoe.engine.corpus import check_tokens, generated_sequences, read_text, text_sequences
        from raymoe.engine.tune import TUNE_SEED, alphas_to_measure
        from raymoe.engine.tune import tune as measure

        check_tokens(tokens)
        alphas_to_measure(cluster.scheduling)
        written = read_text(text) if text is not None else None
        with raymoe.launch(cluster, on_stage=progress.stage) as moe:
            service = moe.service
            sequences = (
                text_sequences(written, service.tokenizer, tokens)
                if written is not None
                else generated_sequences(
                    service.runner,
                    tokens,
                    seed=TUNE_SEED,
                    on_tokens=lambda done: progress.count("generating text", done, tokens),
                )
            )
            tuned = measure(
                service.runner,
                service.experts,
                sequences,
                cluster.scheduling,
                tpot_ms / 1e3,
                lambda done, total: progress.count("decoding", done, total),
            )
    decoded = sum(len(sequence) - 1 for sequence in sequences)
    terminal.show_tuned(tuned, decoded)
    if json_file is not None:
        facts = {"model": cluster.model.served_name, "tokens": decoded, **asdict(tuned)}
        write_whole(json_file, json.dumps(facts, indent=2) + "\n")
    typer.echo(conclusion(tuned, cluster.scheduling))
    if tuned.alpha is None:
        raise typer.Exit(1)


def conclusion(tuned: "Tuned", scheduling: "SchedulingConfig") -> str:
    """What follows from the measurements, in words and in YAML to paste."""
    lines = []
    budget = f"{tuned.budget_s * 1e3:g} ms per token"
    if not any(point.routing.substituted for point in tuned.points):
        lines.append(
            "No expert was substituted at any alpha: all were at hand, or the model's routing is not understood."
        )
    if tuned.alpha is None:
        fastest = tuned.fastest
        lines.append(
            f"No alpha up to {scheduling.alpha_max:g} meets {budget}. The fastest measured is "
            f"alpha {fastest.alpha:g}: "
            f"{fastest.tpot_s * 1e3:.2f} ms, perplexity {fastest.perplexity_ratio - 1:+.2%}. "
            "More slot_memory, a larger alpha_max or a larger budget would help."
        )
    else:
        lines.append(
            f"The smallest alpha within {budget} is {tuned.alpha:g} (predicted: "
            f"{tuned.fit.at(tuned.alpha) * 1e3:.2f} ms). In the configuration:\n\n"
            f"scheduling:\n  policy: {scheduling.policy}\n  alpha: {tuned.alpha:g}"
        )
    return "\n".join(lines)
