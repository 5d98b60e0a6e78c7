"""Answers as server-sent events."""

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from raymoe.serve.choices import Answers
from raymoe.serve.errors import describe
from raymoe.serve.render import Renderer

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def events(answers: Answers, renderer: Renderer, *, include_usage: bool) -> AsyncGenerator[bytes]:
    """The events of answers that have begun.

    A failure becomes an event with the error, for the status has been sent long ago; ``[DONE]`` follows in any case.
    """
    try:
        async for batch in answers:
            for chunk in renderer.chunks(batch):
                yield event(chunk)
        if include_usage:
            yield event(renderer.usage())
    except Exception as error:  # the edge of the process: whatever it is, the client shall hear of it
        yield event(describe(error).body)
    yield DONE


class EventStream(StreamingResponse):
    """A stream of events. However its sending ends, ``source`` is closed, so that the engine stops with the client."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncGenerator[bytes], source: Answers) -> None:
        super().__init__(body, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._body = body
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._body.aclose()
            await self._source.aclose()  # closing a body that has not begun would leave it open
