"""Messages of the data plane: a fixed header and raw buffers.

A message is a ZeroMQ multipart of one 64-byte header and the buffers whose exact lengths the header implies.
Nothing is unpickled; every number is checked against ``Limits`` before memory is touched. Little endian.

R rows, P pairs, H hidden, E experts.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from raymoe.errors import FrameError
from raymoe.experts.call import ExpertAnswer, ExpertCall, LoadOrder, layer_and_expert
from raymoe.types import StepId

MAGIC = b"RMOE"
VERSION = 4
# magic, version, kind, dtype, reserved, request, layer, rows, pairs, hidden, a, b, c, d, e, f, big
HEADER = struct.Struct("<4sBBBBQIIIIIIIIIIQ")
TIMES = struct.Struct("<ff")  # seconds per load, 0 where unknown; seconds of computing
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
MAX_TEXT_BYTES = 4096
MAX_BUFFERS = 4  # of a call with scores


class Kind(IntEnum):
    """What a message is."""

    CALL = 1
    ANSWER = 2
    ERROR = 3
    PING = 4
    PONG = 5
    PREFETCH = 6
    RESIDENCY = 7
    FORECAST = 8
    ORDER = 9
    FORGET = 10
    BEGIN = 20
    TOKEN = 21
    END = 22
    PLAN = 23
    DRAFT = 24
    FORETOLD = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Largest message that is accepted; from the model's sizes and the engine's batch.

    ``experts`` bounds expert indices and score vectors, ``changes`` the residency changes of one answer.
    """

    layers: int = 4096
    rows: int = 65536
    pairs: int = 1 << 20
    hidden: int = 65536
    experts: int = 1 << 16
    changes: int = 1 << 20
    body_bytes: int = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The parsed header. The meaning of a to f depends on the kind."""

    kind: Kind
    dtype: torch.dtype
    request: int
    layer: int = 0
    rows: int = 0
    pairs: int = 0
    hidden: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    e: int = 0
    f: int = 0
    big: int = 0

    def pack(self) -> bytes:
        """64 bytes."""
        return HEADER.pack(
            MAGIC, VERSION, self.kind, DTYPE_CODE[self.dtype], 0, self.request, self.layer, self.rows,
            self.pairs, self.hidden, self.a, self.b, self.c, self.d, self.e, self.f, self.big,
        )  # fmt: skip


Buffer = bytes | memoryview
Message = list[Buffer]


def parse_header(frame: Buffer, limits: Limits) -> Header:
    """Check and unpack a header. Raises FrameError that names the field and its limit."""
    raw = memoryview(frame).cast("B") if not isinstance(frame, bytes) else frame
    if len(raw) != HEADER.size:
        raise FrameError(f"a header has {HEADER.size} bytes, this frame has {len(raw)}")
    magic, version, kind, dtype, _, request, layer, rows, pairs, hidden, a, b, c, d, e, f, big = HEADER.unpack(raw)
    if magic != MAGIC:
        raise FrameError("not a raymoe frame: wrong magic")
    if version != VERSION:
        raise FrameError(f"frame version {version}, expected {VERSION}: all nodes must run the same raymoe release")
    if kind not in Kind._value2member_map_:
        raise FrameError(f"unknown message kind {kind}")
    if dtype >= len(DTYPES):
        raise FrameError(f"unknown dtype code {dtype}")
    checks = (("layer", layer, limits.layers), ("rows", rows, limits.rows), ("pairs", pairs, limits.pairs))
    for name, value, limit in (*checks, ("hidden", hidden, limits.hidden)):
        if value > limit:
            raise FrameError(f"{name} is {value:,}, the limit is {limit:,}")
    return Header(
        kind=Kind(kind), dtype=DTYPES[dtype], request=request, layer=layer, rows=rows, pairs=pairs, hidden=hidden,
        a=a, b=b, c=c, d=d, e=e, f=f, big=big,
    )  # fmt: skip


def pack_call(request: int, call: ExpertCall) -> Message:
    """Header, hidden rows, experts, rows, and scores where there are any. The buffers are views, not copies.

    In the header: a scores; c 1 where the call belongs to a step, that of sequence ``big`` at position b.
    """
    scores, step = call.scores_E, call.step
    header = Header(
        kind=Kind.CALL,
        dtype=call.hidden_RH.dtype,
        request=request,
        layer=call.layer,
        rows=call.hidden_RH.shape[0],
        pairs=len(call.experts_P),
        hidden=call.hidden_RH.shape[1],
        a=0 if scores is None else len(scores),
        b=0 if step is None else step.position,
        c=int(step is not None),
        big=0 if step is None else step.sequence,
    )
    message: Message = [header.pack(), tensor_bytes(call.hidden_RH), call.experts_P.data, call.rows_P.data]
    return message if scores is None else [*message, np.ascontiguousarray(scores, dtype=np.float32).data]


def parse_call(header: Header, body: Sequence[Buffer], limits: Limits) -> ExpertCall:
    """The call in a message. Raises FrameError where lengths or indices are wrong."""
    if not header.rows or not header.pairs or not header.hidden:
        raise FrameError("a call needs at least one row, one pair and one hidden element")
    if header.a > limits.experts:
        raise FrameError(f"{header.a:,} scores, the limit is {limits.experts:,}")
    if header.c > 1:
        raise FrameError(f"a call belongs to one step or none, not to {header.c:,}")
    expected = [header.rows * header.hidden * header.dtype.itemsize, 4 * header.pairs, 4 * header.pairs]
    frames = exact_frames(body, [*expected, 4 * header.a] if header.a else expected, limits)
    experts = np.frombuffer(frames[1], dtype=np.int32)
    rows = np.frombuffer(frames[2], dtype=np.int32)
    if experts.min() < 0 or experts.max() >= limits.experts:
        raise FrameError(f"experts of a call must lie within 0 and {limits.experts - 1}")
    if rows.min() < 0 or rows.max() >= header.rows:
        raise FrameError(f"row indices must lie within 0 and {header.rows - 1}")
    scores = np.frombuffer(frames[3], dtype=np.float32) if header.a else None
    if scores is not None and not np.isfinite(scores).all():
        raise FrameError("gate scores of a call must be finite")
    return ExpertCall(
        layer=header.layer,
        hidden_RH=tensor_from(frames[0], header.dtype, (header.rows, header.hidden)),
        experts_P=experts,
        rows_P=rows,
        scores_E=scores,
        step=StepId(sequence=header.big, position=header.b) if header.c else None,
    )


def pack_answer(request: int, answer: ExpertAnswer) -> Message:
    """Header, outputs, and times (float32) with the ids of experts that came and went."""
    output = answer.output_PH
    header = Header(
        kind=Kind.ANSWER,
        dtype=output.dtype,
        request=request,
        pairs=output.shape[0],
        hidden=output.shape[1],
        a=answer.hits,
        b=answer.misses,
        c=len(answer.loaded),
        d=len(answer.evicted),
        e=answer.loads,
        f=answer.hosted,
        big=answer.bytes_loaded,
    )
    times = TIMES.pack(answer.load_s or 0.0, answer.compute_s)
    identifiers = np.array([*answer.loaded, *answer.evicted], dtype=np.int32)
    return [header.pack(), tensor_bytes(output), times + identifiers.tobytes()]


def parse_answer(header: Header, body: Sequence[Buffer], limits: Limits) -> ExpertAnswer:
    """The answer in a message."""
    changed = header.c + header.d
    if changed > limits.changes:
        raise FrameError(f"{changed:,} residency changes, the limit is {limits.changes:,}")
    expected = [header.pairs * header.hidden * header.dtype.itemsize, TIMES.size + 4 * changed]
    frames = exact_frames(body, expected, limits)
    changes = _identifiers(frames[1][TIMES.size :], limits).tolist()
    load_s, compute_s = TIMES.unpack(frames[1][: TIMES.size])
    if not 0 <= load_s < math.inf or not 0 <= compute_s < math.inf:
        raise FrameError(f"a load takes {load_s} s and computing {compute_s} s, which are no times")
    return ExpertAnswer(
        output_PH=tensor_from(frames[0], header.dtype, (header.pairs, header.hidden)),
        hits=header.a,
        misses=header.b,
        loads=header.e,
        hosted=header.f,
        bytes_loaded=header.big,
        loaded=tuple(changes[: header.c]),
        evicted=tuple(changes[header.c :]),
        load_s=load_s or None,
        compute_s=compute_s,
    )


def pack_text(kind: Kind, request: int, text: str) -> Message:
    """A short message in words, such as an error; longer ones are cut."""
    body = text.encode()[:MAX_TEXT_BYTES]
    return [Header(kind=kind, dtype=torch.float32, request=request, a=len(body)).pack(), body]


def parse_text(header: Header, body: Sequence[Buffer], limits: Limits) -> str:
    """The words of an ERROR or PONG."""
    if header.a > MAX_TEXT_BYTES:
        raise FrameError(f"text of {header.a:,} bytes, the limit is {MAX_TEXT_BYTES:,}")
    (frame,) = exact_frames(body, [header.a], limits)
    return bytes(frame).decode(errors="replace")


def pack_experts(
    kind: Kind, request: int, identifiers: Sequence[int], scores: Sequence[float], tag: str = ""
) -> Message:
    """A list of (expert id, score): a prefetch order or residency changes; ``tag`` names the sender."""
    name = tag.encode()[:MAX_TEXT_BYTES]
    header = Header(kind=kind, dtype=torch.float32, request=request, a=len(identifiers), b=len(name))
    return [header.pack(), np.array(identifiers, dtype=np.int32).data, np.array(scores, dtype=np.float32).data, name]


def parse_experts(header: Header, body: Sequence[Buffer], limits: Limits) -> tuple[list[int], list[float], str]:
    """Expert ids, scores and tag of a list message."""
    if header.a > limits.changes or header.b > MAX_TEXT_BYTES:
        raise FrameError(f"{header.a:,} experts in one list, the limit is {limits.changes:,}")
    frames = exact_frames(body, [4 * header.a, 4 * header.a, header.b], limits)
    identifiers, scores = _identifiers(frames[0], limits), np.frombuffer(frames[1], dtype=np.float32)
    if not np.isfinite(scores).all():
        raise FrameError("scores of a list of experts must be finite")
    return identifiers.tolist(), scores.tolist(), bytes(frames[2]).decode(errors="replace")


def _identifiers(buffer: memoryview, limits: Limits) -> np.ndarray:
    """Expert ids. Raises FrameError for those of layers and experts that no model of these limits has."""
    identifiers = np.frombuffer(buffer, dtype=np.int32)
    if len(identifiers):
        layers, experts = layer_and_expert(identifiers)
        if layers.min() < 0 or layers.max() >= limits.layers or experts.max() >= limits.experts:
            raise FrameError(f"expert ids are of {limits.layers:,} layers with at most {limits.experts:,} experts")
    return identifiers


def pack_forecast(layer: int, experts: np.ndarray, worths: np.ndarray) -> Message:
    """The experts that a layer to come is expected to ask for, and what each is worth."""
    header = Header(kind=Kind.FORECAST, dtype=torch.float32, request=0, layer=layer, a=len(experts))
    return [
        header.pack(),
        np.ascontiguousarray(experts, dtype=np.int32).data,
        np.ascontiguousarray(worths, dtype=np.float32).data,
    ]


def parse_forecast(header: Header, body: Sequence[Buffer], limits: Limits) -> tuple[int, np.ndarray, np.ndarray]:
    """Layer, experts and worths of a forecast."""
    if header.layer >= limits.layers:
        raise FrameError(f"a forecast for layer {header.layer}, but there are {limits.layers}")
    if header.a > limits.experts:
        raise FrameError(f"a forecast of {header.a:,} experts, the limit is {limits.experts:,}")
    frames = exact_frames(body, [4 * header.a, 4 * header.a], limits)
    experts, worths = np.frombuffer(frames[0], dtype=np.int32), np.frombuffer(frames[1], dtype=np.float32)
    if header.a and (experts.min() < 0 or experts.max() >= limits.experts):
        raise FrameError(f"experts of a forecast must lie within 0 and {limits.experts - 1}")
    if not np.isfinite(worths).all():
        raise FrameError("what a forecast expects must be worth a finite number")
    return header.layer, experts, worths


def pack_order(order: LoadOrder) -> Message:
    """Experts that a worker shall load for a step to come."""
    header = Header(
        kind=Kind.ORDER,
        dtype=torch.float32,
        request=0,
        layer=order.layer,
        a=len(order.experts),
        b=order.step.position,
        c=order.epoch,
        big=order.step.sequence,
    )
    return [header.pack(), np.ascontiguousarray(order.experts, dtype=np.int32).data]


def parse_order(header: Header, body: Sequence[Buffer], limits: Limits) -> LoadOrder:
    """The order in a message. Raises FrameError where lengths or indices are wrong."""
    if header.layer >= limits.layers:
        raise FrameError(f"an order for layer {header.layer}, but there are {limits.layers}")
    if header.a > limits.experts:
        raise FrameError(f"an order of {header.a:,} experts, the limit is {limits.experts:,}")
    (frame,) = exact_frames(body, [4 * header.a], limits)
    experts = np.frombuffer(frame, dtype=np.int32)
    if header.a and (experts.min() < 0 or experts.max() >= limits.experts):
        raise FrameError(f"experts of an order must lie within 0 and {limits.experts - 1}")
    step = StepId(sequence=header.big, position=header.b)
    return LoadOrder(step=step, epoch=header.c, layer=header.layer, experts=experts)


def pack_forget(sequence: int) -> Message:
    """A sequence has ended: what was ordered for it is void."""
    return [Header(kind=Kind.FORGET, dtype=torch.float32, request=0, big=sequence).pack()]


def parse_forget(header: Header, body: Sequence[Buffer], limits: Limits) -> int:
    """The sequence that has ended."""
    exact_frames(body, [], limits)
    return header.big


def exact_frames(body: Sequence[Buffer], expected: list[int], limits: Limits) -> list[memoryview]:
    """The body's buffers. Raises FrameError unless their lengths are exactly ``expected``, in bytes."""
    if sum(expected) > limits.body_bytes:
        raise FrameError(f"a body of {sum(expected):,} bytes, the limit is {limits.body_bytes:,}")
    if len(body) > MAX_BUFFERS:
        raise FrameError(f"{len(body):,} buffers; a message has at most {MAX_BUFFERS}")
    views = [memoryview(frame).cast("B") for frame in body]
    lengths = [len(view) for view in views]
    if lengths != expected:
        raise FrameError(f"buffers of {lengths} bytes, expected {expected}")
    return views


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory as bytes, without a copy where it is contiguous on the host."""
    flat = tensor.detach().contiguous().cpu()
    return flat.view(torch.uint8).numpy().data.cast("B")


def tensor_from(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """A tensor over received bytes. It shares their memory and must not be written to."""
    if shape[0] * shape[1] == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(buffer, dtype=np.uint8)).view(dtype).view(shape)
