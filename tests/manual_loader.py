"""A loader whose loads end when the test says so, for tests of slots."""

from collections.abc import Callable
from dataclasses import dataclass, field

from raymoe.checkpoint.checkpoint import ExpertTensors
from raymoe.errors import LoadCancelledError
from raymoe.experts.link import MemoryLink

LOAD_S = 1000.0  # of the manual loader's link: far longer than any test, so that no load is ever half done by itself


@dataclass
class ManualTicket:
    """A load that ends when the test says so, or at the latest when someone waits for it.

    ``reluctance`` is how often it must be asked whether it is done before it has ended by cancelling.
    """

    copy: Callable[[], None]
    done: bool = False
    error: BaseException | None = None
    hurried: bool = False
    reluctance: int = 0
    cancelled: bool = False

    def is_done(self) -> bool:
        if self.cancelled and not self.done:
            self.reluctance -= 1
            self._give_up()
        return self.done

    def wait(self, timeout_s: float) -> None:
        self.finish()

    def land(self, timeout_s: float) -> None:
        self.finish()

    def finish(self) -> None:
        if not self.done and self.error is None:
            self.copy()
        self.done = True

    def hurry(self) -> None:
        self.hurried = True

    def cancel(self) -> None:
        self.cancelled = True
        self._give_up()

    def _give_up(self) -> None:
        if self.reluctance <= 0 and not self.done:
            self.error = LoadCancelledError("cancelled")
            self.done = True

    def link_s(self) -> float | None:
        return LOAD_S if self.done and self.error is None else None

    def span_s(self) -> tuple[float, float] | None:
        return (1.0, 1.0 + LOAD_S) if self.done else None


@dataclass
class ManualLoader:
    """Notes every load; ``fails`` names experts whose loads end in an error, ``reluctance`` is that of its tickets."""

    fails: set[int] = field(default_factory=set)
    reluctance: int = 0
    started: list[tuple[int, int]] = field(default_factory=list)
    tickets: dict[int, ManualTicket] = field(default_factory=dict)
    on_idle: Callable[[], None] = lambda: None
    prefetches: int = 1

    def start(self, source: ExpertTensors, target: ExpertTensors, nbytes: int, priority: int) -> ManualTicket:
        identifier = int(source["down_proj"].item())
        error = OSError(f"expert {identifier} is unreadable") if identifier in self.fails else None
        ticket = ManualTicket(lambda: list(MemoryLink().pieces(source, target, nbytes)), error=error)
        ticket.reluctance = self.reluctance
        self.started.append((identifier, priority))
        self.tickets[identifier] = ticket
        return ticket

    def running(self) -> list[ManualTicket]:
        """Loads that have not ended."""
        return [ticket for ticket in self.tickets.values() if not ticket.done]

    def watch(self, on: bool) -> None:
        pass

    def close(self) -> None:
        pass
