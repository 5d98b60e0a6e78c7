"""Time per token over an emulated link: importance scheduling against LRU on-demand loading, part by part.

The link is made so slow that plain LRU at the same slot memory waits for loads in 70% of its time, as in the paper's
profile; a host computes an expert in a third of a load. Both are imitated, computing is real. Every variant decodes
the same held-out text in turns on one trunk, each with slots of its own that stay warm from text to text.

B rows decoded in lockstep.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from benchmarks.roofline import floor_s, needed_bytes
from benchmarks.scheduling.setup import DOMAINS, Bench, EmulatedLinkTimes
from raymoe.config import SchedulingConfig
from raymoe.types import Routing

WAITING = 0.7  # share of its time that LRU on-demand waits for loads
HOST_SHARE = 1 / 3  # of a load's time, for an expert on the host
SLOTS = 2  # x top-k experts per layer

LRU, RESIDENT = "LRU on-demand", "all resident"
FULL = "importance (default)"
BASE = SchedulingConfig(policy="importance", alpha=0.0, prefetch="none", host_assist=False)
DEFAULT = SchedulingConfig(policy="importance")


def variants(part: str) -> dict[str, SchedulingConfig]:
    """Schedulings by name: the ladder of components, and what was left out or put in its place."""
    ladder = {
        LRU: SchedulingConfig(policy="on_demand"),
        "score eviction": BASE,
        "+ substitution": BASE.changed({"alpha": DEFAULT.alpha}),
        "+ prefetch": BASE.changed({"alpha": DEFAULT.alpha, "prefetch": "gate"}),
        FULL: DEFAULT,
        RESIDENT: SchedulingConfig(policy="all_resident"),
    }
    others = {
        "default, alpha 0": DEFAULT.changed({"alpha": 0.0}),
        "default, no prefetch": DEFAULT.changed({"prefetch": "none"}),
        "default, resident forecast": DEFAULT.changed({"prefetch": "resident"}),
        "default, published walk": DEFAULT,
        "default, window 8": DEFAULT.changed({"score_window": 8}),
        "default, LRU eviction": DEFAULT.changed({"eviction": "lru"}),
        "default, LFU eviction": DEFAULT.changed({"eviction": "lfu"}),
    }
    few = (LRU, FULL, RESIDENT)
    return {"ladder": ladder, "all": ladder | others, "few": {name: ladder[name] for name in few}}[part]


@dataclass(slots=True)
class Timed:
    """What one variant took: per text its mean step and the bytes a step had to load, and totals."""

    tpot_s: list[float] = field(default_factory=list)
    moved_bytes: list[float] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    routing: Routing = field(default_factory=Routing)

    @property
    def perplexity(self) -> float:
        """Over all texts."""
        return float(np.exp(np.concatenate([nll.ravel() for nll in self.nll]).mean(dtype=np.float64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of all variants."""

    link: EmulatedLinkTimes
    link_bytes_per_s: float
    loads_per_layer: float
    by_name: dict[str, Timed]

    def reduction(self, name: str) -> list[float]:
        """By how much less time per token than LRU, text by text."""
        pairs = zip(self.by_name[name].tpot_s, self.by_name[LRU].tpot_s, strict=True)
        return [1 - mine / lru for mine, lru in pairs]

    def roofline_fraction(self, name: str) -> list[float]:
        """Share of the roofline of its own loads, text by text; everything resident is the computing."""
        mine, resident_s = self.by_name[name], min(self.by_name[RESIDENT].tpot_s)
        return [
            floor_s(resident_s=resident_s, moved_bytes=moved, link_bytes_per_s=self.link_bytes_per_s) / took_s
            for moved, took_s in zip(mine.moved_bytes, mine.tpot_s, strict=True)
        ]


def batches(bench: Bench, rows: int, tokens: int, count: int) -> list[list[list[int]]]:
    """``count`` batches of held-out text, every row of another domain or place."""
    result = []
    for number in range(count):
        picks = [number * rows + row for row in range(rows)]
        result.append([bench.text(DOMAINS[p % len(DOMAINS)], tokens, tokens * (p // len(DOMAINS))) for p in picks])
    return result


def calibrate(bench: Bench, texts: list[list[list[int]]]) -> tuple[EmulatedLinkTimes, float]:
    """A link over which LRU waits as long as it should; and LRU's loads per layer and step."""
    slots = SLOTS * bench.top_k
    with (
        bench.variant(SchedulingConfig(policy="all_resident"), slots=bench.experts) as resident,
        bench.variant(SchedulingConfig(policy="on_demand"), slots=slots) as lru,
    ):
        seconds, loads, steps = [], 0, 0
        for number, ids_BT in enumerate(texts):
            took = bench.run(resident, ids_BT).step_s
            routing = bench.run(lru, ids_BT).routing
            if number:  # the first warms up
                seconds.append(float(took.mean()))
                loads += routing.loads
                steps += len(took)
    per_step = loads / steps
    load_s = WAITING / (1 - WAITING) * float(np.median(seconds)) / per_step
    return EmulatedLinkTimes(load_s=load_s, host_s=HOST_SHARE * load_s), per_step / bench.layers


def measure(
    bench: Bench, part: str, rows: int, tokens: int, count: int, progress: Callable[[str], None] = lambda text: None
) -> Measured:
    """Time every variant on ``count`` texts (after one that warms up), in turns."""
    texts = batches(bench, rows, tokens, count + 1)
    link, loads = calibrate(bench, texts[:4])
    progress(f"batch {rows}: a load takes {1e3 * link.load_s:.2f} ms, LRU makes {loads:.2f} per layer")
    timed = {name: Timed() for name in variants(part)}
    with ExitStack() as stack:
        started = {name: stack.enter_context(start(bench, name, each, link)) for name, each in variants(part).items()}
        for number, ids_BT in enumerate(texts):
            for name, variant in started.items():
                result = bench.run(variant, ids_BT)
                if number:
                    timed[name].tpot_s.append(float(result.step_s.mean()))
                    timed[name].moved_bytes.append(
                        needed_bytes(result.routing, bench.expert_bytes) / len(result.step_s)
                    )
                    timed[name].nll.append(result.nll_BN)
                    timed[name].routing += result.routing
            progress(f"batch {rows}: text {number} of {count}")
    rate = bench.expert_bytes / link.load_s
    return Measured(link=link, link_bytes_per_s=rate, loads_per_layer=loads, by_name=timed)


def start(bench: Bench, name: str, scheduling: SchedulingConfig, link: EmulatedLinkTimes):
    """A variant with its slots: everything resident needs no link."""
    if name == RESIDENT:
        return bench.variant(scheduling, slots=bench.experts)
    return bench.variant(scheduling, slots=SLOTS * bench.top_k, link=link, walk=name.endswith("walk"))
