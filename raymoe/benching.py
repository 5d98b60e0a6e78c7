"""The command ``raymoe bench serve``: an open-loop load on a running server, through OpenAI's API.

Requests arrive at random moments, at a given rate on average (a Poisson process), whether or not earlier ones were
answered: so a server that is too slow shows it, as it would to real users.
"""

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raymoe.errors import ConfigError, StartError
from raymoe.observe import terminal

if TYPE_CHECKING:
    import httpx

app = typer.Typer(help="Measure a running server.", no_args_is_help=True)
PERCENTILES = (50, 90, 99)
FIRST_TOKEN, LAST_TOKEN = 20, 2000  # of random prompts: special tokens lie at a vocabulary's ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A load.

    Attributes:
        rate: requests per second, on average.
        concurrency: most requests under way at once; who comes when as many are is counted as shed by the client.
        prompt_tokens, max_tokens: of each request, the most; lengths are drawn from half of it on.
    """

    rate: float
    concurrency: int
    requests: int
    prompt_tokens: int
    max_tokens: int
    seed: int

    def arrivals(self) -> list[tuple[float, list[int], int]]:
        """For each request: seconds after the start, prompt, most tokens of the answer. The same for the same seed."""
        draw, now_s, found = random.Random(self.seed), 0.0, []
        for _ in range(self.requests):
            now_s += draw.expovariate(self.rate)
            length = draw.randint(max(1, self.prompt_tokens // 2), self.prompt_tokens)
            prompt = [draw.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]
            found.append((now_s, prompt, draw.randint(max(1, self.max_tokens // 2), self.max_tokens)))
        return found


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one request. Seconds since its arrival, which is when it should have been sent.

    Attributes:
        error: why it was not answered; None where it was.
        events_s: when text came; the last is the end.
    """

    error: str | None = None
    ttft_s: float = 0.0
    total_s: float = 0.0
    tokens: int = 0
    events_s: list[float] = field(default_factory=list)

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None with fewer than two."""
        return (self.total_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else None


@app.command("serve")
def serve(
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second, on average.")] = 2.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests under way at once.")] = 8,
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="How many requests in all.")] = 50,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 64,
    ttft_ms: Annotated[float, typer.Option(help="A good answer begins within this time …")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="… and goes on within this time per token.")] = 100.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and lengths.")] = 0,
    model: Annotated[str | None, typer.Option(help="Served name; omitted: the first that the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Omitted: RAYMOE_API_KEY of the environment, if set.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load a server at a rate, and report time to first token, time per token, and goodput.

    Requests that find all of --concurrency taken are not sent, and count as bad. Goodput is the rate of requests that
    were answered within both limits.
    """
    plan = Plan(
        rate=rate,
        concurrency=concurrency,
        requests=requests,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    key = api_key or os.environ.get("RAYMOE_API_KEY")
    outcomes, took_s = asyncio.run(load(url, plan, model, key))
    result = summary(outcomes, took_s, ttft_ms / 1e3, tpot_ms / 1e3)
    settings = asdict(plan) | {"url": url, "ttft_ms": ttft_ms, "tpot_ms": tpot_ms}
    if as_json:
        typer.echo(json.dumps({"settings": settings, **result}, indent=2))
    else:
        table = terminal.plain_table(f"{url} at {rate:g} requests/s", ("", ""))
        for row in rows_of(result):
            table.add_row(*row)
        Console().print(table)
    if not result["answered"]:
        raise StartError(f"no request was answered: {next(iter(result['errors']), 'unknown')}")


async def load(url: str, plan: Plan, model: str | None, api_key: str | None) -> tuple[list[Outcome], float]:
    """Play a plan. Returns what came of each request, and how long all of it took.

    Raises StartError where there is no server, ConfigError where it serves nothing.
    """
    import httpx

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=plan.concurrency + 1)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600.0) as client:
        try:
            listed = (await client.get("/v1/models")).raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise StartError(f"no server answers at {url}: {error}") from error
        if not listed:
            raise ConfigError(f"{url} serves no model")
        name = model or listed[0]["id"]
        free, start_s = asyncio.Semaphore(plan.concurrency), time.perf_counter()

        async def at(moment_s: float, prompt: list[int], tokens: int) -> Outcome:
            await asyncio.sleep(max(0.0, start_s + moment_s - time.perf_counter()))
            if free.locked():
                return Outcome(error="shed by the client: --concurrency requests are under way")
            async with free:
                body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 1.0, "seed": plan.seed}
                return await answer(client, body, start_s + moment_s)

        outcomes = await asyncio.gather(*(at(*arrival) for arrival in plan.arrivals()))
        return list(outcomes), time.perf_counter() - start_s


async def answer(client: "httpx.AsyncClient", body: dict[str, Any], arrival_s: float) -> Outcome:
    """Send one streamed request and note when what came."""
    import httpx

    outcome = Outcome()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return Outcome(error=message_of(await response.aread(), response.status_code))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Outcome(error=str(event["error"].get("message")))
                if event.get("usage"):
                    outcome.tokens = event["usage"]["completion_tokens"]
                if any(choice.get("text") or choice.get("finish_reason") for choice in event.get("choices", ())):
                    outcome.events_s.append(time.perf_counter() - arrival_s)
    except (httpx.HTTPError, ValueError) as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    if not outcome.events_s or not outcome.tokens:
        return Outcome(error="the stream ended without an answer")
    outcome.ttft_s, outcome.total_s = outcome.events_s[0], outcome.events_s[-1]
    return outcome


def message_of(content: bytes, status: int) -> str:
    """The server's word for an error."""
    try:
        return f"{status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {content[:200].decode(errors='replace')}"


def summary(outcomes: Sequence[Outcome], took_s: float, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    """Percentiles, rates and errors; ``ttft_s`` and ``tpot_s`` bound what is a good answer."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    good = [one for one in answered if one.ttft_s <= ttft_s and (one.tpot_s is None or one.tpot_s <= tpot_s)]
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "good": len(good),
        "took_s": took_s,
        "goodput_per_s": len(good) / took_s,
        "requests_per_s": len(answered) / took_s,
        "tokens_per_s": sum(outcome.tokens for outcome in answered) / took_s,
        "ttft_ms": percentiles([outcome.ttft_s for outcome in answered]),
        "tpot_ms": percentiles([outcome.tpot_s for outcome in answered if outcome.tpot_s is not None]),
        "total_ms": percentiles([outcome.total_s for outcome in answered]),
        "errors": errors,
    }


def percentiles(values_s: Sequence[float]) -> dict[str, float]:
    """In milliseconds, by name ("p50"); none of nothing."""
    if not values_s:
        return {}
    cuts = statistics.quantiles(values_s, n=100, method="inclusive") if len(values_s) > 1 else [values_s[0]] * 99
    return {f"p{percent}": 1e3 * cuts[percent - 1] for percent in PERCENTILES}


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """For a table."""
    spread = {
        name: "  ".join(f"{percent} {value:.1f}" for percent, value in result[name].items()) or "none"
        for name in ("ttft_ms", "tpot_ms", "total_ms")
    }
    return [
        ("answered", f"{result['answered']} of {result['requests']}, {result['good']} well"),
        ("goodput", f"{result['goodput_per_s']:.2f} requests/s"),
        ("tokens", f"{result['tokens_per_s']:.1f} /s"),
        ("time to first token, ms", spread["ttft_ms"]),
        ("time per token, ms", spread["tpot_ms"]),
        ("whole answer, ms", spread["total_ms"]),
        *((f"{count} x", error) for error, count in result["errors"].items()),
    ]
