"""What the chaos tests make of what they see: ends of requests, waits for tokens, and what is missing or left."""

import asyncio
import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from raymoe.errors import FrameError
from raymoe.transport.frames import Kind as FrameKind
from raymoe.transport.frames import (
    Limits,
    parse_call,
    parse_experts,
    parse_forget,
    parse_header,
    parse_order,
)
from tests.chaos.client import Asked, read_events, refusal
from tests.chaos.peers import malformed
from tests.chaos.play import what_is_left, what_is_missing
from tests.chaos.proxy import CLEAR, Condition, Plane, condition_of, merged
from tests.chaos.report import Happened, needless_errors, recovery_s, summary, table
from tests.chaos.schedule import Fault, Kind
from tests.frames import Frames


def asked(begin_s: float = 0.0, times_s: tuple[float, ...] = (), end_s: float = 0.0, **fields: Any) -> Asked:
    defaults: dict[str, Any] = {"outcome": "answered", "streamed": True, "max_tokens": len(times_s)}
    return Asked(
        prompt=[20],
        begin_s=begin_s,
        times_s=list(times_s),
        texts=["a"] * len(times_s),
        end_s=end_s or (times_s[-1] if times_s else begin_s),
        **{**defaults, **fields},
    )


def happened(begin_s: float, end_s: float, kind: Kind = Kind.CUT_LINK, whole_s: float | None = None) -> Happened:
    return Happened(fault=Fault(at_s=0.0, kind=kind), begin_s=begin_s, end_s=end_s, whole_s=whole_s)


# --- ends of requests -----------------------------------------------------------------------------------


def event(text: str = "a", reason: str | None = None) -> str:
    choice = {"text": text, "logprobs": {"tokens": [text]}, "finish_reason": reason}
    return "data: " + json.dumps({"choices": [choice]})


ERROR = 'data: {"error": {"message": "the engine ended", "type": "unavailable"}}'
DONE = "data: [DONE]"
STREAMS = [
    ([event(), event(reason="length"), "", DONE], "answered", ""),
    ([event(), ERROR, DONE], "error", "unavailable"),
    ([event(), ERROR], "improper", "the stream ended without [DONE] after an error event"),
    ([event()], "improper", "the stream ended without [DONE]"),
    ([], "improper", "the stream ended without [DONE]"),
    ([event(reason="length"), DONE], "improper", "1 of 2 tokens came, finish_reason length"),
    ([event(), event(reason="stop"), DONE], "improper", "2 of 2 tokens came, finish_reason stop"),
    ([event(), 'data: {"error": {"message": "no type"}}', DONE], "improper", "503"),
]


@pytest.mark.parametrize(("lines", "outcome", "said"), STREAMS)
def test_how_a_stream_may_end(lines: list[str], outcome: str, said: str) -> None:
    async def stream() -> AsyncIterator[str]:
        for line in lines:
            yield line

    one = Asked(prompt=[20], max_tokens=2, streamed=True, begin_s=0.0)
    asyncio.run(read_events(stream(), one))
    assert one.outcome == outcome and one.said.startswith(said)
    assert len(one.times_s) == len(one.texts)


REFUSALS = [
    (503, b'{"error": {"message": "gone", "type": "unavailable"}}', ("error", "unavailable")),
    (500, b"Internal Server Error", ("improper", "500: b'Internal Server Error'")),
    (503, b'{"error": {"message": "", "type": "unavailable"}}', None),
    (503, b'["error"]', None),
]


@pytest.mark.parametrize(("status", "content", "expected"), REFUSALS)
def test_an_error_needs_a_message_and_a_type(status: int, content: bytes, expected: tuple[str, str] | None) -> None:
    found = refusal(status, content)
    assert found == expected if expected is not None else found[0] == "improper"


# --- waits ----------------------------------------------------------------------------------------------

WAITS = [
    # a gap around the fault counts from the fault on
    ([asked(0, (1.0, 1.1, 3.0, 3.1))], 1.9),
    ([asked(0, (1.0, 2.0, 4.0))], 2.0),
    # nobody was waiting
    ([], 0.0),
    ([asked(0, (1.0, 1.05))], 0.0),
    ([asked(9, (9.5, 12.0))], 0.0),
    # one whose prompt was being read waits for its first token; one that comes later does not
    ([asked(1.0, (2.5,))], 1.4),
    ([asked(1.2, (2.0, 2.1))], 0.1),
    # the longest of several
    ([asked(0, (1.0, 1.2)), asked(0, (1.0, 1.6))], 0.5),
    # what ended with an error waits until anybody gets a token
    ([asked(0, (1.0,), end_s=1.3, outcome="error"), asked(2.0, (4.1, 4.2))], 3.0),
    ([asked(0, (1.0, 5.0), streamed=False)], 0.0),
]


@pytest.mark.parametrize(("requests", "expected"), WAITS)
def test_the_longest_wait_for_the_next_token(requests: list[Asked], expected: float) -> None:
    assert recovery_s(happened(1.1, 1.2), requests) == pytest.approx(expected)


def test_waits_count_until_everything_is_there_again() -> None:
    requests = [asked(0, (1.0, 1.2, 5.0, 6.5, 6.6))]
    assert recovery_s(happened(1.1, 1.1), requests) == pytest.approx(3.8)
    late = [asked(0, (1.0, 1.2, 1.3, 5.0, 5.2, 6.5))]
    assert recovery_s(happened(1.1, 1.1, whole_s=5.5), late) == pytest.approx(3.7)
    steady = asked(0, (*(0.1 * step for step in range(60)), 8.0))
    assert recovery_s(happened(1.1, 1.1), [steady]) == pytest.approx(0.1)
    assert recovery_s(happened(1.1, 1.1, whole_s=6.0), [steady]) == pytest.approx(2.1)
    assert recovery_s(happened(1.1, 1.1, Kind.FLOOD_STRANGER, whole_s=6.0), [steady]) == pytest.approx(0.1)


def test_errors_need_a_fault_that_may_cost_answers() -> None:
    failed = asked(2.0, (), end_s=3.0, outcome="error", said="unavailable")
    assert len(needless_errors([failed], [happened(1.0, 2.5)])) == 1
    assert needless_errors([failed], [happened(1.0, 1.0, Kind.KILL_ENGINE, whole_s=9.0)]) == []
    assert len(needless_errors([failed], [happened(5.0, 6.0, Kind.KILL_OWNERS)])) == 1


def test_a_summary_has_what_is_asked_for_and_a_table_shows_it() -> None:
    requests = [
        asked(0, (1.0, 2.0)),
        asked(0, (), outcome="hang"),
        asked(3.0, (), outcome="error", said="unavailable"),
    ]
    happenings = [happened(1.1, 1.2, whole_s=1.7), happened(1.3, 1.4, Kind.KILL_WORKER)]
    found = summary(requests, happenings, wrong_tokens=2, failures=["a hang"])
    assert (found["faults"], found["requests"], found["answered"], found["hangs"]) == (2, 3, 1, 1)
    assert (found["wrong_tokens"], found["errors"], found["tokens"]) == (2, {"unavailable": 1}, 2)
    assert found["by_kind"]["cut_link"]["whole_again"]["max_s"] == 0.6
    assert found["by_kind"]["kill_worker"]["whole_again"] is None
    assert 0 < found["recovery_p50_s"] <= found["recovery_p99_s"]
    json.dumps(found)
    assert "cut_link" in table(found) and "wrong tokens 2 of 2" in table(found)


# --- the cluster ----------------------------------------------------------------------------------------


def stats(**changes: Any) -> dict[str, Any]:
    device = {"state": "healthy", "pid": 7, "owned": 10, "slot_budget_bytes": 100, "peak_slot_bytes": 100}
    return {
        "devices": {"edge-0": {**device, **changes}, "edge-1": {**device, "pid": 8}},
        "predictor": {"kind": "shadow", "state": "healthy", "reason": None, "pid": 9},
        "engine": {"running": 0, "waiting": 0, "parked": 0, "kv_bytes": 0, "kv_set_aside_bytes": 0},
    }


def test_what_is_missing_is_named() -> None:
    before = stats()
    assert what_is_missing(stats(), before, set()) == []
    assert what_is_missing(stats(state="down"), before, {7}) == ["edge-0 is down"]
    assert what_is_missing(stats(), before, {7}) == ["edge-0 is the one that was killed"]
    assert what_is_missing(stats(owned=9), before, set()) == ["19 experts have owners, 20 had"]
    assert what_is_missing(stats(owned=30), before, set()) == []
    assert what_is_missing(stats(), before, {9}) == ["the shadow is the one that was killed"]
    without = stats()
    without["predictor"] |= {"state": "down", "reason": "it is starting"}
    assert what_is_missing(without, before, set()) == ["the shadow is down: it is starting"]


@pytest.mark.parametrize("name", ["running", "waiting", "parked", "kv_bytes", "kv_set_aside_bytes"])
def test_what_an_idle_engine_still_holds_is_named(name: str) -> None:
    found = stats()
    assert what_is_left(found) == []
    found["engine"][name] = 3
    assert what_is_left(found) == [f"{name} is 3 with no request left"]


def test_slots_beyond_the_budget_are_named() -> None:
    assert what_is_left(stats(peak_slot_bytes=101)) == ["edge-0 has used 101 bytes of slots, allowed are 100"]


# --- links and peers ------------------------------------------------------------------------------------


def test_faults_of_links_add_up_and_end_clear() -> None:
    stall = condition_of(Fault(at_s=0, kind=Kind.STALL_CALLS, targets=("edge-0",)))
    slow = condition_of(Fault(at_s=0, kind=Kind.SLOW_LINK, targets=("edge-0",), strength=1.0))
    assert stall is not None and slow is not None
    both = merged([stall, slow, Condition(cut=True)])
    assert both.stalled == (Plane.CALLS,) and both.cut
    assert (both.delay_s, both.bytes_per_s) == (pytest.approx(0.2), 5e5)
    assert merged([]) == CLEAR


def test_only_faults_of_links_make_a_condition() -> None:
    conditions = {kind: condition_of(Fault(at_s=0, kind=kind, strength=0.5)) for kind in Kind}
    assert {kind for kind, condition in conditions.items() if condition is not None} == {
        Kind.SLOW_LINK,
        Kind.STALL_LINK,
        Kind.STALL_CALLS,
        Kind.CUT_LINK,
        Kind.CORRUPT_LINK,
        Kind.DROP_BYTES,
    }


def accepted(frames: Frames) -> bool:
    """Whether a worker's sockets would do anything but drop it."""
    limits = Limits()
    parsers = {
        FrameKind.CALL: parse_call,
        FrameKind.PREFETCH: parse_experts,
        FrameKind.ORDER: parse_order,
        FrameKind.FORGET: parse_forget,
    }
    try:
        header = parse_header(frames[0], limits)
        if header.kind is not FrameKind.PING:
            parsers[header.kind](header, frames[1:], limits)
    except FrameError:
        return False
    return True


def test_what_a_bad_peer_sends_is_malformed() -> None:
    """But for a heartbeat with a part too many, which asks for nothing that a good one does not."""
    draw = Random(1)
    messages = [malformed(draw) for _ in range(2000)]
    through = [frames for frames in messages if frames and accepted(frames)]
    assert all(parse_header(frames[0], Limits()).kind is FrameKind.PING for frames in through)
    assert len(through) < 200
