"""The command that writes routing traces: ``raymoe record``. torch, Ray and transformers come in only when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymoe.errors import ConfigError
from raymoe.observe import terminal

if TYPE_CHECKING:
    from raymoe.config import ClusterConfig
    from raymoe.simulation.trace import RoutingTrace

PROMPT = "It is a truth universally acknowledged, that"
PROMPT_IDS = list(range(1, 17))  # for models without a tokenizer
SETTLING = 4  # tokens more than asked for: of the last steps the shadow may not have said all


def record(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A cluster configuration in YAML.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The trace to write, as NPZ.")],
    tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Decode steps to record.")] = 256,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=10.0, help="0 is greedy, which repeats itself.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Makes sampling repeatable.")] = 0,
) -> None:
    """Write what a model's routers choose in each decode step, for `raymoe simulate`.

    Starts CONFIG and decodes. The trace holds each layer's experts and gate scores, the tokens, and with a shadow what
    it had foretold. It holds no weights and no text.
    """
    check_output(output)
    from raymoe.config import ClusterConfig
    from raymoe.simulation.trace import save

    cluster = ClusterConfig.load(config)
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        trace = recorded(cluster, prompt, tokens, temperature, seed, progress)
        progress.stage("writing the trace")
        save(trace, output)
    parts = [f"{trace.steps} steps", f"{trace.shape.layers} layers", f"{trace.shape.experts} experts"]
    if trace.recall is not None and trace.agreement is not None:
        parts.append(f"the shadow named {trace.recall:.1%} and guessed {trace.agreement:.1%} of the tokens")
    typer.echo(f"wrote {output}: {', '.join(parts)}, {terminal.format_bytes(output.stat().st_size)}")


def check_output(output: Path) -> None:
    """Raise ConfigError, before anything starts, where the file can't be written."""
    from raymoe.simulation.trace import SUFFIX

    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no directory {output.absolute().parent}")
    if output.suffix != SUFFIX:
        raise ConfigError(f'--output is "{output}"; a trace is called NAME{SUFFIX}')


def recorded(
    cluster: "ClusterConfig",
    prompt: str | None,
    tokens: int,
    temperature: float,
    seed: int,
    progress: terminal.Progress,
) -> "RoutingTrace":
    """Start a cluster and record some steps."""
    import raymoe

    with raymoe.launch(cluster, on_stage=progress.stage) as moe:
        service = moe.service
        asked: Any = prompt or (PROMPT if service.tokenizer is not None else PROMPT_IDS)
        with service.recorded() as recorder:
            recorder.on_step = lambda done: progress.count("recording", min(done, tokens), tokens)
            moe.generate(asked, max_tokens=tokens + 1 + SETTLING, temperature=temperature, seed=seed, ignore_eos=True)
        about = {
            "model": cluster.model.served_name,
            "policy": cluster.scheduling.policy,
            "temperature": f"{temperature:g}",
            "seed": str(seed),
        }
        has_shadow = cluster.predictor_kind == "shadow"
        return recorder.trace(service.checkpoint, about, has_shadow=has_shadow).first(tokens)
