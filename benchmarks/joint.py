"""``python -m benchmarks.joint``: one plan from both methods beside its parents, and drafts read along.

Clusters of processes on this machine, over real sockets, with emulated links and emulated devices (``Pace``); all else
is real. The policies have the same slots; the shadow's memory comes on top where there is one.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cacheless.cluster import Cluster, Setup, cluster
from benchmarks.cacheless.measure import AHEAD, RESIDENT, Answer, Variant, in_turns, relative, saying
from benchmarks.harness import Figure, figure, report
from benchmarks.on_demand import PACE, PROMPTS, print_speeds, set_link
from benchmarks.scheduling.setup import DOMAINS, EVAL
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.corpus import text_pieces
from raymoe.engine.forced import forced

WORKERS, GROUP_SIZE, TOP_K = 4, 2, 4
SPARE = 5  # slots of a worker beyond those that experts pass through: 32 of the embedded model's 256 experts in all
DEPTHS = (0, 2, 4, 8)
DRAFT_SPARE = 1  # beyond the two that plain decoding has; all slots together stay below a tenth of the experts
SEARCH = (1.0, 1.5, 2.0, 3.0, 4.0)  # times the bound, for the link at which the better parent waits half of its time
PREFIX, JUDGED = 16, 96  # of a held-out text: prompt, and tokens whose likelihood is taken
Say = Callable[[str], None]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and depths")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--part", choices=("drafts", "policies", "all"), default="all")
    options = parser.parse_args()
    console = Console(width=max(120, Console().width))

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    figures: list[Figure] = []
    settings: dict[str, Any] = {"emulated_links": True, "emulated_devices": True}
    if options.part != "policies":
        figures += drafts(options, console, settings, say)
    if options.part != "drafts":
        figures += policies(options, console, settings, say)
    report("one plan, and drafts (emulated links and devices)", figures, settings, options.json)


# --- drafts -----------------------------------------------------------------------------------------------


def drafts(options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say) -> list[Figure]:
    """Speed over plain decoding with everything resident, by the most drafts of a pass."""
    figures = []
    depths = DEPTHS[1::2] if options.quick else DEPTHS
    for depth in depths:
        setup = Setup(
            model=EMBEDDED_MODEL, workers=8, group_size=4, top_k=TOP_K, bits=8, spare=DRAFT_SPARE, drafts=depth
        )
        with cluster(setup) as running:
            running.set_pace(PACE)
            prompts = [running.foretold.encode(prompt) for prompt in PROMPTS[: 3 if options.quick else 5]]
            name = f"drafts_{depth}"
            set_link(running, prompts[0], 24, settings, say, name)
            found = in_turns(running, [RESIDENT, AHEAD], [saying(p, options.tokens, seed=1) for p in prompts])
            settings[name] |= print_speeds(console, f"at most {depth} drafts in a pass (emulated devices)", found)
            answers = found[AHEAD.name]
            accepted = [a.routing.accepted / max(1, a.routing.drafted) for a in answers]
            passes = [options.tokens / max(1, options.tokens - a.routing.accepted) for a in answers]
            settings[name] |= {"accepted": accepted, "tokens_per_pass": passes}
            share = f"{statistics.median(passes):.1f} tokens per pass"
            figures.append(figure(f"drafts_{depth}_vs_resident", relative(found, AHEAD.name), "x", share))
    return figures


# --- policies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One policy at work."""

    name: str
    cluster: Cluster
    variant: Variant = AHEAD
    quality: float | str | None = None

    def run(self, prompt: Sequence[int], tokens: int, seed: int) -> Answer:
        """One answer."""
        return self.variant.run(self.cluster, saying(prompt, tokens, seed=seed, quality=self.quality))


def policies(options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say) -> list[Figure]:
    """All policies with the same slots, at the bound and where the better parent waits for experts half of its time."""
    with ExitStack() as stack:
        clusters = {
            policy: stack.enter_context(
                cluster(
                    Setup(
                        model=EMBEDDED_MODEL,
                        workers=WORKERS,
                        group_size=GROUP_SIZE,
                        top_k=TOP_K,
                        bits=8,
                        policy=policy,
                        spare=SPARE,
                    )
                )
            )
            for policy in ("on_demand_shadow", "importance", "joint")
        }
        for running in clusters.values():
            running.set_pace(PACE)
        resident = Arm(name=RESIDENT.name, cluster=clusters["on_demand_shadow"], variant=RESIDENT)
        parents = [Arm(name=name, cluster=clusters[name]) for name in ("on_demand_shadow", "importance")]
        children = [
            Arm(name="joint, exact", cluster=clusters["joint"], quality="exact"),
            Arm(name="joint", cluster=clusters["joint"]),
        ]
        arms = [resident, *parents, *children]
        prompts = [resident.cluster.resident.encode(prompt) for prompt in PROMPTS[: 3 if options.quick else 5]]
        _, bound_s = set_link(resident.cluster, prompts[0], 24, settings, say, "policies")
        figures = []
        load_s = half_waiting_s([resident, *parents], bound_s, prompts[0], options.tokens, say)
        for place, seconds in (("at_bound", bound_s), ("half_waiting", load_s)):
            set_loads(clusters, seconds)
            found = side_by_side(arms, prompts, options.tokens)
            settings["policies"][place] = {
                "load_s": seconds,
                "tpot_s": {n: [a.tpot_s for a in f] for n, f in found.items()},
            }
            print_arms(console, f"one load takes {seconds * 1e3:.0f} ms ({place}; emulated devices)", found)
            best = min(parents, key=lambda arm: statistics.median(a.tpot_s for a in found[arm.name])).name
            for child in children:
                reductions = [1 - ratio for ratio in ratios(found, child.name, best)]
                name = f"tpot_reduction_vs_best_parent_{place}_{child.name.replace(', ', '_')}"
                figures.append(figure(name, reductions, "share", f"better parent: {best}"))
        figures.append(figure("perplexity_increase", perplexity_increases(clusters["joint"]), "share", "alpha 0.25"))
        return figures


def set_loads(clusters: dict[str, Cluster], load_s: float) -> None:
    """Let one load take so long everywhere."""
    for running in clusters.values():
        running.set_load(load_s)


def half_waiting_s(arms: Sequence[Arm], bound_s: float, prompt: Sequence[int], tokens: int, say: Say) -> float:
    """The time of a load at which the better of the parents takes twice as long as the first arm, which never waits."""
    before = (0.0, 1.0)
    for factor in SEARCH:
        set_loads({arm.name: arm.cluster for arm in arms}, factor * bound_s)
        base_s, *parents_s = (arm.run(prompt, tokens, 0).tpot_s for arm in arms)
        slowdown = min(parents_s) / base_s
        say(f"load of {factor:g} x the bound: the better parent takes {slowdown:.2f} x resident")
        if slowdown >= 2:
            share = (2 - before[1]) / (slowdown - before[1])
            return (before[0] + share * (factor - before[0])) * bound_s
        before = (factor, slowdown)
    return SEARCH[-1] * bound_s


def side_by_side(arms: Sequence[Arm], prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, list[Answer]]:
    """Each arm answers each prompt, in turns; one answer before that warms up."""
    for arm in arms:
        arm.run(prompts[0], 12, 0)
    found: dict[str, list[Answer]] = {arm.name: [] for arm in arms}
    for number, prompt in enumerate(prompts):
        for arm in arms:
            found[arm.name].append(arm.run(prompt, tokens, number))
    return found


def ratios(found: dict[str, list[Answer]], name: str, base: str) -> list[float]:
    """Time per token over the base's, answer by answer."""
    return [mine.tpot_s / theirs.tpot_s for mine, theirs in zip(found[name], found[base], strict=True)]


def perplexity_increases(running: Cluster) -> list[float]:
    """Of substitution, per held-out text of one domain."""
    service, increases = running.foretold, []
    for domain in DOMAINS:
        piece = text_pieces((EVAL / f"{domain}.txt").read_text(), service.tokenizer, 1, PREFIX + JUDGED)[0]
        nll = {}
        for alpha in (0.0, running.setup.alpha):
            service.experts.alpha = alpha
            nll[alpha] = float(np.mean(forced(service.runner, service.experts, [piece], prefix=PREFIX).nll_BN))
        increases.append(math.exp(nll[running.setup.alpha] - nll[0.0]) - 1)
    service.experts.alpha = 0.0
    return increases


def print_arms(console: Console, title: str, found: dict[str, list[Answer]]) -> None:
    """A line per policy."""
    table = Table(title=title)
    for column in ("policy", "TPOT", "of resident", "in time", "loads per token", "replaced"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, answers in found.items():
        tokens = sum(len(a.tokens) - 1 for a in answers)
        table.add_row(
            name,
            f"{statistics.median(a.tpot_s for a in answers) * 1e3:.0f} ms",
            f"{1 / statistics.median(ratios(found, name, RESIDENT.name)):.2f}",
            f"{statistics.mean(a.routing.hit_rate for a in answers):.3f}",
            f"{sum(a.routing.loads for a in answers) / tokens:.1f}",
            f"{sum(a.routing.substituted for a in answers) / tokens:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
