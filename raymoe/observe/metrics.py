"""Every metric: its name, what it counts, and which figure of the stats it is. No Ray: ``ray_metrics`` exports them.

Names here are without the prefix ``ray_`` that Ray's exporter adds, and without the ``_total`` of counters.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymoe.observe.sink import Observations
from raymoe.observe.stats import DeviceStats, EngineStats, PredictorStats
from raymoe.types import ExpertFault

Kind = Literal["counter", "gauge", "histogram"]
APP, DEVICE, STATE = "app", "device", "state"
STATES = ("healthy", "suspect", "down", "rejoining")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        field: of the record that it comes from.
        boundaries: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    field: str
    labels: tuple[str, ...] = (APP,)
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name under which Prometheus finds it: Ray adds the prefix, and counters end in ``_total``."""
        return f"ray_{self.name}" + "_total" * (self.kind == "counter")


def _histogram(name: str, field: str, boundaries: tuple[float, ...], text: str) -> Metric:
    return Metric(name=f"raymoe_{name}", kind="histogram", field=field, boundaries=boundaries, help=text)


def _engine(kind: Kind, name: str, field: str, text: str) -> Metric:
    return Metric(name=f"raymoe_{name}", kind=kind, field=field, help=text)


def _device(kind: Kind, name: str, field: str, text: str) -> Metric:
    return Metric(name=f"raymoe_device_{name}", kind=kind, field=field, labels=(APP, DEVICE), help=text)


REQUESTS: tuple[Metric, ...] = (
    _histogram("time_to_first_token_seconds", "ttft_s", SECONDS, "From a request's arrival to its first token."),
    _histogram("time_per_output_token_seconds", "tpot_s", TOKEN_SECONDS, "Mean time between a request's tokens."),
    _histogram("queue_time_seconds", "queue_s", SECONDS, "From a request's arrival to its admission."),
    _histogram("request_duration_seconds", "duration_s", LONG_SECONDS, "From a request's arrival to its end."),
    _histogram("batch_size", "rows", ROWS, "Requests that shared a decode step."),
)
"""From ``Observations``."""

ENGINE: tuple[Metric, ...] = (
    _engine("counter", "prompt_tokens", "prompt_tokens", "Tokens of prompts that were read."),
    _engine("counter", "completion_tokens", "completion_tokens", "Tokens that were generated."),
    _engine("counter", "requests_finished", "finished", "Requests that ended well or were cancelled."),
    _engine("counter", "requests_failed", "failed", "Requests that ended with an error of the server."),
    _engine("counter", "requests_not_finite", "not_finite", "Those of them whose output was NaN or infinite."),
    _engine("counter", "memory_shortages", "shrunk", "Times that kept caches went for want of device memory."),
    _engine("counter", "decode_steps", "steps", "Passes of the model in decode."),
    _engine("counter", "decode_seconds", "decode_s", "Time spent in decode steps."),
    _engine("counter", "expert_hits", "hits", "(token, expert) pairs whose expert was resident."),
    _engine("counter", "expert_misses", "misses", "(token, expert) pairs whose expert had to be loaded or hosted."),
    _engine("counter", "expert_hosted", "hosted", "(token, expert) pairs computed on a worker's host CPU."),
    _engine(
        "counter", "expert_substitutions", "substituted", "(token, expert) pairs in which another expert computed."
    ),
    _engine("counter", "expert_loads", "loads", "Experts that crossed a link for requests."),
    _engine("counter", "loaded_bytes", "bytes_loaded", "Bytes that crossed links for requests."),
    _engine("counter", "expert_degraded", "degraded", "(token, expert) pairs whose lost expert another stood in for."),
    _engine("counter", "calls_rerouted", "rerouted", "Expert calls that were handed out again to other owners."),
    _engine("counter", "late_answers", "late_answers", "Answers of workers that nobody waited for any more."),
    _engine("counter", "drafts", "drafted", "A shadow's tokens that were read along."),
    _engine("counter", "drafts_accepted", "accepted", "Those of them that the model chose too."),
    _engine("gauge", "requests_running", "running", "Requests in the batch now."),
    _engine("gauge", "requests_waiting", "waiting", "Requests in the queue now."),
    _engine("gauge", "requests_parked", "parked", "Requests that wait for experts nobody can be asked for now."),
    _engine("gauge", "kv_bytes", "kv_bytes", "Bytes of keys and values now."),
    _engine("gauge", "kv_budget_bytes", "kv_budget_bytes", "Most bytes of keys and values; absent where unlimited."),
    _engine("gauge", "alpha", "alpha", "Width of the substitution window for requests without a quality of their own."),
    _engine("gauge", "substituted_gate_mass", "substituted_gate_mass", "Mean share of gate scores that was replaced."),
    _engine("gauge", "predictor_recall", "recall", "Share of the chosen experts that the predictor had named."),
    _engine("gauge", "predictor_lead_seconds", "lead_s", "Mean time by which forecasts came before their layer."),
)
"""From ``EngineStats``."""

DEVICES: tuple[Metric, ...] = (
    _device("gauge", "resident_experts", "resident", "Experts that need no load now."),
    _device("gauge", "slots", "slot_count", "Slots; absent where experts are computed in host memory."),
    _device("gauge", "slot_bytes", "peak_slot_bytes", "Bytes of slots, which are allocated once."),
    _device("gauge", "slot_budget_bytes", "slot_budget_bytes", "Limit of slot bytes; absent where there is none."),
    _device("gauge", "slots_shrunk", "shrunk", "Slots fewer than the budget gives, for want of device memory."),
    _device("gauge", "host_bytes", "host_bytes", "Bytes of the shard in host memory."),
    _device("counter", "calls", "calls", "Layer calls."),
    _device("counter", "hits", "hits", "(row, expert) pairs whose expert was resident."),
    _device("counter", "misses", "misses", "(row, expert) pairs whose expert had to be loaded or hosted."),
    _device("counter", "hosted", "hosted", "(row, expert) pairs computed on the host CPU."),
    _device("counter", "loads", "loads", "Experts that crossed the link."),
    _device("counter", "link_bytes", "bytes_loaded", "Bytes that crossed the link."),
    _device("counter", "link_busy_seconds", "link_busy_s", "Time for which loads kept the link busy."),
    _device("counter", "evictions", "evictions", "Experts that left a slot."),
    _device("counter", "prefetches", "prefetches", "Loads begun ahead of need."),
    _device("counter", "prefetches_used", "prefetches_used", "Those of them that a call then asked for."),
    _device("counter", "prefetches_wasted", "prefetches_wasted", "Those that left before a call asked for them."),
    _device("counter", "prefetches_late", "prefetches_late", "Prefetches that were ordered, but never begun."),
    _device("counter", "prefetches_refused", "prefetches_refused", "Prefetches worth less than what they would evict."),
    _device("counter", "dropped_messages", "dropped_messages", "Malformed or replayed messages that were dropped."),
    _device("counter", "refused_clients", "refused_clients", "Connections that were not let in."),
)
"""From ``DeviceStats``, told by the device's own worker."""

SEEN_DEVICES: tuple[Metric, ...] = (
    _device("counter", "substitutions", "substituted", "Pairs that were the device's and gave way to other experts."),
    _device("counter", "bad_outputs", "bad_outputs", "Requests that NaN or infinity of its experts has failed."),
    _device("gauge", "up", "up", "1 where the device answers, else 0."),
    Metric(
        name="raymoe_device_state",
        kind="gauge",
        field="state",
        labels=(APP, DEVICE, STATE),
        help="1 for the state that the device is in, 0 for the others: healthy, suspect, down, rejoining.",
    ),
    _device("counter", "restarts", "restarts", "New processes of the device that have followed earlier ones."),
    _device("gauge", "heartbeat_age_seconds", "heartbeat_age_s", "Since the device was last heard of."),
)
"""From ``DeviceStats``, told by those who see the device from outside."""

CLUSTER: tuple[Metric, ...] = (
    _engine("counter", "repairs", "repairs", "Times that experts were read again or shared anew for other devices."),
    _engine("gauge", "lost_experts", "lost_experts", "Experts for which the devices that are there have no room."),
)
"""From ``ClusterStats``."""

PREDICTOR: tuple[Metric, ...] = (
    _engine("gauge", "predictor_up", "up", "1 where what foretells routing is well, else 0."),
    _engine("gauge", "shadow_bytes", "nbytes", "Bytes of the shadow's weights."),
    _engine("counter", "shadow_steps", "steps", "Steps that the shadow ran."),
    _engine("counter", "shadow_steps_wasted", "wasted", "Those of them that were left or taken back."),
    _engine("counter", "shadow_guesses", "guesses", "The shadow's own next tokens."),
    _engine("counter", "shadow_guesses_right", "right", "Those of them that the model chose too."),
    _engine("counter", "shadow_dropped_messages", "dropped_messages", "Messages that the shadow dropped."),
    _engine("counter", "shadow_refused_clients", "refused_clients", "Connections that the shadow did not let in."),
)
"""From ``PredictorStats``."""

PLACEMENT: tuple[Metric, ...] = (
    _engine("counter", "placement_dropped_messages", "dropped", "Messages that the placement actor dropped."),
    _engine("counter", "placement_refused_clients", "refused", "Connections that the placement actor did not let in."),
)
"""From its ``PlacementServer``."""

ALL: tuple[Metric, ...] = (*REQUESTS, *ENGINE, *DEVICES, *SEEN_DEVICES, *CLUSTER, *PREDICTOR, *PLACEMENT)

Values = list[tuple[Metric, dict[str, str], float]]
"""Totals of counters and states of gauges, with their labels."""


def of_record(record: Any, metrics: Sequence[Metric], labels: Mapping[str, str] | None = None) -> Values:
    """What a record says of these metrics; figures that are None or not there are left out."""
    found: Values = []
    for metric in metrics:
        value = getattr(record, metric.field, None)
        if value is not None:
            found.append((metric, dict(labels or {}), float(value)))
    return found


def of_engine(stats: EngineStats) -> Values:
    """The engine's."""
    return of_record(stats, ENGINE)


def of_device(stats: DeviceStats) -> Values:
    """What a worker tells of its own device."""
    return of_record(stats, DEVICES, {DEVICE: stats.name})


def of_health(device: str, state: str, *, heartbeat_age_s: float | None, restarts: int) -> Values:
    """How a device looks from outside."""
    by_field = {"up": float(state == "healthy"), "heartbeat_age_s": heartbeat_age_s, "restarts": float(restarts)}
    labels = {DEVICE: device}
    values = [(metric, labels, value) for metric in SEEN_DEVICES if (value := by_field.get(metric.field)) is not None]
    metric = next(metric for metric in SEEN_DEVICES if metric.field == "state")
    return values + [(metric, {**labels, STATE: each}, float(each == state)) for each in STATES]


def of_repairs(repairs: int, lost_experts: int) -> Values:
    """How a cluster copes with devices that come and go."""
    by_field = {"repairs": float(repairs), "lost_experts": float(lost_experts)}
    return [(metric, {}, by_field[metric.field]) for metric in CLUSTER]


def of_substituted(pairs: Mapping[str, int]) -> Values:
    """By device, the pairs that were its and gave way."""
    metric = next(metric for metric in SEEN_DEVICES if metric.field == "substituted")
    return [(metric, {DEVICE: device}, float(count)) for device, count in pairs.items()]


def of_faults(faults: Sequence[ExpertFault], devices: Iterable[str]) -> Values:
    """By device, the requests that its experts have failed."""
    found = requests_by_device(faults)
    metric = next(metric for metric in SEEN_DEVICES if metric.field == "bad_outputs")
    return [(metric, {DEVICE: device}, float(found[device])) for device in devices]


def requests_by_device(faults: Sequence[ExpertFault]) -> Counter[str]:
    """How many requests each device's experts have failed."""
    found: Counter[str] = Counter()
    for fault in faults:
        found[fault.device] += fault.requests
    return found


def of_predictor(stats: PredictorStats | None) -> Values:
    """Of what foretells routing, where anything does. A shadow's counts are known while it is there."""
    if stats is None:
        return []
    well = stats.state == "healthy"
    up = next(metric for metric in PREDICTOR if metric.field == "up")
    rest = of_record(stats, [metric for metric in PREDICTOR if metric is not up])
    return [(up, {}, float(well)), *(rest if well and stats.kind == "shadow" else [])]


def of_observations(observations: Observations) -> list[tuple[Metric, Sequence[float]]]:
    """Values of histograms."""
    return [(metric, getattr(observations, metric.field)) for metric in REQUESTS]
