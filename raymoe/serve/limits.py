"""How much each key may ask: requests per minute, and at a time. Counted in this process."""

from collections.abc import Callable
from dataclasses import dataclass, field

from raymoe.serve.keys import Key

MINUTE_S = 60.0


@dataclass(slots=True)
class _Account:
    """What one key has used. ``tokens`` is what a bucket of requests_per_minute holds, refilled steadily."""

    tokens: float
    at_s: float
    under_way: int = 0


@dataclass
class Limits:
    """Admits requests by their keys' limits. Used from one thread.

    Args:
        clock: seconds that never go back.
    """

    clock: Callable[[], float]
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def enter(self, key: Key) -> str | None:
        """Admit a request, which must ``leave`` later; or the limit that it would exceed, in words."""
        account = self._account(key)
        if key.concurrent is not None and account.under_way >= key.concurrent:
            return f'key "{key.name}" may have {key.concurrent} requests under way at a time, and has them'
        if key.requests_per_minute is not None:
            if account.tokens < 1:
                return f'key "{key.name}" may send {key.requests_per_minute} requests per minute, and has'
            account.tokens -= 1
        account.under_way += 1
        return None

    def leave(self, key: Key) -> None:
        """A request that was admitted has ended."""
        self._accounts[key.name].under_way -= 1

    def wait_s(self, key: Key) -> float:
        """Seconds until the rate admits another request; 0 where it does now."""
        if key.requests_per_minute is None:
            return 0.0
        missing = 1 - self._account(key).tokens
        return max(0.0, missing * MINUTE_S / key.requests_per_minute)

    def _account(self, key: Key) -> _Account:
        most, now_s = float(key.requests_per_minute or 0), self.clock()
        account = self._accounts.setdefault(key.name, _Account(most, now_s))
        account.tokens = min(most, account.tokens + (now_s - account.at_s) * most / MINUTE_S)
        account.at_s = now_s
        return account
