"""Checkouts of raymoe, each with a cluster of its own on this machine, of which one runs at a time."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).with_name("side.py")
START_TIMEOUT_S = 240.0  # a cluster's start is some fifty seconds of processor time
ANSWER_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


class Side:
    """One checkout and its cluster. It runs from its start on; ``paused`` stops all of its processes.

    Raises RuntimeError where the cluster doesn't start, or runs other code than this checkout's.
    """

    def __init__(self, checkout: Path, config: dict[str, Any], log: Path, python: str = sys.executable) -> None:
        self.checkout = checkout.resolve()
        self._log = log
        quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(SCRIPT), json.dumps(config)],
                env={**os.environ, **quiet, "PYTHONPATH": str(self.checkout)},
                cwd=self.checkout,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        started = Path(self._hear(START_TIMEOUT_S)["raymoe"])
        if not started.is_relative_to(self.checkout):
            self.close()
            raise RuntimeError(f"{python} runs {started}, not what is in {self.checkout}")

    def decode(self, prompt: str, tokens: int) -> tuple[float, list[int]]:
        """Mean time of a decode step in seconds, and the tokens, of one greedy answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._hear(ANSWER_TIMEOUT_S)
        return answer["tpot_s"], answer["tokens"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it is entered, no process of this cluster takes any time."""
        processes = self._processes()
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None
        processes = self._processes()
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _signal(processes, signal.SIGKILL)
            self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _hear(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if ready.select(timeout_s) else ""
        if not line:
            raise RuntimeError(f"the cluster of {self.checkout} has ended or says nothing; see {self._log}")
        return json.loads(line)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
