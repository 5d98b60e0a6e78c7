"""How the actors of an application are called. One fixed namespace; names carry the application's."""

from dataclasses import dataclass

NAMESPACE = "raymoe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Which actor answers, and since which start: the same actor in another life was restarted."""

    actor: str
    start: str


def placement_name(app: str) -> str:
    """The placement actor of ``app``."""
    return f"raymoe:{app}:placement"


def worker_name(app: str, device: str) -> str:
    """The expert worker of one device of ``app``."""
    return f"raymoe:{app}:worker:{device}"
