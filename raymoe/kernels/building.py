"""Builds and loads the C++ kernels.

The library is built in about a second from ``native.cpp`` and kept in the user's cache directory under a digest of
source, flags and processor.
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
FLAG_SETS: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])
COMMON_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast"]
ABI = 8
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library, loaded once per process; None where it can't be built or is switched off."""
    if os.environ.get("RAYMOE_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.info("no C++ compiler found; decoding goes through torch")
        return None
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
            subprocess.run(
                [compiler, *flags, str(SOURCE), "-o", str(built)],
                check=True,
                capture_output=True,
                timeout=120,
            )
            built.replace(target)  # atomic: processes that start together may all build it
    library = ctypes.CDLL(str(target))
    if library.raymoe_abi() != ABI:
        raise OSError(f"{target} has another interface; remove it")
    return library


def cache_directory() -> Path:
    """Where built kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raymoe"


def _digest(compiler: str, flags: list[str]) -> str:
    parts = [SOURCE.read_bytes(), compiler.encode(), " ".join(flags).encode(), _processor().encode()]
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
