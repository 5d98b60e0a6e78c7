"""Messages as they arrive from a socket: whole, and damaged in every way."""

from collections.abc import Callable

from hypothesis import assume
from hypothesis import strategies as st

from raymoe.transport.frames import HEADER, Limits, Message

LIMITS = Limits(layers=8, rows=64, pairs=256, hidden=64, experts=32, changes=64, body_bytes=1 << 16)
"""Of a small model, for messages that tests make."""

Frames = list[bytes]
Arriving = st.SearchStrategy[Frames]


def wire(message: Message) -> Frames:
    """What arrives at the other end."""
    return [bytes(memoryview(part).cast("B")) if len(part) else b"" for part in message]


@st.composite
def with_a_damaged_header(draw: st.DrawFn, messages: Arriving) -> Frames:
    first, *body = draw(messages)
    header = bytearray(first)
    for _ in range(draw(st.integers(1, 4))):
        header[draw(st.integers(0, HEADER.size - 1))] = draw(st.integers(0, 255))
    return [bytes(header), *body]


@st.composite
def with_a_frame_cut_or_padded(draw: st.DrawFn, messages: Arriving) -> Frames:
    frames = draw(messages)
    index = draw(st.integers(0, len(frames) - 1))
    cut = draw(st.integers(0, len(frames[index])))
    changed = frames[index][:cut] if draw(st.booleans()) else frames[index] + b"\0" * (cut + 1)
    assume(changed != frames[index])
    return [*frames[:index], changed, *frames[index + 1 :]]


@st.composite
def with_frames_missing(draw: st.DrawFn, messages: Arriving) -> Frames:
    frames = draw(messages)
    return frames[: draw(st.integers(0, len(frames)))]


@st.composite
def with_frames_too_many(draw: st.DrawFn, messages: Arriving) -> Frames:
    return [*draw(messages), *draw(st.lists(st.binary(max_size=8), min_size=1, max_size=3))]


DAMAGED: dict[str, Callable[[Arriving], Arriving]] = {
    "random frames": lambda _: st.lists(st.binary(max_size=100), max_size=5),
    "damaged header": with_a_damaged_header,
    "frame cut or padded": with_a_frame_cut_or_padded,
    "frames swapped": lambda messages: messages.flatmap(st.permutations),
    "frames missing": with_frames_missing,
    "frames too many": with_frames_too_many,
}
"""Ways in which whole messages may arrive damaged, by name."""
