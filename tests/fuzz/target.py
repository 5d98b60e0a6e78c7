"""What every receiver does with a message, and what must hold of it: FrameError, or something within its bounds.

Nothing else may be raised, and no more memory be taken than the bound below allows for what has arrived.
"""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from predictor.forecast import LayerForecast
from raymoe.errors import FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, layer_and_expert
from raymoe.transport.frames import (
    Buffer,
    Header,
    Kind,
    parse_answer,
    parse_call,
    parse_experts,
    parse_forecast,
    parse_forget,
    parse_header,
    parse_order,
    parse_text,
)
from raymoe.transport.shadow_messages import Begin, Plan, Token, parse_from_shadow, parse_news
from tests.frames import LIMITS, Frames
from tests.fuzz.corpus import WORKERS

# A Python list of integers takes eleven times what they take in a frame (4 bytes there; an object of 28 and two
# references here), and some parsers make two; the rest is for objects of fixed size and messages of errors.
BYTES_PER_BYTE, BYTES_MORE = 24, 1 << 16
BYTES_PER_FRAME = 512  # a view of each, which servers make before they look

Parser = Callable[[Header, Sequence[Buffer]], Any]


def _limited(parse: Callable[..., Any]) -> Parser:
    return lambda header, body: parse(header, body, LIMITS)


PARSERS: dict[Kind, Parser] = {
    Kind.CALL: _limited(parse_call),
    Kind.ANSWER: _limited(parse_answer),
    Kind.ERROR: _limited(parse_text),
    Kind.PREFETCH: _limited(parse_experts),
    Kind.RESIDENCY: _limited(parse_experts),
    Kind.FORECAST: _limited(parse_forecast),
    Kind.ORDER: _limited(parse_order),
    Kind.FORGET: _limited(parse_forget),
    **dict.fromkeys((Kind.BEGIN, Kind.TOKEN, Kind.END), _limited(parse_news)),
    **dict.fromkeys(
        (Kind.PLAN, Kind.DRAFT, Kind.FORETOLD), lambda header, body: parse_from_shadow(header, body, LIMITS, WORKERS)
    ),
}
"""By kind. Nobody parses the body of the others."""


def read(frames: Frames, parser: Parser | None = None) -> Any:
    """What a receiver makes of a message: the header where its kind has no body, None where it is refused.

    Args:
        parser: of another kind than the header names: an admitted peer may send anything to any socket.
    """
    views = [memoryview(frame) for frame in frames]  # as they come from ZeroMQ
    try:
        if not views:
            raise FrameError("an empty message")
        header = parse_header(views[0], LIMITS)
        parser = parser or PARSERS.get(header.kind)
        parsed = header if parser is None else parser(header, views[1:])
    except FrameError:
        return None
    check(parsed, sum(map(len, frames)))
    return parsed


def read_measured(frames: Frames, parser: Parser | None = None) -> Any:
    """As ``read``, and fails where more memory was taken than the bound allows."""
    tracemalloc.start()
    try:
        parsed = read(frames, parser)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = BYTES_PER_BYTE * sum(map(len, frames)) + BYTES_PER_FRAME * len(frames) + BYTES_MORE
    assert peak <= bound, f"{peak:,} bytes for a message that may take {bound:,}"
    return parsed


def check(parsed: Any, received: int) -> None:
    """What was understood lies within the limits, so that whoever is handed it may use it as an index."""
    if isinstance(parsed, ExpertCall):
        rows = parsed.hidden_RH.shape[0]
        assert len(parsed.experts_P) == len(parsed.rows_P) and parsed.hidden_RH.nbytes <= received
        _within(parsed.experts_P, LIMITS.experts)
        _within(parsed.rows_P, rows)
        assert parsed.scores_E is None or np.isfinite(parsed.scores_E).all()
    elif isinstance(parsed, ExpertAnswer):
        assert parsed.output_PH.nbytes <= received
        _are_ids([*parsed.loaded, *parsed.evicted])
        assert parsed.load_s is None or 0 < parsed.load_s < float("inf")
    elif isinstance(parsed, LoadOrder):
        _within(parsed.experts, LIMITS.experts)
        assert parsed.layer < LIMITS.layers
    elif isinstance(parsed, Plan):
        _within(parsed.experts_N, LIMITS.experts)
        _within(parsed.workers_N, WORKERS)
    elif isinstance(parsed, LayerForecast):
        _within(parsed.experts_TK.reshape(-1), parsed.scores_TE.shape[1])
        assert np.isfinite(parsed.scores_TE).all() and parsed.layer < LIMITS.layers
    elif isinstance(parsed, Begin):
        assert min(parsed.tokens) >= 0 and 4 * len(parsed.tokens) <= received
    elif isinstance(parsed, Token):
        assert len(parsed.entries) <= received and parsed.start + parsed.count <= parsed.step.position
    elif isinstance(parsed, tuple) and isinstance(parsed[0], list):
        _are_ids(parsed[0])
        assert np.isfinite(parsed[1]).all() and len(parsed[0]) == len(parsed[1])
    elif isinstance(parsed, tuple):
        layer, experts, worths = parsed
        _within(experts, LIMITS.experts)
        assert layer < LIMITS.layers and np.isfinite(worths).all()


def _within(numbers: np.ndarray, limit: int) -> None:
    assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < limit)


def _are_ids(identifiers: list[int]) -> None:
    layers, experts = layer_and_expert(np.array(identifiers, dtype=np.int64))
    _within(layers, LIMITS.layers)
    _within(experts, LIMITS.experts)
