"""What the placement actor tells engines of the cluster."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymoe.config import SchedulingConfig
from raymoe.placement.health import HealthState
from raymoe.placement.ownership import Ownership
from raymoe.types import DeviceName

if TYPE_CHECKING:
    from raymoe.transport.sockets import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """What an engine needs: owners, where the workers listen, and the placement actor's own socket.

    Attributes:
        version: of owners and endpoints; another one, or another life of the placement actor, says something else.
        ownership: for each device what is in its host memory now; nothing for those that are down or rejoining.
        endpoints: of the devices that can be asked.
        health: the state of every device but those in the engine's own process.
        resident: ids of the experts in each worker's slots.
        scheduling: the settings in force, which may have been changed since the configuration was read.
        shadow: where the shadow predictor listens; None where there is none, or it could not be started.
    """

    version: int
    ownership: Ownership
    health: dict[DeviceName, HealthState]
    endpoints: "dict[DeviceName, Endpoint]"
    placement: "Endpoint"
    replication: int
    nodes: dict[DeviceName, str]
    resident: dict[DeviceName, tuple[int, ...]]
    scheduling: SchedulingConfig
    shadow: "Endpoint | None" = None
