"""Every error that raymoe raises on purpose.

Bad input is a ``ValueError`` as well, so that callers who know nothing of us still catch it; its message
names the thing, the limit or the expectation, and the way out.
"""


class RaymoeError(Exception):
    """Root of all errors of this package."""


class ConfigError(RaymoeError, ValueError):
    """The cluster configuration is wrong or can't be met."""


class CheckpointError(RaymoeError, ValueError):
    """The model directory is missing, incomplete, damaged or of a kind that can't be served."""


class CapacityError(RaymoeError, ValueError):
    """Experts do not fit: host memory, slot memory or KV memory is too small."""


class RequestError(RaymoeError, ValueError):
    """A generation request asks for something impossible.

    ``param`` names the offending field for API answers.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class FrameError(RaymoeError, ValueError):
    """Bytes from a socket are not a well-formed frame, or exceed a limit."""


class LoadCancelledError(RaymoeError):
    """A load was given up before it was complete."""


class ExpertUnavailableError(RaymoeError):
    """A worker did not answer an expert call in time, or answered with an error."""


class ExpertLostError(ExpertUnavailableError):
    """No worker that can be reached has experts that a request needs.

    ``experts`` are (layer, expert), ``devices`` their silent owners.
    """

    def __init__(self, message: str, experts: tuple[tuple[int, int], ...] = (), devices: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.experts = experts
        self.devices = devices


class EngineStoppedError(RaymoeError):
    """The engine stopped while the request was waiting or running."""


class StartError(RaymoeError):
    """The cluster could not be started."""


class OverloadedError(RaymoeError):
    """Too many requests are waiting already; try again later."""
