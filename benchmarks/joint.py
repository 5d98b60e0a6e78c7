"""``python -m benchmarks.joint``: one plan from both methods beside its parents, and drafts read along.

Clusters of processes on this machine, over real sockets, with emulated links and emulated devices (``Pace``); all else
is real. The policies have the same slots; the shadow's memory comes on top where there is one.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.cacheless.cluster import Cluster, Setup, cluster
from benchmarks.cacheless.measure import (
    AHEAD,
    RESIDENT,
    Answer,
    Found,
    Variant,
    by_rounds,
    in_turns,
    relative,
    roofline_fractions,
    saying,
)
from benchmarks.harness import Figure, figure, report
from benchmarks.on_demand import FLOOR, PACE, PROMPTS, print_speeds, set_link
from benchmarks.scheduling.setup import DOMAINS, EVAL
from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.corpus import text_pieces
from raymoe.engine.forced import forced
from raymoe.types import Routing

PARENTS, CHILDREN = ("on_demand_shadow", "importance"), ("joint",)
WORKERS, GROUP_SIZE, TOP_K = 4, 2, 4
SPARE = 5  # slots of a worker beyond those that experts pass through: 32 of the embedded model's 256 experts in all
DRAFT_WORKERS, DRAFT_GROUP_SIZES = 8, (4, 8)
DEPTHS = (0, 2, 4, 8)
DRAFT_SPARE = 1  # beyond the two that plain decoding has; all slots together stay below a tenth of the experts
SEARCH = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # times the bound: links at which the better parent may wait half of its time
PREFIX, JUDGED = 16, 96  # of a held-out text: prompt, and tokens whose likelihood is taken
Say = Callable[[str], None]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, tokens, texts and depths")
    parser.add_argument("--tokens", type=int, help="of each answer, 48 (24 if quick) unless it is said")
    parser.add_argument("--part", choices=("drafts", "policies", "all"), default="all")
    options = parser.parse_args()
    options.tokens = options.tokens or (24 if options.quick else 48)
    console = Console(width=max(140, Console().width))

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/dim]")

    figures: list[Figure] = []
    settings: dict[str, Any] = {"emulated_links": True, "emulated_devices": True, "tokens": options.tokens}
    if options.part != "policies":
        figures += drafts(options, console, settings, say)
    if options.part != "drafts":
        figures += policies(options, console, settings, say)
    report("one plan, and drafts (emulated links and devices)", figures, settings, options.json)


# --- drafts -----------------------------------------------------------------------------------------------


def drafts(options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say) -> list[Figure]:
    """Speed over plain decoding with everything resident, by the most drafts of a pass, each at its link's bound."""
    figures = []
    for group_size in DRAFT_GROUP_SIZES:
        for depth in DEPTHS[-1:] if options.quick else DEPTHS:
            figures += drafts_of(depth, group_size, options, console, settings, say)
    most = drafts_name(DEPTHS[-1], DRAFT_GROUP_SIZES[0])
    speeds = next(each for each in figures if each.name == f"{most}_vs_resident")
    return [replace(speeds, name="drafts_vs_resident"), *figures]


def drafts_of(
    depth: int, group_size: int, options: argparse.Namespace, console: Console, settings: dict[str, Any], say: Say
) -> list[Figure]:
    """One length of passes on one cluster."""
    setup = Setup(
        model=EMBEDDED_MODEL,
        workers=DRAFT_WORKERS,
        group_size=group_size,
        top_k=TOP_K,
        bits=8,
        spare=DRAFT_SPARE,
        drafts=depth,
    )
    name = drafts_name(depth, group_size)
    with cluster(setup) as running:
        running.set_pace(PACE)
        prompts = [running.foretold.encode(prompt) for prompt in PROMPTS[: 3 if options.quick else 5]]
        set_link(running, prompts[0], 24, settings, say, name)
        found = in_turns(running, [RESIDENT, AHEAD], [saying(p, options.tokens, seed=1) for p in prompts])
        title = f"at most {depth} drafts in a pass, groups of {group_size} (emulated devices)"
        settings[name] |= print_speeds(running, console, title, found)
        answers = found.answers[AHEAD.name]
        settings[name] |= {
            "accepted": [a.routing.accepted / max(1, a.routing.drafted) for a in answers],
            "tokens_per_pass": [a.tokens_per_pass for a in answers],
            "loads_per_token": [a.timed.loads / a.timed_tokens for a in answers],
            "slots": running.slot_bytes // running.expert_bytes,
        }
        share = f"{statistics.median(settings[name]['tokens_per_pass']):.1f} tokens per pass"
        return [
            figure(f"{name}_vs_resident", relative(found, AHEAD.name), "x", share),
            figure(f"roofline_fraction_{name}", roofline_fractions(running, found, AHEAD.name), "", FLOOR),
        ]


def drafts_name(depth: int, group_size: int) -> str:
    """Of figures and settings."""
    return f"drafts_{depth}_groups_of_{group_size}"


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
        clusters = {policy: stack.enter_context(cluster(setup_of(policy))) for policy in PARENTS + CHILDREN}
        assert len({running.slot_bytes for running in clusters.values()}) == 1, "policies have the same slots"
        for running in clusters.values():
            running.set_pace(PACE)
        resident = Arm(name=RESIDENT.name, cluster=clusters["on_demand_shadow"], variant=RESIDENT)
        parents = [Arm(name=name, cluster=clusters[name]) for name in PARENTS]
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
            lines = {arm.name: line(arm, found) for arm in arms}
            settings["policies"][place] = {"load_s": seconds, "arms": lines, **found.about_rounds()}
            title = f"one load takes {seconds * 1e3:.0f} ms ({place}; emulated devices)"
            print_arms(console, title, found.caption(), lines)
            figures += compared(place, parents, children, found, lines)
        domains = DOMAINS[:2] if options.quick else DOMAINS
        increases = perplexity_increases(clusters["joint"], domains, pieces=1 if options.quick else 4)
        figures.append(figure("perplexity_increase", increases, "share", "alpha 0.25"))
        return figures


def setup_of(policy: str) -> Setup:
    """The same workers and slots for every policy."""
    return Setup(
        model=EMBEDDED_MODEL,
        workers=WORKERS,
        group_size=GROUP_SIZE,
        top_k=TOP_K,
        bits=8,
        policy=policy,
        spare=SPARE,
    )


def line(arm: Arm, found: Found) -> dict[str, Any]:
    """What a policy took, for a table and for JSON; bytes of slots and shadow are of all devices together."""
    answers, running = found.answers[arm.name], arm.cluster
    tokens, timed = sum(a.timed_tokens for a in answers), sum((a.timed for a in answers), Routing())
    memory = {
        "slot_bytes": running.slot_bytes,
        "peak_slot_bytes": running.peak_slot_bytes(),
        "shadow_bytes": running.shadow_bytes,
    }
    if arm.variant.is_resident:
        everything = sum(size.experts * size.expert_bytes for size in running.sizes)
        memory = {"slot_bytes": everything, "peak_slot_bytes": everything, "shadow_bytes": 0}
    return {
        "tpot_s": [a.tpot_s for a in answers],
        "over_resident": ratios(found, arm.name, RESIDENT.name),
        "roofline_fraction": roofline_fractions(running, found, arm.name),
        "hit_rate": statistics.mean(a.routing.hit_rate for a in answers),
        "loads_per_token": timed.loads / tokens,
        "moved_bytes_per_token": timed.bytes_loaded / tokens,
        "replaced_per_token": timed.substituted / tokens,
        "tokens_as_resident": agreement(answers, found.answers[RESIDENT.name]),
        **memory,
    }


def agreement(answers: Sequence[Answer], base: Sequence[Answer]) -> float:
    """Share of answers that say the same as the base's."""
    return statistics.mean(mine.tokens == theirs.tokens for mine, theirs in zip(answers, base, strict=True))


def compared(
    place: str, parents: Sequence[Arm], children: Sequence[Arm], found: Found, lines: dict[str, dict[str, Any]]
) -> list[Figure]:
    """How near each policy came to its roofline, and how much less time both forms of the plan took than a parent."""
    figures = [
        figure(f"roofline_fraction_{place}_{slug(name)}", each["roofline_fraction"], "", FLOOR)
        for name, each in lines.items()
    ]
    best = min(parents, key=lambda arm: statistics.median(lines[arm.name]["tpot_s"])).name
    for child in children:
        reductions = [1 - ratio for ratio in ratios(found, child.name, best)]
        name = f"tpot_reduction_vs_best_parent_{place}_{slug(child.name)}"
        figures.append(figure(name, reductions, "share", f"better parent: {best}"))
    return figures


def slug(name: str) -> str:
    """A policy's name as a part of a figure's."""
    return "resident" if name == RESIDENT.name else name.replace(", ", "_")


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


def side_by_side(arms: Sequence[Arm], prompts: Sequence[Sequence[int]], tokens: int) -> Found:
    """Each arm answers each prompt, in turns; one answer before that warms up."""
    for arm in arms:
        arm.run(prompts[0], 12, 0)

    def one_round(number: int) -> dict[str, Answer]:
        return {arm.name: arm.run(prompts[number], tokens, number) for arm in arms}

    return by_rounds([partial(one_round, number) for number in range(len(prompts))])


def ratios(found: Found, name: str, base: str) -> list[float]:
    """Time per token over the base's, answer by answer."""
    pairs = zip(found.answers[name], found.answers[base], strict=True)
    return [mine.tpot_s / theirs.tpot_s for mine, theirs in pairs]


def perplexity_increases(running: Cluster, domains: Sequence[str], pieces: int) -> list[float]:
    """Of substitution, per domain of held-out text: over so many pieces of each."""
    service, increases = running.foretold, []
    alphas = (0.0, running.setup.alpha)
    for domain in domains:
        texts = text_pieces((EVAL / f"{domain}.txt").read_text(), service.tokenizer, pieces, PREFIX + JUDGED)
        nll: dict[float, list[float]] = {alpha: [] for alpha in alphas}
        for text in texts:
            for alpha in alphas:
                service.experts.alpha = alpha
                nll[alpha].append(float(np.mean(forced(service.runner, service.experts, [text], prefix=PREFIX).nll_BN)))
        exact, replaced = (float(np.mean(nll[alpha])) for alpha in alphas)
        increases.append(math.exp(replaced - exact) - 1)
    service.experts.alpha = 0.0
    return increases


def print_arms(console: Console, title: str, caption: str, lines: dict[str, dict[str, Any]]) -> None:
    """A line per policy."""
    table = Table(title=title, caption=f"loads, moved, replaced: per token; slots: of all devices; {caption}")
    speeds, memory = ("TPOT", "of resident", "of roofline"), ("slots", "shadow")
    for column in ("policy", *speeds, "in time", "loads", "moved", "replaced", *memory):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, each in lines.items():
        table.add_row(
            name,
            f"{statistics.median(each['tpot_s']) * 1e3:.0f} ms",
            f"{1 / statistics.median(each['over_resident']):.2f}",
            f"{statistics.median(each['roofline_fraction']):.2f}",
            f"{each['hit_rate']:.3f}",
            f"{each['loads_per_token']:.1f}",
            f"{each['moved_bytes_per_token'] / 1e6:.2f} MB",
            f"{each['replaced_per_token']:.2f}",
            f"{each['slot_bytes'] / 1e6:.1f} MB",
            f"{each['shadow_bytes'] / 1e6:.1f} MB",
        )
    console.print(table)


if __name__ == "__main__":
    main()
