"""What an ingress remembers of an engine that is full, so that it need not ask again for every request."""

from collections.abc import Callable

from raymoe.errors import OverloadedError

MOST_S = 0.5  # a refusal is remembered no longer, whatever the engine expects: room may come sooner


class Refusals:
    """The last refusal, for as long as the engine expects that nobody leaves. Used in one event loop.

    At many times the load that it can bear, an engine would otherwise spend its time on refusing.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: tuple[float, int, OverloadedError] | None = None

    def check(self, priority: int) -> None:
        """Raises the last refusal where it holds for a request of this priority: for those as urgent and less."""
        if self._last is not None:
            until_s, refused, error = self._last
            if self._clock() < until_s and priority >= refused:
                raise OverloadedError(str(error), error.retry_after_s)

    def note(self, error: OverloadedError, priority: int) -> None:
        """The engine has refused a request of this priority."""
        self._last = (self._clock() + min(MOST_S, error.full_s), priority, error)
