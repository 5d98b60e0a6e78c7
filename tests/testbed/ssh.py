"""A stand-in for ssh between the testbed's hosts: ``ssh [-o OPTION]... HOST COMMAND...`` goes by namespace, not by key.

As with ssh, the words of the command are joined and read by a shell on the other host, in its home directory.
"""

import os
import sys
from pathlib import Path

from tests.testbed.network import REPOSITORY, ROOT, Host


def install(folder: Path) -> None:
    """Write a command ``ssh`` into ``folder``."""
    script = folder / "ssh"
    script.write_text(f'#!/bin/sh\ncd {REPOSITORY} && exec {sys.executable} -m tests.testbed.ssh "$@"\n')
    script.chmod(0o755)


def main() -> None:
    """Become the command on the other host. Like ssh, 255 says that it can't be reached."""
    words = sys.argv[1:]
    while words and words[0].startswith("-"):
        words = words[2:]
    host = Host(name=words[0], address="")
    if not (ROOT / host.name).is_dir():
        print(f"ssh: connect to host {host.name} port 22: No route to host", file=sys.stderr)
        sys.exit(255)
    os.chdir(host.home)
    command = host.command(["sh", "-c", " ".join(words[1:])])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
