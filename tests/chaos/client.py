"""Users: some requests at a time, for as long as the faults last, and what became of every one."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

HANG_S = 120.0  # a request that has neither ended nor failed by then hangs: 4 times the time to wait for lost experts
AFTER_ERROR_S = 0.5  # before the next request, as a client that respects Retry-After would wait, and longer
PROMPT_TOKENS = (1, 8, 30, 90)
MAX_TOKENS = (8, 60)
TOKENS = (20, 4000)  # ids of plain text in the embedded model's vocabulary

Outcome = Literal["answered", "error", "improper", "hang"]


@dataclass(slots=True, kw_only=True)
class Asked:
    """One request, and what came of it. Times are of the monotonic clock, in seconds.

    Attributes:
        texts: of the tokens that came, also where an error followed.
        times_s: when each came, of a streamed answer.
        outcome: "error" is one as the API describes it, "improper" any other end.
        said: type of the error, or what was improper.
    """

    prompt: list[int]
    max_tokens: int
    streamed: bool
    begin_s: float
    end_s: float = 0.0
    texts: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    outcome: Outcome = "hang"
    said: str = ""

    def ended(self, outcome: Outcome, said: str = "") -> None:
        """Note how it ended, now."""
        self.outcome, self.said, self.end_s = outcome, said, time.monotonic()


class Client:
    """Asks ``at_once`` things at a time until it is told to stop.

    Attributes:
        asked: every request so far.
    """

    def __init__(self, url: str, model: str, *, seed: int, at_once: int, quality: str | None) -> None:
        self.asked: list[Asked] = []
        self._url = url
        self._fixed = {"model": model, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}
        if quality is not None:
            self._fixed["quality"] = quality
        self._draw = random.Random(seed)
        self._at_once = at_once

    async def play(self, stop: asyncio.Event) -> None:
        """Ask until ``stop``; then wait for what is under way."""
        limits = httpx.Limits(max_connections=2 * self._at_once)
        async with httpx.AsyncClient(base_url=self._url, timeout=HANG_S, limits=limits) as http:

            async def user() -> None:
                while not stop.is_set():
                    asked = await self.ask(http)
                    if asked.outcome != "answered":
                        await asyncio.sleep(AFTER_ERROR_S)

            await asyncio.gather(*(user() for _ in range(self._at_once)))

    async def ask(self, http: httpx.AsyncClient) -> Asked:
        """One request, to its end."""
        draw = self._draw
        asked = Asked(
            prompt=[draw.randrange(*TOKENS) for _ in range(draw.choice(PROMPT_TOKENS))],
            max_tokens=draw.randint(*MAX_TOKENS),
            streamed=draw.random() < 0.75,
            begin_s=time.monotonic(),
        )
        self.asked.append(asked)
        body = {**self._fixed, "prompt": asked.prompt, "max_tokens": asked.max_tokens, "stream": asked.streamed}
        try:
            async with asyncio.timeout(HANG_S):
                await (self._stream(http, body, asked) if asked.streamed else self._whole(http, body, asked))
        except TimeoutError:
            asked.ended("hang", f"neither answered nor refused within {HANG_S:g} s")
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            asked.ended("improper", f"{type(error).__name__}: {error}")
        return asked

    async def _whole(self, http: httpx.AsyncClient, body: dict[str, Any], asked: Asked) -> None:
        response = await http.post("/v1/completions", json=body)
        if response.status_code != 200:
            asked.ended(*refusal(response.status_code, response.content))
            return
        choice = response.json()["choices"][0]
        asked.texts = choice["logprobs"]["tokens"]
        complete(asked, choice["finish_reason"])

    async def _stream(self, http: httpx.AsyncClient, body: dict[str, Any], asked: Asked) -> None:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                asked.ended(*refusal(response.status_code, await response.aread()))
                return
            await read_events(response.aiter_lines(), asked)


async def read_events(lines: AsyncIterator[str], asked: Asked) -> None:
    """Take note of a streamed answer, line by line."""
    reason, error, done = None, None, False
    async for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            error = event
            continue
        for choice in event["choices"]:
            texts = (choice.get("logprobs") or {}).get("tokens", [])
            asked.texts += texts
            asked.times_s += [time.monotonic()] * len(texts)
            reason = choice.get("finish_reason") or reason
    if not done:
        asked.ended("improper", "the stream ended without [DONE]" + (" after an error event" if error else ""))
    elif error is not None:
        asked.ended(*refusal(503, json.dumps(error).encode()))
    else:
        complete(asked, reason)


def complete(asked: Asked, reason: str | None) -> None:
    """The answer has ended by itself: whether it is all of it."""
    if reason == "length" and len(asked.texts) == asked.max_tokens:
        asked.ended("answered")
    else:
        asked.ended("improper", f"{len(asked.texts)} of {asked.max_tokens} tokens came, finish_reason {reason}")


def refusal(status: int, content: bytes) -> tuple[Outcome, str]:
    """What an answer other than 200 is: an error as the API describes it, or not."""
    try:
        error = json.loads(content)["error"]
        if error["message"] and error["type"]:
            return "error", error["type"]
    except (ValueError, KeyError, TypeError):
        pass
    return "improper", f"{status}: {content[:200]!r}"
