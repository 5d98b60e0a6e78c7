"""raymoe: serve a Mixture-of-Experts model over a Ray cluster of small, bounded devices, exactly."""

from typing import TYPE_CHECKING, Any

from raymoe import errors
from raymoe.config import ClusterConfig

if TYPE_CHECKING:
    from raymoe.launcher import Moe, launch
    from raymoe.serve.connection import Connection, connect

__version__ = "0.1.0"
__all__ = ["ClusterConfig", "Connection", "Moe", "connect", "errors", "launch"]


def __getattr__(name: str) -> Any:
    """Load the launcher, and with it torch and Ray, only when it is asked for."""
    if name in ("Moe", "launch"):
        from raymoe import launcher

        return getattr(launcher, name)
    if name in ("Connection", "connect"):
        from raymoe.serve import connection

        return getattr(connection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
