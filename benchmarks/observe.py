"""What it costs to be looked at: metrics, maps of experts, the timeline, and one open page.

Everything is in one process (one local device), which is the dearest case: whoever looks shares the interpreter with
the trunk and the experts. The page is a thread that asks what the server would ask the engine for one open page.

    python -m benchmarks.observe --json out/observe.json

overhead_profile is the time spent in these calls over the time of the decode steps; overhead_paired how much slower
decoding is, piece by piece in turn with one where nobody looks and nothing is counted. overhead_paired_spare_core
leaves whoever looks a core of their own, which is also a quieter measurement.
"""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray

from benchmarks.harness import Figure, arguments, figure, report
from raymoe.actors.session import Session
from raymoe.config import ClusterConfig
from raymoe.engine.watch import WatchedScheduler
from raymoe.launcher import Moe
from raymoe.observe.sink import Silent
from raymoe.types import DeviceName

LOOK_S = 1.0
TOKENS = 120  # more than a second: a look at least falls into every piece
ROUNDS, QUICK_ROUNDS = 40, 8
PROMPT = list(range(200, 216))
CONFIG = {
    "model": {"dtype": "float32"},
    "devices": [{"name": "edge-0", "transport": "local", "slot_memory": "12MiB"}],
    "scheduling": {"policy": "importance"},
}


class Page:
    """One open page, while it is entered: asks like the server does for it, once a second."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._stop = threading.Event()

    def __enter__(self) -> "Page":
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        looks = 0
        while True:
            self._session.stats(False).as_dict()
            self._session.observer.residency()
            if looks % 2 == 0:
                self._session.observer.timeline()
            looks += 1
            if self._stop.wait(LOOK_S):
                return


class Unseen:
    """In place of ``Usage``: counts nothing."""

    def note(self, layer: int, experts_P: np.ndarray) -> None:
        """Nothing."""


@contextlib.contextmanager
def unseen(session: Session) -> Iterator[None]:
    """Nobody looks, and nothing is counted for those who might."""
    engine: Any = session.service._engine
    worker: Any = session._local[DeviceName("edge-0")]
    publisher: Any = session.observer._publisher
    sink, usage, publish = engine.sink, worker._usage, publisher.publish
    engine.sink, worker._usage, publisher.publish = Silent(), Unseen(), lambda: None
    try:
        yield
    finally:
        engine.sink, worker._usage, publisher.publish = sink, usage, publish


def tpot_s(session: Session, tokens: int) -> float:
    """Seconds per decode step."""
    before = session.service.report()
    session.service.generate(PROMPT, max_tokens=tokens, temperature=0.0, ignore_eos=True)
    after = session.service.report()
    return (after.decode_s - before.decode_s) / (after.steps - before.steps)


class Timed:
    """Adds up the time spent in calls of methods, while it is entered.

    On the engine's thread that is the time that passes; on others the processor's, for waiting costs nobody anything.
    """

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._stack = contextlib.ExitStack()
        self._within = threading.local()

    def watch(self, owner: Any, name: str, label: str, clock: Callable[[], float]) -> None:
        """Time ``owner.name`` under a label. What it calls that is timed as well counts once."""
        inner = getattr(owner, name)
        own = name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._within, "busy", False):
                return inner(*args, **kwargs)
            self._within.busy = True
            start = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent_s[label] = self.spent_s.get(label, 0.0) + clock() - start
                self._within.busy = False

        setattr(owner, name, timed)
        self._stack.callback(setattr, owner, name, inner) if own else self._stack.callback(delattr, owner, name)

    def __enter__(self) -> "Timed":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def profiled(session: Session, tokens: int) -> tuple[dict[str, float], float]:
    """By what, the seconds spent on being looked at while an answer is made; and the answer's decode time."""
    engine: Any = session.service._engine
    worker: Any = session._local[DeviceName("edge-0")]
    passes, busy = time.perf_counter, time.thread_time
    with Timed() as timed, Page(session):
        for name in ("submitted", "admitted", "token", "ended", "step"):
            timed.watch(engine.sink, name, "sink", passes)
        timed.watch(worker._usage, "note", "use counts", passes)
        timed.watch(session.service.experts.dispatcher, "gave_way", "substitutions by device", passes)
        for bay in worker._bays:
            timed.watch(bay, "_asked_for", "prefetch counts", passes)
        timed.watch(WatchedScheduler, "_close", "spans of recorded steps", passes)
        timed.watch(session.observer._publisher, "publish", "metrics", busy)
        for name in ("residency", "timeline"):
            timed.watch(session.observer, name, f"page: {name}", busy)
        timed.watch(session, "stats", "page: stats", busy)
        before = session.service.report()
        session.service.generate(PROMPT, max_tokens=tokens, temperature=0.0, ignore_eos=True)
        after = session.service.report()
    return timed.spent_s, after.decode_s - before.decode_s


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95%, by resampling: single pieces are slowed by whatever else the machine does."""
    drawn = np.random.default_rng(0).choice(values, size=(4000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def paired(session: Session, tokens: int, rounds: int) -> list[float]:
    """TPOT while looked at over TPOT unseen, less 1, piece by piece in turn; who is first changes every round."""

    def seen() -> float:
        with Page(session):
            return tpot_s(session, tokens)

    def hidden() -> float:
        with unseen(session):
            return tpot_s(session, tokens)

    seen(), hidden()
    found = []
    for turn in range(rounds):
        pair = {}
        for one in (seen, hidden) if turn % 2 else (hidden, seen):
            pair[one] = one()
        found.append(pair[seen] / pair[hidden] - 1.0)
    return found


def profile(session: Session, runs: int) -> Figure:
    """Time spent on being looked at, in percent of a decode step."""
    shares: list[float] = []
    parts: dict[str, float] = {}
    decode_s = 0.0
    for _ in range(runs):
        spent_s, took_s = profiled(session, TOKENS)
        shares.append(100 * sum(spent_s.values()) / took_s)
        decode_s += took_s
        for label, seconds in spent_s.items():
            parts[label] = parts.get(label, 0.0) + seconds
    split = ", ".join(f"{label} {100 * seconds / decode_s:.2f}" for label, seconds in sorted(parts.items()))
    return figure("overhead_profile", shares, "% of TPOT", f"asked < 2; {split}")


def difference(session: Session, name: str, rounds: int) -> Figure:
    """How much slower it is while looked at, in percent of a decode step."""
    differences = [100 * value for value in paired(session, TOKENS, rounds)]
    return Figure(
        name=name,
        value=statistics.median(differences),
        unit="% of TPOT",
        n=len(differences),
        spread=interval(differences),
        note=f"asked < 2; median and its 95% interval; mean {statistics.fmean(differences):.2f}",
    )


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    found = []
    for name, threads in (("overhead_paired", None), ("overhead_paired_spare_core", 1)):
        config = ClusterConfig.model_validate(CONFIG | {"trunk": {"threads": threads}})
        session = Session(config, f"observe-benchmark-{threads}")
        with Moe(session, owns_ray=False):
            tpot_s(session, 40)
            if threads is None:
                found.append(profile(session, 3 if options.quick else 6))
            found.append(difference(session, name, rounds))
    ray.shutdown()
    report("What it costs to be looked at", found, {"config": CONFIG, "look_s": LOOK_S}, options.json)


if __name__ == "__main__":
    main()
