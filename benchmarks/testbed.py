"""Decoding over several hosts with an emulated network, against the same processes on one host's loopback.

The hosts are network namespaces of this machine (tests/testbed): real processes, sockets, encryption and kernel TCP,
but no real cable, and one machine's processors for all of them. What a network adds to a token is compared with a model
that knows nothing of tokens: the messages of one, times what one of that size takes, measured with nothing behind it.

    python -m benchmarks.testbed [--nodes 5] [--rate 1gbit] [--delay 0.2ms] [--quick] [--json PATH]
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Figure, figure, report
from raymoe.config import EMBEDDED_MODEL
from tests.testbed import hop
from tests.testbed.cluster import cluster
from tests.testbed.driver import Decoded, Driver, command, driver
from tests.testbed.network import Host, Link, Network, TestbedError, round_trip_s, testbed
from tests.testbed.wire import Cable, Call, link_bytes
from tests.toy_models import reference_tokens

PROMPT = tuple(range(200, 216))
LAYERS, TOP_K, HIDDEN = 8, 4, 256  # of the embedded model
DECODE = Call(rows=1, pairs=TOP_K, hidden=HIDDEN)
PREFILL = Call(rows=len(PROMPT), pairs=TOP_K * len(PROMPT), hidden=HIDDEN)
HOPS = 100  # in a round: round trips of which the median is taken
IDLE_S = 5.0
CUT_AFTER = 0.3  # of the tokens of an answer
UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one answer moved over each worker's cable, without what moves there anyway: (to the worker, from it)."""

    decoded: Decoded
    bytes: dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All that was measured."""

    loopback_s: list[float]
    hosts_s: list[float]
    hop_loopback_s: list[float]
    hop_hosts_s: list[float]
    byte_ratios: list[float]
    bytes_per_token: list[float]
    round_trip_s: float
    own_delay_s: float
    pause_s: float
    calls_per_token: float


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=5, help="Ray nodes: the engine's, and one per worker")
    parser.add_argument("--rate", default="1gbit", help="of each cable, as tc writes it")
    parser.add_argument("--delay", default="0.2ms", help="from host to host, one way")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    options = parser.parse_args()
    link = Link(rate=options.rate, delay_s=quantity(options.delay, UNITS_S))
    cable = Cable(bits_per_s=quantity(options.rate, UNITS_BITS), delay_s=link.delay_s)
    tokens, rounds = (48, 3) if options.quick else (96, 7)
    try:
        found = measure(options.nodes, link, tokens, rounds)
    except TestbedError as error:
        sys.exit(f"no testbed: {error}")
    title = f"{options.nodes} hosts, EMULATED network of {options.rate} and {options.delay}"
    report(title, figures(found, cable), vars(options) | {"tokens": tokens, "rounds": rounds}, options.json)


def quantity(text: str, units: dict[str, float]) -> float:
    """ "0.2ms" as seconds, "1gbit" as bits per second. Raises ValueError that names the units."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if found is None or found[2] not in units:
        raise ValueError(f"{text} is no quantity; write a number and one of {', '.join(units)}")
    return float(found[1]) * units[found[2]]


# --- measuring ----------------------------------------------------------------------------------------------


def measure(nodes: int, link: Link, tokens: int, rounds: int) -> Found:
    """Both clusters run at once and decode in turn, for a machine drifts: what counts is a round's difference."""
    names = [f"box-{index}" for index in range(nodes)]
    workers = names[1:]
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    right = tuple(reference_tokens(model, list(PROMPT), tokens))
    config = {
        "model": {"dtype": "float32"},
        "devices": [{"name": name, "node_labels": {"host": name}} for name in workers],
        "replication": min(2, len(workers)),
        "trunk": {"prefix_memory": 0},
    }
    with testbed([*names, "solo"], link) as network, ExitStack() as running:
        hosts = [network[name] for name in names]
        ray = running.enter_context(cluster(network, hosts))
        engine = running.enter_context(driver(ray.command(command(config))))
        alone = running.enter_context(driver(network["solo"].command(command(config, "--nodes", *workers))))
        for each in (alone, engine):
            checked(each.decode(PROMPT, tokens), right)
        idle = idle_rates(hosts[1:])
        loopback, answers, hops = [], [], []
        for _ in range(rounds):
            loopback.append(checked(alone.decode(PROMPT, tokens), right))
            answers.append(traffic(engine, hosts[1:], tokens, idle))
            checked(answers[-1].decoded, right)
            hops.append(hop_pair(network, loopback[-1].tpot_s / LAYERS / 2))  # half of a layer is the engine's, about
        pause_s = cut_off(engine, network[workers[-1]], right) if len(workers) > 1 else float("nan")
        return Found(
            loopback_s=[decoded.tpot_s for decoded in loopback],
            hosts_s=[answer.decoded.tpot_s for answer in answers],
            hop_loopback_s=[pair[0] for pair in hops],
            hop_hosts_s=[pair[1] for pair in hops],
            byte_ratios=[ratio for answer in answers for ratio in against_arithmetic(answer, tokens)],
            bytes_per_token=[sum(map(sum, answer.bytes.values())) / tokens for answer in answers],
            round_trip_s=round_trip_s(network.hosts),
            own_delay_s=network.own_delay_s,
            pause_s=pause_s,
            calls_per_token=sum(answers[0].decoded.calls.values()) / tokens,
        )


def checked(decoded: Decoded, right: tuple[int, ...]) -> Decoded:
    """An answer whose tokens are transformers'. Raises RuntimeError where they are not."""
    if decoded.tokens != right:
        raise RuntimeError("the tokens are not transformers'")
    return decoded


def hop_pair(network: Network, gap_s: float) -> tuple[float, float]:
    """A call's round trip with nothing behind it: on loopback, and between two hosts."""
    solo, engine, worker = network["solo"], network["box-0"], network["box-1"]
    return (
        hop.round_trip_s(solo, solo, DECODE, HOPS, gap_s),
        hop.round_trip_s(engine, worker, DECODE, HOPS, gap_s),
    )


def idle_rates(hosts: Sequence[Host]) -> dict[str, tuple[float, float]]:
    """Bytes per second that move over each cable while nobody asks: heartbeats, and what Ray tells itself."""
    before, start_s = [host.counters() for host in hosts], time.monotonic()
    time.sleep(IDLE_S)
    return moved(hosts, before, time.monotonic() - start_s)


def traffic(engine: Driver, hosts: Sequence[Host], tokens: int, idle: dict[str, tuple[float, float]]) -> Traffic:
    """An answer, and what it moved over the workers' cables."""
    before, start_s = [host.counters() for host in hosts], time.monotonic()
    decoded = engine.decode(PROMPT, tokens)
    took_s = time.monotonic() - start_s
    busy = moved(hosts, before, 1.0)
    own = {name: (busy[name][0] - idle[name][0] * took_s, busy[name][1] - idle[name][1] * took_s) for name in busy}
    return Traffic(decoded=decoded, bytes=own)


def moved(hosts: Sequence[Host], before: Sequence[tuple[int, int]], seconds: float) -> dict[str, tuple[float, float]]:
    """Bytes per second that each host received and sent since."""
    now = [host.counters() for host in hosts]
    return {
        host.name: ((after[0] - old[0]) / seconds, (after[1] - old[1]) / seconds)
        for host, old, after in zip(hosts, before, now, strict=True)
    }


def against_arithmetic(answer: Traffic, tokens: int) -> list[float]:
    """Measured over expected bytes, of each cable and direction."""
    ratios = []
    for name, ways in answer.bytes.items():
        layers = answer.decoded.calls[name] / tokens
        for way, measured in enumerate(ways):
            expected = layers * ((tokens - 1) * link_bytes(DECODE)[way] + link_bytes(PREFILL)[way])
            ratios.append(measured / expected)
    return ratios


def cut_off(engine: Driver, host: Host, right: tuple[int, ...]) -> float:
    """Pull a host's cable in mid-answer: the tokens must be the same. Returns the longest pause between two."""
    usual_s = engine.decode(PROMPT, len(right)).times_s[-1]
    engine.tell(do="decode", prompt=list(PROMPT), tokens=len(right))
    time.sleep(CUT_AFTER * usual_s)
    host.cut()
    try:
        decoded = engine.decoded()
    finally:
        host.mend()
    return checked(decoded, right).longest_pause_s


# --- figures ------------------------------------------------------------------------------------------------


def figures(found: Found, cable: Cable) -> list[Figure]:
    """What the page shows. The model of the difference is fitted to nothing."""
    added = [apart - alone for apart, alone in zip(found.hosts_s, found.loopback_s, strict=True)]
    models = [
        found.calls_per_token * (apart - alone)
        for apart, alone in zip(found.hop_hosts_s, found.hop_loopback_s, strict=True)
    ]
    added_s, model_s = statistics.median(added), statistics.median(models)
    ordered_s = found.calls_per_token * cable.call_s(DECODE)
    return [
        figure("loopback_tpot_ms", [1e3 * value for value in found.loopback_s], "ms", "all processes on one host"),
        figure("hosts_tpot_ms", [1e3 * value for value in found.hosts_s], "ms", "EMULATED network"),
        figure("added_ms", [1e3 * value for value in added], "ms", "hosts - loopback, per token, round by round"),
        figure(
            "model_ms",
            [1e3 * value for value in models],
            "ms",
            "messages x what one of that size takes longer between hosts",
        ),
        figure("added_over_model", [added_s / model_s], "", "of the medians; 1: the model explains it all"),
        figure("ordered_ms", [1e3 * ordered_s], "ms", "messages x (delay + bytes / rate), as was ordered"),
        figure("calls_per_token", [found.calls_per_token], "", "expert calls, each with an answer"),
        figure("bytes_over_arithmetic", found.byte_ratios, "", "each cable, each direction, each round"),
        figure("bytes_per_token", found.bytes_per_token, "B", "over all workers' cables, both ways; prompt included"),
        figure("round_trip_us", [1e6 * found.round_trip_s], "us", "of a small packet"),
        figure("switch_us", [1e6 * found.own_delay_s], "us", "the switch's own delay, one way; was subtracted"),
        figure("cut_off_pause_s", [found.pause_s], "s", "longest between two tokens; one host's cable pulled"),
    ]


if __name__ == "__main__":
    main()
