"""A schedule of faults: drawn from a seed, printed, written, and replayed. Pure: no clock, process or socket.

Two rules hold in every drawn schedule, for experts have two owners: devices are taken away one at a time, and the next
one only when the last should be back with its experts; and only kinds that are meant to take away more than one device.
Faults that take no device away may come at any time, so also while a device is gone.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any, Literal

TOGETHER = 0.15  # of all faults come with the one before
TOGETHER_WITHIN_S = 0.3
PATIENT = 0.4  # of what falls into the time of another waits for its end, so that it may be of any kind


class Kind(StrEnum):
    """What is done. ``strength`` says how much where that makes sense."""

    KILL_WORKER = "kill_worker"  # its process, by SIGKILL
    PAUSE_WORKER = "pause_worker"  # its process, by SIGSTOP, then SIGCONT
    KILL_NODE = "kill_node"  # a raylet with its worker; another node of the same kind joins afterwards
    KILL_OWNERS = "kill_owners"  # two workers at once, so that experts are lost for a while
    SLOW_LINK = "slow_link"  # every chunk waits, and passes at a low rate
    STALL_LINK = "stall_link"  # no byte passes
    STALL_CALLS = "stall_calls"  # no byte of expert calls passes, while heartbeats do
    CUT_LINK = "cut_link"  # connections are reset, new ones too
    CORRUPT_LINK = "corrupt_link"  # bytes are changed
    DROP_BYTES = "drop_bytes"  # chunks are missing
    FLOOD_ADMITTED = "flood_admitted"  # malformed messages from a peer whose key the worker admits
    FLOOD_STRANGER = "flood_stranger"  # connections and bytes from one whose key it does not
    KILL_PLACEMENT = "kill_placement"  # the placement actor's process
    KILL_SHADOW = "kill_shadow"  # the shadow's
    KILL_ENGINE = "kill_engine"  # the replica's: what it was answering ends with an error


Takes = Literal["nothing", "a device", "two devices", "everything"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a kind is drawn.

    Attributes:
        weight: how often, beside the others.
        lasts_s: shortest and longest duration.
        takes: what is away meanwhile.
        back_s: after which all should be as before, once the fault has ended: what was seen on two cores.
        of_link: it needs no process, so that it may hit a device that is gone already.
    """

    weight: float
    lasts_s: tuple[float, float] = (0.0, 0.0)
    takes: Takes = "nothing"
    back_s: float = 0.0
    of_link: bool = False


RULES: dict[Kind, Rule] = {
    Kind.KILL_WORKER: Rule(weight=9, takes="a device", back_s=20.0),
    Kind.PAUSE_WORKER: Rule(weight=7, lasts_s=(0.3, 5.0), takes="a device", back_s=2.0),
    Kind.KILL_NODE: Rule(weight=2, lasts_s=(2.0, 8.0), takes="a device", back_s=30.0),
    Kind.KILL_OWNERS: Rule(weight=1.5, takes="two devices", back_s=25.0),
    Kind.SLOW_LINK: Rule(weight=3, lasts_s=(0.5, 5.0), takes="a device", back_s=1.0, of_link=True),
    Kind.STALL_LINK: Rule(weight=5, lasts_s=(0.3, 5.0), takes="a device", back_s=2.0, of_link=True),
    Kind.STALL_CALLS: Rule(weight=4, lasts_s=(0.3, 3.0), takes="a device", back_s=2.0, of_link=True),
    Kind.CUT_LINK: Rule(weight=5, lasts_s=(0.1, 3.0), takes="a device", back_s=2.0, of_link=True),
    Kind.CORRUPT_LINK: Rule(weight=4, lasts_s=(0.3, 2.0), takes="a device", back_s=2.0, of_link=True),
    Kind.DROP_BYTES: Rule(weight=4, lasts_s=(0.3, 2.0), takes="a device", back_s=2.0, of_link=True),
    Kind.FLOOD_ADMITTED: Rule(weight=2, lasts_s=(0.5, 2.0)),
    Kind.FLOOD_STRANGER: Rule(weight=1.5, lasts_s=(0.5, 2.0)),
    Kind.KILL_PLACEMENT: Rule(weight=2),
    Kind.KILL_SHADOW: Rule(weight=1.5),
    Kind.KILL_ENGINE: Rule(weight=1.2, takes="everything", back_s=40.0),
}
ACTORS = (Kind.KILL_PLACEMENT, Kind.KILL_SHADOW, Kind.KILL_ENGINE)  # what they hit is no device
FLOODS = (Kind.FLOOD_ADMITTED, Kind.FLOOD_STRANGER)
ANSWERS_MAY_FAIL = (Kind.KILL_OWNERS, Kind.KILL_ENGINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        at_s: earliest time, since the beginning; whoever plays it waits longer where devices are not back yet.
        targets: devices; none where an actor is hit.
        lasts_s: from its beginning to its end; 0 where it is over at once.
        strength: within 0 and 1.
        together: it comes with the one before, whatever that has taken away.
    """

    at_s: float
    kind: Kind
    targets: tuple[str, ...] = ()
    lasts_s: float = 0.0
    strength: float = 0.5
    together: bool = False

    def __str__(self) -> str:
        targets = " and ".join(self.targets) or "-"
        lasts = f"for {self.lasts_s:.1f} s, strength {self.strength:.2f}" if self.lasts_s else ""
        return f"{self.at_s:8.1f} s  {'+' if self.together else ' '} {self.kind:14s} {targets:16s} {lasts}".rstrip()

    @property
    def rule(self) -> Rule:
        """Of its kind."""
        return RULES[self.kind]


def draw(
    *, seed: int, minutes: float, faults: int, devices: Sequence[str], kinds: Iterable[Kind] = tuple(Kind)
) -> tuple[Fault, ...]:
    """So many faults over about so many minutes; longer where the kinds leave no other choice.

    Raises ValueError where there is nothing to draw from.
    """
    kinds = tuple(kind for kind in Kind if kind in set(kinds))
    if not kinds or faults < 1 or minutes <= 0 or len(devices) < 2:
        raise ValueError(
            f"nothing to draw from: {len(kinds)} kinds, {faults} faults, {minutes:g} minutes, {len(devices)} devices; "
            "at least 1, 1, more than 0, and 2 are needed"
        )
    random, gap_s = Random(seed), 60.0 * minutes / faults
    drawn: list[Fault] = []
    at_s = taken_until_s = 0.0
    while len(drawn) < faults:
        if drawn and random.random() < TOGETHER:
            beside = _beside(random, drawn[-1], at_s + random.uniform(0.0, TOGETHER_WITHIN_S), devices, kinds)
            if beside is not None:
                drawn.append(beside)
                at_s = beside.at_s
                taken_until_s = max(taken_until_s, _back_s(beside))
                continue
        at_s += gap_s * random.uniform(0.4, 1.6)
        free = [kind for kind in kinds if RULES[kind].takes == "nothing"]
        if at_s >= taken_until_s or not free or random.random() < PATIENT:
            at_s, free = max(at_s, taken_until_s), list(kinds)
        drawn.append(_one(random, free, at_s, devices))
        taken_until_s = max(taken_until_s, _back_s(drawn[-1]))
    return tuple(drawn)


def _beside(random: Random, first: Fault, at_s: float, devices: Sequence[str], kinds: Sequence[Kind]) -> Fault | None:
    """What may come with ``first``: nothing that takes another device, and nothing of its own kind."""
    allowed = [kind for kind in kinds if kind is not first.kind and RULES[kind].takes == "nothing"]
    if first.rule.takes == "a device":
        allowed += [kind for kind in kinds if kind is not first.kind and RULES[kind].of_link]
    if first.together or not allowed:
        return None
    same = first.targets if first.rule.takes == "a device" else devices
    return _one(random, allowed, at_s, devices, same, together=True)


def _one(
    random: Random,
    kinds: Sequence[Kind],
    at_s: float,
    devices: Sequence[str],
    same: Sequence[str] | None = None,
    *,
    together: bool = False,
) -> Fault:
    kind = random.choices(kinds, weights=[RULES[kind].weight for kind in kinds])[0]
    rule = RULES[kind]
    count = 0 if kind in ACTORS else 2 if rule.takes == "two devices" else 1
    among = same if same is not None and rule.takes != "nothing" else devices
    return Fault(
        at_s=round(at_s, 3),
        kind=kind,
        targets=tuple(random.sample(list(among), count)),
        lasts_s=round(random.uniform(*rule.lasts_s), 3),
        strength=round(random.random(), 3),
        together=together,
    )


def _back_s(fault: Fault) -> float:
    """When what it takes should be back; 0 where it takes nothing."""
    return fault.at_s + fault.lasts_s + fault.rule.back_s if fault.rule.takes != "nothing" else 0.0


def write(file: Path, faults: Sequence[Fault], seed: int) -> None:
    """As JSON, one fault a line, that ``read`` reads again."""
    lines = ",\n".join(json.dumps(asdict(fault)) for fault in faults)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"seed": {seed}, "faults": [\n{lines}\n]}}\n')


def read(file: Path) -> tuple[tuple[Fault, ...], int]:
    """The faults of a file, and the seed that goes with them. Raises ValueError that names what is wrong."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        faults = tuple(
            Fault(**{**fault, "kind": Kind(fault["kind"]), "targets": tuple(fault["targets"])})
            for fault in found["faults"]
        )
        return faults, int(found["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no schedule as `python -m tests.chaos` writes it: {error!r}") from error
