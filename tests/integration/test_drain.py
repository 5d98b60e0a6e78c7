"""A server that is told to end: a real ``raymoe serve``, with its own Ray, and signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

CONFIG = """
model: {dtype: float32}
devices: [{name: edge-0, transport: local, slot_memory: 4MiB}]
serving: {drain_timeout_s: 120.0}
"""
SHORT, LONG = 60, 1000  # tokens; the second takes longer than the whole test, for nearly every expert is loaded


@dataclass
class Answer:
    """A streamed answer, read by a thread of its own."""

    url: str
    tokens: int
    events: list[Any] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {"prompt": "It is a truth", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=WAIT_S) as stream:
            for line in stream.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line:
                    self.events.append(json.loads(line.removeprefix("data: ")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A server, and what it has written so far."""

    process: "subprocess.Popen[bytes]"
    url: str
    output: Path

    def is_up_or_gone(self) -> bool:
        return "is served at" in self.output.read_text() or self.process.poll() is not None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    """``raymoe serve`` with a Ray of its own, once it serves."""
    file, output = tmp_path / "cluster.yaml", tmp_path / "output"
    file.write_text(CONFIG)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "raymoe.cli", "serve", str(file), "--port", str(port)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    with output.open("wb") as written:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
    started = Process(process=process, url=f"http://127.0.0.1:{port}", output=output)
    try:
        until(started.is_up_or_gone, "the start")
        assert process.poll() is None
        yield started
    finally:
        process.kill()
        process.wait()
        print(output.read_text())  # pytest shows it where the test has failed


def test_running_answers_are_finished_new_ones_refused_and_a_second_signal_ends_it(server: Process) -> None:
    process, url = server.process, server.url
    short, long = Answer(url, SHORT), Answer(url, LONG)
    until(lambda: bool(short.events and long.events), "the first tokens")

    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/health", timeout=10.0).status_code == 503, "the begin of draining")
    health = httpx.get(f"{url}/health", timeout=10.0).json()
    assert (health["status"], health["error"]["code"]) == ("draining", "draining")
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=10.0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    short.thread.join(WAIT_S)
    assert short.done and short.events[-1]["choices"][0]["finish_reason"] == "length"
    assert process.poll() is None and not long.done

    process.send_signal(signal.SIGTERM)
    long.thread.join(WAIT_S)
    assert long.done and "ended before the answer was complete" in long.events[-1]["error"]["message"]
    assert process.wait(timeout=WAIT_S) == 0
