"""Serving several users at once: throughput and time per token at concurrency 8 against 1, and under a long prompt.

The engine runs as it does behind the API, in a thread of its own, and is asked as the API asks it. Everything samples
at temperature 1 with fixed seeds. A time per output token (TPOT) is the time between two tokens of one request, so that
its 99th percentile shows every stall.

    python -m benchmarks.serve [--quick] [--json PATH]
"""

import itertools
import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from benchmarks.harness import Figure, arguments, figure, least_disturbed, ratios, report
from benchmarks.local import local_service
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.engine.request import Chunk, SamplingParams
from raymoe.engine.service import ModelService

USERS = 8
PROMPT_TOKENS = 16
WHOLE = 1 << 20  # of a piece: a prompt is read at once
VOCABULARY = range(20, 4000)
READ_S = 1e-3  # chunks of one step go out one after the other


@contextmanager
def served(scheduling: dict[str, Any], slots: float | None = None, chunk: int | None = None) -> Iterator[ModelService]:
    """The embedded model on one local device.

    Args:
        slots: share of the experts that there are slots for; None: all are computed where they lie.
        chunk: trunk.prefill_chunk; None as it comes.
    """
    checkpoint = open_checkpoint(EMBEDDED_MODEL, "float32")
    device = {"name": "local", "transport": "local"}
    if slots is not None:
        device["slot_memory"] = str(int(slots * checkpoint.routed_bytes))
    trunk = {} if chunk is None else {"prefill_chunk": chunk}
    config = ClusterConfig.parse(
        {"model": {"dtype": "float32"}, "devices": [device], "scheduling": scheduling, "trunk": trunk}
    )
    with local_service(checkpoint, config) as service:
        yield service


class Request:
    """One request under way: when each of its tokens came."""

    def __init__(self, done: Callable[["Request"], None]) -> None:
        self.times_s: list[float] = []
        self._done = done

    def take(self, chunk: Chunk | BaseException) -> None:
        """From the engine's thread."""
        if isinstance(chunk, BaseException):
            raise chunk
        self.times_s.extend([time.perf_counter()] * len(chunk.token_ids))
        if chunk.finish_reason is not None:
            self._done(self)

    @property
    def tpots_s(self) -> list[float]:
        """Between its tokens."""
        return [after - before for before, after in itertools.pairwise(self.times_s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a run of requests gave."""

    tokens_per_s: float
    tpots_s: list[float] = field(repr=False)

    @property
    def p99_s(self) -> float:
        """99th percentile of the time between tokens."""
        return statistics.quantiles(self.tpots_s, n=100)[98]


def ask(service: ModelService, seed: int, prompt_tokens: int, tokens: int, done: Callable[[Request], None]) -> Request:
    """Submit one request."""
    draw, request = random.Random(seed), Request(done)
    prompt = draw.choices(VOCABULARY, k=prompt_tokens)
    params = SamplingParams(temperature=1.0, seed=seed, ignore_eos=True, max_tokens=tokens)
    service.submit(prompt, params, request.take)
    return request


def closed_loop(service: ModelService, users: int, requests: int, tokens: int) -> Load:
    """Users who each ask again as soon as they are answered, until so many requests are."""
    finished: queue.SimpleQueue[Request] = queue.SimpleQueue()
    start_s = time.perf_counter()
    for seed in range(users):
        ask(service, seed, PROMPT_TOKENS, tokens, finished.put)
    done: list[Request] = []
    for number in range(requests):
        done.append(finished.get(timeout=120))
        if number + users < requests:
            ask(service, number + users, PROMPT_TOKENS, tokens, finished.put)
    took_s = time.perf_counter() - start_s
    return Load(tokens_per_s=requests * tokens / took_s, tpots_s=[tpot for request in done for tpot in request.tpots_s])


def under_a_long_prompt(service: ModelService, tokens: int, prompt_tokens: int, seed: int) -> Load:
    """All but one user in the middle of an answer, when a prompt of so many tokens (0: none) arrives.

    Only the times between the others' tokens count that end between its arrival and its own first token: in a longer
    time the percentile would hide a stall. Where none arrives, those of all the rest of their answers do.

    Args:
        seed: another for every prompt, for one that was read before would start from a copy.
    """
    finished: queue.SimpleQueue[Request] = queue.SimpleQueue()
    start_s = time.perf_counter()
    others = [ask(service, seed, PROMPT_TOKENS, tokens, finished.put) for seed in range(USERS - 1)]
    middle = threading.Event()
    while not middle.wait(0.001):
        if min(len(other.times_s) for other in others) > tokens // 4:
            middle.set()
    expected, arrival_s, late = len(others), time.perf_counter(), None
    if prompt_tokens:
        late = ask(service, seed, prompt_tokens, 8, finished.put)
        expected += 1
    for _ in range(expected):
        finished.get(timeout=120)
    took_s = time.perf_counter() - start_s
    end_s = arrival_s + took_s if late is None else late.times_s[0] + READ_S
    tpots_s = [
        after - before
        for other in others
        for before, after in itertools.pairwise(other.times_s)
        if arrival_s < after <= end_s
    ]
    return Load(tokens_per_s=len(others) * tokens / took_s, tpots_s=tpots_s)


def rounds_of(variants: dict[str, Callable[[], Load]], rounds: int) -> dict[str, list[Load]]:
    """Each in turn; rounds that the machine's host disturbed are repeated."""
    for variant in variants.values():
        variant()
    found: dict[str, list[Load]] = {name: [] for name in variants}
    for _ in range(rounds):
        done = least_disturbed(lambda: {name: variant() for name, variant in variants.items()})
        for name, load in done.result.items():
            found[name].append(load)
    return found


def concurrency(service: ModelService, rounds: int, tokens: int, name: str, asked: bool) -> list[Figure]:
    """Eight users against one."""
    found = rounds_of(
        {
            "one": lambda: closed_loop(service, 1, 3, tokens),
            "eight": lambda: closed_loop(service, USERS, 3 * USERS, tokens),
        },
        rounds,
    )
    one, eight = found["one"], found["eight"]
    rates = [load.tokens_per_s for load in eight], [load.tokens_per_s for load in one]
    tails = [load.p99_s for load in eight], [load.p99_s for load in one]
    return [
        figure(f"throughput_8_vs_1{name}", ratios(*rates), "x", "tokens/s; asked 3" if asked else "tokens/s"),
        figure(f"p99_tpot_8_vs_1{name}", ratios(*tails), "x", "asked 4 at most"),
        figure(f"tokens_per_s_8{name}", rates[0], "1/s", "orientation only"),
        figure(f"p99_tpot_8{name}_ms", [1e3 * tail for tail in tails[0]], "ms", "orientation only"),
    ]


def long_prompt(chunked: ModelService, whole: ModelService, rounds: int, tokens: int) -> list[Figure]:
    """What a prompt of half the context does to the others."""
    assert chunked.context is not None
    half, seeds = chunked.context // 2, itertools.count(1000)
    found = rounds_of(
        {
            "none": lambda: under_a_long_prompt(chunked, tokens, 0, 0),
            "chunked": lambda: under_a_long_prompt(chunked, tokens, half, next(seeds)),
            "whole": lambda: under_a_long_prompt(whole, tokens, half, next(seeds)),
        },
        rounds,
    )
    none, pieces, at_once = ([load.p99_s for load in found[name]] for name in ("none", "chunked", "whole"))
    stalls = [[1e3 * max(load.tpots_s) for load in found[name]] for name in ("none", "chunked", "whole")]
    return [
        figure(
            "p99_tpot_long_prompt", ratios(pieces, none), "x", f"of {half} tokens, while it is read in pieces; asked 2"
        ),
        figure("p99_tpot_long_prompt_whole", ratios(at_once, none), "x", "the same, read at once"),
        figure("longest_tpot_ms", stalls[0], "ms", "orientation only: nothing arrives"),
        figure("longest_tpot_long_prompt_ms", stalls[1], "ms", "orientation only: in pieces"),
        figure("longest_tpot_long_prompt_whole_ms", stalls[2], "ms", "orientation only: at once"),
    ]


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "")
    rounds, tokens = (5, 64) if options.quick else (9, 96)
    console = Console()
    with ExitStack() as stack:
        resident = stack.enter_context(served({"policy": "all_resident"}))
        whole = stack.enter_context(served({"policy": "all_resident"}, chunk=WHOLE))
        console.print("[dim]concurrency, everything resident[/dim]")
        figures = concurrency(resident, rounds, tokens, "", asked=True)
        console.print("[dim]a long prompt[/dim]")
        figures += long_prompt(resident, whole, rounds, 2 * tokens)
        console.print("[dim]concurrency, policy importance with slots for half of the experts[/dim]")
        importance = stack.enter_context(served({"policy": "importance"}, slots=0.5))
        figures += concurrency(importance, rounds, tokens, "_importance", asked=True)
    settings = {"users": USERS, "tokens": tokens, "prompt_tokens": PROMPT_TOKENS, "rounds": rounds}
    report("serving several users at once", figures, settings, options.json)


if __name__ == "__main__":
    main()
