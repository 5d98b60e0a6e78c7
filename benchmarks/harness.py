"""What all benchmarks share: figures with spread, a table, JSON, and timing of variants side by side.

Variants are measured in turn within one process tree (A B C A B C …) and compared round by round, so that a
machine whose speed drifts does not favour one of them. Absolute times are printed for orientation only. Time that the
machine's host takes away from it is reported with every benchmark, and rounds that lost much of it may be repeated.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch
from rich.console import Console
from rich.table import Table

from raymoe.whole_file import write_whole

MOST_STOLEN = 0.05  # of a round: a shared host in calm minutes takes 0 to 4%, in others a third and more
MOST_REPEATS = 3  # of a round: a host that is busy for longer than that stays so for the whole benchmark
STEAL_COLUMN = 7  # of user, nice, system, idle, iowait, irq, softirq, steal, and guests, who are in the first two

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number: the median of ``n`` values, and their range as (low, high)."""

    name: str
    value: float
    unit: str
    n: int
    spread: tuple[float, float]
    note: str = ""


def figure(name: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """The median of ``values`` with their range."""
    spread = (min(values), max(values))
    return Figure(name=name, value=statistics.median(values), unit=unit, n=len(values), spread=spread, note=note)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """``above / below`` round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorTime:
    """Ticks of all processors since the machine started, busy or not, and those that its host gave to others."""

    total: int = 0
    stolen: int = 0


def processor_time(path: Path = Path("/proc/stat")) -> ProcessorTime:
    """As the system counts it; nothing where it counts none, or none that was stolen."""
    try:
        name, *ticks = path.read_text().splitlines()[0].split()
    except (OSError, IndexError, ValueError):
        return ProcessorTime()
    columns = [int(value) for value in ticks[: STEAL_COLUMN + 1]]
    if name != "cpu" or len(columns) <= STEAL_COLUMN:
        return ProcessorTime()
    return ProcessorTime(total=sum(columns), stolen=columns[STEAL_COLUMN])


class StolenTime:
    """The share of this machine's processor time that its host took away since this was made.

    Args:
        read: what the system has counted so far.
    """

    def __init__(self, read: Callable[[], ProcessorTime] = processor_time) -> None:
        self._read = read
        self._begin = read()

    def share(self) -> float:
        """Of all processors' time until now, from 0 to 1; 0 where the system does not count it."""
        now = self._read()
        passed = now.total - self._begin.total
        return (now.stolen - self._begin.stolen) / passed if passed > 0 else 0.0


SINCE_START = StolenTime()  # begins with the import, so that no benchmark can forget to begin it


@dataclass(frozen=True, slots=True, kw_only=True)
class Round(Generic[T]):
    """What one round over all variants gave, and the share of the processors' time that was stolen meanwhile."""

    result: T
    stolen: float

    @property
    def is_disturbed(self) -> bool:
        """Whether its times are worth little."""
        return self.stolen > MOST_STOLEN


def least_disturbed(run: Callable[[], T], read: Callable[[], ProcessorTime] = processor_time) -> Round[T]:
    """Run a round, again where it was disturbed, and keep the least disturbed one.

    What is repeated and kept depends on the host alone, never on the result: choosing by the result would be choosing
    the result.
    """
    rounds: list[Round[T]] = []
    while not rounds or (rounds[-1].is_disturbed and len(rounds) <= MOST_REPEATS):
        stolen = StolenTime(read)
        result = run()
        rounds.append(Round(result=result, stolen=stolen.share()))
    return min(rounds, key=lambda each: each.stolen)


def in_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every variant once to warm up, then ``rounds`` times in turn; returns what each returned."""
    for variant in variants.values():
        variant()
    results: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            results[name].append(variant())
    return results


def read_bandwidth(threads: int, megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes per second that this machine reads from memory: a sum over an array far larger than its caches."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(megabytes * 2**20 // 4)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def arguments(description: str) -> argparse.Namespace:
    """``--json`` and ``--quick``, as every benchmark takes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="the named figures only, in under 8 minutes on 2 cores")
    return parser.parse_args()


def report(title: str, figures: list[Figure], settings: dict[str, Any], path: Path | None) -> None:
    """Print the table and write the JSON, both with the share of processor time that the host stole since the start."""
    stolen = SINCE_START.share()
    table = Table(title=title, caption=f"stolen by the host: {stolen:.0%}")
    for column in ("figure", "value", "unit", "spread", "n", "note"):
        table.add_column(column, justify="right" if column in ("value", "n") else "left", no_wrap=column == "figure")
    for item in figures:
        low, high = item.spread
        table.add_row(item.name, f"{item.value:.3g}", item.unit, f"{low:.3g} … {high:.3g}", str(item.n), item.note)
    Console(width=max(140, Console().width)).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "figures": [asdict(item) for item in figures],
            "machine": machine(),
            "settings": settings | {"stolen_by_host": stolen},
        }
        write_whole(path, json.dumps(content, indent=2, default=str) + "\n")
