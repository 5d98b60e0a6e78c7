"""The commands about predictors: ``raymoe predictor eval``. torch and transformers come in only when it runs."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymoe.errors import ConfigError
from raymoe.measuring import MeasuredText
from raymoe.observe import terminal
from raymoe.whole_file import write_whole

if TYPE_CHECKING:
    from raymoe.engine.evaluate import Recall

app = typer.Typer(help="Look at what foretells routing.", no_args_is_help=True)

ROWS = 8  # texts decoded in lockstep: each forward reads the weights once for all of them
LEAST_LENGTH = 32


@app.callback()
def group() -> None:
    """Look at what foretells routing."""


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Directory or hub id; omitted: the embedded model.")
    ] = None,
    kind: Annotated[str, typer.Option(help="shadow, gate or history.")] = "shadow",
    preset: Annotated[
        str | None, typer.Option(help="How cheap a shadow is: exact, balanced or light. Sets the next three.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Precision of a shadow's experts: 16, 8, 4, 3 or 2.", show_default="8")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts of a token that a shadow computes.", show_default="all")
    ] = None,
    skip_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers whose experts a shadow leaves out: a list such as [5,7], or how many from the last on.",
            show_default="none",
        ),
    ] = None,
    token_align_every: Annotated[int, typer.Option(help="Steps between token alignments of a shadow; 0: never.")] = 1,
    kv_align_every: Annotated[int, typer.Option(help="Steps between KV alignments of a shadow; 0: never.")] = 1,
    ahead: Annotated[int, typer.Option(min=1, max=8, help="Layers that kind gate looks ahead.")] = 1,
    text: MeasuredText = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to foretell.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 512,
    dtype: Annotated[str, typer.Option(help="Precision of the model: auto, float32, bfloat16 or float16.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Measure a predictor's recall: the share of the experts chosen by the model's routers that it had named.

    The model decodes text on this CPU, several pieces in lockstep; a shadow is aligned with it as the options say.
    """
    from raymoe.config import ModelConfig, PredictorConfig
    from raymoe.strict import parse_options

    options = {"kind": kind, "token_align_every": token_align_every, "kv_align_every": kv_align_every}
    cost = {"preset": preset, "bits": bits, "top_k": top_k, "skip_layers": layers_given(skip_layers)}
    given = {name: value for name, value in cost.items() if value is not None}
    config = parse_options(PredictorConfig, options | given)
    source = parse_options(ModelConfig, {"path": model, "dtype": dtype})
    if length < LEAST_LENGTH:
        raise ConfigError(f"--length is {length}; at least {LEAST_LENGTH} are needed, for the first tokens are easy")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no directory {json_file.absolute().parent}")
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        recall = measure(source, config, ahead, text, tokens, length, progress)
    facts = summary(recall)
    if text is not None:  # nobody guesses what others wrote
        facts["agreement"] = None
    terminal.show_recall(facts, kind)
    if json_file is not None:
        described = config.model_dump(mode="json") | {"ahead": ahead, "model": source.served_name}
        write_whole(json_file, json.dumps(without_nan(described | facts), indent=2) + "\n")


def measure(
    source: Any, config: Any, ahead: int, text: Path | None, tokens: int, length: int, progress: terminal.Progress
) -> "Recall":
    """Decode, and compare."""
    from predictor.shadow import greedy
    from raymoe.checkpoint.opening import open_checkpoint
    from raymoe.engine.calibrate import kept_bytes
    from raymoe.engine.corpus import check_tokens, generate_rows, read_text, start_token, text_pieces
    from raymoe.engine.evaluate import PREFIX, Model, Sampled, forced, joined, make_predictor
    from raymoe.engine.service import load_tokenizer

    check_tokens(tokens)
    written = None if text is None else read_text(text)
    checkpoint = open_checkpoint(source.source, source.dtype)
    progress.stage("opening the model")
    main = Model(checkpoint, kept_bytes())
    sampled = Sampled(seed=0)
    predictor = make_predictor(config, main, source, ahead=ahead, guess=greedy if text is not None else sampled)
    at_once = ROWS if main.runner.takes_rows else 1
    count = max(1, math.ceil(tokens / (length * at_once))) * at_once
    if written is not None:
        texts = text_pieces(written, load_tokenizer(checkpoint), count, length)
    else:
        start = start_token(checkpoint.config.get_text_config(decoder=True))
        texts = [
            row
            for first in range(0, count, at_once)
            for row in generate_rows(main.runner, start, at_once, PREFIX, first, lambda count: None)
        ]
    steps, done, parts = length - PREFIX, 0, []

    def on_step() -> None:
        nonlocal done
        done += at_once
        progress.count("decoding", done, count * steps)

    for first in range(0, count, at_once):
        rows = texts[first : first + at_once]
        following = sampled if written is None else forced([row[PREFIX:] for row in rows])
        parts.append(main.evaluate(predictor, [row[:PREFIX] for row in rows], following, steps, on_step))
    return joined(parts)


def layers_given(text: str | None) -> Any:
    """What an option says of layers; text that is neither number nor list is left to the configuration to refuse."""
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def summary(recall: "Recall") -> dict[str, Any]:
    """The figures, as JSON."""
    by_step = recall.by_step()
    ends = [end for end in (32, 64, 128, 256, 512) if end <= len(by_step)] or [len(by_step)]
    if ends[-1] < len(by_step):
        ends.append(len(by_step))
    return {
        "recall": recall.mean,
        "interval": recall.interval,
        "tokens": recall.recall_BNL.shape[0] * recall.recall_BNL.shape[1],
        "agreement": recall.agreement,
        "bytes_per_token": recall.bytes_per_token,
        "by_layer": [None if math.isnan(value) else value for value in recall.by_layer().tolist()],
        "by_output_index": {
            f"{start + 1}-{end}": float(by_step[start:end].mean())
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        },
    }


def without_nan(facts: Any) -> Any:
    """The same with None for what is not a number, which JSON can't say."""
    if isinstance(facts, dict):
        return {name: without_nan(value) for name, value in facts.items()}
    return None if isinstance(facts, float) and math.isnan(facts) else facts
