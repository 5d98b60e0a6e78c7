"""A server that is asked five times as much as it can do: what the admitted wait, and how soon the others hear.

A real server over HTTP, with the embedded model on one device of the engine's process. First the rate that it sustains
is looked for: by steps of a tenth of what it does for as many users as run at once, the highest one at which at most
one of a hundred is refused and 99 of 100 first tokens come in time. Then requests arrive at five times that rate for
some minutes, at random moments (a Poisson process with a fixed seed) and whether or not earlier ones were answered.
Times count from the moment at which a request should have been sent.

The client is plain sockets in this process; the share of the machine that it takes is reported, for the server has the
rest.

    python -m benchmarks.overload [--minutes 5] [--slo 2.0] [--json PATH]
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before Ray is imported: no token files in the home directory
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
from rich.console import Console

from benchmarks.harness import Figure, report
from benchmarks.memory import started_bytes

OVERLOAD = 5.0  # times the sustainable rate
USERS = 8  # trunk.max_running
PROMPT_TOKENS, MOST_TOKENS, FEWEST_TOKENS = 16, 48, 16
VOCABULARY = range(20, 2000)
STEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the throughput with as many users as run at once
LOOK_S = 20.0  # at each rate that is tried
MOST_REFUSED = 0.01  # at a rate that is sustained: arrivals bunch
SAMPLE_S = 5.0
TIMEOUT_S = 120.0  # many times what any answer takes


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one request. Seconds since its moment.

    Attributes:
        status: of HTTP; 0 where the connection broke.
        first_s: first token, or the answer where it is no stream; end_s: the end of it.
        wrong: what should not have been, in words.
    """

    status: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    wrong: str | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """What a load gave.

    Attributes:
        memory_bytes: of the server's processes, in the order of sampling.
        client_share: of the machine's processor time that this process took.
    """

    rate: float
    took_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    client_share: float = 0.0

    def admitted(self) -> list[Outcome]:
        """Those that were answered."""
        return [one for one in self.outcomes if one.status == 200 and one.wrong is None]

    def refused(self) -> list[Outcome]:
        """Those that were refused as they should be."""
        return [one for one in self.outcomes if one.status in (429, 503) and one.wrong is None]

    def wrong(self) -> Counter[str]:
        """Whatever else came."""
        return Counter(one.wrong or f"status {one.status}" for one in self.outcomes if one.wrong or one.status == 0)


@contextmanager
def server(slo_s: float) -> Iterator[int]:
    """Ray, Serve and the application; the port. The server's processes are children of this one."""
    import ray
    from ray import serve

    from raymoe.config import ClusterConfig
    from raymoe.serve.app import build_application

    config = ClusterConfig.parse(
        {
            "model": {"dtype": "float32"},
            "devices": [{"name": "local", "transport": "local"}],
            "scheduling": {"policy": "all_resident"},
            "trunk": {"max_running": USERS, "kv_memory": "64MiB"},
            "serving": {"ttft_slo_s": slo_s},
        }
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(config), name="raymoe")
        yield port
        serve.shutdown()
    finally:
        ray.shutdown()


def request_of(draw: random.Random, prefix: str = "") -> bytes:
    """The bytes of a request for a streamed answer. ``prefix`` is the application's path."""
    body = json.dumps(
        {
            "prompt": [draw.choice(VOCABULARY) for _ in range(PROMPT_TOKENS)],
            "max_tokens": draw.randint(FEWEST_TOKENS, MOST_TOKENS),
            "seed": draw.randrange(1 << 30),
            "ignore_eos": True,
            "stream": True,
        }
    )
    lines = [
        f"POST {prefix}/v1/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", body]).encode()


async def ask(port: int, request: bytes, moment_s: float) -> Outcome:
    """Send a request and note when what came."""
    outcome = Outcome()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                outcome.status = int(head.split(b" ", 2)[1])
                content = bytearray(await reader.read(1 << 16))
                outcome.first_s = time.perf_counter() - moment_s
                while piece := await reader.read(1 << 16):
                    content += piece
                outcome.end_s = time.perf_counter() - moment_s
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.wrong = f"{type(error).__name__} after status {outcome.status}"
        return outcome
    outcome.wrong = fault_of(outcome.status, head, bytes(content))
    return outcome


def fault_of(status: int, head: bytes, content: bytes) -> str | None:
    """What is wrong with an answer: only whole streams, and refusals in JSON that say when to come again, are right."""
    if status == 200:
        if b"data: [DONE]" not in content:
            return "a stream that breaks off"
        return "an error in a stream" if b'"error"' in content else None
    if status not in (429, 503):
        return f"status {status}"
    if b"application/json" not in head or b"retry-after: " not in head or b'{"error"' not in content:
        return f"a refusal that is not as it should be: {content[:80].decode(errors='replace')}"
    return None


async def open_loop(port: int, rate: float, seconds: float, seed: int, prefix: str = "") -> Run:
    """Requests at random moments."""
    draw, run, begun = random.Random(seed), Run(rate=rate), time.perf_counter()
    busy_s, tasks, moment_s = sum(psutil.Process().cpu_times()[:2]), [], begun
    sampling = asyncio.create_task(sample(run))
    while (moment_s := moment_s + draw.expovariate(rate)) < begun + seconds:
        request = request_of(draw, prefix)
        await asyncio.sleep(max(0.0, moment_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, request, moment_s)))
    run.outcomes = list(await asyncio.gather(*tasks))
    run.took_s = time.perf_counter() - begun
    busy_s = sum(psutil.Process().cpu_times()[:2]) - busy_s
    run.client_share = busy_s / (run.took_s * (os.cpu_count() or 1))
    sampling.cancel()
    return run


async def closed_loop(port: int, users: int, seconds: float, seed: int) -> float:
    """Requests per second of users who each ask again as soon as they are answered."""
    draw, begun, answered = random.Random(seed), time.perf_counter(), 0

    async def user() -> None:
        nonlocal answered
        while time.perf_counter() < begun + seconds:
            outcome = await ask(port, request_of(draw), time.perf_counter())
            assert outcome.status == 200 and outcome.wrong is None, outcome
            answered += 1

    await asyncio.gather(*(user() for _ in range(users)))
    return answered / (time.perf_counter() - begun)


async def sample(run: Run) -> None:
    """Note the memory of all processes that this one has started."""
    while True:
        run.memory_bytes.append(started_bytes())
        await asyncio.sleep(SAMPLE_S)


def is_sustained(run: Run, slo_s: float) -> bool:
    """Whether hardly anybody was refused and the promise was kept."""
    admitted = run.admitted()
    enough = len(admitted) >= (1 - MOST_REFUSED) * len(run.outcomes)
    return enough and percentile([one.first_s for one in admitted], 99) <= slo_s


def percentile(values: list[float], percent: int) -> float:
    """Of the values; nan of none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def find_rate(port: int, slo_s: float, console: Console) -> float:
    """The highest rate, by steps, that the server sustains."""
    await closed_loop(port, USERS, LOOK_S / 4, seed=1)
    most = await closed_loop(port, USERS, LOOK_S, seed=2)
    for number, step in enumerate(STEPS):
        run = await open_loop(port, step * most, LOOK_S, seed=10 + number)
        waits = [one.first_s for one in run.admitted()]
        console.print(
            f"[dim]{run.rate:.1f}/s: {len(run.refused())} of {len(run.outcomes)} refused, "
            f"p99 of first tokens {percentile(waits, 99):.2f} s[/dim]"
        )
        if is_sustained(run, slo_s):
            return run.rate
    raise SystemExit("no rate is sustained")


def figures_of(run: Run, sustained: float, slo_s: float) -> list[Figure]:
    """The named figures of the overload."""
    firsts = [one.first_s for one in run.admitted()]
    refusals = [1e3 * one.end_s for one in run.refused()]
    third = len(run.memory_bytes) // 3
    growth = statistics.median(run.memory_bytes[-third:]) / statistics.median(run.memory_bytes[third : 2 * third])
    within = sum(first_s <= slo_s for first_s in firsts) / len(firsts)

    def single(name: str, value: float, unit: str, number: int, spread: tuple[float, float], note: str = "") -> Figure:
        return Figure(name=name, value=value, unit=unit, n=number, spread=spread, note=note)

    def percentile_of(name: str, values: list[float], percent: int, unit: str, note: str = "") -> Figure:
        ends = (min(values), max(values))
        return single(f"{name}_p{percent}", percentile(values, percent), unit, len(values), ends, note)

    def number(name: str, value: float, unit: str, note: str = "") -> Figure:
        return single(name, value, unit, 1, (value, value), note)

    return [
        number("sustainable_rate", sustained, "1/s", "at most 1% refused, first tokens in time"),
        number("offered_rate", len(run.outcomes) / run.took_s, "1/s"),
        number("admitted_rate", len(firsts) / run.took_s, "1/s"),
        percentile_of("ttft_admitted_s", firsts, 50, "s"),
        percentile_of("ttft_admitted_s", firsts, 99, "s", f"asked: {slo_s:g} at most"),
        number("ttft_within_slo", within, "", "share of the admitted"),
        percentile_of("refusal_ms", refusals, 50, "ms"),
        percentile_of("refusal_ms", refusals, 99, "ms", "asked: 100 at most"),
        number("refusal_ms_max", max(refusals), "ms"),
        number("refusals_within_100_ms", sum(took <= 100 for took in refusals) / len(refusals), "", "share"),
        number("wrong", sum(run.wrong().values()), "", "anything but a whole answer or a proper refusal"),
        number("memory_growth", growth, "x", "last third over the middle one"),
        number("client_share", run.client_share, "", "of the machine's processors, beside the server"),
    ]


async def measure(port: int, slo_s: float, minutes: float, console: Console) -> tuple[float, Run]:
    """The sustainable rate, and the overload."""
    sustained = await find_rate(port, slo_s, console)
    run = await open_loop(port, OVERLOAD * sustained, 60 * minutes, seed=5)
    return sustained, run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="of overload")
    parser.add_argument("--slo", type=float, default=2.0, help="time to first token that is promised, in seconds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    console = Console()
    with server(options.slo) as port:
        sustained, run = asyncio.run(measure(port, options.slo, options.minutes, console))
    for fault, count in run.wrong().most_common():
        console.print(f"wrong, {count} x: {fault}")
    settings = {"minutes": options.minutes, "slo_s": options.slo, "overload": OVERLOAD, "users": USERS}
    report("five times too much", figures_of(run, sustained, options.slo), settings, options.json)


if __name__ == "__main__":
    main()
