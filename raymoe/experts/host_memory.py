"""Host memory as it is while a shard is read: who promised more than there is finds out before the kernel does.

The kernel's way out of a lack of memory is to end a process, often the wrong one. So before each expert is read the
worker looks whether it still leaves enough.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from raymoe.errors import CapacityError

FLOOR_BYTES = 256 << 20  # left free: about what a process with torch takes, so that one can still start or grow
LOOK_BYTES = 64 << 20  # read between two looks, which take up to 0.4 ms each; a quarter of the floor
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that this process could take without swapping: of the machine, and within its control groups."""
    free = int(psutil.virtual_memory().available)
    rooms = [room for group in own_groups() if (room := room_in(group)) is not None]
    return max(0, min([free, *rooms]))


def own_groups(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The directories of the control groups that limit this process's memory, innermost first."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        inside = top / path.lstrip("/")
        groups += [group for group in (inside, *inside.parents) if group.is_relative_to(top) and group.is_dir()]
    return groups


def room_in(group: Path) -> int | None:
    """Bytes that may still be taken in a control group, cached files counted as free; None where it sets no limit."""
    try:
        if (group / "memory.max").exists():
            limit, used, cached = "memory.max", "memory.current", "inactive_file"
        else:
            limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - int((group / used).read_text()) + int(counts.get(cached, 0))
    except (OSError, ValueError):  # the group of all, or none of ours to read
        return None


class MemoryGuard:
    """Looks after the memory of one device's shard while it is read.

    Args:
        promised_bytes: ``host_memory`` of the configuration; None: as much as was found free.
        available: what the process could take now.

    Attributes:
        expert_bytes: of an expert of each layer.
    """

    def __init__(
        self,
        device: str,
        promised_bytes: int | None,
        expert_bytes: Sequence[int],
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self.expert_bytes = expert_bytes
        self._device = device
        self._promised_bytes = promised_bytes
        self._available = available
        self._unseen_bytes = LOOK_BYTES

    def check(self, held_bytes: int, needed_bytes: int) -> None:
        """Before so much is read. Raises CapacityError where too little would be left; nothing was taken then."""
        self._unseen_bytes += needed_bytes
        if self._unseen_bytes < LOOK_BYTES:
            return
        self._unseen_bytes = 0
        available = self._available()
        if available - needed_bytes < FLOOR_BYTES:
            self._unseen_bytes = LOOK_BYTES
            raise self.error(held_bytes, needed_bytes, available)

    def error(self, held_bytes: int, needed_bytes: int, available: int | None = None) -> CapacityError:
        """What there is to say when memory is short."""
        available = self._available() if available is None else available
        promised = "what was free at the start" if self._promised_bytes is None else f"{self._promised_bytes:,} bytes"
        return CapacityError(
            f'device "{self._device}": its experts may take {promised} of host memory and take {held_bytes:,} bytes so '
            f"far, but for {needed_bytes:,} more its node has {available:,} available, of which {FLOOR_BYTES:,} must "
            "stay free; lower devices[].host_memory, free memory on the node, or add devices"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system refused host memory: Python, mmap and torch each say so in their own way."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "memory" in str(error)
    )
