"""What the placement actor shows of its cluster: every device's state and report, as stats and as metrics."""

from dataclasses import replace
from typing import Any

from raymoe.actors.crew import Crew
from raymoe.actors.membership import Membership
from raymoe.actors.repairs import Repairs
from raymoe.actors.reports import seen_stats, settings_stats, shortages
from raymoe.actors.shadow_keeper import ShadowKeeper
from raymoe.config import ClusterConfig
from raymoe.experts.report import ResidencyMap
from raymoe.observe.metrics import Values, of_health, of_predictor, of_repairs
from raymoe.observe.stats import ClusterStats, DeviceStats, EngineStats, PredictorStats
from raymoe.types import DeviceName

ASK_S = 1.0  # for workers' answers: whoever looks wants to see at once that a device is silent


class Overview:
    """Looks at the placement actor's parts; changes nothing. Any thread may ask."""

    def __init__(
        self,
        app: str,
        config: ClusterConfig,
        crew: Crew,
        members: Membership,
        repairs: Repairs,
        shadow: ShadowKeeper | None,
    ) -> None:
        self._app = app
        self._config = config
        self._crew = crew
        self._members = members
        self._repairs = repairs
        self._shadow = shadow
        self._reports: dict[DeviceName, Any] = {}  # the last ones
        self._maps: dict[DeviceName, ResidencyMap] = {}

    def stats(self, engine: EngineStats | None, names: bool) -> ClusterStats:
        """Of devices and predictor, with what the engine said.

        Args:
            names: also of the resident experts, of which there may be ten thousands.
        """
        self._reports = self._ask(self._reports, "report", names)
        target = self._repairs.target
        replication = target.replication if target is not None else 0
        lost = target.lost if target is not None else ()
        return ClusterStats(
            app=self._app,
            devices=self._devices(self._reports),
            engine=engine,
            replication=replication,
            policy=self._crew.scheduling.policy,
            predictor=self._predictor(),
            settings=settings_stats(self._crew.scheduling),
            repairs=self._repairs.done,
            lost_experts=tuple((key.layer, key.expert) for key in lost),
            warnings=shortages(replication, self._repairs.most, len(lost)),
        )

    def values(self) -> Values:
        """Metrics of what the placement actor alone sees."""
        target = self._repairs.target
        values = of_predictor(self._predictor())
        values += of_repairs(self._repairs.done, len(target.lost) if target is not None else 0)
        for name, stats in self._devices({}).items():
            values += of_health(name, stats.state, heartbeat_age_s=stats.heartbeat_age_s, restarts=stats.restarts)
        return values

    def residency(self) -> dict[str, ResidencyMap]:
        """Every worker's map; the last one of a worker that is busy, or silent for a moment."""
        self._maps = self._ask(self._maps, "residency")
        return {str(name): seen for name, seen in self._maps.items()}

    def _ask(self, known: dict[DeviceName, Any], method: str, *arguments: Any) -> dict[DeviceName, Any]:
        """What every worker that is there answers, or what is known of it where it does not in time."""
        there = self._members.reachable()
        answers = known | self._crew.ask(method, *arguments, names=there, wait_s=ASK_S)
        return {name: answer for name, answer in answers.items() if name in there}

    def _devices(self, reports: dict[DeviceName, Any]) -> dict[str, DeviceStats]:
        now_s = self._members.clock()
        found = {}
        for device in self._crew.remote:
            name = DeviceName(device.name)
            with self._members.lock:
                health = replace(self._members.roster.health[name])  # as it is now
            found[device.name] = seen_stats(device, health, self._crew.infos.get(name), reports.get(name), now_s)
        return found

    def _predictor(self) -> PredictorStats | None:
        """The shadow's; other kinds are part of the engine, and well while that is."""
        kind = self._config.predictor_kind
        if self._shadow is not None:
            return self._shadow.stats()
        return None if kind is None else PredictorStats(kind=kind, state="healthy")
