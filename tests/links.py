"""A link to a shadow that is not there."""

from dataclasses import dataclass, field
from typing import Any

from raymoe.transport.shadow_messages import FromShadow, News


@dataclass
class FakeLink:
    """Keeps what it is told; hands over the plans and drafts that are coming once, when they are asked for."""

    moves: int = 1
    told: list[News] = field(default_factory=list)
    coming: list[FromShadow] = field(default_factory=list)

    def tell(self, news: News) -> None:
        self.told.append(news)

    def receive(self, on_told: Any) -> None:
        coming, self.coming = self.coming, []
        for told in coming:
            on_told(told)
