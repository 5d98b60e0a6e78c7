"""A client on a host of the testbed that streams one answer over HTTP; and what is made of it.

python -m tests.testbed.client URL PROMPT TOKENS         a line of JSON for each chunk, as it comes
"""

import json
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass

from tests.testbed.network import Host

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """One answer, and when its chunks came, by the client's clock."""

    text: str
    at_s: tuple[float, ...]
    errors: tuple[str, ...]

    @property
    def longest_pause_s(self) -> float:
        """Between two chunks."""
        return max(after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False))


class Client:
    """A request under way on another host."""

    def __init__(self, host: Host, url: str, prompt: str, tokens: int) -> None:
        command = [sys.executable, "-m", "tests.testbed.client", url, prompt, str(tokens)]
        self._process = host.start(*command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._said = self._process.stdout
        self._chunks: list[dict] = []

    def wait_for(self, chunks: int) -> None:
        """Until so many chunks have come."""
        while len(self._chunks) < chunks:
            self._chunks.append(json.loads(self._said.readline()))

    def streamed(self) -> Streamed:
        """The whole answer."""
        out, _ = self._process.communicate(timeout=TIMEOUT_S)
        self._chunks += [json.loads(line) for line in out.splitlines()]
        return Streamed(
            text="".join(chunk["text"] for chunk in self._chunks),
            at_s=tuple(chunk["at_s"] for chunk in self._chunks),
            errors=tuple(chunk["error"] for chunk in self._chunks if chunk["error"]),
        )


def main() -> None:
    """Ask, and tell of each chunk."""
    url, prompt, tokens = sys.argv[1:]
    body = {"prompt": prompt, "max_tokens": int(tokens), "temperature": 0, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                text = "".join(choice["text"] for choice in event.get("choices", ()))
                error = json.dumps(event["error"]) if "error" in event else ""
                print(json.dumps({"at_s": time.monotonic(), "text": text, "error": error}), flush=True)


if __name__ == "__main__":
    main()
