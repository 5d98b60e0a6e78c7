"""The decode step of one sequence as a CUDA graph: captured once, replayed for every token.

Where every expert has a slot the host has nothing to do with it. Otherwise the graph stops in each MoE layer until the
host has decided which experts are computed and what was missing has been loaded (``engine.turns``): a kernel looks at a
word of host memory, which costs a few microseconds, where ending the graph there and launching another would cost
several times that. So no architecture is taken apart by hand, and nothing is allocated or launched in a step.

The sequence's entries lie in a ``FixedCache`` meanwhile; whoever needs its own cache again calls ``release``.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.errors import EngineStoppedError
from raymoe.model.fixed_cache import FixedCache, capacity_for, why_not_fixed
from raymoe.model.runner import SequenceState

log = logging.getLogger(__name__)

WARM_UPS = 2  # runs before capturing: libraries set themselves up, kernels are compiled

ForwardOne = Callable[[torch.Tensor, torch.Tensor, Any], Any]


class StepExperts(Protocol):
    """Who computes experts in a captured step."""

    @property
    def is_current(self) -> bool:
        """Whether a step that was captured before still is what is asked for."""
        ...

    def compute(
        self, layer: int, hidden_1H: torch.Tensor, experts_1K: torch.Tensor, weights_1K: torch.Tensor
    ) -> torch.Tensor:
        """Enqueue a layer's experts; the weighted sum of their outputs [1, H]."""
        ...

    def open(self) -> None:
        """Until ``begin``, steps run without waiting for the host, and compute nothing of use."""
        ...

    def begin(self) -> None:
        """The device is idle, and a step is about to be enqueued."""
        ...

    def abandon(self) -> None:
        """The step could not be enqueued."""
        ...

    def serve(self, look: Callable[[], bool]) -> None:
        """The step is enqueued: decide for each layer as the device comes to it; return when the step has ended.

        Raises what a decision or a load failed with; the device goes on to the step's end nevertheless.

        Args:
            look: whether the step has ended; raises what has befallen the device.
        """
        ...


class Step(Protocol):
    """A captured step."""

    def run(self) -> None:
        """Enqueue it."""
        ...

    def is_done(self) -> bool:
        """Whether the device is through with it. Raises what has befallen it."""
        ...


class Recorder(Protocol):
    """Turns a forward into a step."""

    def record(self, forward: Callable[[], torch.Tensor]) -> tuple[Step, torch.Tensor]:
        """The step, and the tensor that holds the result after each run."""
        ...


class GraphStep:
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
    """Captures on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, forward: Callable[[], torch.Tensor]) -> tuple[Step, torch.Tensor]:
        """Warm up, then capture. Raises what the forward or the capture raises; the device is usable afterwards."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = forward()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return GraphStep(graph), result


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
        self._step: Step | None = None
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

        Mutates ``state``, whose own cache lags behind until ``release``. Raises EngineStoppedError where the device did
        not go on with a step, and what it failed with.
        """
        if self._step is not None and not self._step.is_done():
            raise EngineStoppedError("the device has not ended an earlier step yet")
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
        cache = self._cache
        fits = cache is not None and state.length < cache.capacity and self._experts.is_current
        if fits and self._is_owner(state):
            return True
        owner = self._owner() if self._owner is not None else None
        if owner is not None:
            self.release(owner)
        reason = why_not_fixed(state.kwargs.get("past_key_values"))
        if reason is None and not fits:
            reason = self._capture(state)
        if reason is not None:
            log.warning("decode steps run uncaptured, kernel by kernel: %s", reason)
            self._refused = reason
            return False
        assert self._cache is not None
        self._cache.take(state.kwargs["past_key_values"], state.length)
        self._owner = weakref.ref(state)
        if self._model.device.type == "cuda":
            # a prompt may be under way, in whose experts' slots loads may begin from now on
            torch.cuda.synchronize(self._model.device)
        return True

    def _capture(self, state: SequenceState) -> str | None:
        """Capture the step for caches as large as this sequence needs; why that failed, if it did."""
        self._step, self._cache = None, None
        capacity = capacity_for(state.length + 1)
        cache = FixedCache(self._model.config.get_text_config(decoder=True), capacity, self._model.device)
        if not cache.is_plain:
            return "some layers see a part of the past only"
        try:
            cache.take(state.kwargs["past_key_values"], state.length)
        except torch.OutOfMemoryError:
            return f"no memory is left for a cache of {capacity:,} tokens beside the sequence's own"
        cache.at(state.length)

        def forward() -> torch.Tensor:
            cache.begin_step()
            with computed_by(self._model, self._experts):
                logits: torch.Tensor = self._forward(self._ids, cache.position, cache).logits[0, -1].float()
            return logits

        try:
            self._experts.open()
            forward()
            cache.note_counting()
            self._step, self._logits = self._recorder.record(forward)
        except Exception as error:  # architectures do many things that no graph can hold
            log.debug("capturing failed", exc_info=True)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._cache = cache
        return None

    def _run(self) -> None:
        step = self._step
        assert step is not None
        self._experts.begin()
        try:
            step.run()
        except BaseException:
            self._experts.abandon()
            raise
        self._experts.serve(step.is_done)


class computed_by:
    """While entered, a trunk's experts are computed by ``experts``, as a part of one step."""

    def __init__(self, model: Any, experts: StepExperts) -> None:
        self._modules = [module for _, module in experts_modules(model)]
        self._compute = experts.compute

    def __enter__(self) -> None:
        for module in self._modules:
            module.raymoe_step = self._compute

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.raymoe_step = None
