"""Builds and loads the C++ kernels.

The library is built in a few seconds from native.cpp and turns.cpp, and kept in the user's cache directory under
a digest of sources, flags and processor. Where there is no compiler, as in a container's image, one is taken that was
built elsewhere for all processors of a kind: ``python -m raymoe.kernels.building`` makes it, beside the sources.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("turns.cpp"))
FLAG_SETS: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
COMMON_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
ABI = 9
COMPILERS = ("c++", "g++", "clang++")
PREBUILT = SOURCE.with_name("prebuilt.so")
BUILD_TIMEOUT_S = 120
# by machine: flags of a build for many processors, and what these must have, as Linux names it. Processors of PCs since
# about 2015; Jetson Orin, Raspberry Pi 5 and newer
PORTABLE: dict[str, tuple[list[str], frozenset[str]]] = {
    "x86_64": (["-march=x86-64-v3"], frozenset({"abm", "avx2", "bmi2", "f16c", "fma", "movbe"})),
    "aarch64": (["-march=armv8.2-a+fp16+dotprod"], frozenset({"asimddp", "asimdhp"})),
}


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library, loaded once per process; None where it can't be built or is switched off."""
    if os.environ.get("RAYMOE_NATIVE", "1") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        return _prebuilt(PREBUILT)
    said = ""
    for flags in FLAG_SETS:
        try:
            return _build(compiler, [*COMMON_FLAGS, *flags])
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            said = str(error)
        log.debug("native kernels with %s: %s", flags, said)
    wrong = next((line for line in said.splitlines() if "error" in line), said[:200])
    log.warning("the native kernels did not build with %s; decoding goes through torch: %s", compiler, wrong)
    return None


def _build(compiler: str, flags: list[str]) -> ctypes.CDLL:
    target = cache_directory() / f"native-{_digest(compiler, flags)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            built = Path(directory) / "native.so"
            _compile(compiler, flags, built)
            built.replace(target)  # atomic: processes that start together may all build it
    return _load(target)


def _compile(compiler: str, flags: list[str], output: Path) -> None:
    command = [compiler, *flags, *map(str, SOURCES), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)


def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    if loaded.raymoe_abi() != ABI:
        raise OSError(f"{library} has another interface; remove it")
    return loaded


def find_compiler() -> str | None:
    """A C++ compiler: CXX, or one on the path."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)


def build_portable(output: Path = PREBUILT) -> Path:
    """Build for all processors of this machine's kind. Raises OSError where it can't be done."""
    compiler, machine = find_compiler(), platform.machine()
    if compiler is None or machine not in PORTABLE:
        raise OSError(f"no C++ compiler, or no flags for {machine}; known are {', '.join(PORTABLE)}")
    try:
        _compile(compiler, [*COMMON_FLAGS, *PORTABLE[machine][0]], output)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{compiler} failed: {error.stderr.decode(errors='replace').strip()}") from error
    return output


def _prebuilt(library: Path) -> ctypes.CDLL | None:
    """What was built elsewhere, if it is there and this processor has all that it was built for."""
    _, needed = PORTABLE.get(platform.machine(), ([], frozenset()))
    if not library.exists():
        log.info("no C++ compiler found; decoding goes through torch")
        return None
    lacking = needed - set(_processor().split())
    if not needed or lacking:
        log.warning("the prebuilt kernels are not for this processor (%s); decoding goes through torch", lacking)
        return None
    try:
        return _load(library)
    except (OSError, AttributeError) as error:
        log.warning("the prebuilt kernels do not load; decoding goes through torch: %s", error)
        return None


def cache_directory() -> Path:
    """Where built kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymoe"


def _digest(compiler: str, flags: list[str]) -> str:
    parts = [
        *(source.read_bytes() for source in SOURCES),
        compiler.encode(),
        " ".join(flags).encode(),
        _processor().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on: the cache may lie on a disk that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


if __name__ == "__main__":
    print(build_portable())
