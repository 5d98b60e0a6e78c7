"""A model ready to answer: checkpoint, workers, trunk and engine put together, behind prompts and text.

Runs without Ray. The launcher uses it inside the caller's process, the Serve deployment inside its replica.
"""

import json
import logging
import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from predictor.forecast import Forecast
from predictor.gate import GateForecast
from predictor.history import HistoryForecast
from predictor.resident import Experts, ResidentForecast
from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import EMBEDDED_MODEL, ClusterConfig, SchedulingConfig
from raymoe.engine.cacheless import CachelessScheduler
from raymoe.engine.conductor import Conductor
from raymoe.engine.directory import View
from raymoe.engine.dispatch import Dispatcher
from raymoe.engine.drafting import Drafting
from raymoe.engine.engine import Engine, EngineReport, OnChunk, RequestId
from raymoe.engine.foresight import Foresight, ShadowLink
from raymoe.engine.grammar import Grammars
from raymoe.engine.joint import JointScheduler
from raymoe.engine.live import LiveMeter, LiveTrace
from raymoe.engine.profile import load_similarity
from raymoe.engine.prompts import Prompt, Prompts, is_chat
from raymoe.engine.record import RecordingScheduler, recording
from raymoe.engine.request import Chunk, Result, SamplingParams, collect
from raymoe.engine.sampling import SamplingDefaults
from raymoe.engine.scheduler import ExpertScheduler, OnForecast
from raymoe.engine.scheduler_protocol import RowScheduler, Scheduler
from raymoe.engine.turns import captured_decode
from raymoe.engine.watch import WatchedScheduler
from raymoe.errors import CheckpointError, RequestError
from raymoe.experts.build import torch_device
from raymoe.kernels.gpu import load_gpu
from raymoe.model.captured import CapturedDecode
from raymoe.model.emulation import Emulation
from raymoe.model.emulation_proof import attach_emulation
from raymoe.model.fast import use_native_kernels
from raymoe.model.gpu_blocks import use_gpu_kernels
from raymoe.model.kv_size import measure_kv
from raymoe.model.pieces_proof import prove_pieces
from raymoe.model.rows_proof import join_rows
from raymoe.model.runner import Runner
from raymoe.model.sites import MoeSite, attach_sites
from raymoe.model.trials import why_no_trials
from raymoe.model.trunk import build_trunk, tokenizer_path
from raymoe.observe.trace import MAIN, Recording, Tracer
from raymoe.types import DeviceName, ExpertKey

log = logging.getLogger(__name__)

CHAT_REPETITION_PENALTY = 1.1  # greedy chat of the small embedded model would otherwise repeat itself
DEFAULT_MAX_TOKENS = 128  # of generate and stream, which unlike the HTTP API have no default of OpenAI's


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What clients may know of the served model; sizes in bytes. ``tool_format`` is as in ``Prompts``."""

    name: str
    architecture: str
    dtype: str
    context: int | None
    layers: int
    experts_per_layer: int
    top_k: int
    trunk_bytes: int
    routed_bytes: int
    tool_format: str | None = None


class ModelService:
    """Answers prompts. ``generate`` and ``stream`` may be called from many threads.

    Args:
        dispatcher: where routed experts are computed.
        on_forecast: told of each forecast of routing.
        link: to the shadow, where the policy has one.

    Attributes:
        runner, experts: the trunk, and the say on its routing. They belong to the engine's thread; measurements may
            use them while no request is under way.
        meter: times of requests and sizes of steps, until somebody takes them.
        live: records a few steps on demand.

    Raises:
        ConfigError: a device that is not there, or a profile of other weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ClusterConfig,
        dispatcher: Dispatcher,
        on_forecast: OnForecast | None = None,
        link: ShadowLink | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        trunk_device = torch_device(config.trunk.device, "trunk")
        if config.trunk.threads is not None:
            torch.set_num_threads(config.trunk.threads)
        self._scheduling = config.scheduling
        self.experts = experts = self._scheduler(dispatcher, on_forecast, link)
        model = build_trunk(checkpoint, experts, trunk_device)
        native = config.trunk.native_kernels and use_native_kernels(model) > 0
        gpu_kernels = load_gpu() if trunk_device.type == "cuda" and config.trunk.cuda_graphs else None
        if gpu_kernels is not None:
            use_gpu_kernels(model, gpu_kernels)
        self.runner = Runner(model, single_threaded_decode=native)
        if config.trunk.max_running > 1 and isinstance(experts, RowScheduler):
            self._join_rows()
        if isinstance(experts, RowScheduler):
            self._prove_pieces()
        kv = measure_kv(self.runner)
        sites = self._attach_forecasts(model)
        self._captured: CapturedDecode | None = None
        if gpu_kernels is not None and isinstance(experts, ExpertScheduler):
            self._captured = captured_decode(self.runner, experts, checkpoint, sites, gpu_kernels)
            self.runner.captured = self._captured
        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=config.model.trust_remote_code)
        self.prompts = Prompts(self.tokenizer, checkpoint.path)
        raw = generation_config(checkpoint)
        text_config = checkpoint.config.get_text_config()
        ends = end_tokens(raw, text_config)
        grammars = Grammars(self.tokenizer, text_config.vocab_size, ends)
        self.defaults = SamplingDefaults.from_generation_config(raw, grammars)
        self.chat_defaults = self._chat_defaults(raw)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        drafting, self._drafts = self._drafting(dispatcher, text_config.vocab_size)
        self._engine = Engine(
            self.runner,
            experts,
            config.trunk,
            config.scheduling,
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            end_tokens=ends,
            context=self.context,
            vocabulary=text_config.vocab_size,
            max_output_tokens=config.serving.max_output_tokens,
            drafting=drafting,
            kv=kv,
            owners=experts,
            device_of=self._device_of,
            ttft_slo_s=config.serving.ttft_slo_s,
        )
        self.live = LiveTrace(self._engine, experts, [module for _, module in experts_modules(model)])
        self.meter = LiveMeter(self.live)
        self._engine.sink = self.meter
        self._engine.start()

    def _scheduler(
        self, dispatcher: Dispatcher, on_forecast: OnForecast | None, link: ShadowLink | None
    ) -> ExpertScheduler | CachelessScheduler:
        """Whoever has the say on routing and loads, by policy."""
        config = self.config
        substitutes = config.scheduling.on_lost_expert == "substitute"
        if config.scheduling.policy == "on_demand_shadow":
            assert dispatcher.fleet is not None, "this policy hands out experts over a fleet"
            conductor = Conductor(dispatcher.fleet, dispatcher.devices, dispatcher.order)
            foresight = Foresight(config.predictor, link)
            return CachelessScheduler(dispatcher, foresight, conductor, substitutes_lost=substitutes)
        similarity = load_similarity(config.scheduling, self.checkpoint)
        if config.scheduling.policy == "joint":
            foresight = Foresight(config.predictor, link)
            return JointScheduler(dispatcher, foresight, similarity, substitutes_lost=substitutes)
        return ExpertScheduler(dispatcher, config.scheduling, similarity=similarity, on_forecast=on_forecast)

    def _drafting(self, dispatcher: Dispatcher, vocabulary: int) -> tuple[Drafting | None, str]:
        """Who says which drafts are read along, if any are, and that in words."""
        predictor, experts = self.config.predictor, self.experts
        if predictor is None or not predictor.drafts or not isinstance(experts, CachelessScheduler):
            return None, "off"
        reason = why_no_trials(self.runner)
        if reason is not None:
            log.warning("the model reads no drafts along: %s", reason)
            return None, f"off ({reason})"
        links = max(1, len(dispatcher.devices))
        load_s = lambda: (dispatcher.load_s() or 0.0) / links  # noqa: E731 - a closure over two locals
        return Drafting(experts.foresight, predictor.drafts, vocabulary, load_s), "on"

    def _join_rows(self) -> None:
        reason = join_rows(self.runner)
        if reason is not None:
            log.warning("requests decode one after the other, not as rows of one forward: %s", reason)

    def _prove_pieces(self) -> None:
        reasons = prove_pieces(self.runner)
        if "pieces" in reasons:
            log.warning("prompts are read whole, and from their beginning: %s", reasons["pieces"])
        elif "copies" in reasons:
            log.info("no caches are kept for prompts that begin alike: %s", reasons["copies"])

    def _attach_forecasts(self, model: PreTrainedModel) -> list[MoeSite] | None:
        """Give the scheduler the forecasts that this process makes, if it has a use for them. Returns their sites."""
        config, experts = self.config, self.experts
        kind = config.predictor_kind
        replaces = config.scheduling.substitutes or config.scheduling.on_lost_expert == "substitute"
        if not replaces and kind in (None, "shadow"):
            return None
        sites = attach_sites(model)
        routers = [site.router for site in sites]
        here = all(device.transport == "local" for device in config.devices)
        emulation = attach_emulation(model, sites) if here else None
        if emulation is None and "resident" in (kind, config.scheduling.prefetch):
            log.warning('this architecture has no forecast "resident": gates forecast instead')
        known = forecasts(sites, emulation, experts)
        if isinstance(experts, ExpertScheduler):
            experts.attach(routers, known)
        elif kind == "history":
            experts.attach(routers, history=HistoryForecast(len(routers), max(router.experts for router in routers)))
        else:
            experts.attach(routers, known.get(kind or ""))
        return sites

    # --- asking -----------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams, on_chunk: OnChunk) -> RequestId:
        """Start a request whose chunks go to ``on_chunk``. Raises RequestError, OverloadedError or DrainingError."""
        self._engine.check_room(params.priority)  # before a long prompt is encoded for nothing
        defaults = self.chat_defaults if is_chat(prompt) else self.defaults
        return self._engine.submit(self.encode(prompt), params, on_chunk, defaults)

    def cancel(self, request: RequestId) -> None:
        """End a request early."""
        self._engine.cancel(request)

    def drain(self) -> None:
        """Take no new requests; those under way go on. ``report`` tells how many there are."""
        self._engine.drain()

    def give_up(self, error: BaseException) -> None:
        """The engine's thread is stuck for good: end every request with ``error``, which is the failure from now on."""
        self._engine.give_up(error)

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Chunks of an answer as they come. Leaving the loop early cancels the request.

        ``options`` are the fields of SamplingParams; max_tokens defaults to 128.
        """
        params = sampling_params(options)
        chunks: queue.SimpleQueue[Chunk | BaseException] = queue.SimpleQueue()
        request = self.submit(prompt, params, chunks.put)
        finished = False
        try:
            while not finished:
                item = chunks.get(timeout=self.config.serving.request_timeout_s)
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            if not finished:
                self.cancel(request)

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """A whole answer; see ``stream`` for the options."""
        return collect(list(self.stream(prompt, **options)))

    # --- prompts ----------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError for what is neither text, token ids nor chat messages."""
        return self.prompts.encode(prompt)

    def _chat_defaults(self, raw: dict[str, Any]) -> SamplingDefaults:
        embedded = self.checkpoint.path.resolve() == EMBEDDED_MODEL.resolve()
        if not embedded or "repetition_penalty" in raw:
            return self.defaults
        return replace(self.defaults, repetition_penalty=CHAT_REPETITION_PENALTY)

    def _device_of(self, key: ExpertKey) -> DeviceName:
        """The device that an expert is asked of."""
        return next(iter(self.experts.dispatcher.by_owner(key.layer, np.array([key.expert]))))

    # --- looking ----------------------------------------------------------------------------------------

    @property
    def card(self) -> ModelCard:
        """The served model."""
        layers = self.checkpoint.layers
        return ModelCard(
            name=self.config.model.served_name,
            architecture=self.checkpoint.config.model_type,
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            context=self.context,
            layers=len(layers),
            experts_per_layer=max(layer.num_experts for layer in layers),
            top_k=max(layer.top_k for layer in layers),
            trunk_bytes=self.checkpoint.trunk_bytes,
            routed_bytes=self.checkpoint.routed_bytes,
            tool_format=self.prompts.tool_format,
        )

    @property
    def failure(self) -> BaseException | None:
        """Why generation no longer works, or None while it does."""
        return self._engine.failure

    @property
    def stalled_s(self) -> float:
        """Since the engine's thread last began a step or looked for work, in seconds."""
        return self._engine.stalled_s

    def report(self) -> EngineReport:
        """Counts and totals of the engine."""
        dispatcher = self.experts.dispatcher
        return replace(
            self._engine.report(),
            drafts=self._drafts,
            rerouted=dispatcher.rerouted,
            late_answers=dispatcher.late_answers,
            suspects=dispatcher.suspects,
        )

    @property
    def lead_s(self) -> float | None:
        """Mean time by which plans came before their layer, since the start; None where none did."""
        foresight = getattr(self.experts, "foresight", None)
        return None if foresight is None or not foresight.book.led else foresight.book.lead_s / foresight.book.led

    @property
    def substituted(self) -> dict[DeviceName, int]:
        """By device, the (token, expert) pairs that would have been its to compute, but gave way to others."""
        return self.experts.dispatcher.substituted()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self._engine.is_idle

    def trace(self, on: bool) -> Recording | None:
        """Begin to record what the trunk does; or end it, which returns what was recorded. While no request runs."""
        before = self._engine.experts
        self._decode_captured(not on)
        experts = WatchedScheduler(self.experts, self.experts, Tracer(MAIN)) if on else self.experts
        self._engine.experts = experts
        for _, module in experts_modules(self.runner.model):
            module.raymoe_backend = experts
        return before.tracer.recording() if isinstance(before, WatchedScheduler) else None

    @contextmanager
    def recorded(self) -> Iterator[RecordingScheduler]:
        """Note what is routed where while it is entered. No request may be under way at either end."""
        foresight = getattr(self.experts, "foresight", None) if self.config.predictor_kind == "shadow" else None

        def put(scheduler: Scheduler) -> None:
            self._engine.experts = scheduler

        self._decode_captured(False)
        try:
            with recording(self.runner.model, self.experts, self.experts, put, foresight) as recorder:
                yield recorder
        finally:
            self._decode_captured(True)

    def _decode_captured(self, wanted: bool) -> None:
        """Replay steps, or run them layer by layer for somebody who looks at each."""
        if wanted and self._captured is not None:
            self.runner.captured = self._captured
        elif not wanted:
            self.runner.captured = None

    def reconfigure(self, scheduling: SchedulingConfig) -> None:
        """Schedule by other settings from the next step on.

        Raises ConfigError where the profile can't be used, or the devices can't do it.
        """
        config = self.config.rescheduled(scheduling)
        if scheduling.similarity != self._scheduling.similarity and isinstance(
            self.experts, ExpertScheduler | JointScheduler
        ):
            self.experts.similarity = load_similarity(scheduling, self.checkpoint)
        self.config = config
        self._scheduling = scheduling
        self._engine.reconfigure(scheduling)

    def adopt(self, view: View) -> None:
        """Who owns what now: the engine goes by it from its next step on. From any thread."""
        self.experts.dispatcher.adopt(view)

    @property
    def suspects(self) -> tuple[DeviceName, ...]:
        """Remote workers that are silent."""
        return self.experts.dispatcher.suspects

    @property
    def on_suspect(self) -> Callable[[], None]:
        """Called, on the engine's thread, when a worker falls silent."""
        return self.experts.dispatcher.on_suspect

    @on_suspect.setter
    def on_suspect(self, action: Callable[[], None]) -> None:
        self.experts.dispatcher.on_suspect = action

    def close(self) -> None:
        """Stop the engine; requests that are not finished end with EngineStoppedError."""
        self._engine.stop()


def forecasts(sites: list[MoeSite], emulation: Emulation | None, experts: Experts) -> dict[str, Forecast]:
    """Forecasts of routing by kind. Where a layer can't be run ahead of, its gate stands in."""
    gate = GateForecast([site if site.router.rule is not None else None for site in sites])
    return {"gate": gate, "resident": gate if emulation is None else ResidentForecast(emulation, experts, gate)}


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from keyword options. Raises RequestError for unknown ones."""
    unknown = sorted(set(options) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise RequestError(f"no such option: {', '.join(unknown)}; known are {known}", param=unknown[0])
    values = {"max_tokens": DEFAULT_MAX_TOKENS, **options}
    stop = values.get("stop") or ()
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids") or ())
    return SamplingParams(**values)


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, or None where it has none. Code of its own never runs unless that was asked for."""
    path = tokenizer_path(checkpoint)
    if path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # many libraries below, many kinds of error
        raise CheckpointError(f"the tokenizer in {path} can't be loaded: {error}") from error


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of generation_config.json itself, without anyone's defaults."""
    file = checkpoint.path / "generation_config.json"
    if not file.exists():
        return {}
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    return raw if isinstance(raw, dict) else {}


def end_tokens(raw: dict[str, Any], text_config: Any) -> frozenset[int]:
    """The model's ends of sequence: generation_config.json's, else the model's configuration's."""
    value = raw.get("eos_token_id", getattr(text_config, "eos_token_id", None))
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, (list, tuple)) else frozenset({int(value)})
