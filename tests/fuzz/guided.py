"""Coverage-guided fuzzing of the same parsers, with atheris (``pip install -e '.[fuzz]'``).

    make fuzz MINUTES=10

An input is a list of frames, each with two bytes of length before it; the corpus begins with messages of every kind.
What was found, and the corpus, stay in out/fuzz.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

Frames = list[bytes]  # as in tests.frames, which would import what is to be instrumented

FOLDER = Path("out/fuzz")
LENGTH_BYTES = 2


def encoded(frames: Frames) -> bytes:
    """A message as one input."""
    return b"".join(len(frame).to_bytes(LENGTH_BYTES, "little") + frame for frame in frames)


def decoded(data: bytes) -> Frames:
    """The message of an input; its last frame may be cut."""
    frames = []
    while len(data) >= LENGTH_BYTES:
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        frames.append(data[LENGTH_BYTES:end])
        data = data[end:]
    return frames


def main() -> None:
    """Fuzz for some minutes; leaves with an error where something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(
            "skipped: atheris is not installed (it has wheels for Linux on x86-64); `python -m tests.fuzz.million` runs"
        )
        return
    import atheris

    with atheris.instrument_imports(include=["raymoe.transport", "raymoe.experts.call"]):
        from tests.fuzz.corpus import corpus
        from tests.fuzz.target import read

    seeds = FOLDER / "corpus"
    seeds.mkdir(parents=True, exist_ok=True)
    for index, frames in enumerate(corpus(np.random.default_rng(0))):
        (seeds / f"seed-{index}").write_bytes(encoded(frames))
    seconds = round(60 * options.minutes)
    limits = [f"-max_total_time={seconds}", "-max_len=8192", "-rss_limit_mb=2048", f"-artifact_prefix={FOLDER}/"]
    atheris.Setup([sys.argv[0], str(seeds), *limits], lambda data: read(decoded(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
