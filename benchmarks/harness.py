"""What all benchmarks share: figures with spread, a table, JSON, and timing of variants side by side.

Variants are measured in turn within one process tree (A B C A B C …) and compared round by round, so that a
machine whose speed drifts does not favour one of them. Absolute times are printed for orientation only.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table


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


def in_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
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
    """Print the table and write the JSON."""
    table = Table(title=title)
    for column in ("figure", "value", "unit", "spread", "n", "note"):
        table.add_column(column, justify="right" if column in ("value", "n") else "left")
    for item in figures:
        low, high = item.spread
        table.add_row(item.name, f"{item.value:.3g}", item.unit, f"{low:.3g} … {high:.3g}", str(item.n), item.note)
    Console(width=max(110, Console().width)).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"figures": [asdict(item) for item in figures], "machine": machine(), "settings": settings}
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")
