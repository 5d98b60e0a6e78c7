"""Requests that run in one batch."""

from collections.abc import Sequence
from typing import Any

from raymoe.config import Quality
from raymoe.launcher import Moe
from raymoe.types import Routing


def answered_together(
    moe: Moe, prompt: list[int], qualities: Sequence[Quality], **options: Any
) -> dict[Quality, tuple[list[int], Routing]]:
    """Tokens and costs of requests that differ in quality alone, and go on in turns."""
    streams = {quality: moe.stream(prompt, quality=quality, **options) for quality in qualities}
    answers: dict[Quality, list[int]] = {quality: [] for quality in streams}
    routing: dict[Quality, Routing] = {}
    while len(routing) < len(streams):
        for quality in [quality for quality in streams if quality not in routing]:
            chunk = next(streams[quality])
            answers[quality].extend(chunk.token_ids)
            if chunk.routing is not None:
                routing[quality] = chunk.routing
    return {quality: (answers[quality], routing[quality]) for quality in streams}
