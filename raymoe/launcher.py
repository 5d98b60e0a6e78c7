"""``raymoe.launch``: a cluster from Python, without HTTP. The engine runs in the caller's process."""

import os
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import ray

from raymoe.actors.session import OnStage, Session
from raymoe.actors.tracing import ClusterTrace
from raymoe.config import ClusterConfig
from raymoe.engine.prompts import Prompt
from raymoe.engine.request import Chunk, Result
from raymoe.engine.service import ModelService
from raymoe.observe.stats import ClusterStats


class Moe:
    """A running model. Use as a context manager: leaving it ends every actor that was started."""

    def __init__(self, session: Session, owns_ray: bool) -> None:
        self._session = session
        self._owns_ray = owns_ray

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """A whole answer to a text, token ids, or chat messages.

        ``options``: max_tokens (128), temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, ignore_eos,
        repetition_penalty, presence_penalty, frequency_penalty, logprobs, logit_bias, json_schema or grammar (which the
        answer must follow), priority, and quality ("exact", "balanced", "fast", or an alpha from 0 to
        scheduling.alpha_max: how freely experts may be substituted under policies importance and joint). Raises
        RequestError for bad ones. ``result.routing`` tells what the expert calls cost, and how much was substituted.
        """
        return self._session.service.generate(prompt, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """The answer in chunks as it is made, with the options of ``generate``; leaving the loop early cancels it."""
        return self._session.service.stream(prompt, **options)

    @property
    def service(self) -> ModelService:
        """What answers: for measurements of the trunk while no request is under way."""
        return self._session.service

    def reconfigure(self, **changes: Any) -> None:
        """Change settings of scheduling while the model runs, such as ``alpha=0.3``; the others stay as they are.

        Raises ConfigError that names the field and what is allowed, and ExpertUnavailableError where the placement
        actor does not answer; nothing is changed then. Requests under way keep an alpha of their own.
        """
        self._session.reconfigure(**changes)

    def stats(self) -> ClusterStats:
        """Devices and engine."""
        return self._session.stats()

    def trace(self) -> ClusterTrace:
        """Records what every process does when, while it is entered: ``with moe.trace() as trace: moe.generate(…)``.

        Then ``trace.recordings`` holds it. Enter and leave it while no request is under way.
        """
        return self._session.trace()

    def close(self) -> None:
        """End the engine, the workers, and Ray where this started it."""
        self._session.close()
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> "Moe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(config: ClusterConfig | dict[str, Any], *, app: str | None = None, on_stage: OnStage | None = None) -> Moe:
    """Start a cluster and return the running model.

    Ray is joined where it is initialised or ``RAY_ADDRESS`` is set, else started; a config whose devices are
    all ``local`` and that has no shadow needs none and starts none. Raises RaymoeError; nothing is left running then.

    Args:
        app: names the actors; a fresh name where omitted.
        on_stage: told of each stage of the start.
    """
    if not isinstance(config, ClusterConfig):
        config = ClusterConfig.parse(config)
    owns_ray = False
    needs_ray = config.predictor_kind == "shadow" or any(device.transport == "zmq" for device in config.devices)
    if needs_ray and not ray.is_initialized():
        from raymoe.checkpoint.opening import open_configured

        # a bad checkpoint should be told before Ray is started for it
        open_configured(config.model)
        owns_ray = "RAY_ADDRESS" not in os.environ
        ray.init(log_to_driver=False, include_dashboard=False if owns_ray else None)
    try:
        session = Session(config, app or f"launch-{uuid.uuid4().hex[:8]}", on_stage or (lambda stage: None))
    except BaseException:
        if owns_ray:
            ray.shutdown()
        raise
    return Moe(session, owns_ray)
