"""What the workers have read: every copy of an expert must be made of the same bytes."""

from collections.abc import Iterable

from raymoe.errors import CheckpointError
from raymoe.types import DeviceName, ExpertDigests, ExpertKey

SHORT = 12  # characters of a fingerprint that a message shows


class DigestBook:
    """Digests of all experts that any worker has read. Who reads one later is told what to expect."""

    def __init__(self) -> None:
        self._known: ExpertDigests = {}
        self._first: dict[ExpertKey, DeviceName] = {}

    def of(self, keys: Iterable[ExpertKey]) -> ExpertDigests:
        """Of these experts, as far as known."""
        return {key: self._known[key] for key in keys if key in self._known}

    def add(self, device: DeviceName, digests: ExpertDigests) -> None:
        """A worker has read these. Raises CheckpointError where another had read something else."""
        for key, found in digests.items():
            known = self._known.setdefault(key, found)
            first = self._first.setdefault(key, device)
            if known != found:
                raise CheckpointError(
                    f'layer {key.layer}, expert {key.expert}: device "{device}" has read other weights than "{first}"; '
                    "give all nodes the same checkpoint, and start again"
                )


def check_same_weights(engine: str, workers: Iterable[tuple[DeviceName, str, str]]) -> None:
    """Raise CheckpointError where a worker's checkpoint is not the engine's.

    Args:
        engine: fingerprint of its weights.
        workers: device, address of its node, and fingerprint.
    """
    for device, address, found in workers:
        if found != engine:
            raise CheckpointError(
                f'device "{device}" on node {address} serves other weights (fingerprint {found[:SHORT]}…) than the '
                f"engine ({engine[:SHORT]}…); give all nodes the same checkpoint, and start again"
            )
