"""Hundreds of requests of every kind against a real server over HTTP: good, cancelled, cut off and bad ones.

Every good answer is checked by teacher-forcing transformers on it. Afterwards nothing may be left: no request, no KV
memory, no slot beyond its budget, and no memory that grew.

    python -m tests.soak [--requests 500] [--minutes 10]
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx

from benchmarks.memory import started_bytes
from tests.answers import Answer, check_answers

SETTLE_S = 60.0  # for the engine to see the last clients go
SAMPLE_S = 5.0
FLAT = 1.05  # times: what memory may be at the end, of what it was after the first third
KINDS = ("good", "streamed", "cut off", "cancelled", "bad")
BAD: tuple[tuple[Any, int], ...] = (
    (b"{not json", 400),
    (b"[]", 400),
    ({"prompt": 7}, 400),
    ({"prompt": ""}, 400),
    ({"prompt": [1, -5]}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": "a", "max_tokens": 0}, 400),
    ({"prompt": "a", "max_tokens": 10**6}, 400),
    ({"prompt": "a", "temperature": 9}, 400),
    ({"prompt": [20] * 1024}, 400),
    ({"prompt": "a", "model": "another"}, 404),
)


@dataclass(slots=True)
class Tally:
    """What was seen.

    Attributes:
        answers: every good one.
        wrong: what should not have happened, in words.
        memory_bytes: of all of the server's processes, in the order of sampling.
    """

    answers: list[Answer] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


class Soak:
    """Plays requests against a server of the embedded model in float32, served under ``model``."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.tally = Tally()
        self._url = url
        self._model = model
        self._draw = random.Random(seed)

    async def play(self, requests: int, seconds: float, at_once: int) -> None:
        """Send so many requests, spread over so long, with at most so many under way."""
        free, start_s = asyncio.Semaphore(at_once), time.monotonic()
        plans = [self._plan() for _ in range(requests)]
        async with httpx.AsyncClient(base_url=self._url, timeout=300.0) as client:

            async def one(number: int, kind: str, body: Any, status: int) -> None:
                await asyncio.sleep(max(0.0, start_s + seconds * number / requests - time.monotonic()))
                async with free:
                    self.tally.kinds[kind] += 1
                    try:
                        await self._send(client, kind, body, status)
                    except Exception as error:  # whatever it is, it is a finding
                        self.tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")

            sampling = asyncio.create_task(self._sample_memory())
            await asyncio.gather(*(one(number, *plan) for number, plan in enumerate(plans)))
            sampling.cancel()

    def _plan(self) -> tuple[str, Any, int]:
        draw = self._draw
        kind = draw.choices(KINDS, weights=(5, 5, 2, 2, 2))[0]
        if kind == "bad":
            body, status = draw.choice(BAD)
            return kind, body if isinstance(body, bytes) else {"model": self._model, **body}, status
        length = draw.choice((1, 5, 20, 80, 300))
        prompt = [draw.randrange(20, 4000) for _ in range(length)]
        if self.tally.answers and draw.random() < 0.3:
            prompt = [*self.tally.answers[-1].prompt, *prompt][:900]
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": draw.randint(1, 40),
            "temperature": 0.0,
            "logprobs": 0,
            "ignore_eos": True,
            "stream": kind != "good",
        }
        return kind, body, 200

    async def _send(self, client: httpx.AsyncClient, kind: str, body: Any, status: int) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if kind == "cancelled":  # gone before anything was answered
            patience = httpx.Timeout(60.0, read=self._draw.uniform(0.001, 0.1))
            try:
                await client.post("/v1/completions", content=content, headers=headers, timeout=patience)
            except httpx.ReadTimeout:
                return
            return
        if kind in ("good", "bad"):
            response = await client.post("/v1/completions", content=content, headers=headers)
            await self._check_whole(kind, body, response, status)
            return
        async with client.stream("POST", "/v1/completions", content=content, headers=headers) as stream:
            if stream.status_code != 200:
                self._shed_or_wrong(kind, stream.status_code, await stream.aread())
                return
            await self._read_events(kind, body, stream)

    async def _check_whole(self, kind: str, body: Any, response: httpx.Response, status: int) -> None:
        if kind == "bad":
            error = response.json().get("error") if response.status_code == status else None
            if not error or not error.get("message"):
                self.tally.wrong.append(f"bad: {body!r} was answered {response.status_code}: {response.text[:200]}")
            return
        if response.status_code != 200:
            self._shed_or_wrong(kind, response.status_code, response.content)
            return
        choice = response.json()["choices"][0]
        self._note(body, choice["logprobs"]["tokens"], choice["finish_reason"])

    async def _read_events(self, kind: str, body: dict[str, Any], stream: httpx.Response) -> None:
        leave_after = self._draw.randint(1, 10) if kind == "cut off" else None
        tokens: list[str] = []
        reason, events = None, 0
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            events += 1
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self.tally.wrong.append(f"{kind}: {event['error']}")
                return
            for choice in event["choices"]:
                tokens += (choice.get("logprobs") or {}).get("tokens", [])
                reason = choice.get("finish_reason") or reason
            if events == leave_after:
                return
        self._note(body, tokens, reason)

    def _shed_or_wrong(self, kind: str, status: int, content: bytes) -> None:
        if status in (429, 503):
            self.tally.kinds["shed"] += 1
        else:
            self.tally.wrong.append(f"{kind}: {status}: {content[:200]!r}")

    def _note(self, body: dict[str, Any], tokens: list[str], reason: str | None) -> None:
        if reason != "length" or len(tokens) != body["max_tokens"]:
            self.tally.wrong.append(f"{len(tokens)} of {body['max_tokens']} tokens came, finish_reason {reason}")
        else:
            self.tally.answers.append(Answer(prompt=body["prompt"], texts=tokens))

    async def _sample_memory(self) -> None:
        while True:
            self.tally.memory_bytes.append(await asyncio.to_thread(started_bytes))
            await asyncio.sleep(SAMPLE_S)


def stats_of(url: str) -> dict[str, Any]:
    """What the server says of itself."""
    found: dict[str, Any] = httpx.get(f"{url}/v1/stats", timeout=60.0).raise_for_status().json()
    return found


def what_is_left(url: str, before: dict[str, Any]) -> list[str]:
    """What has not gone back to where it was, once the engine has seen everybody go."""
    end = time.monotonic() + SETTLE_S
    while True:
        now = stats_of(url)
        engine = now["engine"]
        left = {name: engine[name] for name in ("running", "waiting", "kv_bytes") if engine[name]}
        if not left or time.monotonic() > end:
            break
        time.sleep(0.1)
    found = [f"{name} is {value}" for name, value in left.items()]
    for name, device in now["devices"].items():
        budget = device["slot_budget_bytes"]
        if budget is not None and device["peak_slot_bytes"] > budget:
            found.append(f"{name} has used {device['peak_slot_bytes']} bytes of slots, allowed are {budget}")
        if (device["state"], device["owned"]) != (before["devices"][name]["state"], before["devices"][name]["owned"]):
            found.append(f"{name} is {device['state']} with {device['owned']} experts")
    return found


def memory_growth(samples: list[int]) -> float:
    """Memory in the last third of the time over that after the first."""
    third = len(samples) // 3
    if not third:
        return 1.0
    return statistics.median(samples[-third:]) / statistics.median(samples[third : 2 * third])


def check(tally: Tally) -> list[str]:
    """Everything that is wrong with what was seen."""
    return [*tally.wrong, *check_answers(tally.answers)]


def main() -> int:
    """Start a server, play, check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import ray
    from ray import serve

    from raymoe.config import ClusterConfig
    from raymoe.serve.app import build_application

    config = ClusterConfig.model_validate(SERVED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_application(config), name="raymoe")
        url = f"http://127.0.0.1:{port}"
        before = stats_of(url)
        soak = Soak(url, config.model.served_name, options.seed)
        asyncio.run(soak.play(options.requests, 60 * options.minutes, at_once=24))
        found = what_is_left(url, before)
        serve.shutdown()
    finally:
        ray.shutdown()
    growth = memory_growth(soak.tally.memory_bytes)
    print(f"{dict(soak.tally.kinds)}; memory at the end over that in the middle: {growth:.3f}", flush=True)
    if growth > FLAT:
        found.append(f"memory has grown to {growth:.3f} of what it was")
    found += check(soak.tally)
    for line in found:
        print("wrong:", line)
    return 1 if found else 0


SERVED = {
    "model": {"dtype": "float32"},
    "devices": [{"name": "edge-0", "slot_memory": "12MiB"}, {"name": "edge-1", "slot_memory": "12MiB"}],
    "trunk": {"kv_memory": "24MiB", "prefix_memory": "8MiB"},
}
"""Two bounded devices, and KV memory for a few requests, so that some wait."""

if __name__ == "__main__":
    sys.exit(main())
