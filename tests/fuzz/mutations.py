"""Ways in which a message may be wrong. Each takes frames and randomness, and returns other frames."""

import random
import struct
from collections.abc import Callable

from raymoe.transport.frames import HEADER
from tests.frames import LIMITS, Frames

FIELDS = {"kind": (5, "<B"), "dtype": (6, "<B"), "request": (8, "<Q"), "big": (56, "<Q")}
FIELDS |= {f"number {index}": (16 + 4 * index, "<I") for index in range(10)}  # layer, rows, pairs, hidden, a to f
LIMIT_VALUES = (LIMITS.layers, LIMITS.rows, LIMITS.pairs, LIMITS.hidden, LIMITS.experts, LIMITS.changes)
EXTREMES = (0, 1, 2, *(limit + more for limit in LIMIT_VALUES for more in (-1, 0, 1)), 1 << 16, 1 << 20)
EXTREMES += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
WORDS = (
    b"\xff" * 4,
    b"\0\0\0\x80",
    b"\xff\xff\xff\x7f",
    struct.pack("<f", float("nan")),
    struct.pack("<f", float("inf")),
)

Mutation = Callable[[Frames, random.Random], Frames]


def truncated(frames: Frames, rng: random.Random) -> Frames:
    """A frame ends early."""
    return _with(frames, rng, lambda frame: frame[: rng.randrange(len(frame) + 1)])


def padded(frames: Frames, rng: random.Random) -> Frames:
    """A frame has more than it should."""
    return _with(frames, rng, lambda frame: frame + rng.randbytes(rng.choice((1, 3, 4, 8, 64, 4096))))


def flipped(frames: Frames, rng: random.Random) -> Frames:
    """Some bits are wrong."""

    def flip(frame: bytes) -> bytes:
        changed = bytearray(frame)
        for _ in range(rng.randint(1, 8) if frame else 0):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    return _with(frames, rng, flip)


def with_an_extreme_field(frames: Frames, rng: random.Random) -> Frames:
    """A number of the header lies at, or beyond, what is allowed."""
    if not frames or len(frames[0]) != HEADER.size:
        return frames
    place, form = rng.choice(list(FIELDS.values()))
    size = struct.calcsize(form)
    header = bytearray(frames[0])
    struct.pack_into(form, header, place, rng.choice(EXTREMES) & ((1 << 8 * size) - 1))
    return [bytes(header), *frames[1:]]


def with_an_extreme_word(frames: Frames, rng: random.Random) -> Frames:
    """An index or a score is no such thing."""
    if len(frames) < 2:
        return frames
    index = rng.randrange(1, len(frames))
    body = bytearray(frames[index])
    if len(body) >= 4:
        place = 4 * rng.randrange(len(body) // 4)
        body[place : place + 4] = rng.choice(WORDS)
    return [*frames[:index], bytes(body), *frames[index + 1 :]]


def resized(frames: Frames, rng: random.Random) -> Frames:
    """A count of the header and the length of a frame change together, so that more of a parser is reached."""
    changed = with_an_extreme_field(frames, rng)
    if len(changed) < 2:
        return changed
    index, size = rng.randrange(1, len(changed)), 4 * rng.choice(EXTREMES[:20])
    body = changed[index]
    return [*changed[:index], (body * (size // max(1, len(body)) + 1))[:size], *changed[index + 1 :]]


def missing(frames: Frames, rng: random.Random) -> Frames:
    """A frame is not there."""
    index = rng.randrange(len(frames)) if frames else 0
    return [*frames[:index], *frames[index + 1 :]]


def doubled(frames: Frames, rng: random.Random) -> Frames:
    """A frame is there twice, or many times."""
    index = rng.randrange(len(frames)) if frames else 0
    return [*frames[:index], *frames[index : index + 1] * rng.choice((2, 2, 2, 300)), *frames[index + 1 :]]


def shuffled(frames: Frames, rng: random.Random) -> Frames:
    """Frames are in another order."""
    return rng.sample(frames, len(frames))


def noise(frames: Frames, rng: random.Random) -> Frames:
    """Nothing of ours."""
    return [rng.randbytes(rng.choice((0, 1, HEADER.size, 200))) for _ in range(rng.randint(0, 5))]


MUTATIONS: tuple[Mutation, ...] = (
    truncated, padded, flipped, with_an_extreme_field, with_an_extreme_word, resized, missing, doubled, shuffled, noise,
)  # fmt: skip


def mutated(corpus: list[Frames], rng: random.Random) -> Frames:
    """One of the corpus with one to three things wrong; sometimes the header of one with the body of another."""
    frames = rng.choice(corpus)
    if rng.random() < 0.1:
        frames = [frames[0], *rng.choice(corpus)[1:]]
    for _ in range(rng.choice((1, 1, 2, 3))):
        frames = rng.choice(MUTATIONS)(frames, rng)
    return frames


def _with(frames: Frames, rng: random.Random, change: Callable[[bytes], bytes]) -> Frames:
    if not frames:
        return frames
    index = rng.randrange(len(frames))
    return [*frames[:index], change(frames[index]), *frames[index + 1 :]]
