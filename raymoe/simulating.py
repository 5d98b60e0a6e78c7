"""The command that simulates clusters: ``raymoe simulate``. What it needs comes in only when it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raymoe.errors import ConfigError
from raymoe.observe import terminal

if TYPE_CHECKING:
    from raymoe.planning.cluster import DevicesFile
    from raymoe.simulation.result import SimResult
    from raymoe.simulation.trace import RoutingTrace

SYNTHETIC = "synthetic"
STEPS = 256
MOST_STEPS = 1024  # of a synthetic trace, which is repeated after that
SHOWN_DEVICES = 16  # in JSON; a thousand of them say little each


def simulate(
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help='A file of `raymoe record`, or "synthetic" with --like.')
    ],
    cluster: Annotated[Path, typer.Option(metavar="FILE", help="The devices, in YAML, as for `raymoe plan`.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Which policies; may be given several times; omitted: all that can run.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Decode steps; omitted: as many as the trace has.")] = None,
    like: Annotated[
        str | None, typer.Option(help="Sizes of a known model: for a synthetic trace, or in place of the trace's own.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Of importance and joint; omitted: as the file says.")] = None,
    spare_slots: Annotated[
        int | None,
        typer.Option(
            help="Slots of each worker beyond those that experts pass through, in place of its slot_memory: "
            "policy joint keeps experts there."
        ),
    ] = None,
    drafts: Annotated[int, typer.Option(help="Most drafted tokens that one pass verifies.")] = 0,
    acceptance: Annotated[
        float | None,
        typer.Option(
            help="Share of tokens that the shadow guesses, each draft for itself; omitted: as the trace has it."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Length of the prompt, for TTFT.")] = 16,
    popularity: Annotated[float, typer.Option(help="Synthetic: exponent of Zipf's law over experts.")] = 0.6,
    persistence: Annotated[float, typer.Option(help="Synthetic: how often an expert is chosen again.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Synthetic: the same number gives the same trace.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Simulate decoding on a cluster that need not exist: time per token, hits, and what the time goes to.

    Slots, loads, assignment, routing and eviction are decided by the code that real devices run; computing, links
    and the network take the time that the devices file says or implies.
    """
    from raymoe.planning.cluster import DevicesFile
    from raymoe.simulation.run import POLICIES, with_agreement

    devices = DevicesFile.load(cluster)
    options = {"popularity": popularity, "persistence": persistence, "seed": seed}
    routing = open_trace(trace, like, steps, options, devices)
    if acceptance is not None:
        routing = with_agreement(routing, acceptance, seed)
    wanted: list[str] = list(policy) if policy else [name for name in POLICIES if can_run(name, routing, devices)]
    results = run(
        routing,
        devices,
        wanted,
        steps=steps,
        alpha=devices.alpha if alpha is None else alpha,
        spare_slots=spare_slots,
        drafts=drafts,
        prompt_tokens=prompt_tokens,
    )
    if as_json:
        typer.echo(json.dumps([result.as_dict(SHOWN_DEVICES) for result in results], indent=2))
    else:
        show(results, routing)


def open_trace(
    source: str, like: str | None, steps: int | None, options: dict[str, Any], devices: "DevicesFile"
) -> "RoutingTrace":
    """A recorded trace or a synthetic one, with forecasts as the devices file's predictor has them where it has none.

    Raises ConfigError for a file that is no trace, or an unknown model.
    """
    from raymoe.simulation.run import with_forecasts
    from raymoe.simulation.shape import shape_named
    from raymoe.simulation.synthetic import Habits, synthetic
    from raymoe.simulation.trace import load

    recall, agreement = forecast_quality(devices)
    if source == SYNTHETIC:
        if like is None:
            raise ConfigError("a synthetic trace needs --like, the model whose sizes it has")
        habits = Habits(recall=recall, agreement=agreement, **options)
        return synthetic(shape_named(like), min(steps or STEPS, MOST_STEPS), habits)
    trace = load(Path(source))
    if like is not None:
        trace = trace.priced(shape_named(like))
    return with_forecasts(trace, recall, agreement)


def forecast_quality(devices: "DevicesFile") -> tuple[float, float]:
    """Recall and agreement of the shadow: as the file says, else as measured on the embedded model."""
    measured = {16: (0.9967, 0.992), 8: (0.9989, 0.997), 4: (0.9876, 0.971), 3: (0.9739, 0.938), 2: (0.9416, 0.861)}
    predictor = devices.predictor
    recall, agreement = measured[predictor.bits]  # docs/benchmarks.md, predictor, token + KV
    return (
        recall if predictor.recall is None else predictor.recall,
        agreement if predictor.agreement is None else predictor.agreement,
    )


def can_run(policy: str, trace: "RoutingTrace", devices: "DevicesFile") -> bool:
    """Whether there is what a policy needs."""
    from raymoe.simulation.run import SCORED

    return policy not in SCORED or trace.scores_NLE is not None


def run(
    trace: "RoutingTrace",
    devices: "DevicesFile",
    policies: list[str],
    *,
    steps: int | None,
    alpha: float,
    spare_slots: int | None,
    drafts: int,
    prompt_tokens: int,
) -> list["SimResult"]:
    """One result per policy; drafts are of those that have a shadow."""
    from raymoe.simulation.run import FORETOLD, check, simulate
    from raymoe.simulation.setting import setting_of

    setting = setting_of(devices, trace.shape)
    wanted = trace.steps if steps is None else steps
    for policy in policies:
        check(trace, setting, policy, wanted, drafts if policy in FORETOLD else 0, spare_slots)
    results = []
    with terminal.Progress() as progress:
        for policy in policies:
            progress.stage(f"simulating {policy}")
            results.append(
                simulate(
                    trace,
                    setting,
                    policy,  # type: ignore[arg-type]  # checked above
                    steps=wanted,
                    alpha=alpha,
                    spare_slots=spare_slots,
                    drafts=drafts if policy in FORETOLD else 0,
                    prompt_tokens=prompt_tokens,
                )
            )
    return results


def show(results: list["SimResult"], trace: "RoutingTrace") -> None:
    """A row per policy."""
    first = results[0]
    title = f"{first.model} on {first.workers:,} workers, {first.steps:,} simulated steps"
    columns = ("Policy", "TPOT", "Tokens/s", "TTFT", "Ready", "Planned", "Loads/token", "Of roofline", "Bottleneck")
    table = terminal.plain_table(title + ", emulated devices" * first.emulated, columns)
    for result in results:
        table.add_row(
            result.policy + " (does not fit)" * (not result.fits),
            f"{result.tpot_s * 1e3:.1f} ms",
            f"{result.tokens_per_s:.2f}",
            f"{result.ttft_s:.2f} s",
            f"{result.hit_rate:.1%}",
            "" if result.planned is None else f"{result.planned:.1%}",
            f"{result.loads_per_token:.1f}",
            f"{result.of_roofline:.0%}",
            result.bottleneck,
        )
    Console().print(table)
    parts = ", ".join(f"{name} {value}" for name, value in trace.about.items())
    typer.echo(f"routing: {parts}; simulated, not measured")
