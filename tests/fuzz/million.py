"""A million mutated messages through every parser of the data plane, without any further package.

    python -m tests.fuzz.million --seed 1

Fails with the message (and the seed that makes it again) where anything but FrameError is raised, where something
beyond its limits is handed on, or where memory grows beyond its bound. The process may take no more than a little
address space beyond what it has at the start, so that an allocation by a number in a header fails as well, even if it
is never touched.
"""

import argparse
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.frames import Frames
from tests.fuzz.corpus import corpus
from tests.fuzz.mutations import mutated
from tests.fuzz.target import PARSERS, read, read_measured

FRAMES = 1_000_000
MEASURED_EVERY = 50  # messages: tracing memory makes parsing several times slower
OTHER_PARSER_EVERY = 10
ROOM_BYTES = 256 << 20  # of address space
GROWTH_BYTES = 64 << 20  # of resident memory, over the whole run


def hammer(count: int, seed: int) -> Counter[str]:
    """Parse ``count`` mutated messages. Returns how many were refused, and how many understood, by kind."""
    rng = random.Random(seed)
    whole = corpus(np.random.default_rng(seed))
    outcomes: Counter[str] = Counter()
    parsers = list(PARSERS.values())
    for number in range(count):
        frames = mutated(whole, rng)
        parser = rng.choice(parsers) if number % OTHER_PARSER_EVERY == 0 else None
        try:
            parsed = (read if number % MEASURED_EVERY else read_measured)(frames, parser)
        except BaseException as error:
            error.add_note(f"message {number:,} of seed {seed}: {shown(frames)}")
            raise
        outcomes["refused" if parsed is None else type(parsed).__name__] += 1
    return outcomes


def shown(frames: Frames) -> list[str]:
    """A message in a form that can be pasted into a test."""
    return [frame.hex() for frame in frames]


def bound_address_space() -> None:
    """Let this process grow by ``ROOM_BYTES`` and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def peak_bytes() -> int:
    """Most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=FRAMES, help="messages to parse")
    parser.add_argument("--seed", type=int, default=1, help="makes a run repeatable")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    hammer(2_000, options.seed)  # what is allocated once
    bound_address_space()
    before, start_s = peak_bytes(), time.perf_counter()
    outcomes = hammer(options.frames, options.seed)
    took_s, grown = time.perf_counter() - start_s, peak_bytes() - before
    assert grown <= GROWTH_BYTES, f"resident memory grew by {grown:,} bytes; allowed are {GROWTH_BYTES:,}"
    figures: dict[str, Any] = {
        "seed": options.seed,
        "frames": options.frames,
        "frames_per_s": round(options.frames / took_s),
        "refused": outcomes.pop("refused"),
        "understood": dict(outcomes.most_common()),
        "grown_bytes": grown,
    }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
