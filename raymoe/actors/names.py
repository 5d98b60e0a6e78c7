"""How the actors of an application are called. One fixed namespace; names carry the application's."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymoe.transport.sockets import Endpoint

NAMESPACE = "raymoe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Which actor answers, and since which start: the same actor in another life was restarted.

    Attributes:
        version: of the ``ClusterView`` that there is now.
        settled: whether no device is on its way from one state to another, and no expert has to be read again.
        shadow: where the shadow listens now; None while there is none.
    """

    actor: str
    start: str
    version: int = 0
    settled: bool = True
    shadow: "Endpoint | None" = None


def placement_name(app: str) -> str:
    """The placement actor of ``app``."""
    return f"raymoe:{app}:placement"


def worker_name(app: str, device: str) -> str:
    """The expert worker of one device of ``app``."""
    return f"raymoe:{app}:worker:{device}"


def shadow_name(app: str) -> str:
    """The shadow predictor of ``app``."""
    return f"raymoe:{app}:shadow"
