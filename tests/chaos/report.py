"""What a run has shown: how long users waited at each fault, as a table and as JSON. Pure."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tests.chaos.client import Asked
from tests.chaos.schedule import ANSWERS_MAY_FAIL, FLOODS, Fault

AFTERWARDS_S = 1.0  # what comes within this time after the end of a fault that is whole at once is still its effect


@dataclass(slots=True, kw_only=True)
class Happened:
    """A fault that was played. Times are of the monotonic clock, in seconds.

    Attributes:
        begin_s, end_s: of the fault itself.
        whole_s: when everything was there again afterwards; None where nobody looked, or it never was.
    """

    fault: Fault
    begin_s: float
    end_s: float
    whole_s: float | None = None

    @property
    def until_s(self) -> float:
        """Until when what users see is put down to it. What only floods leaves nothing to come back."""
        afterwards_s = self.end_s + AFTERWARDS_S
        return afterwards_s if self.fault.kind in FLOODS else max(afterwards_s, self.whole_s or 0.0)


def recovery_s(happened: Happened, asked: Sequence[Asked]) -> float:
    """The longest that anybody waited for the next token because of a fault; 0 where nobody was waiting.

    A wait is from one token of a streamed answer to its next one, or from the fault to that where the fault came later,
    and counts where it falls at least in part within the fault and the time until everything was there again. A request
    that was under way when the fault came waits for its first token as well. One that ended with an error waits for
    the next token that anybody got.
    """
    everyones = sorted(time_s for one in asked for time_s in one.times_s)
    longest = 0.0
    for one in asked:
        if not one.streamed or one.begin_s > happened.until_s or one.end_s < happened.begin_s:
            continue
        times_s = list(one.times_s)
        if one.begin_s < happened.begin_s:
            times_s.insert(0, one.begin_s)
        if one.outcome != "answered" and times_s:
            place = bisect_right(everyones, one.end_s)
            times_s.append(everyones[place] if place < len(everyones) else one.end_s)
        for before_s, after_s in pairwise(times_s):
            if after_s > happened.begin_s and before_s < happened.until_s:
                longest = max(longest, after_s - max(before_s, happened.begin_s))
    return longest


def needless_errors(asked: Sequence[Asked], happenings: Sequence[Happened]) -> list[str]:
    """Requests that ended with a proper error although no fault that may cost an answer came in their time."""
    costly = [one for one in happenings if one.fault.kind in ANSWERS_MAY_FAIL]
    found = []
    for one in asked:
        if one.outcome == "error" and not any(
            one.begin_s <= fault.until_s and one.end_s >= fault.begin_s for fault in costly
        ):
            found.append(f"a request failed with {one.said} though experts had owners and the engine was there")
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    return {
        "p50_s": round(float(np.percentile(values, 50)), 3),
        "p99_s": round(float(np.percentile(values, 99)), 3),
        "max_s": round(max(values), 3),
    }


def summary(
    asked: Sequence[Asked], happenings: Sequence[Happened], *, wrong_tokens: int, failures: Sequence[str]
) -> dict[str, Any]:
    """Everything, for JSON."""
    outcomes = Counter(one.outcome for one in asked)
    recoveries: dict[str, list[float]] = defaultdict(list)
    wholes: dict[str, list[float]] = defaultdict(list)
    played = []
    for one in happenings:
        waited_s = recovery_s(one, asked)
        whole_s = None if one.whole_s is None else round(one.whole_s - one.begin_s, 3)
        recoveries[one.fault.kind].append(waited_s)
        if whole_s is not None:
            wholes[one.fault.kind].append(whole_s)
        played.append({"fault": str(one.fault).strip(), "recovery_s": round(waited_s, 3), "whole_again_s": whole_s})
    everything = [value for values in recoveries.values() for value in values]
    return {
        "faults": len(happenings),
        "requests": len(asked),
        "answered": outcomes["answered"],
        "wrong_tokens": wrong_tokens,
        "hangs": outcomes["hang"],
        "improper": outcomes["improper"],
        "errors": dict(Counter(one.said for one in asked if one.outcome == "error")),
        "tokens": sum(len(one.texts) for one in asked),
        "recovery_p50_s": percentiles(everything)["p50_s"] if everything else None,
        "recovery_p99_s": percentiles(everything)["p99_s"] if everything else None,
        "by_kind": {
            kind: {
                "faults": len(values),
                "recovery": percentiles(values),
                "whole_again": percentiles(wholes[kind]) if wholes[kind] else None,
            }
            for kind, values in sorted(recoveries.items())
        },
        "failures": list(failures),
        "played": played,
    }


def table(found: Mapping[str, Any]) -> str:
    """The summary for people."""
    head = f"{'fault':16s}{'number':>8s}   {'wait for the next token, s':32s}{'all there again, s':s}"
    lines = [head, f"{'':27s}{'p50':>8s}{'p99':>8s}{'max':>8s}   {'p50':>8s}{'p99':>8s}{'max':>8s}"]
    for kind, row in found["by_kind"].items():
        numbers = [row["recovery"], row["whole_again"]]
        cells = ["".join(f"{value:8.2f}" for value in number.values()) if number else "" for number in numbers]
        lines.append(f"{kind:16s}{row['faults']:8d}   {cells[0]}   {cells[1]}".rstrip())
    lines.append(
        f"{found['faults']} faults; {found['requests']} requests: {found['answered']} answered, errors "
        f"{found['errors'] or 'none'}, improper {found['improper']}, hangs {found['hangs']}, wrong tokens "
        f"{found['wrong_tokens']} of {found['tokens']}"
    )
    return "\n".join(lines)
