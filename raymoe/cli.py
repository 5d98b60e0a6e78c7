"""The ``raymoe`` command.

torch, Ray and transformers are imported inside the commands that need them, so that help is instant.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymoe import (
    benching,
    chatting,
    keys_command,
    measuring,
    plan_command,
    predicting,
    probing,
    recording,
    simulating,
    top_command,
    tracing,
    up_command,
)
from raymoe.chatting import stream_chat
from raymoe.errors import CheckpointError, ConfigError, RaymoeError, RequestError, StartError
from raymoe.observe import terminal
from raymoe.running import the_application

if TYPE_CHECKING:
    from raymoe.checkpoint.checkpoint import Checkpoint
    from raymoe.config import ClusterConfig, Quality
    from raymoe.types import Routing

HELP = """Serve a Mixture-of-Experts language model over a Ray cluster of small, bounded devices, exactly.

The trunk of the model runs on one device; its routed experts are spread over the memory of many, and pass through
small slots just in time. Where a command needs a model and none is named, the small embedded one is used.
"""


class Commands(typer.core.TyperGroup):
    """Turns errors of ours into one red line and an exit code: 2 for bad input, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except RaymoeError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            ctx.exit(2 if isinstance(error, ValueError) else 1)


app = typer.Typer(
    name="raymoe",
    cls=Commands,
    help=HELP,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A cluster configuration in YAML.")]
PromptText = Annotated[str, typer.Argument(metavar="PROMPT", help='Text to continue; "-" reads standard input.')]
CheckpointSource = Annotated[
    str | None, typer.Argument(metavar="PATH", help="Checkpoint directory or hub id; omitted: the embedded model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Dtype = Annotated[str, typer.Option(help="auto (as the checkpoint says), float32, bfloat16 or float16.")]


def main() -> None:
    """Entry point of the ``raymoe`` command."""
    app()


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Ray's own log.")] = False,
) -> None:
    """Options before the command."""
    ctx.obj = debug


# --- running a model ------------------------------------------------------------------------------------


@app.command()
def serve(
    ctx: typer.Context,
    config: ConfigPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the application.")] = "raymoe",
    chat: Annotated[str | None, typer.Option(metavar="PROMPT", help="Send one chat message once it runs.")] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, until Ctrl-C or SIGTERM: what has begun is finished then.

    Starts Ray and Ray Serve where they do not run yet (set RAY_ADDRESS to join a cluster), and ends with the
    application whatever it started.
    """
    cluster = load_config(config)

    def on_ready(url: str) -> None:
        progress.stop()
        if chat is not None:
            stream_chat(url, cluster.model.served_name, chat)
        typer.echo(f"{cluster.model.served_name} is served at {url}/v1 (Ctrl-C to stop)")

    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        from raymoe.serve.foreground import serve_in_foreground

        warn_of_open_door(cluster, host)
        serve_in_foreground(
            cluster, name=name, host=host, port=port, on_stage=progress.stage, on_ready=on_ready, verbose=ctx.obj
        )


@app.command()
def generate(
    prompt: PromptText = "Once upon a time",
    config: Annotated[Path | None, typer.Option(help="A cluster configuration in YAML; else one local CPU.")] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id of a checkpoint, instead of --config.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; else as the model says.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message.")] = False,
    quality: Annotated[
        str | None, typer.Option(help="exact, balanced, fast or an alpha; omitted: as the configuration says.")
    ] = None,
) -> None:
    """Generate text once and leave. The text goes to standard output as it is made."""
    cluster = choose_cluster(config, model)
    wanted = parse_quality(quality, cluster)
    text = sys.stdin.read() if prompt == "-" else prompt
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        import raymoe

        with raymoe.launch(cluster, on_stage=progress.stage) as moe:
            progress.stop()
            start = time.perf_counter()
            asked: Any = [{"role": "user", "content": text}] if chat else text
            options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "quality": wanted}
            for chunk in moe.stream(asked, **options):
                typer.echo(chunk.text, nl=False)
            typer.echo()
            assert chunk.usage is not None and chunk.routing is not None, "the last chunk has both"
            tokens, routing = chunk.usage.completion_tokens, chunk.routing
            typer.echo(
                f"{tokens} tokens in {time.perf_counter() - start:.2f} s, {routing.hit_rate:.1%} of experts were "
                f"resident, {terminal.format_bytes(routing.bytes_loaded)} loaded{substituted(routing)}",
                err=True,
            )


@app.command()
def status(
    name: Annotated[str | None, typer.Option(help="Name of the application; needed if several run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the devices of a running application."""
    import ray

    from raymoe.actors.session import cluster_status

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise StartError("no Ray cluster runs here; start an application with: raymoe serve CONFIG") from error
    stats = cluster_status(name or the_application())
    if as_json:
        typer.echo(json.dumps(stats.as_dict(), indent=2))
    else:
        terminal.show_status(stats)


app.command()(chatting.chat)
app.add_typer(keys_command.app, name="keys")
app.command()(top_command.top)

# --- machines -------------------------------------------------------------------------------------------

app.command()(up_command.up)
app.command()(up_command.down)
app.add_typer(up_command.node)

# --- measuring a model ----------------------------------------------------------------------------------

app.command()(measuring.calibrate)
app.command()(measuring.tune)
app.command()(tracing.trace)
app.command()(plan_command.plan)
app.command()(probing.probe)
app.command()(recording.record)
app.command()(simulating.simulate)
app.add_typer(predicting.app, name="predictor")
app.add_typer(benching.app, name="bench")


# --- checkpoints ----------------------------------------------------------------------------------------


@app.command()
def inspect(
    path: CheckpointSource = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's experts and their sizes, and which slot memory holds how many.

    Reads headers only, so a checkpoint of any size takes a moment.
    """
    check_dtype(dtype)
    from raymoe.checkpoint.opening import open_checkpoint
    from raymoe.config import EMBEDDED_MODEL

    checkpoint = open_checkpoint(path or EMBEDDED_MODEL, dtype)
    facts = describe_checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        terminal.show_checkpoint(facts)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    like: Annotated[
        str, typer.Option(help="Architecture: qwen3_moe, qwen2_moe, mixtral or deepseek_v3.")
    ] = "qwen3_moe",
    size: Annotated[str, typer.Option(help='Bytes of all weights, such as "8MB" or "1GB".')] = "1GB",
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Write a checkpoint with random weights, for benchmarks. It has no tokenizer: prompts are token ids."""
    check_dtype(dtype, allow_auto=False)
    from raymoe.strict import parse_size_bytes

    try:
        size_bytes = parse_size_bytes(size)
    except ValueError as error:
        raise CheckpointError(f"--size: {error}") from error
    with terminal.Progress() as progress:
        progress.stage("loading raymoe")
        from raymoe.checkpoint.synth import write_synthetic

        written = write_synthetic(
            out, like=like, size_bytes=size_bytes, seed=seed, dtype=dtype, report=progress.advance
        )
    typer.echo(
        f"{written.path}: {like}, {terminal.format_bytes(written.nbytes)} in {written.shards} file(s), "
        f"{written.layers} layers x {written.experts} experts, top-{written.top_k}, hidden size {written.hidden}"
    )


@app.command()
def version() -> None:
    """Print the versions of raymoe and of what it stands on."""
    from importlib.metadata import version as version_of

    for package in ("raymoe", "ray", "torch", "transformers", "safetensors", "pyzmq"):
        typer.echo(f"{package} {version_of(package)}")
    typer.echo(f"python {sys.version.split()[0]}")


# --- input ----------------------------------------------------------------------------------------------


def load_config(path: Path) -> "ClusterConfig":
    """Read a cluster configuration."""
    from raymoe.config import ClusterConfig

    return ClusterConfig.load(path)


def choose_cluster(path: Path | None, model: str | None) -> "ClusterConfig":
    """The named configuration, or one local CPU with the named or the embedded model."""
    from raymoe.config import ClusterConfig

    if path is not None and model is not None:
        raise ConfigError("give either --config or --model; a configuration names its model itself")
    if path is not None:
        return ClusterConfig.load(path)
    return ClusterConfig.parse({"model": {"path": model}, "devices": [{"name": "cpu-0", "transport": "local"}]})


def parse_quality(quality: str | None, cluster: "ClusterConfig") -> "Quality | None":
    """--quality as a request has it. Raises RequestError that names what is allowed, before anything is started."""
    try:
        wanted: Any = float(quality) if quality is not None else None
    except ValueError:
        wanted = quality
    try:
        cluster.scheduling.alpha_of(wanted)
    except ValueError as error:
        raise RequestError(f"--{error}", param="quality") from error
    return wanted


def check_dtype(dtype: str, *, allow_auto: bool = True) -> None:
    """Raise ConfigError for a precision that can't be served."""
    known = ["float32", "bfloat16", "float16"]
    if dtype not in (known + ["auto"] * allow_auto):
        raise ConfigError(f'--dtype is "{dtype}", allowed is {", ".join(["auto"] * allow_auto + known)}')


# --- output ---------------------------------------------------------------------------------------------


def show_error(error: BaseException) -> None:
    """One red line on standard error."""
    message = " ".join(str(error).split())
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)


def substituted(routing: "Routing") -> str:
    """What was substituted, in words; nothing where nothing was."""
    if not routing.substituted:
        return ""
    share = routing.substituted / (routing.hits + routing.misses)
    return f", {share:.1%} substituted ({routing.substituted_gate_mass:.1%} of gate mass)"


def describe_checkpoint(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What ``raymoe inspect`` tells, as JSON; sizes in bytes."""
    layers = checkpoint.layers
    per_expert = [layer.expert_bytes(checkpoint.dtype) for layer in layers]
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.model_type,
        "architecture": checkpoint.model_class.__name__,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "moe_layers": len(layers),
        "experts_per_layer": max(layer.num_experts for layer in layers),
        "experts": sum(layer.num_experts for layer in layers),
        "top_k": max(layer.top_k for layer in layers),
        "expert_bytes": max(per_expert),
        "trunk_bytes": checkpoint.trunk_bytes,
        "routed_bytes": checkpoint.routed_bytes,
        "total_bytes": checkpoint.trunk_bytes + checkpoint.routed_bytes,
        "budgets": slot_budgets(checkpoint),
    }


def slot_budgets(checkpoint: "Checkpoint") -> list[dict[str, Any]]:
    """Slot memory that is worth naming, and how many experts it holds at once."""
    from raymoe.experts.bays import share_slots

    sizes = [layer.expert_bytes(checkpoint.dtype) for layer in checkpoint.layers]
    kinds = sorted(set(sizes))
    owned = [
        sum(layer.num_experts for layer, size in zip(checkpoint.layers, sizes, strict=True) if size == kind)
        for kind in kinds
    ]
    routed = checkpoint.routed_bytes
    one_token = max(layer.top_k * size for layer, size in zip(checkpoint.layers, sizes, strict=True))
    wanted = {
        "one expert (computes in turns)": sum(kinds),
        "one token's experts of a layer": one_token + sum(kinds) - max(kinds),
        "a quarter of all experts": -(-routed // 4),
        "half of all experts": -(-routed // 2),
        "everything": routed,
    }
    return [
        {"holds": name, "bytes": budget, "experts": sum(share_slots("inspect", budget, kinds, owned))}
        for name, budget in wanted.items()
    ]


def warn_of_open_door(cluster: "ClusterConfig", host: str) -> None:
    """A loud word where others can reach the server and need no key."""
    from raymoe.serve.guard import is_loopback
    from raymoe.serve.key_source import needs_keys

    if not is_loopback(host) and not needs_keys(cluster, os.environ):
        typer.secho(
            f"WARNING: listening on {host} WITHOUT API KEYS: anyone who reaches it may ask the model anything.\n"
            "Make a key with `raymoe keys new NAME`, and name its file as serving.keys_file.",
            fg=typer.colors.RED,
            bold=True,
            err=True,
        )


if __name__ == "__main__":
    main()
