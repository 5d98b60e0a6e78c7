"""Plays a schedule of faults on a cluster while users ask it things, and says what was wrong."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from ray.exceptions import RayError

from tests.chaos.client import Client
from tests.chaos.cluster import ChaosCluster, kill
from tests.chaos.peers import flood, knock
from tests.chaos.proxy import Condition, condition_of, merged
from tests.chaos.report import Happened
from tests.chaos.schedule import Fault, Kind

LOOK_S = 0.5  # between two looks whether everything is there again
WHOLE_S = 120.0  # the most to wait for that
SETTLE_S = 30.0  # for the engine to see the last requests go
AT_ONCE = 4


@dataclass(slots=True, kw_only=True)
class Run:
    """What was done and seen.

    Attributes:
        failures: what should not have happened, in words.
    """

    client: Client
    happenings: list[Happened] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Player:
    """Faults upon one cluster.

    Args:
        before: the stats of the whole cluster.
    """

    def __init__(self, cluster: ChaosCluster, before: dict[str, Any], seed: int) -> None:
        self._cluster = cluster
        self._before = before
        self._seed = seed
        self._killed: set[int] = set()
        self._conditions: dict[str, list[Condition]] = {name: [] for name in cluster.proxy.links}
        self._floods = 0

    async def play(self, schedule: Sequence[Fault], run: Run, seconds: float) -> None:
        """All faults, in their order; returns when all are over, everything is there again, and the time is up."""
        start_s = time.monotonic()
        open_ones: list[asyncio.Task[None]] = []
        try:
            for fault in schedule:
                await asyncio.sleep(max(0.0, start_s + fault.at_s - time.monotonic()))
                if fault.rule.takes != "nothing" and not fault.together and open_ones:
                    await asyncio.gather(*open_ones)
                    open_ones = []
                print(fault, flush=True)
                happened = Happened(fault=fault, begin_s=time.monotonic(), end_s=float("inf"))
                run.happenings.append(happened)
                open_ones.append(asyncio.create_task(self._one(happened)))
            await asyncio.gather(*open_ones)
            await asyncio.sleep(max(0.0, start_s + seconds - time.monotonic()))
        finally:
            for task in open_ones:
                task.cancel()

    async def _one(self, happened: Happened) -> None:
        """A fault, and the wait until everything is there again."""
        await self._apply(happened.fault)
        happened.end_s = time.monotonic()
        await self.whole(str(happened.fault))
        happened.whole_s = time.monotonic()

    async def whole(self, what: str) -> None:
        """Wait until everything is there again. Raises TimeoutError that says what is missing after ``what``."""
        end_s, missing = time.monotonic() + WHOLE_S, ["everything"]
        while missing:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{WHOLE_S:g} s after {what.strip()}: {'; '.join(missing)}")
            await asyncio.sleep(LOOK_S)
            try:
                stats = await asyncio.to_thread(self._cluster.stats)
            except httpx.HTTPError as error:
                missing = [f"no stats: {error}"]
            else:
                missing = what_is_missing(stats, self._before, self._killed)

    async def _apply(self, fault: Fault) -> None:
        cluster = self._cluster
        condition = condition_of(fault)
        if condition is not None:
            await self._weather(fault, condition)
            return
        match fault.kind:
            case Kind.KILL_WORKER | Kind.KILL_OWNERS:
                processes = [await asyncio.to_thread(cluster.worker, device) for device in fault.targets]
                self._kill(*processes)
            case Kind.PAUSE_WORKER:
                process = await asyncio.to_thread(cluster.worker, fault.targets[0])
                with contextlib.suppress(psutil.NoSuchProcess):  # it has died meanwhile
                    process.suspend()
                    await asyncio.sleep(fault.lasts_s)
                    process.resume()
            case Kind.KILL_NODE:
                self._killed.add((await asyncio.to_thread(cluster.worker, fault.targets[0])).pid)
                await asyncio.to_thread(cluster.kill_node, fault.targets[0])
                await asyncio.sleep(fault.lasts_s)
                await asyncio.to_thread(cluster.add_node, fault.targets[0])
            case Kind.KILL_PLACEMENT:
                self._kill(await asyncio.to_thread(cluster.placement))
            case Kind.KILL_SHADOW:
                self._kill(await asyncio.to_thread(cluster.shadow))
            case Kind.KILL_ENGINE:
                self._kill(await asyncio.to_thread(cluster.engine))
            case Kind.FLOOD_ADMITTED | Kind.FLOOD_STRANGER:
                await asyncio.to_thread(self._flood, fault)

    def _kill(self, *processes: Any) -> None:
        self._killed |= {process.pid for process in processes}
        for process in processes:
            kill(process)

    def _flood(self, fault: Fault) -> None:
        device, self._floods = fault.targets[0], self._floods + 1
        endpoints, seed = self._cluster.endpoints(device), self._seed + self._floods
        if fault.kind is Kind.FLOOD_STRANGER:
            knock(endpoints, seconds=fault.lasts_s, seed=seed)
            return
        with contextlib.suppress(RayError, ValueError):  # a worker that is not there admits nobody
            server_key, keys = self._cluster.admit(device)
            flood(endpoints, server_key, keys, seconds=fault.lasts_s, seed=seed)

    async def _weather(self, fault: Fault, condition: Condition) -> None:
        [device] = fault.targets
        active = self._conditions[device]
        active.append(condition)
        self._cluster.proxy.become(device, merged(active))
        await asyncio.sleep(fault.lasts_s)
        active.remove(condition)
        self._cluster.proxy.become(device, merged(active))


def what_is_missing(now: dict[str, Any], before: dict[str, Any], killed: set[int]) -> list[str]:
    """What the stats of a cluster lack of what they were; a process that was killed does not count."""
    missing = []
    for name, device in now["devices"].items():
        if device["state"] != "healthy":
            missing.append(f"{name} is {device['state']}")
        elif device["pid"] in killed:
            missing.append(f"{name} is the one that was killed")
    owned, wanted = (sum(device["owned"] for device in stats["devices"].values()) for stats in (now, before))
    if owned < wanted:
        missing.append(f"{owned} experts have owners, {wanted} had")
    predictor = now.get("predictor")
    if predictor is not None and predictor["kind"] == "shadow":
        if predictor["state"] != "healthy":
            missing.append(f"the shadow is {predictor['state']}: {predictor['reason']}")
        elif predictor["pid"] in killed:
            missing.append("the shadow is the one that was killed")
    return missing


def what_is_left(stats: dict[str, Any]) -> list[str]:
    """What an idle engine still holds, and slots that nothing can use any more."""
    engine = stats["engine"]
    found = [
        f"{name} is {engine[name]} with no request left"
        for name in ("running", "waiting", "parked", "kv_bytes", "kv_set_aside_bytes")
        if engine.get(name)
    ]
    for name, device in stats["devices"].items():
        budget = device["slot_budget_bytes"]
        if budget is not None and device["peak_slot_bytes"] > budget:
            found.append(f"{name} has used {device['peak_slot_bytes']} bytes of slots, allowed are {budget}")
    return found


async def play(cluster: ChaosCluster, schedule: Sequence[Fault], *, seconds: float, seed: int) -> Run:
    """The faults of ``schedule`` while users ask; stops at the first fault that the cluster does not get over."""
    before = await asyncio.to_thread(cluster.stats)
    quality = "exact" if cluster.config.scheduling.substitutes else None
    client = Client(cluster.url, cluster.config.model.served_name, seed=seed, at_once=AT_ONCE, quality=quality)
    run, stop = Run(client=client), asyncio.Event()
    asking = asyncio.create_task(client.play(stop))
    player = Player(cluster, before, seed)
    try:
        await player.play(schedule, run, seconds)
    except (TimeoutError, httpx.HTTPError, RayError) as error:
        run.failures.append(str(error))
    finally:
        stop.set()
        await asking
    end_s = time.monotonic() + SETTLE_S
    while True:
        try:
            left = what_is_left(await asyncio.to_thread(cluster.stats))
        except httpx.HTTPError as error:
            left = [f"no stats at the end: {error}"]
        if not left or time.monotonic() > end_s:
            break
        await asyncio.sleep(LOOK_S)
    run.failures += left
    return run
