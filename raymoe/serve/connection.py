"""``raymoe.connect``: a served model from any Python program of its Ray cluster, without HTTP."""

import contextlib
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raymoe.engine.prompts import Prompt
from raymoe.engine.request import Chunk, Result
from raymoe.errors import EngineStoppedError, StartError
from raymoe.observe.stats import ClusterStats
from raymoe.serve.errors import RequestTimeoutError, unwrap

STATS_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 660.0  # longer than serving.request_timeout_s, after which the engine ends a request itself

Value = TypeVar("Value")


class Connection:
    """A running application, as ``raymoe.launch`` would give it: ``generate``, ``stream`` and ``stats``.

    May be used from several threads. Use as a context manager, or call ``close``, where ``connect`` joined Ray itself.
    """

    def __init__(
        self, handle: DeploymentHandle, *, timeout_s: float = ANSWER_TIMEOUT_S, owns_ray: bool = False
    ) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._timeout_s = timeout_s
        self._owns_ray = owns_ray

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """A whole answer to a text, token ids, or chat messages.

        ``options`` are the fields of SamplingParams; max_tokens defaults to 128. Raises RequestError for bad ones,
        OverloadedError and EngineStoppedError as ``launch``'s does, and RequestTimeoutError.
        """
        response = self._handle.generate.remote(prompt, **options)
        try:
            return _own_errors(lambda: response.result(timeout_s=self._timeout_s))
        except TimeoutError as error:
            response.cancel()
            raise RequestTimeoutError(f"no answer within {self._timeout_s:g} s; the request was cancelled") from error

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Chunk]:
        """The answer in chunks as it is made, with the options of ``generate``; leaving the loop early cancels it."""
        response: Any = self._streaming.stream.remote(prompt, **options)
        finished = False
        try:
            while not finished:
                chunk: Chunk | None = _own_errors(lambda: next(response, None))
                if chunk is None:
                    raise EngineStoppedError("the engine ended in the middle of the answer")
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                response.cancel()

    def stats(self) -> ClusterStats:
        """Devices and engine."""
        return _own_errors(lambda: self._handle.stats.remote().result(timeout_s=STATS_TIMEOUT_S))

    def close(self) -> None:
        """Leave Ray where ``connect`` joined it. The application goes on."""
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(app: str = "raymoe", *, address: str = "auto", timeout_s: float = ANSWER_TIMEOUT_S) -> Connection:
    """A connection to application ``app``. Raises StartError where there is no such cluster or application.

    Args:
        address: of the Ray cluster; "auto": the one that ``RAY_ADDRESS`` names or that runs on this machine. Without
            meaning where this process has joined a cluster already.
        timeout_s: longest wait for a whole answer.
    """
    owns_ray = not ray.is_initialized()
    if owns_ray:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StartError(f"can't join a Ray cluster at {address}: {error}") from error
    try:
        return Connection(serve.get_app_handle(app), timeout_s=timeout_s, owns_ray=owns_ray)
    except RayServeException as error:
        running = _applications()
        if owns_ray:
            ray.shutdown()
        others = f"these run: {', '.join(running)}" if running else "none runs; start one with: raymoe serve CONFIG"
        raise StartError(f'no application "{app}" is served on this Ray cluster; {others}') from error


def _applications() -> list[str]:
    with contextlib.suppress(RayServeException):
        return sorted(serve.status().applications)
    return []


def _own_errors(ask: Callable[[], Value]) -> Value:
    """What ``ask`` returns; what Ray has wrapped, as it was raised."""
    try:
        return ask()
    except TimeoutError:
        raise
    except Exception as error:
        raise unwrap(error) from None
