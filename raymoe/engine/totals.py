"""What an engine counts."""

from collections import Counter, deque
from dataclasses import dataclass, field

from raymoe.engine.sequence import Sequence
from raymoe.types import DeviceName, ExpertFault, ExpertKey, Routing

LAST_STEPS = 64  # over which the size of batches is averaged: less than a second of most models


@dataclass(slots=True)
class Totals:
    """Since the engine began; changed by its thread alone.

    Attributes:
        prompt, cached: tokens of prompts, and those of them that needed no reading.
        queue_s: that admitted requests had waited, all together.
        routing: what expert calls cost.
        shrunk: times that kept caches went for want of device memory.
        not_finite: requests that failed because the model's output was no number; ``faults`` those of them that an
            expert is to blame for.
    """

    finished: int = 0
    failed: int = 0
    admitted: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    decode_s: float = 0.0
    queue_s: float = 0.0
    steps: int = 0
    shrunk: int = 0
    not_finite: int = 0
    faults: Counter[tuple[ExpertKey, DeviceName]] = field(default_factory=Counter)
    routing: Routing = field(default_factory=Routing)
    _last: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=LAST_STEPS))

    def admit(self, sequence: Sequence) -> None:
        """A request was let in."""
        assert sequence.begun_s is not None
        self.admitted += 1
        self.queue_s += sequence.begun_s - sequence.arrival_s

    def prompt_read(self, sequence: Sequence) -> None:
        """All of a request's prompt was."""
        self.prompt += len(sequence.prompt)
        self.cached += sequence.cached

    def step(self, rows: int, tokens: int) -> None:
        """A step has read so many tokens of so many requests."""
        self._last.append((rows, tokens))

    def faults_by_expert(self) -> tuple[ExpertFault, ...]:
        """Experts that are to blame for failed requests."""
        return tuple(
            ExpertFault(layer=key.layer, expert=key.expert, device=device, requests=requests)
            for (key, device), requests in sorted(self.faults.items())
        )

    def batch(self) -> tuple[float, float]:
        """Requests, and tokens, of one of the last steps, on average; zeros before the first."""
        last = list(self._last)
        if not last:
            return 0.0, 0.0
        return sum(rows for rows, _ in last) / len(last), sum(tokens for _, tokens in last) / len(last)
