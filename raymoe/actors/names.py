"""How the actors of an application are called. One fixed namespace; names carry the application's."""

NAMESPACE = "raymoe"


def placement_name(app: str) -> str:
    """The placement actor of ``app``."""
    return f"raymoe:{app}:placement"


def worker_name(app: str, device: str) -> str:
    """The expert worker of one device of ``app``."""
    return f"raymoe:{app}:worker:{device}"
