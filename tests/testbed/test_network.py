"""The testbed itself: hosts that are apart, cables of a rate and a delay, and nothing left behind."""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.testbed.network import (
    PREFIX,
    REPOSITORY,
    ROOT,
    Link,
    Network,
    TestbedError,
    only_one,
    round_trips_s,
    run,
    testbed,
)

pytestmark = pytest.mark.integration
NAMES = ("a", "b", "c")
LINK = Link(rate="100mbit", delay_s=0.002)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with testbed(NAMES, LINK) as made:
        yield made


CRASH = """
import os, signal
from tests.testbed.network import Link, testbed
with testbed(["a", "b"], Link(delay_s=0.001)) as network:
    network["a"].start("sleep", "600")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # that is its new parent's


def test_what_a_crash_leaves_behind_is_removed_by_the_next() -> None:  # the first, for there is one testbed at a time
    done = subprocess.run([sys.executable, "-c", CRASH], cwd=REPOSITORY, timeout=60)
    left = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]
    assert done.returncode == -signal.SIGKILL and len(left) == 3
    sleepers = [int(pid) for pid in run("ip", "netns", "pids", f"{PREFIX}a").split()]
    with testbed(["a", "b"], Link(rate="", delay_s=0.0)) as network:
        assert round_trips_s(network.hosts, 1)
        assert sleepers and not any(is_running(pid) for pid in sleepers)
    assert PREFIX not in run("ip", "netns", "list")
    assert [item.name for item in ROOT.iterdir()] == ["lock"]


def test_a_small_packet_takes_twice_the_delay_there_and_back(network: Network) -> None:
    times = round_trips_s(network.hosts, 200)
    assert len(times) == 200
    assert statistics.median(times) == pytest.approx(2 * LINK.delay_s, rel=0.15)  # a tenth is this machine's own


def test_bytes_take_the_time_of_the_rate(network: Network) -> None:
    a, b = network["a"], network["b"]
    listen = "import socket as s; c = s.create_server(('', 9000)).accept()[0]\nwhile c.recv(1 << 16): pass"
    send = (
        "import socket, sys, time; c = socket.create_connection((sys.argv[1], 9000)); start = time.time()\n"
        "for _ in range(64): c.sendall(bytes(65536))\n"
        "c.shutdown(socket.SHUT_WR); c.recv(1); print(time.time() - start)"
    )
    server = a.start(sys.executable, "-c", listen)
    while "9000" not in run("ip", "netns", "exec", a.namespace, "cat", "/proc/net/tcp").replace("2328", "9000"):
        assert server.poll() is None
    taken_s = float(b.run(sys.executable, "-c", send, a.address).stdout)
    server.wait(10)
    assert pytest.approx(taken_s, rel=0.15) == 64 * 65536 * 8 / 100e6  # headers are 5% of it


def test_a_host_has_its_own_name_files_and_network(network: Network) -> None:
    a, b = network["a"], network["b"]
    assert a.run("hostname").stdout.strip() == "a"
    a.run("sh", "-c", "touch /tmp/mine ~/mine")
    assert (a.tmp / "mine").exists() and (a.home / "mine").exists()
    assert "mine" not in b.run("ls", "/tmp", str(b.home)).stdout
    assert a.address in a.run("ip", "address").stdout and b.address not in a.run("ip", "address").stdout


def test_counters_count_what_a_host_sends(network: Network) -> None:
    a, c = network["a"], network["c"]
    before = a.counters(), c.counters()
    round_trips_s(network.hosts, 100)
    after = a.counters(), c.counters()
    frame = 14 + 20 + 64  # Ethernet, IPv4, and what an echo request of 56 bytes and its header have
    for (received, sent), (received_before, sent_before) in zip(after, before, strict=True):
        assert received - received_before == pytest.approx(100 * frame, abs=3 * frame)  # an ARP in between
        assert sent - sent_before == pytest.approx(100 * frame, abs=3 * frame)


def test_a_host_that_is_cut_off_hears_nothing_until_it_is_mended(network: Network) -> None:
    network["c"].cut()
    assert round_trips_s(network.hosts, 1) == []
    network["c"].mend()
    time.sleep(0.1)
    assert len(round_trips_s(network.hosts, 5)) >= 4


def test_there_is_one_testbed_at_a_time(network: Network) -> None:
    with pytest.raises(TestbedError, match="another testbed runs on this machine"), only_one():
        pass
