"""What a simulation knows of a model: how many experts of which size, and how much the rest weighs."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from raymoe.errors import ConfigError
from raymoe.types import LayerSize

MOST = {"layers": 1024, "experts": 65_536, "top_k": 64}  # beyond that a file is damaged, or no model's


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model with MoE layers that are all alike; sizes in bytes.

    Attributes:
        layers, experts, top_k: MoE layers, experts of each, experts per token and layer.
        expert_bytes: of one routed expert.
        trunk_bytes: of all else that a token reads; of an embedding table that is one row.
        row_bytes: of one row of hidden states in a message.
        kv_bytes: keys and values of one token, in all layers.
        weight_bytes: of one number of its weights.

    Raises:
        ConfigError: a number that no model has.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    trunk_bytes: int
    row_bytes: int
    kv_bytes: int
    weight_bytes: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            most = MOST.get(field.name, 1 << 50)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"model {self.name}: {field.name} is {value!r}; allowed is 1 to {most:,}")
        if self.top_k > self.experts:
            raise ConfigError(f"model {self.name}: top_k is {self.top_k}, but there are {self.experts} experts")

    @property
    def sizes(self) -> tuple[LayerSize, ...]:
        """As placement knows layers."""
        size = LayerSize(experts=self.experts, expert_bytes=self.expert_bytes, top_k=self.top_k)
        return (size,) * self.layers

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``ModelShape(**…)`` is the inverse."""
        return asdict(self)


def _shape(
    name: str,
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    beside: int,
    kv: int,
    vocabulary: int,
    width: int,
) -> ModelShape:
    """Of experts with three matrices, as SwiGLU has.

    Args:
        beside: weights of one layer beside its routed experts: attention, router, shared experts.
        kv: keys and values of one token and layer, as numbers.
        width: bytes of a number.
    """
    return ModelShape(
        name=name,
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=3 * hidden * inner * width,
        trunk_bytes=(layers * beside + vocabulary * hidden) * width,
        row_bytes=hidden * width,
        kv_bytes=layers * kv * width,
        weight_bytes=width,
    )


# Sizes follow from the models' config.json on the Hugging Face hub.
_MIXTRAL = _shape(
    "mixtral-8x7b",
    layers=32,
    experts=8,
    top_k=2,
    hidden=4096,
    inner=14_336,
    beside=2 * 4096 * (4096 + 1024) + 8 * 4096,
    kv=2 * 1024,
    vocabulary=32_000,
    width=4,
)
_QWEN3 = _shape(
    "qwen3-30b-a3b",
    layers=48,
    experts=128,
    top_k=8,
    hidden=2048,
    inner=768,
    beside=2 * 2048 * (4096 + 512) + 128 * 2048,
    kv=2 * 512,
    vocabulary=151_936,
    width=2,
)
_TINY = _shape(
    "tiny-moe",
    layers=8,
    experts=32,
    top_k=4,
    hidden=256,
    inner=64,
    beside=2 * 256 * (256 + 128) + 3 * 256 * 128 + 32 * 256,
    kv=2 * 128,
    vocabulary=4096,
    width=4,
)
SHAPES = {shape.name: shape for shape in (_MIXTRAL, _QWEN3, _TINY)}
"""Models that a synthetic trace may be like: Mixtral in float32 as in OD-MoE, Qwen3 in bfloat16, the embedded one."""


def shape_named(name: str) -> ModelShape:
    """One of ``SHAPES``. Raises ConfigError that names them all."""
    if name not in SHAPES:
        raise ConfigError(f'--like is "{name}"; known are {", ".join(SHAPES)}')
    return SHAPES[name]
