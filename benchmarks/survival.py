"""What it costs to survive failures while nothing fails: heartbeats, patience, tables of owners, checks of outputs.

    python -m benchmarks.survival --before PATH --json out/survival.json

Two remote workers, every expert on both, real processes on this machine. cost_profile is the time that the engine
spends in code for failures over the time of its decode steps; timing a call is part of it: an upper bound. cost_paired
is how much slower decoding is than with an earlier checkout (``git worktree add PATH COMMIT``): both have a cluster,
answer the same prompts of held-out text greedily, must answer alike, and take turns; whoever does not answer is stopped
meanwhile.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, figure, report
from benchmarks.observe import Timed, interval
from benchmarks.surviving.sides import Side

HERE = Path(__file__).resolve().parents[1]
TEXTS = HERE / "benchmarks" / "data" / "eval"
TOKENS, WARM_TOKENS = 100, 8  # of an answer; and of the one before it, after a pause
PROMPT_CHARACTERS = 120
ROUNDS, QUICK_ROUNDS = 40, 10
PROFILES = 6
CONFIG: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "devices": [{"name": "edge-0"}, {"name": "edge-1"}],
    "replication": 2,
}
SURVIVAL = {
    "patience": ("raymoe.engine.exchange:Exchange._learn", "raymoe.engine.exchange:Exchange._late_s"),
    "looks at workers": ("raymoe.engine.exchange:Exchange._look", "raymoe.engine.suspects:Suspects.look"),
    "calls that may be sent again": (
        "raymoe.engine.exchange:Asked.__init__",
        "raymoe.engine.exchange:Answered.__init__",
        "raymoe.engine.exchange:Exchange._is_missing",
        "raymoe.engine.exchange:Exchange.clear",
    ),
    "news of owners": ("raymoe.engine.dispatch:Dispatcher.catch_up",),
    "parked requests": ("raymoe.engine.parking:Parking.look", "raymoe.engine.parking:Parking.overdue"),
    "lease": ("raymoe.actors.lease:Lease._renew",),
}
"""Methods by what they are for. Those of the engine's thread, and its process's other threads."""


def prompts(count: int) -> list[str]:
    """Pieces of held-out text, of all domains in turn."""
    texts = [file.read_text() for file in sorted(TEXTS.glob("*.txt"))]
    places = [PROMPT_CHARACTERS * (number // len(texts)) for number in range(count)]
    return [texts[number % len(texts)][place:][:PROMPT_CHARACTERS] for number, place in enumerate(places)]


def clock_of(path: str) -> Callable[[], float]:
    """On the engine's thread the time that passes counts, on others the processor's: waiting costs nobody anything."""
    return time.thread_time if path.startswith("raymoe.actors") else time.perf_counter


def watch(timed: Timed) -> None:
    """Time every method of ``SURVIVAL``. Raises AttributeError for one that is not there any more: mend the table."""
    for label, paths in SURVIVAL.items():
        for path in paths:
            module, _, name = path.partition(":")
            owner, _, method = name.partition(".")
            timed.watch(getattr(importlib.import_module(module), owner), method, label, clock_of(path))


def profile(runs: int) -> Figure:
    """Time spent in code for failures, in percent of a decode step."""
    import ray

    import raymoe

    shares: list[float] = []
    parts: dict[str, float] = {}
    total_s = 0.0
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with raymoe.launch(CONFIG, app="survival-profile") as moe:
        for number, prompt in enumerate(prompts(runs + 1)):
            with Timed() as timed:
                watch(timed)
                before = moe.service.report()
                moe.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                took_s = moe.service.report().decode_s - before.decode_s
            if not number:
                continue  # the first warms up
            shares.append(100 * sum(timed.spent_s.values()) / took_s)
            total_s += took_s
            for label, seconds in timed.spent_s.items():
                parts[label] = parts.get(label, 0.0) + seconds
    ray.shutdown()
    split = ", ".join(f"{label} {100 * seconds / total_s:.2f}" for label, seconds in sorted(parts.items()))
    return figure("cost_profile", shares, "% of TPOT", f"asked <= 3; {split}")


def tpot_s(side: Side, others: list[Side], prompt: str) -> tuple[float, list[int]]:
    """One answer of a side while the others stand still."""
    with contextlib.ExitStack() as stack:
        for other in others:
            stack.enter_context(other.paused())
        side.decode(prompt, WARM_TOKENS)
        return side.decode(prompt, TOKENS)


def paired(before: Side, after: Side, rounds: int) -> list[float]:
    """TPOT of ``after`` over that of ``before``, less 1, round by round; who is first changes every round.

    Raises RuntimeError where they answer differently: then they are not to be compared.
    """
    found = []
    for turn, prompt in enumerate(prompts(rounds + 1)):
        order = (before, after) if turn % 2 else (after, before)
        answers = {one: tpot_s(one, [other for other in order if other is not one], prompt) for one in order}
        if answers[before][1] != answers[after][1]:
            raise RuntimeError(f"the checkouts answer {prompt!r} differently; compare exact ones")
        if turn:  # the first round warms up
            found.append(answers[after][0] / answers[before][0] - 1)
    return found


def difference(checkout: Path, python: str, rounds: int, logs: Path) -> tuple[Figure, list[float]]:
    """How much slower decoding is than with an earlier checkout, in percent; and round by round."""
    with contextlib.ExitStack() as stack:
        before = Side(checkout, CONFIG, logs / "before.log", python)
        stack.callback(before.close)
        after = Side(HERE, CONFIG, logs / "after.log")
        stack.callback(after.close)
        differences = [100 * value for value in paired(before, after, rounds)]
    found = Figure(
        name="cost_paired",
        value=statistics.median(differences),
        unit="% of TPOT",
        n=len(differences),
        spread=interval(differences),
        note=f"asked <= 3; median and its 95% interval; mean {statistics.fmean(differences):.2f}",
    )
    return found, differences


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, help="an earlier checkout to compare with; omitted: the profile only")
    parser.add_argument("--python", default=sys.executable, help="its interpreter; omitted: this one")
    parser.add_argument("--part", choices=("all", "profile", "paired"), default="all")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    options = parser.parse_args()
    if options.part == "paired" and options.before is None:
        parser.error("--part paired needs --before PATH")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    found, settings = [], {"config": CONFIG, "tokens": TOKENS}
    if options.part != "paired":
        found.append(profile(2 if options.quick else PROFILES))
    if options.part != "profile" and options.before is not None:
        rounds = QUICK_ROUNDS if options.quick else ROUNDS
        logs = Path(tempfile.mkdtemp(prefix="survival-"))
        slower, settings["differences"] = difference(options.before, options.python, rounds, logs)
        found.append(slower)
    report("What it costs to survive, where nothing fails", found, settings, options.json)


if __name__ == "__main__":
    main()
