"""What the routes need of an engine: whatever answers like ``EngineClient``."""

from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from raymoe.engine.request import SamplingParams
from raymoe.serve.batch import Batch

if TYPE_CHECKING:
    from raymoe.engine.prompts import Prompt
    from raymoe.observe.stats import ClusterStats


class Backend(Protocol):
    """What answers."""

    def stream(self, prompt: "Prompt", params: SamplingParams | Mapping[str, Any]) -> AsyncGenerator[Batch]:
        """Batches of an answer. Closing the iterator cancels the request."""
        ...

    async def card(self) -> dict[str, Any]:
        """The model. Raises RaymoeError where generation does not work."""
        ...

    async def stats(self) -> "ClusterStats":
        """Devices and engine. Raises RaymoeError where the engine does not answer."""
        ...

    async def tokenize(self, prompt: "Prompt") -> list[int]:
        """Token ids of a prompt. Raises RequestError for one that the engine would refuse."""
        ...

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids. Raises RequestError for ids that have none."""
        ...

    async def settings(self) -> dict[str, Any]:
        """The settings of scheduling in force."""
        ...

    async def change_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Change some; returns all. Raises ConfigError that names what is wrong, and changes nothing then."""
        ...

    async def residency(self) -> dict[str, Any]:
        """Where every expert is."""
        ...

    async def timeline(self) -> dict[str, Any]:
        """The last few decode steps."""
        ...
