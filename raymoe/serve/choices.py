"""The answers of one request: several choices, perhaps of several prompts, as one stream."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from raymoe.engine.request import SamplingParams
from raymoe.serve.batch import Batch


def params_of(params: SamplingParams, choice: int) -> SamplingParams:
    """How choice number ``choice`` of a prompt is sampled: with a seed of its own where the request has one.

    The first has the request's own seed: it is the answer that a request for one answer gets.
    """
    if params.seed is None or choice == 0:
        return params
    digest = hashlib.sha256(f"{params.seed}:{choice}".encode()).digest()
    return replace(params, seed=int.from_bytes(digest[:8], "big") >> 1)


class Answers:
    """Batches of several answers, each with the number of its choice, in the order in which they come.

    Use ``begin`` to make one. Close it, so that answers which nobody reads any more are cancelled.
    """

    def __init__(self, streams: Sequence[AsyncGenerator[Batch]]) -> None:
        self._streams = list(streams)
        self._coming: dict[asyncio.Task[Batch | None], int] = {}
        self._firsts: list[Batch] = []

    @classmethod
    async def begin(cls, streams: Sequence[AsyncGenerator[Batch]]) -> "Answers":
        """Wait for the first batch of each, so that what is refused raises here."""
        answers = cls(streams)
        firsts = [answers._await_next(choice) for choice in range(len(streams))]
        try:
            got = await asyncio.gather(*firsts)
        except BaseException:
            await answers.aclose()
            raise
        answers._coming.clear()
        answers._firsts = [replace(first, choice=choice) for choice, first in enumerate(got) if first is not None]
        return answers

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self._batches()

    async def _batches(self) -> AsyncGenerator[Batch]:
        for first in self._firsts:
            yield first
        for choice in range(len(self._streams)):
            self._await_next(choice)
        while self._coming:
            done, _ = await asyncio.wait(self._coming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=self._coming.__getitem__):
                choice = self._coming.pop(task)
                batch = task.result()
                if batch is not None:
                    self._await_next(choice)
                    yield replace(batch, choice=choice)

    def _await_next(self, choice: int) -> "asyncio.Task[Batch | None]":
        task = asyncio.ensure_future(_next(self._streams[choice]))
        self._coming[task] = choice
        return task

    async def aclose(self) -> None:
        """End every answer that is not finished."""
        coming, self._coming = self._coming, {}
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Batch]) -> Batch | None:
    return await anext(stream, None)
