"""What the placement actor tells engines of the cluster."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymoe.config import SchedulingConfig
from raymoe.placement.ownership import Ownership
from raymoe.types import DeviceName

if TYPE_CHECKING:
    from raymoe.transport.sockets import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What an engine needs: owners, where the workers listen, and the placement actor's own socket.

    Attributes:
        resident: ids of the experts in each worker's slots.
        scheduling: the settings in force, which may have been changed since the configuration was read.
        shadow: where the shadow predictor listens; None where there is none, or it could not be started.
    """

    ownership: Ownership
    endpoints: "dict[DeviceName, Endpoint]"
    placement: "Endpoint"
    replication: int
    nodes: dict[DeviceName, str]
    resident: dict[DeviceName, tuple[int, ...]]
    scheduling: SchedulingConfig
    shadow: "Endpoint | None" = None
