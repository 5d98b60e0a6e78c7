"""The decode step of one sequence as CUDA graphs: captured once, replayed for every token.

Where every expert has a slot the step is one graph. Otherwise it is cut in each MoE layer, where the host decides which
experts are computed and loads what is missing: the model's own forward runs once, and whenever it comes to its experts
the capture ends and a new one begins. So no architecture is taken apart by hand, and nothing is allocated in a step.

The sequence's entries lie in a ``FixedCache`` meanwhile; whoever needs its own cache again calls ``release``.
"""

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.errors import EngineStoppedError
from raymoe.model.fixed_cache import FixedCache, capacity_for, why_not_fixed
from raymoe.model.runner import SequenceState

log = logging.getLogger(__name__)

DEVICE_TIMEOUT_S = 60.0  # for one segment, loads included: a guard against a device that hangs
LOOKS = 4096  # between two looks at the clock, of some microseconds each
WARM_UPS = 2  # runs before capturing: libraries set themselves up, kernels are compiled

Cut = Callable[[], None]
ForwardOne = Callable[[torch.Tensor, torch.Tensor, Any], Any]


class StepExperts(Protocol):
    """Who computes experts in a captured step.

    Attributes:
        is_whole: whether the host decides nothing, so that the step need not be cut.
    """

    is_whole: bool

    def compute(
        self, layer: int, hidden_1H: torch.Tensor, experts_1K: torch.Tensor, weights_1K: torch.Tensor, cut: Cut
    ) -> torch.Tensor:
        """Enqueue a layer's experts; the weighted sum of their outputs [1, H]. Calls ``cut`` where the host decides."""
        ...

    def decide(self, layer: int) -> None:
        """Between the two segments of a layer: the first is done, the second is about to be enqueued."""
        ...

    def meanwhile(self) -> None:
        """While the host waits for a segment: whatever may be done then, in a few microseconds."""
        ...

    def launched(self, layer: int) -> None:
        """The layer's second segment is enqueued."""
        ...

    def end(self) -> None:
        """The step's last segment is enqueued."""
        ...


class Segment(Protocol):
    """A part of a step that can be run again and again."""

    def run(self) -> None:
        """Enqueue it."""
        ...

    def is_done(self) -> bool:
        """Whether the device is through with it."""
        ...


class Recorder(Protocol):
    """Turns a forward into segments."""

    def record(self, forward: Callable[[Cut], torch.Tensor]) -> tuple[list[Segment], torch.Tensor]:
        """The segments, and the tensor that holds the result after each run of them all."""
        ...


class GraphSegment:
    """A CUDA graph, and an event behind it."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph
        self._done = torch.cuda.Event()

    def run(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()
        self._done.record()

    def is_done(self) -> bool:
        """Whether the event was passed."""
        return self._done.query()


class GraphRecorder:
    """Captures on a stream of its own; all graphs share one pool of memory, as they run in one order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, forward: Callable[[Cut], torch.Tensor]) -> tuple[list[Segment], torch.Tensor]:
        """Warm up, then capture. Raises what the forward or the capture raises; the device is usable afterwards."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward(lambda: None)
        torch.cuda.synchronize(self._device)
        pool = torch.cuda.graph_pool_handle()
        graphs = [torch.cuda.CUDAGraph()]

        def begin() -> None:
            graphs[-1].capture_begin(pool=pool, capture_error_mode="thread_local")

        def cut() -> None:
            graphs[-1].capture_end()
            graphs.append(torch.cuda.CUDAGraph())
            begin()

        with torch.cuda.stream(stream):
            begin()
            try:
                result = forward(cut)
            finally:
                graphs[-1].capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return [GraphSegment(graph) for graph in graphs], result


class CapturedDecode:
    """Decodes single tokens by replaying the step.

    Args:
        model: the trunk, with kernels for single tokens in place already.
        forward: its own forward of one token that follows a cache: (ids [1, 1], positions [1, 1], cache) -> outputs.
    """

    def __init__(self, model: Any, forward: ForwardOne, experts: StepExperts, recorder: Recorder) -> None:
        self._model = model
        self._forward = forward
        self._experts = experts
        self._recorder = recorder
        self._ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self._cache: FixedCache | None = None
        self._segments: list[Segment] = []
        self._logits = torch.empty(0)
        self._owner: weakref.ref[SequenceState] | None = None  # one that has ended is nobody's
        self._refused: str | None = None

    @property
    def refused(self) -> str | None:
        """Why steps are not captured; None while they are."""
        return self._refused

    @torch.inference_mode()
    def decode(self, state: SequenceState, token: int) -> torch.Tensor | None:
        """The logits after one more token ([vocabulary], float32); None where the step can't be captured.

        Mutates ``state``, whose own cache lags behind until ``release``.
        """
        if self._refused is not None or not self._take(state):
            return None
        assert self._cache is not None
        self._ids.fill_(token)
        self._cache.at(state.length)
        self._run()
        state.length += 1
        return self._logits.clone()

    @torch.inference_mode()
    def release(self, state: SequenceState) -> None:
        """Give a sequence its own cache again, if it lies here."""
        if self._is_owner(state):
            assert self._cache is not None
            self._cache.give_back(state.kwargs["past_key_values"], state.length)
            self._owner = None

    def _is_owner(self, state: SequenceState) -> bool:
        return self._owner is not None and self._owner() is state

    def _take(self, state: SequenceState) -> bool:
        """Whether the sequence lies in the fixed cache now, with room for one token more."""
        if self._is_owner(state) and self._cache is not None and state.length < self._cache.capacity:
            return True
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            self.release(owner)
        reason = why_not_fixed(state.kwargs.get("past_key_values"))
        if reason is None and (self._cache is None or state.length >= self._cache.capacity):
            reason = self._capture(state)
        if reason is not None:
            log.warning("decode steps run uncaptured, kernel by kernel: %s", reason)
            self._refused = reason
            return False
        assert self._cache is not None
        self._cache.take(state.kwargs["past_key_values"], state.length)
        self._owner = weakref.ref(state)
        return True

    def _capture(self, state: SequenceState) -> str | None:
        """Capture the step for caches as large as this sequence needs; why that failed, if it did."""
        self._segments, self._cache = [], None
        capacity = capacity_for(state.length + 1)
        cache = FixedCache(self._model.config.get_text_config(decoder=True), capacity, self._model.device)
        if not cache.is_plain:
            return "some layers see a part of the past only"
        try:
            cache.take(state.kwargs["past_key_values"], state.length)
        except torch.OutOfMemoryError:
            return f"no memory is left for a cache of {capacity:,} tokens beside the sequence's own"
        cache.at(state.length)

        def forward(cut: Cut) -> torch.Tensor:
            cache.begin_step()
            with computed_by(self._model, self._experts, cut):
                logits: torch.Tensor = self._forward(self._ids, cache.position, cache).logits[0, -1].float()
            return logits

        try:
            forward(lambda: None)
            cache.note_counting()
            self._segments, self._logits = self._recorder.record(forward)
        except Exception as error:  # architectures do many things that no graph can hold
            log.debug("capturing failed", exc_info=True)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._cache = cache
        return None

    def _run(self) -> None:
        experts, last = self._experts, len(self._segments) - 1
        for number, segment in enumerate(self._segments):
            segment.run()
            if number:
                experts.launched(number - 1)
            if number < last:
                self._wait(segment)
                experts.decide(number)
        experts.end()

    def _wait(self, segment: Segment) -> None:
        looks, deadline_s = 0, 0.0
        while not segment.is_done():
            self._experts.meanwhile()
            looks += 1
            if looks % LOOKS == 0:
                now_s = time.monotonic()
                deadline_s = deadline_s or now_s + DEVICE_TIMEOUT_S
                if now_s > deadline_s:
                    raise EngineStoppedError(f"the device did not finish a part of a step in {DEVICE_TIMEOUT_S:g} s")


class computed_by:
    """While entered, a trunk's experts are computed by ``experts``, in one step that may be cut."""

    def __init__(self, model: Any, experts: StepExperts, cut: Cut) -> None:
        self._modules = [module for _, module in experts_modules(model)]
        self._compute = lambda layer, hidden, chosen, weights: experts.compute(layer, hidden, chosen, weights, cut)

    def __enter__(self) -> None:
        for module in self._modules:
            module.raymoe_step = self._compute

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.raymoe_step = None
