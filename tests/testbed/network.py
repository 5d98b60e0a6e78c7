"""Hosts that are network namespaces, their cables, and the switch between them. Needs root and Linux.

Every host has one interface, ``eth0``, on a cable of the wanted rate (``tbf`` in both directions). The switch is the
kernel's bridge; frames are delayed by ``netem``, or where the kernel has none by ``switch.py`` in the bridge's place.
"""

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PREFIX = "rmtb-"  # of every namespace; interfaces live in them and go with them
SWITCH = f"{PREFIX}switch"
SUBNET = "10.77.0"
ROOT = Path("/run/raymoe-testbed")  # what hosts see as /tmp and as their home lies here
BURST_BYTES = 3200  # of tbf: two frames, so that a message of several takes the time that its bytes take
QUEUE_S = 0.2  # of tbf: what a port holds before it loses frames
PING_COUNT = 200
REPOSITORY = Path(__file__).resolve().parents[2]


class TestbedError(Exception):
    """The testbed can't be had here; the message says why."""

    __test__ = False  # it is no test, whatever pytest thinks of its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What every cable and the switch are meant to do.

    Attributes:
        rate: as tc writes it, such as "1gbit"; empty: as fast as it goes.
        delay_s: from one host to another, one way.
    """

    rate: str = "1gbit"
    delay_s: float = 0.0002


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host: a namespace with one address, and files of its own under /tmp and in its home."""

    name: str
    address: str

    @property
    def namespace(self) -> str:
        """As ``ip netns`` calls it."""
        return PREFIX + self.name

    @property
    def port(self) -> str:
        """The switch's end of its cable."""
        return f"to-{self.name}"

    @property
    def home(self) -> Path:
        """Its home directory, under the same path on the host and outside of it."""
        return ROOT / self.name / "home"

    @property
    def tmp(self) -> Path:
        """What is /tmp on the host, as seen from outside."""
        return ROOT / self.name / "tmp"

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs on this host: its network, its name, its /tmp, its home."""
        settle = f'hostname "$1" && {self._keep_repository()}mount --rbind "$2" /tmp && shift 2 && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts", "sh", "-c", settle, "sh"]
        return [*enter, self.name, str(self.tmp), "env", f"HOME={self.home}", *argv]

    def _keep_repository(self) -> str:
        """Commands by which a checkout under /tmp is there on the host as well."""
        if not REPOSITORY.is_relative_to("/tmp"):
            return ""
        place = shlex.quote(str(self.tmp / REPOSITORY.relative_to("/tmp")))
        return f"mkdir -p {place} && mount --bind {shlex.quote(str(REPOSITORY))} {place} && "

    def run(self, *argv: str, timeout_s: float = 120.0, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end. Raises CalledProcessError unless it succeeds."""
        options = {"text": True, "capture_output": True, "check": True, **options}
        return subprocess.run(self.command(argv), timeout=timeout_s, **options)  # type: ignore[call-overload]

    def start(self, *argv: str, **options: object) -> "subprocess.Popen[str]":
        """Start a command on this host; it ends with the testbed at the latest."""
        return subprocess.Popen(self.command(argv), text=True, **options)  # type: ignore[call-overload]

    def counters(self) -> tuple[int, int]:
        """(bytes received, bytes sent) by its interface, Ethernet headers included."""
        text = run("ip", "-n", self.namespace, "-s", "link", "show", "eth0")
        received, sent = re.findall(r"[RT]X:.*\n\s*(\d+)", text)
        return int(received), int(sent)

    def cut(self) -> None:
        """Pull its cable: at the switch, so that the host itself sees a dead line and no error."""
        run("ip", "-n", SWITCH, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        run("ip", "-n", SWITCH, "link", "set", self.port, "up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A running testbed.

    Attributes:
        own_delay_s: what the switch adds to the wanted delay by itself, one way, before it is subtracted.
    """

    hosts: tuple[Host, ...]
    link: Link
    own_delay_s: float

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)


def why_not() -> str | None:
    """Why a testbed can't be had on this machine; None where it can."""
    if sys.platform != "linux":
        return "the testbed needs Linux"
    if os.geteuid() != 0:
        return "the testbed needs root: it makes network namespaces (sudo make testbed)"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"the testbed needs the commands {', '.join(missing)} (packages iproute2 and util-linux)"
    probe = f"{PREFIX}probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if tried.returncode:
        return f"the testbed needs network namespaces, and there are none here: {tried.stderr.strip()}"
    run("ip", "netns", "del", probe)
    return None


@contextlib.contextmanager
def testbed(names: Sequence[str], link: Link) -> Iterator[Network]:
    """Hosts of these names on one network. Whatever an earlier run left behind is removed first, and all of it at exit.

    Raises TestbedError where there can be none, or another one runs.
    """
    reason = why_not()
    if reason is not None:
        raise TestbedError(reason)
    with only_one(), ended_by_sigterm():
        remove()
        try:
            hosts = tuple(Host(name=name, address=f"{SUBNET}.{10 + index}") for index, name in enumerate(names))
            yield build(hosts, link)
        finally:
            remove()


testbed.__test__ = False  # type: ignore[attr-defined]  # a fixture's matter, not a test


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds this process as Ctrl-C does, so that nothing is left behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Names are fixed, so that leftovers can be found: one testbed per machine."""
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TestbedError("another testbed runs on this machine; wait for its end") from error
        yield


def remove() -> None:
    """End every process in the testbed's namespaces, and remove these with all that is in them."""
    names = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]
    for name in names:
        end_processes(name)
    for name in names:
        run("ip", "netns", "del", name)
    for folder in ROOT.iterdir() if ROOT.exists() else ():
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def end_processes(namespace: str, grace_s: float = 5.0) -> None:
    """SIGTERM, then SIGKILL, to all processes in a namespace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + grace_s
        while pids := run("ip", "netns", "pids", namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
            if time.monotonic() > end:
                break
            time.sleep(0.1)


# --- building -----------------------------------------------------------------------------------------------


def build(hosts: Sequence[Host], link: Link) -> Network:
    """Namespaces, cables, the bridge; then the delay."""
    add_namespace(SWITCH)
    for host in hosts:
        add_host(host, link)
    run("ip", "-n", SWITCH, "link", "add", "bridge", "type", "bridge")
    run("ip", "-n", SWITCH, "link", "set", "bridge", "up")
    for host in hosts:
        run("ip", "-n", SWITCH, "link", "set", host.port, "master", "bridge")
    wait_for_network(hosts)
    if not link.delay_s:
        return Network(hosts=tuple(hosts), link=link, own_delay_s=0.0)
    if has_netem():
        for host in hosts:
            delay = f"parent 1:1 handle 10: netem delay {link.delay_s * 1e6:.0f}us limit 10000"
            run("tc", "-n", SWITCH, "qdisc", "add", "dev", host.port, *delay.split())
        return Network(hosts=tuple(hosts), link=link, own_delay_s=0.0)
    return delay_in_switch(hosts, link)


def add_namespace(name: str) -> None:
    """One with a loopback interface and no IPv6, whose announcements would be counted among the bytes."""
    run("ip", "netns", "add", name)
    for scope in ("all", "default"):
        run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv6.conf.{scope}.disable_ipv6=1")
    run("ip", "-n", name, "link", "set", "lo", "up")


def add_host(host: Host, link: Link) -> None:
    """Its files, namespace and cable. Frames leave it whole and with checksums, as they would leave a network card."""
    for folder in (host.home, host.tmp):
        folder.mkdir(parents=True)
    add_namespace(host.namespace)
    run("ip", "-n", SWITCH, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for namespace, interface in ((host.namespace, "eth0"), (SWITCH, host.port)):
        probe(namespace, "offload", interface)
        run("ip", "-n", namespace, "link", "set", interface, "up")
        if link.rate:
            shape = f"root handle 1: tbf rate {link.rate} burst {BURST_BYTES} latency {QUEUE_S * 1e3:.0f}ms"
            run("tc", "-n", namespace, "qdisc", "add", "dev", interface, *shape.split())


def has_netem() -> bool:
    """Whether this kernel can delay packets itself."""
    on_loopback = ["tc", "-n", SWITCH, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(on_loopback, capture_output=True).returncode:
        return False
    run("tc", "-n", SWITCH, "qdisc", "del", "dev", "lo", "root")
    return True


def delay_in_switch(hosts: Sequence[Host], link: Link) -> Network:
    """``switch.py`` in the bridge's place: first without delay, to measure what it takes itself, then with the rest."""
    by_bridge_s = round_trip_s(hosts)
    run("ip", "-n", SWITCH, "link", "del", "bridge")
    switch = start_switch(hosts, 0.0)
    wait_for_network(hosts)
    own_s = (round_trip_s(hosts) - by_bridge_s) / 2
    switch.terminate()
    switch.wait(10)
    start_switch(hosts, max(0.0, link.delay_s - own_s))
    wait_for_network(hosts)
    return Network(hosts=tuple(hosts), link=link, own_delay_s=own_s)


def start_switch(hosts: Sequence[Host], delay_s: float) -> "subprocess.Popen[str]":
    """A switch that forwards frames already."""
    arguments = [f"{delay_s:.9f}", *(host.port for host in hosts)]
    command = ["ip", "netns", "exec", SWITCH, sys.executable, "-m", "tests.testbed.switch", *arguments]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise TestbedError(f"the testbed's switch did not start: {' '.join(command)}")
    return process


def wait_for_network(hosts: Sequence[Host], timeout_s: float = 10.0) -> None:
    """Until the first host reaches the last."""
    end = time.monotonic() + timeout_s
    while not round_trips_s(hosts, 1):
        if time.monotonic() > end:
            raise TestbedError(f"{hosts[0].name} does not reach {hosts[-1].name} within {timeout_s:g} s")


def round_trip_s(hosts: Sequence[Host], count: int = PING_COUNT) -> float:
    """The median of what a small packet takes from the first host to the last and back."""
    return statistics.median(round_trips_s(hosts, count))


def round_trips_s(hosts: Sequence[Host], count: int) -> list[float]:
    """Each round trip of a small packet from the first host to the last; lost ones are left out."""
    return [float(line) for line in probe(hosts[0].namespace, "ping", hosts[-1].address, str(count)).split()]


def probe(namespace: str, *arguments: str) -> str:
    """Run a tool of ``probe.py`` there."""
    return run("ip", "netns", "exec", namespace, sys.executable, "-m", "tests.testbed.probe", *arguments)


def run(*command: str, timeout_s: float = 60.0) -> str:
    """A command's output. Raises TestbedError with what it said unless it succeeds."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=timeout_s, cwd=REPOSITORY)
    if done.returncode:
        raise TestbedError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
