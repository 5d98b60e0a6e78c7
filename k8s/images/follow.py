"""Follow a Dockerfile without a container engine: each RUN, COPY, ENV … of each stage, in chroots of their own.

    python k8s/images/follow.py k8s/images/Dockerfile --base BASE.tar --work DIR [--arg NAME=VALUE] [--carry PATH]
                                [--then COMMAND]

It shows that the lines work and what the image holds, not that it runs on a container runtime. Every image in a FROM is
taken for the same one: an archive of a system with Python, such as Debian's:

    mmdebstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm BASE.tar

Needs root, for chroot and mounts, which end with each command. Paths in ``--carry`` (a file
of certificates, a directory of wheels) are seen in the chroots meanwhile, and variables PIP_*, SSL_* and *_proxy are
passed on. Afterwards commands are run as the image's user in the last stage, and build tools must not be found there.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = Path(__file__).resolve().parents[2]
PASSED = re.compile(r"(PIP|SSL)_\w+|\w+_proxy", re.IGNORECASE)
BUILD_TOOLS = ("cc", "gcc", "g++", "clang", "make", "ld", "git")
KERNELS = 'python -c "from raymoe.kernels.native import load_native as load; assert load(1), 1"'
CHECKS = ("test $(id -u) -ne 0", "wget --version", "bash -c true", "ray --version", "raymoe --help", KERNELS)
COMMAND_TIMEOUT_S = 3600
SHOWN_LINES = 40  # of what a line that failed has said


@dataclass
class Stage:
    """One stage while it is followed: where its files are, and what its instructions have set so far."""

    name: str
    root: Path
    user: str = "0"
    directory: str = "/"
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})
    arguments: dict[str, str] = field(default_factory=dict)

    def expand(self, text: str) -> str:
        """``$NAME`` and ``${NAME}`` by what was set; unknown ones are empty, as in Docker."""
        known = self.arguments | self.variables
        return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: known.get(match[1] or match[2], ""), text)


class Follower:
    """Carries a Dockerfile's instructions out.

    Args:
        base: archive that stands for every image.
        work: directory for the chroots; what is there of an earlier time is replaced.
        given: build arguments.
        carried: paths of this machine that the chroots see.
    """

    def __init__(self, base: Path, work: Path, given: dict[str, str], carried: list[Path]) -> None:
        self._base, self._work, self._given, self._carried = base, work, given, carried
        self._stages: dict[str, Stage] = {}
        self._stage: Stage | None = None
        self._outer: dict[str, str] = {}

    def follow(self, dockerfile: Path) -> Stage:
        """All of a file; returns its last stage. Raises SystemExit at a line that fails or is not known."""
        for word, rest in instructions(dockerfile.read_text()):
            started = time.monotonic()
            method = getattr(self, f"_{word.lower()}", None)
            if method is None:
                raise SystemExit(f"{word} is not followed; known are {', '.join(KNOWN)}")
            print(f"{word} {rest[:100]}", flush=True)
            method(rest)
            print(f"    {time.monotonic() - started:.1f} s", flush=True)
        if self._stage is None:
            raise SystemExit(f"{dockerfile} has no FROM")
        return self._stage

    @property
    def _now(self) -> Stage:
        if self._stage is None:
            raise SystemExit("an instruction before the first FROM")
        return self._stage

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        value = self._given.get(name, self._outer.get(name, default.strip('"')))
        if self._stage is None:
            self._outer[name] = value
        else:
            self._stage.arguments[name] = value

    def _from(self, rest: str) -> None:
        name = rest.partition(" AS ")[2] or f"stage{len(self._stages)}"
        root = self._work / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        subprocess.run(["tar", "-xf", str(self._base), "-C", str(root), "--exclude=./dev/*"], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        self._stage = self._stages[name] = Stage(name=name, root=root)

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self._now.variables[name] = self._now.expand(value)

    def _workdir(self, rest: str) -> None:
        self._now.directory = rest
        (self._now.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, rest: str) -> None:
        self._now.user = rest

    def _cmd(self, rest: str) -> None:
        """What a container does by itself; nothing is to be done for it here."""

    def _copy(self, rest: str) -> None:
        *sources, target = [word for word in shlex.split(rest) if not word.startswith("--")]
        origin = re.search(r"--from=(\w+)", rest)
        top = self._stages[origin[1]].root if origin else CONTEXT
        into = self._now.root / os.path.join(self._now.directory, target).lstrip("/")
        for source in sources:
            found = top / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(
                    found, into, symlinks=True, dirs_exist_ok=True, ignore=_left_out if not origin else None
                )
            else:
                directory = target.endswith("/") or len(sources) > 1
                into.mkdir(parents=True, exist_ok=True) if directory else None
                shutil.copy(found, into / found.name if directory else into)

    def _run(self, rest: str) -> None:
        if not self.works(self._now, rest):
            raise SystemExit(f"it failed: {rest}")

    def works(self, stage: Stage, line: str) -> bool:
        """Whether a line does, run in a stage as its user; what it says is shown where it does not."""
        root = shlex.quote(str(stage.root))
        carried = [path for path in self._carried if path.exists()]
        mounts = [f"mount -t proc proc {root}/proc", f"mkdir -p {root}/dev", f"mount --rbind /dev {root}/dev"]
        for path in carried:
            make = "mkdir -p" if path.is_dir() else "install -D /dev/null"
            mounts.append(f"(test -e {root}{path} || {make} {root}{path})")
            mounts.append(f"mount --bind {path} {root}{path}")
        passed = {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}
        home = {"HOME": "/root" if stage.user == "0" else "/home/raymoe"}
        variables = passed | home | stage.arguments | stage.variables
        pairs = " ".join(shlex.quote(f"{name}={value}") for name, value in variables.items())
        inner = shlex.quote(f"cd {stage.directory} && {line}")
        outer = " && ".join(mounts)
        user = stage.user if ":" in stage.user else f"{stage.user}:{stage.user}"
        chroot = f"exec chroot --userspec={user} {root} /usr/bin/env -i {pairs} /bin/sh -c {inner}"
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"{outer} && {chroot}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        if done.returncode and done.stdout:
            print("\n".join(done.stdout.splitlines()[-SHOWN_LINES:]), flush=True)
        return done.returncode == 0


KNOWN = ("ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """A Dockerfile's instructions: the word, and the rest of its line with continuations joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            yield word.upper(), re.sub(r"\s+", " ", rest.strip())


def _left_out(_directory: str, names: list[str]) -> list[str]:
    """Of the checkout, as .dockerignore says."""
    return [name for name in names if name == "__pycache__"]


def main() -> None:
    """Follow a file, then look at what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--carry", action="append", default=[], type=Path, metavar="PATH")
    parser.add_argument("--then", action="append", default=[], metavar="COMMAND")
    asked = parser.parse_args()
    given = dict(pair.partition("=")[::2] for pair in asked.arg)
    follower = Follower(asked.base, asked.work, given, asked.carry)
    last = follower.follow(asked.dockerfile)
    failed = [line for line in (*CHECKS, *asked.then) if not follower.works(last, line)]
    found = [tool for tool in BUILD_TOOLS if follower.works(last, f"command -v {tool}")]
    size = subprocess.run(["du", "-sm", str(last.root)], capture_output=True, text=True, check=False).stdout.split()[0]
    print(f"{last.root}: {size} MB; failed: {failed or 'nothing'}; build tools in it: {found or 'none'}")
    sys.exit(bool(failed or found))


if __name__ == "__main__":
    main()
