"""The cluster's configuration: what is read from files, the command line and Serve's arguments.

Everything here is strict (unknown fields are refused) and immutable, and imports neither torch nor Ray.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raymoe.errors import ConfigError
from raymoe.presets import SHADOW_PRESETS
from raymoe.strict import Bytes, BytesOrNone, StrictModel, read_mapping, validated, within

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny-moe"
"""The small trained checkpoint that ships with the package."""

ALL_INTERFACES = frozenset({"", "*", "0", "0.0.0.0", "::", "::0", "::ffff:0.0.0.0", "0:0:0:0:0:0:0:0"})

Alpha = Annotated[float, within(0, 1)]


def parse_layers(value: Any) -> Any:
    """A number of layers, or the numbers of some: refuse all else."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
        raise ValueError(f"is {value!r}; allowed is how many layers, or a list of their numbers such as [5, 7]")
    return value


Layers = Annotated[int | tuple[int, ...], BeforeValidator(parse_layers)]


Port = Annotated[int, within(1, 65535)]
HostPort = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[1-9]\d{0,4}$")]


class ModelConfig(StrictModel):
    """Which checkpoint is served, and in which precision."""

    path: str | None = Field(None, description="Directory or hub id of the checkpoint; omitted: the embedded one.")
    name: str | None = Field(None, description="Name shown by the API; omitted: the last part of the path.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of weights and activations; auto: as the checkpoint says."
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that lies in the checkpoint, on every node and with all rights of its process. "
        "Only for checkpoints whose authors you trust like those of the software itself; read the code before. No "
        "architecture that transformers knows by itself needs it.",
    )
    map_weights: bool = Field(
        False,
        description="Map weights that are stored as they are served, so that processes on a node share their memory. "
        "Only for files that nobody changes: a file that is truncated meanwhile ends whoever maps it.",
    )

    @property
    def source(self) -> str:
        """The path or hub id to open."""
        return self.path if self.path is not None else str(EMBEDDED_MODEL)

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.name or Path(self.source.rstrip("/")).name


class LinkConfig(StrictModel):
    """An emulated link between host memory and slots. For tests and benchmarks only: it imitates a slow bus.

    A transfer takes ``latency_s + bytes / bytes_per_s`` without burning CPU. Everything that reports on such a
    device says ``emulated``.
    """

    bytes_per_s: Bytes = Field(description='Bytes per second, for example "200MB".')
    latency_s: float = Field(0.0, ge=0, le=10, description="Seconds added to every transfer.")
    host_s: float | None = Field(
        None, gt=0, le=10, description="Imitated seconds of computing one expert on the host; omitted: it never does."
    )


class DeviceConfig(StrictModel):
    """One edge device: where it computes, and how much memory its shard and its slots may take."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="Unique in the cluster.")
    kind: str = Field("cpu", pattern=r"^(cpu|cuda:\d+)$", description='"cpu" or "cuda:N".')
    slot_memory: Bytes | None = Field(
        None, description="Strict budget for device slots. Omitted on cpu: compute straight from host memory."
    )
    host_memory: Bytes | None = Field(None, description="Most memory its shard may take; omitted: 80% of what is free.")
    link: LinkConfig | None = Field(None, description="Emulated link; cpu only, for tests and benchmarks.")
    transport: Literal["zmq", "local"] = Field(
        "zmq", description='"zmq": a worker process of its own; "local": inside the engine\'s process.'
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads for this worker's arithmetic; omitted: 1, inside the engine's process all of its.",
    )
    node_labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels the worker must match.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray resources the worker takes.")
    optional: bool = Field(
        False,
        description="Start without it where no alive node offers its labels and resources; it joins when one does. The "
        "other devices must hold all experts.",
    )
    ports: tuple[Port, Port] | None = Field(
        None,
        description="Fixed ports of its data plane, for firewalls and containers: one for expert calls, one for "
        "heartbeats and orders. Omitted: free ones.",
    )
    advertise: tuple[HostPort, HostPort] | None = Field(
        None,
        description='Where others reach these ports, each as "HOST:PORT", where that is not the bound address: '
        "published ports of a container, address translation, a tunnel. Needs ports.",
    )

    @property
    def has_slots(self) -> bool:
        """Whether experts must be loaded into slots; else they are computed straight from host memory."""
        return self.slot_memory is not None or self.link is not None or self.kind != "cpu"

    @model_validator(mode="after")
    def _link_only_on_cpu(self) -> "DeviceConfig":
        if self.link is not None and self.kind != "cpu":
            raise ValueError(
                f'device "{self.name}": "link" emulates a bus and works on kind "cpu" only, not "{self.kind}"; '
                "a real GPU has a real link, remove it"
            )
        if self.kind != "cpu" and self.slot_memory is None:
            raise ValueError(f'device "{self.name}" of kind "{self.kind}" needs "slot_memory", for example "2GiB"')
        return self

    @model_validator(mode="after")
    def _advertised_ports_are_fixed(self) -> "DeviceConfig":
        if self.ports is not None and self.ports[0] == self.ports[1]:
            raise ValueError(f'device "{self.name}": both ports are {self.ports[0]}; they must differ')
        if self.advertise is not None and self.ports is None:
            raise ValueError(f'device "{self.name}": "advertise" needs "ports", for free ports can\'t be known ahead')
        return self


class TrunkConfig(StrictModel):
    """Where everything but the routed experts lives."""

    device: str = Field("cpu", pattern=r"^(cpu|cuda:\d+)$", description='"cpu" or "cuda:N" of the engine\'s node.')
    kv_memory: Bytes | None = Field(
        None, description="Most memory for KV caches; requests that do not fit wait. Omitted: no limit."
    )
    prefix_memory: BytesOrNone | None = Field(
        None,
        description="Of kv_memory, the most for caches of finished requests, kept for prompts that begin alike; 0: "
        "none are kept. Omitted: what running requests leave free, or 64 MiB without kv_memory.",
    )
    prefill_chunk: int | None = Field(
        None,
        ge=1,
        description="Most prompt tokens that a step reads beside other requests' next tokens. Omitted: as many as "
        "lengthen a step by about half, as measured.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the trunk; omitted: one per core that no worker process needs."
    )
    max_running: int = Field(8, ge=1, le=1024, description="Requests that decode at the same time.")
    max_waiting: int = Field(64, ge=0, le=100_000, description="Requests that may wait; more are refused.")
    native_kernels: bool = Field(
        True, description="Use C++ kernels for decoding on a CPU where a compiler is found, or an image brings them."
    )
    cuda_graphs: bool = Field(
        True,
        description="On a GPU that is the only device too: replay captured graphs for single tokens, with kernels of "
        "raymoe's own where Triton is installed.",
    )
    node_labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels the engine must match.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray resources the engine takes.")


Policy = Literal["on_demand", "all_resident", "importance", "on_demand_shadow", "joint"]
Eviction = Literal["score", "lru", "lfu"]
Prefetch = Literal["gate", "resident", "none"]
SimilarityMeasure = Literal["score", "coactivation", "output"]
QUALITIES = ("exact", "balanced", "fast")
Quality = Literal["exact", "balanced", "fast"] | float


LostExpert = Literal["wait", "substitute"]


class SchedulingConfig(StrictModel):
    """How experts are brought into slots, kept there, and replaced by similar ones.

    Everything but ``policy``, ``group_size``, ``profile``, ``on_lost_expert`` and ``call_timeout_s`` can be changed
    while the model runs.
    """

    policy: Policy = Field(
        "on_demand",
        description="on_demand: load on a miss, evict the least recently used; all_resident: load once; "
        "importance: schedule by gate scores, with substitution, prefetch and host assist; on_demand_shadow: no "
        "cache, experts are loaded as the predictor names them and leave after use; joint: both, forecast scores say "
        "what is loaded, what is replaced and, with slots to spare, what stays; the default where there is a "
        "predictor.",
    )
    group_size: int | None = Field(
        None,
        ge=1,
        description="Workers that serve one layer under policies on_demand_shadow and joint, in turns with other "
        "groups; omitted: one per expert of a token.",
    )
    alpha: Alpha = Field(
        0.25, description="Width of the substitution window; 0 is exact. Of policies importance and joint."
    )
    alpha_max: Alpha = Field(0.5, description="Largest alpha that a request or the budget may choose.")
    tpot_budget_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Time per output token to aim for: alpha follows, slowly, within 0 and alpha_max.",
    )
    eviction: Eviction = Field(
        "score", description="Whom to evict: lowest mean gate score, least recently or least frequently used."
    )
    score_window: Annotated[int, within(1, 1024)] = Field(
        64, description="Steps over which gate scores are averaged for eviction by score."
    )
    prefetch: Prefetch = Field(
        "gate",
        description="Forecast of the next layers: their gates on the current state; resident: the paper's emulation "
        "of the layer in hand by its resident experts (local devices only).",
    )
    lookahead: Annotated[int, within(1, 8)] | None = Field(
        None, description="Layers that the gate forecast looks ahead; omitted: as far as a load takes."
    )
    host_assist: bool = Field(
        True, description="Compute an expert on the host CPU where that is sooner done than loading it."
    )
    similarity: SimilarityMeasure = Field(
        "score", description="Which substitute is best within the window; all but score need a profile."
    )
    profile: str | None = Field(None, description="Profile made by `raymoe calibrate` for these weights.")
    call_timeout_s: float = Field(
        60.0, gt=0, description="Longest wait for one expert call of a worker that lives; others are not waited for."
    )
    recovery_timeout_s: float = Field(
        30.0,
        ge=0,
        le=86400,
        description="Longest wait of a request for an expert whose owners can't be reached; then it ends with an "
        "error.",
    )
    on_lost_expert: LostExpert = Field(
        "wait",
        description="What a request does that needs such an expert: wait, or substitute: the best expert that can be "
        "reached computes in its place, whatever alpha says, and the answer is flagged as degraded.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "SchedulingConfig":
        if self.similarity != "score" and self.profile is None:
            raise ValueError(
                f'similarity "{self.similarity}" needs "profile": make one with `raymoe calibrate MODEL -o FILE`'
            )
        if self.alpha > self.alpha_max:
            raise ValueError(f"alpha is {self.alpha:g}, but alpha_max {self.alpha_max:g}; allowed is 0 to alpha_max")
        return self

    @property
    def substitutes(self) -> bool:
        """Whether experts that score low may be replaced by others."""
        return self.policy in ("importance", "joint")

    @property
    def follows_orders(self) -> bool:
        """Whether experts pass through slots as they are ordered for steps to come, by groups of workers in turns."""
        return self.policy in ("on_demand_shadow", "joint")

    def alpha_of(self, quality: Quality | None) -> float:
        """The alpha of one request; None is the configured one. Raises ValueError naming the allowed values.

        Policies that never substitute are exact, so there a quality costs and changes nothing.
        """
        named = {"exact": 0.0, "balanced": min(DEFAULT_ALPHA, self.alpha_max), "fast": self.alpha_max}
        if quality is None:
            alpha = self.alpha
        elif isinstance(quality, str) and quality in named:
            alpha = named[quality]
        elif isinstance(quality, (int, float)) and not isinstance(quality, bool) and 0 <= quality <= self.alpha_max:
            alpha = float(quality)
        else:
            raise ValueError(
                f'quality is {quality!r}; allowed are "exact", "balanced", "fast", or an alpha from 0 to '
                f"{self.alpha_max:g} (scheduling.alpha_max)"
            )
        return alpha if self.substitutes else 0.0

    def changed(self, changes: dict[str, Any]) -> "SchedulingConfig":
        """This with some fields changed. Raises ConfigError for unknown, fixed or wrong ones."""
        fixed = [name for name in FIXED_SCHEDULING if name in changes and changes[name] != getattr(self, name)]
        if fixed:
            raise ConfigError(f"scheduling.{fixed[0]} can't be changed while the model runs; restart it instead")
        return validated(SchedulingConfig, {**self.model_dump(), **changes}, "scheduling")


DEFAULT_ALPHA = 0.25  # SMoE's most careful setting, and what "balanced" stands for
FIXED_SCHEDULING = (
    "call_timeout_s",
    "group_size",
    "on_lost_expert",
    "policy",
    "profile",
)  # known to workers and engine from their start on


class UserConfig(StrictModel):
    """What Ray Serve's ``user_config`` of the engine may say: settings that are changed without a restart."""

    scheduling: dict[str, Any] = Field(
        default_factory=dict, description="Fields of scheduling that differ from the cluster configuration's."
    )

    @classmethod
    def settings(cls, data: Any, scheduling: SchedulingConfig) -> SchedulingConfig:
        """``scheduling`` of the cluster configuration as ``data`` changes it. Raises ConfigError naming the field."""
        changes = validated(cls, data, "user_config").scheduling
        try:
            return scheduling.changed(changes)
        except ConfigError as error:
            raise ConfigError(f"user_config: {error}") from error


PredictorKind = Literal["shadow", "gate", "resident", "history"]
ShadowPreset = Literal["exact", "balanced", "light"]


class PredictorConfig(StrictModel):
    """What tells policies on_demand_shadow and joint the routing ahead."""

    kind: PredictorKind = Field(
        "shadow",
        description="shadow: a quantised copy of the model that runs ahead; gate: the gates of the next layers on the "
        "current state; resident: the layer in hand by its resident experts (local devices only); history: what the "
        "token was routed to before.",
    )
    preset: ShadowPreset | None = Field(
        None,
        description="How cheap the shadow is: fills bits, top_k and skip_layers where they are not "
        "given. exact: 8 bits; balanced: 4; light: 4, best 2 experts of a token. docs/benchmarks.md compares them.",
    )
    bits: Literal[16, 8, 4, 3, 2] = Field(
        8, description="Precision of the shadow's routed experts; its trunk keeps the model's. 16: bfloat16 throughout."
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="Experts of a token that the shadow computes, at most: those that weigh most. Its forecasts name "
        "all that the router chose. Omitted: all of them.",
    )
    skip_layers: Layers = Field(
        0,
        description="MoE layers in which the shadow computes no routed experts: a list of their numbers, or so many "
        "from the last on. Their routing is foretold as well.",
    )
    token_align_every: int = Field(
        1, ge=0, description="Steps after which the shadow takes over the model's token; 0: never, it follows its own."
    )
    kv_align_every: int = Field(
        1, ge=0, description="Steps after which the shadow takes over the model's keys and values; 0: never."
    )
    run_ahead: bool = Field(
        True, description="Go on from the shadow's own next token before the model's is known, and back if it differs."
    )
    drafts: int = Field(
        0,
        ge=0,
        le=8,
        description="Most tokens of the shadow that the model reads along in one pass, and keeps as far as it would "
        "have chosen them itself; how many pay is measured. 0: none.",
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda:\d+)$", description='Where the shadow runs: "cpu" or "cuda:N".')
    threads: int | None = Field(None, ge=1, description="CPU threads of the shadow; omitted: 1.")
    node_labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels the shadow must match.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray resources the shadow takes.")

    @model_validator(mode="after")
    def _drafts_come_from_a_shadow_ahead(self) -> "PredictorConfig":
        if not self.drafts:
            return self
        needed = {"kind": "shadow", "run_ahead": True, "token_align_every": 1}
        for field, value in needed.items():
            if getattr(self, field) != value:
                raise ValueError(
                    f"drafts are what a shadow takes for the model's next tokens: they need {field} {value!r}, not "
                    f"{getattr(self, field)!r}; change it, or set drafts 0"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**SHADOW_PRESETS[preset], **data} if isinstance(preset, str) and preset in SHADOW_PRESETS else data

    @model_validator(mode="after")
    def _only_a_shadow_is_thinned(self) -> "PredictorConfig":
        given = [name for name in ("preset", "top_k", "skip_layers") if getattr(self, name)]
        if given and self.kind != "shadow":
            raise ValueError(f'{given[0]} is of kind "shadow", not "{self.kind}": remove it, or change the kind')
        return self


class ServingConfig(StrictModel):
    """The HTTP side."""

    max_output_tokens: int = Field(4096, ge=1, description="Upper limit for max_tokens of one request.")
    request_timeout_s: float = Field(600.0, gt=0, description="A request that takes longer is ended.")
    ttft_slo_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Time to first token that is promised: a request that would wait longer, by what was measured, is "
        "refused at once with 429 and when to come again. Omitted: only trunk.max_waiting bounds the queue.",
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="How long running requests may go on when the server is told to end."
    )
    stuck_timeout_s: float = Field(
        180.0,
        gt=0,
        description="An engine whose step takes longer is taken for stuck and restarted. More than "
        "scheduling.call_timeout_s, and than reading a long prompt takes.",
    )
    keys_file: str | None = Field(
        None,
        description="File of API keys on the ingress's node, made by `raymoe keys new`; requests then need a key. More "
        "may come from the environment variable RAYMOE_API_KEYS. docs/api.md says more.",
    )


class ClusterConfig(StrictModel):
    """A whole cluster: the model, its devices, the trunk, and how experts are scheduled."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    devices: tuple[DeviceConfig, ...] = Field(default=(DeviceConfig(name="cpu-0"),), min_length=1)
    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    replication: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Owners per expert; auto: 2 where half of the free memory holds it, else 1."
    )
    scheduling: SchedulingConfig = Field(default_factory=SchedulingConfig)
    predictor: PredictorConfig | None = Field(
        None,
        description="Of policies on_demand_shadow and joint; omitted: experts are loaded when the router has named "
        "them.",
    )
    serving: ServingConfig = Field(default_factory=ServingConfig)
    bind: str | None = Field(
        None,
        description="Address the data plane binds; omitted: loopback, or the node's address in a real cluster. One "
        "that stands for all interfaces is refused.",
    )

    @model_validator(mode="before")
    @classmethod
    def _a_predictor_is_for_the_joint_policy(cls, data: Any) -> Any:
        """With a predictor and no policy, the policy is joint."""
        if not isinstance(data, dict) or data.get("predictor") is None:
            return data
        scheduling = data.get("scheduling", {})
        if isinstance(scheduling, dict) and "policy" not in scheduling:
            return {**data, "scheduling": {**scheduling, "policy": "joint"}}
        return data

    @field_validator("bind")
    @classmethod
    def _binds_one_address(cls, bind: str | None) -> str | None:
        """Everyone connects to what was bound, so an address that means all interfaces is of no use either."""
        if bind is not None and bind.strip("[]") in ALL_INTERFACES:
            raise ValueError(
                f'"{bind}" is every interface of a node, and no address that others could connect to: omit bind, and '
                "each worker listens on its node's own address; to choose another, give that to `ray start "
                "--node-ip-address`"
            )
        return bind

    @model_validator(mode="after")
    def _names_are_unique(self) -> "ClusterConfig":
        names = [device.name for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"device names must be unique, but {', '.join(twice)} is used more than once")
        if isinstance(self.replication, int) and self.replication > len(self.devices):
            raise ValueError(
                f"replication {self.replication} needs as many devices, but only {len(self.devices)} are listed"
            )
        return self

    @model_validator(mode="after")
    def _some_device_is_certain(self) -> "ClusterConfig":
        for device in self.devices:
            if device.optional and device.transport == "local":
                raise ValueError(
                    f'device "{device.name}" lives in the engine\'s own process and is there whenever that is: remove '
                    '"optional", or the transport "local"'
                )
        if all(device.optional for device in self.devices):
            raise ValueError("all devices are optional, but the others must hold all experts: make one a certain one")
        return self

    @model_validator(mode="after")
    def _resident_forecast_is_local(self) -> "ClusterConfig":
        away = [device.name for device in self.devices if device.transport != "local"]
        fields = {"prefetch": self.scheduling.prefetch, "kind": self.predictor_kind}
        for field, kind in fields.items():
            if kind == "resident" and away:
                section = "scheduling" if field == "prefetch" else "predictor"
                raise ValueError(
                    f'{section}.{field} "resident" computes with the slots of the engine\'s own process, but '
                    f'{", ".join(away)} has another transport: set transport "local" for every device, '
                    f'or {field} "gate"'
                )
        return self

    @model_validator(mode="after")
    def _a_lost_call_is_not_a_stuck_engine(self) -> "ClusterConfig":
        stuck_s, call_s = self.serving.stuck_timeout_s, self.scheduling.call_timeout_s
        if stuck_s <= call_s:
            raise ValueError(
                f"serving.stuck_timeout_s is {stuck_s:g}, but a step may wait scheduling.call_timeout_s, {call_s:g} s, "
                "for an expert: make it longer"
            )
        return self

    @model_validator(mode="after")
    def _predictor_is_used(self) -> "ClusterConfig":
        if self.predictor is not None and not self.scheduling.follows_orders:
            raise ValueError(
                f'"predictor" is of policies "on_demand_shadow" and "joint", but scheduling.policy is '
                f'"{self.scheduling.policy}": change the policy, or remove the predictor'
            )
        return self

    @property
    def predictor_kind(self) -> PredictorKind | None:
        """What foretells routing; None where nothing does."""
        return None if self.predictor is None else self.predictor.kind

    def rescheduled(self, scheduling: SchedulingConfig) -> "ClusterConfig":
        """This with other scheduling. Raises ConfigError where it doesn't fit the devices."""
        fields = {name: getattr(self, name) for name in ClusterConfig.model_fields}
        return self.parse({**fields, "scheduling": scheduling}, where="scheduling")

    @classmethod
    def load(cls, path: str | Path) -> "ClusterConfig":
        """Read a YAML file. Raises ConfigError naming the file and every wrong field."""
        file = Path(path)
        return cls.parse(read_mapping(file, "cluster config", "keys such as model, devices"), where=str(file))

    @classmethod
    def parse(cls, data: dict[str, Any], *, where: str = "cluster config") -> "ClusterConfig":
        """Validate a mapping. Raises ConfigError with one line per wrong field."""
        return validated(cls, data, where)
