"""``python -m tests.testbed.follow_docs``: do what docs/edge.md says for two boxes, word for word, on the testbed.

Each host has an empty home but for the wheel. Every ``sh`` block titled with boxes is given to a shell on these, one
shell per box for the whole page, so that variables and jobs last as they do for a reader; every line of a ``text``
block after it must be found in what the shell said. What stands in for the world outside: ssh goes by namespace
(ssh.py), and pip takes the packages that raymoe needs from this environment instead of the network.
"""

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.testbed import ssh
from tests.testbed.network import REPOSITORY, Host, Link, Network, testbed

PAGE = REPOSITORY / "docs" / "edge.md"
SECTION = "## Two boxes, step by step"
BOXES = ("box-0", "box-1")
FENCE = re.compile(r"^```(?P<kind>\w+) title=\"(?P<title>[^\"]+)\"\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
STEP_TIMEOUT_S = 300.0
DONE = "step-is-done"


class StepError(AssertionError):
    """A step of the page did not do what the page says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Commands for some boxes, and lines that must be said."""

    boxes: tuple[str, ...]
    commands: str
    says: tuple[str, ...] = ()


def steps_of(page: str) -> list[Step]:
    """The steps of the section for two boxes. Raises StepError for a block that is not understood."""
    section = page.split(SECTION, 1)[1].split("\n### ", 1)[0]
    untitled = section.count("\n```") - 2 * len(FENCE.findall(section))
    if untitled:
        raise StepError(f"the section has {untitled // 2} blocks without a title: who shall follow them?")
    steps: list[Step] = []
    for found in FENCE.finditer(section):
        kind, title, body = found["kind"], found["title"], found["body"]
        if kind == "sh":
            steps.append(Step(boxes=tuple(title.split(" and ")), commands=body))
        elif kind == "text" and title == "says" and steps:
            last = steps.pop()
            steps.append(Step(boxes=last.boxes, commands=last.commands, says=tuple(body.splitlines())))
        else:
            raise StepError(f'a block of kind "{kind}" titled "{title}" is neither commands nor what they say')
    return steps


class Shell:
    """One shell on one host, which stays while steps come and go."""

    def __init__(self, host: Host) -> None:
        self.host = host
        command = host.command(["env", *environment(host), "sh", "-c", "cd && exec bash --noprofile --norc"])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def follow(self, commands: str) -> list[str]:
        """Run the commands; what they said. Raises StepError where one fails."""
        step = self.host.home / ".testbed" / "step"
        step.write_text(commands)  # in a file, for what a command reads from its input would be the next commands
        self._process.stdin.write(f"set -e; . {step} < /dev/null; set +e; printf '\\n{DONE}\\n'\n")
        self._process.stdin.flush()
        said: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=STEP_TIMEOUT_S)
            except queue.Empty:
                raise StepError(
                    f"{self.host.name}: nothing was said for {STEP_TIMEOUT_S:g} s; so far: {said}"
                ) from None
            if line == DONE:
                return said
            if line is None:
                raise StepError(f"{self.host.name}: a command failed in\n{commands}\nIt said:\n" + "\n".join(said))
            said.append(line)

    def close(self) -> None:
        """End the shell."""
        self._process.stdin.close()
        self._process.wait(30)


def environment(host: Host) -> list[str]:
    """Of a reader's shell: nothing of ours but where packages and ssh come from."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    return [
        "-i",
        f"HOME={host.home}",
        f"PATH={host.home}/.testbed:{Path(sys.executable).parent}:{os.environ['PATH']}",
        f"PYTHONPATH={packages}",
        "PIP_NO_DEPS=1",
        "PIP_NO_INDEX=1",
        "PIP_DISABLE_PIP_VERSION_CHECK=1",
        "LANG=C.UTF-8",
    ]


def build_wheel(folder: Path) -> Path:
    """The wheel that readers install."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(REPOSITORY)], check=True)
    return next(folder.glob("raymoe-*.whl"))


def follow(network: Network, steps: Sequence[Step], wheel: Path, tell: Callable[[str], None]) -> None:
    """All steps in turn. Raises StepError at the first that does not do what the page says."""
    for box in BOXES:
        home = network[box].home
        (home / ".testbed").mkdir()
        ssh.install(home / ".testbed")
        (home / wheel.name).write_bytes(wheel.read_bytes())
    shells = {box: Shell(network[box]) for box in BOXES}
    try:
        for step in steps:
            for box in step.boxes:
                tell(f"{box}$ {step.commands.strip()}")
                said = shells[box].follow(step.commands)
                tell("\n".join(said))
                for line in step.says:
                    if not any(line in heard for heard in said):
                        raise StepError(f'{box}: the page says "{line}", but it said:\n' + "\n".join(said))
    finally:
        for shell in shells.values():
            shell.close()


def main() -> None:
    """Follow the page and show it."""
    with testbed(BOXES, Link()) as network:
        wheel = build_wheel(network.hosts[0].tmp)
        follow(network, steps_of(PAGE.read_text()), wheel, lambda text: print(text, flush=True))
    print(f"every step of {PAGE.relative_to(REPOSITORY)} for two boxes works")


if __name__ == "__main__":
    main()
