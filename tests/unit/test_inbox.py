"""Chunks from a thread to coroutines: one wake-up for all that are ready together."""

import asyncio

from raymoe.engine.request import Chunk
from raymoe.serve.inbox import Bell, Inbox


def chunk(text: str) -> Chunk:
    return Chunk(text=text, token_ids=(1,))


def test_a_step_of_many_answers_wakes_the_loop_once() -> None:
    async def read() -> tuple[int, list[list[str]]]:
        loop, calls = asyncio.get_running_loop(), 0
        threadsafe = loop.call_soon_threadsafe

        def counted(*args):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return threadsafe(*args)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        bell = Bell()
        inboxes = [Inbox(bell) for _ in range(8)]
        found: list[list[str]] = [[] for _ in inboxes]
        for step in range(3):
            for place, inbox in enumerate(inboxes):
                inbox.put(chunk(f"{step}.{place}"))
            for place, inbox in enumerate(inboxes):
                found[place] += [item.text for item in await inbox.take(loop.time() + 10) if isinstance(item, Chunk)]
        return calls, found

    calls, found = asyncio.run(read())
    assert calls == 3
    assert found == [[f"{step}.{place}" for step in range(3)] for place in range(8)]


def test_what_is_put_between_taking_is_not_lost() -> None:
    async def read() -> list[str]:
        loop, inbox, texts = asyncio.get_running_loop(), Inbox(), []

        def put() -> None:
            for number in range(200):
                inbox.put(chunk(str(number)))

        putting = asyncio.create_task(asyncio.to_thread(put))
        while len(texts) < 200:
            texts += [item.text for item in await inbox.take(loop.time() + 10) if isinstance(item, Chunk)]
        await putting
        return texts

    assert asyncio.run(read()) == [str(number) for number in range(200)]
