"""An engine on a host of the testbed that decodes when told to; and the side that tells it.

``python -m tests.testbed.driver CONFIG`` launches the model on the cluster of RAY_ADDRESS; with ``--nodes NAME...``, on
a cluster of as many raylets on its own host. It then answers each line of JSON on its input with one on its output.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

START_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One answer: its tokens, and by the engine's clock when each came, from the request on.

    Attributes:
        calls: expert calls that each device served meanwhile.
    """

    tokens: tuple[int, ...]
    times_s: tuple[float, ...]
    calls: dict[str, int]

    @property
    def tpot_s(self) -> float:
        """Time per output token, the first one excluded."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)

    @property
    def longest_pause_s(self) -> float:
        """Between two tokens."""
        return max(after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False))


class Driver:
    """An engine that runs in another process, on another host."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def tell(self, **order: Any) -> None:
        """Send an order; ``answer`` has what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError where the driver has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the driver has ended with status {self._process.wait(10)}")

    def decode(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """A greedy answer of exactly so many tokens."""
        self.tell(do="decode", prompt=list(prompt), tokens=tokens)
        return self.decoded()

    def decoded(self) -> Decoded:
        """The answer to an order to decode."""
        found = self.answer()
        return Decoded(tokens=tuple(found["tokens"]), times_s=tuple(found["times_s"]), calls=found["calls"])

    def states(self) -> dict[str, dict[str, Any]]:
        """Of every device, what the stats say."""
        self.tell(do="stats")
        return self.answer()["devices"]


@contextlib.contextmanager
def driver(command: Sequence[str]) -> Iterator[Driver]:
    """Start a driver by this command, and end it."""
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        started = Driver(process)
        started.answer()
        yield started
        if process.poll() is None:
            started.tell(do="end")
            process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def command(config: dict[str, Any], *more: str) -> list[str]:
    """What starts a driver of this configuration."""
    return [sys.executable, "-m", "tests.testbed.driver", json.dumps(config), *more]


# --- on the host --------------------------------------------------------------------------------------------


def main() -> None:
    """Launch, then do as told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--nodes", nargs="*", default=[])
    options = parser.parse_args()

    import raymoe

    with raylets(options.nodes), raymoe.launch(json.loads(options.config)) as moe:
        say(ready=True)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "end":
                return
            if order["do"] == "stats":
                devices = moe.stats().devices
                say(devices={name: {"state": stats.state, "owned": stats.owned} for name, stats in devices.items()})
            else:
                say(**decode(moe, order["prompt"], order["tokens"]))


@contextlib.contextmanager
def raylets(names: Sequence[str]) -> Iterator[None]:
    """A cluster on this host's loopback: a head, and a raylet for each name. Nothing where there are no names."""
    if not names:
        yield
        return
    import ray
    from ray.cluster_utils import Cluster

    store = 80 << 20
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": store}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for name in names:
        nodes.add_node(num_cpus=0, labels={"host": name}, object_store_memory=store)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        nodes.shutdown()


def decode(moe: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """One greedy answer."""
    before = calls_of(moe)
    start, times, found = time.perf_counter(), [], []
    for chunk in moe.stream(prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True):
        found += chunk.token_ids
        times += [time.perf_counter() - start] * len(chunk.token_ids)
    calls = {name: count - before[name] for name, count in calls_of(moe).items()}
    return {"tokens": found, "times_s": times, "calls": calls}


def calls_of(moe: Any) -> dict[str, int]:
    """Expert calls that each device has served."""
    return {name: stats.calls for name, stats in moe.stats().devices.items()}


def say(**answer: Any) -> None:
    """One line for the side that tells."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
